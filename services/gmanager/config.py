"""Configuration of a gManager."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.core.errors import ConfigError
from services.gmanager.planner.policy import PlannerPolicy
from services.runtime.tls import MutualTls, TlsConfig
from services.runtime.tracing import TracingConfig


@dataclass(frozen=True)
class KubernetesConfig:
    """Which pods are the KV daemons that may be given up; see ``deletion_cost.py``.

    Attributes:
        namespace: of those pods.
        pod_selector: labels that choose them.
        interval_s: between two looks at what has changed.
    """

    namespace: str
    pod_selector: str
    interval_s: float = 30.0

    def __post_init__(self) -> None:
        if self.interval_s <= 0:
            raise ConfigError(f"interval_s must be greater than 0, got {self.interval_s}")


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
        direct_heartbeats: processes that send their heartbeats to the gManager itself; the others' come by way of KV
            daemons among these (relays.py).
        heartbeats_per_relay: processes that one of these daemons relays for at most.
        planner: plan moves of blocks and have them made; otherwise blocks move only as memory runs out.
        plan_interval_s: from the end of one plan to the next.
        policy: what the planner may do, and for how much.
        health_listen: host:port for Kubernetes' probes.
        metrics_listen: host:port that serves /metrics over HTTP; port 0 takes a free one.
        tracing: where spans of requests are exported to (runtime/tracing.py); None: there are none.
        kubernetes: keep the deletion costs of the daemons' pods; None: there is no Kubernetes, or nothing scales.
        tls: identity on gRPC.
        etcd_tls: towards etcd.
        allow_insecure: listen on other than loopback without TLS.
    """

    cluster: str
    member_id: str
    listen: str
    etcd: tuple[str, ...]
    advertise: str = ""
    lease_ttl_s: int = 10
    watch_interval_s: float = 0.25
    direct_heartbeats: int = 256
    heartbeats_per_relay: int = 128
    planner: bool = True
    plan_interval_s: float = 1.0
    policy: PlannerPolicy = field(default_factory=PlannerPolicy)
    health_listen: str | None = None
    metrics_listen: str | None = None
    tracing: TracingConfig | None = None
    kubernetes: KubernetesConfig | None = None
    tls: MutualTls | None = None
    etcd_tls: TlsConfig | None = None
    allow_insecure: bool = False
    log_level: str = "INFO"

    def __post_init__(self) -> None:
        if not self.etcd:
            raise ConfigError("etcd: name at least one endpoint")
        for name in ("watch_interval_s", "plan_interval_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be greater than 0, got {getattr(self, name)}")
        for name in ("direct_heartbeats", "heartbeats_per_relay"):
            if getattr(self, name) < 2:
                raise ConfigError(f"{name} must be at least 2, got {getattr(self, name)}")
        if self.lease_ttl_s < 2:
            raise ConfigError(f"lease_ttl_s must be at least 2, got {self.lease_ttl_s}")
