"""The decoder against a Python loop that recomputes everything for every token."""

import dataclasses
import functools
from functools import partial

import decode_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from decode_reference import as_lists

from mgsr_jax import sharding
from mgsr_jax.decoding.decode import DecodeState, Decoding, decode, generate, start
from mgsr_jax.decoding.sampling import GREEDY, STUDENT_STREAM, Sampling, row_keys
from mgsr_jax.planning.compiled import collectives
from mgsr_jax.typing import Params

EOS = (1, 3)
ENDLESS = (99,)  # no token of the vocabulary
TO_14 = Decoding(14, EOS)


@pytest.fixture(scope="module")
def student():
    return tiny.llama(scale=3.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        Sampling(),
        Sampling(temperature=0.7, top_k=3),
        Sampling(temperature=1.3, top_p=0.6),
    ],
    ids=["greedy", "sampling", "top-k", "top-p"],
)
def test_responses_equal_full_recompute(student, sampling):
    model, params = student
    rows, key = tiny.prompts(), jax.random.key(7)
    decoding = dataclasses.replace(TO_14, sampling=sampling)
    got = generate(model, params, rows, key=key, decoding=decoding)
    assert as_lists(got) == reference.generate(model, params, rows, key, decoding)
    beyond = np.arange(14)[None] >= got.lengths[:, None]
    assert np.all(np.asarray(got.tokens)[beyond] == 0)


@pytest.mark.slow
def test_a_row_ends_with_each_stop_id_and_keeps_it(student):
    model, params = student
    rows, key = tiny.prompts(), jax.random.key(7)
    free = generate(model, params, rows, key=key, decoding=Decoding(14, ENDLESS))
    assert free.lengths.tolist() == [14] * 4
    first, second = int(free.tokens[0, 3]), int(free.tokens[1, 6])
    decoding = Decoding(14, (first, second))
    stopped = generate(model, params, rows, key=key, decoding=decoding)
    for b, tokens in enumerate(as_lists(free)):
        prompt = int(rows.prompt_lengths[b])
        hits = [i for i in range(prompt, 14) if tokens[i] in (first, second)]
        end = hits[0] + 1 if hits else 14
        assert as_lists(stopped)[b] == tokens[:end]


@pytest.mark.slow
@pytest.mark.parametrize("max_length", [7, 14])
def test_the_last_slot_is_written(student, max_length):
    """One new token, and prompt + new == width: an off-by-one shows here."""
    model, params = student
    rows, key = tiny.prompts((6, 5)), jax.random.key(1)
    decoding = Decoding(max_length, ENDLESS)
    got = generate(model, params, rows, key=key, decoding=decoding)
    assert as_lists(got) == reference.generate(model, params, rows, key, decoding)


class Counted:
    """A model that counts its forward passes as they run."""

    def __init__(self, model):
        self.model, self.calls = model, 0

    def __getattr__(self, name):
        return getattr(self.model, name)

    def forward(self, params, tokens, **arguments):
        jax.debug.callback(self.count)
        return self.model.forward(params, tokens, **arguments)

    def count(self):
        self.calls += 1


@pytest.mark.slow
def test_decoding_stops_at_the_most_new_tokens(student):
    """Every response has at most so many tokens; the loop ends at the next check."""
    model, params = student
    rows = tiny.prompts(width=20)
    counted = Counted(model)
    state = start(model, params, rows)
    calls = {}
    for horizon in (3, 8, 9):
        counted.calls = 0
        ended = decode(
            counted,
            model.decode_params(params, jnp.float32),
            state,
            keys=row_keys(jax.random.key(7), rows.example, STUDENT_STREAM, 0),
            decoding=Decoding(20, ENDLESS, max_new_tokens=horizon),
        )
        jax.effects_barrier()
        calls[horizon] = counted.calls
        np.testing.assert_array_equal(ended.rows.lengths, rows.prompt_lengths + horizon)
    assert calls == {3: 8, 8: 8, 9: 16}


def test_a_full_row_is_unchanged(student):
    model, params = student
    rows = tiny.prompts((6, 3), width=6)
    decoding = Decoding(6, ENDLESS)
    got = generate(model, params, rows, key=jax.random.key(0), decoding=decoding)
    assert as_lists(got)[0] == rows.tokens[0].tolist()
    assert got.lengths.tolist() == [6, 6]


def test_a_sample_does_not_depend_on_its_batch(student):
    model, params = student
    rows, key = tiny.prompts(), jax.random.key(3)
    run = partial(generate, model, params, key=key, decoding=TO_14)
    together = as_lists(run(rows))
    order = jnp.array([2, 0, 3, 1])
    shuffled = as_lists(run(jax.tree.map(lambda leaf: leaf[order], rows)))
    assert [together[i] for i in order] == shuffled
    alone = jax.tree.map(lambda leaf: leaf[1:2], rows)
    assert as_lists(run(alone)) == [together[1]]


