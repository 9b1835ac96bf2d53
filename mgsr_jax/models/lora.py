"""LoRA (Hu et al., arXiv 2106.09685): two low-rank matrices next to a frozen kernel.

  y = x W + alpha / rank * (dropout(x) a) b

Adapters are nested dicts like the parameters of the layers, and stacked over layers
too: {"attention": {"query": {"a": [L, in, rank], "b": [L, rank, out]}}, ...}. A model's
parameters hold them under "lora". The Flax modules have no code for adapters: `attach`
adds them to the modules of one layer while that layer is traced.
"""

import dataclasses
import operator
import re
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from mgsr_jax import settings
from mgsr_jax.sharding import Rules, path_name
from mgsr_jax.typing import LAYERS, Params, PRNGKey, RowKeys

LORA = "lora"
"""Key of the adapters in a model's parameters."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on a student whose own weights are frozen.

    Attributes:
      rank: rank of the adapters; 0: no adapters, all weights are trained.
      alpha: an adapter's output is multiplied by alpha / rank.
      dropout: share of an adapter's inputs that are dropped in training.
      targets: regex that is searched in the path of each kernel of a layer, such as
        "attention/query" or "mlp/up"; kernels whose path matches get an adapter.
    """

    rank: int = 0
    alpha: float = 64.0
    dropout: float = 0.0
    targets: str = "attention/(query|value)$"

    def check(self) -> None:
        """Refuse values that do not work, or that rank 0 would not read.

        Raises:
          ValueError: names the field, its value and the values that are allowed.
        """
        settings.check_positive(self, "alpha", section="lora.")
        settings.check_not_negative(self, "rank", section="lora.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout must be in [0, 1), got {self.dropout}")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(
                f"lora.targets={self.targets!r} is not a regular expression ({error}); "
                "expected one such as attention/(query|value)$"
            ) from error
        if self.rank == 0 and self != LoraConfig():
            raise ValueError(
                f"lora.rank=0 trains all weights and reads no other setting of {self}; "
                "set lora.rank, or leave lora out"
            )

    @property
    def scale(self) -> float:
        """Factor of the product of a and b."""
        return self.alpha / self.rank


@runtime_checkable
class HasParams(Protocol):
    """A model, as far as adapters need it."""

    def abstract_params(self) -> Params:
        """Shapes and dtypes of the parameters."""
        ...


def targeted(model: HasParams, config: LoraConfig) -> dict[str, tuple[int, int, int]]:
    """Shapes [L, in, out] of the kernels that get an adapter, by path.

    Raises:
      ValueError: no kernel matches; lists all kernels.
    """
    leaves = jax.tree_util.tree_leaves_with_path(model.abstract_params()[LAYERS])
    kernels = {}
    for key_path, leaf in leaves:
        path = path_name(key_path)
        if path.endswith("/kernel"):
            kernels[path.removesuffix("/kernel")] = leaf.shape
    targets = {
        path: shape
        for path, shape in sorted(kernels.items())
        if re.search(config.targets, path)
    }
    if not targets:
        raise ValueError(
            f"lora.targets={config.targets!r} matches no kernel of a layer; "
            f"the kernels are {', '.join(sorted(kernels))}"
        )
    return targets


def init(key: PRNGKey, model: HasParams, config: LoraConfig) -> Params:
    """New float32 adapters: b is 0, so that they add nothing yet.

    a ~ U(-1 / sqrt(in), 1 / sqrt(in)) as in peft: Kaiming's uniform with slope sqrt(5).

    Raises:
      ValueError: a field of `config` has a value that does not work, or its `targets`
        match no kernel of the model; lists all kernels.
    """
    config.check()
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
    """Each adapter {"a", "b"} by the path of its kernel, sorted by path."""
    flat = {}
    for name, node in adapters.items():
        if node.keys() == {"a", "b"}:
            flat[name] = node
        else:
            flat |= {f"{name}/{path}": leaf for path, leaf in by_path(node).items()}
    return dict(sorted(flat.items()))


def merge(params: Params, adapters: Params, config: LoraConfig) -> Params:
    """A model's parameters with the adapters added to its kernels.

    The new kernel is W + alpha / rank * a b, float32 whatever W's dtype is.
    """
    return {**params, LAYERS: merge_layers(params[LAYERS], adapters, config)}


