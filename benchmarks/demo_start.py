"""Seconds from typing `dspark demo` to the first token on the terminal, and to the last line; medians of a few runs.

python benchmarks/demo_start.py [--runs 3] [-- options of dspark demo]
"""

from __future__ import annotations

import argparse
import os
import pty
import re
import statistics
import sys
import time

FIRST = re.compile(rb"[1-9]\d* tokens? \xc2\xb7")  # a panel's heading once its lane has written something
LAST = re.compile(rb"speed-up [\d.]+x, same text: (yes|no)")


def one(options: list[str]) -> tuple[float, float]:
    """(seconds to the first token, seconds to the last line) of one demo on a terminal of its own."""
    started, first, seen = time.monotonic(), 0.0, b""
    child, terminal = pty.fork()
    if child == 0:
        os.environ.update(COLUMNS="120", LINES="40", TERM="xterm-256color")
        os.execv(sys.executable, [sys.executable, "-m", "dspark.cli.main", "demo", *options])
    while True:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # the terminal closes with its process
            chunk = b""
        if not chunk:
            break
        seen = seen[-4096:] + chunk
        if not first and FIRST.search(seen):
            first = time.monotonic() - started
    os.waitpid(child, 0)
    if not first or not LAST.search(seen):
        sys.exit(f"the demo did not run to its end: {seen[-500:].decode(errors='replace')}")
    return first, time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("options", nargs="*", help="options of dspark demo, after --")
    arguments = parser.parse_args()
    runs = [one(arguments.options) for _ in range(arguments.runs)]
    first, last = (statistics.median(times) for times in zip(*runs, strict=True))
    print(f"first token after {first:.1f} s, last line after {last:.1f} s (medians of {len(runs)})")


if __name__ == "__main__":
    main()
