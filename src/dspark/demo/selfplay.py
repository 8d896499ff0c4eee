"""The demo target writes its own training text: prompts cut from the corpus, continued by the engine.

python -m dspark.demo.selfplay --target DIR --corpus train.npy --out DIR --tokens 1000000
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dspark.common.errors import UserError
from dspark.common.sampling_params import SamplingParams
from dspark.engine.build import build_engine
from dspark.engine.step import EngineCore
from dspark.training.data import Document, write_documents


class Prompts:
    """Prompts of 16..`longest` tokens, each the start of a corpus document or of a line inside one."""

    def __init__(self, stream: np.ndarray, line_end_V: np.ndarray, end_token: int, longest: int, seed: int) -> None:
        self.stream, self.end_token, self.longest = stream, end_token, longest
        self.rng = np.random.default_rng(seed)
        starts = np.flatnonzero(stream[:-longest] == end_token)
        lines = np.flatnonzero(line_end_V[stream[: -longest - 1]])
        self.starts = (starts, lines)

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            starts = self.starts[int(self.rng.random() < 0.7)]
            begin = int(starts[self.rng.integers(len(starts))]) + 1
            size = int(self.rng.integers(16, self.longest))
            text = self.stream[begin : begin + size].astype(int).tolist()
            if self.end_token in text:
                text = text[: text.index(self.end_token)]
            if len(text) >= 8:
                yield [self.end_token, *text]


def mixed(rng: np.random.Generator) -> float:
    """A temperature: 0 a third of the time, else 0.7 to 1: greedy text loops and teaches little."""
    return 0.0 if rng.random() < 1 / 3 else float(0.7 + 0.3 * rng.random())


def self_play(
    core: EngineCore, prompts: Prompts, *, tokens: int, new_tokens: int, seed: int, temperature: float | None = None
) -> Iterator[Document]:
    """Documents of prompt (mask 0) and continuation (mask 1), the end token included, until `tokens` were written.

    All are written at `temperature`; None for a `mixed` one each.

    They come in the order of their prompts, and so are a function of prompts, `seed` and the engine's own seed.
    """
    rng, source, started = np.random.default_rng(seed), iter(prompts), time.monotonic()
    queue: dict[int, tuple[list[int], list[int]]] = {}  # by request, oldest first: prompt, what was written
    done: set[int] = set()
    count = shown = 0
    while count < tokens:
        while len(core.requests) < core.config.max_running:
            prompt = next(source)
            drawn = mixed(rng)
            params = SamplingParams(temperature=drawn if temperature is None else temperature, max_tokens=new_tokens)
            queue[core.add(prompt, params)] = (prompt, [])
        for commit in core.step():
            queue[commit.request_id][1].extend(commit.token_ids)
            if commit.finish_reason:
                done.add(commit.request_id)
        while count < tokens and queue and (oldest := next(iter(queue))) in done:
            prompt, written = queue.pop(oldest)
            count += len(written)
            yield prompt + written, [0] * len(prompt) + [1] * len(written)
        if count // 20_000 > shown:
            shown = count // 20_000
            print(f"{count} of {tokens} tokens, {count / (time.monotonic() - started):.0f} tokens/s", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Write a data directory for `dspark.training.loop`."""
    parser = argparse.ArgumentParser(description="Let a target write training text for its drafter.")
    parser.add_argument("--target", required=True)
    parser.add_argument(
        "--corpus", type=Path, required=True, help=".npy of token ids, documents begun by the end token"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--rows", type=int, default=64, help="texts written at once")
    parser.add_argument("--new-tokens", type=int, default=192)
    parser.add_argument("--longest-prompt", type=int, default=96)
    parser.add_argument("--temperature", type=float, help="of every text; default: a third at 0, the rest 0.7 to 1")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    try:
        core = build_engine(
            options.target, "none", "none", max_running=options.rows, prefix_caching=False, seed=options.seed
        )
        assert core.tokenizer is not None, "the demo target comes with its tokenizer"
        texts = core.tokenizer.batch_decode([[i] for i in range(core.target.vocab_size)])
        ends = np.array([text.endswith("\n") for text in texts])
        stream = np.load(options.corpus, mmap_mode="r")
        prompts = Prompts(stream, ends, core.tokenizer.eos_token_id, options.longest_prompt, options.seed)
        core.wait_compiled()
        settings = {name: getattr(options, name) for name in ("tokens", "new_tokens", "seed", "temperature")}
        documents = self_play(core, prompts, **settings)
        about = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k != "out"}
        write_documents(options.out, documents, vocabulary=core.target.vocab_size, about=about)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
