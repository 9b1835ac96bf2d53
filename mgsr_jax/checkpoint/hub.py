"""Models by their names on the Hugging Face hub, through the hub's own cache.

A name is `org/name`, or `org/name@revision` with a branch, a tag or a commit. The first
use downloads; later uses and runs without a network read the cache.
"""

import os
import re
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mgsr_jax.checkpoint.folder import PathLike
from mgsr_jax.checkpoint.tokenizer import FILES as TOKENIZER_FILES

CONFIGS = ("config.json", "generation_config.json")
WEIGHTS = ("*.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
_IGNORED = ("*/*", "consolidated*")
"""Second copies of the weights in other layouts, as Llama's and Mistral's have them."""

_NAME = re.compile(r"(?P<repo>\w[\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def local_folder(model: str, *, weights: tuple[str, ...] | None = WEIGHTS) -> str:
    """The folder of a model that is given as a folder or as a hub name.

    A path that exists is returned as it is. A hub name is downloaded to the cache of
    huggingface_hub if it is not there: config, tokenizer, chat template and weights.

    Args:
      model: a folder, `org/name` or `org/name@revision`.
      weights: patterns of the weight files; None: only the configs are downloaded.

    Raises:
      FileNotFoundError: the hub has no such model or revision, the model has none of
        these weights, or it is not in the cache and the hub cannot be reached.
      PermissionError: the model is gated and its terms are not accepted.
      OSError: the download failed.
    """
    name = _NAME.fullmatch(model)
    if name is None or os.path.exists(model):
        return model
    repo, revision = name["repo"], name["revision"]
    patterns = [*CONFIGS, *TOKENIZER_FILES, *weights] if weights else [*CONFIGS]
    folder = _download(repo, revision, patterns)
    if weights and not any(Path(folder).glob(weights[0])):
        raise FileNotFoundError(_without_weights(repo, model, weights))
    return folder


def portable_name(path: str | None) -> str | None:
    """`org/name@commit` for a folder of the hub's cache; any other path as it is.

    The name is valid on every machine and does not follow a branch that moves.
    """
    if path is None or (parts := _cached(path)) is None:
        return path
    return "@".join(parts)


def repo_and_commit(source: PathLike) -> tuple[str, str | None]:
    """The hub name without its revision, and the revision; a path has none."""
    path = os.fspath(source)
    if (cached := _cached(path)) is not None:
        return cached
    name = None if os.path.exists(path) else _NAME.fullmatch(path)
    return (path, None) if name is None else (name["repo"], name["revision"])


def _cached(path: str) -> tuple[str, str] | None:
    """Name and commit of a folder CACHE/models--ORG--NAME/snapshots/COMMIT."""
    folder = Path(path)
    repo = folder.parent.parent
    if repo.parent != Path(constants.HF_HUB_CACHE) or folder.parent.name != "snapshots":
        return None
    kind, *names = repo.name.split("--")
    return ("/".join(names), folder.name) if kind == "models" else None


def _download(repo: str, revision: str | None, patterns: list[str]) -> str:
    name = repo if revision is None else f"{repo}@{revision}"
    try:
        return snapshot_download(
            repo,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=list(_IGNORED),
        )
    except GatedRepoError as error:
        raise PermissionError(
            f"{repo} is a gated model; accept its terms at "
            f"{constants.ENDPOINT}/{repo}, then run `hf auth login` or set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name} is neither a folder nor a model that the hub shows; check the "
            "path or the name, or run `hf auth login` if the model is private"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{repo} has no revision {revision!r}; give a branch, a tag or a commit of "
            "this model"
        ) from error
    except LocalEntryNotFoundError as error:
        reason = (
            "HF_HUB_OFFLINE is set"
            if constants.HF_HUB_OFFLINE
            else "the hub cannot be reached"
        )
        raise FileNotFoundError(
            f"{name} is not a folder, and it is not complete in the cache "
            f"{constants.HF_HUB_CACHE}; {reason}, so check the path, or run `hf "
            f"download {repo}` where there is a network"
        ) from error
    except Exception as error:  # the errors of an HTTP client have no common class
        raise OSError(
            f"the download of {name} failed ({type(error).__name__}: {error}); run the "
            "command again to continue it"
        ) from error


def _without_weights(repo: str, model: str, weights: tuple[str, ...]) -> str:
    if weights == WEIGHTS:
        return (
            f"{repo} has no .safetensors weights on the hub; run `mgsr convert {model} "
            "TARGET` and use TARGET"
        )
    return f"{repo} has no {weights[0]} on the hub; give a model with pickled weights"
