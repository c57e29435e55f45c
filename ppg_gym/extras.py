"""Optional packages: imported when they are needed; where one is missing, the error has its install command."""

from __future__ import annotations

import importlib
from types import ModuleType


def need(module: str, extra: str) -> ModuleType:
    """Return a module of an optional extra.

    Raises:
        ModuleNotFoundError: It is not installed; the message holds the install command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or module).partition(".")[0]
        message = f'{package} is not installed; run: pip install "ppg-gym[{extra}]"'
        raise ModuleNotFoundError(message, name=package) from error
