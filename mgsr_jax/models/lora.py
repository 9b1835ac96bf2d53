"""LoRA (Hu et al., arXiv 2106.09685): two thin matrices beside a kernel that stays.

  y = x W + alpha / rank * (dropout(x) a) b

Adapters are plain nested dicts like the parameters of the layers, stacked over them
too: {"attention": {"query": {"a": [L, in, rank], "b": [L, rank, out]}}, ...}. Beside
the model's own parameters they stand under "lora". The modules know nothing of them:
they are put beside the kernels of one layer at a time, while it is computed.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from mgsr_jax.typing import LAYERS, Params, PRNGKey, RowKeys

LORA = "lora"
"""Where a model's parameters hold its adapters."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on a student whose own weights stay as they are.

    Attributes:
      rank: of the adapters; 0: there are none, and all weights are trained.
      alpha: what an adapter adds is multiplied by alpha / rank.
      dropout: share of an adapter's inputs that are left out while training.
      targets: regex that is searched in the paths of a layer's kernels, such as
        "attention/query" or "mlp/up"; kernels that it is found in get an adapter.
    """

    rank: int = 0
    alpha: float = 64.0
    dropout: float = 0.0
    targets: str = "attention/(query|value)$"

    @property
    def scale(self) -> float:
        """What the product of a and b is multiplied by."""
        return self.alpha / self.rank


def targeted(model: Any, config: LoraConfig) -> dict[str, tuple[int, int, int]]:
    """Shapes [L, in, out] of the kernels that get an adapter, by their paths.

    Raises:
      ValueError: there is none; lists all kernels.
    """
    leaves = jax.tree_util.tree_leaves_with_path(model.abstract_params()[LAYERS])
    kernels = {}
    for key_path, leaf in leaves:
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        if path.endswith("/kernel"):
            kernels[path.removesuffix("/kernel")] = leaf.shape
    found = {
        path: shape
        for path, shape in sorted(kernels.items())
        if re.search(config.targets, path)
    }
    if not found:
        raise ValueError(
            f"lora.targets={config.targets!r} is found in no kernel of a layer; there "
            f"are {', '.join(sorted(kernels))}"
        )
    return found


def init(key: PRNGKey, model: Any, config: LoraConfig) -> Params:
    """Adapters that change nothing yet, float32: b is 0 and a is drawn as peft does.

    a ~ U(-1 / sqrt(in), 1 / sqrt(in)): Kaiming's uniform with a slope of sqrt(5).

    Raises:
      ValueError: `config.targets` is found in no kernel of the model; lists them all.
    """
    adapters: Params = {}
    for i, (path, shape) in enumerate(targeted(model, config).items()):
        layers, size_in, size_out = shape
        bound = size_in**-0.5
        *parents, name = path.split("/")
        node = adapters
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = {
            "a": jax.random.uniform(
                jax.random.fold_in(key, i),
                (layers, size_in, config.rank),
                minval=-bound,
                maxval=bound,
            ),
            "b": jnp.zeros((layers, config.rank, size_out)),
        }
    return adapters


def by_path(adapters: Params) -> dict[str, Params]:
    """Every adapter {"a", "b"} by its kernel's path, in the order of the paths."""
    found = {}
    for name, node in adapters.items():
        if node.keys() == {"a", "b"}:
            found[name] = node
        else:
            found |= {f"{name}/{path}": own for path, own in by_path(node).items()}
    return dict(sorted(found.items()))


def merge(params: Params, adapters: Params, config: LoraConfig) -> Params:
    """A model's parameters with the adapters added to its kernels.

    W + alpha / rank * a b, in float32 whatever the kernel was.
    """
    return {**params, LAYERS: merge_layers(params[LAYERS], adapters, config)}


def merged(params: Params, config: LoraConfig) -> Params:
    """`merge` with the adapters that `params` hold, if any; they are not in it then."""
    own = {name: tree for name, tree in params.items() if name != LORA}
    return merge(own, params[LORA], config) if LORA in params else own


def merge_layers(layers: Params, adapters: Params, config: LoraConfig) -> Params:
    """What `merge` does to the stack of layers; to one layer with its own adapters."""
    if adapters.keys() == {"a", "b"}:
        # The highest precision: what is merged once is read for good.
        product = jnp.matmul(
            adapters["a"].astype(jnp.float32),
            adapters["b"].astype(jnp.float32),
            precision=lax.Precision.HIGHEST,
        )
        kernel = layers["kernel"].astype(jnp.float32) + config.scale * product
        return {**layers, "kernel": kernel}
    return layers | {
        name: merge_layers(layers[name], own, config) for name, own in adapters.items()
    }


def partition_rules(
    rules: Sequence[tuple[str, P]], adapters: Params
) -> tuple[tuple[str, P], ...]:
    """Rows for adapters by those of the model: a and b lie as their kernel's sides do.

    The rank is never split.

    Raises:
      ValueError: a kernel that no row of `rules` matches.
    """
    rows = []
    for path in by_path(adapters):
        kernel = f"{LAYERS}/{path}/kernel"
        found = [spec for pattern, spec in rules if re.search(pattern, kernel)]
        if not found:
            raise ValueError(f"no partition rule matches {kernel!r}; add one")
        _, side_in, side_out = (*found[0], None, None, None)[:3]
        rows.append((f"{re.escape(path)}/a$", P(None, side_in, None)))
        rows.append((f"{re.escape(path)}/b$", P(None, None, side_out)))
    return tuple(rows)


def attach(
    block: Any, adapters: Params, config: LoraConfig, keys: RowKeys | None
) -> None:
    """Puts the adapters of one layer beside the kernels of its module.

    Args:
      block: the layer's module; its targeted `nnx.Linear` are changed in place.
      adapters: the layer's own, without the leading L.
      keys: of dropout in this layer, one a row; None leaves nothing out. [B]
    """
    for i, (path, adapter) in enumerate(by_path(adapters).items()):
        linear = block
        for name in path.split("/"):
            linear = getattr(linear, name)
        own = None
        if keys is not None and config.dropout:
            own = jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(keys)
        linear.dot_general = _with_adapter(linear.dot_general, adapter, config, own)


def _with_adapter(
    dot_general: Callable[..., Array],
    adapter: Params,
    config: LoraConfig,
    keys: RowKeys | None,
) -> Callable[..., Array]:
    def product(x: Array, kernel: Array, *args: Any, **kwargs: Any) -> Array:
        kept = x if keys is None else _dropout(x, keys, config.dropout)
        a, b = adapter["a"], config.scale * adapter["b"]
        added = _product_again(jnp.matmul(kept, a.astype(x.dtype)), b.astype(x.dtype))
        return dot_general(x, kernel, *args, **kwargs) + added

    return product


def _product_again(
    x: Float[Array, "B T R"], kernel: Float[Array, "R O"]
) -> Float[Array, "B T O"]:
    """x @ kernel, with a batch axis of one.

    For the backward pass products without such an axis are kept: this one costs little
    to compute again, and would be a second array of the size of the layer's own.
    """
    dimensions = (((3,), (1,)), ((0,), (0,)))
    return lax.dot_general(x[None], kernel[None], dimensions)[0]


def _dropout(
    x: Float[Array, "B T I"], keys: RowKeys, rate: float
) -> Float[Array, "B T I"]:
    """Zeros at the rate given, the rest scaled up; what a row loses is its key's."""
    shape = x.shape[1:]
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, shape))(keys)
    return jnp.where(kept, x / (1 - rate), jnp.zeros((), x.dtype))
