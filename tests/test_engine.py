"""`register`, `implicit`, strict mode, warnings, `audit`, `ste`: the engine seen from outside."""

import concurrent.futures
import gc
import warnings
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import plum
import pytest
from jax import Array, lax

import eqquant as eqq
from eqquant import _compat, _dispatch
from eqquant.rules import control_flow


@pytest.fixture
def q():
    return eqq.Array8B.quantize(jax.random.normal(jax.random.key(0), (4, 6)))


@pytest.fixture
def table():
    """Rules registered in a test are forgotten after it."""
    before = {p: list(r.methods) for p, r in _dispatch._resolvers.items()}
    yield
    for primitive, resolver in list(_dispatch._resolvers.items()):
        if primitive not in before:
            del _dispatch._resolvers[primitive]
        else:
            resolver.methods[:] = before[primitive]
    _dispatch._resolved.clear()


# ------------------------------------------------------------------------------------- register


def test_the_most_specific_rule_wins(q, table):
    @eqq.register(lax.sin_p)
    def sin_of_the_family(primitive, x: eqq.AbstractScaledArray, **params):
        return jnp.zeros(x.shape)

    @eqq.register("sin")
    def sin_array8b(primitive, x: eqq.Array8B, **params):
        assert primitive is lax.sin_p
        return jnp.ones(x.shape)

    with eqq.strict():
        np.testing.assert_array_equal(eqq.implicit(jnp.sin)(q), np.ones((4, 6)))


def test_a_rule_may_decline(q, table):
    @eqq.register(lax.sort_p)
    def sort_nothing(primitive, x: eqq.Array8B, **params):
        return NotImplemented

    with pytest.warns(eqq.MaterializeWarning, match="sort"):
        np.testing.assert_array_equal(eqq.implicit(lax.sort)(q), lax.sort(q.materialize()))


def test_a_rule_that_declines_hands_over_to_the_next_less_specific(q, table):
    @eqq.register(lax.sort_p)
    def sort_of_the_family(primitive, x: eqq.AbstractScaledArray, **params):
        return [jnp.ones(x.shape)]

    @eqq.register(lax.sort_p)
    def sort_of_any(primitive, *xs: eqq.QuantizedArray | Array, **params):
        raise AssertionError("the rule of the family comes first")

    @eqq.register(lax.sort_p)
    def sort_array8b(primitive, x: eqq.Array8B, **params):
        return NotImplemented

    chain = _dispatch.resolve(lax.sort_p, eqq.Array8B)
    assert chain == (sort_array8b, sort_of_the_family, sort_of_any)
    with eqq.strict():
        np.testing.assert_array_equal(eqq.implicit(lax.sort)(q), np.ones((4, 6)))
    (row,) = eqq.audit(lax.sort, q).rows
    assert row.rule.startswith("sort_of_the_family (test_engine.py:") and not row.densified


def test_where_every_rule_declines_the_operand_becomes_dense_in_daylight(q, table):
    asked = []

    @eqq.register(lax.sort_p)
    def sort_of_the_family(primitive, x: eqq.AbstractScaledArray, **params):
        asked.append("family")
        return NotImplemented

    @eqq.register(lax.sort_p)
    def sort_array8b(primitive, x: eqq.Array8B, **params):
        asked.append("format")
        return NotImplemented

    with pytest.warns(eqq.MaterializeWarning, match="`sort` has no packed form"):
        np.testing.assert_array_equal(eqq.implicit(lax.sort)(q), lax.sort(q.materialize()))
    assert asked == ["format", "family"]
    (row,) = eqq.audit(lax.sort, q).rows
    assert row.rule == "densified" and row.dense_bytes == 4 * 24


def test_two_rules_that_fit_equally_well_are_an_error_when_their_turn_comes(q, table):
    @eqq.register("nextafter")
    def of_a_scaled_one(primitive, x: eqq.AbstractScaledArray, y: eqq.QuantizedArray, **params):
        return NotImplemented

    @eqq.register("nextafter")
    def of_another(primitive, x: eqq.QuantizedArray, y: eqq.AbstractScaledArray, **params):
        return NotImplemented

    with pytest.raises(plum.AmbiguousLookupError):
        _dispatch.resolve(lax.nextafter_p, eqq.Array8B, eqq.Array8B)

    declines = False

    @eqq.register("nextafter")
    def of_one_format(primitive, x: eqq.Array8B, y: eqq.Array8B, **params):
        return NotImplemented if declines else x.materialize()

    np.testing.assert_array_equal(eqq.implicit(lax.nextafter)(q, q), q.materialize())
    declines = True
    with pytest.raises(plum.AmbiguousLookupError):
        eqq.implicit(lax.nextafter)(q, q)


