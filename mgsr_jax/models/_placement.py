"""The mesh axes that split a model's activations and its key/value cache.

Training moves weights to rows: rows are split over data and fsdp, and a layer's weights
are all-gathered over fsdp. A token of decoding has few rows, so there the rows move to
the weights: heads, MLPs and the vocabulary are split over fsdp and tensor, as the
tensor axis alone splits them in training, and every device sees the rows of its part of
the data axis. Source: the weight-stationary layouts of Pope et al. (arXiv 2211.05102).
"""

import dataclasses
import math
from typing import TypeVar

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PyTree

from mgsr_jax.sharding import Axes, Rules, axis_size, constrain
from mgsr_jax.typing import BATCH_AXES, Leaf, Params

DECODER_AXES = ("fsdp", "tensor")
"""Axes that heads, MLPs and the vocabulary of a split decoder are divided over."""

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class Placement:
    """Mesh axes of the arrays in a forward pass; without a mesh nothing is split.

    Attributes:
      rows: split the rows of hidden states.
      columns: split the columns of activations between two matrices of a layer.
      cached_rows: split the rows of the cache, and of what reads it.
      heads: split its heads, where their number divides.
    """

    rows: Axes = BATCH_AXES
    columns: Axes = "tensor"
    cached_rows: Axes = BATCH_AXES
    heads: Axes = "tensor"

    @classmethod
    def of(cls, *, split: bool, decodes: bool, kv_heads: int) -> "Placement":
        """The placement for weights as they are trained, or for the decoder's copy.

        Args:
          split: whether the decoder's copy is split over fsdp too.
          decodes: whether the weights are that copy.
          kv_heads: K. If fsdp x tensor does not divide it, the cache stays as in
            training: its rows are split over fsdp.
        """
        if not split:
            return cls()
        by_heads = divides(kv_heads, DECODER_AXES)
        cached = (("data",), DECODER_AXES) if by_heads else (BATCH_AXES, "tensor")
        if decodes:
            return cls(("data",), DECODER_AXES, *cached)
        return cls(BATCH_AXES, "tensor", *cached)

    def place_rows(self, tree: Tree) -> Tree:
        """Split hidden states, or another tree of arrays, by rows only."""
        return constrain(tree, P(self.rows))

    def place_columns(self, x_BTF: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
        """Split activations whose columns the next matrix sums over."""
        columns = self.columns if divides(x_BTF.shape[-1], self.columns) else None
        return constrain(x_BTF, P(self.rows, None, columns))

    def place_heads(self, x_BTNH: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        """Split queries, keys or values as the cache is split."""
        heads = self.heads if divides(x_BTNH.shape[2], self.heads) else None
        # Products with kernels that fsdp splits along D are sums over fsdp. Without
        # this XLA all-gathers the kernels where fsdp also splits the cache's rows.
        if self.cached_rows != self.rows and heads in (None, "tensor"):
            x_BTNH = constrain(x_BTNH, P(self.rows, None, heads))
        return self.place_cached(x_BTNH)

    def place_cached(self, x_BTNH: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        """Split the outputs of heads as the cache is split."""
        heads = self.heads if divides(x_BTNH.shape[2], self.heads) else None
        return constrain(x_BTNH, P(self.cached_rows, None, heads))

    def place_cache(self, cache: Tree) -> Tree:
        """Split keys and values of one or more layers."""

        def place(x: Float[Array, "B K S H"]) -> Float[Array, "B K S H"]:
            heads = self.heads if divides(x.shape[1], self.heads) else None
            return constrain(x, P(self.cached_rows, heads))

        return jax.tree.map(place, cache)


def decoder_rules(rules: Rules, kv_heads: int) -> Rules:
    """The rules of a model's weights as those of its split decoder.

    fsdp splits what tensor splits, and nothing else. If fsdp x tensor does not divide
    the key and value heads, a device has no whole ones: fsdp then splits the kernels of
    queries, keys and values along D, as in training.
    """

    def widened(axes: Axes) -> Axes:
        names = (axes,) if isinstance(axes, str) else axes or ()
        return DECODER_AXES if "tensor" in names else None

    split = tuple((pattern, P(*map(widened, spec))) for pattern, spec in rules)
    if divides(kv_heads, DECODER_AXES):
        return split
    kv = "tensor" if divides(kv_heads, "tensor") else None
    return (
        (r"attention/query/kernel$", P(None, "fsdp", "tensor")),
        (r"attention/(key|value)/kernel$", P(None, "fsdp", kv)),
        *split,
    )


def fitted(specs: PyTree, params: Params) -> PyTree:
    """Specs that split a dimension over tensor only, where fsdp does not divide it."""

    def fit(spec: P, leaf: Leaf) -> P:
        sizes = zip(spec, leaf.shape, strict=False)
        return P(
            *(
                "tensor" if axes == DECODER_AXES and not divides(size, axes) else axes
                for axes, size in sizes
            )
        )

    return jax.tree.map(fit, specs, params, is_leaf=lambda x: isinstance(x, P))


def divides(size: int, axes: Axes) -> bool:
    """Whether the ambient mesh divides `size` over `axes`."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return size % math.prod(map(axis_size, names)) == 0
