"""What the tests of the losses share."""

import jaxtyping
import pytest


@pytest.fixture
def without_type_checks():
    """As users call it: the rig's checks would speak before the package's errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
