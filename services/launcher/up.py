"""``infinite-llm up``: serves a checkpoint from a cluster on this machine."""

from __future__ import annotations

import asyncio
import json
import shlex

from services.launcher.checkpoint_info import CheckpointInfo
from services.launcher.cluster import LocalCluster
from services.launcher.console import Console
from services.launcher.options import ClusterOptions
from services.launcher.session import run_cluster


def up(options: ClusterOptions) -> int:
    """Runs a cluster until it is interrupted; answers the exit code."""
    return asyncio.run(run_cluster(options, Console(), _announce, serve=True))


async def _announce(cluster: LocalCluster, console: Console) -> int:
    prompt = "Once upon a time" if cluster.checkpoint.has_tokenizer else [1, 2, 3]
    print_addresses(cluster, console)
    console.line(curl_line(cluster.http_address, cluster.checkpoint, prompt, max_tokens=32))
    return 0


def print_addresses(cluster: LocalCluster, console: Console) -> None:
    """Where the cluster answers, and where its files are."""
    _, _, grpc_port = cluster.grpc_address.rpartition(":")
    console.line(f"HTTP    http://{cluster.http_address}/v1/completions")
    console.line(f"gRPC    {cluster.grpc_address} (infinitellm.v1)")
    console.line(f"status  infinite-llm status --grpc-port {grpc_port}")
    console.line(f"metrics http://{cluster.http_address}/metrics, and everybody's by /metrics/targets (http_sd)")
    console.line(f"logs    {cluster.run.logs}")


def curl_line(http_address: str, checkpoint: CheckpointInfo, prompt: str | list[int], max_tokens: int) -> str:
    """A command to paste into a shell."""
    body = {"model": checkpoint.name, "prompt": prompt, "max_tokens": max_tokens}
    return (
        f"curl http://{http_address}/v1/completions -H 'Content-Type: application/json' "
        f"-d {shlex.quote(json.dumps(body))}"
    )
