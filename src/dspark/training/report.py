"""Where a run's numbers go: the log on disk, the terminal, TensorBoard, Weights & Biases; and run.json beside them."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dspark.common.errors import UserError
from dspark.common.extras import require
from dspark.common.files import replacing_file
from dspark.common.provenance import provenance
from dspark.training.checkpoint import LOG
from dspark.training.config import TrainConfig, as_plain
from dspark.training.sharding import Ranks

RUN = "run.json"
Line = dict[str, Any]


class Sink(Protocol):
    """Takes every line of the log, which has `step` and, where it is one, `evaluation`."""

    def line(self, line: Line) -> None: ...


class Report:
    """Everything a run tells. Ranks but the first tell nothing."""

    def __init__(self, sinks: list[Sink], progress: Bar | None) -> None:
        self.sinks, self.progress = sinks, progress

    def line(self, step: int, values: Line) -> None:
        """One line of the log."""
        values = {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}
        for sink in self.sinks:
            sink.line({"step": step, "time": time.strftime("%H:%M:%S"), **values})

    def advance(self, step: int) -> None:
        """A step was done; reads nothing from the device."""
        if self.progress is not None:
            self.progress.advance(step)


@contextmanager
def reporting(config: TrainConfig, out: Path, ranks: Ranks, *, begin: int, steps: int) -> Iterator[Report]:
    """A report that is closed at the end. `begin` is the step a continued run begins after."""
    if not ranks.first:
        yield Report([], None)
        return
    with ExitStack() as stack:
        bar = Bar(begin, steps)
        stack.callback(bar.close)
        sinks: list[Sink] = [LogFile(out / LOG), bar]
        if config.tensorboard:
            sinks.append(TensorBoard(out, begin, stack))
        if config.wandb:
            sinks.append(WeightsAndBiases(config, out, stack))
        yield Report(sinks, bar)


class LogFile:
    """One line of JSON each."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def line(self, line: Line) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; make room and run the same command"
            ) from error


class Bar:
    """A bar with what matters beside it where there is a terminal, plain lines where there is none."""

    def __init__(self, begin: int, steps: int, console: Console | None = None) -> None:
        self.console = console or Console()
        self.begin, self.steps, self.started = begin, steps, time.monotonic()
        self.bar: Progress | None = None
        if self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
            self.bar = Progress("train", *columns, console=self.console)
            self.task = self.bar.add_task("train", total=steps, completed=begin, note="")
            self.bar.start()

    def advance(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=step)

    def line(self, line: Line) -> None:
        """What a person wants of a log line; all of it is in the log."""
        step = line["step"]
        if line.get("evaluation"):
            note = f"held out: loss {line['loss']:.3f}  τ {line['tau']:.2f}  acceptance {line['acceptance']}"
            self.console.print(f"step {step}  {note}", highlight=False, soft_wrap=True)
            return
        note = f"loss {line['loss']:.3f}  τ {line['tau']:.2f}  {line['tokens_per_s']} tokens/s"
        if self.bar is not None:
            self.bar.update(self.task, note=note)
        else:
            left = (time.monotonic() - self.started) * (self.steps - step) / max(1, step - self.begin)
            text = f"step {step}/{self.steps}  {note}  {duration(left)} left"
            self.console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def duration(seconds: float) -> str:
    """As a person says it: 40 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def scalars(line: Line) -> dict[str, float]:
    """The numbers of a line by name, positions apart: `held_out/acceptance/3`."""
    part = "held_out" if line.get("evaluation") else "train"
    found: dict[str, float] = {}
    for name, value in line.items():
        if name in ("step", "time", "evaluation"):
            continue
        values = {f"{name}/{k}": x for k, x in enumerate(value, 1)} if isinstance(value, list) else {name: value}
        found |= {f"{part}/{key}": float(x) for key, x in values.items()}
    return found


class TensorBoard:
    """Event files in `out`/tensorboard."""

    def __init__(self, out: Path, begin: int, stack: ExitStack) -> None:
        require("tensorboard", "train")
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=begin + 1)  # a resumed run writes them again
        stack.callback(self.writer.close)

    def line(self, line: Line) -> None:
        for name, value in scalars(line).items():
            self.writer.add_scalar(name, value, line["step"])


class WeightsAndBiases:
    """One run of a project; the same again when the training is continued."""

    def __init__(self, config: TrainConfig, out: Path, stack: ExitStack) -> None:
        wandb = require("wandb", "wandb")
        known = out / "wandb_id"
        self.run = wandb.init(
            project=config.wandb,
            dir=str(out),
            config=as_plain(config),
            id=known.read_text(encoding="utf-8") if known.is_file() else None,
            resume="allow",
        )
        known.write_text(self.run.id, encoding="utf-8")
        stack.callback(self.run.finish)

    def line(self, line: Line) -> None:
        self.run.log(scalars(line), step=line["step"])


def write_run(out: Path, config: TrainConfig, ranks: Ranks, *, data: dict[str, str], begin: int) -> None:
    """run.json: what was run, on what data, with which versions; every start of it."""
    if not ranks.first:
        return
    path = out / RUN
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "after_step": begin,
        "arguments": sys.argv[1:],
        "ranks": ranks.size,
        "machine": platform.node(),
        **provenance(ranks.device),
    }
    before = json.loads(path.read_text(encoding="utf-8"))["starts"] if begin and path.is_file() else []
    record = {"config": as_plain(config), "data": data, "starts": [*before, start]}
    with replacing_file(path) as fresh:
        fresh.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
