"""The vocabulary of every other file: dimension letters, parameters, the model.

Dimension letters in signatures and in suffixes such as `logits_BTV`:
B batch, T position, S cache position (slot), V vocabulary, D width, F MLP width,
N query heads, K key/value heads, H head width, L layers, A micro-batches.
"""

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int, Key, PyTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer
else:  # transformers takes about a second to import, and the losses do not need it
    Tokenizer = Any

Params = dict[str, Any]
"""Nested dicts of arrays."""

Cache = PyTree
"""Keys and values of every layer; slot s holds what position s wrote."""

Leaf = Any
"""A field of a record: an array, or what stands for it in a tree of the same form
(a sharding, a shape, None). Shapes stand in the record's docstring."""

STUDENT, CLIP_NETWORK = "student", "clip_network"
"""Top-level keys of the trained parameters."""

LAYERS = "layers"
"""Where a model's parameters hold those of its layers."""

BATCH_AXES = ("data", "fsdp")
"""The axes of the trainer's mesh that rows are split over."""

PRNGKey = Key[Array, ""]
RowKeys = Key[Array, "B"]


@runtime_checkable
class Model(Protocol):
    """A language model as pure functions; hashable, so static under `jax.jit`."""

    @property
    def config(self) -> Any:
        """A frozen dataclass with at least `vocab_size`."""
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

        With a cache, position p writes slot p and sees the slots up to p. A position
        at or beyond the cache's length writes nothing.
        """
        ...

    def head_params(self, params: Params) -> Params:
        """The part of `params` that `unembed` reads."""
        ...

    def unembed(
        self, head: Params, hidden: Float[Array, "*B D"]
    ) -> Float[Array, "*B V"]:
        """Logits of the next token.

        A matrix in `head` is multiplied by `mgsr_jax.losses.project`, once: in training
        what stands in its place is no array, and can be projected and cast alone.
        """
        ...

    def init_cache(self, batch: int, length: int, dtype: Any) -> Cache:
        """An empty cache of `length` slots a row."""
        ...

    def decode_params(self, params: Params, dtype: Any) -> Params:
        """A copy for decoding: cast, one subtree a layer instead of a stack."""
        ...
