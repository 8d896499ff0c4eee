"""Figures as small PNG files; matplotlib is in the extra `plot`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from dspark.common.extras import require
from dspark.common.files import replacing_file

Points = Sequence[tuple[float, float]]
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#5a5a5a", "#000000")  # Okabe & Ito's
MARKERS = "osD^vP*X"
SIZE, DPI = (6.4, 4.0), 100


class Panel(NamedTuple):
    """One set of axes: curves by name, and what the axes are."""

    title: str
    x: str
    y: str
    curves: Mapping[str, Points]
    whole_x: bool = True  # ticks at whole numbers
    diagonal: bool = False  # draw y = x, both axes from 0 to 1
    low: float | None = None
    high: float | None = None


def check_matplotlib() -> None:
    """Raises UserError, before any work is done, where figures could not be drawn."""
    require("matplotlib", "plot")


def draw(path: Path, panels: Sequence[Panel], *, title: str = "") -> None:
    """Panels side by side, one legend for all."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    columns = 2 if max(map(len, names), default=0) > 28 else 3
    with figure(path, len(panels), title, legend_rows=-(-len(names) // columns)) as axes:
        for ax, panel in zip(axes, panels, strict=True):
            _panel(ax, panel, names)
        handles = {h.get_label(): h for ax in axes for h in ax.get_lines() if not h.get_label().startswith("_")}
        if len(names) > 1:
            axes[0].figure.legend(
                [handles[name] for name in names],
                names,
                loc="outside lower center",
                ncols=min(len(names), columns),
                frameon=False,
                fontsize=9,
            )


@contextmanager
def figure(path: Path, count: int, title: str, *, legend_rows: int) -> Iterator[list[Any]]:
    """`count` axes side by side; the file appears whole when the block ends well."""
    check_matplotlib()
    from matplotlib.figure import Figure  # without pyplot: no window system, no state between figures
    from PIL import Image  # comes with matplotlib

    width = SIZE[0] if count == 1 else 4.6 * count
    drawn = Figure(figsize=(width, SIZE[1] + 0.2 * legend_rows), dpi=DPI, layout="constrained")
    if title:
        drawn.suptitle(title, fontsize=11)
    yield list(drawn.subplots(1, count, squeeze=False)[0])
    raw = BytesIO()
    drawn.savefig(raw, format="png")
    with replacing_file(path) as fresh:  # flat colours: a palette is a third of the size and looks the same
        Image.open(raw).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(fresh, format="png", optimize=True)


def _panel(ax: Any, panel: Panel, names: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    if panel.diagonal:
        ax.plot([0, 1], [0, 1], color="#b0b0b0", linewidth=1, linestyle="--", label="_diagonal", zorder=1)
        ax.set_xlim(0, 1)
        ax.set_aspect("equal")
    for name, points in panel.curves.items():
        order = names.index(name)
        ax.plot(
            [x for x, _ in points],
            [y for _, y in points],
            label=name,
            color=COLOURS[order % len(COLOURS)],
            marker=MARKERS[order % len(MARKERS)],
            markersize=5,
            linewidth=1.6,
        )
    ax.set_title(panel.title, fontsize=10)
    ax.set_xlabel(panel.x)
    ax.set_ylabel(panel.y)
    ax.set_ylim(panel.low, panel.high)
    if panel.whole_x:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(alpha=0.3, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
