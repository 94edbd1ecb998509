"""PNG plots of simulated clusters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot

from benchmarks.plots import COLOURS, save
from benchmarks.simulator.comparison import Comparison, Workload, simulated
from benchmarks.simulator.policies import OURS, Policy


def plot_throughput(comparisons: Sequence[Comparison], file: Path) -> None:
    """Output tokens per second by trace, one panel for each model."""
    models = list(dict.fromkeys(c.workload.model.name for c in comparisons))
    figure, panels = pyplot.subplots(len(models), 1, figsize=(9, 2.6 * len(models)), squeeze=False)
    for model, panel in zip(models, panels[:, 0], strict=True):
        rows = [c for c in comparisons if c.workload.model.name == model]
        policies: list[Policy] = [policy for policy, _ in rows[0].outcomes]
        width = 0.8 / len(policies)
        for at, policy in enumerate(policies):
            heights = [outcome.tokens_per_s if (outcome := row.of(policy)) else 0.0 for row in rows]
            places = [index + (at - (len(policies) - 1) / 2) * width for index in range(len(rows))]
            panel.bar(places, heights, width, label=policy.name, color=COLOURS[policy.name])
        panel.set_xticks(
            range(len(rows)), [f"{r.workload.trace.name}\n{_size(r.workload.trace.longest)}" for r in rows]
        )
        panel.set_ylabel("output tokens/s")
        panel.set_yscale("log")
        first = rows[0].workload
        panel.set_title(f"{first.devices} {first.hardware.name.upper()}, {model}, prompts {first.prompts}", fontsize=10)
        panel.grid(axis="y", alpha=0.3)
    panels[0, 0].legend(fontsize=8, ncols=3)
    panels[-1, 0].set_xlabel("trace, and its longest request in tokens")
    save(figure, file)


def plot_placement(workload: Workload, file: Path) -> None:
    """Which share of each instance's pool holds its own requests' blocks, and which others', over time; ours."""
    cluster = simulated(workload, OURS)
    cluster.run(workload.duration_s)
    samples = cluster.recorder.placements
    times = [sample.time_s for sample in samples]
    figure, panels = pyplot.subplots(2, 1, figsize=(9, 6), sharex=True)
    for panel, title, index in ((panels[0], "its own requests", 0), (panels[1], "lent to other instances", 1)):
        shares = [
            [(sample.own, sample.lent)[index][at] / sample.blocks[at] for sample in samples]
            for at in range(len(samples[0].blocks))
        ]
        image = panel.imshow(
            shares,
            aspect="auto",
            origin="lower",
            interpolation="nearest",
            extent=(times[0], times[-1], -0.5, len(shares) - 0.5),
            vmin=0,
            vmax=1,
            cmap="viridis",
        )
        panel.set_ylabel("instance")
        panel.set_title(f"share of each pool that holds blocks {title}" if index else f"share of each pool: {title}")
        figure.colorbar(image, ax=panel)
    panels[1].set_xlabel(f"simulated seconds: {workload.model.name}, trace {workload.trace.name}, {workload.prompts}")
    save(figure, file)


def _size(tokens: int) -> str:
    return f"{tokens / 1e6:.2g}M" if tokens >= 1_000_000 else f"{round(tokens / 1000)}K"
