"""What a user can ask of a local cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from services.core.errors import ConfigError
from services.dataplane.device_name import parse_device
from services.dataplane.link_spec import parse_link

# The kinds of services that a --config file may add keys to.
SERVICE_KINDS = ("gmanager", "kvdaemon", "instance", "gateway")


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """One local cluster.

    Attributes:
        model: directory of the checkpoint.
        gmanagers: one leads, the others stand by.
        instances: engines, each with a KV daemon beside it.
        tensor_parallel: processes that compute one instance's model together, one number for all or one for each.
        kvdaemons: further KV daemons, which lend memory only.
        pool_mib: memory of each daemon's pool.
        http_port, grpc_port: of the gateway; 0 takes a free one.
        device: of instances and of the daemons beside them.
        memory_device: of the further KV daemons; None: the same.
        transport: data plane between instances and daemons; auto: the best that each two of them have.
        link: emulate such a link between each instance and daemon, as in "25gbit,50us"; None: as fast as it goes.
        max_model_len: longest context in tokens; None: the checkpoint's own.
        overlay: further keys of the services' configuration files, by kind of service.
        run_dir: None takes a new temporary directory.
        start_timeout_s: until the cluster must be ready.
    """

    model: Path
    gmanagers: int = 1
    instances: int = 2
    tensor_parallel: tuple[int, ...] = (1,)
    kvdaemons: int = 2
    pool_mib: int = 64
    dtype: str = "bfloat16"
    http_port: int = 8000
    grpc_port: int = 50051
    device: str = "cpu"
    memory_device: str | None = None
    transport: str = "auto"
    link: str | None = None
    max_model_len: int | None = None
    overlay: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    run_dir: Path | None = None
    start_timeout_s: float = 180.0

    def __post_init__(self) -> None:
        for option, value, least in (
            ("--gmanagers", self.gmanagers, 1),
            ("--instances", self.instances, 1),
            ("--tensor-parallel", min(self.tensor_parallel, default=0), 1),
            ("--kvdaemons", self.kvdaemons, 0),
            ("--pool-mib", self.pool_mib, 1),
            ("--http-port", self.http_port, 0),
            ("--grpc-port", self.grpc_port, 0),
            ("--max-model-len", 2 if self.max_model_len is None else self.max_model_len, 2),
        ):
            if value < least:
                raise ConfigError(f"{option} must be at least {least}, got {value}")
        if len(self.tensor_parallel) not in (1, self.instances):
            raise ConfigError(
                f"--tensor-parallel must be one number or one for each of {self.instances} instances, got "
                f"{len(self.tensor_parallel)}"
            )
        for option, port in (("--http-port", self.http_port), ("--grpc-port", self.grpc_port)):
            if port > 65535:
                raise ConfigError(f"{option} must be at most 65535, got {port}")
        if self.http_port == self.grpc_port != 0:
            raise ConfigError(f"--http-port and --grpc-port must differ, both are {self.http_port}")
        for device in filter(None, (self.device, self.memory_device)):
            parse_device(device)
        if self.link is not None:
            parse_link(self.link)
        if self.start_timeout_s <= 0:
            raise ConfigError(f"--start-timeout must be positive, got {self.start_timeout_s}")
