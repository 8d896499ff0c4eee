"""`dspark data import`: rows of any usual layout become samples, split by a hash of what was asked, each kept once."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark.common.errors import UserError
from dspark.common.files import replacing_directory
from dspark.training.samples import FORMAT, SPLITS, Message, Sample, SampleWriter, check_replaceable, write_about
from dspark.training.sources import Row

CONVERSATIONS = ("messages", "conversations", "conversation", "turns")
PROMPTS = ("prompt", "instruction", "question")
ANSWERS = ("response", "completion", "output", "answer")
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant"}
ROLES |= {"function": "tool", "observation": "tool", "ipython": "tool"}
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Columns:
    """Which columns of a row hold what; "" for the usual names, tried in turn."""

    content: str = ""
    answer: str = ""
    raw: bool = False  # a string is text to learn from as it is, not a prompt


@dataclass(frozen=True)
class Division:
    """How rows are divided: what share is held out, by a hash that `seed` changes; at most `limit` are kept."""

    held_out: float = 0.02
    seed: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise UserError(f"held_out {self.held_out} is no share; pass 0 or more and less than 1")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit {self.limit} keeps nothing; pass 1 or more")

    def split(self, sample: Sample) -> str:
        """Where a sample belongs: a function of the seed and of what was asked, so that no prompt is in both splits."""
        share = int.from_bytes(digest([self.seed, *asked(sample)])[:8], "big") / 2**64
        return "held_out" if share < self.held_out else "train"


class Unusable(Exception):
    """A row that cannot become a sample: `dropped` when that is no mistake of the data, else an error of the row."""

    def __init__(self, reason: str, *, dropped: bool = False) -> None:
        super().__init__(reason)
        self.dropped = dropped


def import_samples(
    rows: Iterable[Row],
    out: Path,
    *,
    columns: Columns | None = None,
    division: Division | None = None,
    skip_bad: bool = False,
    about: dict[str, Any] | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> dict[str, Any]:
    """Write `out` whole or not at all; returns what about.json says. Memory is a batch of rows and 16 bytes an id.

    Raises UserError for a bad row, unless `skip_bad` drops it, and where nothing is left to write.
    """
    columns, division = columns or Columns(), division or Division()
    check_replaceable(out)
    seen: set[bytes] = set()
    dropped: Counter[str] = Counter()
    with replacing_directory(out) as fresh, ExitStack() as stack:
        splits = SPLITS if division.held_out else SPLITS[:1]
        writers = {split: stack.enter_context(SampleWriter(fresh / f"{split}.arrow")) for split in splits}
        for number, row in enumerate(rows, 1):
            progress(number)
            sample = usable(row, columns, dropped, skip_bad)
            if sample is None:
                continue
            if bytes.fromhex(sample.id) in seen:
                dropped["said the same as an earlier row"] += 1
                continue
            seen.add(bytes.fromhex(sample.id))
            writers[division.split(sample)].write(sample)
            if len(seen) == division.limit:
                break
        stack.close()
        counts = {split: writer.count for split, writer in writers.items()}
        check_counts(counts, dropped, division)
        record = {"format": FORMAT, **(about or {}), "division": vars(division), "columns": vars(columns)}
        record |= {"samples": counts, "dropped": dict(dropped)}
        write_about(fresh, record)
    return record


def check_counts(counts: dict[str, int], dropped: Counter[str], division: Division) -> None:
    """Raises UserError where a split stayed empty."""
    total = sum(counts.values())
    if not total:
        reasons = "; ".join(f"{count} rows dropped: {reason}" for reason, count in dropped.items())
        raise UserError(f"there is nothing to import ({reasons or 'the input has no rows'}); check the input")
    for split, count in counts.items():
        if not count:
            raise UserError(
                f"none of {total} samples fell into {split} at --held-out {division.held_out:g}; "
                "pass a larger share, another --seed, or --held-out 0 to hold out none"
            )


def usable(row: Row, columns: Columns, dropped: Counter[str], skip_bad: bool) -> Sample | None:
    """The row's sample, or None where it was dropped. Raises UserError for a bad row that may not be skipped."""
    try:
        if row.fields is None:
            raise Unusable(row.problem)
        return sample_of(row.fields, columns)
    except Unusable as problem:
        if problem.dropped:
            dropped[str(problem)] += 1
        elif skip_bad:
            dropped["bad rows"] += 1
        else:
            raise UserError(f"{row.where} {problem}; mend it, or pass --skip-bad to leave such rows out") from problem
    return None


