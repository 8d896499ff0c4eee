"""What `dspark demo` shows in a terminal: the race while it runs, the coloured text, the table, the last line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dspark.common.sampling_params import SamplingParams
from dspark.demo.compare import Difference, Outcome, Tally
from dspark.demo.race import Lane, Written, race

PROMPT, ACCEPTED, OWN, PLAIN = "dim", "green", "bold magenta", ""
SIDE_BY_SIDE = 110  # columns from which the two panels stand next to each other
TALLEST = 24  # lines of a panel's text


def legend() -> Text:
    """What the colours mean."""
    return Text.assemble(
        ("prompt", PROMPT), "   ", ("drafted and accepted", ACCEPTED), "   ", ("the target's own token", OWN)
    )


def coloured(prompt: str, written: Iterable[Written]) -> Text:
    """A prompt and its continuation, each token in its colour."""
    parts = [(token.text, ACCEPTED if token.accepted else OWN) for token in written]
    return Text.assemble((prompt, PROMPT), *parts)


def run_race(console: Console, plain: Lane, dspark: Lane, prompt: str, params: SamplingParams, title: str) -> Outcome:
    """Both lanes write `prompt`, live where there is a terminal; then the coloured text stays."""
    lanes = [dspark, plain]
    if console.is_terminal:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            for _ in race(lanes, prompt, params):
                live.update(_frame(console, plain, dspark, prompt, title), refresh=True)
    else:
        for _ in race(lanes, prompt, params):
            pass
    written = list(dspark.written)
    tau = dspark.statistics.tokens_per_round
    console.rule(Text(f"{title} · {len(written)} tokens, {tau:.2f} per round"), align="left", style="dim")
    console.print(coloured(prompt, written), soft_wrap=True)
    console.print()
    return Outcome(prompt, written, [plain.result()], [dspark.result()])


def _frame(console: Console, plain: Lane, dspark: Lane, prompt: str, title: str) -> RenderableType:
    beside = console.width >= SIDE_BY_SIDE
    width = (console.width // 2 if beside else console.width) - 4
    height = min(TALLEST, console.height - 6 if beside else (console.height - 8) // 2)
    left = Text.assemble((prompt, PROMPT), ("".join(token.text for token in plain.written), PLAIN))
    panels = [
        Panel(_tail(console, text, width, height), title=_heading(name, lane), title_align="left", height=height + 2)
        for name, lane, text in (
            ("plain decoding", plain, left),
            (dspark.name, dspark, coloured(prompt, dspark.written)),
        )
    ]
    if not beside:
        return Group(Text(title, "bold"), *panels, legend())
    grid = Table.grid(expand=True)
    grid.add_column(ratio=1)
    grid.add_column(ratio=1)
    grid.add_row(*panels)
    return Group(Text(title, "bold"), grid, legend())


def _heading(name: str, lane: Lane) -> str:
    return f"{name} · {len(lane.written)} tokens · {lane.speed:.0f} tokens/s" + (" · done" if lane.done else "")


def _tail(console: Console, text: Text, width: int, height: int) -> Text:
    lines = text.wrap(console, max(width, 10), tab_size=4)
    return Text("\n").join(lines[-max(height, 1) :])


def tables(tally: Tally, drafter: str) -> Sequence[RenderableType]:
    """Speeds, and acceptance by position."""
    statistics = tally.statistics
    speeds = Table(box=box.SIMPLE_HEAD)
    for name in ("decoding", "tokens/s", "ms per token", "tokens per round (τ)"):
        speeds.add_column(name, justify="left" if name == "decoding" else "right")
    for name, speed, tau in (
        ("plain", tally.plain_speed, 1.0),
        (drafter, tally.dspark_speed, statistics.tokens_per_round),
    ):
        speeds.add_row(name, f"{speed:.0f}", f"{1000 / speed:.2f}" if speed else "-", f"{tau:.2f}")
    positions = Table(box=box.SIMPLE_HEAD)
    positions.add_column("accepted at slot")
    positions.add_column("if reached", justify="right")
    positions.add_column("overall", justify="right")
    positions.add_column("")
    for k, conditional in enumerate(statistics.conditional_acceptance):
        share = statistics.accepted_at[k] / statistics.verified_at[k] if statistics.verified_at[k] else 0.0
        shown = f"{conditional:.0%}" if conditional is not None else "-"
        positions.add_row(str(k + 1), shown, f"{share:.0%}", Text("█" * round(20 * share), ACCEPTED))
    return [speeds, positions] if statistics.verified_at else [speeds]


def difference_lines(difference: Difference, drafter: str) -> list[str]:
    """The first difference in words, with the numbers that decided it."""
    if difference.position < 0:
        return [f"prompt {difference.prompt + 1}: the texts differed in one run and agreed in the next"]
    sides = (("plain", difference.plain), (drafter, difference.dspark))
    where = f"prompt {difference.prompt + 1}: the texts part at token {difference.position + 1}; log-probabilities of"
    words = [", ".join(f"{token!r} {value:.6f}" for token, value in top) for _, top in sides]
    return [where, *(f"  {name}: {word}" for (name, _), word in zip(sides, words, strict=True))]


def last_line(tally: Tally) -> str:
    """`speed-up 2.7x, same text: yes`."""
    speedup = tally.dspark_speed / tally.plain_speed if tally.plain_speed else 0.0
    return f"speed-up {speedup:.1f}x, same text: {'yes' if tally.same else 'no'}"
