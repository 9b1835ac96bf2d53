"""The decoder against a Python loop that recomputes everything for every token."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mgsr_jax import sharding
from mgsr_jax.decoding.decode import (
    STUDENT,
    decode,
    generate,
    read,
    read_whole,
    row_keys,
    sample,
    start,
    unread,
)
from mgsr_jax.planning.compiled import collectives

EOS = (1, 3)


@partial(jax.jit, static_argnums=0)
def full_logits(model, params, tokens):
    hidden, _ = model.forward(params, tokens[None])
    return model.unembed(model.head_params(params), hidden)[0]


def reference(model, params, rows, key, *, max_length, eos_ids, temperature=1.0, **kw):
    """One row at a time, one token at a time, without a cache."""
    result, width = [], rows.tokens.shape[1]
    keys = row_keys(key, rows.example, STUDENT, 0)
    data = np.asarray(jax.random.key_data(keys))
    for b, length in enumerate(rows.prompt_lengths.tolist()):
        tokens = rows.tokens[b, :length].tolist()
        while len(tokens) < max_length:
            padded = jnp.asarray(tokens + [0] * (width - len(tokens)))
            logits = full_logits(model, params, padded)[len(tokens) - 1][None]
            row_key = jax.random.wrap_key_data(data[b])
            drawn = jax.random.fold_in(row_key, len(tokens))[None]
            token = int(sample(logits, drawn, temperature=temperature, **kw)[0])
            tokens.append(token)
            if token in eos_ids:
                break
        result.append(tokens)
    return result


def as_lists(rows):
    return [
        tokens[:length].tolist()
        for tokens, length in zip(rows.tokens, rows.lengths, strict=True)
    ]


@pytest.fixture(scope="module")
def student():
    return tiny.llama(scale=3.0)


@pytest.mark.parametrize(
    "settings",
    [
        dict(temperature=0.0),
        dict(temperature=1.0),
        dict(temperature=0.7, top_k=3),
        dict(temperature=1.3, top_p=0.6),
    ],
    ids=["greedy", "sampling", "top-k", "top-p"],
)
def test_equals_full_recompute(student, settings):
    model, params = student
    rows, key = tiny.prompts(), jax.random.key(7)
    got = generate(model, params, rows, key=key, max_length=14, eos_ids=EOS, **settings)
    want = reference(model, params, rows, key, max_length=14, eos_ids=EOS, **settings)
    assert as_lists(got) == want
    assert np.all(
        np.asarray(got.tokens)[np.arange(14)[None] >= got.lengths[:, None]] == 0
    )


def test_stops_at_each_stop_id_and_scores_it(student):
    model, params = student
    rows, key = tiny.prompts(), jax.random.key(7)
    free = generate(model, params, rows, key=key, max_length=14, eos_ids=(99,))
    assert free.lengths.tolist() == [14] * 4
    first, second = int(free.tokens[0, 3]), int(free.tokens[1, 6])
    stopped = generate(
        model, params, rows, key=key, max_length=14, eos_ids=(first, second)
    )
    for b, tokens in enumerate(as_lists(free)):
        prompt = int(rows.prompt_lengths[b])
        hits = [i for i in range(prompt, 14) if tokens[i] in (first, second)]
        end = hits[0] + 1 if hits else 14
        assert as_lists(stopped)[b] == tokens[:end]


@pytest.mark.parametrize(("block", "slots"), [(1, None), (3, None), (4, 2), (20, 3)])
def test_reading_in_blocks_is_reading_at_once(student, block, slots):
    """From nothing, whole or in blocks, and again behind a token that has changed."""
    model, params = student
    rows = tiny.complete(((2, 3), (1, 13), (4, 6), (3, 9), (1, 1)), width=14)

    @jax.jit
    def hidden_of(rows, changed):
        go_on = partial(read, model, params, block=block, slots=slots)
        blocks = go_on(unread(model, params, rows), rows)
        state = read_whole(model, params, rows, slots=slots)
        cut = jnp.minimum(changed + 1, rows.lengths)
        kept = dataclasses.replace(state.rows, lengths=cut)
        tokens = rows.tokens.at[jnp.arange(5), changed].set(7)
        rows = dataclasses.replace(rows, tokens=tokens)
        again = go_on(dataclasses.replace(state, rows=kept), rows)
        done = blocks.done & state.done & again.done
        first = blocks.hidden, state.hidden
        return first, again.hidden, done, model.forward(params, tokens)[0]

    changed = jnp.array([2, 5, 1, 8, 1])
    first, again, done, want_again = hidden_of(rows, changed)
    want, _ = model.forward(params, rows.tokens)
    assert done.all()
    for b, length in enumerate(rows.lengths.tolist()):
        here = b, slice(length - 1)
        for found in first:
            np.testing.assert_allclose(found[here], want[here], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(again[here], want_again[here], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("max_length", [7, 14])
def test_last_writable_slot(student, max_length):
    """One new token, and prompt + new == width: off by one is easy there."""
    model, params = student
    rows, key = tiny.prompts((6, 5)), jax.random.key(1)
    got = generate(model, params, rows, key=key, max_length=max_length, eos_ids=(99,))
    want = reference(model, params, rows, key, max_length=max_length, eos_ids=(99,))
    assert as_lists(got) == want


def test_a_full_row_is_left_alone(student):
    model, params = student
    rows = tiny.prompts((6, 3), width=6)
    got = generate(
        model, params, rows, key=jax.random.key(0), max_length=6, eos_ids=(99,)
    )
    assert as_lists(got)[0] == rows.tokens[0].tolist()
    assert got.lengths.tolist() == [6, 6]


def test_a_sample_does_not_depend_on_its_batch(student):
    model, params = student
    rows, key = tiny.prompts(), jax.random.key(3)
    run = partial(generate, model, params, key=key, max_length=14, eos_ids=EOS)
    together = as_lists(run(rows))
    order = jnp.array([2, 0, 3, 1])
    shuffled = as_lists(run(jax.tree.map(lambda leaf: leaf[order], rows)))
    assert [together[i] for i in order] == shuffled
    alone = jax.tree.map(lambda leaf: leaf[1:2], rows)
    assert as_lists(run(alone)) == [together[1]]


def test_a_cut_row_decodes_on_in_the_same_cache(student):
    """Cutting a row back is setting its length; nothing of the old suffix is seen."""
    model, params = student
    copy = model.decode_params(params, jnp.float32)
    rows = tiny.prompts()
    keys = row_keys(jax.random.key(5), rows.example, STUDENT, 0)
    settings = dict(keys=keys, max_length=14, eos_ids=EOS)
    done = decode(model, copy, start(model, params, rows), **settings)
    lengths = jnp.minimum(rows.prompt_lengths + 1, done.rows.lengths)
    cut = dataclasses.replace(
        done,
        rows=dataclasses.replace(done.rows, lengths=lengths),
        done=jnp.zeros(4, bool),
    )
    again = decode(model, copy, cut, **settings)
    assert as_lists(again.rows) == as_lists(done.rows)
    hidden, _ = model.forward(params, again.rows.tokens)
    for b, length in enumerate(again.rows.lengths.tolist()):
        np.testing.assert_allclose(
            again.hidden[b, : length - 1], hidden[b, : length - 1], atol=2e-5
        )


def test_padded_vocabulary_is_never_drawn(student):
    model, params = student
    rows = tiny.prompts((1,) * 8)
    got = generate(
        model,
        params,
        rows,
        key=jax.random.key(0),
        max_length=14,
        eos_ids=(99,),
        vocab_size=5,
        temperature=50.0,
    )
    new = np.asarray(got.tokens)[:, 1:]
    assert new.max() == 4 and len(np.unique(new)) == 5


def test_no_repeat_ngram(student):
    model, params = student
    rows = tiny.prompts((5, 3))
    run = partial(generate, model, params, rows, key=jax.random.key(0), eos_ids=(99,))
    for n in (1, 2):
        got = run(max_length=14, temperature=0.0, no_repeat_ngram=n, vocab_size=20)
        for tokens, prompt in zip(as_lists(got), (5, 3), strict=True):
            grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
            new = grams[prompt - n + 1 :]
            assert len(set(new)) == len(new)
            assert not set(new) & set(grams[: prompt - n + 1])


def test_prefill_width_changes_nothing(student):
    model, params = student
    rows, key = tiny.prompts(), jax.random.key(2)
    run = partial(generate, model, params, rows, key=key, max_length=14, eos_ids=EOS)
    assert as_lists(run()) == as_lists(run(prefill_width=6))


@pytest.mark.parametrize("slots", [1, 3, 4, 7])
def test_slots_change_nothing(student, slots):
    """Rows of all lengths, more than there are slots: each as if it were alone."""
    model, params = student
    rows = tiny.prompts((1, 4, 2, 6, 3, 13, 5, 2, 14, 1, 7))
    run = partial(generate, model, params, rows, key=jax.random.key(3), eos_ids=EOS)
    together = run(max_length=14)
    lengths = set((together.lengths - together.prompt_lengths).tolist())
    assert 0 in lengths and len(lengths) > 4
    assert as_lists(run(max_length=14, slots=slots)) == as_lists(together)


def test_rows_are_exchanged_with_their_cache_and_hidden_states(student):
    model, params = student
    copy = model.decode_params(params, jnp.float32)
    rows = tiny.prompts((1, 4, 2, 6, 3, 9))
    keys = row_keys(jax.random.key(5), rows.example, STUDENT, 0)
    settings = dict(keys=keys, max_length=14, eos_ids=EOS)
    want = decode(model, copy, start(model, params, rows), **settings)
    got = decode(model, copy, start(model, params, rows), slots=2, **settings)
    assert got.done.all()
    for b, length in enumerate(want.rows.lengths.tolist()):
        seen = slice(length - 1)
        np.testing.assert_allclose(got.hidden[b, seen], want.hidden[b, seen], atol=1e-5)
        for x, y in zip(
            jax.tree.leaves(got.cache), jax.tree.leaves(want.cache), strict=True
        ):
            np.testing.assert_allclose(x[b, :, seen], y[b, :, seen], atol=1e-5)


def test_slots_that_do_not_divide_over_the_mesh_are_named(student):
    model, params = student
    mesh = sharding.make_mesh(data=8)
    rows = jax.tree.map(np.asarray, tiny.prompts((3,) * 16))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="12 slots over 8 devices"):
        batch = sharding.put_batch(mesh, rows)
        run = partial(generate, key=jax.random.key(0), max_length=14, eos_ids=EOS)
        run(model, params, batch, slots=12)


def test_one_compilation_for_all_lengths_keys_and_temperatures(student):
    model, params = student
    generate.clear_cache()
    for seed, lengths in enumerate([(1, 2, 3, 4), (6, 6, 1, 5), (2, 2, 2, 2)]):
        generate(
            model,
            params,
            tiny.prompts(lengths, seed=seed),
            key=jax.random.key(seed),
            max_length=10 + seed,
            eos_ids=EOS,
            temperature=0.5 * seed,
        )
    assert generate._cache_size() == 1


@pytest.mark.parametrize("slots", [None, 8])
def test_mesh_changes_nothing(student, slots):
    model, params = student
    rows, key = tiny.prompts((1, 4, 2, 6, 3, 3, 5, 2) * 2), jax.random.key(11)
    settings = dict(key=key, max_length=14, eos_ids=EOS)
    want = generate(model, params, rows, **settings)
    settings["slots"] = slots
    mesh = sharding.make_mesh(data=4, fsdp=2)
    placed = jax.device_put(
        params, sharding.shardings(mesh, model.partition_rules, params)
    )
    with jax.set_mesh(mesh):
        batch = sharding.put_batch(mesh, jax.tree.map(np.asarray, rows))
        got = generate(model, placed, batch, **settings)
    assert as_lists(jax.device_get(got)) == as_lists(jax.device_get(want))


@pytest.mark.parametrize("sizes", [(2, 4, 1), (2, 2, 2), (1, 2, 4)])
def test_no_step_of_decoding_moves_weights_between_devices(sizes):
    model, _ = tiny.llama(width=64, intermediate_size=128)
    model = dataclasses.replace(model, tensor=sizes[2], vocab_rows=32)
    mesh = sharding.make_mesh(*sizes)
    params = model.init(jax.random.key(0))
    placed = jax.device_put(
        params, sharding.shardings(mesh, model.partition_rules, params)
    )
    rows = jax.tree.map(np.asarray, tiny.prompts((3,) * 16))
    settings = dict(max_length=14, eos_ids=EOS, vocab_size=tiny.VOCAB)
    with jax.set_mesh(mesh):
        copy = jax.jit(lambda p: model.decode_params(p, jnp.float32))(placed)
        state = jax.jit(lambda p, r: start(model, p, r))(
            placed, sharding.put_batch(mesh, rows)
        )

        def run(copy, state):
            keys = row_keys(jax.random.key(0), state.rows.example, 0, 0)
            return decode(model, copy, state, keys=keys, **settings)

        text = jax.jit(run).lower(copy, state).compile().as_text()
    smallest = 64 * 64 * 4 // sizes[2]  # bytes of a device's part of a matrix
    for line in text.splitlines():
        for kind, (_, size) in collectives(line).items():
            assert size < smallest, (kind, line)
    # Over the tensor axis alone: fsdp holds whole copies.
    for leaf in jax.tree.leaves(copy):
        assert "fsdp" not in str(leaf.sharding.spec)


def test_sample_follows_the_distribution():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    many = jnp.broadcast_to(logits, (4000, 4))

    def shares(**settings):
        keys = jax.random.split(jax.random.key(0), 4000)
        drawn = sample(many, keys, **settings)
        return np.bincount(drawn, minlength=4) / 4000

    np.testing.assert_allclose(shares(), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(shares(top_k=2), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(top_p=0.81), [0.526, 0.316, 0.158, 0], atol=0.03)
    flat = np.array([0.5, 0.3, 0.15, 0.05]) ** 0.5
    np.testing.assert_allclose(shares(temperature=2.0), flat / flat.sum(), atol=0.03)
    assert shares(temperature=0.0).tolist() == [1, 0, 0, 0]
    assert shares(top_p=1e-6).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("filters", [{"top_k": 5}, {"top_p": 0.7}])
def test_filters_see_whole_rows_of_a_split_vocabulary(filters):
    logits = 3 * jax.random.normal(jax.random.key(0), (8, 64))
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(1)))(jnp.arange(8))
    pick = jax.jit(partial(sample, **filters))
    want = pick(logits, keys)
    mesh = sharding.make_mesh(2, 2, 2)
    split = NamedSharding(mesh, P(("data", "fsdp"), "tensor"))
    with jax.set_mesh(mesh):
        logits = jax.device_put(logits, split)
        keys = jax.device_put(keys, sharding.batch_sharding(mesh))
        got = pick(logits, keys)
        sent = collectives(pick.lower(logits, keys).compile().as_text())
    np.testing.assert_array_equal(got, want)
    # Rows stay where they are: two of eight on a device, in float32.
    assert sent == {"all-gather": (1, 2 * 64 * 4)}


def test_sample_in_bfloat16_input_works_in_float32():
    logits = jnp.full((64, 1000), -3.0, jnp.bfloat16)
    keys = jax.random.split(jax.random.key(0), 64)
    assert len(np.unique(sample(logits, keys))) > 50
