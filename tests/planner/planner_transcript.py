"""Clusters as readable text, and plans as text: what the golden transcripts are made of.

A transcript is a YAML file of two documents. The first is written by hand: the cluster, and what is to be seen. The
second is what the planner makes of it. See testdata/.
"""

from __future__ import annotations

import math
from typing import Any

import yaml

from services.core.blocks import PoolGeometry
from services.gmanager.cost_model import DaemonCosts, InstanceCosts
from services.gmanager.planner.load import (
    ClusterLoad,
    DaemonLoad,
    InstanceLoad,
    RemoteShare,
    RequestLoad,
    WaitingLoad,
)
from services.gmanager.planner.plan import Plan, apply
from services.gmanager.planner.planner import plan
from services.gmanager.planner.policy import PlannerPolicy
from services.gmanager.planner.state import State

NOW = 1000.0
SEPARATOR = "--- # the plan\n"

# A model of 6.7 billion parameters with 32 layers and multi-head attention, in 16 bit: 512 KiB a token.
GEOMETRY = PoolGeometry(layers=32, kv_heads=32, block_tokens=64, head_dim=128, dtype="float16")
_KV_BYTES = GEOMETRY.block_bytes / GEOMETRY.block_tokens

# Rates that are reached: 1.6 and 3.8 TB/s, 190 and 600 TFLOP/s; host DRAM lends at 150 GB/s over a network.
INSTANCE_COSTS = {
    "a100": InstanceCosts.roofline(13.5e9, 13.5e9, _KV_BYTES, 1.6e12, 190e12, overhead_s=1e-3),
    "h200": InstanceCosts.roofline(13.5e9, 13.5e9, _KV_BYTES, 3.8e12, 600e12, overhead_s=1e-3),
}
DAEMON_COSTS = {
    "a100": DaemonCosts(message_s=10e-6, row_s=0.1e-6, query_s=5e-6, context_token_s=_KV_BYTES / 1.6e12),
    "h200": DaemonCosts(message_s=10e-6, row_s=0.1e-6, query_s=5e-6, context_token_s=_KV_BYTES / 3.8e12),
    "dram": DaemonCosts(message_s=30e-6, row_s=1e-6, query_s=10e-6, context_token_s=_KV_BYTES / 150e9),
}


def read_cluster(text: str) -> tuple[ClusterLoad, PlannerPolicy]:
    """The first document of a transcript."""
    document = yaml.safe_load(text.partition(SEPARATOR)[0])
    instances = tuple(_instance(name, entry) for name, entry in document["instances"].items())
    used: dict[str, int] = {}
    for instance in instances:
        for request in instance.requests:
            used[instance.kvdaemon_id] = used.get(instance.kvdaemon_id, 0) + request.local_blocks
            for share in request.remote:
                used[share.kvdaemon_id] = used.get(share.kvdaemon_id, 0) + share.blocks
    daemons = tuple(_daemon(name, entry, used.get(name, 0)) for name, entry in document["kvdaemons"].items())
    return ClusterLoad(instances, daemons), PlannerPolicy(**document.get("policy", {}))


def _instance(name: str, entry: dict[str, Any]) -> InstanceLoad:
    return InstanceLoad(
        instance_id=name,
        kvdaemon_id=entry["pool"],
        max_batch=entry.get("max_batch", 256),
        costs=INSTANCE_COSTS[entry["device"]],
        heard_at=NOW - entry.get("heard_s_ago", 0.5),
        requests=tuple(
            _request(request_id, values)
            for label, values in entry.get("requests", {}).items()
            for request_id in _names(label, values)
        ),
        waiting=tuple(
            WaitingLoad(group["context"], group["remaining"])
            for group in entry.get("waiting", ())
            for _ in range(group.get("count", 1))
        ),
    )


def _names(label: str, values: dict[str, Any]) -> list[str]:
    return [f"{label}{k}" for k in range(values["count"])] if "count" in values else [label]


def _request(request_id: str, values: dict[str, Any]) -> RequestLoad:
    remote = tuple(RemoteShare(name, blocks) for name, blocks in values.get("remote", {}).items())
    away = sum(share.blocks for share in remote)
    return RequestLoad(
        request_id,
        values["context"],
        values["remaining"],
        local_blocks=GEOMETRY.blocks_for(values["context"]) - away,
        movable_blocks=values["context"] // GEOMETRY.block_tokens - away - values.get("shared", 0),
        remote=remote,
        moved_at=NOW - values["moved_s_ago"] if "moved_s_ago" in values else -math.inf,
    )


def _daemon(name: str, entry: dict[str, Any], used: int) -> DaemonLoad:
    return DaemonLoad(
        name,
        GEOMETRY,
        entry["blocks"],
        entry["blocks"] - used,
        DAEMON_COSTS[entry["device"]],
        heard_at=NOW - entry.get("heard_s_ago", 0.5),
        leaving_blocks=entry.get("leaving", 0),
        coming_blocks=entry.get("coming", 0),
    )


def render(load: ClusterLoad, policy: PlannerPolicy) -> str:
    """The second document: what the planner does, and the cluster before and after."""
    answer = plan(load, NOW, policy)
    lines = ["before:", *_table(load, policy)]
    lines += ["moves:" if answer.moves else "moves: none", *_moves(answer)]
    if answer.unmet:
        lines += ["stays short of memory:", *(f"  {entry.instance_id}: {entry.reason}" for entry in answer.unmet)]
    if answer.moves:
        lines += ["after:", *_table(apply(load, answer.moves, NOW), policy)]
    lines += ["a new request should start on:" if answer.hints else "a new request should start on: nobody has room"]
    lines += [
        f"  {hint.instance_id}: {hint.room_blocks} blocks free, {hint.gain:+.1f} tokens/s" for hint in answer.hints
    ]
    return SEPARATOR + "plan: |\n" + "".join(f"  {line}\n" for line in lines)


def _moves(answer: Plan) -> list[str]:
    lines = []
    for move in answer.moves:
        what = (
            f"{move.kind} {move.blocks} blocks of {move.request_id} ({move.debtor}): {move.source} -> {move.creditor}"
        )
        lines += [f"  {what}, {move.gain:+.1f} tokens/s", *(f"    {part}" for part in move.reason.split("; "))]
    return lines


def _table(load: ClusterLoad, policy: PlannerPolicy) -> list[str]:
    state = State(load, NOW, policy)
    lines = []
    for instance in state.instances:
        home = instance.home
        there = len(instance.load.requests) + len(instance.load.waiting)
        lines.append(
            f"  {instance.id:<4} batch {instance.batch:>3} of {there:>3}"
            f"   step {1e3 * instance.step_s:6.2f} ms   {instance.throughput:7.1f} tokens/s"
            f"   {home.id} {home.free:>5} of {home.load.total_blocks} free, hosts {home.hosted}"
        )
    for daemon in state.daemons.values():
        if daemon.owner is None:
            lines.append(
                f"  {daemon.id:<4} lends memory only, {daemon.hosting:6.1%} of its time"
                f"   {daemon.free} of {daemon.load.total_blocks} free, hosts {daemon.hosted}"
            )
    return [*lines, f"  all  {state.throughput():.1f} tokens/s"]
