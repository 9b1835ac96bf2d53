"""A loaded checkpoint, and checks of settings that several commands have."""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mgsr_jax.sharding import MeshConfig
from mgsr_jax.typing import Params

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from transformers import PreTrainedTokenizerFast

    from mgsr_jax.data.encoding import Encoder, Encoding
    from mgsr_jax.models import LanguageModel

Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A checkpoint's model and tokenizer; `params` reads its weights.

    Attributes:
      folder: folder of the Hugging Face checkpoint; for a hub name, in its cache.
      model: the model as pure functions.
      tokenizer: the checkpoint's tokenizer.
      encoder: turns conversations into tokens.
      mesh: device mesh for the weights; None for one device.
    """

    folder: str
    model: "LanguageModel"
    tokenizer: "PreTrainedTokenizerFast"
    encoder: "Encoder"
    mesh: "Mesh | None" = None

    def params(self, dtype: Dtype) -> Params:
        """Read the weights and cast them to `dtype`."""
        from mgsr_jax.checkpoint import hf

        return hf.load_params(self.folder, self.model, mesh=self.mesh, dtype=dtype)

    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a response."""
        from mgsr_jax.checkpoint.tokenizer import eos_ids

        return eos_ids(self.tokenizer, self.model, self.encoder.chat)

    def text(self, ids: list[int], *, special: bool = False) -> str:
        """Text of tokens, with or without special tokens."""
        from mgsr_jax.evaluation.responses import text_of

        return text_of(self.tokenizer, ids, special=special)


def load(
    name: str, encoding: "Encoding | None" = None, *, mesh: "Mesh | None" = None
) -> LoadedModel:
    """Read config.json and the tokenizer of a checkpoint.

    Args:
      name: a folder or a hub name; a hub name is downloaded to its cache.
      encoding: how conversations become tokens; None: `encoding.ALPACA`.
      mesh: device mesh for the weights; None for one device.

    Raises:
      ValueError: the tokenizer has more tokens than the embedding has rows, or no chat
        template; the model does not divide over the mesh.
      FileNotFoundError: the folder, one of its files or a template file is missing.
      OSError: see `hub.local_folder`.
    """
    from mgsr_jax import models
    from mgsr_jax.checkpoint import hf, hub
    from mgsr_jax.data.encoding import ALPACA, Encoder
    from mgsr_jax.training.distributed import lead_first

    folder = lead_first(lambda: hub.local_folder(name))
    model, tokenizer = models.from_config(folder), hf.load_tokenizer(folder)
    rows = model.config.vocab_size
    if len(tokenizer) > rows:
        raise ValueError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, but the embedding "
            f"has only {rows} rows; use the model's own tokenizer"
        )
    if mesh is not None:
        tensor = mesh.shape["tensor"]
        model = dataclasses.replace(
            model,
            vocab_rows=tensor * math.ceil(rows / tensor),
            tensor=tensor,
            split_decoder=True,
        )
    return LoadedModel(
        folder, model, tokenizer, Encoder(tokenizer, encoding or ALPACA), mesh
    )


def make_mesh(sizes: MeshConfig) -> "Mesh | None":
    """A mesh of the first devices, as many as the sizes need; None for one device.

    Several processes share the devices of all of them, so they have no such default.
    """
    import jax

    from mgsr_jax import sharding

    shape = dataclasses.astuple(sizes)
    if shape == (1, 1, 1) and jax.process_count() == 1:
        return None
    devices = jax.devices()
    if min(shape) > 0:
        devices = devices[: math.prod(shape)]
    mesh = sharding.make_mesh(*shape, devices=devices)
    processes = {device.process_index for device in mesh.devices.flat}
    if len(processes) < jax.process_count():
        raise ValueError(
            f"mesh={shape} has devices of only {len(processes)} of the "
            f"{jax.process_count()} processes; set --mesh.data -1, or start fewer"
        )
    return mesh


def check_sampling(
    temperature: float, top_k: int, top_p: float, **positive: int | None
) -> None:
    """Refuse settings of sampling that are out of range, and sizes below 1.

    Raises:
      ValueError: names the setting, its value and its range.
    """
    for name, value in positive.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            "sampling needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got "
            f"temperature={temperature}, top_k={top_k}, top_p={top_p}"
        )


def new_folder(path: str | None) -> Path | None:
    """The path of an output folder that does not exist yet, or is empty.

    Raises:
      FileExistsError: it is a file, or holds files.
      ValueError: it is the address of a bucket.
    """
    from mgsr_jax.checkpoint.folder import check_folder

    if path is None:
        return None
    check_folder("output", path)
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"output {folder} exists; choose another folder")
    return folder
