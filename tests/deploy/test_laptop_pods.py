"""The laptop overlay, started as it is written: ready, right, and ended in time; and once more with mutual TLS.

``pod_processes.py`` says what is not as written.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import httpx
import pytest
from authority import SecretDirectory
from manifests import Document, overlay, with_component
from pod_processes import LocalPods

from infinitellm import Client, InfiniteLLMError
from infinitellm.internal.v1 import kvdaemon_pb2, kvdaemon_pb2_grpc
from services.launcher.needle.spec import needle_spec
from services.launcher.needle.task import make_task

STATE, SERVICES = ("etcd", "redis"), ("gmanager", "kvdaemon", "instance", "gateway")
CONTEXT_TOKENS = 2000
TASK = make_task(needle_spec("std").vocabulary, CONTEXT_TOKENS, 0.4, seed=3)


@contextmanager
def ready(documents: tuple[Document, ...]) -> Iterator[LocalPods]:
    """All pods, past their startup, readiness and liveness probes."""
    with (
        tempfile.TemporaryDirectory(prefix="pods-", dir="/tmp") as directory,  # a socket's path must be short
        LocalPods(documents, Path(directory)) as cluster,
    ):
        assert {pod.template.name for pod in cluster.pods.values()} == {*STATE, *SERVICES}
        for kinds in (STATE, SERVICES):
            chosen = [pod for kind in kinds for pod in cluster.of(kind)]
            for pod in chosen:
                pod.start()
            for kind in ("startup", "readiness", "liveness"):
                for pod in chosen:
                    pod.wait_until(kind)
        yield cluster


def check_answer(cluster: LocalPods) -> None:
    (gateway,) = cluster.of("gateway")
    with httpx.Client(base_url=f"http://{gateway.ip}:8000", timeout=240, trust_env=False) as http:
        assert http.get("/health").json()["instances"] == 1
        body = {"model": "needle", "prompt": TASK.prompt_text, "max_tokens": 20, "temperature": 0}
        answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"] == TASK.expected_text


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_the_pods_become_ready_serve_and_end() -> None:
    with ready(overlay("laptop")) as cluster:
        check_answer(cluster)

        # A daemon's loss ends its instance, and nobody else; kubelet's part is to start both containers anew.
        (instance,) = cluster.of("instance")
        daemon, engine = instance.containers
        daemon.kill()
        assert engine.running.wait(60) == 1
        assert instance.probe(engine, "readiness")
        for container in instance.containers:
            container.start()
        for kind in ("startup", "readiness"):
            instance.wait_until(kind)

        for kind in reversed((*STATE, *SERVICES)):
            for pod in cluster.of(kind):
                pod.stop()
                codes = {container.name: container.running.returncode for container in pod.containers}
                assert set(codes.values()) <= ({0, -15} if kind in STATE else {0}), (pod.name, codes)


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_with_mutual_tls(tmp_path: Path) -> None:
    """The tls component added: every connection needs a certificate, etcd's and the public gRPC API's among them."""
    with ready(with_component("laptop", "tls", tmp_path)) as cluster:
        check_answer(cluster)
        (gateway,) = cluster.of("gateway")

        def credentials(name: str) -> grpc.ChannelCredentials:
            directory = SecretDirectory(tmp_path / name)
            directory.put(cluster.authority.issue(name), cluster.authority.pem)
            tls = directory.tls
            return grpc.ssl_channel_credentials(tls.ca.read_bytes(), tls.key.read_bytes(), tls.cert.read_bytes())

        options = (("grpc.ssl_target_name_override", "kvdaemon.infinite-llm"), ("grpc.enable_http_proxy", 0))
        pool = kvdaemon_pb2.GetPoolRequest()
        for name, code in (
            ("gmanager.infinite-llm", None),
            ("gateway.infinite-llm", grpc.StatusCode.PERMISSION_DENIED),
        ):
            address = f"{cluster.of('kvdaemon')[0].ip}:7200"
            with grpc.secure_channel(address, credentials(name), options) as channel:
                stub = kvdaemon_pb2_grpc.KvDaemonServiceStub(channel)
                if code is None:
                    assert stub.GetPool(pool, timeout=20).stats.pool_bytes == 64 << 20
                else:
                    with pytest.raises(grpc.RpcError) as refused:
                        stub.GetPool(pool, timeout=20)
                    assert refused.value.code() is code
        # The certificate names the gateway by its role and its Service; here it is reached by its address.
        with Client(f"{gateway.ip}:50051") as anonymous, pytest.raises(InfiniteLLMError):
            anonymous.cluster_status(timeout_s=10)
