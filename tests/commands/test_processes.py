"""Evaluation and generation on eight devices and in two processes of four."""

import json

import pytest
from processes import by_variables, environment, free_port, together

LAYOUTS = {
    "one device": (1, 1, {}),
    "eight devices": (1, 8, {"data": 2, "fsdp": 2, "tensor": 2}),
    "two processes": (2, 4, {"fsdp": 4, "tensor": 2}),
}
RUN = """
import json, sys
import jax
import numpy as np
from mgsr_jax.commands.parser import main
from mgsr_jax.sharding import from_lead
for arguments in json.loads(sys.argv[1]):
    assert main(arguments) == 0
lead = np.array([[0.1, 1e-300]])  # float32 has neither
assert np.array_equal(from_lead(lead + jax.process_index()), lead)
"""


def run(project, layout, *, against=None):
    """Scores, responses and the lines of generate of one layout."""
    processes, devices, mesh = LAYOUTS[layout]
    output = project / layout.replace(" ", "_")
    shared = ["--batch_size", "12", "--max_length", "56"]
    shared += [f"--mesh.{axis}={size}" for axis, size in mesh.items()]
    evaluate = ["evaluate", "--model", str(project / "student"), *shared]
    evaluate += ["--data", str(project / "valid.jsonl"), "--output", str(output)]
    evaluate += [
        "--metrics",
        "[rouge_l, exact_match]",
        "--seeds",
        "[7]",
        "--samples",
        "2",
    ]
    evaluate += ["--exposure_bias", "true", "--teacher", str(project / "teacher")]
    evaluate += ["--max_prompt_length", "40"]
    evaluate += ["--against", str(against)] if against else []
    generate = ["generate", "--model", str(project / "student"), *shared]
    generate += ["--prompt", '["the", "a red dog", "old"]', "--template", "none"]
    port = free_port()
    environments = [
        environment(devices, **(by_variables(i, port) if processes > 1 else {}))
        for i in range(processes)
    ]
    outs = together(["-c", RUN, json.dumps([evaluate, generate])], environments)
    # Gloo prints too.
    lines = [[x for x in out.splitlines() if x.startswith("{")] for out in outs]
    assert not any(lines[1:]) and all("examples" not in out for out in outs[1:])
    (scores,) = json.loads((output / "scores.json").read_text()).values()
    responses = (output / "1-valid.jsonl").read_text().splitlines()
    return scores, list(map(json.loads, responses)), list(map(json.loads, lines[0]))


@pytest.fixture(scope="module")
def one_device(project):
    return run(project, "one device")


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", ["eight devices", "two processes"])
def test_responses_do_not_depend_on_devices_and_processes(project, one_device, layout):
    scores, responses, lines = run(project, layout, against=project / "one_device")
    expected, *texts = one_device
    assert len(responses) == 36 and len(lines) == 3
    assert [responses, lines] == texts
    assert len({line["response"] for line in responses}) > 12
    for name in ("sampled", "greedy", "pass_at_k"):
        assert scores[name] == expected[name]
    zero = {"mean": 0.0, "low": 0.0, "high": 0.0}
    for part in ("sampled", "greedy"):
        assert scores["difference"][part] == {"rouge_l": zero, "exact_match": zero}
    assert scores["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    want = pytest.approx(expected["exposure_bias"], abs=1e-4)
    assert scores["exposure_bias"] == want
