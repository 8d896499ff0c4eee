"""What is not Python is installed too: a file that no pattern names would be missing for users."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "dspark"
PATTERNS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["dspark"]
DATA = sorted(
    str(path.relative_to(PACKAGE))
    for path in PACKAGE.rglob("*")
    if path.is_file() and path.suffix not in (".py", ".pyc")
)


@pytest.mark.parametrize("file", DATA)
def test_files_that_are_not_python_are_installed(file):
    assert any(Path(file).match(pattern) for pattern in PATTERNS)
