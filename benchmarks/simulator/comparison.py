"""One workload under several policies."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.simulator.cluster import Cluster
from benchmarks.simulator.costs import Rates
from benchmarks.simulator.hardware import Hardware
from benchmarks.simulator.models import ModelShape
from benchmarks.simulator.policies import MAX_BATCH_TOKENS, MAX_NUM_SEQS, ClusterSpec, Policy
from benchmarks.simulator.recorder import Outcome
from benchmarks.simulator.traces import ArrivalKind, Trace, arrivals, draw_lengths

Prompts = Literal["computed", "prefilled"]

SATURATED = 2.0  # of the reference rate: more than can be served
_SAMPLES = 20_000


@dataclass(frozen=True, slots=True)
class Workload:
    """What comes, and for how long it is watched.

    Attributes:
        devices: of the whole cluster.
        prompts: "computed": they come with their KV cache, only decoding is simulated; "prefilled": all of it is.
        load: requests a second, as a multiple of ``reference_rate``.
        duration_s: the first two fifths are warm-up.
    """

    model: ModelShape
    trace: Trace
    hardware: Hardware
    devices: int
    prompts: Prompts
    load: float
    duration_s: float
    arrivals: ArrivalKind = "poisson"
    seed: int = 1
    max_num_seqs: int = MAX_NUM_SEQS

    @property
    def warmup_s(self) -> float:
        return 0.4 * self.duration_s

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.load * reference_rate(self.model, self.trace, self.hardware, self.devices, self.prompts)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Outcomes of one workload, in the order of the policies."""

    workload: Workload
    rate: float
    outcomes: tuple[tuple[Policy, Outcome], ...]

    def of(self, policy: Policy) -> Outcome | None:
        return next((outcome for known, outcome in self.outcomes if known == policy), None)

    def ratio(self, policy: Policy, other: Policy) -> float | None:
        """Of output tokens per second; None where one of them was not simulated."""
        ours, theirs = self.of(policy), self.of(other)
        if ours is None or theirs is None or not theirs.tokens_per_s:
            return None
        return ours.tokens_per_s / theirs.tokens_per_s


def reference_rate(model: ModelShape, trace: Trace, hardware: Hardware, devices: int, prompts: Prompts) -> float:
    """Requests a second of a cluster that wastes nothing: every instance's memory full of requests of mean length,
    every device at work all the time. A yardstick for loads, from formulas alone; nothing simulated goes into it."""
    rng = random.Random(f"reference {trace.name}")
    samples = [draw_lengths(trace, rng) for _ in range(_SAMPLES)]
    output = sum(sample.output for sample in samples) / _SAMPLES
    context = sum(sample.prompt + sample.output / 2 for sample in samples) / _SAMPLES
    rates = Rates.of(model, hardware, model.devices)
    batch = min(float(MAX_NUM_SEQS), rates.kv_tokens / context)
    step_s = rates.other_s(int(batch)) + rates.attention_s + batch * context * rates.context_token_s
    request_s = output * step_s / batch
    if prompts == "prefilled":
        request_s += sum(rates.prefill_s(sample.prompt, MAX_BATCH_TOKENS) for sample in samples) / _SAMPLES
    return devices // model.devices / request_s


def simulated(workload: Workload, policy: Policy) -> Cluster:
    """The cluster of a workload, before its first event."""
    spec = ClusterSpec(
        policy,
        workload.model,
        workload.hardware,
        workload.devices,
        workload.prompts == "computed",
        workload.seed,
        workload.max_num_seqs,
    )
    requests = arrivals(workload.trace, workload.rate, workload.duration_s, workload.arrivals, workload.seed)
    return Cluster(spec, requests, workload.warmup_s)


def compare(workload: Workload, policies: Sequence[Policy], say: Callable[[str], None]) -> Comparison:
    """Every policy meets the same requests at the same times."""
    outcomes = []
    for policy in policies:
        say(f"{workload.devices} {workload.model.name} trace {workload.trace.name} {workload.prompts}: {policy.name}")
        outcomes.append((policy, simulated(workload, policy).run(workload.duration_s)))
    return Comparison(workload, workload.rate, tuple(outcomes))
