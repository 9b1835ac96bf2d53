"""Names of machines."""

import types

import pytest

from mgsr_jax.planning import machines
from mgsr_jax.planning.hlo import ArrayType
from mgsr_jax.planning.speeds import SPEEDS


@pytest.mark.parametrize(
    "name", ["v5p", "h200", "h200:8", "v9z:2x2", "V5P:2x2x1", "h200:1x8", ""]
)
def test_a_name_of_no_machine_is_refused(name):
    with pytest.raises(ValueError, match="expected KIND:SHAPE such as v5p:4x4x4"):
        machines.describe(name)


@pytest.mark.parametrize(("name", "slices"), [("v5p:2x2x1", 0), ("h200:1x1x8", 2)])
def test_an_impossible_number_of_slices_is_refused(name, slices):
    with pytest.raises(ValueError, match=f"slices={slices}; expected"):
        machines.describe(name, slices=slices)


def test_every_kind_of_machine_has_its_speed():
    assert SPEEDS.keys() == machines._TPUS.keys() | machines._GPUS.keys()
    for kind, speed in SPEEDS.items():
        assert speed.flops["s8"] >= speed.flops["bf16"] >= speed.flops["f32"] > 0, kind
        assert speed.memory > speed.within > speed.across > 0, kind


def test_slow_links_are_between_tpu_slices_and_between_gpu_hosts():
    def device(platform, **where):
        return types.SimpleNamespace(platform=platform, **where)

    tpus = [device("tpu", slice_index=i // 2, process_index=i) for i in range(4)]
    assert machines.domains(tpus) == (0, 0, 1, 1)
    assert machines.domains([device("tpu", process_index=i) for i in (0, 1)]) == (0, 0)
    gpus = [device("gpu", slice_index=0, process_index=i // 2) for i in range(4)]
    assert machines.domains(gpus) == (0, 0, 1, 1)


def test_a_tpu_has_faster_memories_and_hosts_are_no_device():
    def spaces(platform):
        in_memory = machines.in_memory(types.SimpleNamespace(platform=platform))
        return [space for space in range(6) if in_memory(ArrayType("f32", (), space))]

    assert spaces("tpu") == [0]
    assert spaces("gpu") == [0, 1, 2, 3, 4]
