"""The first layers of a causal LM as a causal LM of their own: every module is shared, none is copied."""

from __future__ import annotations

import copy

from torch import nn
from transformers import PreTrainedModel

from dspark.common.errors import UserError
from dspark.models.taps import decoder_of


def truncated(model: PreTrainedModel, layers: int, norm: nn.Module) -> PreTrainedModel:
    """`model` with its first `layers` layers and another last norm, then its own LM head.

    Only the modules on the way to the decoder are new, each a shallow copy; `model` itself is not changed. Raises
    UserError where the decoder's last norm is not called `norm`.
    """
    decoder = decoder_of(model)
    if not isinstance(getattr(decoder, "norm", None), nn.Module):
        raise UserError(f"{type(decoder).__name__} has no last `norm` to exit through; use another kind of drafter")
    path = next(name for name, module in model.named_modules() if module is decoder)
    root = inner = shallow(model)
    for name in path.split(".") if path else ():
        inner._modules[name] = shallow(getattr(inner, name))
        inner = getattr(inner, name)
    inner._modules["layers"] = nn.ModuleList(list(decoder.layers)[:layers])
    inner._modules["norm"] = norm
    return root


def shallow(module: nn.Module) -> nn.Module:
    """A module of its own around the same children, parameters and buffers."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin
