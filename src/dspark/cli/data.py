"""`dspark data`: from any data set to the tokens a drafter is trained on."""

from __future__ import annotations

import json as json_
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from dspark.cli.inputs import Template, check_output, template_options
from dspark.cli.regenerate import regenerate

app = typer.Typer(no_args_is_help=True, help="Prepare training data: import, regenerate, tokenize, stats, estimate.")


@app.callback()
def data() -> None:
    """Prepare training data."""


@app.command("import")
def import_(
    sources: Annotated[list[str], typer.Argument(help="Files (.jsonl .json .parquet .txt ...), directories, Hub ids.")],
    out: Annotated[Path, typer.Option(help="The directory to write.")],
    column: Annotated[str, typer.Option(help="Holds the conversation, prompt or text; default: the usual names.")] = "",
    answer: Annotated[str, typer.Option(help="Holds the answer to a prompt; default: the usual names.")] = "",
    raw: Annotated[bool, typer.Option("--raw", help="Strings are raw text, not prompts.")] = False,
    held_out: Annotated[float, typer.Option(help="Share held out, by a hash of what was asked.")] = 0.02,
    seed: Annotated[int, typer.Option(help="Another seed holds out others.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Keep the first N samples.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave bad rows out instead of stopping.")] = False,
    split: Annotated[str, typer.Option(help="Of a Hub data set.")] = "train",
    config: Annotated[str | None, typer.Option(help="Of a Hub data set.")] = None,
) -> None:
    """Bring conversations, prompts or raw text into one layout, each once, split into training and held-out."""
    from itertools import chain

    from dspark.training.ingest import Columns, Division, import_samples
    from dspark.training.sources import read_rows

    division = Division(held_out=held_out, seed=seed, limit=limit)
    rows = chain.from_iterable(read_rows(source, split=split, config=config) for source in sources)
    with counting("rows") as progress:
        record = import_samples(
            rows,
            out,
            columns=Columns(column, answer, raw),
            division=division,
            skip_bad=skip_bad,
            about={"sources": sources},
            progress=progress,
        )
    kept = ", ".join(f"{count:,} in {name}" for name, count in record["samples"].items())
    print(f"{out}: {kept}")
    for reason, count in record["dropped"].items():
        print(f"dropped {count:,}: {reason}")


app.command()(regenerate)


@app.command()
def tokenize(
    source: Annotated[Path, typer.Argument(help="A directory made by `dspark data import` or `regenerate`.")],
    target: Annotated[str, typer.Option(help="The model to train for: directory or Hub id.")],
    out: Annotated[Path, typer.Option(help="The directory to write: train/ and held_out/ inside.")],
    template: Template = None,
    longest: Annotated[int | None, typer.Option(min=2, help="Cut documents at N tokens.")] = None,
) -> None:
    """Spell samples with the target's tokenizer and chat template; the loss is on what the assistant said."""
    from dspark.common.log import quiet_libraries
    from dspark.models.loading import eos_token_ids, load_config, load_generation_config, load_tokenizer
    from dspark.training.tokenizing import tokenize as write_tokens

    quiet_libraries()
    model, tokenizer = load_config(target), load_tokenizer(target)
    with counting("samples") as progress:
        record = write_tokens(
            source,
            out,
            tokenizer,
            model=target,
            vocabulary=max(model.vocab_size, len(tokenizer)),
            ends=eos_token_ids(load_generation_config(target), model, tokenizer),
            options=template_options(template),
            longest=longest,
            progress=progress,
        )
    for name, counts in record["splits"].items():
        share = counts["supervised"] / counts["tokens"]
        print(f"{out / name}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, {share:.0%} supervised")
        for reason in ("without an answer", "cut at the longest", "documents with nothing to learn"):
            if counts.get(reason):
                print(f"  {counts[reason]:,} {reason}")


@app.command()
def stats(
    directory: Annotated[Path, typer.Argument(help="What import, regenerate or tokenize wrote.")],
    json: Annotated[Path | None, typer.Option(help="Write the numbers here too.")] = None,
) -> None:
    """Tokens, lengths and the supervised share."""
    check_output(json)
    from rich.console import Console

    from dspark.training.datastats import statistics

    found = statistics(directory)
    write_json(json, found)
    Console().print(*stats_tables(found), sep="\n")


