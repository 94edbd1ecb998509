"""Configuration of a KV daemon."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from services.core.errors import ConfigError
from services.dataplane.device_name import parse_device
from services.dataplane.link_spec import parse_link
from services.dataplane.select import Choice, ListenOptions
from services.runtime.tls import MutualTls, TlsConfig
from services.runtime.tracing import TracingConfig


@dataclass(frozen=True, slots=True)
class KvDaemonConfig:
    """One KV daemon, one pool.

    Attributes:
        cluster: name of the cluster; processes of different clusters never meet.
        member_id: unique among the cluster's KV daemons; the same after a restart.
        etcd: endpoints, host:port.
        pool_mib: memory of the pool, allocated in full at start.
        socket_dir: directory of the Unix sockets for local instances; the path must be short.
        listen: control address; port 0 takes a free one.
        transports: data planes to listen on and to reach other daemons over, best first. auto: shm, rdma where there is
            an adapter for it (and no tls), tcp.
        dataplane_listen: address of the data planes but shm; port 0 takes a free one for each. Otherwise tcp has this
            port, if it is among them, and each other one the next.
        dataplane_advertise: numeric host that peers of these data planes are told, where it is another than that of
            ``dataplane_listen``.
        health_listen: host:port for Kubernetes' probes.
        metrics_listen: host:port that serves /metrics over HTTP; port 0 takes a free one.
        tracing: where spans of requests are exported to (runtime/tracing.py); None: there are none.
        stall_timeout_s: a worker thread that has finished no round of its loop for so long is stuck.
        tls: identity on gRPC and on the tcp data plane.
        etcd_tls: towards etcd.
        allow_insecure: listen on addresses that other hosts reach, without TLS.
        huge_pages: the pool lies in huge pages of 2 MiB that the system has reserved for those who ask for them.
            Without, the system is asked to put small ones together as it can.
        device: where the pool lies and is computed on: cpu (host memory), cuda or cuda:N (that GPU's).
        link: emulate such a link to every instance, as in "25gbit,50us"; the instances must be told the same.
        num_threads: threads of the attention kernels.
        session_timeout_s: silence of a client after which its session ends.
        heartbeat_interval_s: between reports to the gManager.
    """

    cluster: str
    member_id: str
    etcd: tuple[str, ...]
    pool_mib: int
    socket_dir: Path
    listen: str = "127.0.0.1:0"
    transports: tuple[Choice, ...] = ("auto",)
    dataplane_listen: str = "127.0.0.1:0"
    dataplane_advertise: str | None = None
    health_listen: str | None = None
    metrics_listen: str | None = None
    tracing: TracingConfig | None = None
    stall_timeout_s: float = 120.0
    tls: MutualTls | None = None
    etcd_tls: TlsConfig | None = None
    allow_insecure: bool = False
    huge_pages: bool = False
    device: str = "cpu"
    link: str | None = None
    num_threads: int = 1
    session_timeout_s: float = 5.0
    heartbeat_interval_s: float = 0.25

    def __post_init__(self) -> None:
        for name in ("pool_mib", "num_threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"kvdaemon config: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("session_timeout_s", "heartbeat_interval_s", "stall_timeout_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"kvdaemon config: {name} must be positive, got {getattr(self, name)}")
        if not self.transports or len(set(self.transports)) < len(self.transports):
            raise ConfigError(
                f"kvdaemon config: transports must name at least one data plane and each once, got {self.transports}"
            )
        if parse_device(self.device).kind == "cuda" and self.huge_pages:
            raise ConfigError(f"kvdaemon config: huge_pages are of host memory, and device is {self.device!r}")
        if self.link is not None:
            parse_link(self.link)

    @property
    def pool_bytes(self) -> int:
        return self.pool_mib << 20

    @property
    def ping_interval_s(self) -> float:
        """What clients are told: several pings may be late before a session ends."""
        return self.session_timeout_s / 5

    @property
    def pool_socket(self) -> Path:
        """Passes the pool's memory to local instances."""
        return self.socket_dir / f"{self.member_id}.pool"

    @property
    def data_socket(self) -> Path:
        """The shm transport's."""
        return self.socket_dir / f"{self.member_id}.data"

    @property
    def dataplane(self) -> ListenOptions:
        return ListenOptions(
            self.data_socket, self.dataplane_listen, self.dataplane_advertise, self.allow_insecure, self.tls
        )
