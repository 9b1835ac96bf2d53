"""Names of sources: files, patterns, folders, saved data sets, the hub."""

import gzip
import json

import datasets
import pytest

from mgsr_jax.data.sources import open_source

RECORDS = [{"instruction": f"Say {i}.", "output": "b"} for i in range(3)]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)


def write(path, count=3):
    path.parent.mkdir(exist_ok=True, parents=True)
    text = "\n".join(map(json.dumps, RECORDS[:count])).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def names(path, split="train"):
    return [where for where, _ in open_source(path, split).records()]


def test_the_files_of_a_pattern_are_read_in_the_order_of_their_names(tmp_path):
    write(tmp_path / "parts" / "b.jsonl", 1)
    write(tmp_path / "parts" / "a.jsonl.gz", 2)
    expected = ["a.jsonl.gz:1", "a.jsonl.gz:2", "b.jsonl:1"]
    assert names(tmp_path / "parts" / "*") == expected
    assert names(tmp_path / "**" / "*.jsonl*") == expected


def test_a_name_that_exists_is_no_pattern(tmp_path):
    write(tmp_path / "run[1]" / "train.jsonl", 1)
    assert names(tmp_path / "run[1]" / "train.jsonl") == ["train.jsonl:1"]
    assert names(tmp_path / "run[1]") == ["train.jsonl:1"]


def test_the_files_of_a_folder_are_chosen_by_split(tmp_path):
    write(tmp_path / "train-00000-of-00002.jsonl", 2)
    write(tmp_path / "train-00001-of-00002.jsonl", 1)
    write(tmp_path / "valid.jsonl", 1)
    (tmp_path / "LICENSE").write_text("free")
    assert names(tmp_path) == [
        "train-00000-of-00002.jsonl:1",
        "train-00000-of-00002.jsonl:2",
        "train-00001-of-00002.jsonl:1",
    ]
    assert names(tmp_path, "validation") == ["valid.jsonl:1"]
    with pytest.raises(ValueError, match="no file of the split 'test', only train-00"):
        names(tmp_path, "test")


def test_a_split_may_be_a_folder(tmp_path):
    write(tmp_path / "train_sft" / "0.jsonl", 2)
    write(tmp_path / "dev" / "0.jsonl", 1)
    assert names(tmp_path) == names(tmp_path, "train_sft") == ["0.jsonl:1", "0.jsonl:2"]
    assert names(tmp_path, "validation") == ["0.jsonl:1"]


def test_a_folder_without_split_names_is_read_as_a_whole(tmp_path):
    write(tmp_path / "a.jsonl.gz", 1)
    write(tmp_path / "b.jsonl.gz", 1)
    assert names(tmp_path) == ["a.jsonl.gz:1", "b.jsonl.gz:1"]


def test_a_folder_with_several_data_sets_is_refused(tmp_path):
    write(tmp_path / "main" / "train.jsonl", 2)
    write(tmp_path / "other" / "train.jsonl", 1)
    card = "---\nconfigs:\n- config_name: main\n- config_name: other\n---\n"
    (tmp_path / "README.md").write_text(card)
    with pytest.raises(
        ValueError, match=r"several data sets \(main, other\); give a pa"
    ):
        names(tmp_path)
    assert names(f"{tmp_path}/other/*") == ["train.jsonl:1"]


def test_a_hub_data_set_without_its_configuration_is_told_how_to_name_it(monkeypatch):
    def load_dataset(*args, **options):
        raise ValueError("Config name is missing.\nPlease pick one: ['a', 'b']\nEx")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    match = r"missing. Please pick one: \['a', 'b'\] \(as some/set:CONFIG\)$"
    with pytest.raises(ValueError, match=match):
        open_source("some/set")


def test_a_folder_of_save_to_disk_is_read(tmp_path):
    table = datasets.Dataset.from_list(RECORDS)
    table.save_to_disk(tmp_path / "saved")
    assert [record for _, record in open_source(tmp_path / "saved").records()] == (
        RECORDS
    )
    both = datasets.DatasetDict({"train": table, "test": table.select([2])})
    both.save_to_disk(tmp_path / "both")
    assert names(tmp_path / "both", "test") == ["both:1"]
    with pytest.raises(ValueError, match="no split 'valid'; choose one of: train, tes"):
        names(tmp_path / "both", "valid")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("some/set", ("some/set", None, "train", None)),
        ("some/set:main", ("some/set", "main", "train", None)),
        ("some/set@v1.0", ("some/set", None, "train", "v1.0")),
        ("set:main@refs/pr/1", ("set", "main", "train", "refs/pr/1")),
    ],
)
def test_a_hub_name_may_have_a_config_and_a_revision(monkeypatch, name, expected):
    calls = []

    def load_dataset(path, config, split, revision):
        calls.append((path, config, split, revision))
        return datasets.Dataset.from_list(RECORDS[:1])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert names(name) == ["set:1"]
    assert calls == [expected]


@pytest.mark.parametrize(
    "error", [datasets.exceptions.DatasetNotFoundError("x"), ConnectionError("y")]
)
def test_an_unavailable_hub_data_set_is_named_in_one_line(monkeypatch, error):
    def load_dataset(*args, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    match = "'some/set' is neither a file nor a data set that the hub provides"
    with pytest.raises(FileNotFoundError, match=match) as caught:
        open_source("some/set")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("no.jsonl", FileNotFoundError, "no.jsonl' is missing; check the path"),
        ("no.jsonl.zst", FileNotFoundError, "no.jsonl.zst' is missing"),
        ("no.csv", FileNotFoundError, "no.csv' is missing; check the path"),
        ("no-*.jsonl", FileNotFoundError, "no-.*' matches no file"),
        ("empty", FileNotFoundError, "empty' is a folder without data fi"),
        ("nowhere", FileNotFoundError, "nowhere' is missing; expected a file, a patt"),
        ("some.csv", ValueError, "some.csv' has an unknown suffix"),
        ("some*", ValueError, "some.csv' has an unknown suffix"),
    ],
)
def test_what_cannot_be_found_is_named_in_one_line(tmp_path, name, error, match):
    (tmp_path / "empty").mkdir()
    (tmp_path / "some.csv").write_text("a,b")
    with pytest.raises(error, match=match) as caught:
        open_source(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_the_digest_covers_the_names_contents_and_limits_of_files(tmp_path):
    def digest(**contents):
        for old in tmp_path.glob("*.jsonl"):
            old.unlink()
        for name, text in contents.items():
            (tmp_path / f"{name}.jsonl").write_text(text)
        return open_source(f"{tmp_path}/*.jsonl").digest()

    same = digest(a="{}{}", b="{}")
    assert digest(a="{}{}", b="{}") == same
    assert len({same, digest(a="{}", b="{}{}"), digest(a="{}{}", c="{}")}) == 3


def test_the_digest_of_a_saved_data_set_covers_its_content(tmp_path):
    digests = set()
    for name, records in (("a", RECORDS), ("b", RECORDS), ("c", RECORDS[:2])):
        folder = tmp_path / name / "saved"
        datasets.Dataset.from_list(records).save_to_disk(folder)
        _, _, digest = open_source(folder).digest().rpartition(" ")
        digests.add(digest)
    assert len(digests) == 2
