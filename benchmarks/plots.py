"""The plots of the README, and what all plots have in common; matplotlib is needed for nothing else."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.figure import Figure

from benchmarks.comparison import Result

COLOURS = {"ours": "#1f77b4", "vllm-multi": "#ff7f0e", "vllm-single": "#7f7f7f", "ours-reactive": "#17becf"}
_SYSTEMS = ("vllm-multi", "vllm-single", "ours")
_DPI = 100


def plot_pooled(small: Result, paper: Result, file: Path) -> None:
    """Output tokens per second of each load, a bar for each system; a panel for each scale."""
    figure, panels = pyplot.subplots(2, figsize=(9, 5.6))
    titles = ("KV caches of a third of the weights", "KV caches of four times the weights")
    for panel, title, result in zip(panels, titles, (small, paper), strict=True):
        rows = {(row["load"], row["system"]): row for row in result["rows"]}
        loads = list(dict.fromkeys(load for load, _ in rows))
        width = 0.8 / len(_SYSTEMS)
        for at, system in enumerate(_SYSTEMS):
            chosen = [rows[name, system] for name in loads]
            heights = [row["output_tokens_per_s"] for row in chosen]
            spread = [
                [row["output_tokens_per_s"] - row["smallest"] for row in chosen],
                [row["largest"] - row["output_tokens_per_s"] for row in chosen],
            ]
            places = [index + (at - (len(_SYSTEMS) - 1) / 2) * width for index in range(len(loads))]
            panel.bar(places, heights, width, yerr=spread, label=system, color=COLOURS[system])
        panel.set_title(title, fontsize=9)
        panel.set_xticks(range(len(loads)), loads)
        panel.set_ylabel("output tokens/s")
        panel.grid(axis="y", alpha=0.3)
    panels[0].legend(fontsize=8, ncols=3)
    save(figure, file)


def plot_growth(result: Result, file: Path) -> None:
    """Time per output token by context, and the line through it."""
    rows = result["rows"]
    contexts = [row["context"] for row in rows]
    middle = [row["step_ms"] for row in rows]
    spread = [
        [row["step_ms"] - row["step_ms_min"] for row in rows],
        [row["step_ms_max"] - row["step_ms"] for row in rows],
    ]
    figure, panel = pyplot.subplots(figsize=(9, 3.2))
    panel.plot(contexts, [row["line_ms"] for row in rows], color="#7f7f7f", label="straight line")
    panel.errorbar(contexts, middle, yerr=spread, fmt="o", color="#1f77b4", capsize=3, label="measured")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.set_xticks(contexts, [f"{context >> 10}K" for context in contexts])
    panel.set_yticks(ticks := [8 << step for step in range(8)], [str(tick) for tick in ticks])
    panel.set_xlabel("context, tokens")
    panel.set_ylabel("ms per output token")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    save(figure, file)


def save(figure: Figure, file: Path) -> None:
    """Writes and closes a figure."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(file, dpi=_DPI)
    pyplot.close(figure)
