"""Evaluation of a tiny model: responses, scores and loss.

The tokenizer has fewer words than the model has columns, as padded vocabularies do.
"""

import collections
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
from mgsr_jax.evaluation.estimates import mean_estimate
from mgsr_jax.evaluation.evaluate import evaluate
from mgsr_jax.evaluation.responses import EvaluationConfig
from mgsr_jax.evaluation.text_metrics import distinct_n, rouge_l
from mgsr_jax.rows import from_lists

WORDS, WIDTH = 20, 14
CONFIG = EvaluationConfig(
    seeds=(3, 4), max_prompt_length=4, max_length=WIDTH, batch_size=4
)


@pytest.fixture(scope="module")
def student():
    return tiny.llama(scale=3.0, num_hidden_layers=1)


@pytest.fixture(scope="module")
def tokenizer():
    """One word a token; id 1 is end-of-sequence and padding."""
    words = {f"w{i}": i for i in range(WORDS)}
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
        tokens = tuple(rng.integers(2, WORDS, 1 + i % 4).tolist())
        response = rng.integers(2, WORDS, 3 + i % 3).tolist()
        text = "".join(f"w{token}" for token in response)
        prompts.append(Prompt(tokens, (*response, 1), (text, "w5"), i, True, f"f:{i}"))
    return prompts


@pytest.fixture(scope="module")
def result(student, tokenizer):
    return evaluate(*student, tokenizer, make_prompts(), CONFIG)


@pytest.fixture(scope="module", params=[3, 4, None])
def by_hand(student, request):
    """Seed, token ids and texts, from batches that are composed differently."""
    model, params = student
    ids, prompts = {}, make_prompts()[::-1]
    for batch in (prompts[:4], prompts[1:]):
        rows = from_lists(
            [list(prompt.tokens) for prompt in batch],
            [[]] * 4,
            width=WIDTH,
            examples=[prompt.example for prompt in batch],
        )
        rows = generate(
            model,
            params,
            jax.tree.map(jnp.asarray, rows),
            key=jax.random.key(request.param or 0),
            decoding=Decoding(
                max_length=WIDTH,
                eos_ids=(1,),
                sampling=GREEDY if request.param is None else ANCESTRAL,
                vocab_size=WORDS,
            ),
            prefill_width=4,
        )
        for example, tokens, start, end in zip(
            rows.example, rows.tokens, rows.prompt_lengths, rows.lengths, strict=True
        ):
            response = [token for token in tokens[start:end].tolist() if token != 1]
            assert ids.setdefault(int(example), response) == response
    ids = [ids[example] for example in range(5)]
    return request.param, ids, ["".join(f"w{token}" for token in row) for row in ids]


@pytest.mark.slow
def test_responses_and_scores_equal_those_by_hand(result, by_hand):
    seed, ids, texts = by_hand
    responses = [response for response in result.responses if response.seed == seed]
    assert [response.response for response in responses] == texts
    assert [response.length for response in responses] == [len(row) for row in ids]
    scores = result.greedy if seed is None else result.by_seed[seed]
    rouge = [
        rouge_l(text, prompt.references)
        for text, prompt in zip(texts, make_prompts(), strict=True)
    ]
    assert scores.metrics["rouge_l"].mean == pytest.approx(statistics.fmean(rouge))
    assert [response.scores["rouge_l"] for response in responses] == rouge
    assert scores.distinct_1 == distinct_n(ids, 1)
    assert scores.distinct_2 == distinct_n(ids, 2)
    assert scores.distinct_4 == distinct_n(ids, 4)
    assert scores.length == statistics.fmean(len(row) for row in ids)


def test_mean_and_deviation_over_seeds(result):
    values = [result.by_seed[seed].metrics["rouge_l"].mean for seed in (3, 4)]
    assert result.sampled.metrics["rouge_l"].mean == pytest.approx(sum(values) / 2)
    deviation = abs(values[0] - values[1]) / 2**0.5
    assert result.seed_std == pytest.approx({"rouge_l": deviation})
    assert result.by_seed[3] != result.by_seed[4] and result.examples == 5
    assert len(result.responses) == 15


def test_a_response_has_its_prompt_and_why_it_ended(result):
    for response in result.responses:
        line = json.loads(json.dumps(dataclasses.asdict(response)))
        assert line["response"] == response.response
        prompt = make_prompts()[int(response.source.removeprefix("f:"))]
        assert response.prompt == "".join(f"w{token}" for token in prompt.tokens)
        assert response.references == prompt.references
        full = len(prompt.tokens) + response.length == WIDTH
        assert response.finish_reason == "length" if full else "stop"
    reasons = [response.finish_reason for response in result.responses]
    assert {"stop", "length"} == set(reasons)
    assert result.greedy.stopped == reasons[-5:].count("stop") / 5


