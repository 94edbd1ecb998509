"""How much does pooled memory give on clusters that are not at hand?

    python -m benchmarks.simulator [--all [--cluster paper|large ...]] [--model NAME ...] [--trace NAME ...]
        [--policy NAME ...] [--hardware NAME] [--gpus N] [--prompts computed|prefilled] [--arrivals poisson|bursty]
        [--load X] [--seconds S] [--seed N] [--max-num-seqs N] [--plots DIR] [--quick] [--json FILE]

``--all`` simulates the paper's cluster and one of a thousand GPUs, and holds the ratios against the published ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.harness import Run, main
from benchmarks.simulator.comparison import SATURATED, Comparison, Workload, compare
from benchmarks.simulator.hardware import A100, H200, Hardware, this_machine
from benchmarks.simulator.models import MODELS
from benchmarks.simulator.policies import MAX_NUM_SEQS, OURS, POLICIES, REACTIVE
from benchmarks.simulator.tables import PAPER_DEVICES, PAPER_MODELS, judge, large_cluster, paper_cluster, row
from benchmarks.simulator.traces import SHORT, TRACES

QUESTION = "What do pooled memory and its planner give on clusters of any size, beside vLLM with the same devices?"
_MODELS = {model.name: model for model in MODELS}
_TRACES = {trace.name: trace for trace in (SHORT, *TRACES)}
_POLICIES = {policy.name: policy for policy in (*POLICIES, REACTIVE)}
_HARDWARE = ("a100", "h200", "this-machine")
_QUICK_S = 20.0


def measure(run: Run) -> None:
    options = run.options
    workloads = _everything(options.cluster) if options.all else _chosen(run)
    policies = POLICIES if options.all else tuple(_POLICIES[name] for name in options.policy)
    comparisons = []
    for workload in workloads:
        comparisons.append(compare(workload, policies, run.progress.update))
        run.row(row(comparisons[-1]))
    judge(run, comparisons)
    if options.plots is not None:
        _plot(comparisons, options.plots)


def _everything(clusters: Sequence[str]) -> Iterable[Workload]:
    if "paper" in clusters:
        yield from paper_cluster()
    if "large" in clusters:
        yield from large_cluster()


def _chosen(run: Run) -> Iterable[Workload]:
    options = run.options
    hardware = _hardware(options.hardware)
    for model in options.model:
        for trace in options.trace:
            yield Workload(
                _MODELS[model],
                _TRACES[trace],
                hardware,
                min(options.gpus, 8) if run.quick else options.gpus,
                options.prompts,
                options.load,
                min(options.seconds, _QUICK_S) if run.quick else options.seconds,
                options.arrivals,
                options.seed,
                options.max_num_seqs,
            )


def _hardware(name: str) -> Hardware:
    return {"a100": A100, "h200": H200}.get(name) or this_machine()


def _plot(comparisons: list[Comparison], directory: Path) -> None:
    from benchmarks.simulator.plots import plot_placement, plot_throughput

    groups: dict[tuple[int, str, float], list[Comparison]] = {}
    for comparison in comparisons:
        workload = comparison.workload
        groups.setdefault((workload.devices, workload.prompts, workload.load), []).append(comparison)
    for (devices, prompts, load), group in groups.items():
        if load == SATURATED:
            plot_throughput(group, directory / f"simulator-throughput-{devices}-{prompts}.png")
    pooled = [comparison.workload for comparison in comparisons if comparison.of(OURS) is not None]
    if pooled:
        # Of the smallest cluster, the longest trace; that is trace 8 of the first model with --all.
        workload = max(
            pooled, key=lambda w: (-w.devices, w.trace.longest, -w.model.parameters, w.prompts == "computed")
        )
        plot_placement(workload, directory / f"simulator-placement-trace-{workload.trace.name}.png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="the paper's cluster and a thousand GPUs; minutes")
    parser.add_argument("--cluster", nargs="+", choices=("paper", "large"), default=["paper", "large"], help="of --all")
    parser.add_argument("--model", nargs="+", choices=sorted(_MODELS), default=[PAPER_MODELS[0].name])
    parser.add_argument("--trace", nargs="+", choices=list(_TRACES), default=["0", "3"])
    parser.add_argument("--policy", nargs="+", choices=list(_POLICIES), default=[policy.name for policy in POLICIES])
    parser.add_argument("--hardware", choices=_HARDWARE, default="a100")
    parser.add_argument("--gpus", type=int, default=PAPER_DEVICES, metavar="N")
    parser.add_argument("--prompts", choices=("computed", "prefilled"), default="computed")
    parser.add_argument("--arrivals", choices=("poisson", "bursty"), default="poisson")
    parser.add_argument("--load", type=float, default=SATURATED, help="of the reference rate; more than 1 saturates")
    parser.add_argument("--seconds", type=float, default=300.0, help="simulated; the first two fifths are warm-up")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-num-seqs", type=int, default=MAX_NUM_SEQS, metavar="N")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write PNG plots there (needs matplotlib)")


if __name__ == "__main__":
    sys.exit(main("simulator", QUESTION, measure, add_arguments))
