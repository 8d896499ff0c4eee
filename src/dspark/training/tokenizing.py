"""`dspark data tokenize`: samples become the token documents that training reads, one directory a split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dspark.common.errors import UserError
from dspark.common.files import replacing_directory
from dspark.training.data import Document, write_documents
from dspark.training.samples import Sample, check_replaceable, read_about, read_samples, splits_of, write_about
from dspark.training.spans import Page, Speller

FORMAT = "dspark tokens 1"
TOGETHER = 256  # samples tokenized in one call


def tokenize(
    source: str | Path,
    out: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model: str,
    vocabulary: int,
    ends: Iterable[int] = (),
    options: Mapping[str, Any] | None = None,
    longest: int | None = None,
    progress: Callable[[int], None] = lambda samples: None,
) -> dict[str, Any]:
    """Write `out`/train and `out`/held_out, whole or not at all; returns what about.json says.

    `options` go to the chat template, over those the answers were written under; a document is cut at `longest`
    tokens. Raises UserError for a template that cannot be spanned and where a split has nothing to learn.
    """
    check_replaceable(out)
    splits, about = splits_of(source), read_about(source)
    template = {**about.get("template", {}), **(options or {})}
    speller = Speller(tokenizer, ends=ends, options=template)
    record: dict[str, Any] = {"format": FORMAT, "model": model, "source": str(source), "template": template}
    record |= {"longest": longest, "splits": {}}
    done = 0
    with replacing_directory(out) as fresh:
        for split in splits:
            counts: Counter[str] = Counter()
            documents = spelled(speller, counted(read_samples(source, split), progress, done), longest, counts)
            tokens = write_documents(fresh / split, documents, vocabulary=vocabulary)
            done += counts["samples"]
            record["splits"][split] = {"tokens": tokens, **counts}
        write_about(fresh, record)
    return record


def counted(samples: Iterable[Sample], progress: Callable[[int], None], start: int) -> Iterator[Sample]:
    """The samples, each reported."""
    for number, sample in enumerate(samples, start + 1):
        progress(number)
        yield sample


def spelled(
    speller: Speller, samples: Iterable[Sample], longest: int | None, counts: Counter[str]
) -> Iterator[Document]:
    """The documents of samples; `counts` is filled on the way. Raises UserError where there are none."""
    source = iter(samples)
    while together := list(islice(source, TOGETHER)):
        pages: list[Page] = []
        for sample in together:
            found = named(speller, sample)
            counts["without an answer"] += not found
            pages += found
        counts["samples"] += len(together)
        for ids, mask in speller.documents(pages):
            counts["cut at the longest"] += longest is not None and len(ids) > longest
            ids, mask = ids[:longest], mask[:longest]
            if any(mask):
                counts["documents"] += 1
                counts["supervised"] += sum(mask)
                yield ids, mask
            else:
                counts["documents with nothing to learn"] += 1
    if not counts["documents"]:
        raise UserError(
            f"none of {counts['samples']} samples has an answer to learn; let the target write them "
            "(`dspark data regenerate`)"
        )


def named(speller: Speller, sample: Sample) -> list[Page]:
    """The sample's pages; an error names the sample."""
    try:
        return speller.pages(sample)
    except UserError as error:
        raise UserError(f"sample {sample.id}: {error}") from error
