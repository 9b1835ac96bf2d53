"""The import of another trainer, or one clear line that it is not installed."""

import importlib
from typing import Any


def peer(module: str, *, install: str) -> Any:
    """Import `module`, a part of a package that mgsr_jax does not depend on.

    Args:
      module: full name of the module.
      install: the command that installs it, for the error message.

    Raises:
      ImportError: it cannot be imported.

    >>> peer("no_such_trainer", install="pip install no-such-trainer")
    Traceback (most recent call last):
    ImportError: cannot import no_such_trainer (No module named 'no_such_trainer'); \
pip install no-such-trainer
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"cannot import {module} ({error}); {install}") from error
