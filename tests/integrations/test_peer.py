"""The package without any trainer, and what an adapter says where its own is not."""

import importlib
import subprocess
import sys

import pytest

from mgsr_jax.integrations._peer import peer


def test_what_adapters_share_needs_nothing_but_jax():
    # `None` in sys.modules is a package that cannot be imported.
    program = """
import sys
for name in ("flax", "optax", "orbax", "tunix", "qwix", "maxtext", "transformers"):
    sys.modules[name] = None
import mgsr_jax.losses
assert "mgsr_jax.integrations" not in sys.modules
from mgsr_jax.integrations import mgsr_loss
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize(
    "adapter, missing, error",
    [
        (
            "tunix",
            "tunix",
            r"cannot import tunix\.distillation \(.*\); "
            r"pip install 'mgsr_jax\[tunix\]'",
        ),
        (
            "maxtext",
            "maxtext",
            r"cannot import maxtext\.trainers\.post_train\.distillation\."
            r"distillation_utils \(.*\); maxtext needs .*: pip install maxtext",
        ),
        (
            "maxtext",
            "flax",
            r"the adapters need flax and optax \(.*\): both come with .*",
        ),
    ],
)
def test_a_missing_trainer_is_one_line(adapter, missing, error, monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] == missing or name.startswith("mgsr_jax.integrations."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError) as raised:
        importlib.import_module(f"mgsr_jax.integrations.{adapter}")
    assert raised.match(f"^{error}$")
    assert "\n" not in str(raised.value)


def test_a_module_that_is_there_is_imported():
    assert peer("importlib.metadata", install="") is importlib.import_module(
        "importlib.metadata"
    )
