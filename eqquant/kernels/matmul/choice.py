"""Which implementation computes a product: a function of what is known when it is lowered."""

from collections.abc import Iterable

from ... import native as native_library
from . import int8_digits, reference, xla
from .cpu import choice as cpu, native, tables, tiled
from .gpu import product as gpu
from .product import Implementation, Product, Target
from .tpu import product as tpu


IMPLEMENTATIONS = {
    each.name: each
    for each in (
        Implementation("reference", reference.compute),
        Implementation("xla", xla.compute),
        Implementation("tiled", tiled.compute),
        Implementation("native", native.compute, native.supports, platforms=("cpu",)),
        Implementation("int8_digits", int8_digits.compute, int8_digits.supports),
        Implementation("tables", tables.compute, tables.supports),
        # Neither is chosen unless preferred: they have not run on a device yet.
        Implementation("gpu", gpu.compute, gpu.supports, gpu.pays, ("cuda", "gpu")),
        Implementation("tpu", tpu.compute, tpu.supports, tpu.pays, ("tpu",)),
    )
}
OLD_NAMES = {"fused": "xla", "integer": "int8_digits"}


def choose(product: Product, target: Target, preferred: str | None = None) -> str:
    """The name of the implementation that serves best. `preferred` wins where it runs, computes the product and
    pays."""
    if preferred is not None:
        wanted = IMPLEMENTATIONS[preferred]
        if wanted.runs_on(target) and wanted.supports(product) and wanted.pays(product):
            return preferred
    on_cpu = target.platform == "cpu" and not target.partitioned
    if on_cpu and target.calls_out:
        native_library.tell_if_missing()
        if native.supports(product):
            return "native"
    if product.digits == 1 and int8_digits.supports(product):
        return "int8_digits"
    return cpu.choose(product) if on_cpu else "xla"


def check_name(name: str | None) -> str | None:
    """The name of today for this one; raises `ValueError` unless there is an implementation of it."""
    name = OLD_NAMES.get(name or "", name)
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be {_names(IMPLEMENTATIONS)}; it is {name!r}.")
    return name


def check(name: str, product: Product, target: Target | None = None) -> None:
    """Raises `ValueError` unless the implementation of this name computes this product, and runs there."""
    each, x, w = IMPLEMENTATIONS[name], product.x, product.w
    if not each.supports(product):
        able = (other.name for other in IMPLEMENTATIONS.values() if other.supports(product))
        raise ValueError(
            f"implementation={name!r} does not compute the product of {x.dtype}{list(x.shape)} with "
            f"{type(w).__name__} {w.dtype}{list(w.shape)} along {product.axes.w_contract}; {_names(able)} would."
        )
    if target is not None and each.platforms is not None and not each.runs_on(target):
        where = f"a program for {target.platform or 'another platform'}"
        if target.platform in each.platforms:
            where = "one that is partitioned over devices, exported without custom calls, or for an older device"
        raise ValueError(
            f"implementation={name!r} runs on {each.platforms[0]}, but not in {where}."
        )


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
