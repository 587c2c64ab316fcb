"""The law suite, for your own format or rule. Needs `hypothesis`; import it by itself.

A law says of a JAX primitive: a program agrees with itself on the materialized array. The laws draw
programs, strategies draw arrays, and [`check_law`][eqquant.testing.check_law] brings them together.

!!! example

    ```python
    import hypothesis.strategies as st
    import jax.numpy as jnp
    import eqquant as eqq
    from eqquant import testing

    @st.composite
    def my_arrays(draw, shape, dtype=jnp.float32):
        rng = testing.generator(draw)
        codes = jnp.asarray(rng.integers(-127, 128, shape), jnp.int8)
        return eqq.Array8B(jnp.ones([1] * len(shape)), codes, dtype=dtype)

    testing.check_law("transpose", my_arrays, max_examples=2)
    ```
"""

from .._registry import LAYOUTS as LAYOUTS, Quantizer as Quantizer, QUANTIZERS as QUANTIZERS
from .checks import (
    assert_same as assert_same,
    check_dense_answer as check_dense_answer,
    check_law as check_law,
    Mode as Mode,
    MODES as MODES,
    Program as Program,
)
from .dense_answers import (
    DENSE_PROGRAMS as DENSE_PROGRAMS,
    NO_QUANTIZED_OPERAND as NO_QUANTIZED_OPERAND,
)
from .laws import Law as Law, law as law, LAWS as LAWS
from .strategies import (
    arrays as arrays,
    DTYPES as DTYPES,
    FORMATS as FORMATS,
    generator as generator,
    packings as packings,
    payloads as payloads,
    scales as scales,
    SHAPES as SHAPES,
    strategy_for as strategy_for,
)
