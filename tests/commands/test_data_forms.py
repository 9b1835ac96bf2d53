"""Every form of data through the commands that read it."""

import json

import pytest
import yaml

from mgsr_jax.commands.exit_status import DONE, MISTAKE
from mgsr_jax.commands.parser import main

PROMPT, RESPONSE = "the old dog sees", "a small cat ."
TURNS = [
    {"role": "user", "content": PROMPT},
    {"role": "assistant", "content": RESPONSE},
]
SHARE_GPT = [{"from": "human", "value": PROMPT}, {"from": "gpt", "value": RESPONSE}]
FORMS = {
    "chat": {"messages": TURNS},
    "ShareGPT": {"conversations": SHARE_GPT},
    "instruction": {"instruction": PROMPT, "output": RESPONSE},
    "prompt-completion": {"prompt": PROMPT, "completion": RESPONSE},
    "question-answer": {"question": PROMPT, "answer": RESPONSE},
}
PROMPTS = {
    "prompt": {"prompt": PROMPT},
    "messages": {"messages": TURNS[:1]},
    "question": {"question": PROMPT},
    "instruction": {"instruction": PROMPT},
}


def write(folder, records):
    """A file of eight equal records for each form."""
    files = []
    for name, record in records.items():
        files.append(folder / f"{name}.jsonl")
        files[-1].write_text("\n".join([json.dumps(record)] * 8))
    return [str(file) for file in files]


@pytest.mark.exhaustive
def test_every_form_is_trained_on(tmp_path, recipe, capsys):
    files = write(tmp_path, FORMS)
    data = {"train": [{"path": file, "weight": 1} for file in files[:-1]]}
    data["train"].append({"path": files[-1], "weight": 2})
    more = tmp_path / "more.yaml"
    more.write_text(yaml.safe_dump({"data": data}))
    command = ["train", "--config", recipe, "--config", str(more)]
    assert main([*command, "--output", str(tmp_path / "run")]) == DONE
    log = capsys.readouterr().err
    for name in FORMS:
        assert f"{name}.jsonl: {name} (" in log
    assert "first prompt: 'Below is" in log and f"first response: '{RESPONSE}" in log
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert [s["weight"] for s in resolved["data"]["train"]] == [1.0, 1.0, 1.0, 1.0, 2.0]
    resumed = [*command, "--output", str(tmp_path / "run"), "--resume", "true"]
    assert main(resumed) == DONE


@pytest.mark.exhaustive
def test_prompts_only_are_trained_on_with_rollouts(project, tmp_path, recipe, capsys):
    files = write(tmp_path, PROMPTS)
    command = ["train", "--config", recipe, "--data.train", f"[{', '.join(files)}]"]
    refused = [*command, "--output", str(tmp_path / "refused")]
    assert main(refused) == MISTAKE
    assert 'set rollout.policy to "on"' in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
    command += ["--teacher", str(project / "teacher"), "--rollout.policy", "on"]
    command += ["--objective.sft", "0", "--objective.token", "1"]
    command += ["--objective.num_candidates", "16", "--data.buckets", "[32]"]
    assert main([*command, "--output", str(tmp_path / "run")]) == DONE
    log = capsys.readouterr().err
    assert "question.jsonl: prompts only (question): 8 examples" in log
    assert "first response: none; the student writes it" in log
    assert "first responses of the student, nats per token: KL(teacher" in log
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    first, *_, last = map(json.loads, lines)
    assert first["step"] == 0 and first["start/kl"] > 0
    assert last["step"] == 2


@pytest.mark.exhaustive
def test_every_form_is_scored(project, tmp_path, capsys):
    files = write(tmp_path, FORMS)
    command = ["evaluate", "--model", str(project / "student"), "--seeds", "[]"]
    command += ["--max_prompt_length", "40", "--max_length", "56", "--data"]
    assert main([*command, f"[{', '.join(files)}]"]) == DONE
    assert capsys.readouterr().out.count("8 prompts (0 not scored)") == len(FORMS)
    assert main([*command, *write(tmp_path, {"only": PROMPTS["question"]})]) == MISTAKE
    assert "holds prompts only (question)" in capsys.readouterr().err
