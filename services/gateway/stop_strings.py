"""Ends a text before one of some strings, however it is spread over tokens."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """A text that comes piece by piece and ends at the first stop string in it.

    Args:
        stops: none of them empty.
        include: whether the stop string itself belongs to the text.

    Attributes:
        found: the text is at its end.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""  # may be the beginning of a stop string
        self.found = False

    def push(self, piece: str, counts: bool = True) -> str:
        """What may be shown now. ``counts``: whether a stop string that ends in this piece ends the text."""
        if not self._stops:
            return piece
        text, self._held = self._held + piece, ""
        if not counts:
            return text
        first = min(((text.find(stop), stop) for stop in self._stops if stop in text), default=None)
        if first is not None:
            at, stop = first
            self.found = True
            return text[: at + len(stop)] if self._include else text[:at]
        held = self._beginning_at_end(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What is still held back where nothing comes any more."""
        held, self._held = self._held, ""
        return held

    def _beginning_at_end(self, text: str) -> int:
        """Length of the longest end of a text with which a stop string begins."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        return next(
            (n for n in range(longest, 0, -1) if any(stop.startswith(text[len(text) - n :]) for stop in self._stops)), 0
        )
