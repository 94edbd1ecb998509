"""The whole cluster: throughput, latency, capacity, and whether everybody is there."""

from __future__ import annotations

from deploy.dashboards.panels import Page, Query
from deploy.dashboards.promql import CLUSTER, mean, quantile, rate, series, total
from services.runtime import metrics


def page() -> Page:
    page = Page("cluster", "Cluster", "Throughput, latency and capacity of a cluster. Start here.")
    _now(page)
    _throughput(page)
    _latency(page)
    _capacity(page)
    _processes(page)
    return page


def _now(page: Page) -> None:
    page.row("Now")
    page.stat(
        "Output",
        "Tokens generated and passed on to clients, per second.",
        "tok/s",
        total(rate(metrics.GENERATION_TOKENS)),
    )
    page.stat(
        "Requests in progress",
        "Requests that gateways have taken and that have not ended, waiting ones included.",
        "short",
        total(series(metrics.REQUESTS_IN_PROGRESS)),
    )
    page.stat(
        "Requests waiting",
        "Requests that wait for KV memory. More than 0 for long: the cluster is too small.",
        "short",
        total(series(metrics.REQUESTS_WAITING)),
    )
    page.stat(
        "Time to first token, p95",
        "From a request's arrival to its first token; it grows with the prompt's length.",
        "s",
        quantile(0.95, metrics.TIME_TO_FIRST_TOKEN),
    )
    page.stat(
        "KV memory available",
        "Share of all pools, workspaces aside, that is free or only cached.",
        "percentunit",
        f"infinite_llm:pool_available:ratio{{{CLUSTER}}}",
    )
    page.stat(
        "Alerts firing",
        "Alerts of all severities; docs/runbooks.md has a section for each.",
        "short",
        'count(ALERTS{alertstate="firing"}) or vector(0)',
    )


def _throughput(page: Page) -> None:
    page.row("Throughput")
    page.graph(
        "Output by gateway",
        "Tokens generated and passed on to clients.",
        "tok/s",
        Query(total(rate(metrics.GENERATION_TOKENS), "member"), "{{member}}"),
        stacked=True,
    )
    page.graph(
        "Tokens computed",
        "What instances compute: chunks of prompts (prefill), one token a request and step (decode); of both, the "
        "tokens that had been computed before and were lost or given up (recomputed).",
        "tok/s",
        Query(total(rate(metrics.COMPUTED_TOKENS), "phase"), "{{phase}}"),
        Query(total(rate(metrics.RECOMPUTED_TOKENS)), "recomputed"),
    )
    page.graph(
        "Requests ended, by outcome",
        "stop and length are answers, aborted ones were given up by their clients, refused ones ended with an error.",
        "reqps",
        Query(total(rate(metrics.REQUESTS), "outcome"), "{{outcome}}"),
        stacked=True,
    )
    page.graph(
        "Refusals, by reason",
        "Requests that ended with an error. CONTEXT_TOO_LONG and INVALID_REQUEST are the clients' own; QUEUE_FULL, "
        "NO_INSTANCE and UNAVAILABLE are the cluster's.",
        "reqps",
        Query(total(rate(metrics.REFUSALS), "reason"), "{{reason}}"),
        stacked=True,
    )


def _latency(page: Page) -> None:
    page.row("Latency")
    for title, about, spec in (
        (
            "Time to first token",
            "From a request's arrival to its first token, tokenizing and queueing included.",
            metrics.TIME_TO_FIRST_TOKEN,
        ),
        ("Between two tokens", "Of one request, as its client sees it.", metrics.INTER_TOKEN_LATENCY),
        (
            "Whole requests",
            "From arrival to end, of requests that were answered in full.",
            metrics.REQUEST_DURATION,
        ),
    ):
        page.graph(
            title,
            about,
            "s",
            *(Query(quantile(share, spec), f"p{share * 100:.0f}") for share in (0.5, 0.95, 0.99)),
            Query(mean(spec), "mean"),
            width=8,
        )


def _capacity(page: Page) -> None:
    page.row("Capacity")
    block_bytes = series(metrics.BLOCK_BYTES)
    page.graph(
        "KV memory by state",
        "Bytes of all pools. free and cached can be had; reserved is set aside for prompts under way; workspace "
        "belongs to the instance beside a daemon.",
        "decbytes",
        Query(
            total(f"{series(metrics.POOL_BLOCKS)} * on (cluster, member) group_left () {block_bytes}", "state"),
            "{{state}}",
        ),
        stacked=True,
    )
    page.graph(
        "Requests in instances",
        "running: they hold KV memory and are computed; waiting: for KV memory.",
        "short",
        Query(total(series(metrics.REQUESTS_RUNNING)), "running"),
        Query(total(series(metrics.REQUESTS_WAITING)), "waiting"),
        stacked=True,
    )
    page.graph(
        "Prompt tokens found in the cache",
        "Share of admitted prompt tokens whose KV was in the cluster already. Counted when a request ends, so it may "
        "exceed 1 for a moment.",
        "percentunit",
        Query(f"{total(rate(metrics.CACHED_PROMPT_TOKENS))} / {total(rate(metrics.PROMPT_TOKENS))}", "cached"),
    )
    page.graph(
        "Preemptions and failovers",
        "Running requests that gave up their KV, for want of memory or with a daemon that was lost; failover: their "
        "instance was lost and they go on elsewhere.",
        "cps",
        Query(total(rate(metrics.PREEMPTIONS), "reason"), "{{reason}}"),
        Query(total(rate(metrics.FAILOVERS)), "failover"),
    )


def _processes(page: Page) -> None:
    page.row("Processes")
    up = f'up{{{CLUSTER},job="infinite-llm"}}'
    page.graph(
        "Answering",
        "Processes that answer Prometheus, by service.",
        "short",
        Query(f"sum by (service) ({up})", "{{service}}"),
        width=8,
    )
    own = f'{{{CLUSTER},job="infinite-llm"}}'
    page.graph(
        "Processor time",
        "Cores that each process keeps busy.",
        "short",
        Query(f"rate(process_cpu_seconds_total{own}[$__rate_interval])", "{{member}}"),
        width=8,
    )
    page.graph(
        "Resident memory",
        "Of each process. A daemon's pool counts for the daemon, and for an instance that maps it.",
        "decbytes",
        Query(f"process_resident_memory_bytes{own}", "{{member}}"),
        width=8,
    )
    page.graph(
        "Restarts",
        "Starts of a process within the last 15 minutes, its first one aside.",
        "short",
        Query(f"infinite_llm:process_restarts:15m{{{CLUSTER}}}", "{{member}}"),
        width=8,
    )
    page.graph(
        "Journal waiting",
        "What gateways still have to write to Redis. Requests go on without it.",
        "decbytes",
        Query(series(metrics.JOURNAL_QUEUED), "{{member}}"),
        width=8,
    )
    page.graph(
        "Journal failures",
        "Writes to Redis that failed and are tried again, and entries that were given up.",
        "cps",
        Query(total(rate(metrics.JOURNAL_FAILURES)), "failed writes"),
        Query(total(rate(metrics.JOURNAL_DROPPED)), "entries given up"),
        width=8,
    )
