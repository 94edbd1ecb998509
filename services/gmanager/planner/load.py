"""What the planner is told of the cluster. The gManager makes it from heartbeats, a simulator from its own state.

All counts are what was reported last, as if every move under way had ended: who plans again while moves are under way
puts them in with ``plan.apply``. ``leaving_blocks``, ``coming_blocks`` and ``releasing`` say what is still to happen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from services.core.blocks import PoolGeometry
from services.gmanager.cost_model import DaemonCosts, InstanceCosts


class RemoteShare(NamedTuple):
    """Sealed blocks of one request on a daemon that is not its instance's own."""

    kvdaemon_id: str
    blocks: int


@dataclass(frozen=True, slots=True)
class RequestLoad:
    """One running request.

    Attributes:
        context_tokens: whose K and V stand in blocks.
        remaining_tokens: output still to come, as far as can be expected.
        local_blocks: in its instance's own pool, the open ones included.
        movable_blocks: of those, sealed, held by nobody else (moving a shared one frees nothing) and not under way.
        remote: one entry for each other daemon, blocks > 0.
        moved_at: when the planner moved blocks of it last.
    """

    request_id: str
    context_tokens: int
    remaining_tokens: int
    local_blocks: int
    movable_blocks: int
    remote: tuple[RemoteShare, ...] = ()
    moved_at: float = -math.inf


class WaitingLoad(NamedTuple):
    """One request that has no blocks yet: tokens of its prompt, and of output to be expected."""

    context_tokens: int
    remaining_tokens: int


@dataclass(frozen=True, slots=True)
class InstanceLoad:
    """One instance.

    Attributes:
        kvdaemon_id: its own daemon, whose pool it maps.
        max_batch: requests it runs at the same time at most.
        heard_at: when it was heard of last; -inf if never.
        requests: running, oldest first: the youngest give way when memory runs out.
        waiting: in the order in which they will be admitted; the first hundred are enough.
    """

    instance_id: str
    kvdaemon_id: str
    max_batch: int
    costs: InstanceCosts
    heard_at: float
    requests: tuple[RequestLoad, ...] = ()
    waiting: tuple[WaitingLoad, ...] = ()


@dataclass(frozen=True, slots=True)
class DaemonLoad:
    """One KV daemon and its pool.

    Attributes:
        geometry: only pools of equal geometry lend to each other. Whoever makes the load decides for pools that are not
            formatted yet.
        total_blocks: that requests can have, the workspace of the mapped instance not among them.
        free_blocks: that a reservation could get now: free and cached ones.
        leaving_blocks: of moves under way from here; in ``free_blocks`` already, but nothing can be put there yet.
        coming_blocks: of moves under way to here; no longer in ``free_blocks``.
        releasing: instances that it hosted leaving blocks for; it lends to them until these moves have ended.
    """

    kvdaemon_id: str
    geometry: PoolGeometry
    total_blocks: int
    free_blocks: int
    costs: DaemonCosts
    heard_at: float
    leaving_blocks: int = 0
    coming_blocks: int = 0
    releasing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ClusterLoad:
    """Everything. Ids are unique among their kind; a daemon that is named but not listed counts as lost."""

    instances: tuple[InstanceLoad, ...]
    kvdaemons: tuple[DaemonLoad, ...]
