"""A frozen model's kernels in int8: half of bfloat16's memory.

  W[i, o] ~ scale[o] q[i, o],   scale[o] = max_i |W[i, o]| / 127.5,   q in -128 ... 127

A scale for each output channel of every layer, from the weights alone: no data is read
to choose it. Products are computed in the precision of the hidden states, with the
kernels of one layer at a time put back into it. Embeddings, heads, norms and biases
stay as they are. The arrays are qwix's.
"""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from mgsr_jax.typing import LAYERS, Leaf, Params


def check_installed() -> None:
    """Quantisation is an extra.

    Raises:
      ImportError: it is not installed.
    """
    if importlib.util.find_spec("qwix") is None:
        raise ImportError(
            "int8 weights need qwix; install it with pip install 'mgsr_jax[int8]'"
        )


def quantize(path: str, weights: Leaf) -> Leaf:
    """A stack of kernels [L, I, O] in int8 with scales [L, 1, O]; all else as it is.

    Args:
      path: '/'-joined, of the parameter in its model.
      weights: floats on one device or a mesh, or their shape there.
    """
    if not _is_kernel(path):
        return weights
    place = getattr(weights, "sharding", None)
    if not isinstance(place, NamedSharding):
        return jax.jit(_quantized)(weights)
    specs = (*place.spec, None, None, None)[:3]
    shapes = jax.eval_shape(_quantized, weights)
    # Along the axis that a scale is taken over there is one of them.
    places = jax.tree.map(
        lambda x: NamedSharding(
            place.mesh,
            P(*(s if n > 1 else None for s, n in zip(specs, x.shape, strict=True))),
        ),
        shapes,
    )
    if isinstance(weights, jax.ShapeDtypeStruct):
        return jax.tree.map(lambda x, to: x.update(sharding=to), shapes, places)
    return jax.jit(_quantized, out_shardings=places)(weights)


def dequantized(layer: Params, dtype: Any) -> Params:
    """One layer's parameters, those in int8 put back into `dtype`."""

    def whole(leaf: Any) -> Any:
        if not _is_quantized(leaf):
            return leaf
        import qwix

        return qwix.dequantize(leaf).astype(dtype)

    return jax.tree.map(whole, layer, is_leaf=_is_quantized)


def _is_kernel(path: str) -> bool:
    return path.startswith(f"{LAYERS}/") and path.endswith("/kernel")


def _is_quantized(leaf: Any) -> bool:
    return hasattr(leaf, "qvalue")


def _quantized(weights: Array) -> Leaf:
    import qwix

    # In float32: a bfloat16 quotient is rounded once more.
    return qwix.quantize(weights.astype(jnp.float32), jnp.int8, channelwise_axes=(0, 2))
