"""Types that every other file uses: dimension letters, parameters, the model.

Dimension letters in signatures and in suffixes such as `logits_BTV`:
B batch, T position, S cache position (slot), V vocabulary, D width, F MLP width,
N query heads, K key/value heads, H head width, L layers, A micro-batches.
"""

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, PyTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer
else:  # transformers takes about a second to import, and the losses do not need it
    Tokenizer = Any

Params = dict[str, Any]
"""Nested dicts of arrays."""

Cache = PyTree
"""Keys and values of every layer; slot s holds those of position s."""

Leaf = Any
"""A field of a record: an array, or its counterpart in a tree of the same form (a
sharding, a shape, None). The record's docstring gives the shapes."""

STUDENT, CLIP_NETWORK = "student", "clip_network"
"""Top-level keys of the trained parameters."""

LAYERS = "layers"
"""The key of the layers' parameters in a model's parameters."""

BATCH_AXES = ("data", "fsdp")
"""The axes of the trainer's mesh that rows are split over."""

PRNGKey = Key[Array, ""]
RowKeys = Key[Array, "B"]


@runtime_checkable
class ModelConfig(Protocol):
    """A model's configuration, a frozen dataclass."""

    @property
    def vocab_size(self) -> int:
        """The number of rows of the embedding in the checkpoint."""
        ...


@runtime_checkable
class Model(Protocol):
    """A language model as pure functions; hashable, so static under `jax.jit`."""

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        ...

    def forward(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Final hidden states; attention is causal in `positions` (default 0..T-1).

        With a cache, position p writes slot p and attends to the slots up to p. A
        position at or beyond the cache's length writes nothing.
        """
        ...

    def head_params(self, params: Params) -> Params:
        """The part of `params` that `unembed` reads."""
        ...

    def unembed(
        self, head: Params, hidden: Float[Array, "*B D"]
    ) -> Float[Array, "*B V"]:
        """Logits of the next token.

        Implementations multiply a matrix in `head` with `mgsr_jax.losses.project`, and
        only once: in training it is an object that can only be cast and projected.
        """
        ...

    def init_cache(self, batch: int, length: int, dtype: DTypeLike) -> Cache:
        """An empty cache with `length` slots per row."""
        ...

    def place_decoding(
        self, per_row: Any, hidden: Float[Array, "B S D"]
    ) -> tuple[Any, Float[Array, "B S D"]]:
        """Arrays with a first axis of rows, and hidden states, split for decoding."""
        ...

    def decode_params(self, params: Params, dtype: DTypeLike) -> Params:
        """A copy for decoding: cast, with one subtree per layer instead of a stack."""
        ...
