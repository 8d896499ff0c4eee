"""A package imports only from strictly lower floors (docs/architecture.md); lazy and type-only imports count."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "src" / "dspark"
FLOORS = {
    "common": 0,
    "ops": 1,
    "models": 2,
    "drafters": 3,
    "speculation": 4,
    "engine": 5,
    "training": 5,
    "demo": 6,
    "server": 6,
    "evaluation": 6,
    "simulation": 6,
    "cli": 7,
}


def imported_packages(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module] if node.module != "dspark" else [f"dspark.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("dspark.")}
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_from_lower_floors(path: Path):
    package = path.relative_to(ROOT).parts[0]
    if package.endswith(".py"):
        return
    for other in imported_packages(path) - {package}:
        assert other in FLOORS, f"{path} imports dspark.{other}, which has no floor"
        assert FLOORS[other] < FLOORS[package], f"{path} ({package}) imports dspark.{other}, not a lower floor"


def test_every_package_has_a_floor():
    assert {child.name for child in ROOT.iterdir() if child.is_dir() and child.name != "__pycache__"} <= set(FLOORS)
