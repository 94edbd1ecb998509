"""KV memory: who lends to whom, how full each pool is, how much of the room is spread too thin."""

from __future__ import annotations

from deploy.dashboards.panels import Page, Query
from deploy.dashboards.promql import CLUSTER, rate, series, total
from services.runtime import metrics

_USABLE = 'state!="workspace"'
_AVAILABLE = 'state=~"free|cached"'
_RESERVED = 'state="reserved"'
_HELD = 'state=~"reserved|in_use"'


def page() -> Page:
    about = "Where the KV cache lies: who lends to whom, the fill of every pool, and how scattered the room is."
    page = Page("kv-memory", "KV memory", about)
    _lending(page)
    _fill(page)
    _fragmentation(page)
    return page


def _lending(page: Page) -> None:
    page.row("Who lends to whom")
    page.graph(
        "Lent, by lender and borrower",
        "Blocks in a daemon's pool that an instance other than the one beside it holds, as the daemon counts them.",
        "blocks",
        Query(total(series(metrics.LENT_BLOCKS), "kvdaemon_id, instance_id"), "{{kvdaemon_id}} → {{instance_id}}"),
        stacked=True,
    )
    page.graph(
        "Borrowed, by borrower and lender",
        "Blocks of an instance's running requests on other daemons, as the instance counts them; a shared block counts "
        "for each request, and blocks that are only reserved do not.",
        "blocks",
        Query(total(series(metrics.BORROWED_BLOCKS), "instance_id, kvdaemon_id"), "{{instance_id}} ← {{kvdaemon_id}}"),
        stacked=True,
    )
    page.table(
        "Loans now",
        "Blocks that each daemon lends to each instance now.",
        "blocks",
        f"{total(series(metrics.LENT_BLOCKS), 'kvdaemon_id, instance_id')} > 0",
        hidden=(),
    )
    page.graph(
        "Share of the pool that is lent",
        "Of each daemon's blocks, workspace aside.",
        "percentunit",
        Query(
            f"{total(series(metrics.LENT_BLOCKS), 'member')} / {total(series(metrics.POOL_BLOCKS, _USABLE), 'member')}",
            "{{member}}",
        ),
        top=1,
    )


def _fill(page: Page) -> None:
    page.row("Fill")
    held = total(series(metrics.POOL_BLOCKS, _HELD), "member")
    page.graph(
        "Fill of each pool",
        "Share of a pool, workspace aside, that requests hold or have reserved. Cached blocks can be had and do not "
        "count.",
        "percentunit",
        Query(f"{held} / {total(series(metrics.POOL_BLOCKS, _USABLE), 'member')}", "{{member}}"),
        top=1,
    )
    page.graph(
        "Blocks by state",
        "Of all pools together.",
        "blocks",
        Query(total(series(metrics.POOL_BLOCKS), "state"), "{{state}}"),
        stacked=True,
    )
    page.graph(
        "Use of instances' own pools",
        "Share of its own pool, workspace aside, that requests hold. At 1 an instance borrows.",
        "percentunit",
        Query(series(metrics.KV_CACHE_USAGE), "{{member}}"),
        top=1,
    )
    page.graph(
        "Size of pools",
        "Bytes of KV memory that daemons offer; all of it is allocated at start.",
        "decbytes",
        Query(series(metrics.POOL_BYTES), "{{member}}"),
        stacked=True,
    )


def _fragmentation(page: Page) -> None:
    page.row("Fragmentation")
    page.graph(
        "Room outside of the pool with most of it",
        "Share of the cluster's free and cached blocks that are not in the pool with most of them: what a request "
        "could not use if it had to lie in one pool. Borrowing makes all of it usable.",
        "percentunit",
        Query(f"infinite_llm:pool_fragmentation:ratio{{{CLUSTER}}}", "fragmentation"),
        top=1,
    )
    page.graph(
        "Room in each pool",
        "Blocks that are free or only cached.",
        "blocks",
        Query(total(series(metrics.POOL_BLOCKS, _AVAILABLE), "member"), "{{member}}"),
        stacked=True,
    )
    page.graph(
        "Reserved and not yet written",
        "Share of the blocks held by requests that are set aside for prompts whose prefill has not come that far.",
        "percentunit",
        Query(
            f"{total(series(metrics.POOL_BLOCKS, _RESERVED))} / ({total(series(metrics.POOL_BLOCKS, _HELD))} > 0)"
            " or vector(0)",
            "reserved",
        ),
        top=1,
    )
    page.graph(
        "Blocks moved by the planner",
        "Per second, by kind of move: lend, relieve a creditor, bring home, spread for speed.",
        "cps",
        Query(total(rate(metrics.MOVED_BLOCKS), "kind"), "{{kind}}"),
    )
