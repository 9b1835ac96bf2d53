"""The seam between Flax modules and pure functions on plain nested dicts."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mgsr_jax import sharding
from mgsr_jax.losses import project
from mgsr_jax.models import lora
from mgsr_jax.models._attention import attention_mask, place_cache, write_cache
from mgsr_jax.models._causal_attention import Kind
from mgsr_jax.models.lora import LORA, LoraConfig
from mgsr_jax.models.quantized import dequantized
from mgsr_jax.typing import BATCH_AXES, LAYERS, Cache, Params, PRNGKey, RowKeys

# For the backward pass: what a product of weights gave. Norms, activations and the
# attention's weights cost little to compute again, and most of the memory to keep.
KEPT = jax.checkpoint_policies.dots_with_no_batch_dims_saveable


@dataclasses.dataclass(frozen=True)
class KeyRow:
    """One parameter of ours and where a Hugging Face file keeps it.

    Attributes:
      path: '/'-joined path in our params; under 'layers/' it is stacked over layers.
      name: tensor name without the base prefix; {} stands for the layer.
      transposed: the file holds [out, in].
      part, parts: ours is this part of the file's tensor, split along its last axis.
    """

    path: str
    name: str
    transposed: bool = False
    part: int = 0
    parts: int = 1


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a family brings: two Flax modules and the tables beside them.

    Attributes:
      ends: module with `begin(tokens, positions)` and `finish(x)` around the layers.
      block: module of one layer, (x, positions, mask, cache) -> (x, cache).
      key_rows: config -> rows between our params and a Hugging Face file.
      partition_rules: config -> ordered (regex, PartitionSpec) rows.
      prefixes: base prefixes of tensor names; the first is written.
      ignored: regexes of buffers that are no parameters (searched without prefix).
    """

    ends: Callable[..., Any]
    block: Callable[..., Any]
    key_rows: Callable[[Any], tuple[KeyRow, ...]]
    partition_rules: Callable[[Any], tuple[tuple[str, P], ...]]
    prefixes: tuple[str, ...]
    ignored: tuple[str, ...]


def _arrays(module: nnx.Module) -> Params:
    return nnx.to_pure_dict(nnx.split(module)[1])


def _ends_of(params: Params) -> Params:
    return {k: tree for k, tree in params.items() if k not in (LAYERS, LORA)}


def _is_spec(x: Any) -> bool:
    return isinstance(x, P)


def _transposed(layer: Params) -> Params:
    """The matrices of one layer between [in, out] and decoding's [out, in]."""
    return jax.tree.map(lambda x: x.T if x.ndim == 2 else x, layer)


def _written(cache: Cache, new: Any, positions: Any) -> Cache:
    """`cache` with keys and values of `positions`, by default the first."""

    def write(old: Array, new: Array) -> Array:
        if positions is None:
            return old.at[:, :, : new.shape[2]].set(new.astype(old.dtype))
        return write_cache(old, new, positions)

    return jax.tree.map(write, cache, tuple(new))


