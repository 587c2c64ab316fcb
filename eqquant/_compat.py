"""Every private or version-dependent name of JAX that eqquant uses, and nowhere else."""

import contextlib
import functools
import os
import pathlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jaxtyping
from jax import export
from jax._src import core as _core, dispatch as _dispatch, source_info_util as _source_info
from jax._src.export import _export
from jax._src.interpreters import partial_eval as _partial_eval
from jax._src.named_sharding import UnspecifiedValue as _UnspecifiedValue
from jax._src.sharding_impls import (
    ShardingContext as _ShardingContext,
    SPMDAxisContext as _SPMDAxisContext,
)
from jax._src.util import weakref_lru_cache as _weakref_lru_cache
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Primitive, primitives
from jax.interpreters import ad, batching, mlir
from plum._resolver import Resolver


__all__ = [
    "Jaxpr",
    "JaxprEqn",
    "Literal",
    "Primitive",
    "Resolver",
    "ad",
    "apply_primitive",
    "as_struct",
    "batching",
    "bind",
    "custom_jvp_parts",
    "custom_vjp_backward",
    "custom_vjp_forward",
    "equation_context",
    "find_primitive",
    "gpu_kind",
    "has_explicit_axes",
    "instantiate_zero",
    "is_eager",
    "is_partitioned",
    "is_specified_sharding",
    "is_unset",
    "logical_aval",
    "looks_up_rows",
    "mlir",
    "open_jaxpr",
    "optimization_barrier",
    "output_aval",
    "primitive_names",
    "register_node_serialization",
    "scan_counts",
    "source_frame",
    "takes_triton",
    "tangent_dtype",
    "triton_without_warning",
    "weakly_cached",
]

apply_primitive = _dispatch.apply_primitive
weakly_cached: Callable[..., Any] = _weakref_lru_cache
"""Caches results as long as the first argument lives, if they do not hold it."""


def is_eager() -> bool:
    """Whether operations are computed now: no function is being traced or transformed."""
    return _core.trace_state_clean()


def register_node_serialization(cls: type, *, serialized_name: str, **functions: Any) -> None:
    """As `jax.export.register_pytree_node_serialization`; but of two classes of one name, the last one is read."""
    _export.deserialization_registry.pop(serialized_name, None)
    export.register_pytree_node_serialization(cls, serialized_name=serialized_name, **functions)


def open_jaxpr(jaxpr: Any) -> tuple[Jaxpr, list[Any]]:
    """The live equations of a jaxpr, and the values of its constants, which become its first
    inputs.

    JAX up to 0.11 has closed jaxprs (with constants) and open ones; from 0.12 there is one class.
    """
    consts = list(getattr(jaxpr, "consts", ()))
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return _without_dead_equations(jaxpr) or jaxpr, consts


@_weakref_lru_cache
def _without_dead_equations(jaxpr: Jaxpr) -> Jaxpr | None:
    """None if all are live: then the result would hold the argument, which so would never die."""
    inputs = _partial_eval.convert_constvars_jaxpr(jaxpr)
    live, _ = _partial_eval.dce_jaxpr(
        inputs, [True] * len(inputs.outvars), instantiate=[True] * len(inputs.invars)
    )
    return None if live is jaxpr else live


