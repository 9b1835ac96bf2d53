"""The chunked pass on several devices: own tokens on each, sums reduced once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from losses import chunk_problem, hlo

from mgsr_jax import losses
from mgsr_jax.losses import chunked

# V = 8 * 17 and no other size has a factor of 17. 16 rows of 11 tokens: 22 tokens on
# each of eight devices, 88 on each of two, in chunks of 6 with one token of overlap.
B, T, D, WIDER, V, TOKENS, K = 16, 11, 5, 6, 136, 130, 4
PRIME = 17
CHUNK = 6


def problem():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    clip = losses.init_clip_network(jax.random.key(1), num_candidates=K, hidden=4)
    clip["output"]["kernel"] = jnp.full((4, 2), 0.3)
    # Ragged rows; of eight devices, device 2 has no scored token in its rows 4 and 5.
    lengths = np.array([11, 3, 10, 1, 0, 0, 7, 11, 0, 5, 11, 11, 2, 9, 4, 11])
    span_ids = np.tile(np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2]), (B, 1))
    # Spans do not end with rows: only the mask keeps pairs within a row.
    where = np.arange(T) < np.minimum(lengths, T - 1)[:, None]
    trained = {"head": normal(V, D), "clip": clip}
    aux = {
        "teacher": normal(B, T, WIDER),
        "labels": jnp.asarray(rng.integers(0, TOKENS, (B, T)), jnp.int32),
        "where": jnp.asarray(where),
        "span_ids": jnp.asarray(span_ids, jnp.int32),
        "weights": jnp.asarray(rng.uniform(0.1, 1, (B, T, 3)), jnp.float32),
    }
    return trained, normal(B, T, D), normal(V, WIDER), aux


def all_losses(shared, hidden, aux, *, overlap=1, vocab_axis=None):
    """Cross-entropy, DAC-KL and span correlation: weighted sum and metrics."""
    own = jnp.arange(hidden.shape[-2]) < hidden.shape[-2] - overlap
    where = aux["where"] & jnp.broadcast_to(own, aux["where"].shape)
    split = dict(vocab_size=TOKENS, vocab_axis=vocab_axis)
    student = losses.project(hidden, shared["head"])
    teacher = losses.project(aux["teacher"], shared["teacher_head"])
    sft = losses.cross_entropy(student, aux["labels"], where=where, **split)
    dac = losses.dac_kl(shared["clip"], student, teacher, where=where, **split).loss
    span = losses.span_correlation(
        student, teacher, aux["span_ids"], where=aux["where"], **split
    )
    values = jnp.stack([sft, dac, span], axis=-1)
    metrics = {"sft": losses.masked_sum(sft, where)}
    return jnp.sum(aux["weights"] * values), metrics


def dense(trained, hidden, teacher_head, aux):
    return all_losses(trained | {"teacher_head": teacher_head}, hidden, aux, overlap=0)


def in_chunks(trained, hidden, teacher_head, aux, *, vocab_axis, projected, **kwargs):
    shared = trained | {"teacher_head": teacher_head}
    if projected:
        shared["head"] = losses.Projection(shared["head"])
    fn = functools.partial(all_losses, vocab_axis=vocab_axis)
    return chunked(fn, shared, hidden, aux, chunk_size=CHUNK, **kwargs)


def differentiated(function):
    return jax.jit(jax.value_and_grad(function, (0, 1), has_aux=True))


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
# Kind of mesh, its shape (data, tensor), whether the heads are split over "tensor".
PLACEMENTS = {
    "auto": (AUTO, (8, 1), False),
    "auto, V split": (AUTO, (2, 4), True),
    "explicit": (EXPLICIT, (8, 1), False),
    "explicit, V split": (EXPLICIT, (2, 4), True),
}
# The head's matrix itself, in place of a Projection, once on each kind of mesh.
CASES = [(placement, True) for placement in PLACEMENTS]
CASES += [("auto", False), ("explicit, V split", False)]
every_case = pytest.mark.parametrize(("placement", "projected"), CASES)


@functools.cache
def unsharded():
    return differentiated(dense)(*problem())


@functools.cache
def sharded(placement, projected):
    """The optimised program's text, and what it computes."""
    kind, shape, split = PLACEMENTS[placement]
    mesh = jax.make_mesh(shape, ("data", "tensor"), axis_types=(kind,) * 2)

    def put(tree, *spec):
        return jax.device_put(tree, NamedSharding(mesh, P(*spec)))

    trained, hidden, teacher_head, aux = problem()
    columns = ("tensor",) if split else ()
    with jax.set_mesh(mesh):
        arguments = (
            {"head": put(trained["head"], *columns), "clip": put(trained["clip"])},
            put(hidden, "data"),
            put(teacher_head, *columns),
            put(aux, "data"),
        )
        run = functools.partial(
            in_chunks,
            vocab_axis="tensor" if split else None,
            projected=projected,
            batch_axes="data" if kind == AUTO else (),
        )
        program = differentiated(run).lower(*arguments).compile()
        return program.as_text(), program(*arguments)


