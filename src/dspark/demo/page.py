"""The coloured texts as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from dspark.demo.compare import Outcome, Tally
from dspark.demo.race import Written

STYLE = """
:root { color-scheme: light dark;
  --ground: #fbfbf9; --ink: #1d1f21; --faint: #6b7075; --card: #ffffff; --line: #e2e2dc;
  --accepted: 34 139 84; --own: 168 50 126; --own-ink: #8f1f68; }
@media (prefers-color-scheme: dark) { :root {
  --ground: #15171a; --ink: #e6e6e3; --faint: #8f959b; --card: #1c1f23; --line: #2e3238;
  --accepted: 72 190 125; --own: 226 110 184; --own-ink: #f0a3d3; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 62rem; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1rem; margin: 2.4rem 0 .6rem; }
p { margin: .3rem 0; } .faint { color: var(--faint); }
.numbers { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0 .8rem; }
.numbers div { flex: 1 1 8rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .7rem .9rem; }
.numbers b { display: block; font-size: 1.45rem; font-variant-numeric: tabular-nums; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem 1.1rem; margin: 0;
  white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4;
  font: 13.5px/1.65 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.a { background: rgb(var(--accepted) / var(--c, .25)); border-radius: 2px; }
.t { background: rgb(var(--own) / .2); color: var(--own-ink); border-radius: 2px; font-weight: 600; }
pre .a, pre .t { box-shadow: inset 1px 0 0 var(--card); }
.a:hover, .t:hover { outline: 1.5px solid currentColor; }
#tip { position: fixed; display: none; pointer-events: none; z-index: 1; padding: .25rem .55rem; border-radius: .35rem;
  background: var(--ink); color: var(--ground); font: 12.5px/1.45 system-ui, sans-serif; white-space: pre;
  max-width: 22rem; }
.legend { margin-top: 1.2rem; } .legend span { padding: .05rem .4rem; margin-right: .5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .2rem .9rem .2rem 0; text-align: right; font-weight: normal; }
th { color: var(--faint); } th:first-child, td:first-child { text-align: left; }
.bar { display: inline-block; width: 14rem; max-width: 24vw; height: .7rem; background: var(--line);
  border-radius: 2px; vertical-align: middle; overflow: hidden; }
.bar i { display: block; height: 100%; background: rgb(var(--accepted)); }
"""

SCRIPT = """
const tip = document.getElementById("tip");
document.addEventListener("mouseover", event => {
  const note = event.target.dataset && event.target.dataset.note;
  tip.style.display = note ? "block" : "none";
  if (note) tip.textContent = note;
});
document.addEventListener("mousemove", event => {
  tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = Math.min(event.clientY + 18, innerHeight - tip.offsetHeight - 8) + "px";
});
"""


def page(tally: Tally, *, drafter: str, measured: str) -> str:
    """The whole page; `measured` says in words what the numbers are."""
    body = [
        f"<h1>{escape(drafter)}, token by token</h1>",
        _numbers(tally, drafter),
        f'<p class="faint">{escape(measured)}</p>',
        '<p class="legend"><span class="a" style="--c:.4">drafted and accepted</span>'
        '<span class="t">the target\'s own token</span>'
        '<span class="faint">the surer the drafter was, the stronger the green; point at a token for more</span></p>',
        *(_outcome(index, outcome) for index, outcome in enumerate(tally.outcomes)),
        "<h2>How often a drafted token is accepted, by its place in the draft</h2>",
        _positions(tally),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>DSpark demo</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + f'\n<div id="tip" role="tooltip"></div><script>{SCRIPT}</script></body></html>\n'
    )


def _numbers(tally: Tally, drafter: str) -> str:
    speedup = tally.dspark_speed / tally.plain_speed if tally.plain_speed else 0.0
    cells = (
        (f"{speedup:.1f}×", "speed-up"),
        (f"{tally.dspark_speed:.0f}", f"tokens/s with {escape(drafter)}"),
        (f"{tally.plain_speed:.0f}", "tokens/s plain"),
        (f"{tally.statistics.tokens_per_round:.2f}", "tokens per round (τ)"),
        ("yes" if tally.same else "no", "same text"),
    )
    return (
        '<div class="numbers">'
        + "".join(f'<div><b>{value}</b><span class="faint">{name}</span></div>' for value, name in cells)
        + "</div>"
    )


def _outcome(index: int, outcome: Outcome) -> str:
    statistics = outcome.dspark[0].statistics
    heading = (
        f"Prompt {index + 1} · {len(outcome.written)} tokens in {statistics.rounds} rounds · "
        f"τ {statistics.tokens_per_round:.2f}"
    )
    text = f'<span class="faint">{escape(outcome.prompt)}</span>{"".join(_spans(outcome.written))}'
    return f"<h2>{heading}</h2><pre>{text}</pre>"


def _spans(written: Iterable[Written]) -> Iterable[str]:
    for token in written:
        kind = "a" if token.accepted else "t"
        strength = f' style="--c:{0.08 + 0.4 * token.confidence:.2f}"' if token.accepted and token.confidence else ""
        yield f'<span class="{kind}"{strength} data-note="{escape(_note(token))}">{escape(token.text)}</span>'


def _note(token: Written) -> str:
    if token.slot is None:
        return "the target's own: every drafted token before it was accepted, or none was drafted"
    confidence = f"confidence {token.confidence:.0%}" if token.confidence is not None else "no confidence"
    if token.accepted:
        return f"draft slot {token.slot}, {confidence}, accepted"
    return f"draft slot {token.slot}, {confidence}: drafted {token.instead_of!r}, corrected"


def _positions(tally: Tally) -> str:
    statistics = tally.statistics
    rows = []
    for k, conditional in enumerate(statistics.conditional_acceptance):
        share = statistics.accepted_at[k] / statistics.verified_at[k] if statistics.verified_at[k] else 0.0
        shown = f"{conditional:.0%}" if conditional is not None else "–"
        bar = f'<span class="bar"><i style="width:{share:.1%}"></i></span>'
        rows.append(f"<tr><td>{k + 1}</td><td>{shown}</td><td>{share:.0%}</td><td>{bar}</td></tr>")
    head = "<tr><th>place</th><th>if reached</th><th>of all drafts</th><th></th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"
