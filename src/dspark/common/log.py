"""What libraries may say on a person's terminal: errors, and the progress of downloads."""

from __future__ import annotations


def quiet_libraries() -> None:
    """No warnings and no bars of `transformers` while local files are read; downloads keep their bars."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    enable_progress_bars()
