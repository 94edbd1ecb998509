"""Where a new request should start."""

from __future__ import annotations

import heapq
from statistics import median_low

from services.core.blocks import PoolGeometry
from services.gmanager.planner.plan import AdmissionHint
from services.gmanager.planner.state import Instance, State

_MOST_HINTS = 64  # of each geometry


def hints(state: State) -> tuple[AdmissionHint, ...]:
    """By gain, for one more request as long as half of the running ones of the same geometry.

    An instance has room if that request fits beside everything that its other ones are expected to need.
    """
    groups: dict[PoolGeometry, list[Instance]] = {}
    for instance in state.instances:
        groups.setdefault(instance.home.geometry, []).append(instance)
    best: list[AdmissionHint] = []
    for geometry, group in groups.items():
        contexts = [request.context_tokens for instance in group for request in instance.load.requests]
        tokens = median_low(contexts) if contexts else 0
        blocks = geometry.blocks_for(tokens + state.policy.horizon_tokens)
        best += heapq.nsmallest(
            _MOST_HINTS,
            [
                AdmissionHint(instance.id, instance.unclaimed, _gain(instance, tokens))
                for instance in group
                if instance.fresh and instance.home.fresh and _has_place(instance) and instance.unclaimed >= blocks
            ],
            key=_order,
        )
    return tuple(sorted(best, key=_order))


def _order(hint: AdmissionHint) -> tuple[float, str]:
    return (-hint.gain, hint.instance_id)


def _has_place(instance: Instance) -> bool:
    waiting = len(instance.load.waiting)
    return len(instance.load.requests) + waiting < instance.load.max_batch


def _gain(instance: Instance, tokens: int) -> float:
    """Throughput with one request more, less that without it."""
    if not instance.batch:
        alone_s = instance.load.costs.other_s(1) + instance.load.costs.local_s(tokens)
        return (1.0 - instance.home.hosting) / alone_s if alone_s > 0 else 0.0
    costs = instance.load.costs
    longer_s = costs.other_s(instance.batch + 1) - costs.other_s(instance.batch) + costs.context_token_s * tokens
    return instance.throughput * (
        (instance.batch + 1) / instance.batch * instance.step_s / (instance.step_s + longer_s) - 1.0
    )
