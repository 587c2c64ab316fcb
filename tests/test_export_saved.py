"""Exported programs that are saved: what their arguments and results hold is read in another process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from helpers import normal, small_mlp
from jax import export
from test_description import ARRAYS, example

import eqquant as eqq
from eqquant import _exporting


pytest.importorskip("flatbuffers", reason="jax.export writes its files with it")

ROOT = Path(__file__).parent.parent

# What reads the files: it knows no more than where they lie.
READER = """
import sys
from pathlib import Path
import jax, numpy as np
from jax import export

for file in sorted(Path(sys.argv[1]).glob("*.exported")):
    exported = export.deserialize(bytearray(file.read_bytes()))
    with np.load(file.with_suffix(".npz")) as numbers:
        leaves = [numbers[f"in {i}"].view(a.dtype) for i, a in enumerate(exported.in_avals)]
        want = [numbers[f"out {i}"] for i in range(len(exported.out_avals))]
    args, kwargs = exported.in_tree.unflatten(leaves)
    got = exported.call(*args, **kwargs)
    assert jax.tree.structure(got) == exported.out_tree
    for g, w in zip(jax.tree.leaves(got), want, strict=True):
        np.testing.assert_allclose(np.asarray(g, np.float64), w, rtol=1e-5, atol=1e-4, err_msg=file.stem)
    print(file.stem)
"""


def save(folder: Path, name: str, exported: export.Exported, *args: Any) -> None:
    """An exported program, with what it is called with and what it has to give."""
    (folder / f"{name}.exported").write_bytes(exported.serialize())
    want = jtu.tree_leaves(exported.call(*args))
    numbers = {f"in {i}": as_stored(x) for i, x in enumerate(jtu.tree_leaves(args))}
    numbers |= {f"out {i}": np.asarray(x, np.float64) for i, x in enumerate(want)}
    np.savez(folder / f"{name}.npz", allow_pickle=False, **numbers)


def as_stored(x: Any) -> np.ndarray:
    """NumPy's files know no small floats."""
    x = np.asarray(x)
    return x if x.dtype.isbuiltin else x.view(f"u{x.dtype.itemsize}")