@app.command()
def estimate(
    tokens: Annotated[Path, typer.Argument(help="What tokenize wrote, or its train/ alone.")],
    target: Annotated[str, typer.Option(help="The model to train for: directory or Hub id.")],
    taps: Annotated[int, typer.Option(min=0, help="Target layers that feed the drafter.")] = 5,
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a sequence, at most: the recipe's length.")] = 4096,
    budget_gb: Annotated[float, typer.Option(min=0.0, help="Keep at most so much on disk; 0 for no bound.")] = 0.0,
    tokens_per_second: Annotated[
        float | None, typer.Option(help="Of the target; default: measured here, which loads it.")
    ] = None,
    disk_gb_per_second: Annotated[float, typer.Option(help="Of the disk the features would lie on.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="Of the target, where it is measured.")] = "auto",
    device: Annotated[str, typer.Option(help="For the target, where it is measured.")] = "auto",
    json: Annotated[Path | None, typer.Option(help="Write the numbers here too.")] = None,
) -> None:
    """What the target's hidden states take in bytes and time, by feature mode, before anything starts."""
    check_output(json)
    from dataclasses import asdict

    from rich.console import Console

    from dspark.common.log import quiet_libraries
    from dspark.models.loading import load_config
    from dspark.training.data import Documents
    from dspark.training.estimate import Counts, Rates, estimates, measured

    quiet_libraries()
    config = load_config(target)
    data = Documents(tokens / "train" if (tokens / "train").is_dir() else tokens, length, length)
    counts = Counts.of(data)
    rates = Rates(tokens_per_second or measured(target, data, dtype=dtype, device=device), disk_gb_per_second * 1e9)
    found = estimates(counts, taps=taps, hidden=config.hidden_size, epochs=epochs, rates=rates, budget=budget_gb * 1e9)
    record = {"counts": asdict(counts), "rates": asdict(rates), "taps": taps, "epochs": epochs}
    write_json(json, record | {"modes": [asdict(mode) for mode in found]})
    Console().print(estimate_table(found, counts, rates, epochs))


def estimate_table(found: list[Any], counts: Any, rates: Any, epochs: int) -> Any:
    """A row for each mode."""
    from rich import box
    from rich.table import Table

    title = (
        f"{counts.tokens:,} tokens ({counts.supervised:,} to learn from), {epochs} epochs; "
        f"target {rates.tokens:,.0f} tokens/s, disk {rates.disk / 1e9:g} GB/s"
    )
    table = Table(
        box=box.SIMPLE_HEAD,
        title=title,
        title_justify="left",
        caption="The drafter's own steps come on top of training.",
    )
    for name in ("features", "on disk", "bytes/token", "first", "training", "together"):
        table.add_column(name, justify="left" if name == "features" else "right")
    for mode in found:
        kept = "" if mode.share == 1 or not mode.bytes else f" ({mode.share:.0%} kept)"
        each = mode.bytes / counts.tokens / (mode.share or 1)
        row = (size(mode.bytes), f"{each:,.0f}", *map(duration, (mode.before, mode.during, mode.seconds)))
        table.add_row(mode.mode + kept, *row)
    return table


def size(count: int) -> str:
    """Bytes as a person says them."""
    for unit, bytes_ in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= bytes_:
            return f"{count / bytes_:.1f} {unit}"
    return f"{count} B"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def stats_tables(found: dict[str, dict[str, Any]]) -> list[Any]:
    """The numbers of all splits side by side, then a row for each spread."""
    from rich import box
    from rich.table import Table

    single, spreads = Table(box=box.SIMPLE_HEAD), Table(box=box.SIMPLE_HEAD)
    single.add_column("")
    spreads.add_column("")
    values: dict[str, dict[str, str]] = {}
    for split, numbers in found.items():
        single.add_column(split, justify="right")
        for key, value in numbers.items():
            label = key.replace("_", " ")
            if isinstance(value, dict) and "mean" in value:
                if not spreads.row_count:
                    for column in value:
                        spreads.add_column(column, justify="right")
                spreads.add_row(f"{label}, {split}", *(f"{number:,.0f}" for number in value.values()))
            else:
                parts = {f"{label}: {k}": v for k, v in value.items()} if isinstance(value, dict) else {label: value}
                for part, number in parts.items():
                    text = f"{number:.1%}" if isinstance(number, float) else f"{number:,}"
                    values.setdefault(part, {})[split] = text
    for label, by_split in values.items():
        single.add_row(label, *(by_split.get(split, "") for split in found))
    return [single, spreads]


def write_json(path: Path | None, value: Any) -> None:
    """Numbers as a JSON file, if one was asked for."""
    if path is not None:
        from dspark.common.files import replacing_file

        with replacing_file(path) as fresh:
            fresh.write_text(json_.dumps(value, indent=1) + "\n", encoding="utf-8")


@contextmanager
def counting(what: str) -> Iterator[Callable[[int], None]]:
    """A line on standard error that shows how many were read, where there is a terminal."""
    from rich.console import Console

    with Console(stderr=True).status("") as status:

        def show(number: int) -> None:
            if number % 256 == 0:
                status.update(f"{number:,} {what}")

        yield show
