"""What the gateway knows of the cluster from its gManager: plain types."""

from __future__ import annotations

from dataclasses import dataclass

from services.core.placement import AdmissionHint, PeerTransport, PlacementEntry, PoolStats


@dataclass(frozen=True, slots=True)
class InstanceView:
    """One instance; ``local_free_blocks`` are free and cached blocks of its own daemon's pool. ``hint`` is None where a
    new request would do better elsewhere, and where nobody plans. ``transports`` are of the daemons that it is
    connected to."""

    instance_id: str
    address: str
    max_model_len: int
    local_kvdaemon_id: str
    running: int
    waiting: int
    local_free_blocks: int
    heartbeat_age_s: float
    hint: AdmissionHint | None = None
    transports: tuple[PeerTransport, ...] = ()


@dataclass(frozen=True, slots=True)
class KvDaemonView:
    kvdaemon_id: str
    address: str
    stats: PoolStats
    heartbeat_age_s: float


@dataclass(frozen=True, slots=True)
class RequestView:
    request_id: str
    instance_id: str
    placement: tuple[PlacementEntry, ...]


@dataclass(frozen=True, slots=True)
class GManagerView:
    gmanager_id: str
    address: str
    leads: bool


@dataclass(frozen=True, slots=True)
class ClusterState:
    """Everything the gManager knows."""

    instances: tuple[InstanceView, ...]
    kvdaemons: tuple[KvDaemonView, ...]
    requests: tuple[RequestView, ...]
    gmanagers: tuple[GManagerView, ...]
