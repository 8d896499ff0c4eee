"""Which of the formats in use a drafter's config.json is in, and the way from each to the native one and back.

deepspec     the native one: the target's text config, flat, and the drafter's own fields
speculators  what vLLM documents: the layer's config inside, taps counted from the embedding
zlab         z-lab's DFlash and SpecForge: flat, with a `dflash_config`; no embedding, no LM head
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from dspark.common.errors import UserError
from dspark.drafters import speculators, zlab
from dspark.drafters.config import DrafterConfig

Raw = Mapping[str, Any]


class Format(NamedTuple):
    """How one format is read and written."""

    recognised: Callable[[Raw], bool]
    native: Callable[[Raw, str], dict[str, Any]]  # config.json and where it is from → the native config
    tensors: Callable[[dict[str, Tensor], DrafterConfig], dict[str, Tensor]]  # those stored → the native ones
    config: Callable[[DrafterConfig], dict[str, Any]]  # the format's config.json
    frozen: bool  # whether the target's embedding and LM head lie in the file


FORMATS = {
    "speculators": Format(
        speculators.recognised, speculators.native, speculators.native_tensors, speculators.written, frozen=True
    ),
    "zlab": Format(zlab.recognised, zlab.native, lambda tensors, config: tensors, zlab.written, frozen=False),
    "deepspec": Format(
        lambda raw: True,
        lambda raw, origin: dict(raw),
        lambda tensors, config: tensors,
        lambda config: dict(config.raw),
        frozen=True,
    ),
}
"""In the order in which they are tried: anything that is no other format's is the native one's."""


def format_of(raw: Raw) -> str:
    """The name of the format a config.json is in."""
    return next(name for name, one in FORMATS.items() if one.recognised(raw))


def native(raw: Raw, origin: str) -> dict[str, Any]:
    """A config of any format as the native one. Raises UserError for what this package cannot run as it was meant."""
    return FORMATS[format_of(raw)].native(raw, origin)


def named(name: str) -> Format:
    """A format by name. Raises UserError for an unknown one."""
    if name not in FORMATS:
        raise UserError(f"format {name!r} is not known; use {', '.join(sorted(FORMATS))}")
    return FORMATS[name]