def merged(params: Params, config: LoraConfig) -> Params:
    """`params` with the adapters that they hold merged into the kernels and removed.

    Returns the parameters unchanged if they hold no adapters.
    """
    own = {name: tree for name, tree in params.items() if name != LORA}
    return merge(own, params[LORA], config) if LORA in params else own


def merge_layers(layers: Params, adapters: Params, config: LoraConfig) -> Params:
    """`merge` for the parameters of stacked layers, or of one layer."""
    if adapters.keys() == {"a", "b"}:
        # The highest precision: an error made here would stay in the model.
        product = jnp.matmul(
            adapters["a"].astype(jnp.float32),
            adapters["b"].astype(jnp.float32),
            precision=lax.Precision.HIGHEST,
        )
        kernel = layers["kernel"].astype(jnp.float32) + config.scale * product
        return {**layers, "kernel": kernel}
    return layers | {
        name: merge_layers(layers[name], node, config)
        for name, node in adapters.items()
    }


def partition_rules(rules: Rules, adapters: Params) -> tuple[tuple[str, P], ...]:
    """Rules for adapters, derived from the rules of the model.

    a is split like the kernel's inputs, b like its outputs. The rank is never split.

    Raises:
      ValueError: a kernel that no row of `rules` matches.
    """
    rows = []
    for path in by_path(adapters):
        kernel = f"{LAYERS}/{path}/kernel"
        specs = [spec for pattern, spec in rules if re.search(pattern, kernel)]
        if not specs:
            raise ValueError(f"no partition rule matches {kernel!r}; add one")
        _, axis_in, axis_out = (*specs[0], None, None, None)[:3]
        rows.append((f"{re.escape(path)}/a$", P(None, axis_in, None)))
        rows.append((f"{re.escape(path)}/b$", P(None, None, axis_out)))
    return tuple(rows)


def attach(
    block: object, adapters: Params, config: LoraConfig, keys: RowKeys | None
) -> None:
    """Add the adapters of one layer to the linear modules of its block, in place.

    Args:
      block: the layer's module.
      adapters: adapters of this layer, without the leading L.
      config: their settings.
      keys: dropout keys of this layer, one per row; None: no dropout. [B]
    """
    for i, (path, adapter) in enumerate(by_path(adapters).items()):
        linear = operator.attrgetter(path.replace("/", "."))(block)
        kernel_keys = None
        if keys is not None and config.dropout:
            kernel_keys = jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(keys)
        linear.dot_general = _with_adapter(
            linear.dot_general, adapter, config, kernel_keys
        )


def _with_adapter(
    dot_general: Callable[..., Array],
    adapter: Params,
    config: LoraConfig,
    keys: RowKeys | None,
) -> Callable[..., Array]:
    """A `dot_general` that adds the adapter's output."""

    def product(x: Array, kernel: Array, *args: Any, **kwargs: Any) -> Array:
        kept = x if keys is None else _dropout(x, keys, config.dropout)
        a, b = adapter["a"], config.scale * adapter["b"]
        low_rank = jnp.matmul(kept, a.astype(x.dtype))
        added = _recomputed_product(low_rank, b.astype(x.dtype))
        return dot_general(x, kernel, *args, **kwargs) + added

    return product


def _recomputed_product(
    x: Float[Array, "B T R"], kernel: Float[Array, "R O"]
) -> Float[Array, "B T O"]:
    """x @ kernel with a batch axis of size 1, so that the backward pass recomputes it.

    The checkpoint policy keeps products without a batch axis. This product is cheap,
    and keeping it would take as much memory as the output of the kernel itself.
    """
    dimensions = (((3,), (1,)), ((0,), (0,)))
    return lax.dot_general(x[None], kernel[None], dimensions)[0]


def _dropout(
    x: Float[Array, "B T I"], keys: RowKeys, rate: float
) -> Float[Array, "B T I"]:
    """Set values to zero with probability `rate`, by row, and scale up the others."""
    shape = x.shape[1:]
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, shape))(keys)
    return jnp.where(kept, x / (1 - rate), jnp.zeros((), x.dtype))
