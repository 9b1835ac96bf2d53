"""Names of machines."""

import pytest

from mgsr_jax.planning import machines


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
