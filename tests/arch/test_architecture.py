"""docs/architecture.md names what is there, and only that."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def rooms() -> list[str]:
    """Every file of the picture of rooms, as a path below src/dspark."""
    picture = TEXT.split("## Rooms")[1].split("```")[1]
    package, found = "", []
    for line in picture.splitlines():
        start = re.match(r"  (\w+)/ ", line)
        package = start[1] if start else package if line.startswith("   ") else ""
        found += [f"{package}/{name}" for name in re.findall(r"\w+\.py", line) if package]
    return found


@pytest.mark.parametrize("room", rooms())
def test_rooms_exist(room):
    assert (ROOT / "src" / "dspark" / room).is_file()


def test_every_file_has_a_room():
    package = ROOT / "src" / "dspark"
    files = {f"{path.parent.name}/{path.name}" for path in package.glob("*/*.py") if path.name != "__init__.py"}
    assert files - set(rooms()) == set(), "add them to the rooms of docs/architecture.md"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:\w+/)+\w+\.py", TEXT.split("## From a request")[1]))))
def test_the_way_of_a_request_exists(path):
    assert (ROOT / "src" / "dspark" / path).is_file()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"tests/\w+/\w+\.py", TEXT))))
def test_named_tests_exist(name):
    assert (ROOT / name).is_file()
