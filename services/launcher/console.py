"""What the launcher tells the person who started it: lines that stay, and one status line that changes."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from typing import TextIO

# Without a terminal the status line is printed anew, this often.
_PLAIN_INTERVAL_S = 5.0


class Console:
    """Writes to one stream."""

    def __init__(self, stream: TextIO = sys.stdout) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._status = ""
        self._printed_at = 0.0

    def line(self, text: str = "") -> None:
        """A line that stays."""
        self.clear()
        print(text, file=self._stream, flush=True)

    def status(self, text: str) -> None:
        """Replaces the status line."""
        if self._terminal:
            text = text[: shutil.get_terminal_size().columns - 1]  # a line that wraps could not be replaced
            padding = " " * max(0, len(self._status) - len(text))
            print(f"\r{text}{padding}", end="", file=self._stream, flush=True)
            self._status = text
        elif time.monotonic() - self._printed_at >= _PLAIN_INTERVAL_S:
            self._printed_at = time.monotonic()
            print(text, file=self._stream, flush=True)

    def clear(self) -> None:
        """Wipes the status line."""
        if self._status:
            print("\r" + " " * len(self._status) + "\r", end="", file=self._stream, flush=True)
            self._status = ""

    def write(self, text: str) -> None:
        """Text without a line's end, for an answer that streams in."""
        print(text, end="", file=self._stream, flush=True)


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Columns of equal width; numbers to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    numeric = [all(row[column].replace(".", "").isdigit() for row in rows) for column in range(len(header))]

    def text(row: tuple[str, ...]) -> str:
        cells = zip(row, widths, numeric, strict=True)
        return "  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells).rstrip()

    return "\n".join(text(row) for row in [header, *rows])