@pytest.fixture(scope="module")
def three_samples(student, tokenizer):
    config = dataclasses.replace(CONFIG, samples=3)
    metrics = ("rouge_l", "exact_match")
    return evaluate(*student, tokenizer, make_prompts(), config, metrics=metrics)


def by_draw(result):
    """(seed, sample) -> texts."""
    texts = collections.defaultdict(list)
    for response in result.responses:
        texts[response.seed, response.sample].append(response.response)
    return texts


def test_samples_of_a_seed_differ_and_begin_with_the_only_one(result, three_samples):
    one, three = by_draw(result), by_draw(three_samples)
    assert list(three) == [*((s, j) for s in (3, 4) for j in range(3)), (None, 0)]
    assert all(three[draw] == texts for draw, texts in one.items())
    assert len({tuple(texts) for texts in three.values()}) == 7


def test_scores_of_a_seed_are_means_over_its_samples(three_samples):
    values = collections.defaultdict(list)
    for response in three_samples.responses:
        values[response.seed].append(response.scores["rouge_l"])
    for seed in (3, 4):
        got = three_samples.by_seed[seed].metrics["rouge_l"].mean
        assert got == pytest.approx(np.mean(values[seed])) and len(values[seed]) == 15
    by_prompt = np.reshape(values[3] + values[4], (6, 5)).mean(0)
    want = mean_estimate(by_prompt)
    got = three_samples.sampled.metrics["rouge_l"]
    assert dataclasses.astuple(got) == pytest.approx(dataclasses.astuple(want))
    assert list(three_samples.pass_at_k) == ["exact_match"]
    assert list(three_samples.pass_at_k["exact_match"]) == [1, 2, 4, 6]


def test_tokens_beyond_the_tokenizers_vocabulary_are_not_sampled(result):
    words = {w for r in result.responses for w in r.response.split("w")[1:]}
    assert len(words) > 5 and max(map(int, words)) < WORDS < tiny.VOCAB


def test_loss_is_the_mean_over_all_response_tokens(student, result):
    """The columns beyond the tokenizer's vocabulary have probability 0."""
    prompts = make_prompts()
    rows = from_lists(
        [list(prompt.tokens) for prompt in prompts],
        [list(prompt.response) for prompt in prompts],
        width=WIDTH,
    )
    log_probs = tiny.log_probs(*student, rows.tokens)[..., :WORDS]
    assert np.exp(log_probs).sum(-1).min() < 0.9
    log_probs -= np.log(np.exp(log_probs).sum(-1, keepdims=True))
    values = [
        -log_probs[b, t - 1, rows.tokens[b, t]]
        for b in range(5)
        for t in range(rows.prompt_lengths[b], rows.lengths[b])
    ]
    assert len(values) == sum(len(prompt.response) for prompt in prompts)
    assert result.loss == pytest.approx(statistics.fmean(values), rel=1e-5)


def test_a_mesh_and_another_batch_size_do_not_change_the_result(
    student, tokenizer, result
):
    mesh = sharding.make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    config = dataclasses.replace(CONFIG, batch_size=8)
    on_mesh = evaluate(*student, tokenizer, make_prompts(), config, mesh=mesh)
    assert on_mesh.responses == result.responses
    assert on_mesh.loss == pytest.approx(result.loss, rel=1e-6)


def test_only_scored_prompts_count_and_progress_is_reported(student, tokenizer, result):
    prompts = make_prompts(6)
    prompts[5] = dataclasses.replace(prompts[5], scored=False)
    calls = []
    greedy_only = evaluate(
        *student,
        tokenizer,
        prompts,
        dataclasses.replace(CONFIG, seeds=()),
        progress=lambda done, total: calls.append((done, total)),
    )
    assert (greedy_only.examples, greedy_only.greedy) == (5, result.greedy)
    assert greedy_only.sampled is None and greedy_only.seed_std is None
    assert greedy_only.pass_at_k == {}
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_reference_that_math_cannot_read_is_named(student, tokenizer):
    prompts = make_prompts()
    prompts[3] = dataclasses.replace(prompts[3], references=("no number at all",))
    with pytest.raises(ValueError, match="f:3: math finds no final answer"):
        evaluate(*student, tokenizer, prompts, CONFIG, metrics=("math",))
