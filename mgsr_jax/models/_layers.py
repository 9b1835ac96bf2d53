"""The stack of layers: a scan over stacked parameters, or a loop over one subtree each.

Training scans, which compiles one layer. Decoding loops: its copy of the parameters
has a subtree per layer.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mgsr_jax.models._cache import LayerCache, NewKeysAndValues
from mgsr_jax.typing import Cache, Params

# The backward pass keeps the products with weights. It recomputes norms, activations
# and attention weights, which are cheap to compute and take most of the memory.
PRODUCTS_KEPT = jax.checkpoint_policies.dots_with_no_batch_dims_saveable


class LayerInputs(NamedTuple):
    """Inputs of one layer besides the hidden states; in a scan, stacked over layers.

    Attributes:
      number: number of the layer; None in a scan that needs none.
      params: the layer's parameters.
      adapters: the layer's adapters; {} if there are none.
      window: sliding window of the layer; None if no layer has one.
      cache: earlier keys and values; None if there are none to read.
    """

    number: Int[Array, "..."] | int | None
    params: Params
    adapters: Params
    window: Int[Array, "..."] | None
    cache: LayerCache | None


RunLayer = Callable[
    [Float[Array, "B T D"], LayerInputs],
    tuple[Float[Array, "B T D"], NewKeysAndValues],
]
"""(hidden states, inputs) -> (hidden states, keys and values of the tokens read)."""


def checkpointed(run: RunLayer, *, remat: bool) -> RunLayer:
    """`run` for a backward pass that recomputes what `PRODUCTS_KEPT` does not keep.

    With `remat` it recomputes everything.
    """
    policy = None if remat else PRODUCTS_KEPT
    return jax.checkpoint(run, prevent_cse=False, policy=policy)


@dataclasses.dataclass(frozen=True)
class LayerStack:
    """Inputs of all layers besides the hidden states.

    Attributes:
      params: a dict with leaves [L, ...], or a tuple with one subtree per layer, whose
        matrices are [out, in].
      adapters: a dict with leaves [L, ...]; {} if there are none.
      windows: sliding window of each layer; None if no layer has one. [L]
      cache: one entry per layer; None if there is none to read.
    """

    params: Params | tuple[Params, ...]
    adapters: Params
    windows: Int[Array, "L"] | None
    cache: Cache | None


def run_layers(
    run: RunLayer,
    x_BTD: Float[Array, "B T D"],
    stack: LayerStack,
    *,
    numbered: bool,
    keep_new: bool,
) -> tuple[Float[Array, "B T D"], Iterable[NewKeysAndValues]]:
    """Hidden states after the last layer, and the new keys and values of each layer.

    Args:
      run: computes one layer.
      x_BTD: hidden states before the first layer.
      stack: inputs of all layers.
      numbered: whether `run` reads the number of its layer.
      keep_new: whether a scan returns the new keys and values; else there are none.
    """
    if isinstance(stack.params, tuple):
        return _loop(run, x_BTD, _unstacked(stack.params, stack))

    def step(
        x_BTD: Float[Array, "B T D"], inputs: LayerInputs
    ) -> tuple[Float[Array, "B T D"], NewKeysAndValues | None]:
        x_BTD, new = run(x_BTD, inputs)
        return x_BTD, new if keep_new else None

    cache = stack.cache and jax.tree.map(lambda *x: jnp.stack(x), *stack.cache)
    layers = len(jax.tree.leaves(stack.params)[0])
    numbers = jnp.arange(layers) if numbered else None
    inputs = LayerInputs(numbers, stack.params, stack.adapters, stack.windows, cache)
    x_BTD, new = jax.lax.scan(step, x_BTD, inputs)
    return x_BTD, () if new is None else zip(*new, strict=True)


def _loop(
    run: RunLayer, x_BTD: Float[Array, "B T D"], layers: Iterable[LayerInputs]
) -> tuple[Float[Array, "B T D"], Iterable[NewKeysAndValues]]:
    kept = []
    for inputs in layers:
        x_BTD, new = run(x_BTD, inputs)
        kept.append(new)
    return x_BTD, kept


def _unstacked(layers: tuple[Params, ...], stack: LayerStack) -> Iterator[LayerInputs]:
    for i, params in enumerate(layers):
        window = None if stack.windows is None else stack.windows[i]
        cache = None if stack.cache is None else stack.cache[i]
        adapters = jax.tree.map(lambda x, i=i: x[i], stack.adapters)
        yield LayerInputs(i, transposed(params), adapters, window, cache)


def transposed(layer: Params) -> Params:
    """Transpose a layer's matrices: [in, out] to decoding's [out, in], or back."""
    return jax.tree.map(lambda x: x.T if x.ndim == 2 else x, layer)
