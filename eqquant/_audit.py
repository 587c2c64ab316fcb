"""Which equations kept their operands packed, and which made them dense."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from ._daylight import AuditRow, recording
from ._implicit import Implicit, implicit
from ._table import format_bytes, format_table


@dataclasses.dataclass(frozen=True)
class Audit:
    """One row for each equation that met a quantized operand. `str()` gives a table."""

    rows: tuple[AuditRow, ...]
    """In the order of tracing; the body of a loop counts once."""

    @property
    def densified(self) -> tuple[AuditRow, ...]:
        """The rows that made a quantized operand dense."""
        return tuple(row for row in self.rows if row.densified)

    @property
    def dense_bytes(self) -> int:
        """Bytes of all operands that were made dense."""
        return sum(row.dense_bytes for row in self.rows)

    def as_dicts(self) -> list[dict[str, Any]]:
        """The rows as dictionaries."""
        return [dataclasses.asdict(row) for row in self.rows]

    def __str__(self) -> str:
        header = ["primitive", "operands", "rule", "kernel", "made dense", "line"]
        rows = [
            [
                row.primitive,
                ", ".join(row.operands),
                row.rule,
                row.kernel,
                format_bytes(row.dense_bytes) if row.densified else "",
                row.source,
            ]
            for row in self.rows
        ]
        total = (
            f"equations with a quantized operand: {len(rows)}; that made it dense: "
            f"{len(self.densified)} ({format_bytes(self.dense_bytes)})"
        )
        return f"{format_table(header, rows, left=4)}\n{total}" if rows else total


def audit(f: Callable[..., Any], *args: Any, platform: str | None = None, **kwargs: Any) -> Audit:
    """Traces `implicit(f)(*args, **kwargs)` and reports on every equation with a quantized operand.

    Nothing is computed, and nothing warns or raises for being made dense.

    **Arguments:**

    - `f`: a function or model, wrapped in [`implicit`][eqquant.implicit] or not.
    - `args`, `kwargs`: its arguments.
    - `platform`: `"cpu"`, `"cuda"`, `"tpu"`: where it would run, on one device. By default, here.

    **Returns:** an [`Audit`][eqquant.Audit]: primitive, operands, the rule with its file and line
    (or `densified`), the kernel of a product, bytes, and the line of user code.

    !!! example

        ```python
        import equinox as eqx, jax, jax.numpy as jnp
        import eqquant as eqq

        model = eqq.quantize(eqx.nn.MLP(8, 4, 16, 2, key=jax.random.key(0)), eqq.Array8B.quantize)
        found = eqq.audit(model, jnp.ones(8))
        assert not found.densified
        print(found)
        ```
    """
    wrapped = f if isinstance(f, Implicit) else implicit(f)
    with recording(platform or jax.default_backend()) as records:
        eqx.filter_eval_shape(wrapped, *args, **kwargs)
    return Audit(tuple(records))
