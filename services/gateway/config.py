"""Configuration of a gateway."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from services.core.errors import ConfigError
from services.runtime.tls import MutualTls, TlsConfig
from services.runtime.tracing import TracingConfig


@dataclass(frozen=True)
class GatewayConfig:
    """Keys of the gateway's YAML file.

    Attributes:
        cluster: name of the cluster; prefix of all its keys in etcd and Redis.
        member_id: this process's name among the gateways.
        http_listen: host:port of the OpenAI API.
        grpc_listen: host:port of the public gRPC API.
        etcd: endpoints, host:port each.
        model: directory of the checkpoint: config.json, and tokenizer.json where it has one.
        redis_url: where the request journal is kept; None keeps none.
        served_model_name: the name clients use; None: the directory's name.
        max_model_len: tokens of prompt and answer together, at most; None: what the checkpoint and the instances allow.
        ready_instances: /health answers 200 when so many instances are connected ...
        ready_kvdaemons: ... and so many KV daemons are registered.
        stream_timeout_s: an instance that says nothing for so long has lost its requests to another one.
        instance_wait_s: how long a request waits for an instance to be there.
        max_failovers: instances a request may lose in a row without having got a token from any.
        max_queue: requests in work at most; more are answered 429.
        max_body_bytes: size of an HTTP request at most.
        vllm_metric_names: serve the core metrics under vLLM's names as well.
        tracing: where spans of requests are exported to (runtime/tracing.py); None: there are none.
        tokenizer_threads: prompts tokenized at the same time.
        journal_ttl_s: how long Redis keeps a request after its last token: so long it can be resumed.
        journal_buffer_bytes: what is kept for a Redis that is away; the oldest is dropped first.
        shutdown_grace_s: how long requests may go on after SIGTERM.
        advertise: address of the gRPC API that is registered; empty: the one it listens on.
        health_listen: host:port for Kubernetes' probes.
        api_keys: file with the keys of those who may use both APIs (runtime/api_keys.py); None: everybody may.
        tls: identity on gRPC, to instances, gManager and clients. HTTP is plain: whatever is in front of it ends TLS.
        etcd_tls: towards etcd.
        allow_insecure: listen on other than loopback without TLS.
    """

    cluster: str
    member_id: str
    http_listen: str
    grpc_listen: str
    etcd: tuple[str, ...]
    model: Path
    redis_url: str | None = None
    served_model_name: str | None = None
    max_model_len: int | None = None
    ready_instances: int = 1
    ready_kvdaemons: int = 0
    stream_timeout_s: float = 5.0
    instance_wait_s: float = 60.0
    max_failovers: int = 8
    max_queue: int = 1024
    max_body_bytes: int = 64 * 1024 * 1024
    vllm_metric_names: bool = False
    tracing: TracingConfig | None = None
    tokenizer_threads: int = 2
    journal_ttl_s: int = 24 * 3600
    journal_buffer_bytes: int = 64 * 1024 * 1024
    shutdown_grace_s: float = 5.0
    lease_ttl_s: int = 10
    advertise: str = ""
    health_listen: str | None = None
    api_keys: Path | None = None
    tls: MutualTls | None = None
    etcd_tls: TlsConfig | None = None
    allow_insecure: bool = False
    log_level: str = "INFO"

    def __post_init__(self) -> None:
        if not self.etcd:
            raise ConfigError("etcd: name at least one endpoint")
        for name, value in (
            ("stream_timeout_s", self.stream_timeout_s),
            ("instance_wait_s", self.instance_wait_s),
            ("max_queue", self.max_queue),
            ("max_body_bytes", self.max_body_bytes),
            ("tokenizer_threads", self.tokenizer_threads),
            ("journal_ttl_s", self.journal_ttl_s),
            ("journal_buffer_bytes", self.journal_buffer_bytes),
            ("max_model_len", 1 if self.max_model_len is None else self.max_model_len),
        ):
            if value <= 0:
                raise ConfigError(f"{name} must be greater than 0, got {value}")
        if self.ready_instances < 0 or self.ready_kvdaemons < 0 or self.max_failovers < 0 or self.shutdown_grace_s < 0:
            raise ConfigError(
                "ready_instances, ready_kvdaemons, max_failovers and shutdown_grace_s must not be negative"
            )