def read_elsewhere(folder: Path, *imported: str) -> list[str]:
    """The names of the programs that a process of its own reads and calls, after it has imported these modules."""
    code = "".join(f"import {module}\n" for module in imported) + READER
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([paths, os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split("\n")[:-1]


def product(w: Any, x: Any) -> Any:
    """A product, and the packed weight itself."""
    return jnp.einsum("...mk,...ok->...mo", x, w), w


def exported_product(w: Any, x: Any, *, symbolic: bool) -> export.Exported:
    (rows,) = export.symbolic_shape("rows") if symbolic else (x.shape[-2],)
    struct = jax.ShapeDtypeStruct((*x.shape[:-2], rows, x.shape[-1]), x.dtype)
    return export.export(jax.jit(eqq.implicit(product)))(w, struct)


def test_every_class_is_read_in_another_process(tmp_path: Path) -> None:
    for i, name in enumerate(ARRAYS):
        w = example(name)
        x = normal(*w.shape[:-2], 3, w.shape[-1], seed=1)
        exported = exported_product(w, x, symbolic=i % 2 == 0)  # they take turns
        want = eqq.implicit(product)(w, x)[0]
        np.testing.assert_allclose(exported.call(w, x)[0], want, rtol=1e-4, atol=1e-3)
        save(tmp_path, name, exported, w, x)
    # `test_extending` defines a format, as a user does.
    assert sorted(read_elsewhere(tmp_path, "eqquant", "test_extending")) == sorted(ARRAYS)


def test_a_class_that_is_not_known_is_named(tmp_path: Path) -> None:
    w = example("somebody else's")
    save(tmp_path, "w", export.export(jax.jit(lambda w: w.materialize()))(w), w)
    with pytest.raises(AssertionError, match="unregistered type `test_extending:ArraySmallFloat`"):
        read_elsewhere(tmp_path, "eqquant")


def again(exported: export.Exported) -> export.Exported:
    return export.deserialize(exported.serialize(vjp_order=1))


def test_any_number_of_rows_and_the_derivative() -> None:
    w, x = example("nf4 double"), normal(5, 70)
    exported = again(exported_product(w, x[:1], symbolic=True))
    for rows in (1, 5):
        y, same = exported.call(w, x[:rows])
        np.testing.assert_allclose(y, x[:rows] @ w.materialize().T, rtol=1e-4, atol=1e-4)
        assert jtu.tree_structure(same) == jtu.tree_structure(w)
    gradient = jax.grad(lambda x: jnp.sum(exported.call(w, x)[0] ** 2))(x)
    want = jax.grad(lambda x: jnp.sum((x @ w.materialize().T) ** 2))(x)
    np.testing.assert_allclose(gradient, want, rtol=1e-4, atol=1e-3)


def test_another_array_is_refused() -> None:
    exported = again(exported_product(example("nf4"), normal(3, 70), symbolic=False))
    with pytest.raises(ValueError, match="block_size|pytree|tree"):
        exported.call(eqq.ArrayNF4.quantize(normal(4, 70), block_size=32), normal(3, 70))


def test_a_learned_step() -> None:
    step = eqq.LearnedStep.of(normal(4, 16))
    exported = again(export.export(jax.jit(lambda step, x: (step(x), step)))(step, normal(4, 16)))
    rounded, same = exported.call(step, normal(4, 16))
    np.testing.assert_array_equal(rounded, step(normal(4, 16)))
    assert jtu.tree_structure(same) == jtu.tree_structure(step)


def defined_anew() -> Any:
    class ArrayOfOnes(eqq.ImplicitArray):
        length: int = eqx.field(static=True)
        unused: jax.Array
        dtype: ClassVar[np.dtype] = np.dtype("float32")

        @property
        def shape(self) -> tuple[int, ...]:
            return (self.length,)

        def materialize(self) -> jax.Array:
            return jnp.ones(self.shape)

    return ArrayOfOnes


def test_a_class_that_is_defined_again_takes_the_place_of_the_first() -> None:
    first, second = defined_anew(), defined_anew()
    for cls in (first, second):
        exported = export.export(jax.jit(lambda x: x.materialize()))(cls(3, jnp.zeros(1)))
        read = again(exported)
        np.testing.assert_array_equal(read.call(second(3, jnp.zeros(1))), np.ones(3))


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    w = example("int8")
    text = export.export(jax.jit(lambda w: w.materialize()))(w).serialize()
    monkeypatch.setattr(eqq.Array8B, "description_version", 2)
    with pytest.raises(ValueError, match="a Array8B of version 1 .* the class is of version 2"):
        export.deserialize(text)


def test_a_model_by_its_leaves_is_read_without_this_library(tmp_path: Path) -> None:
    model = eqq.quantize(small_mlp(), eqq.ArrayNF4.quantize)
    arrays, rest = eqx.partition(model, eqx.is_array)
    leaves, treedef = jtu.tree_flatten(arrays)

    @jax.jit
    def run(leaves: list[Any], x: Any) -> Any:
        model = eqx.combine(jtu.tree_unflatten(treedef, leaves), rest)
        return eqq.implicit(lambda model, x: jax.vmap(model)(x))(model, x)

    (b,) = export.symbolic_shape("b")
    exported = export.export(run)(leaves, jax.ShapeDtypeStruct((b, 16), jnp.float32))
    save(tmp_path, "model", exported, leaves, normal(3, 16))
    assert read_elsewhere(tmp_path) == ["model"]  # nothing but jax is imported


def test_a_model_as_a_dictionary_of_its_arrays() -> None:
    model = eqq.quantize(small_mlp(), eqq.ArrayNF4.quantize)
    weights = {f"{i}": layer.weight for i, layer in enumerate(model.layers)}

    def run(weights: dict[str, Any], x: Any) -> Any:
        for w in weights.values():
            x = jnp.tanh(x @ w.T)
        return x

    exported = again(export.export(jax.jit(eqq.implicit(run)))(weights, normal(3, 16)))
    np.testing.assert_allclose(
        exported.call(weights, normal(3, 16)),
        run(eqq.materialize(weights), normal(3, 16)),
        rtol=1e-4,
        atol=1e-4,
    )


def test_what_is_written_is_json() -> None:
    _, auxdata = jtu.tree_structure(example("nf4")).node_data()
    assert json.loads(_exporting._written(eqq.ArrayNF4, auxdata))["facts"]["block_size"] == 64
