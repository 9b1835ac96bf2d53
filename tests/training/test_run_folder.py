"""The settings file of a run, and which settings a resumed run may change."""

import dataclasses

import pytest
import yaml

from mgsr_jax.rollout_config import RolloutConfig
from mgsr_jax.training.config import TrainConfig
from mgsr_jax.training.data_config import DataConfig
from mgsr_jax.training.run_folder import check_output, write_run_config

DATA = DataConfig(train="a.jsonl", columns={"prompt": "query"})
CONFIG = TrainConfig(student="models/s", output="run", data=DATA, log_every=5)


def resumes(folder, **changes):
    changed = dataclasses.replace(CONFIG, **changes)
    check_output(folder, dataclasses.asdict(changed), resume=True)


@pytest.fixture
def started(tmp_path):
    write_run_config(tmp_path, dataclasses.asdict(CONFIG))
    return tmp_path


def test_a_run_resumes_with_its_settings_and_may_log_more_often(started):
    resumes(started)
    resumes(started, log_every=1)
    resumes(started, rollout=RolloutConfig(decode_rows=8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 7}, "started: steps was None, is 7; a resumed"),
        ({"rollout": RolloutConfig(top_k=8)}, "rollout.top_k was 0, is 8; a"),
        ({"data": dataclasses.replace(DATA, columns={})}, "was 'query', is None; a"),
        (
            {"data": DataConfig("b.jsonl", columns={"prompt": "query"})},
            "data.train was 'a.jsonl', is 'b.jsonl'; a",
        ),
    ],
)
def test_a_changed_setting_is_named_with_both_values(started, changes, message):
    with pytest.raises(ValueError, match=message):
        resumes(started, **changes)


def test_a_setting_that_the_run_did_not_have_yet_had_its_default(started):
    file = started / "config.yaml"
    settings = yaml.safe_load(file.read_text())
    del settings["data"]["train_on"], settings["best_metric"]
    file.write_text(yaml.safe_dump(settings))
    resumes(started)
    with pytest.raises(ValueError, match="data.train_on was 'last', is 'all'"):
        resumes(started, data=dataclasses.replace(DATA, train_on="all"))
