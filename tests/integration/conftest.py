"""Helpers shared with the unit tests."""

import sys
from pathlib import Path

for helpers in ("engine", "training"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / helpers))
