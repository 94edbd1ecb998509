"""This project's server: everything that ``infinite-llm up`` starts for one instance."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.peers.server import ServerCommand, Serving
from services.core.errors import ConfigError
from services.launcher.ports import free_ports

MAX_BATCH_TOKENS = 1024
_MIB = 1 << 20


def our_command(
    serving: Serving,
    directory: Path,
    settings: Mapping[str, Mapping[str, object]] | None = None,
    *,
    instances: int = 1,
) -> ServerCommand:
    """etcd, Redis, gManager, gateway, and instances, each with its share of the cores and of the KV cache beside it.

    Args:
        directory: where the run's files go.
        settings: further keys of the services' configuration, by kind of service.
    """
    http_port, grpc_port = free_ports(2)
    if serving.kv_bytes % (instances * _MIB):
        raise ConfigError(f"kv_bytes must be whole MiB for each of {instances} instances, got {serving.kv_bytes}")
    pool_mib = serving.kv_bytes // (instances * _MIB)
    overlay = directory / "ours-overlay.yaml"
    own: dict[str, object] = {
        "max_num_seqs": serving.max_num_seqs,
        "max_batch_tokens": MAX_BATCH_TOKENS,
        "num_threads": max(1, len(serving.cores) // instances),
    }
    merged = {**(settings or {}), "instance": {**own, **(settings or {}).get("instance", {})}}
    overlay.write_text(json.dumps(merged))  # JSON is YAML
    argv = (
        *(sys.executable, "-m", "services.launcher.cli", "up", "--model", str(serving.checkpoint)),
        *("--instances", str(instances), "--kvdaemons", "0", "--pool-mib", str(pool_mib)),
        *("--dtype", "bfloat16", "--max-model-len", str(serving.max_model_len), "--config", str(overlay)),
        *("--http-port", str(http_port), "--grpc-port", str(grpc_port), "--run-dir", str(directory / "ours-run")),
    )
    return ServerCommand("ours", serving.checkpoint.name, http_port, argv, {})
