"""Models by hub name, with a stand-in for the hub, and with a cache made by hand."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects

from mgsr_jax.checkpoint import hub

COMMIT = "0123456789abcdef" * 2 + "01234567"
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
)
OTHERS = (
    "README.md",
    "pytorch_model.bin",
    "consolidated.safetensors",
    "original/consolidated.00.pth",
    "original/config.json",
    "onnx/model.safetensors",
    "modeling_odd.py",
    "tf_model.h5",
)


class Hub:
    """A hub with one model; `calls` has what was asked for."""

    def __init__(self, cache: Path, files: tuple[str, ...]):
        self.cache, self.files, self.calls, self.error = cache, files, [], None

    def snapshot_download(self, repo, *, revision, allow_patterns, ignore_patterns):
        self.calls.append((repo, revision))
        if self.error is not None:
            raise self.error
        folder = self.cache / "models--org--name" / "snapshots" / COMMIT
        wanted = filter_repo_objects(
            self.files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        for name in wanted:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}")
        return str(folder)


@pytest.fixture
def remote(tmp_path, monkeypatch):
    remote = Hub(tmp_path / "cache", FILES + OTHERS)
    monkeypatch.setattr(hub, "snapshot_download", remote.snapshot_download)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(remote.cache))
    monkeypatch.chdir(tmp_path)
    return remote


def error_of(kind, *arguments):
    """An error of the hub without its HTTP response, which no test reads."""
    error = kind.__new__(kind)
    Exception.__init__(error, *arguments)
    return error


def names(folder):
    root = Path(folder)
    return sorted(str(f.relative_to(root)) for f in root.rglob("*") if f.is_file())


@pytest.mark.parametrize(
    ("model", "revision"),
    [
        ("org/name", None),
        ("org/name@v1.0", "v1.0"),
        ("org/name@refs/pr/3", "refs/pr/3"),
    ],
)
def test_only_config_tokenizer_and_safetensors_are_downloaded(remote, model, revision):
    folder = hub.local_folder(model)
    assert names(folder) == sorted(FILES)
    assert remote.calls == [("org/name", revision)]


def test_a_plan_needs_only_the_configs(remote):
    folder = hub.local_folder("org/name", weights=None)
    assert names(folder) == ["config.json", "generation_config.json"]


def test_pickled_weights_are_downloaded_only_to_convert_them(remote):
    folder = hub.local_folder("org/name", weights=hub.PICKLES)
    assert "pytorch_model.bin" in names(folder)
    assert not any(name.endswith(".safetensors") for name in names(folder))


@pytest.mark.parametrize("path", ["org/name", "model", "/models/student", "./a/b/c"])
def test_a_folder_that_exists_has_priority_and_other_paths_are_kept(remote, path):
    if path == "org/name":
        Path(path).mkdir(parents=True)
    assert hub.local_folder(path) == path
    assert not remote.calls


def test_a_model_without_safetensors_names_the_command_that_converts_it(remote):
    remote.files = OTHERS[:2]
    with pytest.raises(FileNotFoundError, match="`mgsr convert org/name@v1 TARGET`"):
        hub.local_folder("org/name@v1")
    remote.files = FILES
    with pytest.raises(FileNotFoundError, match=r"no pytorch_model\*\.bin"):
        hub.local_folder("org/name", weights=hub.PICKLES)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (error_of(GatedRepoError), PermissionError, "gated .*accept.*`hf auth login`"),
        (error_of(RepositoryNotFoundError), FileNotFoundError, "neither a folder nor"),
        (error_of(RevisionNotFoundError), FileNotFoundError, "no revision 'v9'"),
        (
            error_of(LocalEntryNotFoundError),
            FileNotFoundError,
            "cannot be reached.*`hf download org/name`",
        ),
        (RuntimeError("broken pipe"), OSError, "broken pipe.*run the command again"),
    ],
)
def test_each_failure_is_one_clear_line(remote, error, kind, message):
    remote.error = error
    with pytest.raises(kind, match=message) as caught:
        hub.local_folder("org/name@v9")
    assert "\n" not in str(caught.value)


def test_a_cached_model_is_recorded_by_its_name_and_commit(remote):
    folder = hub.local_folder("org/name")
    assert hub.portable_name(folder) == f"org/name@{COMMIT}"
    assert hub.repo_and_commit(folder) == ("org/name", COMMIT)
    assert hub.repo_and_commit(f"org/name@{COMMIT}") == ("org/name", COMMIT)
    for path in (None, "models/student", "/a/models--org--name/snapshots/b"):
        assert hub.portable_name(path) == path
    assert hub.repo_and_commit(Path("/models/student")) == ("/models/student", None)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """The cache of huggingface_hub itself, without a network."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return cache


def test_offline_the_cache_of_the_hub_is_read(offline):
    model = offline / "models--org--name"
    folder = model / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_text("{}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    assert Path(hub.local_folder("org/name")) == folder
    assert Path(hub.local_folder(f"org/name@{COMMIT}")) == folder
    shutil.rmtree(model)
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set"):
        hub.local_folder("org/name")
