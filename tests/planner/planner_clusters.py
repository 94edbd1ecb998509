"""Random clusters for hypothesis: small, often short of memory, in any state that heartbeats could tell of."""

from __future__ import annotations

import math

from hypothesis import strategies as st
from planner_transcript import DAEMON_COSTS, GEOMETRY, INSTANCE_COSTS, NOW

from services.gmanager.planner.load import (
    ClusterLoad,
    DaemonLoad,
    InstanceLoad,
    RemoteShare,
    RequestLoad,
    WaitingLoad,
)

_CONTEXTS = st.one_of(st.integers(0, 3000), st.integers(10_000, 150_000))
_HEARD = st.sampled_from([NOW, NOW, NOW, NOW - 1, NOW - 60, -math.inf])
_WAITING = st.builds(WaitingLoad, st.integers(1, 4000), st.integers(0, 1000))


@st.composite
def _request(draw: st.DrawFn, request_id: str, lenders: list[str]) -> RequestLoad:
    context = draw(_CONTEXTS)
    sealed = context // GEOMETRY.block_tokens
    remote = []
    for lender in lenders:
        if draw(st.integers(0, 3)) == 0 and sealed:
            blocks = draw(st.integers(1, sealed))
            remote.append(RemoteShare(lender, blocks))
            sealed -= blocks
    away = sum(share.blocks for share in remote)
    return RequestLoad(
        request_id,
        context,
        draw(st.integers(0, 4000)),
        local_blocks=GEOMETRY.blocks_for(context) - away,
        movable_blocks=draw(st.sampled_from([sealed, sealed, sealed // 2])),
        remote=tuple(remote),
        moved_at=draw(st.sampled_from([-math.inf, -math.inf, NOW - 1, NOW - 100])),
    )


@st.composite
def clusters(draw: st.DrawFn, cycles: bool = True) -> ClusterLoad:
    """``cycles``: an instance may borrow and lend at the same time, as instances do that help themselves."""
    mapped = draw(st.integers(1, 5))
    names = [f"k{n}" for n in range(mapped)] + [f"m{n}" for n in range(draw(st.integers(0, 2)))]
    borrowers = draw(st.sets(st.integers(0, mapped - 1)))
    used = dict.fromkeys(names, 0)
    instances = []
    for number in range(mapped):
        lenders = [name for name in names if name != f"k{number}"]
        if not cycles:
            lenders = [name for name in lenders if number in borrowers and name not in {f"k{n}" for n in borrowers}]
        requests = tuple(draw(_request(f"r{number}.{index}", lenders)) for index in range(draw(st.integers(0, 6))))
        instances.append(
            InstanceLoad(
                f"i{number}",
                f"k{number}",
                max_batch=draw(st.integers(1, 40)),
                costs=INSTANCE_COSTS[draw(st.sampled_from(sorted(INSTANCE_COSTS)))],
                heard_at=draw(_HEARD),
                requests=requests,
                waiting=tuple(draw(st.lists(_WAITING, max_size=12))),
            )
        )
        for request in requests:
            used[f"k{number}"] += request.local_blocks
            for share in request.remote:
                used[share.kvdaemon_id] += share.blocks
    daemons = []
    for name in names:
        free = draw(st.one_of(st.integers(0, 40), st.integers(0, 2000)))
        device = draw(st.sampled_from(["a100", "h200"] if name.startswith("k") else ["dram", "a100"]))
        under_way = draw(st.sampled_from([0, 0, 0, 30]))
        daemons.append(
            DaemonLoad(
                name,
                GEOMETRY,
                used[name] + free,
                free,
                DAEMON_COSTS[device],
                draw(_HEARD),
                leaving_blocks=min(under_way, free),
                coming_blocks=draw(st.sampled_from([0, 0, 50])),
            )
        )
    return ClusterLoad(tuple(instances), tuple(daemons))
