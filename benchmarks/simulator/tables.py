"""What is simulated for ``--all``, and how it stands beside what the paper has published."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.harness import Cell, Run
from benchmarks.simulator.comparison import SATURATED, Comparison, Prompts, Workload
from benchmarks.simulator.hardware import A100
from benchmarks.simulator.models import MODELS
from benchmarks.simulator.policies import OURS, POLICIES, VLLM_MULTI, VLLM_SINGLE
from benchmarks.simulator.recorder import Outcome
from benchmarks.simulator.traces import SHORT, TRACES

PAPER_DEVICES, MANY_DEVICES = 32, 1000
PAPER_MODELS = MODELS[:3]
PUBLISHED_OVER_MULTI = (1.35, 1.73)  # traces 0-2
PUBLISHED_OVER_SINGLE = (1.4, 3.4)  # traces 3-8
PUBLISHED_SHORT_OVER_SINGLE = (1.4, 5.3)
MODERATE = 0.7  # of the reference rate
_MULTI_TRACES = ("0", "1", "2")
# Long enough for many times the life of a request; the more requests a second, the fewer seconds tell as much.
_DURATION_S: dict[Prompts, float] = {"computed": 120.0, "prefilled": 400.0}
_SHORTER_S = {"short": 40.0, "0": 60.0, "1": 100.0}
_MODERATE_TRACES = ("0", "2", "5")
_MANY_DURATION_S = 30.0
_MANY_TRACES = ("2", "8")
_MANY_MODELS = PAPER_MODELS[2:]  # a thousand instances of one device each take too long, see README.md


def paper_cluster() -> Iterator[Workload]:
    """The paper's cluster: 32 A100 at saturation, all traces and models; some at moderate load, for the latencies."""
    tables: tuple[tuple[Prompts, float], ...] = (
        ("computed", SATURATED),
        ("prefilled", SATURATED),
        ("prefilled", MODERATE),
    )
    for kind, load in tables:
        for model in PAPER_MODELS:
            for trace in (SHORT, *TRACES):
                if load == MODERATE and trace.name not in _MODERATE_TRACES:
                    continue
                duration_s = _SHORTER_S.get(trace.name, _DURATION_S[kind])
                yield Workload(model, trace, A100, PAPER_DEVICES, kind, load, duration_s)


def large_cluster() -> Iterator[Workload]:
    """A thousand A100 at saturation."""
    for model in _MANY_MODELS:
        for trace in TRACES:
            if trace.name in _MANY_TRACES:
                yield Workload(model, trace, A100, MANY_DEVICES, "computed", SATURATED, _MANY_DURATION_S)


def row(comparison: Comparison) -> dict[str, Cell]:
    """One line: throughputs side by side, ratios beside the published ones, and what explains them."""
    workload = comparison.workload
    answer: dict[str, Cell] = {
        "gpus": workload.devices,
        "model": workload.model.name,
        "trace": workload.trace.name,
        "longest": workload.trace.longest,
        "prompts": workload.prompts,
        "load": workload.load,
        "requests_per_s": comparison.rate,
    }
    for policy, outcome in comparison.outcomes:
        answer[f"{policy.name}_tokens_per_s"] = outcome.tokens_per_s
    for name, other in (("ours/multi", VLLM_MULTI), ("ours/single", VLLM_SINGLE)):
        ratio = comparison.ratio(OURS, other)
        if ratio is not None:
            answer[name] = ratio
    answer["published"] = _published(workload.trace.name)
    for policy, outcome in comparison.outcomes:
        answer.update(_details(policy.name, outcome))
    return answer


def judge(run: Run, comparisons: Sequence[Comparison]) -> None:
    """Worst ratios of each model against the published ranges, at saturation."""
    saturated = [c for c in comparisons if c.workload.load == SATURATED and {p for p, _ in c.outcomes} >= {*POLICIES}]
    for key in sorted({(c.workload.devices, c.workload.prompts, c.workload.model.name) for c in saturated}):
        devices, prompts, model = key
        of_model = [c for c in saturated if (c.workload.devices, c.workload.prompts, c.workload.model.name) == key]
        names = f"{devices} {model} {prompts}"
        ratios = {c.workload.trace.name: (c.ratio(OURS, VLLM_MULTI), c.ratio(OURS, VLLM_SINGLE)) for c in of_model}
        multi = [ratio for name, (ratio, _) in ratios.items() if name in _MULTI_TRACES and ratio is not None]
        single = [
            ratio for name, (_, ratio) in ratios.items() if name not in (*_MULTI_TRACES, "short") and ratio is not None
        ]
        if multi:
            run.target(f"{names}: ours/multi, traces 0-2, least", min(multi), at_least=PUBLISHED_OVER_MULTI[0])
            run.summary(f"{names}: ours/multi, traces 0-2, most", max(multi))
        if single:
            run.target(f"{names}: ours/single, traces 3-8, least", min(single), at_least=PUBLISHED_OVER_SINGLE[0])
            run.summary(f"{names}: ours/single, traces 3-8, most", max(single))
        for ratio, over in zip(ratios.get("short", ()), ("multi", "single"), strict=False):
            if ratio is not None:
                run.target(f"{names}: ours/{over}, short", ratio, at_least=1.0)


def _published(trace: str) -> str:
    if trace == "short":
        return "{} to {} over single".format(*PUBLISHED_SHORT_OVER_SINGLE)
    if trace in _MULTI_TRACES:
        return "{} to {} over multi".format(*PUBLISHED_OVER_MULTI)
    return "{} to {} over single".format(*PUBLISHED_OVER_SINGLE)


def _details(name: str, outcome: Outcome) -> dict[str, Cell]:
    return {
        f"{name}_refused": outcome.refused,
        f"{name}_preempted": outcome.preempted,
        f"{name}_used": outcome.used_share,
        f"{name}_remote": outcome.remote_share,
        f"{name}_moves": outcome.moves,
        f"{name}_step_error": outcome.step_error,
        f"{name}_ttft_p50_s": outcome.ttft_s[0],
        f"{name}_ttft_p99_s": outcome.ttft_s[1],
        f"{name}_tpot_p50_ms": 1e3 * outcome.tpot_s[0],
        f"{name}_tpot_p99_ms": 1e3 * outcome.tpot_s[1],
    }