def _folded(keys: RowKeys | None, layer: Any) -> RowKeys | None:
    """Keys of rows in one layer."""
    if keys is None:
        return None
    return jax.vmap(lambda key: jax.random.fold_in(key, layer))(keys)


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A causal language model as pure functions; hashable, static under `jax.jit`.

    Attributes:
      config: the family's frozen config.
      architecture: the family's modules and tables.
      remat: recompute a layer whole in the backward pass, its products too.
      vocab_rows: of the embedding and the head, which may be padded beyond the
        config's vocab_size; None is that.
      tensor: parts that heads, MLPs and the vocabulary are split into.
      lora: settings of the adapters that parameters may hold under "lora".
      attention: what computes it where a row is read whole; see `causal_attention`.
    """

    config: Any
    architecture: Architecture
    remat: bool = False
    vocab_rows: int | None = None
    tensor: int = 1
    lora: LoraConfig = LoraConfig()
    attention: Kind = "xla"

    def __post_init__(self) -> None:
        heads = self.config.num_heads
        if heads % self.tensor:
            fits = [n for n in range(1, heads + 1) if heads % n == 0]
            raise ValueError(
                f"{heads} attention heads do not divide over mesh.tensor={self.tensor};"
                f" use one of {fits}"
            )

    @functools.cached_property
    def _graphs(self) -> tuple[Any, Any]:
        """Module structure of the two ends and of one layer."""

        def graph(module: Callable[..., Any]) -> Any:
            return nnx.split(
                nnx.eval_shape(lambda: module(self._padded_config, rngs=nnx.Rngs(0)))
            )[0]

        return graph(self.architecture.ends), graph(self.architecture.block)

    def init(self, key: PRNGKey) -> Params:
        """Random float32 parameters; those of the layers have a leading axis L."""
        ends_key, layers_key = jax.random.split(key)

        def layer(key: PRNGKey) -> Params:
            return _arrays(self.architecture.block(self.config, rngs=nnx.Rngs(key)))

        ends = self.architecture.ends(self._padded_config, rngs=nnx.Rngs(ends_key))
        keys = jax.random.split(layers_key, self.config.num_layers)
        return {**_arrays(ends), LAYERS: jax.vmap(layer)(keys)}

    def abstract_params(self) -> Params:
        """Shapes and dtypes of `init`, without computing it."""
        return jax.eval_shape(self.init, jax.random.key(0))

    @property
    def partition_rules(self) -> tuple[tuple[str, P], ...]:
        """Ordered (regex, PartitionSpec) rows over the axes data, fsdp and tensor.

        Key and value heads that do not divide over the tensor axis are on all of it.
        """
        rules = self.architecture.partition_rules(self.config)
        if self._splits_kv_heads:
            return rules
        return ((r"attention/(key|value)/kernel$", P(None, "fsdp")), *rules)

    @property
    def _splits_kv_heads(self) -> bool:
        return self.config.num_kv_heads % self.tensor == 0

    @property
    def _padded_config(self) -> Any:
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
        at or beyond the cache's length writes nothing. `dropout_keys`, one a row, are
        for the adapters in training; without them nothing is left out.

        Raises:
          ValueError: a row, or the cache, is longer than the model's position limit;
            `params` holds adapters and the model has no settings for them.
        """
        length = tokens.shape[1] if cache is None else cache[0][0].shape[2]
        self._check_length(length)
        adapters = self._adapters(params)
        slots = None if cache is None else length
        where = _Where.of(tokens, positions, slots, self._windows(length))
        ends_graph, block_graph = self._graphs
        ends = nnx.merge(ends_graph, self._gathered(_ends_of(params)))
        rows = P(BATCH_AXES)
        x_BTD = sharding.constrain(ends.begin(tokens, where.positions), rows)

        def layer(
            x: Any, i: Any, of_layer: Any, adapters: Any, window: Any, layer_cache: Any
        ) -> Any:
            block = nnx.merge(block_graph, dequantized(of_layer, x.dtype))
            block.attention.kind = self.attention
            lora.attach(block, adapters, self.lora, _folded(dropout_keys, i))
            x, layer_cache = block(x, where.positions, where.mask(window), layer_cache)
            return sharding.constrain(x, rows), layer_cache

        kept = None if self.remat else KEPT
        layer = jax.checkpoint(layer, prevent_cse=False, policy=kept)
        layers = params[LAYERS]
        # A cache that is filled from its start has nothing yet to be read.
        read = None if positions is None else cache
        if isinstance(layers, dict):

            def scanned(x: Any, xs: Any) -> Any:
                x, new = layer(x, *xs)
                return x, None if cache is None else new

            caches = read and jax.tree.map(lambda *c: jnp.stack(c), *read)
            layer_count = self.config.num_layers
            numbers = None if dropout_keys is None else jnp.arange(layer_count)
            xs = (numbers, layers, adapters, where.windows, caches)
            x_BTD, new = jax.lax.scan(scanned, x_BTD, xs)
            new = () if cache is None else zip(*new, strict=True)
        else:
            new = []
            for i in range(self.config.num_layers):
                window = None if where.windows is None else where.windows[i]
                layer_cache = None if read is None else read[i]
                of_adapters = jax.tree.map(lambda x, i=i: x[i], adapters)
                of_layer = _transposed(layers[i])
                x_BTD, of_tokens = layer(
                    x_BTD, i, of_layer, of_adapters, window, layer_cache
                )
                new.append(of_tokens)
        if cache is not None:
            cache = place_cache(_written(cache, new, positions))
        return ends.finish(x_BTD), cache

    def head_params(self, params: Params) -> Params:
        """The part of `params` that `unembed` reads; the embedding where tied."""
        return params["embed" if self.config.tie_word_embeddings else "head"]

    def unembed(
        self, head: Params, hidden: Float[Array, "*B D"]
    ) -> Float[Array, "*B V"]:
        """Logits of the next token, float32 whatever the arguments are.

        Rounded to bfloat16 they would tie near the top, and a divergence of two close
        models would be half rounding.
        """
        return project(hidden, head["embedding"])

    def init_cache(self, batch: int, length: int, dtype: Any) -> Cache:
        """An empty cache: for every layer keys and values, each [B, K, S, H].

        On a mesh rows are split, and heads over the tensor axis where they divide.

        Raises:
          ValueError: `length` is beyond the model's position limit.
        """
        self._check_length(length)
        shape = (batch, self.config.num_kv_heads, length, self.config.head_dim)
        return place_cache(
            tuple(
                (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
                for _ in range(self.config.num_layers)
            )
        )

    def decode_params(self, params: Params, dtype: Any) -> Params:
        """A copy for decoding: cast, a tuple with one subtree a layer for the stack.

        Matrices of the layers are [out, in], as `kernel_first` reads them. Adapters are
        merged into them. On a mesh the copy is split over the tensor axis alone: no
        token waits for weights.
        """
        adapters = self._adapters(params)

        def copy(x: Array) -> Array:
            # Even where the dtype stays: the trainer donates the originals.
            return jnp.array(x, dtype, copy=True)

        def layer(i: int) -> Params:
            own = jax.tree.map(lambda x: x[i], params[LAYERS])
            of_adapters = jax.tree.map(lambda x: x[i], adapters)
            # One at a time: merged kernels are float32 until they are cast.
            merged = lora.merge_layers(own, of_adapters, self.lora)
            whole = self._gathered({LAYERS: jax.tree.map(copy, merged)})
            return _transposed(whole[LAYERS])

        ends = self._gathered(jax.tree.map(copy, _ends_of(params)))
        layers = tuple(layer(i) for i in range(self.config.num_layers))
        return {**ends, LAYERS: layers}

    def _gathered(self, params: Params) -> Params:
        """The ends of `params`, or one layer, whole over the fsdp axis."""
        rules = sharding.gathered(self.partition_rules)
        specs = sharding.partition_specs(rules, params, strict=False)
        if LAYERS in params:  # without the leading axis of the stack
            specs = jax.tree.map(lambda spec: P(*spec[1:]), specs, is_leaf=_is_spec)
        return sharding.constrain(params, specs)

    def _adapters(self, params: Params) -> Params:
        """Those that `params` holds; none is an empty dict."""
        adapters = params.get(LORA, {})
        if adapters and not self.lora.rank:
            raise ValueError(
                "params hold adapters and the model's lora.rank is 0; set its field "
                "lora to their settings, or merge them"
            )
        return adapters

    def _windows(self, length: int) -> tuple[int, ...] | None:
        """Window of every layer, None where none is shorter than a row."""
        windows = self.config.windows
        if windows is None or all(w is None or w >= length for w in windows):
            return None
        return tuple(length if w is None else w for w in windows)

    def _check_length(self, length: int) -> None:
        if length > self.config.max_length:
            raise ValueError(
                f"a row of {length} positions is beyond the model's limit of "
                f"{self.config.max_length}; use shorter rows"
            )


@dataclasses.dataclass(frozen=True)
class _Where:
    """Positions of queries and keys; what every layer's mask is made of."""

    positions: Int[Array, "#B T"]
    key_positions: Int[Array, "#B S"] | None  # None: plainly causal
    windows: Int[Array, "L"] | None

    @classmethod
    def of(
        cls, tokens: Any, positions: Any, slots: int | None, windows: Any
    ) -> "_Where":
        keys = positions
        if positions is None:
            # One row for all: the mask needs no copy for each row of the batch.
            positions = jnp.arange(tokens.shape[1])[None]
        elif slots is not None:
            keys = jnp.arange(slots)[None]
        if windows is not None:
            keys, windows = positions if keys is None else keys, jnp.asarray(windows)
        return cls(positions, keys, windows)

    def mask(self, window: Any) -> Any:
        if self.key_positions is None:
            return None
        return attention_mask(self.positions, self.key_positions, window)
