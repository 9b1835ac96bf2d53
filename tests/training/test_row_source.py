"""The rows of every step, and that they go on from a checkpoint as they would have."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mgsr_jax import sharding
from mgsr_jax.interventions.outcome import InterventionInfo
from mgsr_jax.losses import TopKTeacher
from mgsr_jax.rollout_config import RolloutConfig
from mgsr_jax.rows import NO_SPAN, from_lists
from mgsr_jax.training.row_source import BatchLayout, RowSource, with_spans

BATCH, WIDTH, STEPS = 8, 10, 20
MARK = 7  # the span id that stands for "the chunker was here"


class Batches:
    """Batch n has the examples 8n ... 8n + 7, as `train_batches` gives them."""

    def __init__(self, width=WIDTH):
        self.position, self.width = 0, width

    def __next__(self):
        rows = tiny.complete([(2, 3)] * BATCH, width=self.width, seed=self.position)
        example = np.arange(BATCH, dtype=np.int32) + BATCH * self.position
        self.position += 1
        return dataclasses.replace(jax.tree.map(np.asarray, rows), example=example)

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


horizons = []


def rollout(params, teacher_params, micro_batches, key, horizon):
    """Writes a number that params, teacher and the key decide behind each prompt."""
    del teacher_params
    horizons.append(horizon)
    return tuple(
        zip(*(write(params, rows, key) for rows in micro_batches), strict=True)
    )


def write(params, rows, key):
    number = jax.random.randint(jax.random.fold_in(key, 0), (), 10, 1000)
    number += params["offset"]
    size = rows.lengths.shape[0]
    info = InterventionInfo(
        teacher_wrote=jnp.zeros(rows.tokens.shape, bool).at[:, 2].set(True),
        kl=jnp.ones(size),
        student_generated=jnp.ones(size, jnp.int32),
        teacher_scored=jnp.ones(size, jnp.int32),
    )
    written = dataclasses.replace(
        rows,
        tokens=rows.tokens.at[:, 2].set(number.astype(jnp.int32)),
        span_ids=jnp.full_like(rows.span_ids, NO_SPAN),
        ground_truth=jnp.zeros_like(rows.ground_truth),
    )
    width = rows.tokens.shape[1]
    heard = jnp.broadcast_to(rows.example[:, None, None], (size, width, 3))
    return written, info, heard


def add_spans(rows):
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(rows))
    return dataclasses.replace(rows, span_ids=np.full_like(rows.span_ids, MARK))


def lookup(rows):
    """Says of every position which example it is of."""
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(rows))
    assert rows.ground_truth.all()
    shape = (len(rows.example), rows.tokens.shape[1] - 1, 3)
    example = np.broadcast_to(rows.example[:, None, None], shape)
    logits, indices = example.astype(np.float16), example.astype(np.uint16)
    return TopKTeacher(logits, indices, logits[..., 0].astype(np.float32))


def make(policy="on", *, parts=2, mesh=None, lookup=None, widths=(WIDTH,), **settings):
    keep = settings.pop("keep_ground_truth", True)
    teacher_rows = settings.pop("teacher_rows", None)
    data_width = settings.pop("data_width", widths[0])
    mesh = mesh or sharding.make_mesh(2, 2, devices=jax.devices()[:4])
    return RowSource(
        Batches(data_width),
        RolloutConfig(policy, **settings),
        None if policy == "off" else rollout,
        add_spans,
        layout=BatchLayout(mesh, BATCH, parts, widths, prompt_limit=2),
        steps=STEPS,
        keep_ground_truth=keep,
        lookup=lookup,
        teacher_rows=teacher_rows,
    )


def step(source, number):
    key = jax.random.fold_in(jax.random.key(0), number)
    return source.next(number, key, {"offset": jnp.int32(0)}, None)


def written_by(rows):
    """(example, what the rollout wrote) of every row."""
    written = zip(rows.example.tolist(), rows.tokens[:, 2].tolist(), strict=True)
    return set(written)


def examples(parts):
    return [part.example.tolist() for part in parts]


@pytest.mark.parametrize("parts", [1, 2])
def test_data_comes_in_order_in_equal_parts_on_the_mesh(parts):
    source = make("off", parts=parts)
    for number in range(2):
        rows = step(source, number)
        assert rows.source == "data" and rows.interventions == ()
        assert len(rows.micro_batches) == parts
        want = np.arange(BATCH) + BATCH * number
        assert sum(examples(rows.micro_batches), []) == want.tolist()
        for part in rows.micro_batches:
            assert part.ground_truth.all() and part.tokens.shape == (8 // parts, 10)
            assert len(part.tokens.sharding.device_set) == 4
            assert part.tokens.sharding.spec == sharding.BATCH


def test_a_generated_step_carries_the_ground_truth_of_its_prompts():
    source = make()
    rows = step(source, 0)
    assert rows.source == "generate" and len(rows.micro_batches) == 4
    data, written = rows.micro_batches[:2], rows.micro_batches[2:]
    assert examples(data) == examples(written) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for truth, sample in zip(data, written, strict=True):
        assert truth.ground_truth.all() and not sample.ground_truth.any()
        assert (sample.span_ids == MARK).all() and (truth.span_ids != MARK).all()
        np.testing.assert_array_equal(sample.tokens[:, :2], truth.tokens[:, :2])
        assert (sample.tokens[:, 2] >= 10).all()
        assert sample.tokens.sharding == truth.tokens.sharding
    assert [info.kl.shape for info in rows.interventions] == [(4,)] * 2
    assert rows.generated == rows.micro_batches[2:]


def test_a_generated_step_without_labels_carries_the_samples_alone():
    rows = step(make(keep_ground_truth=False), 0)
    assert len(rows.micro_batches) == 2 == len(rows.interventions)
    assert rows.generated == rows.micro_batches
    assert not any(part.ground_truth.any() for part in rows.micro_batches)


def assert_cached(rows):
    """Each row has its own teacher output, in the cache's dtype and sharded alike."""
    assert len(rows.teacher_outputs) == len(rows.micro_batches)
    for part, found in zip(rows.micro_batches, rows.teacher_outputs, strict=True):
        if not part.ground_truth.any():
            assert_heard(rows, part, found)
            continue
        assert part.ground_truth.all()
        assert [leaf.dtype for leaf in found] == ["float16", "uint16", "float32"]
        for leaf in found:
            assert leaf.sharding.spec == part.tokens.sharding.spec == sharding.BATCH
            np.testing.assert_array_equal(
                leaf[:, 0].ravel()[:: leaf[0, 0].size], part.example
            )


