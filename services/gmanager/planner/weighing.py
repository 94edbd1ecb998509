"""What one move would gain, and how many blocks it may have."""

from __future__ import annotations

import math
from typing import NamedTuple

from services.gmanager.planner.policy import PlannerPolicy
from services.gmanager.planner.state import Daemon, Running, State

_EPSILON = 1e-12


class Limit(NamedTuple):
    """A bound on the blocks of one move, and why it is not more."""

    blocks: int
    why: str


def weigh(state: State, request: Running, source: Daemon, target: Daemon, blocks: int) -> float | None:
    """Output tokens per second that the cluster gains by a move; None if it breaks a bound. Leaves the state alone."""
    instances, daemons = state.touched(request, source, target)
    owners = [daemon.owner for daemon in daemons if daemon.owner is not None]  # all ``instances`` are among them
    before = [(owner.batch, owner.step_s, owner.slack_s, owner.throughput) for owner in owners]
    hosting = [daemon.hosting for daemon in daemons]

    state.shift(request, source, target, blocks)
    state.measure(instances, daemons)
    gain: float | None = 0.0
    for owner, (_, _, slack_s, throughput) in zip(owners, before, strict=True):
        gain = gain + owner.throughput - throughput if gain is not None else None
        if owner.slack_s < min(slack_s, 0.0) - _EPSILON:
            gain = None  # remote attention would not hide any more
    for daemon, share in zip(daemons, hosting, strict=True):
        if daemon.hosting > max(share, most_hosting(state.policy, daemon)) + _EPSILON:
            gain = None

    state.shift(request, target, source, blocks)
    for owner, values in zip(owners, before, strict=True):
        owner.batch, owner.step_s, owner.slack_s, owner.throughput = values
    for daemon, share in zip(daemons, hosting, strict=True):
        daemon.hosting = share
    return gain


def most_hosting(policy: PlannerPolicy, daemon: Daemon) -> float:
    """Share of the daemon's time that hosting may take."""
    return policy.lender_share if daemon.owner is None else policy.creditor_share


def limits(state: State, request: Running, source: Daemon, target: Daemon, room: int) -> list[Limit]:
    """What bounds a move, as far as it can be told beforehand; ``weigh`` has the last word.

    Args:
        room: blocks that ``target`` can take.
    """
    home = request.instance.home
    there = request.movable if source is home else request.remote.get(source, 0)
    answer = [
        Limit(there, f"{source.id} has no more of its sealed blocks"),
        Limit(min(room, target.vacant), f"{target.id} has no more room"),
        Limit(link_room(state.policy, source), f"the link of {source.id} carries no more"),
        Limit(link_room(state.policy, target), f"the link of {target.id} carries no more"),
        Limit(_paid_back(state, request), f"{request.load.request_id} does not live long enough for more"),
    ]
    if target is not home:
        answer.append(Limit(_hidden(state, request, source, target), "no more hides under local attention"))
        answer.append(Limit(_hostable(state, request, target), f"{target.id} may spend no more on hosting"))
    return answer


def link_room(policy: PlannerPolicy, daemon: Daemon) -> int:
    """Blocks that may be ordered to move from or to a daemon."""
    carried = policy.move_bytes_per_s * policy.move_window_s / daemon.geometry.block_bytes
    return max(0, int(carried) - daemon.leaving - daemon.coming)


def _paid_back(state: State, request: Running) -> int:
    policy, instance = state.policy, request.instance
    remaining_s = request.load.remaining_tokens * instance.step_s
    return int(policy.payback * remaining_s * policy.move_bytes_per_s / instance.home.geometry.block_bytes)


def _hidden(state: State, request: Running, source: Daemon, target: Daemon) -> int:
    """All answers that a move makes longer, or beside which it makes local attention shorter, stay hidden."""
    policy, instance = state.policy, request.instance
    size, layers = instance.home.geometry.block_tokens, instance.home.geometry.layers
    costs = target.load.costs
    longer_s = costs.context_token_s * size  # an answer of the target, for each block
    shorter_s = instance.load.costs.context_token_s * size if source is instance.home else 0.0  # local attention

    loan = instance.borrowed.get(target)
    rows = (loan.rows if loan else 0) + (target not in request.remote)
    answer_s = costs.answer_s(layers, rows, target.hosted_tokens)
    left_s = policy.hide * instance.load.costs.local_s(instance.tokens) - answer_s
    bounds = [_ratio(left_s, longer_s + policy.hide * shorter_s)]
    if instance.borrowed:
        bounds.append(_ratio(instance.slack_s, policy.still_hide * shorter_s))
    for debtor in target.debtors:
        if debtor is not instance:
            answer_s = costs.answer_s(layers, debtor.borrowed[target].rows, target.hosted_tokens)
            left_s = policy.still_hide * debtor.load.costs.local_s(debtor.tokens) - answer_s
            bounds.append(_ratio(left_s, longer_s))
    return max(0, int(min(bounds)))


def _hostable(state: State, request: Running, target: Daemon) -> int:
    """With the debtor's steps as long as they are now."""
    instance, costs = request.instance, target.load.costs
    geometry = instance.home.geometry
    left_s = (most_hosting(state.policy, target) - target.hosting) * instance.step_s
    if instance not in target.debtors:
        left_s -= costs.compute_s(geometry.layers, 0)
    return max(0, int(_ratio(left_s, costs.context_token_s * geometry.block_tokens)))


def _ratio(total: float, each: float) -> float:
    return min(total / each, 1e15) if each > 0 else math.copysign(1e15, total)
