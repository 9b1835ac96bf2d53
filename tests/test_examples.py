"""The examples: properties of their data, and parts of the comparisons."""

import collections
import dataclasses
import importlib.util
import io
import itertools
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from rich.console import Console

from mgsr_jax.data import spans
from mgsr_jax.data.plain_text import alpaca_prompt
from mgsr_jax.training.config import DataConfig, TrainConfig

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module by name
    spec.loader.exec_module(module)
    return module


load("word_tokenizer")
little_english = load("little_english")


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def outputs(record):
    output = record["output"]
    return [output] if isinstance(output, str) else output


def prompt(record):
    return f"{record['instruction']} {record['input']}"


def texts(record):
    return [record["instruction"], record["input"], *outputs(record)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = little_english.write(
        tmp_path_factory.mktemp("little_english"), teacher=2400, valid=60, test=300
    )
    names = ("teacher", "train", "valid", "test")
    return {name: read(folder / f"{name}.jsonl") for name in names}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import PreTrainedTokenizerFast

    folder = little_english.tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return PreTrainedTokenizerFast.from_pretrained(folder)


def neighbours(text):
    return set(itertools.pairwise(little_english.words(text)))


def test_no_training_text_contains_a_held_out_pair(data):
    seen = set().union(*(neighbours(t) for r in data["teacher"] for t in texts(r)))
    assert not seen & little_english.HELD_OUT


def test_every_test_prompt_has_a_held_out_pair_and_is_no_training_prompt(data):
    prompts = {prompt(record) for record in data["teacher"]}
    for record in data["valid"] + data["test"]:
        assert neighbours(prompt(record)) & little_english.HELD_OUT
        assert prompt(record) not in prompts


def test_every_word_of_the_test_set_is_in_training(data):
    def words(records):
        return {w for r in records for t in texts(r) for w in little_english.words(t)}

    assert words(data["test"]) <= words(data["train"])


def test_the_student_has_the_first_part_of_the_teachers_data(data):
    assert data["train"] == data["teacher"][:1000]


def test_valid_and_test_share_no_prompt(data):
    valid = {prompt(record) for record in data["valid"]}
    assert not valid & {prompt(record) for record in data["test"]}


def test_the_three_tasks_are_equally_frequent(data):
    verbs = collections.Counter(r["instruction"].split()[0] for r in data["test"])
    assert verbs == {"Describe": 100, "Tell": 100, "Reverse": 100}


def test_references_are_distinct_and_keep_the_facts(data):
    for record in data["test"]:
        references = outputs(record)
        assert 3 <= len(references) == len(set(references))
        verb, *facts = little_english.words(prompt(record))
        facts = [word for word in facts if word in little_english.KIND_OF]
        for reference in references:
            words = little_english.words(reference)
            if verb == "Reverse":
                nouns = [w for w in words if w in little_english.KIND_OF]
                assert nouns == facts[::-1]
            else:
                assert set(facts) <= {words[0].lower(), *words}


def test_the_first_reference_varies(data):
    places = collections.Counter(
        sorted(outputs(record)).index(outputs(record)[0]) for record in data["test"]
    )
    assert len(places) >= 3


def test_noise_is_one_word_in_a_small_share_of_training_responses(data, tmp_path):
    by_prompt = {}
    for example, _ in little_english.examples(2400, seed=0, held_out=False):
        by_prompt[example.instruction, example.input] = example.responses
    wrong = 0
    for record in data["teacher"]:
        responses = by_prompt[record["instruction"], record["input"]]
        if record["output"] not in responses:
            wrong += 1
            words = record["output"].split()
            assert any(
                len(words) == len(right.split())
                and sum(a != b for a, b in zip(words, right.split(), strict=True)) == 1
                for right in responses
            )
    # Within four standard deviations of a binomial.
    assert abs(wrong / 2400 - little_english.NOISE) < 0.022


def test_lengths_and_vocabulary_are_in_the_range_that_the_quickstart_assumes(data):
    assert 214 <= len(little_english.vocabulary()) <= 300
    lengths = [len(t.split()) for r in data["train"] for t in outputs(r)]
    assert 10 <= min(lengths) and max(lengths) <= 25


def test_word_frequencies_fall_with_rank(data):
    counts = collections.Counter(
        word for r in data["train"] for word in little_english.words(prompt(r))
    )
    names = [counts[name] for name in little_english.NAMES]
    assert names[0] > 2 * names[12] > 2 * names[-1] > 0


def test_files_depend_only_on_the_seed(tmp_path):
    def files(name, seed):
        folder = little_english.write(
            tmp_path / name, teacher=50, train=20, valid=5, test=5, seed=seed
        )
        return [path.read_bytes() for path in sorted(folder.iterdir())]

    assert files("a", 1) == files("b", 1)
    assert all(x != y for x, y in zip(files("a", 1), files("c", 2), strict=True))


def test_textblob_finds_phrases_of_several_words(tokenizer):
    text = "The red dog sleeps under the tall table in the garden. The dog looks calm."
    decoded = spans.token_offsets(tokenizer, tokenizer(text)["input_ids"])
    phrases = spans.chunk([decoded[0]], [decoded[1]], "textblob")[0]
    sizes = collections.Counter(phrases[phrases >= 0].tolist())
    assert sorted(sizes.values(), reverse=True)[:4] == [4, 3, 3, 2]


def test_tokenizer_restores_every_text_within_the_longest_row(data, tokenizer):
    assert 300 <= len(tokenizer) <= 600
    pairs = [
        (alpaca_prompt(record["instruction"], record["input"]), response)
        for record in data["train"][:300] + data["test"]
        for response in outputs(record)
    ]
    prompts, responses = zip(*pairs, strict=True)
    texts = [prompt + response for prompt, response in pairs]
    # One call for all texts is many times faster than one call per text.
    prompt_ids, response_ids, whole_ids = (
        tokenizer(list(part))["input_ids"] for part in (prompts, responses, texts)
    )
    assert tokenizer.batch_decode(whole_ids) == texts
    for prompt, response, whole in zip(
        prompt_ids, response_ids, whole_ids, strict=True
    ):
        assert len(whole) + 1 <= little_english.LONGEST
        assert prompt + response == whole  # they may be encoded separately
        assert tokenizer.eos_token_id not in whole


def test_tokenizer_encodes_every_word_as_one_token(tokenizer):
    for word in little_english.vocabulary():
        assert len(tokenizer(f" {word}")["input_ids"]) == 1


def test_tokenizer_restores_other_text_from_bytes(tokenizer):
    text = "Grüße, 12 %\n\n  zebras – ok?"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


small_runs = load("small_runs")
language_judge = load("language_judge")
quickstart = load("quickstart")


def test_the_trainer_accepts_the_settings_of_every_method(tmp_path):
    methods = quickstart.METHODS | quickstart.ABLATIONS
    names = {small_runs.run_name(name) for name in methods}
    assert len(names) == len(methods)
    for method in methods.values():
        config = TrainConfig(
            student="student",
            teacher="teacher" if method.objective.needs_teacher else None,
            output=str(tmp_path),
            data=DataConfig(train="train.jsonl"),
            objective=method.objective,
            rollout=method.rollout,
            steps=1,
        )
        config.check()


def softmax(logits):
    powers = np.exp(np.asarray(logits, np.float64))
    return powers / powers.sum(-1, keepdims=True)


@pytest.mark.slow
def test_total_variation_equals_numpy():
    (student, student_params), (teacher, teacher_params) = (
        tiny.llama(seed, width=64) for seed in (0, 1)
    )
    rows = tiny.complete()
    values, where = language_judge.total_variation(
        student, student_params, teacher, teacher_params, rows
    )
    assert student == teacher  # one compiled program for all calls below

    @jax.jit
    def logits(params):
        hidden, _ = student.forward(params, rows.tokens[:, :-1])
        return student.unembed(student.head_params(params), hidden)

    q, p = softmax(logits(student_params)), softmax(logits(teacher_params))
    np.testing.assert_allclose(values, 0.5 * np.abs(p - q).sum(-1), atol=1e-5)
    assert where.sum() == (rows.lengths - rows.prompt_lengths).sum()
    same, _ = language_judge.total_variation(
        student, student_params, student, student_params, rows
    )
    np.testing.assert_allclose(same, 0.0, atol=1e-6)


def test_initial_deviations_depend_on_the_width():
    model, params = tiny.llama(0, width=64, scale=1.0)
    scaled = small_runs.scaled_for_width(params)
    mlp = scaled["layers"]["mlp"]
    np.testing.assert_allclose(mlp["up"]["kernel"].std(), 64**-0.5, rtol=0.1)
    np.testing.assert_allclose(mlp["down"]["kernel"].std(), 24**-0.5, rtol=0.1)
    np.testing.assert_allclose(scaled["embed"]["embedding"].std(), 0.3, rtol=0.1)
    norm = scaled["final_norm"]["scale"]
    assert (norm == params["final_norm"]["scale"]).all()


def test_a_table_row_has_means_and_for_several_seeds_deviations():
    first = quickstart.Scores(90.0, 80.0, 50.0, 0.2, 0.5, 0.1)
    second = dataclasses.replace(first, greedy=92.0)
    rows = small_runs.table_rows(
        {"a": [first], "b": [first, second]}, quickstart.COLUMNS
    )
    assert rows[0][:2] == ["a", "90.0"]
    assert rows[1][:3] == ["b", "91.0 ± 1.4", "80.0 ± 0.0"]
    assert len(rows[0]) == 1 + len(quickstart.COLUMNS)


def test_the_evidence_page_has_the_text_that_the_quickstart_writes():
    page = (EXAMPLES / "evidence.md").read_text()
    table = page[page.index("| model") :]
    text = quickstart.evidence_page(table, [0, 1, 2])
    version = re.compile(r"\(jax [\d.]+\)")
    assert version.sub("", page) == version.sub("", text)
    assert page.endswith(f"\n\n{quickstart.NOTES}\n")


def test_the_figure_of_what_dac_kl_keeps_draws_the_mask_of_the_loss():
    from mgsr_jax import losses

    figure = load("what_dac_kl_keeps")
    logits = np.random.default_rng(0).normal(0, 3, (5, 40)).astype(np.float32)
    kept = losses.dac_kl_fixed(
        (figure.LOWER, figure.UPPER), logits, logits, width=figure.WIDTH
    )
    p = np.exp(logits.astype(np.float64))
    p = np.sort(p / p.sum(-1, keepdims=True))[:, ::-1]
    weights = np.stack([figure.kept_weights(row) for row in p])
    np.testing.assert_allclose(kept.kept_classes, weights.sum(-1), rtol=1e-4)
    np.testing.assert_allclose(kept.kept_mass, (weights * p).sum(-1), rtol=1e-5)


arithmetic = load("arithmetic")


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    folder = arithmetic.write(
        tmp_path_factory.mktemp("arithmetic"), teacher=2000, train=300, test=150
    )
    names = ("teacher", "train", "prompts", "test")
    return {name: read(folder / f"{name}.jsonl") for name in names}


def told(record):
    return record["messages"][0]["content"]


def solved(record):
    return record["messages"][1]["content"]


CHANGES = {
    r"(?:finds|buys) (\d+)": lambda value, n: value + n,
    r"(?:loses|sells) (\d+)": lambda value, n: value - n,
    r"(doubles) them": lambda value, _: value + value,
    r"(triples) them": lambda value, _: value + value + value,
}


def values(prompt):
    """The numbers that a story goes through, read from its words."""
    story = re.fullmatch(r"\w+ has (\d+) \w+, (.*)\. How many\?", prompt)
    passed = [int(story[1])]
    for clause in re.split(r", | and ", story[2]):
        matches = ((re.fullmatch(p, clause), f) for p, f in CHANGES.items())
        [(match, change)] = [(m, f) for m, f in matches if m]
        number = int(match[1]) if match[1].isdigit() else 0
        passed.append(change(passed[-1], number))
    return passed


def test_solutions_are_right_and_follow_the_story(problems):
    words = {"plus": "+", "minus": "-", "times": "*"}
    for record in problems["teacher"] + problems["test"]:
        passed = values(told(record))
        assert 3 <= len(passed) <= 5
        assert 0 <= min(passed) and max(passed) <= arithmetic.LARGEST
        assert solved(record).endswith(".")
        steps = solved(record)[:-1].split(", ")
        for before, step, after in zip(passed[:-1], steps, passed[1:], strict=True):
            first, word, second, _, result = step.split()
            assert int(first) == before and int(result) == after
            assert eval(f"{first} {words[word]} {second}") == after


def test_no_training_problem_has_a_test_calculation(problems):
    def numbers_and_steps(record):
        return tuple(re.findall(r"\d+ \w+ \d+", solved(record)))

    trained = {numbers_and_steps(record) for record in problems["teacher"]}
    tested = {numbers_and_steps(record) for record in problems["test"]}
    assert len(tested) > 100 and not trained & tested
    assert problems["train"] == problems["teacher"][:300]


def test_prompts_are_the_training_problems_without_solutions(problems):
    assert problems["prompts"] == [
        {"messages": record["messages"][:1]} for record in problems["train"]
    ]


def test_the_arithmetic_tokenizer_writes_every_word_as_one_token(problems, tmp_path):
    from transformers import PreTrainedTokenizerFast

    folder = arithmetic.tokenizer(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)

    def tokens(messages, **options):
        return tokenizer.apply_chat_template(messages, return_dict=False, **options)

    for record in problems["test"]:
        prompt = tokens(record["messages"][:1], add_generation_prompt=True)
        whole = tokens(record["messages"])
        assert whole[: len(prompt)] == prompt
        assert len(prompt) <= arithmetic.LONGEST_PROMPT
        assert len(whole) <= arithmetic.LONGEST
        response = whole[len(prompt) :]
        assert tokenizer.decode(response) == solved(record) + arithmetic.END
        assert len(response) == len(re.findall(r"\w+|[.,]", solved(record))) + 1


load("arithmetic_judge")
opd = load("opd")


def test_methods_score_the_same_number_of_tokens():
    """Three solutions with limits of 6, then 12, then 26 tokens."""
    lengths = [13, 19, 25]
    whole = opd.METHODS["OPD"].tokens_per_response(lengths)
    assert whole == 19
    short = opd.METHODS["OPD, short"].tokens_per_response(lengths)
    np.testing.assert_allclose(short, 0.4 * 6 + 0.3 * 12 + 0.3 * 19)


def scored(greedy, sampled, **costs):
    return opd.Scores(np.array(greedy), np.array(sampled), kl=0.5, **costs)


def test_the_table_has_the_interval_over_problems_and_costs_only_of_methods():
    steady = scored([100.0, 0.0], [50.0, 100.0], scored=7.0)
    other = scored([100.0, 100.0], [50.0, 50.0], scored=9.0)
    start, sft = opd.table_rows({"start": [steady], "SFT": [steady, other]})
    # The standard error of 50 and 100 is 25.
    assert start == ["start", "50.0", "75.0", "26.0 to 100.0", "0.500", "-", "-", "-"]
    assert sft[1:4] == ["75.0 ± 35.4", "62.5 ± 17.7", "38.0 to 87.0"]
    assert sft[5] == "8 ± 1"


def test_the_verdict_compares_the_best_two_methods_problem_by_problem():
    scores = {
        "teacher": [scored([100.0] * 3, [100.0] * 3)],
        "SFT": [scored([0.0, 100.0, 0.0], [10.0, 50.0, 90.0])],
        "KD": [scored([100.0, 0.0, 100.0], [20.0, 60.0, 100.0])],
        "OPD": [scored([0.0] * 3, [0.0] * 3)],
    }
    sampled = opd.verdict(scores, "sampled_by_problem", "avg@4")
    assert sampled == (
        "Highest avg@4: KD. It leads SFT by 10.0 points (10.0 to 10.0 over the "
        "problems), which is clear."
    )
    greedy = opd.verdict(scores, "greedy_by_problem", "greedy accuracy")
    assert "KD. It leads SFT by 33.3 points (-97.3 to 100.0" in greedy
    assert greedy.endswith("which is not clear.")


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:.*forward-compatible:DeprecationWarning")
def test_the_smallest_comparison_runs(tmp_path):
    scale = opd.Scale(
        teacher_width=64,
        layers=1,
        teacher_problems=64,
        problems=32,
        test_problems=16,
        teacher_steps=21,  # the optimizer's warm-up has 20
        warm_steps=21,
        steps=22,  # eleven epochs
        batch_size=16,
    )
    console = Console(file=io.StringIO(), width=120)
    workspace = opd.Workspace(tmp_path, scale, console)
    scores = opd.compare(workspace, [0], opd.METHODS)
    assert list(scores) == ["teacher", "start", *opd.METHODS]
    assert scores["teacher"][0].kl == 0 < scores["start"][0].kl
    solutions = [solved(record) for record in read(workspace.data / "train.jsonl")]
    tokens = sum(len(re.findall(r"\w+|[.,]", text)) + 1 for text in solutions)
    for name in ("SFT", "KD"):
        [own] = scores[name]
        assert own.generated == 0
        np.testing.assert_allclose(own.scored, 11 * tokens / 1000)
    [gkd], [on_policy] = scores["GKD"], scores["OPD"]
    assert 0 < gkd.generated < gkd.scored
    assert on_policy.generated == on_policy.scored > 0
    table = (tmp_path / "table.md").read_text()
    assert table.count("\n|") == 2 + len(scores) - 1
    for text in ("Highest greedy accuracy: ", "Highest avg@4: "):
        assert text in table and text in console.file.getvalue()
