"""Losses with V split over devices: the unsharded values, and nothing gathered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from losses import every_loss, hlo

from mgsr_jax import losses

# 17 or 34 columns per device, and no other size has a factor of 17: a collective that
# moves columns shows it in its sizes, in any shape. 100 tokens: one of four devices has
# tokens and padding, the next one only padding.
B, T, V, TOKENS, K = 2, 6, 136, 100, 4
PRIME = 17
WEIGHTS = jnp.linspace(0.5, 2.0, B * T).reshape(B, T)
CLIP = every_loss.LEARNED
# What the losses read per position besides logits.
POSITIONS = {
    "where": every_loss.WHERE[:B],
    "labels": every_loss.LABELS[:B] * 19,
    "span_ids": every_loss.SPAN_IDS[:B],
    "upper": jnp.linspace(0.8, 1.0, B * T).reshape(B, T),
}


def cross_entropy(clip, student, teacher, at, **kwargs):
    return losses.cross_entropy(student, at["labels"], where=at["where"], **kwargs)


def dac_kl(clip, student, teacher, at, **kwargs):
    # The sum of all fields, so that the gradient covers all of them.
    return sum(losses.dac_kl(clip, student, teacher, where=at["where"], **kwargs))


def dac_kl_fixed(clip, student, teacher, at, **kwargs):
    limits, kwargs = (0.1, at["upper"]), kwargs | {"where": at["where"]}
    return losses.dac_kl_fixed(
        limits, student, teacher, num_candidates=K, **kwargs
    ).loss


def span_correlation(clip, student, teacher, at, **kwargs):
    kwargs |= {"where": at["where"]}
    return losses.span_correlation(student, teacher, at["span_ids"], **kwargs)


def forward_kl_top_k(clip, student, teacher, at, **kwargs):
    teacher = losses.top_k_teacher(teacher, K + 1, **kwargs)
    return losses.forward_kl_top_k(student, teacher, where=at["where"], **kwargs)


def dac_kl_of_top_k(clip, student, teacher, at, **kwargs):
    teacher = losses.top_k_teacher(teacher, K + 1, **kwargs)
    return losses.dac_kl(clip, student, teacher, where=at["where"], **kwargs).loss


def of_two_distributions(loss):
    def values(clip, student, teacher, at, **kwargs):
        labels_and_spans = at["labels"], at["span_ids"]
        kwargs |= {"where": at["where"]}
        return loss(student, teacher, *labels_and_spans, **kwargs)

    return values


# Every way in which the vocabulary is read. The other divergences differ from these
# only in an equation of two log-probabilities.
PATHS = {
    "forward_kl": of_two_distributions(every_loss.forward_kl),
    "adaptive_kl": of_two_distributions(every_loss.adaptive_kl),
    "reverse_kl_top_k": of_two_distributions(every_loss.reverse_kl_top_k),
    "sampled_reverse_kl": of_two_distributions(every_loss.sampled_reverse_kl),
} | {
    loss.__name__: loss
    for loss in (
        cross_entropy,
        dac_kl,
        dac_kl_fixed,
        span_correlation,
        forward_kl_top_k,
        dac_kl_of_top_k,
    )
}
LOSSES = {
    loss.__name__: of_two_distributions(loss) for loss in every_loss.DIVERGENCES
} | PATHS


def inputs():
    """Logits that are nan where the mask is False and in padding columns."""
    both = np.random.default_rng(0).normal(0, 2, (2, B, T, V)).astype(np.float32)
    both[:, ~np.asarray(POSITIONS["where"])] = np.nan
    both[..., TOKENS:] = np.nan
    return CLIP, *both


# As many losses as a user's program has. With all of them, nested in another shard_map,
# jax 0.10 aborts in XLA's partitioner ("IsManualSubgroup").
AT_ONCE = 4


def groups(names):
    names = tuple(names)
    return [names[i : i + AT_ONCE] for i in range(0, len(names), AT_ONCE)]


def differentiated(form, names):
    """(clip, student, teacher) -> {loss: (values, gradients of clip and student)}."""

    def run(clip, student, teacher):
        results = {}
        for name in names:

            def total(clip, student, loss=LOSSES[name]):
                values = form(loss)(
                    clip, student, teacher, POSITIONS, vocab_size=TOKENS
                )
                return jnp.sum(WEIGHTS * values), values

            gradient = jax.value_and_grad(total, (0, 1), has_aux=True)
            (_, values), gradients = gradient(clip, student)
            results[name] = values, gradients
        return results

    return run


def in_shard_map(loss, axes):
    """The loss in the caller's shard_map over `axes`, with V split over "tensor"."""

    def values(clip, student, teacher, at, **kwargs):
        rows, columns = (name if name in axes else None for name in ("data", "tensor"))
        logits = P(rows, None, columns)
        return jax.shard_map(
            functools.partial(loss, vocab_axis="tensor", **kwargs),
            in_specs=(P(), logits, logits, P(rows)),
            out_specs=P(rows),
            axis_names=set(axes),
        )(clip, student, teacher, at)

    return values


