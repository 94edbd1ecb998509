"""How long a step of one instance takes, with what it asks of others and what others ask of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.simulator.costs import POST_S, QUERY_S, Link, Rates, answer_s
from benchmarks.simulator.sequence import SimulatedSequence
from services.core.timings import HostingTiming, RemoteTiming, StepTiming

_MOST_HOSTING = 0.95  # of a device's time: what is left moves on, however slowly
_MOST_WAITING = 0.9  # share of a device's time that a query finds taken by other queries
_MOST_KINDS = 8  # of steps between two heartbeats, as in services.instance.step_timings


@dataclass(slots=True)
class Device:
    """What an instance's devices compute for others: the daemon's side.

    Attributes:
        hosting: share of their time, by debtor.
        busy: the sum.
        answered: messages, context tokens and seconds since the last heartbeat.
    """

    rates: Rates
    hosting: dict[int, float] = field(default_factory=dict)
    busy: float = 0.0
    answered: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def host(self, debtor: int, share: float) -> None:
        """From now on; 0 ends it."""
        self.busy = max(0.0, self.busy + share - self.hosting.get(debtor, 0.0))
        if share:
            self.hosting[debtor] = share
        else:
            self.hosting.pop(debtor, None)

    def busy_for_others(self, debtor: int) -> float:
        return min(_MOST_WAITING, max(0.0, self.busy - self.hosting.get(debtor, 0.0)))

    def answer(self, messages: float, part: Part, steps: int) -> None:
        """Steps of a debtor are over; queries with prefill rows are not told of."""
        if not part.prefill_rows:
            so_far = self.answered
            self.answered = (
                so_far[0] + messages * steps,
                so_far[1] + part.context_tokens * steps,
                so_far[2] + part.computing_s * steps,
            )

    def drain(self, noise: float) -> tuple[HostingTiming, ...]:
        """For a heartbeat; ``noise``: a factor on the time."""
        messages, context_tokens, computing_s = self.answered
        self.answered = (0.0, 0.0, 0.0)
        return (HostingTiming(messages, context_tokens, computing_s * noise),) if messages else ()


@dataclass(slots=True)
class Part:
    """What one daemon computes in a step: rows of decoding requests and of prefill, context read, pairs computed."""

    rows: int = 0
    prefill_rows: int = 0
    context_tokens: int = 0
    pairs: float = 0.0
    computing_s: float = 0.0
    answer_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Work:
    """One of ``steps`` equal steps.

    Attributes:
        step_s: its time.
        attention_s, local_attention_s: of it, as an instance would measure them.
        parts: by instance whose daemon computes.
    """

    steps: int
    batch_tokens: int
    prefill_tokens: int
    local_context_tokens: int
    step_s: float
    attention_s: float
    local_attention_s: float
    parts: dict[int, Part]


def work(
    batch: Sequence[tuple[SimulatedSequence, int]],
    steps: int,
    block_tokens: int,
    index: int,
    devices: Sequence[Device],
    links: Sequence[Link],
) -> Work:
    """``steps`` alike of the instance ``index``, whose ``links`` lead to every other one.

    Args:
        batch: sequences, each with the tokens that a step computes.
    """
    tokens = prefill = context = 0
    pairs = 0.0
    parts: dict[int, Part] = {}
    for sequence, count in batch:
        tokens += count
        away = sequence.away_tokens(block_tokens) if sequence.remote else 0
        if count == 1:
            context += sequence.computed + steps // 2 - away
        else:
            prefill += count
            pairs += count * (sequence.computed - away + count / 2)
        for lender, blocks in sequence.remote.items() if away else ():
            part = parts.get(lender)
            if part is None:
                part = parts[lender] = Part()
            there = blocks * away // sequence.away
            if count == 1:
                part.rows += 1
                part.context_tokens += there
            else:
                part.prefill_rows += count
                part.pairs += count * there
    own = devices[index]
    rates = own.rates
    # What others take of the device makes its computing longer, and not the time in which it waits for answers.
    stretch = 1.0 / (1.0 - min(own.busy, _MOST_HOSTING))
    local_s = (rates.attention_s + rates.compute_s(context, pairs)) * stretch
    longest_s = sent_s = 0.0
    for lender, part in parts.items():
        device, link, rows = devices[lender], links[lender], part.rows + part.prefill_rows
        part.computing_s = rates.layers * QUERY_S + device.rates.compute_s(part.context_tokens, part.pairs)
        waiting = 1.0 - device.busy_for_others(index)
        part.answer_s = answer_s(rates, device.rates, link, rows, part.computing_s / waiting)
        longest_s = max(longest_s, part.answer_s)
        sent_s += rates.sending_s(link, rows)
    attention_s = max(local_s, longest_s, sent_s) + POST_S * rates.layers * len(parts)
    return Work(
        steps,
        tokens,
        prefill,
        context,
        rates.other_s(tokens) * stretch + attention_s,
        attention_s,
        local_s,
        parts,
    )


@dataclass(slots=True)
class _Sum:
    """Steps that are alike."""

    steps: int = 0
    batch_tokens: int = 0
    prefill_tokens: int = 0
    local_context_tokens: int = 0
    step_s: float = 0.0
    attention_s: float = 0.0
    local_attention_s: float = 0.0
    parts: dict[int, tuple[int, int, float, int]] = field(default_factory=dict)  # rows, context, answer, late


class Timings:
    """What an instance tells with its heartbeats, as ``services.instance.step_timings`` makes it."""

    def __init__(self) -> None:
        self._sums: dict[tuple[bool, frozenset[int]], _Sum] = {}

    def add(self, done: Work) -> None:
        kind = (done.prefill_tokens > 0, frozenset(done.parts))
        total = self._sums.get(kind)
        if total is None:
            if len(self._sums) == _MOST_KINDS:
                return
            total = self._sums[kind] = _Sum()
        steps = done.steps
        total.steps += steps
        total.batch_tokens += steps * done.batch_tokens
        total.prefill_tokens += steps * done.prefill_tokens
        total.local_context_tokens += steps * done.local_context_tokens
        total.step_s += steps * done.step_s
        total.attention_s += steps * done.attention_s
        total.local_attention_s += steps * done.local_attention_s
        for lender, part in done.parts.items():
            late = steps * (part.answer_s > done.local_attention_s)
            seen_s = max(part.answer_s, done.local_attention_s)  # nobody looks before local attention is done
            rows, context, seconds, lates = total.parts.get(lender, (0, 0, 0.0, 0))
            total.parts[lender] = (
                rows + steps * (part.rows + part.prefill_rows),
                context + steps * part.context_tokens,
                seconds + steps * seen_s,
                lates + late,
            )

    def drain(self, layers: int, kvdaemons: Sequence[str], noise: float) -> tuple[StepTiming, ...]:
        """Means since the last call, those alike together; ``noise``: a factor on all times."""
        taken, self._sums = self._sums, {}
        return tuple(_mean(total, layers, kvdaemons, noise) for total in taken.values())


def _mean(total: _Sum, layers: int, kvdaemons: Sequence[str], noise: float) -> StepTiming:
    share = 1.0 / total.steps
    return StepTiming(
        total.batch_tokens * share,
        total.prefill_tokens * share,
        total.local_context_tokens * share,
        total.step_s * share * noise,
        total.attention_s * share * noise,
        total.local_attention_s * share * noise,
        tuple(
            RemoteTiming(
                kvdaemons[lender], layers, rows * share, context * share, seconds * share * noise, late * share
            )
            for lender, (rows, context, seconds, late) in total.parts.items()
        ),
        total.steps,
    )
