"""Two clusters that differ in where one long request's KV cache lies: all of it beside the instance, or a quarter.

The share follows from the size of the pools, so nothing in the system knows that it is measured. Both clusters have one
instance with the same settings and the same number of threads in every process; the second has three daemons more,
which lend memory, and with the memory the arithmetic on it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.core.blocks import PoolGeometry
from services.core.errors import ConfigError
from services.instance.assembly import size_workspace
from services.instance.config import InstanceConfig
from services.launcher.cluster import LocalCluster
from services.launcher.console import Console
from services.launcher.options import ClusterOptions
from services.launcher.session import run_cluster

LENDERS = 3
SHARES = 1 + LENDERS  # the instance's own daemon keeps one of them
_CHUNKS = (1024, 512, 256, 128, 64)  # sizes of a prefill chunk, in tokens

ClustersBody = Callable[[Sequence[LocalCluster]], Coroutine[None, None, int]]


@dataclass(frozen=True, slots=True)
class PlacementPlan:
    """What the two clusters are started with.

    Attributes:
        chunk_tokens: prefill chunk of both: the largest whose blocks leave a small enough pool.
    """

    chunk_tokens: int
    local: ClusterOptions
    remote: ClusterOptions


def plan_placements(model: Path, geometry: PoolGeometry, prompt_tokens: int, max_tokens: int) -> PlacementPlan:
    """Pools for one request of ``prompt_tokens`` that generates up to ``max_tokens``.

    Raises:
        ConfigError: a quarter of the prompt is too small a pool for any instance.
    """
    share_blocks = geometry.blocks_for(prompt_tokens) // SHARES
    blocks_per_mib = (1 << 20) / geometry.block_bytes
    for chunk_tokens in _CHUNKS:
        config = _instance_config(model, geometry, chunk_tokens)
        workspace = size_workspace(config, total_blocks=1 << 30).blocks + 1  # and the tail
        # Pools have whole MiB: what comes closest to a quarter.
        pool_mib = round((share_blocks + workspace) / blocks_per_mib)
        try:
            size_workspace(config, int(pool_mib * blocks_per_mib))
        except ConfigError:
            continue
        local_blocks = geometry.blocks_for(prompt_tokens + max_tokens) + workspace
        local_mib = -(-local_blocks * geometry.block_bytes // (1 << 20))
        return PlacementPlan(
            chunk_tokens,
            local=_cluster_options(config, kvdaemons=0, pool_mib=local_mib),
            remote=_cluster_options(config, kvdaemons=LENDERS, pool_mib=pool_mib),
        )
    raise ConfigError(
        f"a quarter of {prompt_tokens} tokens is {share_blocks} rBlocks: too few for an instance's own pool; "
        "give a longer context"
    )


async def run_clusters(options: Sequence[ClusterOptions], console: Console, body: ClustersBody) -> int:
    """Starts several clusters, does ``body`` with them, and ends them. Answers the body's exit code, or 130."""

    async def start_next(started: Sequence[LocalCluster]) -> int:
        if len(started) == len(options):
            return await body(started)

        async def go_on(cluster: LocalCluster, _: Console) -> int:
            return await start_next([*started, cluster])

        return await run_cluster(options[len(started)], console, go_on, serve=False)

    return await start_next([])


def _instance_config(model: Path, geometry: PoolGeometry, chunk_tokens: int) -> InstanceConfig:
    """The instance as far as it decides about its workspace; the launcher fills in the rest."""
    return InstanceConfig(
        cluster="",
        member_id="",
        etcd=(),
        model=model,
        local_kvdaemon_id="",
        socket_dir=Path(),
        max_num_seqs=1,
        max_batch_tokens=chunk_tokens,
        block_tokens=geometry.block_tokens,
        num_threads=max(1, len(os.sched_getaffinity(0)) // SHARES),
    )


def _cluster_options(config: InstanceConfig, kvdaemons: int, pool_mib: int) -> ClusterOptions:
    return ClusterOptions(
        model=config.model,
        instances=1,
        kvdaemons=kvdaemons,
        pool_mib=pool_mib,
        http_port=0,
        grpc_port=0,
        overlay={
            "instance": {
                "max_num_seqs": config.max_num_seqs,
                "max_batch_tokens": config.max_batch_tokens,
                "block_tokens": config.block_tokens,
                "num_threads": config.num_threads,
            },
            "kvdaemon": {"num_threads": config.num_threads},
        },
    )