@pytest.mark.slow
def test_a_row_that_is_cut_back_continues_in_the_same_cache(student):
    """A row is cut back by its length alone; the old suffix has no effect."""
    model, params = student
    copy = model.decode_params(params, jnp.float32)
    rows = tiny.prompts()
    keys = row_keys(jax.random.key(5), rows.example, STUDENT_STREAM, 0)
    settings = dict(keys=keys, decoding=TO_14)
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


def test_padded_columns_are_never_drawn(student):
    model, params = student
    rows = tiny.prompts((1,) * 8)
    decoding = Decoding(14, ENDLESS, Sampling(temperature=50.0), vocab_size=5)
    got = generate(model, params, rows, key=jax.random.key(0), decoding=decoding)
    new = np.asarray(got.tokens)[:, 1:]
    assert new.max() == 4 and len(np.unique(new)) == 5


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
def test_no_ngram_is_repeated(student, n):
    model, params = student
    rows = tiny.prompts((5, 3))
    decoding = Decoding(14, ENDLESS, GREEDY, vocab_size=20, no_repeat_ngram=n)
    got = generate(model, params, rows, key=jax.random.key(0), decoding=decoding)
    for tokens, prompt in zip(as_lists(got), (5, 3), strict=True):
        grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        new = grams[prompt - n + 1 :]
        assert len(set(new)) == len(new)
        assert not set(new) & set(grams[: prompt - n + 1])


def test_prefill_width_changes_nothing(student):
    model, params = student
    rows, key = tiny.prompts(), jax.random.key(2)
    run = partial(generate, model, params, rows, key=key, decoding=TO_14)
    assert as_lists(run()) == as_lists(run(prefill_width=6))


@pytest.mark.slow
@pytest.mark.parametrize("decode_rows", [1, 3])
def test_rows_do_not_depend_on_how_many_are_decoded_at_a_time(student, decode_rows):
    """Rows of all lengths, more than are decoded at a time."""
    model, params = student
    rows = tiny.prompts((1, 4, 2, 6, 3, 13, 5, 2, 14, 1, 7))
    run = partial(generate, model, params, rows, key=jax.random.key(3))
    together = run(decoding=TO_14)
    lengths = set((together.lengths - together.prompt_lengths).tolist())
    assert 0 in lengths and len(lengths) > 4
    few = dataclasses.replace(TO_14, decode_rows=decode_rows)
    assert as_lists(run(decoding=few)) == as_lists(together)


@pytest.mark.slow
def test_rows_are_exchanged_with_their_cache_and_hidden_states(student):
    model, params = student
    copy = model.decode_params(params, jnp.float32)
    rows = tiny.prompts((1, 4, 2, 6, 3, 9))
    keys = row_keys(jax.random.key(5), rows.example, STUDENT_STREAM, 0)
    settings = dict(keys=keys, decoding=TO_14)
    want = decode(model, copy, start(model, params, rows), **settings)
    settings["decoding"] = dataclasses.replace(TO_14, decode_rows=2)
    got = decode(model, copy, start(model, params, rows), **settings)
    assert got.done.all()
    for b, length in enumerate(want.rows.lengths.tolist()):
        seen = slice(length - 1)
        np.testing.assert_allclose(got.hidden[b, seen], want.hidden[b, seen], atol=1e-5)
        for x, y in zip(
            jax.tree.leaves(got.cache), jax.tree.leaves(want.cache), strict=True
        ):
            np.testing.assert_allclose(x[b, :, seen], y[b, :, seen], atol=1e-5)


def test_decode_rows_that_do_not_divide_over_the_mesh_are_an_error(student):
    model, params = student
    mesh = sharding.make_mesh(data=8)
    rows = jax.tree.map(np.asarray, tiny.prompts((3,) * 16))
    decoding = dataclasses.replace(TO_14, decode_rows=12)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="decode_rows=12, over 8"):
        batch = sharding.put_batch(mesh, rows)
        generate(model, params, batch, key=jax.random.key(0), decoding=decoding)


def test_lengths_keys_and_temperatures_do_not_recompile(student):
    model, params = student
    generate.clear_cache()
    for seed, lengths in enumerate([(1, 2, 3, 4), (6, 6, 1, 5), (2, 2, 2, 2)]):
        generate(
            model,
            params,
            tiny.prompts(lengths, seed=seed),
            key=jax.random.key(seed),
            decoding=Decoding(10 + seed, EOS, Sampling(temperature=0.5 * seed)),
        )
    assert generate._cache_size() == 1


def placed(model, params, mesh):
    return jax.device_put(
        params, sharding.shardings(mesh, model.partition_rules, params)
    )


