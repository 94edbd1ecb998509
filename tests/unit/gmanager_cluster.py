"""Members of a small cluster, and what they report."""

from __future__ import annotations

from services.core.blocks import PoolGeometry
from services.core.placement import (
    KvDaemonReport,
    PoolStats,
)
from services.runtime.membership import Member

GEOMETRY = PoolGeometry(layers=2, kv_heads=2, block_tokens=64, head_dim=32, dtype="float32")
BLOCK = GEOMETRY.block_bytes


def instance(name: str) -> Member:
    return Member("instance", name, f"{name}:1", "m", 100_000, f"k{name}")


def pool(total: int, free: int, workspace: int = 4) -> KvDaemonReport:
    stats = PoolStats(total * BLOCK, BLOCK, total, free=free, workspace=workspace, in_use=total - free - workspace)
    return KvDaemonReport(stats, GEOMETRY)
