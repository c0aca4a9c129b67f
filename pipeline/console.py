"""What the command prints: aligned tables, one JSON object, one line of error. Text from outside is made harmless first.

File names, image ids and messages about them are written by whoever made the data: they can hold terminal control
sequences, newlines and 10 kB of anything.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

MAX_TEXT = 2000
_JOINER = "\u200d"
"""The zero-width joiner, without which several scripts and many emoji fall apart."""

READER_GONE = 141
"""Exit code when whoever read our output went away, as the shell has it for SIGPIPE."""


def plain(text: object, limit: int = MAX_TEXT) -> str:
    """`text` on one line with every character that moves the cursor, colours, reorders or hides text written as an escape."""
    value = str(text)
    if len(value) > limit:
        value = f"{value[:limit]}... ({len(value)} characters)"
    if value.isprintable():  # excludes control, format, surrogate, private and unassigned characters
        return value
    return "".join(c if c.isprintable() or c == _JOINER else c.encode("unicode_escape").decode("ascii") for c in value)


def write_line(text: str = "") -> None:
    """Write one line to standard output; text from outside goes through `plain` first."""
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        _reader_gone()


def write_json(value: Any) -> None:
    """Write exactly one JSON object to standard output; ASCII, so that no byte of it can act on a terminal."""
    write_line(json.dumps(value, indent=2, allow_nan=False))


def write_error(message: str) -> None:
    """Write one line 'error: ...' to standard error."""
    try:
        sys.stderr.write(f"error: {plain(message)}\n")
        sys.stderr.flush()
    except BrokenPipeError:
        _reader_gone()


def write_table(rows: Sequence[Sequence[object]], header: Sequence[str] | None = None) -> None:
    """Write rows aligned in columns; numbers to the right. Folds long cells on a terminal, never cuts them."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=header is not None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    width = max((len(row) for row in rows), default=0)
    for number in range(width):
        numeric = all(isinstance(row[number], (int, float)) for row in rows)
        title = header[number] if header else ""
        table.add_column(title, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_number(cell) if isinstance(cell, (int, float)) else plain(cell)) for cell in row))
    # A log or a pipe has no width, so nothing is folded there.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else MAX_TEXT * 4)
    try:
        with console.capture() as captured:
            console.print(table)
        for line in captured.get().splitlines():
            sys.stdout.write(f"{line.rstrip()}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        _reader_gone()


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _reader_gone() -> NoReturn:
    """Nobody reads any more: point both streams at nothing, so that the interpreter's last flush is quiet, and leave."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
    raise SystemExit(READER_GONE)


class _OneLine(logging.Formatter):
    """The message alone on one harmless line; a warning says that it is one."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        text = prefix + plain(record.getMessage())
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class LineHandler(logging.StreamHandler[Any]):
    """Log lines on standard error that do not run into the live progress line: it is wiped first and comes back."""

    live = False

    def emit(self, record: logging.LogRecord) -> None:
        if self.live:
            self.stream.write("\r\x1b[K")
        super().emit(record)


LOG = LineHandler()

PACKAGES = ("manifests", "tokenize_stage", "train_stage", "pipeline")
"""Whose messages a command shows."""


def set_up_streams() -> None:
    """Log the project's own messages to standard error, and let no unprintable character end the command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    LOG.stream = sys.stderr  # not setStream, which flushes the one before: a line is flushed as it is written
    LOG.setFormatter(_OneLine())
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        if LOG not in logger.handlers:
            logger.addHandler(LOG)