def sample_of(fields: dict[str, Any], columns: Columns) -> Sample:
    """A sample from a row. Raises Unusable."""
    names = (columns.content,) if columns.content else (*CONVERSATIONS, *PROMPTS, "text")
    there = [name for name in names if fields.get(name) is not None]
    name = next((name for name in there if fields[name]), "".join(there[:1]))
    if not there:
        wanted = f"column {names[0]!r}" if columns.content else f"text in any of {', '.join(names)}"
        raise Unusable(f"has no {wanted} but {', '.join(map(repr, fields))} (name the right one with --column)")
    value, sample = fields[name], Sample(id="")
    if isinstance(value, str) and (columns.raw or name == "text"):
        sample.text = value
        sample.completion = answer_of(name, fields, columns) if name in PROMPTS or columns.answer else None
    else:
        sample.messages = conversation(value, name, fields, columns)
        sample.tools = tools_of(fields.get("tools"))
    if not any(text.strip() for text in asked(sample)):
        raise Unusable("empty", dropped=True)
    try:
        sample.id = digest(content(sample)).hex()
    except UnicodeEncodeError as error:
        raise Unusable("holds half of a surrogate pair, which is no text") from error
    return sample


def conversation(value: Any, name: str, fields: dict[str, Any], columns: Columns) -> list[Message]:
    """Messages from a list of messages, a list of user turns, or one prompt with its answer if it has one."""
    messages: list[Message] = []
    if isinstance(fields.get("system"), str) and fields["system"].strip():
        messages.append({"role": "system", "content": fields["system"]})
    if isinstance(value, str):
        extra = fields.get("input") if name == "instruction" else None
        messages.append({"role": "user", "content": f"{value}\n\n{extra}" if extra else value})
    elif isinstance(value, list) and all(isinstance(turn, str) for turn in value):
        messages += [{"role": "user", "content": turn} for turn in value]
    elif isinstance(value, list):
        messages += [message(turn, number) for number, turn in enumerate(value, 1)]
    else:
        raise Unusable(f"has {value!r:.40} in {name!r}, which is neither text nor a list of messages")
    if isinstance(value, str) or name in PROMPTS:
        answer = answer_of(name, fields, columns)
        if answer:
            messages.append({"role": "assistant", "content": answer})
    return messages[first_turn(messages) :]


def answer_of(name: str, fields: dict[str, Any], columns: Columns) -> str | None:
    """What a row says was answered to the prompt in column `name`. Raises Unusable for a named column without text."""
    there = (other for other in ANSWERS if other != name and isinstance(fields.get(other), str))
    answer = fields.get(columns.answer or next(there, ""))
    if columns.answer and not isinstance(answer, str):
        raise Unusable(f"has no text in column {columns.answer!r} but {answer!r:.40} (name another with --answer)")
    return answer


def first_turn(messages: list[Message]) -> int:
    """Where a conversation begins: past answers that nothing was asked for. Raises Unusable without a user's turn."""
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        raise Unusable("no user's turn" if roles else "empty", dropped=True)
    return roles.index("user") if roles[0] in ("assistant", "tool") else 0


def message(turn: Any, number: int) -> Message:
    """One message, from OpenAI's or ShareGPT's names; its other fields that have a value stay. Raises Unusable."""
    if not isinstance(turn, dict):
        raise Unusable(f"has {turn!r:.40} as turn {number}, which is no message")
    role = turn.get("role") or turn.get("from")
    role = ROLES.get(str(role).lower(), str(role).lower())
    if role not in KNOWN_ROLES:
        raise Unusable(f"has the role {role!r} in turn {number}; known are {', '.join((*KNOWN_ROLES, *ROLES))}")
    said = turn["content"] if "content" in turn else turn.get("value")
    if isinstance(said, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in said):
            raise Unusable("holds more than text", dropped=True)
        said = "".join(part.get("text") or "" for part in said)
    if said is None and turn.get("tool_calls"):
        said = ""
    if not isinstance(said, str):
        raise Unusable(f"has {said!r:.40} as content of turn {number}, which is no text")
    rest = {k: v for k, v in turn.items() if k not in ("role", "from", "content", "value") and v is not None}
    return {"role": role, "content": said, **rest}


def tools_of(value: Any) -> list[Any] | None:
    """Tool definitions, given as a list or as JSON text. Raises Unusable."""
    try:
        tools = json.loads(value) if isinstance(value, str) and value.strip() else value
    except ValueError as error:
        raise Unusable(f"has tools that are no JSON ({error})") from error
    if tools and not isinstance(tools, list):
        raise Unusable(f"has tools {tools!r:.40} that are no list")
    return tools or None


def asked(sample: Sample) -> list[str]:
    """What was asked: everything but the answers, or the raw text."""
    return [m["content"] for m in sample.messages or () if m["role"] != "assistant"] or [sample.text or ""]


def content(sample: Sample) -> list[Any]:
    """All that makes two samples the same."""
    return [sample.messages, sample.tools, sample.text, sample.completion]


def digest(value: Any) -> bytes:
    """16 bytes that stand for a JSON value. Raises UnicodeEncodeError for broken text."""
    words = json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.blake2b(words.encode("utf-8"), digest_size=16).digest()
