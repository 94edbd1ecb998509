"""``python -m benchmarks.comparison``: writes the README's tables, and their plot, from the files in ``results``.

What stands between the two marks in README.md is nobody's to edit: a test compares it with the files. With
``--machine NAME``, another than the README's, the tables of that machine's files are printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]  # what ``--json`` wrote

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MACHINE = "amd-epyc"
BEGIN = "<!-- from here on: python -m benchmarks.comparison -->"
END = "<!-- to here -->"
POOLED_PLOT, GROWTH_PLOT = RESULTS / "pooled-vs-vllm.png", RESULTS / "growth.png"


def text(machine: str = MACHINE) -> str:
    """The README's block, marks included."""
    parts = [section(load(name, machine)) for name, section in SECTIONS.items()]
    return "\n\n".join([BEGIN, *parts, END])


def load(name: str, machine: str = MACHINE) -> Result:
    """A benchmark's latest result."""
    result: Result = json.loads((RESULTS / f"{name}-{machine}.json").read_text())
    return result


def replaced(readme: str, block: str) -> str:
    """A README with another block."""
    before, _, rest = readme.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"README.md lacks the marks {BEGIN!r} and {END!r}")
    return before + block + after


def _pooled(result: Result) -> str:
    return (
        "**Two cores and 144 MiB of KV cache, three ways** (`benchmarks.pooled_vs_vllm`; output tokens per second): "
        "two vLLM servers, one vLLM server with tensor parallelism, and two pooled instances.\n\n"
        f"{_loads(result)}"
    )


def _pooled_as_the_paper(result: Result) -> str:
    return (
        "**The same with KV caches of four times the weights, as the paper's models have beside theirs** "
        f"(`--scale paper`):\n\n{_loads(result)}\n\n"
        f"![both tables as bars](benchmarks/results/{POOLED_PLOT.name})"
    )


def _loads(result: Result) -> str:
    rows = {(row["load"], row["system"]): row for row in result["rows"]}
    loads = list(dict.fromkeys(load for load, _ in rows))
    lines = []
    for name in loads:
        multi, single, ours = (rows[name, system] for system in ("vllm-multi", "vllm-single", "ours"))
        rates = [f"{one['output_tokens_per_s']:.0f}" for one in (multi, single, ours)]
        ratios = [_goal(result, f"{name}_over_the_better"), f"{result['summary'][f'{name}_over_single']:.2f}"]
        lines.append([name, *rates, *ratios, str(multi["refused"]), str(ours["refused"])])
    head = ["load", "two vLLM", "vLLM, TP 2", "ours", "ours / the better", "/ TP 2", "refused by two vLLM", "by ours"]
    return _table(head, lines)


def _engine(result: Result) -> str:
    rows = {(row["workload"], row["checkpoint"]): row for row in result["rows"]}
    workloads, checkpoints = (list(dict.fromkeys(key[at] for key in rows)) for at in (0, 1))
    lines = [
        [
            workload,
            *(
                f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
                for row in (rows[workload, checkpoint] for checkpoint in checkpoints)
            ),
        ]
        for workload in workloads
    ]
    return (
        "**One instance beside vLLM, on the same core, over HTTP** (`benchmarks.engine_vs_vllm`; tokens per second, "
        f"ours / vLLM's):\n\n{_table(['workload', *checkpoints], lines)}"
    )


def _distance(result: Result) -> str:
    rows = {(row["context"], row["link"], row["elsewhere"]): row for row in result["rows"]}
    shares = [share for share in dict.fromkeys(key[2] for key in rows) if share]
    lines = []
    for context, link in dict.fromkeys(key[:2] for key in rows):
        place, half = f"{context}_{link}", rows[context, link, 0.5]
        of_local = [f"{rows[context, link, share]['of_local']:.2f}" for share in shares]
        saved = "-"
        if f"saved_of_kernels_{place}" in result["targets"]:
            saved = _goal(result, f"saved_of_kernels_{place}")
        else:
            of_local[shares.index(0.5)] = _goal(result, f"half_of_local_{place}")
        lines.append([f"{context:,}", link, *of_local, saved, f"{half['ttft_of_local']:.2f}"])
    return (
        "**A decode step whose KV cache lies partly on another machine** (`benchmarks.distance`; step time, of all "
        "local; an instance and a daemon on a core each, the cache filled without prefill), by how much of it lies "
        "elsewhere. With half of it there: what is saved of what two bare kernels save over one, and the time to the "
        "first token, of all local.\n\n"
        + _table(["context", "link", *(f"{share:.0%}" for share in shares), "saved, of kernels", "TTFT"], lines)
    )


def _spread(result: Result) -> str:
    lines = [
        [
            f"{row['context']:,}",
            f"{row['without_ms']:.1f}",
            f"{row['with_ms']:.1f}",
            f"{row['faster']:.2f} ({row['faster_min']:.2f} to {row['faster_max']:.2f})",
            f"{row['elsewhere']:.0%}",
        ]
        for row in result["rows"]
    ]
    return (
        "**What the planner makes of a long request and a daemon with nobody to compute for** (`benchmarks.spread`; "
        "nobody lacks memory, an instance and that daemon on a core each, the cache filled without prefill; time of a "
        "decode step): it moves a part there, so that attention runs on both.\n\n"
        + _table(["context", "ms without the planner", "with it", "faster by", "elsewhere"], lines)
    )


def _growth(result: Result) -> str:
    lines = [
        [
            f"{row['context']:,}",
            f"{row['step_ms']:.1f} ({row['step_ms_min']:.1f} to {row['step_ms_max']:.1f})",
            f"{row['of_line']:.2f}",
        ]
        for row in result["rows"]
    ]
    return (
        "**Time per output token by context** (`benchmarks.growth`; one request, all local): a straight line, whose "
        f"slope is {_goal(result, 'slope_of_predicted')} of what reading keys and values at the memory's measured rate "
        "takes.\n\n"
        + _table(["context", "ms (min to max)", "of the line"], lines)
        + f"\n\n![the same, and the line](benchmarks/results/{GROWTH_PLOT.name})"
    )


def _goal(result: Result, target: str) -> str:
    """A value with its goal, where it missed it."""
    found = result["targets"][target]
    return f"{found['value']:.2f}" if found["ok"] else f"{found['value']:.2f} (goal {found['goal']:g})"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    ruler = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ruler, *lines))


SECTIONS: Mapping[str, Callable[[Result], str]] = {
    "pooled-vs-vllm": _pooled,
    "pooled-vs-vllm-paper-scale": _pooled_as_the_paper,
    "engine-vs-vllm": _engine,
    "distance": _distance,
    "spread": _spread,
    "growth": _growth,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.comparison", description=__doc__)
    parser.add_argument("--machine", default=MACHINE, help="whose files (default %(default)s)")
    machine: str = parser.parse_args().machine
    if machine != MACHINE:
        print(text(machine))
        return 0
    from benchmarks.plots import plot_growth, plot_pooled  # matplotlib, which the tables do without

    readme = ROOT / "README.md"
    readme.write_text(replaced(readme.read_text(), text()))
    plot_pooled(load("pooled-vs-vllm"), load("pooled-vs-vllm-paper-scale"), POOLED_PLOT)
    plot_growth(load("growth"), GROWTH_PLOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
