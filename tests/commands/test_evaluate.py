"""`mgsr evaluate`: scores, exposure bias, several devices."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest

from mgsr_jax.commands.evaluate import EvaluateConfig, _load_prompts
from mgsr_jax.commands.exit_status import DONE, MISTAKE
from mgsr_jax.commands.loaded import load
from mgsr_jax.commands.parser import main
from mgsr_jax.decoding.sampling import ANCESTRAL
from mgsr_jax.evaluation.exposure_bias import exposure_bias
from mgsr_jax.evaluation.responses import EvaluationConfig, sample_responses

LENGTHS = {"max_prompt_length": 40, "max_length": 56, "batch_size": 12}


def command(project, *more):
    arguments = ["evaluate", "--model", str(project / "student")]
    arguments += ["--data", str(project / "valid.jsonl"), "--seeds", "[1, 2]"]
    lengths = [f"--{name}={value}" for name, value in LENGTHS.items()]
    return [*arguments, *lengths, *more]


def scores_in(project, folder):
    scores = json.loads((folder / "scores.json").read_text())
    responses = (folder / "1-valid.jsonl").read_text().splitlines()
    return scores[str(project / "valid.jsonl")], list(map(json.loads, responses))


@pytest.fixture(scope="module")
def evaluated(project, tmp_path_factory):
    """Scores with exposure bias, responses, and the table."""
    output = tmp_path_factory.mktemp("evaluated") / "scores"
    bias = ["--exposure_bias", "true", "--teacher", str(project / "teacher")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            arguments = command(
                project, *bias, "--temperature", "0.8", "--top_p", "0.9"
            )
            assert main([*arguments, "--output", str(output)]) == DONE
    return *scores_in(project, output), out.getvalue()


def test_scores_and_responses_are_written_and_printed(evaluated):
    scores, responses, table = evaluated
    assert set(scores["by_seed"]) == {"1", "2"} and scores["loss"] > 0
    assert len(responses) == 36 and {r["seed"] for r in responses} == {1, 2, None}
    for response in responses:
        assert response["prompt"].endswith("### Response:\n")
        assert list(response["scores"]) == ["rouge_l"]
        assert response["finish_reason"] in ("stop", "length")
    assert "valid.jsonl: 12 prompts (0 not scored)" in table
    rows = [line for line in table.splitlines() if line.startswith("│ valid")]
    metric, text = [[c.strip() for c in row.strip("│").split("│")] for row in rows]
    mean = scores["sampled"]["metrics"]["rouge_l"]["mean"]
    assert metric[:2] == ["valid.jsonl", "rouge_l"]
    assert metric[2].startswith(f"{mean:.2f} [")
    assert text[:2] == ["valid.jsonl", "12"] and "ExAccErr %" in table
    assert text[-1] == f"{scores['exposure_bias']:.1f}"


def test_exposure_bias_is_measured_on_samples_at_temperature_1(evaluated, project):
    student, teacher = load(str(project / "student")), load(str(project / "teacher"))
    config = EvaluateConfig(model=student.folder, data="", **LENGTHS)
    with contextlib.redirect_stdout(io.StringIO()):
        prompts = _load_prompts(config, student, str(project / "valid.jsonl"))
    protocol = EvaluationConfig(seeds=(1, 2), sampling=ANCESTRAL, **LENGTHS)
    size = len(student.tokenizer)

    def samples(loaded):
        decoding = protocol.decoding(loaded.eos_ids(), size)
        params = loaded.params("float32")
        for seed in (1, 2):
            yield from sample_responses(
                *(loaded.model, params, prompts, protocol),
                decoding=decoding,
                seed=seed,
            )

    models = [(loaded.model, loaded.params("float32")) for loaded in (student, teacher)]
    both = samples(student), samples(teacher)
    want = exposure_bias(*models[0], *models[1], *both, vocab_size=size)
    assert evaluated[0]["exposure_bias"] == pytest.approx(want, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "axis", ["fsdp", pytest.param("tensor", marks=pytest.mark.exhaustive)]
)
def test_scores_do_not_depend_on_the_mesh(evaluated, project, tmp_path, axis):
    output = tmp_path / "scores"
    more = ["--exposure_bias", "true", "--teacher", str(project / "teacher")]
    more += ["--temperature", "0.8", "--top_p", "0.9", f"--mesh.{axis}", "2"]
    assert main([*command(project, *more), "--output", str(output)]) == DONE
    scores, responses = scores_in(project, output)
    assert responses == evaluated[1]
    assert scores["loss"] == pytest.approx(evaluated[0]["loss"], rel=1e-4)
    # Percent of a ratio near 1 in float32: 100 x 1e-6.
    want = pytest.approx(evaluated[0]["exposure_bias"], abs=1e-4)
    assert scores["exposure_bias"] == want
    for name in ("greedy", "by_seed", "sampled", "seed_std"):
        assert scores[name] == evaluated[0][name]


@pytest.fixture(scope="module")
def greedy_only(project, tmp_path_factory):
    """Two metrics of greedy responses to two sets."""
    output = tmp_path_factory.mktemp("greedy") / "scores"
    sets = f"[{project / 'valid.jsonl'}, {project / 'train.jsonl'}]"
    more = ["--seeds", "[]", "--data", sets, "--limit", "3", "--output", str(output)]
    metrics = ["--metrics", "[rouge_l, exact_match]"]
    assert main([*command(project, *more), *metrics]) == DONE
    return output


def test_two_sets_are_two_files(project, greedy_only):
    scores = json.loads((greedy_only / "scores.json").read_text())
    assert [Path(path).name for path in scores] == ["valid.jsonl", "train.jsonl"]
    for values in scores.values():
        lines = (greedy_only / values["responses"]).read_text().splitlines()
        assert len(lines) == values["examples"] == 3 and values["sampled"] is None
        assert list(values["greedy"]["metrics"]) == ["rouge_l", "exact_match"]


def test_the_settings_evaluate_again(project, greedy_only, tmp_path):
    arguments = ["--config", str(greedy_only / "config.yaml")]
    output = ["--output", str(tmp_path / "scores")]
    assert main(["evaluate", *arguments, *output]) == DONE
    for name in ("scores.json", "1-valid.jsonl", "2-train.jsonl"):
        assert (tmp_path / "scores" / name).read_text() == (
            greedy_only / name
        ).read_text()


def test_the_difference_to_another_run(project, greedy_only, tmp_path, capsys):
    more = ["--limit", "3", "--samples", "2", "--metrics", "rouge_l", "exact_match"]
    more += ["--against", str(greedy_only), "--output", str(tmp_path / "scores")]
    assert main(command(project, *more)) == DONE
    scores, responses = scores_in(project, tmp_path / "scores")
    assert [r["sample"] for r in responses if r["seed"] == 1] == [0, 0, 0, 1, 1, 1]
    assert list(scores["pass_at_k"]["exact_match"]) == ["1", "2", "4"]
    difference = scores["difference"]
    assert difference["sampled"] is None
    zero = {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert difference["greedy"] == {"rouge_l": zero, "exact_match": zero}
    assert "pass@4" in capsys.readouterr().out


def test_another_set_or_template_is_refused(project, greedy_only, capsys):
    more = ["--against", str(greedy_only), "--seeds", "[]", "--limit"]
    for changed, message in (
        (["2"], "it has 3 prompts, got 2"),
        (["3", "--metrics", "math"], "it has no scores of ['math']"),
        (["3", "--data", str(project / "student")], "it has no scores of"),
    ):
        assert main(command(project, *more, *changed)) == MISTAKE
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--exposure_bias", "true"], "set --teacher to the teacher's folder"),
        (["--teacher", "folder"], "set --exposure_bias true, or leave teacher out"),
        (
            ["--exposure_bias", "true", "--teacher", "folder", "--seeds", "[]"],
            "give at least one seed",
        ),
        (["--top_p", "2"], "0 < top_p <= 1"),
        (["--samples", "0"], "samples must be at least 1"),
        (["--metrics", "bleu"], "bleu"),
        (["--metrics", "rouge_l", "rouge_l"], "each once"),
        (["--against", "nowhere"], "output folder of mgsr evaluate"),
        (["--batch_size", "0"], "batch_size must be at least 1"),
        (["--mesh.data", "3"], "mesh data=3"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line(project, capsys, arguments, message):
    assert main(command(project, *arguments)) == MISTAKE
    error = capsys.readouterr().err.strip()
    assert error.startswith("mgsr: error: ") and message in error
    assert "\n" not in error


def test_a_teacher_with_another_tokenizer_is_refused(project, capsys, tmp_path):
    teacher = shutil.copytree(project / "teacher", tmp_path / "teacher")
    file = teacher / "tokenizer.json"
    text = json.loads(file.read_text())
    vocab = text["model"]["vocab"]
    vocab["!"], vocab['"'] = vocab['"'], vocab["!"]
    file.write_text(json.dumps(text))
    more = ["--exposure_bias", "true", "--teacher", str(teacher)]
    assert main(command(project, *more)) == MISTAKE
    assert "have different tokenizers" in capsys.readouterr().err


def test_of_many_prompts_that_are_left_out_the_first_are_named(project, tmp_path):
    file = tmp_path / "long.jsonl"
    long = {"instruction": "the dog " * 60, "output": "x"}
    short = {"instruction": "the dog", "output": "x"}
    file.write_text("\n".join(map(json.dumps, [long] * 13 + [short])))
    student = load(str(project / "student"))
    config = EvaluateConfig(model=student.folder, data="", max_length=120)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert len(_load_prompts(config, student, str(file))) == 1
    first, *named, last = printed.getvalue().splitlines()
    assert "13 too long" in first and len(named) == 10
    assert "long.jsonl:10: " in named[-1] and last == "  and 3 more"
