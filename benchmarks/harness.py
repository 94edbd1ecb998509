"""The frame of every benchmark: arguments, progress, alternating repetitions, the table and the JSON file.

A benchmark is a module with a function that measures and records into a ``Run``:

    def measure(run: Run) -> None:
        results = run.alternate([Peer("local", local_step), Peer("remote", remote_step)], repetitions=9)
        for name, samples in results.items():
            run.row({"placement": name, "step_ms": samples.median, "spread_ms": samples.spread})
        run.summary("slowdown", results["remote"].median / results["local"].median)
        run.target("slowdown", results["remote"].median / results["local"].median, at_most=1.2)

    if __name__ == "__main__":
        sys.exit(main("placement", "What does a remote block cost?", measure))

The table goes to stdout, progress to stderr, and ``--json FILE`` receives

    {"name", "machine", "commit", "rows": [...], "summary": {name: number}, "targets": {name: {"value", "goal", "ok"}}}
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, TypeVar

from benchmarks.machine import current_commit, describe_machine

CONFIDENCE = 0.95  # of intervals

Cell = str | int | float
Row = Mapping[str, Cell]
P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class Samples:
    """What one peer measured, in the order it was measured."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Largest minus smallest, in the unit of the values: says what a difference of medians is worth."""
        return max(self.values) - min(self.values)


@dataclass(frozen=True, slots=True)
class Ratio:
    """How the speeds of two peers relate: in each repetition the one is compared with the other."""

    values: tuple[float, ...]

    @staticmethod
    def of_speeds(peer: Samples, other: Samples, work: float = 1.0) -> Ratio:
        """Speed of ``peer`` in units of ``other``'s, from seconds; ``work`` says how many times as much it does."""
        return Ratio(tuple(work * theirs / own for own, theirs in zip(peer.values, other.values, strict=True)))

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def interval(self) -> tuple[float, float]:
        """Where the true median lies with a probability of 95 %, from the values' order alone, whatever they are drawn
        from (H. A. David, H. N. Nagaraja, Order Statistics, section 7.1). Of fewer than six values it is the smallest
        and the largest, which are less certain.
        """
        count, ordered = len(self.values), sorted(self.values)
        cut, beyond = 0, 0.5**count  # values left off at either end; the chance that the median lies beyond one of them
        while 2 * (wider := beyond + math.comb(count, cut + 1) * 0.5**count) <= 1 - CONFIDENCE:
            cut, beyond = cut + 1, wider
        return ordered[cut], ordered[count - 1 - cut]

    def cells(self, name: str) -> dict[str, float]:
        return {name: self.median, f"{name}_min": min(self.values), f"{name}_max": max(self.values)}


@dataclass(frozen=True, slots=True)
class Peer:
    """One of the things that are compared: each call of ``measure`` answers one sample (seconds, say)."""

    name: str
    measure: Callable[[], float]


@dataclass(frozen=True, slots=True)
class Round:
    """Every peer has its turn once. Rounds below 0 are warm-up."""

    number: int
    repetitions: int

    @property
    def recorded(self) -> bool:
        return self.number >= 0

    @property
    def label(self) -> str:
        return f"repetition {self.number + 1}/{self.repetitions}" if self.recorded else "warm-up"

    def order(self, peers: Sequence[P]) -> Sequence[P]:
        """Every second round goes backwards: no peer always follows the same other."""
        return peers if self.number % 2 == 0 else peers[::-1]


@dataclass(frozen=True, slots=True)
class Target:
    """A value that is to reach a goal."""

    value: float
    goal: float
    at_least: bool

    @property
    def ok(self) -> bool:
        return self.value >= self.goal if self.at_least else self.value <= self.goal


