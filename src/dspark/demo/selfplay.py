"""The demo target writes its own training text: prompts cut from the corpus, continued in large static batches.

    python -m dspark.demo.selfplay --target DIR --corpus train.npy --out DIR --tokens 1000000

R rows of a batch, P pages, V vocabulary.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dspark.common.errors import UserError
from dspark.models.batch import Ragged
from dspark.models.loading import load_tokenizer
from dspark.models.target import Target
from dspark.training.data import Document, write_documents

PAGE = 64


@torch.inference_mode()
def continuations(
    target: Target, prompts: Sequence[Sequence[int]], temperature_R: Tensor, new_tokens: int, generator: torch.Generator
) -> Tensor:
    """`new_tokens` sampled tokens after each prompt, [R, new_tokens]; temperature 0 takes the likeliest token."""
    rows, longest = len(prompts), max(map(len, prompts)) + new_tokens
    width = -(-longest // PAGE)
    pool = target.allocate(rows * width + 1, PAGE)
    table_RP = torch.arange(1, rows * width + 1, dtype=torch.int32).view(rows, width)
    length_R = torch.tensor([len(prompt) for prompt in prompts])
    batch = ragged([torch.tensor(prompt) for prompt in prompts], torch.zeros(rows, dtype=torch.long), table_RP)
    row_R = length_R.cumsum(0) - 1
    written = []
    for _ in range(new_tokens):
        logits_RV, _ = target.forward(batch, pool, row_R)
        token_R = sample(logits_RV.float(), temperature_R, generator)
        written.append(token_R)
        batch = ragged(list(token_R[:, None]), length_R, table_RP)
        length_R, row_R = length_R + 1, torch.arange(rows)
    return torch.stack(written, dim=1)


def ragged(tokens: list[Tensor], start_R: Tensor, table_RP: Tensor) -> Ragged:
    """The batch that puts tokens[r] at positions start_R[r].. of every row."""
    count_R = torch.tensor([len(row) for row in tokens])
    row_T = torch.repeat_interleave(torch.arange(len(tokens)), count_R)
    first_R = count_R.cumsum(0) - count_R
    position_T = torch.arange(len(row_T)) - first_R[row_T] + start_R[row_T]
    return Ragged(
        token_T=torch.cat(tokens),
        position_T=position_T,
        slot_T=table_RP[row_T, position_T // PAGE].long() * PAGE + position_T % PAGE,
        page_table_RP=table_RP,
        cu_query_R1=torch.cat([count_R.new_zeros(1), count_R.cumsum(0)]).int(),
        context_R=start_R.int(),
    )


def sample(logits_RV: Tensor, temperature_R: Tensor, generator: torch.Generator) -> Tensor:
    """One token a row, by inverting the cumulative distribution: one random number a row."""
    reach_RV = torch.softmax(logits_RV / temperature_R.clamp(min=1e-4)[:, None], dim=-1).cumsum(-1)
    point_R = torch.rand(len(logits_RV), generator=generator) * reach_RV[:, -1]
    drawn_R = torch.searchsorted(reach_RV, point_R[:, None])[:, 0].clamp(max=logits_RV.shape[1] - 1)
    return torch.where(temperature_R > 0, drawn_R, logits_RV.argmax(-1))


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


def temperatures(rows: int, generator: torch.Generator) -> Tensor:
    """Half the rows greedy, half between 0.7 and 1: what people ask for."""
    warm_R = 0.7 + 0.3 * torch.rand(rows, generator=generator)
    return torch.where(torch.rand(rows, generator=generator) < 0.5, 0.0, warm_R)


def self_play(
    target: Target, prompts: Prompts, *, tokens: int, rows: int, new_tokens: int, seed: int, threads: int
) -> Iterator[Document]:
    """Documents of prompt (mask 0) and continuation (mask 1), cut after the end token, until `tokens` were written."""
    count, source, started = 0, iter(prompts), time.monotonic()
    # Two batches at once on one thread each: threads that wait for each other inside an operation lose more.
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    jobs: deque[Future[list[Document]]] = deque()
    number = 0
    while count < tokens:
        while len(jobs) < threads:
            batch = sorted((next(source) for _ in range(rows)), key=len)
            jobs.append(pool.submit(write_batch, target, batch, new_tokens, prompts.end_token, seed + number))
            number += 1
        documents = jobs.popleft().result()
        count += sum(sum(mask) for _, mask in documents)
        yield from documents
        print(f"{count} of {tokens} tokens, {count / (time.monotonic() - started):.0f} tokens/s", flush=True)
    pool.shutdown(cancel_futures=True)


def write_batch(target: Target, batch: list[list[int]], new_tokens: int, end_token: int, seed: int) -> list[Document]:
    """One batch's documents: a function of prompts and seed."""
    generator = torch.Generator().manual_seed(seed)
    temperature_R = temperatures(len(batch), generator)
    written_RT = continuations(target, batch, temperature_R, new_tokens, generator).tolist()
    cut = [row[: row.index(end_token) + 1] if end_token in row else row for row in written_RT]
    return [(p + w, [0] * len(p) + [1] * len(w)) for p, w in zip(batch, cut, strict=True)]


def main(argv: list[str] | None = None) -> int:
    """Write a data directory for `dspark.training.loop`."""
    parser = argparse.ArgumentParser(description="Let a target write training text for its drafter.")
    parser.add_argument("--target", required=True)
    parser.add_argument(
        "--corpus", type=Path, required=True, help=".npy of token ids, documents begun by the end token"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--new-tokens", type=int, default=192)
    parser.add_argument("--longest-prompt", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        target, tokenizer = Target.load(options.target, device="cpu"), load_tokenizer(options.target)
        texts = tokenizer.batch_decode([[i] for i in range(target.vocab_size)])
        ends = np.array([text.endswith("\n") for text in texts])
        stream = np.load(options.corpus, mmap_mode="r")
        prompts = Prompts(stream, ends, tokenizer.eos_token_id, options.longest_prompt, options.seed)
        documents = self_play(
            target,
            prompts,
            tokens=options.tokens,
            rows=options.rows,
            new_tokens=options.new_tokens,
            seed=options.seed,
            threads=options.threads,
        )
        about = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k != "out"}
        write_documents(options.out, documents, vocabulary=target.vocab_size, about=about)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
