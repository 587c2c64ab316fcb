"""Set-up of the whole suite: checked types, eight virtual devices, hypothesis profiles."""

import gc
import os
from collections.abc import Iterator
from typing import Any


# Before JAX is imported: sharding is tested on eight virtual devices of the CPU.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.pop("EQQUANT_ON_MATERIALIZE", None)

import hypothesis
import jax
import jaxtyping
import pytest
from jax._src import compiler


jaxtyping.install_import_hook("eqquant", "beartype.beartype")
import helpers  # noqa: E402, after the hook: it imports eqquant

from eqquant import native  # noqa: E402


# Tracing makes many small objects: a tenth of the time went into looking for cycles.
gc.set_threshold(200_000, 20, 50)

_COMMON = dict(
    deadline=None,  # the first example of each shape compiles
    suppress_health_check=list(hypothesis.HealthCheck),
    print_blob=True,
)
hypothesis.settings.register_profile("dev", max_examples=5, **_COMMON)
hypothesis.settings.register_profile(
    "ci",
    max_examples=5,
    derandomize=True,
    database=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],  # shrinking takes minutes
    **_COMMON,
)
hypothesis.settings.register_profile("nightly", max_examples=500, **_COMMON)
hypothesis.settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev")
)


@pytest.fixture(scope="module", autouse=True)
def _free_compiled_programs():
    """Thousands of them would fill the memory of a small machine."""
    yield
    jax.clear_caches()


@pytest.fixture
def own_table() -> Iterator[None]:
    """Rules and laws that a test adds are forgotten after it."""
    with helpers.own_table():
        yield


def _optimize(fully: bool) -> None:
    jax.config.update("jax_disable_most_optimizations", not fully)
    if jax.__version_info__ < (0, 11):
        # The code generator takes three quarters of the time of compiling a small program there.
        compiler.get_compile_options = _compile_options if fully else _with_older_code_generator


_compile_options = compiler.get_compile_options


def _with_older_code_generator(*args: Any, **params: Any) -> Any:
    options = _compile_options(*args, **params)
    options.env_option_overrides += [("xla_cpu_use_fusion_emitters", False)]
    return options


@pytest.fixture(scope="module")
def fully_optimized():
    """For modules that test what XLA makes of a program (its memory, its kernels), or that compute much.

    Elsewhere programs are many and small, and most of the time would go into optimizing them.
    """
    _optimize(True)
    yield
    _optimize(False)


@pytest.fixture
def without_native(monkeypatch):
    """For tests of XLA's operations for CPUs: they are chosen as if there were no native kernels."""
    monkeypatch.setattr(native, "info", lambda: native.Info(False, None, "a test does without"))


_optimize(False)