def bind(primitive: Primitive, operands: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    """Evaluates one equation on dense operands; the results always come as a list."""
    out = primitive.bind(*operands, **primitive.get_bind_params(params))
    return list(out) if primitive.multiple_results else [out]


def promote_types(*dtypes: Any) -> Any:
    """The dtype that JAX promotes these to: also where `jax.numpy_dtype_promotion` forbids it to programs."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jax.numpy.promote_types, dtypes)


def tangent_dtype(dtype: Any) -> Any:
    """The dtype of tangents of arrays of `dtype`."""
    return _core.primal_dtype_to_tangent_dtype(dtype)


@contextmanager
def equation_context(eqn: JaxprEqn) -> Iterator[None]:
    """The name stack, source line and JAX configuration that `eqn` was traced under."""
    name_stack = _source_info.current_name_stack() + eqn.source_info.name_stack
    with (
        _source_info.user_context(eqn.source_info.traceback, name_stack=name_stack),
        eqn.ctx.manager,
    ):
        yield


class Frame(NamedTuple):
    """A line of user code."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} ({self.function})" if self.file else "unknown line"


_FOLDERS = (jax.__file__, eqx.__file__, jaxtyping.__file__, __file__)
_LIBRARIES = (
    *(f"{pathlib.Path(file).parent}{os.sep}" for file in _FOLDERS if file is not None),
    *("<@beartype", contextlib.__file__, functools.__file__),
)


def source_frame() -> Frame:
    """The innermost line of the current equation that belongs to neither JAX, Equinox nor
    eqquant; or else of the Python code that is running."""
    traceback = _source_info.current().traceback
    for frame in _source_info.user_frames(traceback):
        if frame is not None and not frame.file_name.startswith(_LIBRARIES):
            return Frame(frame.file_name, frame.start_line, frame.function_name)
    running = sys._getframe(1)
    while running is not None:
        code = running.f_code
        if not code.co_filename.startswith(_LIBRARIES):
            return Frame(code.co_filename, running.f_lineno, code.co_qualname)
        running = running.f_back
    return Frame("", 0, "")


@functools.cache
def _primitives_by_name() -> dict[str, Primitive]:
    found = {}
    for module in (jax.lax, primitives, _core):
        for value in vars(module).values():
            if isinstance(value, Primitive):
                found.setdefault(value.name, value)
    for path in ("jax._src.pjit", "jax._src.shard_map", "jax._src.lax.parallel", "jax._src.ad_checkpoint",
                 "jax._src.custom_batching", "jax._src.lax.lax", "jax._src.lax.slicing"):  # fmt: skip
        for value in vars(__import__(path, fromlist=["_"])).values():
            if isinstance(value, Primitive):
                found.setdefault(value.name, value)
    return found


def find_primitive(name: str) -> Primitive | None:
    """The JAX primitive called `name` in a printed jaxpr, or None if this JAX has none."""
    return _primitives_by_name().get(name)


def primitive_names() -> list[str]:
    """Every primitive that `jax.lax` exports."""
    return sorted({p.name for p in vars(jax.lax).values() if isinstance(p, Primitive)})


def is_specified_sharding(sharding: Any) -> bool:
    """False for the placeholder that `jit` keeps where the user gave no sharding."""
    return sharding is not None and not isinstance(sharding, _UnspecifiedValue)


def logical_aval(leaf: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """An abstract array of `shape` and `dtype`, sharded and varying over mesh axes as `leaf` is."""
    aval = jax.typeof(leaf)
    if aval.ndim == len(shape):
        return aval.update(shape=shape, dtype=jax.dtypes.canonicalize_dtype(dtype), weak_type=False)
    return _core.ShapedArray(shape, jax.dtypes.canonicalize_dtype(dtype))


def as_struct(aval: Any) -> jax.ShapeDtypeStruct:
    """What to trace a function on, so that its argument has exactly the type `aval`."""
    return jax.ShapeDtypeStruct(
        aval.shape,
        aval.dtype,
        sharding=None if aval.sharding.mesh.empty else aval.sharding,
        weak_type=aval.weak_type,
        manual_axis_type=aval.manual_axis_type,
    )


def has_explicit_axes(*arrays: Any) -> bool:
    """Whether the type of an array says how it is sharded (explicit mesh axes)."""
    return any(
        spec is not None
        for array in arrays
        for spec in getattr(jax.typeof(array).sharding, "spec", ())
    )


def is_partitioned(ctx: Any) -> bool:
    """Whether a lowering is for a program that XLA will partition over several devices."""
    context = ctx.module_context.axis_context
    if isinstance(context, _ShardingContext):
        return context.num_devices > 1
    if isinstance(context, _SPMDAxisContext):
        return set(context.manual_axes) != set(context.mesh.axis_names)
    return False


def is_exported(ctx: Any) -> bool:
    """Whether a lowering is for a program that is exported: to be run by other processes and later versions."""
    return bool(ctx.module_context.lowering_parameters.for_export)


def takes_triton(ctx: Any) -> bool:
    """Whether a lowering for CUDA may hold a kernel of Pallas for Triton.

    Not in an exported program: they are promised to run in later versions, which Triton's own is not. This
    is what `jax_export_ignore_forward_compatibility` turns off. And not for a GPU that JAX does not
    know, or that is older than what Triton supports.
    """
    if ctx.is_forward_compat():
        return False
    try:
        from jax._src.pallas.triton.gpu_info import (  # pyright: ignore[reportMissingImports]
            get_gpu_info,
        )
    except ImportError:  # before 0.11, which takes no GPU for a Hopper
        here = _local_devices("cuda")
        return not here or float(here[0].compute_capability) >= 8
    try:
        return get_gpu_info().compute_capability >= 80
    except ValueError:
        return False


def gpu_kind() -> str | None:
    """The kind of the GPUs that are here; None if there are none."""
    here = _local_devices("cuda")
    return here[0].device_kind if here else None


def looks_up_rows() -> bool:
    """Whether the TPUs that are here can look numbers up in the rows of a register: not before the fifth
    generation. True if there are none."""
    return not any(
        device.device_kind.startswith(("TPU v2", "TPU v3", "TPU v4"))
        for device in _local_devices("tpu")
    )


def _local_devices(backend: str) -> Sequence[Any]:
    try:
        return jax.local_devices(backend=backend)
    except RuntimeError:
        return ()


@contextmanager
def triton_without_warning() -> Iterator[None]:
    """Pallas for Triton is deprecated from JAX 0.11. Whoever calls a function of ours can do nothing about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated")
        yield


def output_aval(primitive: Primitive, *avals: Any, **params: Any) -> Any:
    """The abstract result of a primitive with one result."""
    out = primitive.abstract_eval(*avals, **params)
    return out[0] if isinstance(out, tuple) else out


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """How many constants and how many carries a `scan` equation has."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # from JAX 0.12
    return len(consts), len(carry)


def custom_jvp_parts(
    params: dict[str, Any], zeros: Sequence[bool]
) -> tuple[Jaxpr, Sequence[Any], Sequence[bool]]:
    """The derivative of a `custom_jvp_call`, with the tangents marked in `zeros` left out:
    its jaxpr over primals and the other tangents, its constants, and which results are zero."""
    jaxpr, consts, out_zeros = params["jvp_jaxpr_fun"].call_wrapped(*zeros)
    return jaxpr, _not_its_own(jaxpr, consts), out_zeros


def _not_its_own(jaxpr: Any, consts: Sequence[Any]) -> Sequence[Any]:
    """`consts`, unless `jaxpr` holds them itself, as some do from JAX 0.12."""
    return () if len(getattr(jaxpr, "consts", ())) else consts


def optimization_barrier(tree: Any) -> Any:
    """`jax.lax.optimization_barrier`, one for each group of arrays that vary over the same mesh
    axes: JAX would make all vary over all."""
    leaves, treedef = jax.tree.flatten(tree)
    groups: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        groups.setdefault(jax.typeof(leaf).manual_axis_type, []).append(i)
    for group in groups.values():
        barred = jax.lax.optimization_barrier([leaves[i] for i in group])
        for i, leaf in zip(group, barred, strict=True):
            leaves[i] = leaf
    return jax.tree.unflatten(treedef, leaves)


class CustomVJPForward(NamedTuple):
    """The forward pass of a `custom_vjp_call`: `jaxpr` is from `consts` and primals to
    `num_fresh` residuals and the results; `forwarded` says for each residual that the backward
    pass takes which operand of the call it is, or None where it is the next fresh one."""

    jaxpr: Jaxpr
    consts: Sequence[Any]
    num_fresh: int
    forwarded: Sequence[int | None]


def custom_vjp_forward(params: dict[str, Any], perturbed: Sequence[bool]) -> CustomVJPForward:
    """The forward pass of a `custom_vjp_call`, whose primals are differentiated where
    `perturbed` says so."""
    jaxpr, consts = params["fwd_jaxpr_thunk"].call_wrapped(*perturbed)
    _, residual_tree, forwarded = params["out_trees"]()
    num_fresh = residual_tree.num_leaves - sum(f is not None for f in forwarded)
    return CustomVJPForward(jaxpr, _not_its_own(jaxpr, consts), num_fresh, forwarded)


def custom_vjp_backward(params: dict[str, Any]) -> Callable[..., Sequence[Any]]:
    """The backward pass of a `custom_vjp_call`: from residuals and cotangents to the cotangents
    of the primals."""
    symbolic = params["symbolic_zeros"]

    def backward(*args: Any) -> Sequence[Any]:
        out = params["bwd"].call_wrapped(*(x if symbolic else instantiate_zero(x) for x in args))
        out = out[0] if isinstance(out, tuple) and len(out) == 2 else out
        return [instantiate_zero(ct) for ct in out]

    return backward


def instantiate_zero(x: Any) -> Any:
    """`x`, as an array if it is a symbolic zero."""
    if isinstance(x, jax.custom_derivatives.SymbolicZero):
        x = ad.Zero(x.aval)
    return ad.instantiate_zeros(x) if isinstance(x, ad.Zero) else x


def is_unset(branch: Any, output: int) -> bool:
    """Whether an output of a branch of a `cond` has no particular value: JAX fills so the
    residuals that only other branches need."""
    jaxpr = getattr(branch, "jaxpr", branch)
    made_by = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
    eqn = made_by.get(var) if not isinstance(var := jaxpr.outvars[output], Literal) else None
    while eqn is not None and eqn.primitive.name == "broadcast_in_dim":
        eqn = None if isinstance(var := eqn.invars[0], Literal) else made_by.get(var)
    return eqn is not None and eqn.primitive.name in ("empty", "empty2")