def test_a_format_of_the_users_is_not_hijacked(q, table):
    class Constant(eqq.QuantizedArray):
        value: Array
        like: tuple[int, ...] = eqx.field(static=True)

        @property
        def shape(self):
            return self.like

        @property
        def dtype(self):
            return self.value.dtype

        def materialize(self):
            return jnp.full(self.like, self.value)

    c = Constant(jnp.asarray(2.0), (4, 6))
    for f in (jnp.add, jnp.multiply, lambda a, b: a @ b.T, lambda a, b: jnp.concatenate([a, b])):
        with eqq.on_materialize("ignore"):
            got = eqq.implicit(f)(q, c), eqq.implicit(f)(c, q), eqq.implicit(f)(c, c)
        want = [f(q.materialize(), c.materialize()), f(c.materialize(), q.materialize()),
                f(c.materialize(), c.materialize())]  # fmt: skip
        for g, w in zip(got, want, strict=True):
            np.testing.assert_allclose(eqq.materialize(g), w, rtol=1e-5)


def test_rules_must_be_annotated():
    with pytest.raises(TypeError, match="unannotated must annotate its operand 'x'"):

        @eqq.register(lax.sin_p)
        def unannotated(primitive, x):
            return x

    with pytest.raises(TypeError, match="at least one"):
        eqq.register()


# -------------------------------------------------------------------- daylight: warn, error, audit


def test_a_warning_names_primitive_format_bytes_and_line(q):
    with pytest.warns(eqq.MaterializeWarning) as caught:
        eqq.implicit(lax.sort)(q)  # this line
    message = str(caught[0].message)
    for word in ("`sort`", "Array8B float32[4,6]", " B made dense", "test_engine.py"):
        assert word in message
    assert caught[0].filename == __file__


def test_elementwise_arithmetic_on_one_line_warns_once(q):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        eqq.implicit(lambda w: jnp.exp(w) + jnp.sin(w))(q)
    assert len(caught) == 1 and "Elementwise arithmetic" in str(caught[0].message)


def test_warnings_can_be_switched_off(q, monkeypatch):
    with eqq.on_materialize("ignore"):
        eqq.implicit(lax.sort)(q)
    monkeypatch.setenv("EQQUANT_ON_MATERIALIZE", "ignore")
    eqq.implicit(lax.sort)(q)
    monkeypatch.setenv("EQQUANT_ON_MATERIALIZE", "error")
    with pytest.raises(eqq.MaterializeError):
        eqq.implicit(lax.sort)(q)
    monkeypatch.setenv("EQQUANT_ON_MATERIALIZE", "loudly")
    with pytest.raises(ValueError, match="EQQUANT_ON_MATERIALIZE must be one of .* it is 'loudly'"):
        eqq.implicit(lax.sort)(q)
    monkeypatch.delenv("EQQUANT_ON_MATERIALIZE")
    monkeypatch.setattr(eqq.Array8B, "warn_on_materialize", False)
    eqq.implicit(lax.sort)(q)
    with pytest.raises(Exception, match="mode"), eqq.on_materialize("never"):
        pass


def in_a_thread(f):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(f).result()


def test_a_mode_for_all_threads(q, monkeypatch):
    sort = lambda: eqq.implicit(lax.sort)(q)  # noqa: E731
    try:
        with eqq.strict():
            eqq.set_on_materialize("ignore")
            in_a_thread(sort)  # contexts are of one thread
            with pytest.raises(eqq.MaterializeError):
                sort()
        eqq.set_on_materialize("error")
        monkeypatch.setenv("EQQUANT_ON_MATERIALIZE", "ignore")
        for run in (sort, lambda: in_a_thread(sort)):
            with pytest.raises(eqq.MaterializeError):
                run()
        with eqq.on_materialize("ignore"):
            sort()
        with pytest.raises(Exception, match="mode"):
            eqq.set_on_materialize("never")
    finally:
        eqq.set_on_materialize(None)
    in_a_thread(sort)  # as the environment says


def test_strict_mode_raises_and_offers_ways_out(q):
    with pytest.raises(eqq.MaterializeError) as caught, eqq.strict():
        jax.jit(eqq.implicit(lambda w: lax.sort(w)))(q)
    for word in ("`sort`", "Array8B float32[4,6]", "on_materialize", "eqquant.register"):
        assert word in str(caught.value)
    with pytest.raises(eqq.MaterializeError, match="outside eqquant.implicit"), eqq.strict():
        jnp.sin(q[:3])  # a shape of its own: JAX may have traced sin on another one before