class Progress:
    """One line on a terminal, rewritten at each update; one line for each update elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._rewrite = stream.isatty()
        self._start = time.monotonic()

    def update(self, text: str) -> None:
        line = f"[{time.monotonic() - self._start:6.1f} s] {text}"
        self._stream.write(f"\r\x1b[K{line}" if self._rewrite else f"{line}\n")
        self._stream.flush()

    def clear(self) -> None:
        """Ends with an empty line, so that what is printed next does not stand behind the last update."""
        if self._rewrite:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


class Run:
    """One run of a benchmark: what it was asked for and what it recorded.

    Attributes:
        options: the parsed command line, the benchmark's own arguments included.
        quick: measure less, for a smoke test; the numbers need not be good.
    """

    def __init__(self, name: str, options: argparse.Namespace, progress: Progress) -> None:
        self.name = name
        self.options = options
        self.quick: bool = options.quick
        self.progress = progress
        self._rows: list[Row] = []
        self._summary: dict[str, float] = {}
        self._targets: dict[str, Target] = {}

    def row(self, row: Row) -> None:
        """Adds one line of the table."""
        self._rows.append(dict(row))

    def summary(self, name: str, value: float) -> None:
        """Records one of the numbers that answer the benchmark's question."""
        self._summary[name] = value

    def target(self, name: str, value: float, *, at_least: float | None = None, at_most: float | None = None) -> None:
        """Records a value with its goal; exactly one of ``at_least`` and ``at_most`` is given."""
        goal = at_most if at_least is None else at_least
        if goal is None or (at_least is not None and at_most is not None):
            raise ValueError(f"target {name!r} needs either at_least or at_most")
        self._targets[name] = Target(value, goal, at_least is not None)

    def rounds(self, repetitions: int, warmup: int = 1) -> Iterator[Round]:
        """The rounds of a measurement: warm-up first. With ``--quick`` there are at most two repetitions."""
        if self.quick:
            repetitions, warmup = min(repetitions, 2), min(warmup, 1)
        for number in range(-warmup, repetitions):
            yield Round(number, repetitions)

    def alternate(self, peers: Sequence[Peer], repetitions: int, warmup: int = 1) -> dict[str, Samples]:
        """Measures peers in turn, so that whatever drifts in the machine meets all of them alike.

        See ``rounds`` and ``Round.order``. Warm-up rounds are not recorded.
        """
        values: dict[str, list[float]] = {peer.name: [] for peer in peers}
        if len(values) < len(peers):
            raise ValueError(f"peers need distinct names, got {[peer.name for peer in peers]}")
        for turn in self.rounds(repetitions, warmup):
            for peer in turn.order(peers):
                self.progress.update(f"{turn.label}: {peer.name}")
                value = peer.measure()
                if turn.recorded:
                    values[peer.name].append(value)
        return {name: Samples(tuple(measured)) for name, measured in values.items()}

    def result(self) -> dict[str, object]:
        """The JSON file's contents. A number that is not finite becomes null."""
        return {
            "name": self.name,
            "machine": describe_machine(),
            "commit": current_commit(),
            "rows": [{column: _json_cell(cell) for column, cell in row.items()} for row in self._rows],
            "summary": {name: _json_cell(value) for name, value in self._summary.items()},
            "targets": {
                name: {"value": _json_cell(target.value), "goal": target.goal, "ok": target.ok}
                for name, target in self._targets.items()
            },
        }

    def report(self) -> str:
        """The table, the summary and the targets as text."""
        parts = [format_table(self._rows)] if self._rows else []
        if self._summary:
            parts.append(format_table([{"summary": name, "value": value} for name, value in self._summary.items()]))
        if self._targets:
            parts.append(
                format_table(
                    [
                        {
                            "target": name,
                            "value": target.value,
                            "goal": f"{'>=' if target.at_least else '<='} {_text(target.goal)}",
                            "": "ok" if target.ok else "missed",
                        }
                        for name, target in self._targets.items()
                    ]
                )
            )
        return "\n\n".join(parts)


def main(
    name: str,
    question: str,
    measure: Callable[[Run], None],
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    arguments: Sequence[str] | None = None,
) -> int:
    """Runs a benchmark from the command line; answers the exit code.

    A missed target is a result, not a failure: the exit code is 0 whenever the measurement ran to its end.

    Args:
        question: what the benchmark answers, shown by ``--help`` and above the table.
        add_arguments: adds the benchmark's own arguments, found in ``Run.options`` later.
        arguments: the command line; None means the process's own.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=question)
    parser.add_argument("--quick", action="store_true", help="measure less: shows that it runs, not how fast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there as well")
    if add_arguments is not None:
        add_arguments(parser)
    options = parser.parse_args(arguments)
    progress = Progress(sys.stderr)
    run = Run(name, options, progress)
    # What a benchmark has started is ended on the way out.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        measure(run)
    finally:
        signal.signal(signal.SIGTERM, before)
        progress.clear()
    print(f"{name}: {question}\n\n{run.report()}")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(run.result(), indent=2, allow_nan=False) + "\n")
    return 0


def format_table(rows: Sequence[Row]) -> str:
    """Columns in the order they first appear; numbers stand right and are rounded to four digits."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[_text(row.get(column, "")) for column in columns] for row in rows]
    numeric = [all(not isinstance(row.get(column, 0), str) for row in rows) for column in columns]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]

    def line(texts: Sequence[str]) -> str:
        padded = (
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(texts, widths, numeric, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(columns), line(["-" * width for width in widths]), *map(line, cells)])


def _text(cell: Cell) -> str:
    if not isinstance(cell, float):
        return str(cell)
    if math.isfinite(cell) and abs(cell) >= 1000:
        return f"{cell:.0f}"
    return f"{cell:.4g}"


def _json_cell(cell: Cell) -> Cell | None:
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell
