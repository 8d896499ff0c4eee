"""What a person's terminal shows beside results: libraries' errors, progress of downloads, what is waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console


def quiet_libraries() -> None:
    """No warnings and no bars of `transformers` while local files are read; downloads keep their bars."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    enable_progress_bars()


@contextmanager
def seconds_of(console: Console, what: str) -> Iterator[Callable[[float], None]]:
    """While the context is open, every call with the seconds waited so far shows them after `what`."""
    with console.status("") as status:
        yield lambda seconds: status.update(f"{what}: {seconds:.0f} s")