def test_audit_lists_every_equation_with_a_quantized_operand(q):
    def program(w, x):
        y = jnp.tanh(w @ x)
        return (
            y
            + lax.sort(w.ravel())[0]
            + jnp.exp(w).sum()
            + lax.fori_loop(0, 3, lambda i, y: w @ x, y)
        )

    found = eqq.audit(program, q, jnp.ones(6))
    kinds = [row.primitive for row in found.rows]
    assert kinds.count("dot_general") == 2 and "exp" in kinds and "sort" in kinds
    dots = [row for row in found.rows if row.primitive == "dot_general"]
    for row in dots:
        assert "dot_general_scaled_array (contraction.py:" in row.rule and not row.densified
        assert "test_engine.py" in row.source and row.operands[0] == "Array8B float32[4,6]"
    dense = {row.primitive: row for row in found.densified}
    assert set(dense) == {"exp", "sort"} or set(dense) == {"exp"}
    assert dense["exp"].dense_bytes == 4 * 24 and found.dense_bytes >= 4 * 24
    assert "exp" in str(found) and "made it dense: 2" in str(found)
    assert found.as_dicts()[0]["primitive"] == kinds[0]


def test_audit_sees_operators_outside_implicit(q):
    linear = eqx.tree_at(lambda m: m.weight, eqx.nn.Linear(6, 4, key=jax.random.key(0)), q)
    found = eqq.audit(lambda x: linear(x), jnp.ones(6))
    assert [row.primitive for row in found.rows] == ["dot_general"]


# ------------------------------------------------------------------------------------- implicit


def test_implicit_is_a_module_that_holds_the_function(q):
    f = eqq.implicit(lambda w, x: w @ x)
    assert isinstance(f, eqx.Module) and callable(f.__wrapped__)
    model = eqx.nn.Linear(6, 4, key=jax.random.key(0))
    held = eqq.implicit(eqq.quantize(model, eqq.Array8B.quantize))
    assert any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(eqx.filter(held, eqx.is_array)))
    with pytest.raises(Exception, match="implicit"):
        eqq.implicit(3)


def test_python_values_stay_static_and_results_keep_their_structure(q):
    def program(w, n, flag, name=None):
        assert isinstance(n, int) and flag is True and name == "x"
        return {"n": n + 1, "w": w[:n], "f": len, "none": None}

    out = eqq.implicit(program)(q, 2, True, name="x")
    assert out["n"] == 3 and out["f"] is len and out["none"] is None
    assert isinstance(out["w"], eqq.Array8B) and out["w"].shape == (2, 6)


def test_a_function_may_make_quantized_arrays(q):
    out = eqq.implicit(lambda w: eqq.Array8B.quantize(w @ jnp.ones((6, 3))))(q)
    assert isinstance(out, eqq.Array8B) and out.shape == (4, 3)


def test_dead_code_is_not_evaluated(q):
    def program(w, x):
        lax.sort(w)
        return w @ x

    with eqq.strict():
        eqq.implicit(program)(q, jnp.ones(6))


def test_an_inner_jit_is_compiled_once_and_audited_each_time(q):
    @jax.jit
    def inner(w, x):
        return jnp.exp(w) @ x

    def program(w, x):
        return inner(w, x)

    with eqq.on_materialize("ignore"):
        eqq.implicit(program)(q, jnp.ones(6))
    assert (
        len(eqq.audit(program, q, jnp.ones(6)).rows)
        == len(eqq.audit(program, q, jnp.ones(6)).rows)
        == 1
    )
    with pytest.raises(eqq.MaterializeError), eqq.strict():
        eqq.implicit(program)(q, jnp.ones(6))
    from eqquant.rules.control_flow import _jitted

    before = _jitted.cache_info().misses
    with eqq.on_materialize("ignore"):
        eqq.implicit(program)(q, jnp.ones(6))
    assert _jitted.cache_info().misses == before


