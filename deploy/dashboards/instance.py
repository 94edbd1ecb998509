"""One instance: what its steps are made of, and what its batches are."""

from __future__ import annotations

from deploy.dashboards.panels import Page, Query, choice
from deploy.dashboards.promql import CLUSTER, OWN_MEMBER, mean, quantile, rate, series, total
from services.runtime import metrics


def page() -> Page:
    page = Page(
        "instance",
        "Instance",
        "What the steps of the chosen instances are made of: time by part, batches, memory.",
        [choice("instance", "Instance", metrics.REQUESTS_RUNNING, "member", CLUSTER)],
    )
    _step(page)
    _batch(page)
    _memory(page)
    return page


def _step(page: Page) -> None:
    page.row("Step time")
    steps = total(rate(metrics.STEP_TIME, OWN_MEMBER, suffix="_count"))
    page.graph(
        "Parts of a step",
        "Mean time of a step of the chosen instances, by part. remote_wait is what local attention does not hide of "
        "the answers of other daemons.",
        "s",
        Query(f"{total(rate(metrics.STEP_PARTS, OWN_MEMBER), 'part')} / scalar({steps})", "{{part}}"),
        stacked=True,
    )
    page.graph(
        "Shares of a step",
        "The same as shares of all time spent in steps.",
        "percentunit",
        Query(
            f"{total(rate(metrics.STEP_PARTS, OWN_MEMBER), 'part')}"
            f" / scalar({total(rate(metrics.STEP_PARTS, OWN_MEMBER))})",
            "{{part}}",
        ),
        stacked=True,
        top=1,
    )
    page.graph(
        "Step time, by phase",
        "Steps in which prompts were computed (prefill) and those in which none was (decode).",
        "s",
        *(
            Query(quantile(share, metrics.STEP_TIME, OWN_MEMBER, by="phase"), f"{{{{phase}}}} p{share * 100:.0f}")
            for share in (0.5, 0.99)
        ),
    )
    page.graph(
        "Steps per second",
        "None while requests run: the engine is stuck.",
        "cps",
        Query(total(rate(metrics.STEP_TIME, OWN_MEMBER, suffix="_count"), "member, phase"), "{{member}} {{phase}}"),
    )
    page.graph(
        "Time spent in steps",
        "Share of an instance's time in which it computes; the rest it waits for requests.",
        "percentunit",
        Query(total(rate(metrics.STEP_TIME, OWN_MEMBER, suffix="_sum"), "member"), "{{member}}"),
        top=1,
    )
    page.graph(
        "Decode step, predicted",
        "Median relative error of what the gManager predicts for an instance's decode steps. Empty until it has "
        "predicted any.",
        "percentunit",
        Query(series(metrics.STEP_PREDICTION_ERROR, 'instance_id=~"$instance"'), "{{instance_id}}"),
    )


def _batch(page: Page) -> None:
    page.row("Batch")
    page.graph(
        "Requests in a step",
        "Mean number of requests that took part in a step.",
        "short",
        Query(mean(metrics.BATCH_REQUESTS, OWN_MEMBER, by="member"), "{{member}}"),
        width=8,
    )
    page.graph(
        "Tokens in a step",
        "Mean number of tokens computed in a step.",
        "tokens",
        Query(mean(metrics.BATCH_TOKENS, OWN_MEMBER, by="member"), "{{member}}"),
        width=8,
    )
    page.graph(
        "Tokens computed",
        "Per second and phase; recomputed ones are contained in the others.",
        "tok/s",
        Query(total(rate(metrics.COMPUTED_TOKENS, OWN_MEMBER), "member, phase"), "{{member}} {{phase}}"),
        Query(total(rate(metrics.RECOMPUTED_TOKENS, OWN_MEMBER), "member"), "{{member}} recomputed"),
        width=8,
    )


def _memory(page: Page) -> None:
    page.row("Requests and memory")
    page.graph(
        "Requests",
        "running: they hold KV memory; waiting: for it.",
        "short",
        Query(series(metrics.REQUESTS_RUNNING, OWN_MEMBER), "{{member}} running"),
        Query(series(metrics.REQUESTS_WAITING, OWN_MEMBER), "{{member}} waiting"),
        width=8,
    )
    page.graph(
        "Own pool and borrowed blocks",
        "Blocks that the chosen instances' requests hold on other daemons.",
        "blocks",
        Query(
            total(series(metrics.BORROWED_BLOCKS, 'instance_id=~"$instance"'), "instance_id, kvdaemon_id"),
            "{{instance_id}} ← {{kvdaemon_id}}",
        ),
        width=8,
        stacked=True,
    )
    page.graph(
        "Preemptions and discarded steps",
        "Requests that gave up their KV, by reason, and steps that a lost daemon made worthless.",
        "cps",
        Query(total(rate(metrics.PREEMPTIONS, OWN_MEMBER), "member, reason"), "{{member}} {{reason}}"),
        Query(total(rate(metrics.DISCARDED_STEPS, OWN_MEMBER), "member"), "{{member}} discarded steps"),
        width=8,
    )
