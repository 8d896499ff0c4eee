"""The Python of README.md and the guides runs as it is written there, on a tiny pair."""

import asyncio
import re
import textwrap
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs" / "guides").glob("*.md")))]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_python_blocks_run(page, tiny_pair, capsys):
    names = {
        "model": AutoModelForCausalLM.from_pretrained(tiny_pair.target),
        "inputs": AutoTokenizer.from_pretrained(tiny_pair.target)("def", return_tensors="pt"),
    }
    for block in blocks(page):
        code = block.replace("path/to/target", str(tiny_pair.target)).replace("path/to/drafter", str(tiny_pair.drafter))
        if "async with" in code:
            exec("async def block():\n" + textwrap.indent(code, "    "), names)
            asyncio.run(names["block"]())
        else:
            exec(code, names)
    assert capsys.readouterr().out or page != "README.md"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *PAGES[1:]])
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
        assert ((ROOT / page).parent / link).exists(), link
