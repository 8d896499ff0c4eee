"""Makes an engine out of names: target, drafter, tokenizer and the tokens that end a text."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dspark.common.errors import UserError
from dspark.drafters.base import Drafter
from dspark.drafters.ngram import NoDraft
from dspark.drafters.registry import has_tokenizer, load_drafter
from dspark.drafters.signal import Signal
from dspark.engine.config import EngineConfig
from dspark.engine.pricing import plan_with
from dspark.engine.profile import Profile
from dspark.engine.step import EngineCore
from dspark.models.loading import eos_token_ids, load_tokenizer
from dspark.models.target import Target
from dspark.speculation.calibration import FILE as CALIBRATION_FILE
from dspark.speculation.calibration import Calibration
from dspark.speculation.planner import DEFAULT, Planner


def build_engine(
    target: str | Path | Target,
    drafter: str | Path | Drafter | None = "auto",
    planner: str | Planner = DEFAULT,
    *,
    device: str = "auto",
    dtype: str = "auto",
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    profile: Profile | str | Path | None = None,
    calibration: Calibration | str | Path | None = None,
    **options: object,
) -> EngineCore:
    """An engine for a model directory or hub id (or a Target); `options` are those of EngineConfig.

    Planners that weigh costs take them from `profile`, else from the one kept for this engine, else they are measured.
    `calibration` None is the one beside the drafter, where there is one. Raises UserError where one does not belong.

    `drafter` "auto" is the directory `drafter` inside the target's, where there is one, else none: an engine is
    never slower than plain decoding because of a drafter that nobody chose.
    """
    config = EngineConfig.of(**options)
    if not isinstance(target, Target):
        target = Target.load(target, dtype=dtype, device=device)
    source = str(getattr(target.model.config, "name_or_path", "") or getattr(target.model, "name_or_path", "") or "")
    if tokenizer is None:
        tokenizer = find_tokenizer(source)
    elif isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    if drafter == "auto":
        beside = Path(source, "drafter") if source else None
        drafter = beside if beside is not None and (beside / "config.json").is_file() else None
    if isinstance(drafter, str | Path):
        drafter = load_drafter(drafter, target)
    core = EngineCore(
        target,
        drafter or NoDraft(target.vocab_size),
        "none" if isinstance(planner, str) else planner,
        tokenizer=tokenizer,
        config=config,
        eos_token_ids=eos_token_ids(getattr(target.model, "generation_config", None), target.config, tokenizer),
    )
    calibration = calibration or calibration_of(core.drafter)
    if isinstance(calibration, str | Path):
        path, calibration = calibration, Calibration.load(calibration)
        calibration.check(core.drafter.block_size, path)
    if calibration is not None and calibration.signal is not None and hasattr(core.drafter, "signal"):
        core.drafter.signal = Signal(*calibration.signal)
    if isinstance(planner, str):
        plan_with(core, planner, profile, calibration)
    return core


def calibration_of(drafter: Drafter) -> Path | None:
    """The calibration in the directory that a drafter was loaded from; None where there is none."""
    directory = getattr(drafter, "directory", None)
    path = Path(directory, CALIBRATION_FILE) if directory is not None else None
    return path if path is not None and path.is_file() else None


def find_tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model directory or hub id, None where it has none."""
    if not source:
        return None
    if Path(source).is_dir():
        return load_tokenizer(source) if has_tokenizer(Path(source)) else None
    try:
        return load_tokenizer(source)
    except UserError:
        return None
