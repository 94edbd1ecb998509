"""Configuration of an instance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from services.core.errors import ConfigError
from services.dataplane.device_name import parse_device
from services.dataplane.link_spec import parse_link
from services.dataplane.select import Choice
from services.instance.passes import PASSES, PassName
from services.runtime.tls import MutualTls, TlsConfig
from services.runtime.tracing import TracingConfig


@dataclass(frozen=True, slots=True)
class InstanceConfig:
    """See docs/configuration in the README; every key of the YAML file is a field here.

    Attributes:
        cluster: name of the cluster, the prefix of its keys in etcd.
        member_id: this instance's name, unique in the cluster.
        listen: host:port of the control server; port 0 takes a free one.
        etcd: endpoints, host:port.
        model: directory of the checkpoint (config.json, safetensors).
        local_kvdaemon_id: the daemon on this host whose pool is mapped.
        socket_dir: directory for Unix sockets, shared with the local daemon.
        dtype: element type of weights and KV cache.
        transport: data plane to other daemons. auto: for each daemon shm, if it is on this host and shares its socket's
            directory; else rdma, if both have an adapter for it (and no tls); else tcp.
        device: what computes: cpu, cuda or cuda:N; the local daemon's pool must lie there.
        link: emulate such a link to every daemon, as in "25gbit,50us"; the daemons must be told the same.
        max_model_len: longest context in tokens; the checkpoint's own limit where not given.
        max_num_seqs: sequences in one batch at most.
        max_batch_tokens: tokens computed in one step at most; the size of a prefill chunk.
        move_bytes_per_s: about how fast blocks move that the planner wants elsewhere, while requests are computed; it
            counts on as much (move_bytes_per_s of its policy). A few blocks a step are the most, one the least.
        mixed_step_s: about how long a step takes at most that computes prompts beside requests that decode; chunks are
            made as small as that needs.
        block_tokens: tokens of an rBlock.
        num_threads: of the model and of the kernels, in each process.
        tensor_parallel: processes that compute the model together, each with its share of the heads and weights.
        rank_timeout_s: one of them that does not answer for so long counts as lost, and the instance ends.
        passes: over the loaded model, as services/instance/passes names them; all that apply where not given. None is
            applied to a model that several processes share.
        record_steps: on a GPU, keep what small steps ask it for between attention calls (CUDA graphs), and ask again at
            once; costs seconds at start and some memory.
        ship_float32: ship partial outputs as float32 instead of ``dtype``.
        transfer_timeout_s: a daemon that has not answered a layer's query by then counts as lost.
        call_timeout_s: deadline of a control call to a daemon.
        startup_timeout_s: how long to wait for the local daemon at start.
        heartbeat_interval_s: between reports to the gManager.
        health_listen: host:port for Kubernetes' probes.
        metrics_listen: host:port that serves /metrics over HTTP; port 0 takes a free one.
        vllm_metric_names: serve the core metrics under vLLM's names as well.
        tracing: where spans of requests are exported to (runtime/tracing.py); None: there are none.
        stall_timeout_s: an engine that has finished no step for so long is stuck; longer than any step may take.
        tls: identity on gRPC and on the tcp data plane.
        etcd_tls: towards etcd.
        allow_insecure: listen on other than loopback without TLS.
    """

    cluster: str
    member_id: str
    etcd: tuple[str, ...]
    model: Path
    local_kvdaemon_id: str
    socket_dir: Path
    listen: str = "127.0.0.1:0"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    transport: Choice = "auto"
    device: str = "cpu"
    link: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_batch_tokens: int = 1024
    move_bytes_per_s: float = 256 * 2**20
    mixed_step_s: float = 0.2
    block_tokens: int = 64
    num_threads: int = 1
    tensor_parallel: int = 1
    rank_timeout_s: float = 10.0
    passes: tuple[PassName, ...] = PASSES
    record_steps: bool = True
    ship_float32: bool = False
    transfer_timeout_s: float = 60.0
    call_timeout_s: float = 10.0
    startup_timeout_s: float = 60.0
    heartbeat_interval_s: float = 0.25
    health_listen: str | None = None
    metrics_listen: str | None = None
    vllm_metric_names: bool = False
    tracing: TracingConfig | None = None
    stall_timeout_s: float = 300.0
    tls: MutualTls | None = None
    etcd_tls: TlsConfig | None = None
    allow_insecure: bool = False

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_batch_tokens", "block_tokens", "num_threads", "tensor_parallel"):
            if getattr(self, name) < 1:
                raise ConfigError(f"instance config: {name} must be at least 1, got {getattr(self, name)}")
        if self.block_tokens % 16:
            raise ConfigError(f"instance config: block_tokens must be a multiple of 16, got {self.block_tokens}")
        if parse_device(self.device).kind != "cpu" and self.block_tokens & (self.block_tokens - 1):
            raise ConfigError(
                f"instance config: block_tokens must be a power of two on device {self.device}, got {self.block_tokens}"
            )
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ConfigError(f"instance config: max_model_len must be at least 2, got {self.max_model_len}")
        if self.max_batch_tokens < self.max_num_seqs:
            raise ConfigError(
                f"instance config: max_batch_tokens ({self.max_batch_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}), or running sequences could not all take a step"
            )
        for name in (
            "move_bytes_per_s",
            "mixed_step_s",
            "transfer_timeout_s",
            "call_timeout_s",
            "startup_timeout_s",
            "heartbeat_interval_s",
            "rank_timeout_s",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"instance config: {name} must be positive, got {getattr(self, name)}")
        if self.stall_timeout_s <= self.transfer_timeout_s:
            raise ConfigError(
                f"instance config: stall_timeout_s ({self.stall_timeout_s}) must be greater than transfer_timeout_s "
                f"({self.transfer_timeout_s}), for which a healthy step may wait"
            )
        if self.link is not None:
            parse_link(self.link)
