"""``infinite-llm status``: instances, how they reach daemons, pool use, and where the blocks of every request lie."""

from __future__ import annotations

import dataclasses
import json

from infinitellm import Client, ClusterStatus, RequestStatus, RetryPolicy
from services.launcher.console import table

_TIMEOUT_S = 5.0


def status(grpc_address: str, api_key: str | None, *, as_json: bool) -> int:
    """Prints the cluster's state; answers the exit code."""
    with Client(grpc_address, api_key=api_key, retry=RetryPolicy(attempts=1)) as client:
        state = client.cluster_status(_TIMEOUT_S)
    print(json.dumps(dataclasses.asdict(state), indent=2) if as_json else status_text(state))
    return 0


def status_text(state: ClusterStatus) -> str:
    """The state as tables."""
    gmanagers = [
        (gmanager.gmanager_id, gmanager.address, "leads" if gmanager.leads else "stands by")
        for gmanager in state.gmanagers
    ]
    instances = [
        (
            instance.instance_id,
            instance.address,
            instance.local_kvdaemon_id,
            str(instance.running_requests),
            str(instance.waiting_requests),
            f"{instance.heartbeat_age_s:.1f}",
        )
        for instance in state.instances
    ]
    transports = [
        (instance.instance_id, peer.kvdaemon_id, peer.transport)
        for instance in state.instances
        for peer in instance.transports
    ]
    daemons = [
        (
            daemon.kvdaemon_id,
            daemon.address,
            f"{daemon.pool_bytes / 2**20:.0f}",
            *(str(count) for count in dataclasses.astuple(daemon.use)),
            f"{daemon.heartbeat_age_s:.1f}",
        )
        for daemon in state.kvdaemons
    ]
    instance_header = ("INSTANCE", "ADDRESS", "LOCAL KVDAEMON", "RUNNING", "WAITING", "HEARTBEAT s")
    daemon_header = ("KVDAEMON", "ADDRESS", "POOL MiB", "BLOCKS", "FREE", "CACHED", "WORKSPACE", "RESERVED", "IN USE")
    parts = [
        f"models: {', '.join(state.models) or 'none'}",
        table(("GMANAGER", "ADDRESS", "ROLE"), gmanagers),
        table(instance_header, instances),
        table((*daemon_header, "HEARTBEAT s"), daemons),
        table(("INSTANCE", "REACHES KVDAEMON", "OVER"), transports)
        if transports
        else "no instance is connected to another's daemon",
    ]
    parts += [placement_text(request) for request in state.requests] or ["no request is running"]
    return "\n\n".join(parts)


def placement_text(request: RequestStatus) -> str:
    """Where one request's rBlocks lie."""
    total = sum(part.num_blocks for part in request.placement)
    rows = [
        (
            part.kvdaemon_id,
            str(part.num_blocks),
            f"{100 * part.num_blocks / total:.1f}" if total else "0.0",
            "local" if part.local else "remote",
        )
        for part in request.placement
    ]
    title = f"request {request.request_id} on {request.instance_id}: {total} rBlocks"
    return f"{title}\n{table(('KVDAEMON', 'RBLOCKS', '%', 'WHERE'), rows)}" if rows else title
