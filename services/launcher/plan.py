"""Which processes a local cluster consists of, and the configuration file of each. Pure: nothing is started or looked
up here, so the whole plan can be tested, printed and compared with the manifests of Kubernetes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from services.core.errors import ConfigError
from services.launcher.checkpoint_info import CheckpointInfo
from services.launcher.options import SERVICE_KINDS, ClusterOptions

CLUSTER = "local"
DEFAULT_BLOCK_TOKENS = 64

# What makes the processes find each other; an overlay of all services of a kind cannot mean to change it.
_OWNED_KEYS = frozenset(
    {"cluster", "member_id", "listen", "http_listen", "grpc_listen", "etcd", "redis_url", "socket_dir", "model"}
    | {"local_kvdaemon_id", "device", "pool_mib", "ready_instances", "ready_kvdaemons"}
)

Kind = Literal["etcd", "redis", "gmanager", "kvdaemon", "instance", "gateway"]


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process to start.

    Attributes:
        name: unique; names the log and the configuration file.
        argv: the whole command line.
        config: content of its configuration file, None where it has none.
        restart: start it again when it dies. etcd and Redis are not: their data would be another's.
    """

    name: str
    kind: Kind
    argv: tuple[str, ...]
    config: Mapping[str, object] | None = None
    restart: bool = False


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the plan takes from the machine: found binaries, free ports, directories, processors."""

    python: str
    etcd_binary: Path
    redis_binary: Path
    etcd_port: int
    etcd_peer_port: int
    redis_port: int
    http_port: int
    grpc_port: int
    configs: Path
    data: Path
    sockets: Path
    cpus: int


def make_plan(options: ClusterOptions, checkpoint: CheckpointInfo, around: Surroundings) -> tuple[ProcessSpec, ...]:
    """All processes in the order of their start.

    Raises:
        ConfigError: the overlay has keys that are not for it, or a pool is smaller than one rBlock.
    """
    check_overlay(options.overlay)
    check_pool(options, checkpoint)
    local_daemons = [f"kvdaemon-{index}" for index in range(options.instances)]
    memory_daemons = [f"kvdaemon-mem-{index}" for index in range(options.kvdaemons)]
    daemons = local_daemons + memory_daemons
    # All of them compute: instances the model, daemons the attention over what they hold.
    degrees = options.tensor_parallel * (options.instances if len(options.tensor_parallel) == 1 else 1)
    num_threads = max(1, around.cpus // (sum(degrees) + len(daemons)))
    common: dict[str, object] = {"cluster": CLUSTER, "etcd": [f"127.0.0.1:{around.etcd_port}"]}
    redis_url = f"redis://127.0.0.1:{around.redis_port}/0"

    def service(kind: Literal["gmanager", "kvdaemon", "instance", "gateway"], name: str, **keys: object) -> ProcessSpec:
        if kind != "gateway":  # it serves its metrics where it serves HTTP
            keys["metrics_listen"] = "127.0.0.1:0"
        config = {**common, "member_id": name, **keys, **options.overlay.get(kind, {})}
        argv = (around.python, "-m", f"services.{kind}", "--config", str(around.configs / f"{name}.yaml"))
        return ProcessSpec(name, kind, argv, config, restart=True)

    gmanagers = [service("gmanager", f"gmanager-{index}", listen="127.0.0.1:0") for index in range(options.gmanagers)]
    kvdaemons = [
        service(
            "kvdaemon",
            name,
            listen="127.0.0.1:0",
            pool_mib=options.pool_mib,
            device=options.device if name in local_daemons else options.memory_device or options.device,
            transports=[options.transport],
            link=options.link,
            socket_dir=str(around.sockets),
            num_threads=num_threads,
        )
        for name in daemons
    ]
    instances = [
        service(
            "instance",
            f"instance-{index}",
            listen="127.0.0.1:0",
            model=str(checkpoint.path),
            dtype=options.dtype,
            device=options.device,
            local_kvdaemon_id=daemon,
            transport=options.transport,
            link=options.link,
            socket_dir=str(around.sockets),
            max_model_len=options.max_model_len,
            num_threads=num_threads,
            tensor_parallel=degree,
        )
        for index, (daemon, degree) in enumerate(zip(local_daemons, degrees, strict=True))
    ]
    gateway = service(
        "gateway",
        "gateway-0",
        http_listen=f"127.0.0.1:{around.http_port}",
        grpc_listen=f"127.0.0.1:{around.grpc_port}",
        redis_url=redis_url,
        model=str(checkpoint.path),
        ready_instances=options.instances,
        ready_kvdaemons=len(daemons),
    )
    return (_etcd(around), _redis(around), *gmanagers, *kvdaemons, *instances, gateway)


def check_overlay(overlay: Mapping[str, Mapping[str, object]]) -> None:
    """Refuses what a --config file cannot set. Whether the services know the keys, they say themselves."""
    for kind, keys in overlay.items():
        if kind not in SERVICE_KINDS:
            raise ConfigError(f"--config: unknown service {kind}; the services are {', '.join(SERVICE_KINDS)}")
        for key in keys:
            if key in _OWNED_KEYS:
                raise ConfigError(f"--config: {kind}.{key} is set by the launcher and cannot be changed")


def check_pool(options: ClusterOptions, checkpoint: CheckpointInfo) -> None:
    """Refuses pools that hold no rBlock."""
    block_tokens = options.overlay.get("instance", {}).get("block_tokens", DEFAULT_BLOCK_TOKENS)
    if not isinstance(block_tokens, int) or isinstance(block_tokens, bool):
        raise ConfigError(f"--config: instance.block_tokens must be an integer, got {block_tokens!r}")
    geometry = checkpoint.geometry(block_tokens, options.dtype)
    if geometry is not None and options.pool_mib << 20 < geometry.block_bytes:
        raise ConfigError(
            f"--pool-mib {options.pool_mib} is smaller than one rBlock of this model "
            f"({geometry.block_bytes / 2**20:.1f} MiB: {block_tokens} tokens, {geometry.layers} layers, "
            f"{geometry.kv_heads} KV heads of {geometry.head_dim}, {geometry.dtype}); give more"
        )


def _etcd(around: Surroundings) -> ProcessSpec:
    client, peer = f"http://127.0.0.1:{around.etcd_port}", f"http://127.0.0.1:{around.etcd_peer_port}"
    argv = (
        str(around.etcd_binary),
        "--name=local",
        f"--data-dir={around.data / 'etcd'}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=local={peer}",
        "--unsafe-no-fsync",  # the data does not outlive the run
        "--log-level=warn",
    )
    return ProcessSpec("etcd", "etcd", argv)


def _redis(around: Surroundings) -> ProcessSpec:
    argv = (
        str(around.redis_binary),
        "--bind",
        "127.0.0.1",
        "--port",
        str(around.redis_port),
        "--dir",
        str(around.data),
        "--save",
        "",
        "--appendonly",
        "no",
    )
    return ProcessSpec("redis", "redis", argv)
