"""DAC-KL's clip network: it predicts the limits of the clipping at each position."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mgsr_jax.losses._gelu import gelu
from mgsr_jax.typing import Params, PRNGKey

# The limits before training, and the ends of the ranges that the network can reach.
LOWER_START, UPPER_START = 0.1, 0.98
LOWER_MAX, UPPER_MIN = 0.5, 0.5


def init_clip_network(
    key: PRNGKey, *, num_candidates: int = 512, hidden: int = 128
) -> Params:
    """Parameters of the network that predicts DAC-KL's limits.

    An MLP `2 num_candidates -> hidden -> 2` with GELU. The last layer starts with zero
    weights, and with biases that give the limits (0.1, 0.98) at every position.

    MGSR, arXiv 2407.10068, token-level loss (there f_sub). Train the network with its
    own settings: learning rate 1e-3, no weight decay.

    Args:
      key: a typed key (`jax.random.key`).
      num_candidates: K, the number of the teacher's classes that are candidates.
      hidden: width of the hidden layer.

    Returns:
      A dict of float32 arrays; every other function reads K from their shapes.

    Raises:
      ValueError: `num_candidates` or `hidden` is below 1.

    >>> params = init_clip_network(jax.random.key(0), num_candidates=8, hidden=4)
    >>> jax.tree.map(jnp.shape, params)["hidden"]
    {'bias': (4,), 'kernel': (16, 4)}
    """
    if num_candidates < 1 or hidden < 1:
        raise ValueError(
            f"clip network with num_candidates={num_candidates}, hidden={hidden}; "
            "expected sizes of at least 1"
        )
    start = jnp.array([LOWER_START / LOWER_MAX, (1 - UPPER_START) / (1 - UPPER_MIN)])
    kernel = jax.nn.initializers.lecun_normal()(key, (2 * num_candidates, hidden))
    return {
        "hidden": {"kernel": kernel, "bias": jnp.zeros(hidden)},
        "output": {
            "kernel": jnp.zeros((hidden, 2)),
            "bias": jnp.log(start) - jnp.log1p(-start),
        },
    }


def network_candidates(clip_params: Params) -> int:
    """K, the number of candidates that the network was made for."""
    return clip_params["hidden"]["kernel"].shape[0] // 2


def predict_limits(
    clip_params: Params, p: Float[Array, "*B K"], q: Float[Array, "*B K"]
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """f_sub: lower in (0, 0.5) and upper in (0.5, 1) from both distributions.

    No gradient flows to `p` and `q`. With fewer classes than the network was
    made for, the missing inputs are 0.
    """
    kernel = clip_params["hidden"]["kernel"].astype(jnp.float32)
    p_and_q = jnp.stack([p, q], -2)
    mean_square = jnp.mean(jnp.square(p_and_q), axis=(-2, -1), keepdims=True)
    z = lax.stop_gradient(p_and_q * lax.rsqrt(mean_square))
    missing = kernel.shape[0] // 2 - z.shape[-1]
    z = jnp.pad(z, [(0, 0)] * (z.ndim - 1) + [(0, missing)])
    z = z.reshape(*z.shape[:-2], kernel.shape[0])
    z = gelu(_dense(clip_params["hidden"], z))
    a, b = jnp.moveaxis(jax.nn.sigmoid(_dense(clip_params["output"], z)), -1, 0)
    return LOWER_MAX * a, 1.0 - (1.0 - UPPER_MIN) * b


def _dense(layer: Params, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
    kernel, bias = (layer[name].astype(jnp.float32) for name in ("kernel", "bias"))
    out = jnp.matmul(x, kernel, precision=lax.Precision.HIGHEST)
    return out + jnp.broadcast_to(bias, out.shape)


def at_bound(
    lower: Float[Array, "*B"], upper: Float[Array, "*B"], margin: float = 0.005
) -> Float[Array, "*B"]:
    """1 where a limit is within `margin` of an end of its range, elsewhere 0.

    The ranges are (0, 0.5) for `lower` and (0.5, 1) for `upper`.
    """
    near_low = (lower < margin) | (lower > 0.5 - margin)
    near_high = (upper < 0.5 + margin) | (upper > 1 - margin)
    return (near_low | near_high).astype(jnp.float32)