def named(loss, vocab_axis):
    return functools.partial(loss, vocab_axis=vocab_axis)


def plain(loss):
    return loss


def mesh_of(kind):
    return jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(kind,) * 2)


AUTO, EXPLICIT, BOTH = AxisType.Auto, AxisType.Explicit, ("data", "tensor")
ROWS_TOO, ONLY_V = P("data", None, "tensor"), P(None, None, BOTH)
named_tensor = functools.partial(named, vocab_axis="tensor")
# Kind of mesh, sharding of the logits, how the loss is called, which losses.
PLACEMENTS = {
    "auto": (AUTO, ROWS_TOO, named_tensor, LOSSES),
    "auto, two axes": (AUTO, ONLY_V, functools.partial(named, vocab_axis=BOTH), PATHS),
    "explicit": (EXPLICIT, ROWS_TOO, plain, PATHS),
    "explicit, two axes": (EXPLICIT, ONLY_V, plain, PATHS),
    "manual": (AUTO, ROWS_TOO, functools.partial(in_shard_map, axes=BOTH), PATHS),
    "rows manual": (
        AUTO,
        ROWS_TOO,
        functools.partial(in_shard_map, axes=("data",)),
        PATHS,
    ),
}


@functools.cache
def unsharded():
    results = {}
    for names in groups(LOSSES):
        results |= jax.jit(differentiated(plain, names))(*inputs())
    return results


@functools.cache
def sharded(placement):
    """The optimised programs' text, and what they compute."""
    kind, spec, form, names = PLACEMENTS[placement]
    mesh = mesh_of(kind)
    clip, *logits = inputs()
    with jax.set_mesh(mesh):
        clip = jax.device_put(clip, NamedSharding(mesh, P()))
        logits = jax.device_put(logits, NamedSharding(mesh, spec))
        texts, results = [], {}
        for group in groups(names):
            run = jax.jit(differentiated(form, group))
            program = run.lower(clip, *logits).compile()
            texts.append(program.as_text())
            results |= program(clip, *logits)
        return "\n".join(texts), results


def of_v(text):
    """The collectives that move columns, and all arrays with whole rows of V."""
    moved = [
        collective.line
        for collective in hlo.collectives(text)
        if any(n and n % PRIME == 0 for dims in collective.sizes for n in dims)
    ]
    return moved, [dims for dims in hlo.sizes(text) if V in dims]


@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_values_and_gradients_equal_the_unsharded_ones(placement):
    _, got = sharded(placement)
    want = {name: unsharded()[name] for name in got}

    def close(path, a, b):
        np.testing.assert_allclose(
            a, b, rtol=1e-5, atol=2e-6, err_msg=jax.tree_util.keystr(path)
        )

    jax.tree_util.tree_map_with_path(close, got, want)
    for name, (values, (of_clip, of_student)) in want.items():
        assert np.any(values) and np.any(of_student), name
        assert name not in ("dac_kl", "dac_kl_of_top_k") or np.any(
            of_clip["output"]["kernel"]
        )


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_nothing_of_the_size_of_v_is_moved(placement):
    text, results = sharded(placement)
    assert len(hlo.collectives(text)) >= len(results)
    moved, whole = of_v(text)
    assert not moved, moved[0]
    assert not whole


def test_the_check_detects_a_loss_that_gathers():
    mesh = mesh_of(AUTO)
    clip, *logits = inputs()
    with jax.set_mesh(mesh):
        logits = jax.device_put(logits, NamedSharding(mesh, ROWS_TOO))
        without_axis = jax.jit(lambda s, t: losses.dac_kl(clip, s, t).loss)
        moved, whole = of_v(without_axis.lower(*logits).compile().as_text())
    assert moved and whole


