"""`dspark export`: a drafter in the format that another engine or trainer reads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer


def export(
    drafter: Annotated[
        str | None, typer.Argument(help="Directory or hub id, of any format; default: the demo's.")
    ] = None,
    format: Annotated[
        str, typer.Option(help="speculators (vLLM), zlab (z-lab's DFlash, SpecForge), or deepspec, the native one.")
    ] = "speculators",
    out: Annotated[Path, typer.Option(help="A directory that does not exist yet.")] = Path("exported"),
    target: Annotated[
        str | None,
        typer.Option(help="The target it drafts for: named in the config, and lends embedding and LM head if need be."),
    ] = None,
) -> None:
    """Write a drafter in another format, its weights unchanged, and its calibration beside it."""
    from dspark.common.log import quiet_libraries
    from dspark.demo.pair import demo_drafter_path
    from dspark.drafters.export import export as copied
    from dspark.drafters.formats import named
    from dspark.drafters.registry import fetch
    from dspark.models.loading import load_causal_lm
    from dspark.speculation.calibration import FILE, SGLANG_FILE

    quiet_libraries()
    named(format)
    source = fetch(drafter or demo_drafter_path())
    model = load_causal_lm(target, device="cpu") if target is not None else None
    config = copied(source, out, format, model)
    for name in (FILE, SGLANG_FILE):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    typer.echo(f"wrote {out}: {config.kind}, γ {config.block_size}, taps {list(config.taps)}, in the {format} format")