@pytest.mark.slow
@pytest.mark.parametrize("decode_rows", [None, 8])
@pytest.mark.parametrize(
    ("sizes", "split"),
    [((4, 2, 1), False), ((4, 2, 1), True), ((1, 8, 1), True), ((2, 2, 2), True)],
)
def test_mesh_changes_nothing(decode_rows, sizes, split):
    """4 key and value heads: 2 and 4 devices divide them, 8 do not."""
    model, params = tiny.llama(scale=3.0, num_key_value_heads=4, vocab_size=32)
    rows, key = tiny.prompts((1, 4, 2, 6, 3, 3, 5, 2) * 2), jax.random.key(11)
    decoding = dataclasses.replace(TO_14, vocab_size=tiny.VOCAB)
    want = generate(model, params, rows, key=key, decoding=decoding)
    model = dataclasses.replace(model, tensor=sizes[2], split_decoder=split)
    mesh = sharding.make_mesh(*sizes)
    decoding = dataclasses.replace(decoding, decode_rows=decode_rows)
    with jax.set_mesh(mesh):
        batch = sharding.put_batch(mesh, jax.tree.map(np.asarray, rows))
        on_mesh = placed(model, params, mesh)
        got = generate(model, on_mesh, batch, key=key, decoding=decoding)
    assert as_lists(jax.device_get(got)) == as_lists(jax.device_get(want))


@dataclasses.dataclass(frozen=True)
class OnMesh:
    """A compiled decoding on a mesh, its result, and the weights that it read."""

    text: str
    state: DecodeState
    copy: Params


@functools.cache
def decoded(sizes, *, split, kv_heads, decode_rows=None):
    model, params = tiny.llama(
        width=128, intermediate_size=128, num_key_value_heads=kv_heads, vocab_size=64
    )
    model = dataclasses.replace(model, tensor=sizes[2], split_decoder=split)
    mesh = sharding.make_mesh(*sizes)
    rows = jax.tree.map(np.asarray, tiny.prompts((3,) * 16))
    decoding = dataclasses.replace(
        TO_14, vocab_size=tiny.VOCAB, decode_rows=decode_rows
    )

    def run(copy, state):
        keys = row_keys(jax.random.key(0), state.rows.example, 0, 0)
        return decode(model, copy, state, keys=keys, decoding=decoding)

    with jax.set_mesh(mesh):
        on_mesh = placed(model, params, mesh)
        copy = jax.jit(lambda p: model.decode_params(p, jnp.float32))(on_mesh)
        batch = sharding.put_batch(mesh, rows)
        state = jax.jit(lambda p, r: start(model, p, r))(on_mesh, batch)
        compiled = jax.jit(run).lower(copy, state).compile()
        return OnMesh(compiled.as_text(), compiled(copy, state), copy)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "split", "kv_heads", "decode_rows"),
    [
        ((2, 4, 1), False, 2, None),
        ((2, 2, 2), False, 2, None),
        ((1, 2, 4), False, 2, None),
        ((2, 4, 1), True, 4, None),
        ((2, 4, 1), True, 4, 8),
        ((2, 4, 1), True, 2, None),
        ((2, 2, 2), True, 4, None),
        ((1, 2, 4), True, 1, None),
        ((1, 8, 1), True, 2, None),
    ],
)
def test_decoding_moves_activations_but_no_weights(sizes, split, kv_heads, decode_rows):
    run = decoded(sizes, split=split, kv_heads=kv_heads, decode_rows=decode_rows)
    rows = decode_rows or 16
    hidden = 4 * 128 * rows // sizes[0]  # bytes, of the rows that share a copy
    smallest = 4 * 128 * 32 * kv_heads  # keys or values, all-gathered over fsdp
    smallest //= sizes[2] if kv_heads % sizes[2] == 0 else 1
    moved = set()
    for line in run.text.splitlines():
        for kind, (_, size) in collectives(line).items():
            # Weights are not gathered in a loop, nor for all tokens before it.
            assert size < smallest, line
            if "while/body" in line:
                moved |= {(kind, size)}
    largest = max((size for _, size in moved), default=0)
    assert largest <= (2 * hidden if split else hidden)
    assert not split or ("all-reduce", hidden) in moved
    # Every matrix but those of heads that do not divide is split over all parts.
    parts = 8 // sizes[0] if split else sizes[2]
    for path, leaf in jax.tree_util.tree_leaves_with_path(run.copy):
        if leaf.ndim == 2 and "key" not in (name := jax.tree_util.keystr(path)):
            if "value" not in name:
                held = leaf.addressable_shards[0].data.size
                assert held == leaf.size // parts, (name, leaf.sharding)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "kv_heads"), [((2, 4, 1), 4), ((2, 4, 1), 2), ((2, 2, 2), 4)]
)
def test_a_split_decoder_has_the_log_probs_of_a_whole_copy(sizes, kv_heads):
    states, log_probs = [], []
    for split in (True, False):
        run = decoded(sizes, split=split, kv_heads=kv_heads, decode_rows=None)
        states.append(jax.device_get(run.state))
        head = np.asarray(run.copy["head"]["embedding"])
        log_probs.append(jax.nn.log_softmax(states[-1].hidden @ head.T))
    assert as_lists(states[0].rows) == as_lists(states[1].rows)
    for b, length in enumerate(states[0].rows.lengths):
        got, want = (values[b, : length - 1] for values in log_probs)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