def assert_heard(rows, part, found):
    """The student's rows come with what the teacher's reading of them left."""
    if rows.source == "replay":
        assert found is None
    else:
        np.testing.assert_array_equal(found[:, -1, -1], part.example)


@pytest.mark.parametrize("parts", [1, 2])
def test_data_s_rows_come_with_what_the_cache_says(parts):
    source = make("off", parts=parts, lookup=lookup)
    for number in range(2):
        rows = step(source, number)
        assert None not in rows.teacher_outputs
        assert_cached(rows)


def test_the_student_s_rows_are_not_in_the_cache():
    rows = step(make(lookup=lookup), 0)
    kinds = [isinstance(found, TopKTeacher) for found in rows.teacher_outputs]
    assert kinds == [True, True, False, False]
    assert_cached(rows)
    source = make("replay", initial_ratio=1.0, capacity=16, lookup=lookup)
    for number in range(STEPS):
        rows = step(source, number)
        assert_cached(rows)
    assert rows.source == "replay"


def test_what_is_not_trained_on_is_not_looked_up():
    rows = step(make(keep_ground_truth=False, lookup=pytest.fail), 0)
    assert not any(isinstance(found, TopKTeacher) for found in rows.teacher_outputs)


def test_without_a_cache_the_teacher_is_run_on_the_data_s_rows():
    assert step(make("off"), 0).teacher_outputs == (None,) * 2
    rows = step(make("on"), 0)
    assert rows.teacher_outputs[:2] == (None,) * 2
    for part, found in zip(
        rows.micro_batches[2:], rows.teacher_outputs[2:], strict=True
    ):
        assert_heard(rows, part, found)


