"""Tables and figures of `families.py`, from whatever runs are finished."""

from __future__ import annotations

import json
from pathlib import Path


def write_report(out: Path) -> None:
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("runs/*/result.json"))]
    for r in results:
        print(r["family"], r["layers"], r["gamma"], r["seed"], {d: round(v["tau"], 3) for d, v in r["domains"].items()})
