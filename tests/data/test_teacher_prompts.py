"""A teacher that reads other prompts: their tokens, its rows, and the loss on them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from instruction_data import EOS, EOS_ID, LONG, TOKENIZER, write

from mgsr_jax.data import dataset
from mgsr_jax.data.batches import eval_batches
from mgsr_jax.data.encoding import Encoding
from mgsr_jax.data.plain_text import alpaca_prompt
from mgsr_jax.data.teacher_prompts import TeacherPrompts
from mgsr_jax.objective import Objective, position_weights
from mgsr_jax.rows import from_lists
from mgsr_jax.step_loss import StepLoss, micro_batch_loss

HINTED = dataclasses.replace(LONG, teacher_prompt="{prompt}\n\\boxed{{reference}}")
RECORDS = [
    {"instruction": "Say hi.", "output": "Hi"},
    {"instruction": "Name {reference}", "input": "a cat", "output": "Tom"},
    {"instruction": "Count.", "output": "1 2 3"},
]


def load(folder, encoding=HINTED):
    file = write(folder, RECORDS)
    return dataset.load(file, TOKENIZER, encoding, chunker=None, cache_dir=folder)


def test_the_teacher_s_prompt_is_the_template_s_with_another_last_turn(tmp_path):
    table, _ = load(tmp_path)
    texts = [TOKENIZER.decode(row["teacher_prompt"]) for row in table]
    assert texts == [
        alpaca_prompt("Say hi.\n\\boxed{Hi}"),
        alpaca_prompt("Name {reference}\n\na cat\n\\boxed{Tom}"),
        alpaca_prompt("Count.\n\\boxed{1 2 3}"),
    ]
    assert [TOKENIZER.decode(row["prompt"]) for row in table] == [
        alpaca_prompt("Say hi."),
        alpaca_prompt("Name {reference}", "a cat"),
        alpaca_prompt("Count."),
    ]
    assert "teacher_prompt" not in load(tmp_path, LONG)[0].column_names


def test_a_teacher_s_prompt_that_is_too_long_leaves_the_record_out(tmp_path):
    longest = max(len(row["teacher_prompt"]) for row in load(tmp_path)[0])
    encoding = dataclasses.replace(HINTED, max_teacher_prompt_length=longest - 1)
    _, report = load(tmp_path, encoding)
    assert (report.kept, report.too_long) == (2, 1)
    assert f"{longest} tokens of teacher_prompt, at most" in report.messages[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(teacher_prompt="{reference}"), "expected a text with {prompt}"),
        (dict(max_teacher_prompt_length=0), "max_teacher_prompt_length is 0"),
        (dict(too_long="truncate"), "too_long is 'truncate'; expected 'drop'"),
        (dict(train_on="all", template="chat"), "train_on is 'all'; expected 'last'"),
    ],
)
def test_settings_that_cannot_work_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(HINTED, **changes)


def test_the_teacher_s_rows_have_its_prompts_and_the_student_s_responses(tmp_path):
    table, _ = load(tmp_path)
    (rows,) = eval_batches(table, 4, widths=[300])
    teacher_rows = TeacherPrompts(table, HINTED.teacher_limit).rows(rows)
    assert teacher_rows.tokens.shape == (4, HINTED.teacher_width) == (4, 300 + 299)
    np.testing.assert_array_equal(teacher_rows.ground_truth, rows.ground_truth)
    for b in range(3):
        start, end = teacher_rows.prompt_lengths[b], teacher_rows.lengths[b]
        row = teacher_rows.tokens[b].tolist()
        assert row[:start] == table[b]["teacher_prompt"]
        assert row[start:end] == table[b]["response"] and row[end - 1] == EOS_ID
    assert TOKENIZER.decode(row[start:end]) == "1 2 3" + EOS
    assert teacher_rows.lengths[3] == teacher_rows.prompt_lengths[3] == 1  # a filler


def draw_rows(rng, prompt_lengths, responses, width):
    prompts = [rng.integers(2, tiny.VOCAB, n).tolist() for n in prompt_lengths]
    spans = [np.sort(rng.integers(-1, 2, len(r))).tolist() for r in responses]
    return from_lists(prompts, responses, width=width, span_ids=spans)


@pytest.mark.slow
def test_the_loss_is_that_of_both_models_on_their_own_rows():
    """Each row by itself, without padding, compared at the response's tokens."""
    rng = np.random.default_rng(0)
    responses = [rng.integers(2, tiny.VOCAB, n).tolist() for n in (5, 1, 7, 3)]
    rows = draw_rows(rng, (3, 6, 1, 4), responses, 14)
    teacher_rows = draw_rows(rng, (7, 2, 5, 4), responses, 20)
    (student, params), (teacher, teacher_params) = tiny.llama(0), tiny.llama(1)
    kls, spans = [], []
    for b, response in enumerate(responses):
        log_q, log_p = (
            tiny.log_probs(model, own, read.tokens[b : b + 1, : read.lengths[b]])[0][
                read.prompt_lengths[b] - 1 : -1
            ]
            for model, own, read in (
                (student, params, rows),
                (teacher, teacher_params, teacher_rows),
            )
        )
        p, q = np.exp(log_p), np.exp(log_q)
        assert len(p) == len(q) == len(response)
        kls += np.sum(p * (log_p - log_q), -1).tolist()
        ids = rows.span_ids[b, rows.prompt_lengths[b] : rows.lengths[b]]
        spans += [
            np.linalg.norm(p[t] * p[t + 1] - q[t] * q[t + 1])
            for t in range(len(ids) - 1)
            if ids[t] == ids[t + 1] != -1
        ]
    assert spans
    objective = Objective(sft=0.0, divergence="forward_kl")
    spec = StepLoss(student, teacher, objective, tiny.VOCAB, chunk_size=4)
    on_device, others = jax.tree.map(jnp.asarray, (rows, teacher_rows))

    @jax.jit
    def loss(read):
        weights = position_weights(on_device, objective)
        arguments = {"student": params}, teacher_params, on_device, weights
        return micro_batch_loss(*arguments, spec=spec, teacher_outputs=read)

    total, metrics = loss(others)
    np.testing.assert_allclose(total, np.mean(kls) + np.mean(spans), rtol=1e-5)
    assert metrics["forward_kl"].count == len(kls) == 16
    same, _ = loss(on_device)
    np.testing.assert_allclose(same, loss(None)[0], rtol=1e-6)
    assert abs(same - total) > 1e-3


def test_the_widths_without_a_prompt_of_its_own_are_the_student_s():
    assert Encoding().teacher_width == Encoding().max_length
