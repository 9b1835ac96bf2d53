"""Fixtures that several tests of the losses share."""

import jaxtyping
import pytest


@pytest.fixture
def without_type_checks():
    """Turn jaxtyping off, as for users: its checks would raise before the package's."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
