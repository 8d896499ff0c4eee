"""Prompts of two domains that the demo target never saw: code, and the prose that lies beside code."""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Callable, Sequence
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from dspark.common.errors import UserError
from dspark.demo.corpus import content_digest, held_out_texts

SHORTEST = 400  # characters; shorter texts give no prompt
LICENCES = ("LICEN", "COPYING", "NOTICE")


def code_prompts(tokenizer: PreTrainedTokenizerBase, target: Path, count: int, seed: int) -> list[list[int]]:
    """The 24..72 tokens before random lines of the target's held-out files, and their beginnings, half and half."""
    texts = [text for _, text in held_out_texts(listing(target))]
    return cut(tokenizer, texts, count, seed)


def prose_prompts(tokenizer: PreTrainedTokenizerBase, target: Path, count: int, seed: int) -> list[list[int]]:
    """As `code_prompts`, of docstrings in held-out files, package descriptions and licences in turn.

    Descriptions and licences are this installation's; the corpus reads `.py` files and drops licence headers.
    """
    kinds = (docstrings(target), descriptions(), licences())
    each = [cut(tokenizer, texts, -(-count // len(kinds)), seed + i) for i, texts in enumerate(kinds)]
    return [prompt for row in zip(*each, strict=True) for prompt in row][:count]


DOMAINS: dict[str, Callable[[PreTrainedTokenizerBase, Path, int, int], list[list[int]]]] = {
    "code": code_prompts,
    "prose": prose_prompts,
}


def cut(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], count: int, seed: int) -> list[list[int]]:
    """Token ids; every second prompt is a text's beginning."""
    if not texts:
        raise UserError("this installation has none of the held-out texts; use the packages the target was made from")
    rng, prompts = np.random.default_rng(seed), []
    for number in range(count):
        lines = texts[number % len(texts)].splitlines(keepends=True)
        first = 0 if number % 2 else int(rng.integers(0, max(1, len(lines) - 20)))
        ids = tokenizer("".join(lines[first : first + 30]))["input_ids"]
        prompts.append(ids[: int(rng.integers(24, 73))])
    return prompts


def listing(target: Path) -> list[dict[str, str]]:
    """The files a demo target was not trained on: path and content hash."""
    return json.loads((target / "held_out.json").read_text(encoding="utf-8"))


def docstrings(target: Path) -> list[str]:
    """Docstrings of the held-out files, the first long one of each file, then the second ones."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    each = []
    for _, text in held_out_texts(listing(target)):
        found = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
        each.append([doc for doc in found if len(doc) >= SHORTEST])
    return [docs[turn] for turn in range(max(map(len, each), default=0)) for docs in each if len(docs) > turn]


def descriptions() -> list[str]:
    """What installed packages say about themselves, as .rst or Markdown; one text each, by name."""
    found = {one.metadata["Name"]: str(one.metadata.get_payload() or "") for one in distributions()}  # type: ignore[attr-defined]
    return [text for _, text in sorted(found.items()) if len(text) >= SHORTEST]


def licences() -> list[str]:
    """Licence texts of installed packages, each content once, in the order of their hashes."""
    found = {}
    for path in Path(sysconfig.get_paths()["purelib"]).glob("*.dist-info/**/*"):
        if path.is_file() and path.name.upper().startswith(LICENCES):
            text = path.read_bytes().decode("utf-8", errors="replace")
            found[content_digest(text)] = text
    return [text for _, text in sorted(found.items()) if len(text) >= SHORTEST]
