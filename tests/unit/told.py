"""Reports as tests write them: with names, where the wire has numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from services.core.placement import (
    InstanceReport,
    NamedKvDaemon,
    NamedRequest,
    PlacementColumns,
    PlacementEntry,
    ProgressColumns,
    RunningRequest,
)

_numbers: dict[object, int] = {}
_next = itertools.count()


def _number(name: object) -> int:
    if name not in _numbers:
        _numbers[name] = next(_next)
    return _numbers[name]


def told(
    running: int,
    waiting: int,
    placement: Iterable[PlacementEntry] = (),
    ended: Iterable[str] = (),
    progress: Iterable[RunningRequest] = (),
    **others: object,
) -> InstanceReport:
    """An instance's report; it names whatever it tells of, each time."""
    placement, progress, ended = tuple(placement), tuple(progress), tuple(ended)
    requests = {name: NamedRequest(_number(name), name) for name in (*(e.request_id for e in placement), *ended)}
    for one in progress:
        requests[one.request_id] = NamedRequest(_number(one.request_id), *one[:2], one.final_tokens)
    daemons = {(e.kvdaemon_id, e.local) for e in placement}
    return InstanceReport(
        running,
        waiting,
        tuple(requests.values()),
        tuple(NamedKvDaemon(_number(key), *key) for key in daemons),
        PlacementColumns(
            tuple(_number(e.request_id) for e in placement),
            tuple(_number((e.kvdaemon_id, e.local)) for e in placement),
            tuple(e.num_blocks for e in placement),
        ),
        ProgressColumns(tuple(_number(r.request_id) for r in progress), tuple(r.context_tokens for r in progress)),
        tuple(_number(name) for name in ended),
        **others,  # type: ignore[arg-type]
    )