@pytest.mark.slow
def test_only_a_step_that_generates_needs_the_whole_width():
    """Rows of 5 tokens are 6 wide where nothing is written behind them."""
    settings = dict(initial_ratio=0.7, capacity=16, lookup=lookup)
    narrow, wide = (
        make("replay", widths=(6, WIDTH), **settings),
        make("replay", **settings),
    )
    widths = {"data": 6, "generate": WIDTH, "replay": 6}
    sources = set()
    for number in range(STEPS):
        found, expected = step(narrow, number), step(wide, number)
        assert found.source == expected.source
        sources.add(found.source)
        assert_cached(found)
        width = widths[found.source]
        for own, whole in zip(found.micro_batches, expected.micro_batches, strict=True):
            assert own.tokens.shape[1] == width
            for name in ("tokens", "span_ids"):
                np.testing.assert_array_equal(
                    getattr(own, name), getattr(whole, name)[:, :width]
                )
            np.testing.assert_array_equal(own.example, whole.example)
    assert sources == set(widths)


SCHEDULE = ((0.0, 2), (0.1, 4), (0.5, 100))


@pytest.mark.parametrize(
    ("keep", "data_width", "expected"), [(False, 8, (6, 6, 10)), (True, 8, (8, 8, 10))]
)
def test_a_horizon_follows_training_and_needs_only_its_own_width(
    keep, data_width, expected
):
    """Prompts have at most 2 tokens; the data's own rows are 8 wide."""
    source = make(
        keep_ground_truth=keep,
        widths=(6, 8, WIDTH),
        data_width=data_width,
        max_new_tokens=SCHEDULE,
    )
    horizons.clear()
    for number, width in zip((1, 2, 10), expected, strict=True):
        rows = step(source, number)
        assert rows.horizon == horizons[-1]
        assert {part.tokens.shape[1] for part in rows.micro_batches} == {width}
    assert horizons == [2, 4, 100]


def test_narrow_samples_fit_the_replay_buffer():
    settings = dict(initial_ratio=1.0, capacity=8, max_new_tokens=3)
    source = make("replay", widths=(6, WIDTH), **settings)
    assert step(source, 0).micro_batches[0].tokens.shape[1] == 6
    rows = step(source, STEPS - 1)
    assert rows.source == "replay" and rows.horizon is None
    assert source.replay_rows["tokens"].shape == (8, WIDTH)


def with_hint(rows):
    """The same rows with one more token of prompt."""
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(rows))
    tokens = np.pad(rows.tokens, ((0, 0), (1, 0)))
    return dataclasses.replace(rows, tokens=tokens)


@pytest.mark.parametrize("keep", [True, False])
def test_a_teacher_with_prompts_of_its_own_has_rows_for_every_micro_batch(keep):
    settings = dict(initial_ratio=0.7, capacity=8, keep_ground_truth=keep)
    source = make("replay", teacher_rows=with_hint, **settings)
    sources = set()
    for number in range(STEPS):
        rows = step(source, number)
        sources.add(rows.source)
        assert len(rows.teacher_outputs) == len(rows.micro_batches)
        for part, read in zip(rows.micro_batches, rows.teacher_outputs, strict=True):
            assert read.tokens.sharding.spec == sharding.BATCH
            np.testing.assert_array_equal(read.tokens[:, 1:], part.tokens)
            np.testing.assert_array_equal(read.lengths, part.lengths)
    assert sources == {"data", "generate", "replay"}


def test_what_is_drawn_depends_on_the_step_s_key_alone():
    first, second = step(make(), 0), step(make(), 0)
    other = step(make(), 1)
    tokens = [
        np.concatenate([part.tokens for part in rows.micro_batches[2:]])
        for rows in (first, second, other)
    ]
    np.testing.assert_array_equal(tokens[0], tokens[1])
    assert (tokens[0][:, 2] != tokens[2][:, 2]).all()


