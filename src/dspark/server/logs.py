"""The server's log: one line an event on standard error, as text for people or as JSON for machines."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

from dspark.common.errors import UserError

LEVELS = ("critical", "error", "warning", "info", "debug")
FORMATS = ("text", "json")


def configure(level: str, form: str) -> None:
    """Send the logs of this package from `level` on, and other libraries' warnings, to standard error.

    Raises UserError for a level or a form that is not in LEVELS or FORMATS.
    """
    for what, given, known in (("log level", level, LEVELS), ("log format", form, FORMATS)):
        if given not in known:
            raise UserError(f"{what} {given!r} is not known; pass one of {', '.join(known)}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))
    logging.getLogger("dspark").setLevel(level.upper())


def _when(record: logging.LogRecord) -> str:
    """UTC, RFC 3339."""
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03}Z"


class JsonLines(logging.Formatter):
    """An object a line: time, level, logger, message, then the event's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Never more than one line: JSON escapes line ends."""
        told: dict[str, Any] = {
            "time": _when(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str)


class TextLines(logging.Formatter):
    """Time, level, message and the fields as name=value; what a client sent cannot start a line of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """A traceback follows on lines of its own."""
        fields = getattr(record, "fields", {})
        said = record.getMessage().encode("unicode_escape").decode() if not fields else record.getMessage()
        told = [_when(record), record.levelname.lower(), said, *(f"{k}={_plain(v)}" for k, v in fields.items())]
        line = " ".join(told)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _plain(value: Any) -> str:
    text = str(value)
    return text if text.isprintable() and " " not in text and text else json.dumps(value)
