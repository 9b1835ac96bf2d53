"""Fixtures that several tests of the losses share."""

import jax
import jaxtyping
import pytest


@pytest.fixture
def without_type_checks():
    """Turn jaxtyping off, as for users: its checks would raise before the package's."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def quick_compiles():
    """Compile without LLVM's expensive passes, in about half the time.

    For modules that compare two of our own programs, or read a program's text. Values
    against the reference are computed as users get them.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
