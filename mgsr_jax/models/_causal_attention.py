"""Causal attention over whole rows, by one of three implementations.

"xla" runs everywhere; "cudnn" is NVIDIA's kernel for 16-bit floats; "flash" is JAX's
Pallas kernel for TPUs. The two kernels never store all attention weights. The user
names the implementation: JAX, when it chooses, silently falls back to "xla".
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from mgsr_jax.sharding import AXES
from mgsr_jax.typing import BATCH_AXES

Kind = Literal["xla", "cudnn", "flash"]

_TILE = 128  # positions; a block of the kernel is a multiple of this
_LARGEST_BLOCK = 512


def causal_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    kind: Kind,
) -> Float[Array, "B T N H"]:
    """softmax(q k / sqrt(H)) v; a position sees itself and earlier positions."""
    if kind != "flash":
        return jax.nn.dot_product_attention(
            q_BTNH, k_BTKH, v_BTKH, is_causal=True, implementation=kind
        )
    groups = q_BTNH.shape[2] // k_BTKH.shape[2]
    k_BTNH, v_BTNH = (jnp.repeat(x, groups, axis=2) for x in (k_BTKH, v_BTKH))
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and set(mesh.axis_types) == {AxisType.Auto}:
        # XLA cannot split a kernel, so each device runs it on its own rows and heads.
        # Without check_vma, gradients need a sum over each axis that replicates an
        # argument. None does: every axis splits every argument.
        spec = P(BATCH_AXES, None, "tensor")
        run = jax.shard_map(
            _flash,
            in_specs=(spec,) * 3,
            out_specs=spec,
            axis_names=set(AXES),
            check_vma=False,
        )
    else:
        run = _flash
    return run(q_BTNH, k_BTNH, v_BTNH)


def _flash(q: Array, k: Array, v: Array) -> Array:
    """Attention on one device, with rows padded to whole tiles.

    Padding comes after all positions, so that causal attention never sees it.
    """
    from jax.experimental.pallas.ops.tpu.flash_attention import (
        BlockSizes,
        flash_attention,
    )

    length, scale = q.shape[1], q.shape[-1] ** -0.5
    padded = -(-length // _TILE) * _TILE
    block = next(n for n in range(_LARGEST_BLOCK, 0, -_TILE) if padded % n == 0)
    # Blocks of the forward pass (of one row each), of dk and dv, and of dq.
    sizes = BlockSizes(block, block, block, 1, *(block,) * 4, *(block,) * 3)

    def by_head(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0)))
        return x.swapaxes(1, 2)

    run = functools.partial(
        flash_attention, causal=True, sm_scale=scale, block_sizes=sizes
    )
    return run(*map(by_head, (q, k, v))).swapaxes(1, 2)[:, :length]
