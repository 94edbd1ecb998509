"""The gManagers: who leads, what the planner does, and whether what it predicts comes true."""

from __future__ import annotations

from deploy.dashboards.panels import Page, Query
from deploy.dashboards.promql import quantile, rate, series, total
from services.runtime import metrics


def page() -> Page:
    page = Page("planner", "Planner", "What the planner does, and its predictions beside what was measured.")
    _predictions(page)
    _moves(page)
    _leader(page)
    return page


def _predictions(page: Page) -> None:
    page.row("Predicted and measured")
    page.graph(
        "Gain of moves",
        "Mean gain in output of the latest moves whose gain has been measured, by kind of move. Empty until then.",
        "tok/s",
        Query(total(series(metrics.PREDICTED_GAIN), "kind"), "{{kind}} predicted"),
        Query(total(series(metrics.MEASURED_GAIN), "kind"), "{{kind}} measured"),
    )
    page.graph(
        "Output of the cluster",
        "As the planner models it for its latest plan, as things are (without moves) and with its moves, beside what "
        "clients get. The model counts decoding only.",
        "tok/s",
        Query(total(series(metrics.PLANNED_THROUGHPUT), "moves"), "modelled {{moves}} moves"),
        Query(total(rate(metrics.GENERATION_TOKENS)), "measured"),
    )
    page.graph(
        "Error of predicted step times",
        "Median relative error of the predicted time of an instance's decode steps. Empty until there were any.",
        "percentunit",
        Query(f"max by (instance_id) ({series(metrics.STEP_PREDICTION_ERROR)})", "{{instance_id}}"),
    )
    page.graph(
        "Time of making a plan",
        "The leader plans for a quarter of the time at most.",
        "s",
        *(Query(quantile(share, metrics.PLANNING_TIME), f"p{share * 100:.0f}") for share in (0.5, 0.99)),
    )


def _moves(page: Page) -> None:
    page.row("Moves")
    page.graph(
        "Moves ended",
        "By kind and end: DONE, or why not.",
        "cps",
        Query(total(rate(metrics.MOVES), "kind, end"), "{{kind}} {{end}}"),
        width=8,
    )
    page.graph(
        "Blocks moved",
        "By kind of move.",
        "cps",
        Query(total(rate(metrics.MOVED_BLOCKS), "kind"), "{{kind}}"),
        width=8,
    )
    page.graph(
        "Moves in progress",
        "Planned and not ended.",
        "short",
        Query(total(series(metrics.MOVES_IN_PROGRESS)), "in progress"),
        width=8,
    )


def _leader(page: Page) -> None:
    page.row("gManagers")
    page.graph(
        "Leader",
        "1 for the gManager that leads. Exactly one should.",
        "none",
        Query(series(metrics.LEADS), "{{member}}"),
        width=8,
        stacked=True,
    )
    page.graph(
        "Leader changes",
        "Within 15 minutes, as each gManager counts them.",
        "short",
        Query(f"increase({series(metrics.LEADER_CHANGES)}[15m])", "{{member}}"),
        width=8,
    )
    page.graph(
        "Members",
        "Processes that gManagers know, by kind.",
        "short",
        Query(f"max by (kind) ({series(metrics.MEMBERS)})", "{{kind}}"),
        width=8,
    )
    page.graph(
        "Heartbeats",
        "Processes whose heartbeats come to the leader itself, and by way of a KV daemon.",
        "short",
        Query(f"max by (way) ({series(metrics.HEARTBEAT_STREAMS)})", "{{way}}"),
        width=8,
        stacked=True,
    )
