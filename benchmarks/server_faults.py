"""A server under bad luck: killed while it answers, soaked, overloaded, and sent nonsense. (issue 5's bars)

    python benchmarks/server_faults.py crash --requests 200
    python benchmarks/server_faults.py failover --requests 200 --redis redis://127.0.0.1
    python benchmarks/server_faults.py soak --requests 10000
    python benchmarks/server_faults.py overload --seconds 15
    python benchmarks/server_faults.py fuzz --requests 5000

Starts `dspark serve` in a process of its own on a free port, with the demo pair unless --target and --drafter
say otherwise, prints what happened as one JSON object, and exits 1 where a promise is broken.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import uvloop
from faults.crash import crash, failover
from faults.nonsense import fuzz
from faults.overload import overload
from faults.soak import soak


def main() -> None:
    """One fault, told as JSON."""
    faults = {"crash": crash, "failover": failover, "soak": soak, "overload": overload, "fuzz": fuzz}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fault", choices=faults)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each part of overload")
    parser.add_argument("--places", type=int, default=64, help="of overload: texts at once, the server's default")
    parser.add_argument("--queue", type=int, help="of overload: default, the server's own")
    parser.add_argument("--tokens", type=int, default=64, help="of each text of overload, at most of soak")
    parser.add_argument("--redis", default="redis://127.0.0.1", help="of failover: what its servers share")
    parser.add_argument("--seed", type=int, default=0, help="of fuzz")
    parser.add_argument("--short", action="store_true", help="a run too short to judge memory by")
    parser.add_argument("--target")
    parser.add_argument("--drafter")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        told, kept = uvloop.run(faults[options.fault](options, Path(directory)))
    print(json.dumps({"fault": options.fault, "kept": kept, **told}))
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
