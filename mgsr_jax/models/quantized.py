"""A frozen model's kernels in int8, which take half of bfloat16's memory.

  W[i, o] ~ scale[o] q[i, o],   scale[o] = max_i |W[i, o]| / 127.5,   q in -128 ... 127

Each output channel of each layer has a scale. Only the weights decide it: no
calibration data is needed. When a layer is computed, its kernels are converted back to
the dtype of the hidden states. Embeddings, heads, norms and biases are not quantised.
The quantised arrays are those of the package qwix.
"""

import importlib.util

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array

from mgsr_jax.typing import LAYERS, Leaf, Params


def check_installed() -> None:
    """Check that the extra for quantisation is installed.

    Raises:
      ImportError: it is not installed.
    """
    if importlib.util.find_spec("qwix") is None:
        raise ImportError(
            "int8 weights need qwix; install it with pip install 'mgsr_jax[int8]'"
        )


def quantize(path: str, weights: Leaf) -> Leaf:
    """A stack of kernels [L, I, O] in int8 with scales [L, 1, O].

    Returns any other parameter unchanged.

    Args:
      path: '/'-joined path of the parameter in its model.
      weights: floats on one device or a mesh, or a `jax.ShapeDtypeStruct` of them.
    """
    if not _is_kernel(path):
        return weights
    sharding = getattr(weights, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return jax.jit(_quantized)(weights)
    specs = (*sharding.spec, None, None, None)[:3]
    shapes = jax.eval_shape(_quantized, weights)
    # A scale has size 1 along the reduced axis, so that axis is not sharded.
    shardings = jax.tree.map(
        lambda x: NamedSharding(
            sharding.mesh,
            P(*(s if n > 1 else None for s, n in zip(specs, x.shape, strict=True))),
        ),
        shapes,
    )
    if isinstance(weights, jax.ShapeDtypeStruct):
        return jax.tree.map(lambda x, to: x.update(sharding=to), shapes, shardings)
    return jax.jit(_quantized, out_shardings=shardings)(weights)


def dequantized(layer: Params, dtype: DTypeLike) -> Params:
    """One layer's parameters, with the int8 kernels converted back to `dtype`."""

    def floats(leaf: Leaf) -> Leaf:
        if not _is_quantized(leaf):
            return leaf
        import qwix

        return qwix.dequantize(leaf).astype(dtype)

    return jax.tree.map(floats, layer, is_leaf=_is_quantized)


def _is_kernel(path: str) -> bool:
    return path.startswith(f"{LAYERS}/") and path.endswith("/kernel")


def _is_quantized(leaf: Leaf) -> bool:
    return hasattr(leaf, "qvalue")


def _quantized(weights: Array) -> Leaf:
    import qwix

    # In float32: a bfloat16 quotient would be rounded twice.
    return qwix.quantize(weights.astype(jnp.float32), jnp.int8, channelwise_axes=(0, 2))
