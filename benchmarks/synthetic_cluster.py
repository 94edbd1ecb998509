"""A cluster load of any size, for measuring the planner: every instance different, some of them in need."""

from __future__ import annotations

import random

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

REQUESTS = 100  # of one instance
NOW = 1000.0

GEOMETRY = PoolGeometry(layers=32, kv_heads=8, block_tokens=64, head_dim=128, dtype="bfloat16")
_KV_BYTES = GEOMETRY.block_bytes / GEOMETRY.block_tokens
_DEVICE_RATE, _DRAM_RATE = 1.6e12, 150e9  # bytes/s
_IN_NEED, _BORROWS, _LONG = 0.2, 0.1, 0.02  # shares of instances, of instances, of requests


def synthetic_load(instances: int, seed: int) -> ClusterLoad:
    """``instances`` instances of a hundred requests each, with a pool each, and as many daemons that only lend memory.

    A fifth of the instances is short of memory and has requests waiting; a tenth borrows already.
    """
    rng = random.Random(seed)
    costs = InstanceCosts.roofline(16e9, 16e9, _KV_BYTES, _DEVICE_RATE, 190e12, overhead_s=1e-3)
    loads, daemons = [], []
    for number in range(instances):
        lender = f"m{number}"
        borrows = rng.random() < _BORROWS
        requests = tuple(_request(rng, f"{number}.{k}", lender if borrows else "") for k in range(REQUESTS))
        in_need = rng.random() < _IN_NEED
        waiting = tuple(
            WaitingLoad(rng.randint(200, 4000), rng.randint(50, 500))
            for _ in range(rng.randint(1, 40) if in_need else 0)
        )
        loads.append(InstanceLoad(f"i{number}", f"k{number}", 256, costs, NOW, requests, waiting))
        used = sum(request.local_blocks for request in requests)
        free = rng.randint(0, 60) if in_need else rng.randint(1000, 3000)
        hosted = sum(share.blocks for request in requests for share in request.remote)
        daemons.append(_daemon(f"k{number}", used + free, free, 20e-6, _DEVICE_RATE))
        daemons.append(_daemon(lender, 20_000, 20_000 - hosted, 40e-6, _DRAM_RATE))
    return ClusterLoad(tuple(loads), tuple(daemons))


def _request(rng: random.Random, request_id: str, lender: str) -> RequestLoad:
    context = rng.randint(20_000, 100_000) if rng.random() < _LONG else rng.randint(100, 3000)
    sealed, blocks = context // GEOMETRY.block_tokens, GEOMETRY.blocks_for(context)
    away = min(sealed // 4, 100) if lender and context >= 20_000 else 0
    remote = (RemoteShare(lender, away),) if away else ()
    return RequestLoad(request_id, context, rng.randint(50, 2000), blocks - away, sealed - away, remote)


def _daemon(kvdaemon_id: str, total: int, free: int, message_s: float, rate: float) -> DaemonLoad:
    costs = DaemonCosts(message_s, row_s=0.2e-6, query_s=5e-6, context_token_s=_KV_BYTES / rate)
    return DaemonLoad(kvdaemon_id, GEOMETRY, total, free, costs, NOW)
