"""Configuration of a gManager."""

from __future__ import annotations

from dataclasses import dataclass

from services.core.errors import ConfigError


@dataclass(frozen=True)
class GManagerConfig:
    """Keys of the gManager's YAML file.

    Attributes:
        cluster: name of the cluster; prefix of all its keys in etcd.
        member_id: this process's name among the gManagers.
        listen: host:port of the gRPC server; port 0 takes a free one.
        etcd: endpoints, host:port each.
        advertise: the address the other services are told; empty: the one it listens on.
        lease_ttl_s: etcd forgets the process this long after it died.
        watch_interval_s: changes of load reach a WatchInstances stream at most this often; changes of membership do
            at once.
        allow_insecure: listen on other than loopback without TLS.
    """

    cluster: str
    member_id: str
    listen: str
    etcd: tuple[str, ...]
    advertise: str = ""
    lease_ttl_s: int = 10
    watch_interval_s: float = 0.25
    allow_insecure: bool = False
    log_level: str = "INFO"

    def __post_init__(self) -> None:
        if not self.etcd:
            raise ConfigError("etcd: name at least one endpoint")
        if self.watch_interval_s <= 0:
            raise ConfigError(f"watch_interval_s must be greater than 0, got {self.watch_interval_s}")
        if self.lease_ttl_s < 2:
            raise ConfigError(f"lease_ttl_s must be at least 2, got {self.lease_ttl_s}")
