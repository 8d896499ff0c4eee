"""dspark: train, calibrate, plan and serve DSpark speculative decoding, losslessly."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspark.common.errors import UserError
    from dspark.common.grammar import Grammar
    from dspark.common.sampling_params import SamplingParams
    from dspark.engine.engine import Engine
    from dspark.engine.llm import LLM

__all__ = ["LLM", "Engine", "Grammar", "SamplingParams", "UserError"]

_HOMES = {
    "Engine": "dspark.engine.engine",
    "Grammar": "dspark.common.grammar",
    "LLM": "dspark.engine.llm",
    "SamplingParams": "dspark.common.sampling_params",
    "UserError": "dspark.common.errors",
}


def __getattr__(name: str) -> Any:
    """The names most people need, imported when first asked for: torch takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dspark' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
