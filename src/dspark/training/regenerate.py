"""`dspark data regenerate`: the target answers the prompts itself, turn by turn, and can be stopped at any moment."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dspark.common.errors import UserError
from dspark.common.files import replacing_directory
from dspark.common.sampling_params import SamplingParams
from dspark.training.answers import Answerer, Question, Refused
from dspark.training.journal import Journal, check_same
from dspark.training.samples import (
    ABOUT,
    FORMAT,
    Message,
    Sample,
    SampleWriter,
    check_replaceable,
    count_samples,
    read_about,
    read_samples,
    splits_of,
    write_about,
)

NO_ANSWER = "the target answered nothing"
HOPELESS = 16  # refusals before the first answer that end a run


@dataclass(frozen=True)
class Settings:
    """What decides the answers, recorded beside them. `params.seed` is the run's; every request gets its own."""

    model: str
    params: SamplingParams
    template: dict[str, Any] = field(default_factory=dict)  # options of the chat template
    prompt_characters: int = 400  # raw text: how much of it the target is given

    def __post_init__(self) -> None:
        if self.prompt_characters < 1:
            raise UserError(f"prompt_characters {self.prompt_characters} leave no prompt; pass 1 or more")

    def recorded(self) -> dict[str, Any]:
        """As JSON-like values."""
        names = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed")
        sampling = {name: getattr(self.params, name) for name in names}
        return {"model": self.model, **sampling, "template": self.template, "prompt_characters": self.prompt_characters}

    def asked(self, sample: Sample, turn: int) -> SamplingParams:
        """The parameters of one request: its seed is a function of the run's, the sample's id and the turn."""
        words = f"{self.params.seed} {sample.id} {turn}".encode()
        seed = int.from_bytes(hashlib.blake2b(words, digest_size=4).digest(), "big") >> 1  # some servers take 31 bits
        return dataclasses.replace(self.params, seed=seed)


@dataclass
class Progress:
    """How far a run is, for whoever watches."""

    total: int
    done: int = 0  # samples answered, by earlier runs too
    tokens: int = 0  # written by this run
    refused: Counter[str] = field(default_factory=Counter)


