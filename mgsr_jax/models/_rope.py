"""Rotary position embeddings.

Suffixes are the dimension letters of `mgsr_jax.typing`.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mgsr_jax.models._model_config import HfConfig, require_supported


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al., arXiv 2104.09864), with Llama 3's scaling.

    Attributes:
      theta: base of the wavelengths.
      kind: "default", "linear" or "llama3".
      factor: factor by which long wavelengths are stretched.
      low_freq_factor, high_freq_factor: llama3 only; the stretch grows from none to
        all of `factor` between these numbers of turns.
      original_length: llama3 only; the position limit before the stretch.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    @classmethod
    def from_hf(cls, hf: HfConfig) -> "Rope":
        """Read `rope_parameters`, or the older `rope_theta` and `rope_scaling`.

        Raises:
          ValueError: another rope type, or one that rotates only a part of the head.
        """
        values = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
        values = {"rope_theta": hf.get("rope_theta", 10000.0), **values}
        values["rope_type"] = values.get("rope_type", values.get("type", "default"))
        values.setdefault("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))
        values["model_type"] = hf.get("model_type")
        require_supported(
            values,
            rope_type=("default", "linear", "llama3"),
            partial_rotary_factor=(1.0, None),
        )
        kind, theta = values["rope_type"], float(values["rope_theta"])
        if kind == "default":
            return cls(theta)
        if kind == "linear":
            return cls(theta, kind, float(values["factor"]))
        return cls(
            theta,
            kind,
            float(values["factor"]),
            float(values["low_freq_factor"]),
            float(values["high_freq_factor"]),
            int(
                values.get("original_max_position_embeddings")
                or hf["max_position_embeddings"]
            ),
        )

    def to_hf(self) -> dict[str, object]:
        """Both spellings: only transformers 5 reads `rope_parameters`."""
        scaling: dict[str, object] = {"rope_type": self.kind}
        if self.kind != "default":
            scaling["factor"] = self.factor
        if self.kind == "llama3":
            scaling["low_freq_factor"] = self.low_freq_factor
            scaling["high_freq_factor"] = self.high_freq_factor
            scaling["original_max_position_embeddings"] = self.original_length
        return {
            "rope_theta": self.theta,
            "rope_scaling": None if self.kind == "default" else scaling,
            "rope_parameters": {"rope_theta": self.theta, **scaling},
        }

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per position, float32 [head_dim / 2]."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        inverse = (1.0 / np.float32(self.theta) ** exponents).astype(np.float32)
        if self.kind == "linear":
            return inverse / np.float32(self.factor)
        if self.kind == "llama3":
            wavelengths = 2 * math.pi / inverse
            turns = self.original_length / wavelengths
            low, high = self.low_freq_factor, self.high_freq_factor
            kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
            inverse = (1 - kept) * inverse / self.factor + kept * inverse
        return inverse.astype(np.float32)

    def rotate(
        self, x_BTNH: Float[Array, "B T N H"], positions: Int[Array, "#B T"]
    ) -> Float[Array, "B T N H"]:
        """Rotate the pairs (i, i + H/2) by position times frequency, in float32."""
        inverse = jnp.asarray(self.inverse_frequencies(x_BTNH.shape[-1]))
        angles = positions[..., None, None].astype(jnp.float32) * inverse.reshape(
            1, 1, 1, -1
        )
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
        turned = [first * cos - second * sin, second * cos + first * sin]
        return jnp.concatenate(turned, axis=-1).astype(x_BTNH.dtype)
