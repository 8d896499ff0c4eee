"""Libraries that only some commands need, imported when they are, or named in one line with the way to get them."""

from __future__ import annotations

import importlib
from typing import Any

from dspark.common.errors import UserError


def require(module: str, extra: str) -> Any:
    """The module. Raises UserError naming the extra of this package that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise UserError(f"this needs {name}, which is not installed; pip install 'dspark[{extra}]'") from error
