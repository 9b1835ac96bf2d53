"""Evaluation of a tiny model: responses, scores and loss."""

import dataclasses
import json
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mgsr_jax import sharding
from mgsr_jax.data.prompts import Prompt
from mgsr_jax.decoding.decode import Decoding, generate
from mgsr_jax.decoding.sampling import ANCESTRAL, GREEDY
from mgsr_jax.evaluation.evaluate import evaluate
from mgsr_jax.evaluation.text_metrics import distinct_n, rouge_l
from mgsr_jax.rows import from_lists


@pytest.fixture(scope="module")
def student():
    return tiny.llama(scale=3.0)


def make_tokenizer(size=tiny.VOCAB):
    """One word a token; id 1 is the end of sequence and padding."""
    words = {f"w{i}": i for i in range(size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="w1", pad_token="w1"
    )


def make_prompts(count=5):
    rng = np.random.default_rng(0)
    prompts = []
    for i in range(count):
        tokens = tuple(rng.integers(2, tiny.VOCAB, 1 + i % 4).tolist())
        answer = rng.integers(2, tiny.VOCAB, 3 + i % 3).tolist()
        text = "".join(f"w{token}" for token in answer)
        prompts.append(Prompt(tokens, (*answer, 1), (text, "w5"), i, True, f"f:{i}"))
    return prompts


OPTIONS = {"max_prompt_length": 4, "max_length": 14, "batch_size": 4}


@pytest.fixture(scope="module")
def result(student):
    return evaluate(*student, make_tokenizer(), make_prompts(), seeds=(3, 4), **OPTIONS)


def by_hand(student, prompts, seed):
    """All prompts in one batch, scores by the functions tested above."""
    model, params = student
    rows = from_lists([list(p.tokens) for p in prompts], [[]] * len(prompts), width=14)
    rows = generate(
        model,
        params,
        jax.tree.map(jnp.asarray, rows),
        key=jax.random.key(seed or 0),
        decoding=Decoding(14, (1,), GREEDY if seed is None else ANCESTRAL),
    )
    ids = [
        [token for token in tokens[start:end].tolist() if token != 1]
        for tokens, start, end in zip(
            rows.tokens, rows.prompt_lengths, rows.lengths, strict=True
        )
    ]
    texts = ["".join(f"w{token}" for token in answer) for answer in ids]
    scores = [rouge_l(t, p.references) for t, p in zip(texts, prompts, strict=True)]
    return ids, texts, statistics.fmean(scores)


@pytest.mark.parametrize("seed", [3, 4, None])
def test_answers_and_their_scores(student, result, seed):
    ids, texts, rouge = by_hand(student, make_prompts(), seed)
    answers = [answer for answer in result.answers if answer.seed == seed]
    assert [answer.response for answer in answers] == texts
    assert [answer.length for answer in answers] == [len(answer) for answer in ids]
    scores = result.greedy if seed is None else result.by_seed[seed]
    assert scores.rouge_l == pytest.approx(rouge)
    assert scores.distinct_2 == distinct_n(ids, 2)
    assert scores.length == statistics.fmean(len(answer) for answer in ids)


def test_mean_and_deviation_over_seeds(result):
    values = [result.by_seed[seed].rouge_l for seed in (3, 4)]
    assert result.sampled.rouge_l == pytest.approx(sum(values) / 2)
    assert result.rouge_l_std == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert result.by_seed[3] != result.by_seed[4] and result.examples == 5
    assert len(result.answers) == 15


def test_answers_are_lines_of_json(result):
    for answer in result.answers:
        line = json.loads(json.dumps(dataclasses.asdict(answer)))
        assert line["response"] == answer.response


def test_loss_is_the_mean_over_all_response_tokens(student, result):
    prompts = make_prompts()
    rows = from_lists(
        [list(p.tokens) for p in prompts], [list(p.response) for p in prompts], width=14
    )
    found = tiny.log_probs(*student, rows.tokens)
    values = [
        -found[b, t - 1, rows.tokens[b, t]]
        for b in range(5)
        for t in range(rows.prompt_lengths[b], rows.lengths[b])
    ]
    assert len(values) == sum(len(prompt.response) for prompt in prompts)
    assert result.loss == pytest.approx(statistics.fmean(values), rel=1e-5)


def test_mesh_changes_nothing(student, result):
    model, params = student
    mesh = sharding.make_mesh(data=4, fsdp=2)
    options = OPTIONS | {"batch_size": 8, "mesh": mesh}
    found = evaluate(
        model, params, make_tokenizer(), make_prompts(), seeds=(3, 4), **options
    )
    assert found.answers == result.answers
    assert found.loss == pytest.approx(result.loss, rel=1e-6)


def test_only_scored_prompts_count_and_progress_is_told(student, result):
    prompts = make_prompts(6)
    prompts[5] = dataclasses.replace(prompts[5], scored=False)
    seen = []
    found = evaluate(
        *student,
        make_tokenizer(),
        prompts,
        seeds=(),
        progress=lambda done, total: seen.append((done, total)),
        **OPTIONS,
    )
    assert (found.examples, found.greedy) == (5, result.greedy)
    assert found.sampled is None and found.rouge_l_std is None
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_padded_vocabulary_is_neither_drawn_nor_scored(student):
    tokenizer = make_tokenizer(tiny.VOCAB - 9)
    prompts = [
        dataclasses.replace(p, tokens=(2,), response=(3, 1)) for p in make_prompts(3)
    ]
    found = evaluate(*student, tokenizer, prompts, seeds=(3,), **OPTIONS)
    words = {w for answer in found.answers for w in answer.response.split("w")[1:]}
    assert max(map(int, words)) < tiny.VOCAB - 9
    row = [tiny.log_probs(*student, [[2, 3]])[0, t, : tiny.VOCAB - 9] for t in (0, 1)]
    expected = [
        np.log(np.exp(p).sum()) - p[label] for p, label in zip(row, (3, 1), strict=True)
    ]
    assert found.loss == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("prompts", "changes", "reason"),
    [
        ([], {}, "none of the 0 examples is scored"),
        (make_prompts(4), {"max_prompt_length": 3}, "f:3: a prompt of 4 tokens, at m"),
        (make_prompts(2) + make_prompts(2), {}, "an example index occurs twice"),
        (make_prompts(2), {"seeds": (1, 1)}, "an entry of seeds occurs twice"),
    ],
)
def test_bad_examples_raise(student, prompts, changes, reason):
    with pytest.raises(ValueError, match=reason):
        evaluate(*student, make_tokenizer(), prompts, **OPTIONS | changes)
