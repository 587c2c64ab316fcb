"""The compiled kernels for CPUs: every format, at every level of processors that runs here."""

import concurrent.futures
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqquant as eqq
from eqquant import native
from eqquant.coding import FloatCoding
from eqquant.native import build
from eqquant.testing import LAYOUTS, QUANTIZERS
from eqquant.tiles import to_elements


pytestmark = pytest.mark.skipif(not native.info().loaded, reason=native.info().reason)

NAMES = [name for name in LAYOUTS if name != "rsr ternary"]  # two payloads
LEVELS = [*build.LEVELS]


@pytest.fixture(params=LEVELS)
def level(request):
    try:
        with native.at_level(request.param):
            yield request.param
    except ValueError as error:
        pytest.skip(str(error))


def product(equation: str, x: Any, w: Any) -> Any:
    """By the native kernels, or not at all."""
    f = eqq.implicit(lambda x, w: jnp.einsum(equation, x, w))
    lowered = jax.jit(f).lower(x, w)
    assert native.TARGET in lowered.as_text()
    return lowered.compile()(x, w)


def close(y: Any, equation: str, x: Any, w: Any, eps: float = 1e-6) -> bool:
    """Whether an error is at most this share of what the terms of the sum come to at most."""
    x, dense = (np.asarray(a, np.float64) for a in (x, w.materialize()))
    want, terms = (np.einsum(equation, a, b) for a, b in ((x, dense), (abs(x), abs(dense))))
    assert y.shape == want.shape
    return bool((abs(np.asarray(y, np.float64) - want) <= eps * terms.max(initial=0)).all())


def normal(*shape: int, dtype: Any = jnp.float32) -> Any:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), dtype)


@pytest.mark.parametrize("name", NAMES)
def test_every_format_and_number_of_rows(level, name):
    for rows, outputs, inputs in [(1, 37, 75), (7, 66, 600), (17, 150, 129), (40, 1, 16)]:
        w = QUANTIZERS[name](normal(outputs, inputs))
        x, ct = normal(rows, inputs), normal(rows, outputs)
        assert close(product("mk,nk->mn", x, w), "mk,nk->mn", x, w), (rows, outputs, inputs)
        assert close(product("mn,nk->mk", ct, w), "mn,nk->mk", ct, w), (rows, outputs, inputs)


@pytest.mark.parametrize("name", NAMES)
def test_packed_down_the_columns(level, name):
    for rows, outputs, inputs in [(1, 100, 75), (2, 37, 600), (19, 150, 129)]:
        w = QUANTIZERS[name](normal(inputs, outputs), axis=0)
        x, ct = normal(rows, inputs), normal(rows, outputs)
        assert close(product("mk,kn->mn", x, w), "mk,kn->mn", x, w), (rows, outputs, inputs)
        assert close(product("mn,kn->mk", ct, w), "mn,kn->mk", ct, w), (rows, outputs, inputs)


@pytest.mark.parametrize("tile", [20, 64])
def test_tiles_of_several_bytes(level, tile):
    w = eqq.Array1B.quantize(normal(7, 200), tile=tile)
    for rows in (2, 20):
        x = normal(rows, 200)
        assert close(product("mk,nk->mn", x, w), "mk,nk->mn", x, w)


