"""Settings of the data: sources, weights, columns; from YAML and the command line."""

import jsonargparse
import pytest
import yaml

from mgsr_jax.data.source_settings import DataSource
from mgsr_jax.training.data_config import DataConfig

A, B = DataSource("a.jsonl", 3.0), DataSource("org/set:main", 1.0, split="test")


def parsed(arguments):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(DataConfig, "data")
    return parser.instantiate(parser.parse_args(arguments)).data


def test_sources_are_one_name_a_list_or_records():
    assert DataConfig("a.jsonl").train_sources == (DataSource("a.jsonl"),)
    assert DataConfig(["a.jsonl", A]).train_sources == (DataSource("a.jsonl"), A)
    assert DataConfig("a.jsonl").valid_sources == ()


@pytest.mark.parametrize(
    ("value", "sources"),
    [
        ("a.jsonl", (DataSource("a.jsonl"),)),
        ("org/set:main@v1", (DataSource("org/set:main@v1"),)),
        ("parts/*.jsonl", (DataSource("parts/*.jsonl"),)),
        ("[a.jsonl, b.jsonl]", (DataSource("a.jsonl"), DataSource("b.jsonl"))),
        (
            "[{path: a.jsonl, weight: 3}, {path: 'org/set:main', weight: 1, split: "
            "test}]",
            (A, B),
        ),
    ],
)
def test_sources_are_given_in_a_file_or_on_the_command_line(tmp_path, value, sources):
    columns = {"prompt": "query", "completion": "text"}
    file = tmp_path / "some.yaml"
    data = {"train": yaml.safe_load(value), "columns": columns}
    file.write_text(yaml.safe_dump({"data": data}))
    options = ["--data.train", value, "--data.columns", str(columns)]
    for arguments in (["--config", str(file)], options):
        config = parsed(arguments)
        config.check()
        assert config.train_sources == sources and config.columns == columns


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            DataConfig(["a.jsonl", A]),
            r"weights \[None, 3.0\]; give every source a weig",
        ),
        (DataConfig([A, DataSource("b", 0.0)]), r"weights \[3.0, 0.0\]; .* above 0"),
        (DataConfig([DataSource("b", float("nan"))]), r"weights \[nan\]"),
        (DataConfig("a.jsonl", valid=[B]), "data.valid has weights"),
        (DataConfig("a.jsonl", columns={"promt": "x"}), "has the name 'promt'; expect"),
        (DataConfig([DataSource("b", columns={"x": "y"})]), "has the name 'x'"),
        (DataConfig("[{path: a, wieght: 1}]"), "begins like a list or a record and is"),
        (DataConfig("a.jsonl", valid="{path: b"), "'{path: b', which begins like"),
    ],
)
def test_what_cannot_work_is_named(config, message):
    with pytest.raises(ValueError, match=message) as error:
        config.check()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("train", "valid"),
    [
        ("a.jsonl", "./a.jsonl"),
        (["b.jsonl", "a.jsonl"], "a.jsonl"),
        ([A, B], ["c.jsonl", "a.jsonl"]),
        ("parts/*.gz", "parts/*.gz"),
        ("org/set", [DataSource("org/set", split="train")]),
    ],
)
def test_validation_data_is_not_trained_on(train, valid):
    with pytest.raises(ValueError, match="not trained on"):
        DataConfig(train, valid).check_validation()


def test_another_split_of_the_same_data_set_is_validated_on():
    DataConfig("org/set", "org/set").check_validation()
    DataConfig([DataSource("org/set", split="a")], "org/set").check_validation()