@pytest.mark.slow
@every_case
def test_value_metrics_and_gradients_equal_the_dense_ones(placement, projected):
    def close(path, a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        off = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert off <= 3e-6, (jax.tree_util.keystr(path), off)

    _, got = sharded(placement, projected)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(unsharded()))
    jax.tree_util.tree_map_with_path(close, got, unsharded())
    unscored = ~np.any(problem()[3]["where"], axis=1)
    assert np.sum(unscored) == 3 and not np.any(np.asarray(got[1][1])[unscored])


def chunk_loop(text):
    """The loop over chunks: the one whose body multiplies with a head."""
    (loop,) = [loop for loop in hlo.loops(text) if " dot(" in loop.body]
    return loop


@every_case
def test_the_loop_has_no_collective_over_the_batch_or_of_size_v(placement, projected):
    text, _ = sharded(placement, projected)
    _, shape, split = PLACEMENTS[placement]
    data = np.unravel_index(np.arange(8), shape)[0]
    inside = hlo.collectives(chunk_loop(text).body)
    assert bool(inside) == split
    for collective in inside:
        for group in collective.groups:
            assert len({data[i] for i in group}) == 1, collective
        assert not any(n and n % PRIME == 0 for dims in collective.sizes for n in dims)
    everywhere = hlo.collectives(text)
    # The sums over the batch are after the loop. The head's gradient is one of them,
    # and only the device's own part of it.
    assert any(len({data[i] for i in c.groups[0]}) == shape[0] for c in everywhere)
    assert not any(c.kind == "all-gather" and (V, D) in c.sizes for c in everywhere)


@every_case
def test_each_device_computes_its_own_tokens_and_stores_one_chunk_of_logits(
    placement, projected
):
    text, _ = sharded(placement, projected)
    _, (batch, tensor), split = PLACEMENTS[placement]
    columns, tokens = V // tensor if split else V, B * T // batch
    loop = chunk_loop(text)
    rows = [
        int(np.prod(dims)) // columns
        for dims in hlo.sizes(text)
        if columns in dims and dims not in {(columns, D), (columns, WIDER)}
    ]
    # Logits of one chunk, or two such arrays concatenated, and never of all tokens.
    assert max(rows) <= 2 * CHUNK < tokens
    assert loop.trips is not None
    stride = -(-tokens // loop.trips)
    assert CHUNK in {dims[0] for dims in hlo.sizes(loop.body) if dims[1:] == (columns,)}
    assert stride == CHUNK - 1 and loop.trips == -(-tokens // stride)
    if split:
        assert not any(V in dims for dims in hlo.sizes(text))


def test_the_check_detects_a_device_that_computes_all_tokens():
    """Without `batch_axes` XLA gathers the tokens before the loop."""
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(AUTO,))):
        trained, hidden, teacher_head, aux = problem()
        hidden, aux = jax.device_put((hidden, aux), P("data"))
        run = functools.partial(in_chunks, vocab_axis=None, projected=False)
        program = differentiated(run).lower(trained, hidden, teacher_head, aux)
        loop = chunk_loop(program.compile().as_text())
    assert loop.trips == -(-B * T // (CHUNK - 1))


def test_the_check_detects_a_sum_over_devices_in_every_chunk():
    """The gradient of a replicated array, taken inside the loop."""

    def local(head, hidden):
        def step(total, token):
            gradient = jax.grad(lambda head: jnp.sum(jnp.sin(head @ token)))(head)
            return total + gradient, None

        return jax.lax.scan(step, jnp.zeros_like(head), hidden.reshape(-1, D))[0]

    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(AUTO,))):
        trained, hidden, _, _ = problem()
        run = jax.shard_map(local, in_specs=(P(), P("data")), out_specs=P())
        text = jax.jit(run).lower(trained["head"], hidden).compile().as_text()
    (loop,) = hlo.loops(text)
    (collective,) = hlo.collectives(loop.body)
    assert len(collective.groups[0]) == 8 and (V, D) in collective.sizes


@pytest.mark.parametrize("batch_axes", [(), ("data",)])
def test_in_the_callers_own_shard_map(batch_axes):
    """The loss is the device's own; the gradient of `shared` is summed over devices."""
    trained, hidden, teacher_head, aux = chunk_problem.light_problem(9, tokens=24)
    in_chunks = chunk_problem.in_chunks(4, chunk_problem.light_loss, batch_axes)
    # Six tokens per device: no pair is split over two of them.
    aux["span_ids"] = jnp.arange(24, dtype=jnp.int32) // 3

    @functools.partial(
        jax.shard_map,
        mesh=jax.make_mesh((4,), ("data",), axis_types=(AUTO,)),
        in_specs=(P(), P("data"), P(), P("data")),
        out_specs=(P(), P()),
    )
    def run(trained, hidden, teacher_head, aux):
        if batch_axes:  # Then the caller makes `shared` varying.
            trained, teacher_head = jax.lax.pcast(
                (trained, teacher_head), batch_axes, to="varying"
            )
        value = in_chunks(trained, hidden, teacher_head, aux)
        return jax.lax.psum(value, "data")

    dense = chunk_problem.dense(chunk_problem.light_loss)
    chunk_problem.assert_close(
        differentiated(run)(trained, hidden, teacher_head, aux),
        differentiated(dense)(trained, hidden, teacher_head, aux),
    )