def test_errors_of_user_code_pass_through(q):
    with pytest.raises(ZeroDivisionError):
        eqq.implicit(lambda w: 1 // 0)(q)


def test_new_parameters_of_primitives_do_not_break_rules():
    """Every rule takes whatever parameters a later JAX adds."""
    import inspect

    for rules in _dispatch.rules().values():
        for _, rule in rules:
            kinds = [p.kind for p in inspect.signature(rule).parameters.values()]
            if not rule.__module__.startswith("eqquant"):
                continue
            assert inspect.Parameter.VAR_KEYWORD in kinds, rule.__name__


# ------------------------------------------------------------------------------------------ ste


def test_ste_has_the_value_of_the_quantizer_and_the_derivative_of_the_identity():
    x = jax.random.normal(jax.random.key(0), (3, 4, 6))
    fake = eqq.ste(eqq.Array8B.quantize)
    want = jnp.stack([eqq.Array8B.quantize(each).materialize() for each in x])
    for f in (jax.vmap(fake), jax.jit(jax.vmap(fake)), lambda x: lax.map(fake, x),
              jax.checkpoint(jax.vmap(fake))):  # fmt: skip
        np.testing.assert_array_equal(f(x), want)
        np.testing.assert_array_equal(jax.grad(lambda x, f=f: f(x).sum())(x), np.ones_like(x))
    _, dy = jax.jvp(fake, (x[0],), (2 * x[0],))
    np.testing.assert_array_equal(dy, 2 * x[0])
    assert fake(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="must keep the shape"):
        eqq.ste(lambda x: x.T)(x)


def test_names_of_primitives_resolve():
    assert _compat.find_primitive("dot_general") is lax.dot_general_p
    assert _compat.find_primitive("no_such_primitive") is None


# -------------------------------------------------------------------------------------- results


CONSTANTS = (True, 3, 2.5, np.float32(1.5), np.bool_(False), np.arange(3))


@pytest.mark.parametrize(
    "transform",
    [jax.checkpoint, jax.jit, lambda f: f, lambda f: lambda w: jax.lax.cond(True, f, f, w)],
    ids=["checkpoint", "jit", "as it is", "cond"],
)
def test_functions_may_return_constants(q, transform):
    def program(w):
        return w.sum(), jnp.asarray(True), jnp.asarray(2), *CONSTANTS

    got, want = eqq.implicit(transform(program))(q), transform(program)(q.materialize())
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)
        if isinstance(y, jax.Array):
            assert (x.dtype, x.weak_type) == (y.dtype, y.weak_type)


def test_functions_with_custom_derivatives_may_return_constants(q):
    @jax.custom_vjp
    def with_vjp(x, w):
        return x * w.sum(), True

    @jax.custom_jvp
    def with_jvp(x, w):
        return x * w.sum(), True

    with_vjp.defvjp(lambda x, w: (with_vjp(x, w), (x, w)), lambda saved, ct: (ct[0], None))
    with_jvp.defjvp(lambda xs, ts: (with_jvp(*xs), (ts[0], np.zeros((), jax.dtypes.float0))))
    for f in (with_vjp, with_jvp):
        for program in (f, lambda x, w, f=f: jax.grad(f, has_aux=True)(x, w)):
            got, constant = eqq.implicit(program)(jnp.asarray(2.0), q)
            want, _ = program(jnp.asarray(2.0), q.materialize())
            np.testing.assert_allclose(got, want, rtol=1e-5)
            assert bool(constant)


@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_batch_norm_in_training(q, mode):
    norm = eqx.nn.BatchNorm(4, "batch", mode=mode)
    x = jax.random.normal(jax.random.key(1), (5, 6))

    def program(w, x, state):
        each = jax.vmap(lambda x: norm(w @ x, state), axis_name="batch", out_axes=(0, None))
        return each(x)

    got, state = eqx.filter_jit(eqq.implicit(program))(q, x, eqx.nn.State(norm))
    want, expected = program(q.materialize(), x, eqx.nn.State(norm))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert eqx.tree_equal(state, expected, rtol=1e-4, atol=1e-5)


def test_keys_of_random_numbers_in_a_batched_loop(q):
    def program(w, keys):
        def one(key):
            def step(carry):
                i, key, x, w = carry
                key, own = jax.random.split(key)
                return i + 1, key, x + jax.random.normal(own, (4,)) * (w @ jnp.ones(6)), w

            until = jax.random.randint(key, (), 1, 4)
            start = 0, key, jnp.zeros(4), w
            return jax.lax.while_loop(lambda carry: carry[0] < until, step, start)[2]

        return jax.vmap(one)(keys)

    keys = jax.random.split(jax.random.key(0), 3)
    np.testing.assert_allclose(
        eqq.implicit(program)(q, keys), program(q.materialize(), keys), rtol=1e-4, atol=1e-5
    )


def test_what_was_compiled_dies_with_the_function(q):
    class Constant:
        """Seen by the function alone."""

    def make():
        constant, seen = Constant(), jax.random.normal(jax.random.key(3), (6,))
        constant.value = seen

        @jax.jit
        def program(w):
            return jax.jit(lambda w: w @ constant.value)(w) + 1

        return program, weakref.ref(constant)

    cached = control_flow._jitted.cache_info
    gc.collect()
    before = cached()
    program, constant = make()
    first = eqq.implicit(program)(q)
    once = cached()
    np.testing.assert_array_equal(eqq.implicit(program)(q), first)
    twice = cached()
    assert once.currsize > before.currsize
    assert (twice.misses, twice.currsize) == (once.misses, once.currsize)
    assert twice.hits > once.hits
    del program
    gc.collect()
    assert constant() is None
    assert cached().currsize <= before.currsize
