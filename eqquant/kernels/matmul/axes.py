"""Which axes of a product are summed over, which are mapped over, and where the others go."""

from typing import Any, NamedTuple


class Axes(NamedTuple):
    """The dimension numbers of a `dot_general`, as tuples."""

    x_contract: tuple[int, ...]
    w_contract: tuple[int, ...]
    x_batch: tuple[int, ...]
    w_batch: tuple[int, ...]

    @staticmethod
    def of(dimension_numbers: Any) -> "Axes":
        (xc, wc), (xb, wb) = dimension_numbers
        return Axes(*(tuple(int(axis) for axis in axes) for axes in (xc, wc, xb, wb)))

    @property
    def dimension_numbers(self) -> Any:
        return (self.x_contract, self.w_contract), (self.x_batch, self.w_batch)

    def x_free(self, ndim: int) -> list[int]:
        return [i for i in range(ndim) if i not in self.x_contract + self.x_batch]

    def w_free(self, ndim: int) -> list[int]:
        return [i for i in range(ndim) if i not in self.w_contract + self.w_batch]

    def x_axis(self, w_axis: int) -> int | None:
        """The axis of `x` that is multiplied with this axis of `w`; None for a free axis."""
        pairs = zip(self.w_batch + self.w_contract, self.x_batch + self.x_contract, strict=True)
        return dict(pairs).get(w_axis)

    def y_axis(self, w_axis: int, x_ndim: int, w_ndim: int) -> int | None:
        """The axis of the result that this axis of `w` becomes; None for a contracted axis."""
        if w_axis in self.w_contract:
            return None
        if w_axis in self.w_batch:
            return self.w_batch.index(w_axis)
        return x_ndim - len(self.x_contract) + self.w_free(w_ndim).index(w_axis)

    def without(self, x_axis: int | None, w_axis: int) -> "Axes":
        """Those of each product, if it is mapped over these axes."""

        def left(axes: tuple[int, ...], gone: int | None) -> tuple[int, ...]:
            return tuple(axis - (gone is not None and axis > gone) for axis in axes if axis != gone)

        return Axes(
            left(self.x_contract, x_axis),
            left(self.w_contract, w_axis),
            left(self.x_batch, x_axis),
            left(self.w_batch, w_axis),
        )