async def regenerate(
    source: Path,
    out: Path,
    answerer: Answerer,
    settings: Settings,
    *,
    concurrency: int,
    watch: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Write `out` with the target's answers; returns what about.json says.

    Answers are kept in `out`.partial until all are there; the same call goes on with them. Raises UserError where
    `out` holds something else, and when the answerer gives up.
    """
    if source.resolve() == out.resolve():
        raise UserError(f"--out {out} is where the prompts are; pass another directory")
    check_replaceable(out)
    splits, identity = splits_of(source), {"prompts": fingerprint(source), **settings.recorded()}
    partial = out.with_name(f"{out.name}.partial")
    if out.is_dir() and (out / ABOUT).is_file():
        found = read_about(out)
        check_same(found.get("identity", {}), identity, out)
        shutil.rmtree(partial, ignore_errors=True)
        return found
    with Journal(partial, identity) as journal:
        total = sum(count_samples(source, split) for split in splits)
        progress = Progress(total, done=len(journal))
        watch(progress)
        pending = (s for split in splits for s in read_samples(source, split) if s.id not in journal)
        await answer_all(pending, answerer, settings, journal, progress, concurrency, watch)
        about = {"format": FORMAT, "source": str(source), "identity": identity, **settings.recorded()}
        record = finish(source, splits, out, journal, about, progress)
        journal.remove()
    return record


async def answer_all(
    pending: Iterator[Sample],
    answerer: Answerer,
    settings: Settings,
    journal: Journal,
    progress: Progress,
    concurrency: int,
    watch: Callable[[Progress], None],
) -> None:
    """Work through the pending samples, `concurrency` at a time; each is in the journal when it is whole."""

    async def work() -> None:
        for sample in pending:  # shared by all workers: nobody waits between taking and asking
            try:
                answered, tokens = await answer(sample, answerer, settings)
            except Refused as refusal:
                progress.refused[str(refusal)] += 1
                if not progress.tokens and progress.done == 0 and progress.refused.total() >= HOPELESS:
                    raise UserError(f"the first {HOPELESS} prompts were refused, the last: {refusal}") from refusal
                continue
            journal.add(sample.id, {"sample": vars(answered) if answered else None, "tokens": tokens})
            progress.done += 1
            progress.tokens += tokens
            watch(progress)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
    except* UserError as errors:
        raise errors.exceptions[0] from None


async def answer(sample: Sample, answerer: Answerer, settings: Settings) -> tuple[Sample | None, int]:
    """The sample with the target's own answers, and how many tokens they took; None for one it has no answer to."""
    if sample.messages is None:
        text = sample.text or ""
        prompt = text if sample.completion is not None else beginning(text, settings.prompt_characters)
        found = await answerer.complete(prompt, settings.asked(sample, 0))
        said = found.message["content"]
        if not said and found.ending != "stop":
            return None, found.tokens
        return Sample(sample.id, text=prompt, completion=said, endings=[found.ending]), found.tokens
    messages: list[Message] = []
    endings: list[str] = []
    tokens = 0
    for message in sample.messages:
        if message["role"] == "assistant":
            continue
        if message["role"] == "tool":  # it answers a call that the target has not made
            break
        messages.append(message)
        if message["role"] != "user":
            continue
        question = Question(messages, sample.tools, settings.template)
        found = await answerer.chat(question, settings.asked(sample, len(endings)))
        tokens += found.tokens
        if not found.message["content"] and not found.message.get("tool_calls"):
            messages.pop()
            break
        messages.append(found.message)
        endings.append(found.ending)
        if found.ending != "stop":  # what was asked next was asked about another answer
            break
    if not endings:
        return None, tokens
    return Sample(sample.id, messages=messages, tools=sample.tools, endings=endings), tokens


def beginning(text: str, characters: int) -> str:
    """The start of a text, up to the end of a word."""
    if len(text) <= characters:
        return text
    cut = text[: characters + 1]
    return cut[: max(cut.rfind(" "), cut.rfind("\n"))] if len(cut.split()) > 1 else cut[:characters]


def finish(
    source: Path, splits: list[str], out: Path, journal: Journal, about: dict[str, Any], progress: Progress
) -> dict[str, Any]:
    """Write the answers in the prompts' order, whole or not at all."""
    counts, dropped, endings, tokens = Counter[str](), Counter[str](), Counter[str](), 0
    with replacing_directory(out) as fresh:
        for split in splits:
            with SampleWriter(fresh / f"{split}.arrow") as writer:
                for prompt in read_samples(source, split):
                    record = journal.get(prompt.id)
                    if record is None or record["sample"] is None:
                        dropped["refused" if record is None else NO_ANSWER] += 1
                        continue
                    sample = Sample(**record["sample"])
                    writer.write(sample)
                    endings.update(sample.endings)
                    tokens += record["tokens"]
            counts[split] = writer.count
        if not counts.total():
            reason = next(iter(progress.refused), NO_ANSWER)
            raise UserError(f"no prompt of {source} was answered: {reason}")
        record = {**about, "samples": dict(counts), "tokens": tokens, "endings": dict(endings)}
        record |= {"dropped": dict(dropped), "refusals": dict(progress.refused.most_common(5))}
        write_about(fresh, record)
    return record


def fingerprint(source: Path) -> str:
    """Stands for the prompts: their record and the sizes of their files."""
    words = (source / ABOUT).read_bytes()
    sizes = [f"{path.name} {path.stat().st_size}" for path in sorted(source.glob("*.arrow"))]
    return hashlib.blake2b(words + "\n".join(sizes).encode(), digest_size=8).hexdigest()