@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("format", [eqq.ArrayInt4, eqq.Array8B, eqq.ArrayNF4])
def test_block_sizes(level, format, block_size):
    w = format.quantize(normal(9, 4 * block_size + 16), block_size=block_size)
    for rows in (1, 12):
        x = normal(rows, w.shape[1])
        assert close(product("mk,nk->mn", x, w), "mk,nk->mn", x, w)


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_every_float8_number(level, kind):
    coding = FloatCoding(kind={"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}[kind])
    w = eqq.ArrayFP8.quantize(jnp.zeros((256, 1)), kind=kind)
    w = w.replace(bits=jnp.arange(256, dtype=jnp.uint8)[:, None], scale=jnp.ones((256, 1)))
    values = np.asarray(coding.value(jnp.arange(256, dtype=jnp.uint8), jnp.float32))
    np.testing.assert_array_equal(product("mk,nk->mn", jnp.ones((1, 1)), w)[0], values)
    zeros = np.where(np.isfinite(values), 0, np.nan)
    np.testing.assert_array_equal(product("mk,nk->mn", jnp.zeros((1, 1)), w)[0], zeros)


@pytest.mark.parametrize("name", ["int8", "nf4", "ternary", "binary"])
@pytest.mark.parametrize("rows", [2, 20])
def test_what_is_not_finite_stays_in_its_row(level, name, rows):
    w, x = QUANTIZERS[name](normal(5, 96)), np.array(normal(rows, 96))
    x[0, 3], x[1, 90] = np.nan, np.inf
    y = product("mk,nk->mn", jnp.asarray(x), w)
    assert np.isnan(y[0]).all() and not np.isfinite(y[1]).any()
    assert np.isfinite(y[2:]).all() and close(y[2:], "mk,nk->mn", x[2:], w)


@pytest.mark.parametrize("name", ["int8", "ternary", "binary"])
def test_rounded_activations_are_exact(level, name):
    w = QUANTIZERS[name](normal(30, 200))
    scale = np.asarray(to_elements(w.scale_leaf, [0]), np.float64)[:, 0]
    for rows in (1, 4, 20, 40):
        x = np.random.default_rng(rows).integers(-127, 128, (rows, 200)).astype(np.float32)
        x[:, 0] = 127
        f = eqq.implicit(lambda x, w: x @ w.T, activations="int8")
        y = jax.jit(f)(jnp.asarray(x), w)
        sums = (
            x.astype(np.float64)
            @ (np.asarray(w.materialize(), np.float64) / scale[:, None]).round().T
        )
        # Digits are summed up without rounding, floats are not.
        terms = abs(x) @ abs(np.asarray(w.materialize())).T
        atol = 0 if level == "x86_64_v4" else 1e-6 * terms.max()
        np.testing.assert_allclose(y, sums * scale, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("name", ["int8", "nf4 double", "ternary"])
@pytest.mark.parametrize(
    ("equation", "x_shape"),
    [("emk,enk->emn", (3, 5, 64)), ("mk,enk->emn", (5, 64)), ("emn,enk->emk", (3, 5, 9))],
)
def test_stacks(name, equation, x_shape):
    w, x = jax.vmap(QUANTIZERS[name])(normal(3, 9, 64)), normal(*x_shape)
    assert close(product(equation, x, w), equation, x, w)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    w, x = eqq.ArrayNF4.quantize(normal(9, 64, dtype=dtype)), normal(3, 64, dtype=dtype)
    y = product("mk,nk->mn", x, w)
    assert y.dtype == dtype
    assert close(y, "mk,nk->mn", x, w.replace(dtype=np.dtype("float32")), eps=1e-2)


def test_derivatives_take_the_kernels_too():
    w, x = eqq.ArrayNF4.quantize(normal(9, 64)), normal(3, 64)
    f = jax.jit(jax.grad(eqq.implicit(lambda x, w: (x @ w.T).sum()), argnums=0))
    assert f.lower(x, w).as_text().count(f"call @{native.TARGET}(") == 1
    want = w.materialize().sum(0)
    np.testing.assert_allclose(f(x, w), jnp.broadcast_to(want, x.shape), rtol=1e-5, atol=1e-5)


def test_empty_products():
    w = eqq.Array8B.quantize(jnp.ones((3, 4)))
    f = jax.jit(eqq.implicit(lambda x, w: x @ w.T))
    assert f(jnp.ones((0, 4)), w).shape == (0, 3)


def test_many_threads_and_many_calls():
    w, x = eqq.ArrayNF4.quantize(normal(300, 256)), normal(2, 256)
    f = jax.jit(eqq.implicit(lambda x, w: sum((x + i) @ w.T for i in range(12))))
    want = np.asarray(f(x, w))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for y in pool.map(lambda _: np.asarray(f(x, w)), range(64)):
            np.testing.assert_array_equal(y, want)


def test_exported_programs_do_not_call_out_unless_asked():
    w, x = eqq.Array8B.quantize(normal(9, 64)), normal(3, 64)
    allowed = [jax.export.DisabledSafetyCheck.custom_call(native.TARGET)]
    for asked in (None, "native"):
        f = eqq.implicit(lambda x, w: x @ w.T, implementation=asked)
        exported = jax.export.export(jax.jit(lambda x, f=f: f(x, w)), disabled_checks=allowed)(x)
        assert (native.TARGET in exported.mlir_module()) == (asked == "native")


FRESH = """
import warnings
import jax, jax.numpy as jnp, numpy as np
import eqquant as eqq, eqquant.native

def run():
    w = eqq.ArrayNF4.quantize(jnp.ones((5, 64)))
    return np.asarray(jax.jit(eqq.implicit(lambda x, w: x @ w.T))(jnp.ones((2, 64)), w))
"""


def fresh(code: str, **environment: str) -> str:
    """What a new process prints."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **environment}
    done = subprocess.run(
        [sys.executable, "-c", FRESH + code], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_switched_off_without_a_word():
    code = "warnings.simplefilter('error'); run(); print(eqquant.native.info().reason)"
    assert "EQQUANT_NATIVE=0 turns them off" in fresh(code, EQQUANT_NATIVE="0")


def test_built_without_a_compiler_it_says_so_once():
    code = """
from pathlib import Path
eqquant.native.info.cache_clear(), eqquant.native._library.cache_clear()
eqquant.native._LIBRARY = Path("there is none")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert (run() == 64).all() and (run() == 64).all()
print(*(str(w.message) for w in caught), sep="\\n")
"""
    lines = fresh(code).splitlines()
    assert len(lines) == 1 and "Install a C++ compiler" in lines[0]


def test_a_serialized_executable_and_a_child_process():
    # The kernels are registered when the package is imported, and need no thread of their own.
    code = """
import os, pickle
from jax.experimental.serialize_executable import deserialize_and_load, serialize
w, x = eqq.ArrayNF4.quantize(jnp.ones((5, 64))), jnp.ones((2, 64))
compiled = jax.jit(eqq.implicit(lambda x, w: x @ w.T)).lower(x, w).compile()
again = deserialize_and_load(*serialize(compiled))
assert (again(x, w) == 64).all()
warnings.simplefilter("ignore")
child = os.fork()
if child == 0:
    os._exit(0 if (np.asarray(compiled(x, w)) == 64).all() else 1)
print(os.waitpid(child, 0)[1])
"""
    assert fresh(code).strip() == "0"


def test_there_is_no_such_level():
    with (
        pytest.raises(ValueError, match="no native kernels of the level name='pdp_11' here"),
        native.at_level("pdp_11"),
    ):
        pass
    assert native.info().loaded


def test_a_compiler_that_fails_says_what_it_said(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.CannotCompile, match="no C\\+\\+ compiler"):
        build.compile_library(tmp_path / "library.so")
    monkeypatch.setenv("CXX", sys.executable)
    with pytest.raises(build.CannotCompile, match="failed"):
        build.compile_library(tmp_path / "library.so")


def test_products_of_integers_are_exact():
    x = np.random.default_rng(0).integers(-1000, 1000, (20, 300)).astype(np.float32)
    for levels, rows in (("ternary", 3), ("binary", 20)):
        signs = np.sign(np.random.default_rng(1).normal(size=(40, 300))).astype(np.int8)
        w = eqq.Array1B.quantize(jnp.asarray(signs), jnp.float32, levels=levels)
        np.testing.assert_array_equal(
            product("mk,nk->mn", jnp.asarray(x[:rows]), w), x[:rows] @ signs.T
        )


def test_a_scale_for_each_column_does_not_round_activations_twice(level):
    w, x = eqq.Array8B.quantize(normal(30, 200), axis=0), normal(4, 200)
    run = lambda **how: jax.jit(eqq.implicit(lambda x, w: x @ w.T, **how))(x, w)  # noqa: E731
    want = run(activations="int8", implementation="xla")
    np.testing.assert_allclose(run(activations="int8"), want, rtol=1e-4, atol=1e-4)
