"""A pool's geometry and use, as protobuf."""

from __future__ import annotations

from infinitellm.internal.v1 import pool_pb2
from services.core.blocks import PoolGeometry
from services.core.placement import PoolStats


def geometry_to_proto(geometry: PoolGeometry) -> pool_pb2.PoolGeometry:
    return pool_pb2.PoolGeometry(
        layers=geometry.layers,
        kv_heads=geometry.kv_heads,
        block_tokens=geometry.block_tokens,
        head_dim=geometry.head_dim,
        dtype=geometry.dtype,
    )


def stats_from_proto(stats: pool_pb2.PoolStats) -> PoolStats:
    return PoolStats(
        stats.pool_bytes,
        stats.block_bytes,
        stats.total,
        stats.free,
        stats.cached,
        stats.workspace,
        stats.reserved,
        stats.in_use,
    )


def stats_to_proto(stats: PoolStats) -> pool_pb2.PoolStats:
    return pool_pb2.PoolStats(
        pool_bytes=stats.pool_bytes,
        block_bytes=stats.block_bytes,
        total=stats.total,
        free=stats.free,
        cached=stats.cached,
        workspace=stats.workspace,
        reserved=stats.reserved,
        in_use=stats.in_use,
    )