def test_replay_draws_what_was_generated():
    source = make("replay", initial_ratio=1.0, capacity=16)
    sources, generated = [], set()
    for number in range(STEPS):
        before = source.host_state()["data"]
        rows = step(source, number)
        sources.append(rows.source)
        assert rows.source != "data"
        if rows.source == "generate":
            for part in rows.micro_batches[2:]:
                generated |= written_by(part)
            continue
        # No data is used up, and both parts are the students' own with their spans.
        assert source.host_state()["data"] == before
        assert len(rows.micro_batches) == 2
        for part in rows.micro_batches:
            assert not part.ground_truth.any() and (part.span_ids == MARK).all()
            assert written_by(part) <= generated
    # The buffer is full after two; then replay takes over.
    assert sources[:2] == ["generate"] * 2 and "replay" in sources
    assert source.host_state()["pushed"] == 8 * sources.count("generate")


def test_other_policies_keep_no_samples():
    source = make("on", capacity=1000)
    step(source, 0)
    assert source.host_state()["pushed"] == 0
    assert source.replay_rows["lengths"].shape == (1,)


def test_a_restored_source_goes_on_as_the_first_would_have():
    """Through JSON and arrays, as a checkpoint holds them."""
    settings = dict(initial_ratio=0.7, capacity=16, epsilon=0.1)
    first = make("replay", **settings)
    for number in range(6):
        step(first, number)
    first.validated(2.0)
    first.validated(3.0)
    assert first.ratio == pytest.approx(0.8)
    host = json.loads(json.dumps(first.host_state()))
    replay = {name: np.array(leaf) for name, leaf in first.replay_rows.items()}
    second = make("replay", **settings)
    second.restore(host, replay)
    replay["tokens"][:] = -5  # the restored source has its own copy
    assert second.ratio == first.ratio
    sources = set()
    for number in range(6, STEPS):
        ours, theirs = step(first, number), step(second, number)
        assert ours.source == theirs.source
        sources.add(ours.source)
        jax.tree.map(
            np.testing.assert_array_equal, ours.micro_batches, theirs.micro_batches
        )
    assert sources == {"data", "generate", "replay"}
    assert first.host_state() == second.host_state()
    second.validated(3.05)
    assert second.ratio == first.ratio  # the reference came along
    second.validated(3.2)
    assert second.ratio == pytest.approx(first.ratio + 0.1)


def test_a_policy_that_generates_needs_a_rollout():
    with pytest.raises(ValueError, match="policy='on' generates, but rollout is None"):
        RowSource(
            Batches(),
            RolloutConfig("on"),
            None,
            add_spans,
            layout=BatchLayout(sharding.make_mesh(), BATCH, 1, [WIDTH]),
            steps=STEPS,
            keep_ground_truth=True,
        )


def test_parts_that_do_not_divide_over_the_mesh_are_refused():
    with pytest.raises(ValueError, match="a batch of 4 rows does not divide"):
        step(make("off", mesh=sharding.make_mesh()), 0)


class Letters:
    """A tokenizer with one token per character."""

    def decode(self, ids, **settings):
        return "".join(chr(i) for i in ids)


def test_spans_are_marked_in_the_response_alone(monkeypatch):
    words = "the cat sat"
    rows = from_lists(
        [[ord(c) for c in "the cat"], [ord("x")]],
        [[ord(c) for c in words], [ord("y")]],
        width=22,
    )
    rows.span_ids[:] = 9  # stale
    monkeypatch.setattr("mgsr_jax.training.row_source.token_offsets", offsets)
    marked = with_spans(rows, Letters(), find_cats, spacy_model="none")
    cat = words.index("cat")
    want = [NO_SPAN] * 22
    first = 7 + cat
    span = marked.span_ids[0, first]
    assert span >= 0
    want[first : first + 3] = [span] * 3
    assert marked.span_ids[0].tolist() == want
    assert marked.span_ids[1].tolist() == [NO_SPAN] * 22
    assert (rows.span_ids == 9).all()  # the rows that were given stay as they are
    for field in ("tokens", "lengths", "prompt_lengths", "example", "ground_truth"):
        assert getattr(marked, field) is getattr(rows, field)


def offsets(tokenizer, ids):
    return tokenizer.decode(ids), [(i, i + 1) for i in range(len(ids))]


def find_cats(text):
    start = text.find("cat")
    return [] if start < 0 else [(start, start + 3)]
