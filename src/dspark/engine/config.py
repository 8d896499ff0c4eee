"""What an engine may use: pages, requests at once, tokens per step."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields

import torch

from dspark.common.errors import UserError
from dspark.models.target import Target

CPU_POOL_BYTES = 1 << 30
WORTH_COMPILING = 1 << 20  # parameters; a smaller model runs faster than its graph compiles
CUDA_POOL_SHARE = 0.7  # of the memory free after the weights are loaded


@dataclass(frozen=True)
class EngineConfig:
    """Limits of one engine; `pages` None takes what `max_running` full contexts need, as far as memory reaches."""

    page_size: int = 16
    pages: int | None = None
    max_running: int = 64  # requests that hold pages at the same time
    max_step_tokens: int = 512  # rows of one target forward: anchors, drafts and prefill together
    max_draft: int | None = None  # drafted tokens per round; None is the drafter's block size
    prefix_caching: bool = True
    compile: bool = True  # forwards of models past WORTH_COMPILING, in the background; eager until they are ready
    seed: int | None = None  # makes the seeds of requests that bring none reproducible

    def __post_init__(self) -> None:
        for name in ("page_size", "max_running", "max_step_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} is below 1; pass 1 or more")
        if self.pages is not None and self.pages < 2:
            raise UserError(f"pages {self.pages} leave none beside the scratch page; pass 2 or more")
        if self.max_draft is not None and self.max_draft < 0:
            raise UserError(f"max_draft {self.max_draft} is below 0; pass 0 to draft nothing")

    @staticmethod
    def of(**options: object) -> EngineConfig:
        """A config from keyword options. Raises UserError for an unknown one, naming the nearest that exists."""
        known = [field.name for field in fields(EngineConfig)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]}?" if near else f"the options are {', '.join(known)}"
                raise UserError(f"engine option {name!r} is not known; {hint}")
        return EngineConfig(**options)  # type: ignore[arg-type]

    def pages_for(self, target: Target) -> int:
        """How many pages the pool gets, the scratch page included."""
        if self.pages is not None:
            return self.pages
        wanted = self.max_running * -(-target.context_limit // self.page_size)
        numbers = sum(heads * (key + value) for heads, key, value in target.kv_shapes)
        page_bytes = numbers * self.page_size * torch.empty(0, dtype=target.dtype).element_size()
        if target.device.type == "cuda":
            budget = int(torch.cuda.mem_get_info(target.device)[0] * CUDA_POOL_SHARE)
        else:
            budget = CPU_POOL_BYTES
        one_context = -(-target.context_limit // self.page_size)
        return 1 + max(min(wanted, budget // page_bytes), min(one_context, 2 * budget // page_bytes), 1)
