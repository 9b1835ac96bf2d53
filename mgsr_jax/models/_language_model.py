"""Flax modules as pure functions on plain nested dicts of parameters."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from mgsr_jax import sharding
from mgsr_jax.losses import project
from mgsr_jax.models import lora
from mgsr_jax.models._architecture import Architecture, Block, EmbedAndNorm
from mgsr_jax.models._cache import (
    NewKeysAndValues,
    Visibility,
    write_layers,
)
from mgsr_jax.models._causal_attention import Kind
from mgsr_jax.models._layers import (
    LayerInputs,
    LayerStack,
    RunLayer,
    checkpointed,
    run_layers,
    transposed,
)
from mgsr_jax.models._model_config import ModelConfig
from mgsr_jax.models._placement import Placement, decoder_rules, fitted
from mgsr_jax.models.lora import LORA, LoraConfig
from mgsr_jax.models.quantized import dequantized
from mgsr_jax.typing import LAYERS, Cache, Params, PRNGKey, RowKeys

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A causal language model as pure functions; hashable, static under `jax.jit`.

    Attributes:
      config: the family's config.
      architecture: the family's modules and tables.
      remat: recompute all of a layer in the backward pass, its products too.
      vocab_rows: rows of the embedding and the head, which may be padded beyond the
        config's vocab_size; None: vocab_size rows.
      tensor: number of parts that heads, MLPs and the vocabulary are split into.
      lora: settings of the adapters that parameters may hold under "lora".
      attention: implementation that reads whole rows; see `causal_attention`.
      split_decoder: whether `decode_params` are split over fsdp and tensor; else over
        tensor, and fsdp replicates them. Caches are split to match.
    """

    config: ModelConfig
    architecture: Architecture
    remat: bool = False
    vocab_rows: int | None = None
    tensor: int = 1
    lora: LoraConfig = LoraConfig()
    attention: Kind = "xla"
    split_decoder: bool = False

    def __post_init__(self) -> None:
        heads = self.config.num_heads
        if heads % self.tensor:
            fits = [n for n in range(1, heads + 1) if heads % n == 0]
            raise ValueError(
                f"{heads} attention heads do not divide over mesh.tensor={self.tensor};"
                f" use one of {fits}"
            )

    @functools.cached_property
    def _graphs(self) -> tuple[nnx.GraphDef, nnx.GraphDef]:
        """Module structure of embeddings and norm, and of one layer."""

        def graph(module: Callable[..., nnx.Module]) -> nnx.GraphDef:
            return nnx.split(
                nnx.eval_shape(lambda: module(self._padded_config, rngs=nnx.Rngs(0)))
            )[0]

        return graph(self.architecture.embed_and_norm), graph(self.architecture.block)

    def init(self, key: PRNGKey) -> Params:
        """Random float32 parameters; those of the layers have a leading axis L."""
        own_key, layers_key = jax.random.split(key)

        def layer(key: PRNGKey) -> Params:
            return _arrays(self.architecture.block(self.config, rngs=nnx.Rngs(key)))

        rngs = nnx.Rngs(own_key)
        embed_and_norm = self.architecture.embed_and_norm(
            self._padded_config, rngs=rngs
        )
        keys = jax.random.split(layers_key, self.config.num_layers)
        return {**_arrays(embed_and_norm), LAYERS: jax.vmap(layer)(keys)}

    def abstract_params(self) -> Params:
        """Shapes and dtypes of what `init` returns."""
        return jax.eval_shape(self.init, jax.random.key(0))

    @property
    def partition_rules(self) -> tuple[tuple[str, P], ...]:
        """Ordered (regex, PartitionSpec) rows over the axes data, fsdp and tensor.

        If the key and value heads do not divide over the tensor axis, it replicates
        them.
        """
        rules = self.architecture.partition_rules(self.config)
        if self.config.num_kv_heads % self.tensor == 0:
            return rules
        return ((r"attention/(key|value)/kernel$", P(None, "fsdp")), *rules)

    @property
    def _padded_config(self) -> ModelConfig:
        rows = self.vocab_rows or self.config.vocab_size
        return dataclasses.replace(self.config, vocab_size=rows)

    def forward(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        dropout_keys: RowKeys | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Hidden states after the final norm; attention is causal in `positions`.

        With a cache, position p writes slot p and sees the slots up to p; a position
        at or beyond the cache's length writes nothing.

        Args:
          params: as `init` or `decode_params` return them.
          tokens: token ids.
          positions: positions of the tokens; None: 0, 1, ... in every row.
          cache: keys and values of earlier tokens. Without `positions` its contents
            are not read.
          dropout_keys: one key per row for the dropout of adapters; None: no dropout.

        Raises:
          ValueError: a row, or the cache, is longer than the model's position limit;
            `params` holds adapters and the model has no settings for them.
        """
        length = tokens.shape[1] if cache is None else cache[0][0].shape[2]
        self._check_length(length)
        adapters = self._adapters(params)
        slots = None if cache is None else length
        visibility = Visibility.of(tokens, positions, slots, self._windows(length))
        decodes = isinstance(params[LAYERS], tuple)  # from `decode_params`
        placement = self._placement(decodes=decodes)
        # Once, so that no layer exchanges what it computes from positions.
        tokens, positions = placement.place_rows((tokens, positions))
        gathered = sharding.gathered(self.partition_rules)
        rules = self._decode_rules if decodes else gathered
        embed_and_norm: EmbedAndNorm = nnx.merge(
            self._graphs[0], _constrained(_without_layers(params), rules)
        )
        x_BTD = placement.place_rows(
            embed_and_norm.embed_tokens(tokens, visibility.positions)
        )
        run_layer = self._run_layer(visibility, placement, dropout_keys)
        run = checkpointed(run_layer, remat=self.remat)
        # A cache that is filled from its start holds nothing to read yet.
        to_read = None if positions is None else cache
        x_BTD, new = run_layers(
            run,
            x_BTD,
            LayerStack(params[LAYERS], adapters, visibility.windows, to_read),
            numbered=dropout_keys is not None,
            keep_new=cache is not None,
        )
        if cache is not None:
            cache = write_layers(cache, new, positions, placement)
        return placement.place_rows(embed_and_norm.apply_final_norm(x_BTD)), cache

    def _run_layer(
        self,
        visibility: Visibility,
        placement: Placement,
        dropout_keys: RowKeys | None,
    ) -> RunLayer:
        """A function that computes one layer from its own parameters."""

        def run(
            x_BTD: Float[Array, "B T D"], inputs: LayerInputs
        ) -> tuple[Float[Array, "B T D"], NewKeysAndValues]:
            block: Block = nnx.merge(
                self._graphs[1], dequantized(inputs.params, x_BTD.dtype)
            )
            block.attention.kind = self.attention
            block.attention.placement = placement
            keys = _layer_keys(dropout_keys, inputs.number)
            lora.attach(block, inputs.adapters, self.lora, keys)
            mask = visibility.mask(inputs.window)
            x_BTD, new = block(x_BTD, visibility.positions, mask, inputs.cache)
            return placement.place_rows(x_BTD), new

        return run

    def head_params(self, params: Params) -> Params:
        """The part of `params` that `unembed` reads: the embedding if it is tied."""
        return params["embed" if self.config.tie_word_embeddings else "head"]

    def unembed(
        self, head: Params, hidden: Float[Array, "*B D"]
    ) -> Float[Array, "*B V"]:
        """Logits of the next token, float32 whatever the dtype of the arguments is.

        In bfloat16 the largest logits would tie, and half of the divergence between two
        close models would be rounding.
        """
        return project(hidden, head["embedding"])

    def init_cache(self, batch: int, length: int, dtype: DTypeLike) -> Cache:
        """An empty cache: keys and values for each layer, both [B, K, S, H].

        On a mesh they are split as `Placement` says.

        Raises:
          ValueError: `length` exceeds the model's position limit.
        """
        self._check_length(length)
        shape = (batch, self.config.num_kv_heads, length, self.config.head_dim)
        return self._placement(decodes=True).place_cache(
            tuple(
                (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
                for _ in range(self.config.num_layers)
            )
        )

    def place_decoding(
        self, per_row: Tree, hidden: Float[Array, "B S D"]
    ) -> tuple[Tree, Float[Array, "B S D"]]:
        """Split the arrays that a decoding loop carries as its products need them.

        Args:
          per_row: arrays whose first axis is rows.
          hidden: hidden states of the tokens read so far.
        """
        placement = self._placement(decodes=True)
        return placement.place_rows(per_row), placement.place_columns(hidden)

    def decode_params(self, params: Params, dtype: DTypeLike) -> Params:
        """A copy for decoding in `dtype`, with a tuple of one subtree per layer.

        Matrices of the layers are [out, in], as `kernel_first` reads them. Adapters are
        merged into the kernels. On a mesh the copy is split as `split_decoder` says; no
        token waits for an all-gather of weights.
        """
        adapters = self._adapters(params)

        def copy(x: Array) -> Array:
            # Copy even if the dtype is the same: the trainer donates the originals.
            return jnp.array(x, dtype, copy=True)

        def layer(i: int) -> Params:
            layer_params = jax.tree.map(lambda x: x[i], params[LAYERS])
            layer_adapters = jax.tree.map(lambda x: x[i], adapters)
            # One layer at a time: merged kernels are float32 until they are cast.
            merged = lora.merge_layers(layer_params, layer_adapters, self.lora)
            copied = {LAYERS: jax.tree.map(copy, merged)}
            return transposed(_constrained(copied, self._decode_rules)[LAYERS])

        own = jax.tree.map(copy, _without_layers(params))
        embed_and_norm = _constrained(own, self._decode_rules)
        layers = tuple(layer(i) for i in range(self.config.num_layers))
        return {**embed_and_norm, LAYERS: layers}

    def decode_specs(self, params: Params) -> PyTree:
        """Specs of the decoder's copy on the ambient mesh, with layers still stacked.

        Args:
          params: all parameters or a part of them, or their shapes.
        """
        specs = sharding.partition_specs(self._decode_rules, params, strict=False)
        return fitted(specs, params)

    @property
    def _decode_rules(self) -> sharding.Rules:
        if self.split_decoder:
            return decoder_rules(self.partition_rules, self.config.num_kv_heads)
        return sharding.gathered(self.partition_rules)

    def _placement(self, *, decodes: bool) -> Placement:
        kv_heads = self.config.num_kv_heads
        split = self.split_decoder
        return Placement.of(split=split, decodes=decodes, kv_heads=kv_heads)

    def _adapters(self, params: Params) -> Params:
        """Adapters that `params` holds; {} if there are none."""
        adapters = params.get(LORA, {})
        if adapters and not self.lora.rank:
            raise ValueError(
                "params hold adapters, but the model's lora.rank is 0; set the model's "
                "lora field to their settings, or merge them"
            )
        return adapters

    def _windows(self, length: int) -> tuple[int, ...] | None:
        """Window of each layer; None if no window is shorter than a row."""
        windows = self.config.windows
        if windows is None or all(w is None or w >= length for w in windows):
            return None
        return tuple(length if w is None else w for w in windows)

    def _check_length(self, length: int) -> None:
        if length > self.config.max_length:
            raise ValueError(
                f"a row has {length} positions, the model's limit is "
                f"{self.config.max_length}; use shorter rows (max_length)"
            )


def _arrays(module: nnx.Module) -> Params:
    return nnx.to_pure_dict(nnx.split(module)[1])


def _without_layers(params: Params) -> Params:
    """Parameters of the model's `EmbedAndNorm`."""
    return {k: tree for k, tree in params.items() if k not in (LAYERS, LORA)}


def _constrained(params: Params, rules: sharding.Rules) -> Params:
    """`params` on the ambient mesh; they hold one layer or none."""
    specs = sharding.partition_specs(rules, params, strict=False)
    if LAYERS in params:  # one layer has no leading axis L
        specs = jax.tree.map(lambda spec: P(*spec[1:]), specs, is_leaf=_is_spec)
    return sharding.constrain(params, fitted(specs, params))


def _is_spec(x: object) -> bool:
    return isinstance(x, P)


def _layer_keys(
    keys: RowKeys | None, number: Int[Array, ""] | int | None
) -> RowKeys | None:
    """Keys of the rows in one layer."""
    if keys is None or number is None:
        return None
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
