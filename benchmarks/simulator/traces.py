"""Requests: how long they are and when they come. What is assumed, and from what, is in README.md, section "Traces"."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

ArrivalKind = Literal["poisson", "bursty"]

MAX_OUTPUT = 2048  # max_tokens of every request; most end before
_PROMPT_MEAN, _PROMPT_SIGMA = 161.31, 1.2
_OUTPUT_MEAN, _OUTPUT_SIGMA = 337.99, 0.8
_LONG_FROM = 4096
_BURSTY_CV = 3.0  # of the times between arrivals; Poisson's is 1


@dataclass(frozen=True, slots=True)
class Trace:
    """A mix of chat and of long documents.

    Attributes:
        name: the paper's number, or "short".
        longest: prompt and max_tokens together, in tokens.
        long_share: of the requests; log-uniform from 4K tokens to ``longest``.
    """

    name: str
    longest: int
    long_share: float


SHORT = Trace("short", 4096 + MAX_OUTPUT, 0.0)
TRACES = (
    Trace("0", 60_000, 0.05),
    Trace("1", 60_000, 0.15),
    Trace("2", 60_000, 0.4),
    Trace("3", 200_000, 0.05),
    Trace("4", 317_000, 0.05),
    Trace("5", 502_000, 0.05),
    Trace("6", 796_000, 0.05),
    Trace("7", 1_262_000, 0.05),
    Trace("8", 2_000_000, 0.05),
)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of one request's prompt, and of the output that it is going to generate."""

    prompt: int
    output: int


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request, at ``time_s``."""

    time_s: float
    lengths: Lengths


def draw_lengths(trace: Trace, rng: random.Random) -> Lengths:
    if rng.random() < trace.long_share:
        prompt = math.exp(rng.uniform(math.log(_LONG_FROM), math.log(trace.longest - MAX_OUTPUT)))
    else:
        prompt = min(_lognormal(rng, _PROMPT_MEAN, _PROMPT_SIGMA), _LONG_FROM)
    output = min(_lognormal(rng, _OUTPUT_MEAN, _OUTPUT_SIGMA), MAX_OUTPUT)
    return Lengths(max(4, int(prompt)), max(2, int(output)))


def arrivals(trace: Trace, rate: float, duration_s: float, kind: ArrivalKind, seed: int) -> list[Arrival]:
    """``rate`` requests a second on average. The sequence of lengths is the same for every rate and kind."""
    lengths = random.Random(f"lengths {trace.name} {seed}")
    times = random.Random(f"times {trace.name} {seed}")
    shape = 1.0 if kind == "poisson" else 1.0 / _BURSTY_CV**2
    answer, now = [], 0.0
    while (now := now + times.gammavariate(shape, 1.0 / (shape * rate))) < duration_s:
        answer.append(Arrival(now, draw_lengths(trace, lengths)))
    return answer


def _lognormal(rng: random.Random, mean: float, sigma: float) -> float:
    return rng.lognormvariate(math.log(mean) - sigma * sigma / 2, sigma)
