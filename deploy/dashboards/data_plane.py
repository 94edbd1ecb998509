"""The data plane: queries and partial states between instances and daemons, and what distance costs."""

from __future__ import annotations

from deploy.dashboards.panels import Page, Query
from deploy.dashboards.promql import mean, rate, series, total
from services.runtime import metrics

_INSTANCES, _DAEMONS = 'service="instance"', 'service="kvdaemon"'


def page() -> Page:
    page = Page("data-plane", "Data plane", "Traffic between instances and daemons, and how long answers take.")
    _answers(page)
    _traffic(page)
    _failures(page)
    return page


def _answers(page: Page) -> None:
    page.row("Answers")
    page.graph(
        "A layer's answer, by instance and daemon",
        "Mean time from sending a layer's query until the daemon's answer was taken. Part of it is hidden by local "
        "attention.",
        "s",
        Query(mean(metrics.REMOTE_ANSWER_TIME, by="member, peer, transport"), "{{member}} ← {{peer}} ({{transport}})"),
    )
    page.graph(
        "Attention computed for others",
        "Mean time that a daemon computes for a layer's query: what is left of an answer's time is way and queueing.",
        "s",
        Query(mean(metrics.HOSTED_ATTENTION_TIME, by="member"), "{{member}}"),
    )
    page.graph(
        "Answers per second",
        "Layers' queries answered, by daemon.",
        "cps",
        Query(total(rate(metrics.REMOTE_ANSWER_TIME, suffix="_count"), "peer"), "{{peer}}"),
        stacked=True,
    )
    wait = total(rate(metrics.STEP_PARTS, 'part="remote_wait"'), "member")
    page.graph(
        "Waiting for other daemons",
        "Share of an instance's step time that it waits for answers and has nothing else to do: what distance costs.",
        "percentunit",
        Query(f"{wait} / {total(rate(metrics.STEP_PARTS), 'member')}", "{{member}}"),
        top=1,
    )
    page.graph(
        "Daemons' time for others",
        "Share of time that a daemon computes attention for instances that are not beside it.",
        "percentunit",
        Query(total(rate(metrics.HOSTED_ATTENTION_TIME, suffix="_sum"), "member"), "{{member}}"),
    )


def _traffic(page: Page) -> None:
    page.row("Traffic")
    for whose, matcher, other in (("instances", _INSTANCES, "daemon"), ("daemons", _DAEMONS, "instance")):
        for verb, spec, arrow in (
            ("Sent", metrics.DATAPLANE_SENT, "→"),
            ("Received", metrics.DATAPLANE_RECEIVED, "←"),
        ):
            page.graph(
                f"{verb} by {whose}",
                f"Queries, partial states and blocks, by {other} at the other end.",
                "Bps",
                Query(total(rate(spec, matcher), "member, peer"), f"{{{{member}}}} {arrow} {{{{peer}}}}"),
                stacked=True,
            )
    page.graph(
        "Traffic by transport",
        "Sent and received by instances; shm does not leave the host.",
        "Bps",
        Query(total(rate(metrics.DATAPLANE_SENT, _INSTANCES), "transport"), "{{transport}} sent"),
        Query(total(rate(metrics.DATAPLANE_RECEIVED, _INSTANCES), "transport"), "{{transport}} received"),
    )


def _failures(page: Page) -> None:
    page.row("Failures")
    page.graph(
        "Steps discarded",
        "A daemon was lost in the middle of a step; it is planned again without the requests concerned.",
        "cps",
        Query(total(rate(metrics.DISCARDED_STEPS), "member"), "{{member}}"),
    )
    page.graph(
        "Requests that lost blocks",
        "They are computed anew, from whatever is still cached.",
        "cps",
        Query(total(rate(metrics.PREEMPTIONS, 'reason="kvdaemon_lost"'), "member"), "{{member}}"),
    )
    page.graph(
        "Peers",
        "Daemons that each instance is connected with.",
        "short",
        Query(f"count by (member) ({series(metrics.DATAPLANE_SENT, _INSTANCES)})", "{{member}}"),
    )
