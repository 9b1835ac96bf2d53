"""The most that a device can do, by kind of machine; vendors' figures, never measured.

TPUs: docs.cloud.google.com/tpu/docs, the pages v4, v5e, v5p-training, v6e and tpu7x.
Links are half of the bidirectional ICI bandwidth per chip there; v4's, v5p's int8 rate
and v4's network (2.5e10 bytes/s a host) are from jax-ml.github.io/scaling-book/tpus. v2
and v3: Jouppi et al., Communications of the ACM 63(7), 2020, table 3.
GPUs: NVIDIA's H100 and H200 data sheets, SXM, without sparsity; float32 products run in
TF32. Links are half of NVLink's 900 GB/s; hosts are joined as in NVIDIA's DGX H100, by
400 Gbit/s a GPU.
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Speed:
    """The most that a device can do.

    Attributes:
      flops: dtype of a product's operands (`bf16`, `f32`, `s8`) -> FLOP/s. Another
        dtype has the largest of them.
      memory: bytes per second from and to the main memory, together.
      within: bytes per second that it sends within its slice or host.
      across: bytes per second that it sends to other slices or hosts.
      devices_per_chip: devices that share one chip, of whose figures each has a part.
    """

    flops: Mapping[str, float]
    memory: float
    within: float
    across: float
    devices_per_chip: int = 1


def _tpu(
    bf16: int, s8: int, memory: int, ici: int, network: int, devices: int = 1
) -> Speed:
    """A TPU's device, from its chip's figures in Tera, Giga and Gbit per second.

    A product of float32 arrays takes one pass in bfloat16 by default.
    """
    flops = {"bf16": bf16 * 1e12, "f32": bf16 * 1e12, "s8": s8 * 1e12}
    return Speed(
        {dtype: rate / devices for dtype, rate in flops.items()},
        memory * 1e9 / devices,
        ici * 1e9 / devices,
        network / 8 * 1e9 / devices,
        devices,
    )


_HOPPER = {"bf16": 989.4e12, "f32": 494.7e12, "s8": 1978.9e12}

SPEEDS: Mapping[str, Speed] = {
    "v2": _tpu(46, 46, 700, 248, 50, devices=2),
    "v3": _tpu(123, 123, 900, 328, 50, devices=2),
    "v4": _tpu(275, 275, 1200, 270, 50),
    "v5e": _tpu(197, 393, 819, 200, 25),
    "v5p": _tpu(459, 918, 2765, 600, 50),
    "v6e": _tpu(918, 1836, 1638, 400, 100),
    # float8's rate; the page has none for int8.
    "tpu7x": _tpu(2307, 4614, 7380, 600, 100, devices=2),
    "h100": Speed(_HOPPER, 3352e9, 450e9, 50e9),
    "h200": Speed(_HOPPER, 4800e9, 450e9, 50e9),
}
"""Kind of machine -> its devices' speed."""