@pytest.mark.parametrize("placement", ["auto, two axes", "explicit, two axes"])
@pytest.mark.parametrize("tokens", [16, 11, 3])
def test_top_k_takes_the_first_of_equals_on_any_device(placement, tokens):
    """Two columns per device, fewer than K; ties within and across devices."""
    kind, spec, *_ = PLACEMENTS[placement]
    logits = np.random.default_rng(1).integers(0, 3, (5, 3, 16)).astype(np.float32)
    logits[..., ::3] *= -1  # -0 and 0 are equal
    vocab_axis = BOTH if kind == AUTO else None
    want = losses.top_k_teacher(logits, 5, vocab_size=tokens)
    assert want.indices.shape[-1] == min(5, tokens)
    stable = np.argsort(-logits[..., :tokens], axis=-1, kind="stable")[..., :5]
    np.testing.assert_array_equal(want.indices, stable)
    with jax.set_mesh(mesh_of(kind)):
        placed = jax.device_put(logits, NamedSharding(mesh_of(kind), spec))
        got = losses.top_k_teacher(placed, 5, vocab_size=tokens, vocab_axis=vocab_axis)
    np.testing.assert_array_equal(got.indices, want.indices)
    np.testing.assert_array_equal(got.logits, want.logits)
    np.testing.assert_allclose(got.logsumexp, want.logsumexp, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["auto, two axes", "explicit, two axes"])
@pytest.mark.parametrize("tied", ["bfloat16", "integers", "all"])
def test_dac_kl_does_not_depend_on_the_order_of_classes_on_any_device(placement, tied):
    """Values and gradients, with V split over eight devices and heavily tied logits."""
    kind, spec, *_ = PLACEMENTS[placement]
    mesh, axis = mesh_of(kind), BOTH if kind == AUTO else None
    student, teacher = np.random.default_rng(2).normal(0, 2, (2, B, T, V)).astype("f")
    teacher = {
        "bfloat16": np.asarray(jnp.asarray(teacher, jnp.bfloat16)),
        "integers": np.round(teacher),
        "all": np.zeros_like(teacher),
    }[tied]
    order = np.random.default_rng(3).permutation(V)

    @jax.jit(static_argnames="axis")
    def run(clip, student, teacher, axis):
        def loss(clip, student):
            out = losses.dac_kl(clip, student, teacher, vocab_axis=axis)
            return jnp.sum(WEIGHTS * out.loss), out

        gradient = jax.grad(loss, (0, 1), has_aux=True)
        (of_clip, of_student), out = gradient(clip, student)
        return out, of_clip, of_student

    want, want_clip, want_student = run(CLIP, student, teacher, None)
    with jax.set_mesh(mesh):
        clip = jax.device_put(CLIP, NamedSharding(mesh, P()))
        moved = jax.device_put(
            (student[..., order], teacher[..., order]), NamedSharding(mesh, spec)
        )
        got, got_clip, got_student = run(clip, *moved, axis)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, (got, got_clip), (want, want_clip))
    close(got_student, np.asarray(want_student)[..., order])
    assert np.any(want_student) and np.any(want_clip["output"]["bias"])


def test_an_unknown_axis_and_columns_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="vocab_axis='tensor', but the ambient mesh"):
        losses.forward_kl(jnp.ones((2, 8)), jnp.ones((2, 8)), vocab_axis="tensor")
    with jax.set_mesh(mesh_of(AUTO)):
        with pytest.raises(ValueError, match="10 columns do not divide over the 4"):
            losses.forward_kl(jnp.ones((2, 10)), jnp.ones((2, 10)), vocab_axis="tensor")
        with pytest.raises(ValueError, match="no_axis"):
            losses.forward_kl(jnp.ones((2, 8)), jnp.ones((2, 8)), vocab_axis="no_axis")


def typed(spec, **axes):
    """Logits of zeros, [8, 8, 24], on a mesh with axes of these kinds."""
    mesh = jax.make_mesh((2, 4), tuple(axes), axis_types=tuple(axes.values()))
    place = jax.sharding.NamedSharding(mesh, spec)
    return mesh, jax.device_put(jnp.zeros((8, 8, 24)), place)


def test_an_auto_axis_next_to_an_explicit_one_is_refused():
    """The type has no such axis, so XLA would gather V without being asked to."""
    mesh, x = typed(P("data"), data=EXPLICIT, tensor=AUTO)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="all axes of the mesh"):
        losses.forward_kl(x, x, vocab_axis="tensor")


def test_positions_split_over_devices_are_refused_for_pairs():
    mesh, x = typed(P(None, "data"), data=EXPLICIT, tensor=EXPLICIT)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="over positions too"):
        losses.span_correlation(x, x, jnp.zeros((8, 8), jnp.int32))
