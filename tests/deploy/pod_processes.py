"""The pods of an overlay as processes of this machine: what kubelet does with a manifest, as far as a machine can.

Each pod gets a loopback address of its own, so ports are those of the manifest. Command, arguments, environment,
mounted ConfigMaps, init containers, probes, preStop and grace period are taken as they are written. What has to be put
in another way: a path that a container mounts becomes a directory of the test, and so it stands in arguments and files;
a Service's name becomes an address; 0.0.0.0 becomes the pod's. Images are what the Dockerfiles say of entry point and
environment, around this machine's Python; etcd and Redis are whatever versions are here. There is no scheduler, no user
of its own, no limit of resources and no read-only file system, and nobody enforces a NetworkPolicy.
"""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from authority import Authority, SecretDirectory
from dockerfiles import DOCKER, read_dockerfile
from grpc_health.v1 import health_pb2, health_pb2_grpc
from manifests import Document, Pod, config_files, of_kind, pods

from services.launcher.binaries import find_binary

PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
IMAGES = {"control": ("control.Dockerfile", "final"), "engine": ("engine.Dockerfile", "cpu")}


@dataclass
class Container:
    """One container and its process."""

    name: str
    manifest: Document
    argv: list[str]
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.argv, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/"
            )

    @property
    def running(self) -> subprocess.Popen[bytes]:
        assert self.process is not None
        return self.process

    def kill(self) -> None:
        """Ends it and what it started."""
        if self.process is not None and self.process.poll() is None:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            for pid in (*map(int, children), self.process.pid):
                os.kill(pid, signal.SIGKILL)
            self.process.wait(10)


@dataclass
class LocalPod:
    """One pod, one address."""

    name: str
    ip: str
    template: Pod
    directory: Path
    init: list[Container] = field(default_factory=list)
    containers: list[Container] = field(default_factory=list)

    def start(self) -> None:
        """Runs init containers one after the other, then starts the others."""
        for container in self.init:
            container.start()
            code = container.running.wait(300)
            assert code == 0, container.log.read_text()[-3000:]
        for container in self.containers:
            container.start()

    def probe(self, container: Container, kind: str) -> str:
        """Asks once, as written; answers what is wrong, or nothing."""
        probe = container.manifest[f"{kind}Probe"]
        timeout_s = probe.get("timeoutSeconds", 1)
        ports = {port["name"]: port["containerPort"] for port in container.manifest["ports"]}
        try:
            if "grpc" in probe:
                return _ask_health(f"{self.ip}:{probe['grpc']['port']}", probe["grpc"]["service"], timeout_s)
            handler = probe["httpGet"] if "httpGet" in probe else probe["tcpSocket"]
            port = ports.get(handler["port"], handler["port"])
            if "tcpSocket" in probe:
                socket.create_connection((self.ip, port), timeout=timeout_s).close()
                return ""
            with urllib.request.urlopen(f"http://{self.ip}:{port}{handler['path']}", timeout=timeout_s) as answer:
                return "" if 200 <= answer.status < 400 else f"status {answer.status}"
        except OSError as error:
            return str(error)

    def wait_until(self, kind: str) -> None:
        """Asks every container at the probe's own pace, until it says yes or the probe's patience is at its end."""
        for container in self.containers:
            probe = container.manifest[f"{kind}Probe"]
            # Readiness has no end of its own: a pod may be unready for ever, a test may not wait that long.
            attempts = probe["failureThreshold"] if kind == "startup" else 60
            reason = ""
            for _ in range(attempts):
                assert container.running.poll() is None, self.describe(container, "ended")
                reason = self.probe(container, kind)
                if not reason:
                    break
                time.sleep(probe["periodSeconds"])
            assert not reason, self.describe(container, f"{kind}: {reason}")

    def stop(self) -> dict[str, float]:
        """preStop, SIGTERM, and the time each container took; none may need the SIGKILL that follows."""
        grace_s = self.template.spec["terminationGracePeriodSeconds"]
        began = time.monotonic()
        for container in self.containers:
            hook = container.manifest.get("lifecycle", {}).get("preStop")
            if hook is not None:
                time.sleep(hook["sleep"]["seconds"])
        for container in self.containers:
            container.running.send_signal(signal.SIGTERM)
        took = {}
        for container in self.containers:
            try:
                container.running.wait(max(0.0, began + grace_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(self.describe(container, f"did not end within {grace_s} s")) from None
            took[container.name] = time.monotonic() - began
        return took

    def describe(self, container: Container, what: str) -> str:
        return f"{self.name}/{container.name} {what}:\n{container.log.read_text(errors='replace')[-3000:]}"


class LocalPods:
    """All pods of an overlay. ``with LocalPods(documents, directory) as pods``; nothing is left running afterwards."""

    def __init__(self, documents: tuple[Document, ...], directory: Path) -> None:
        self.authority = Authority()
        self._documents = documents
        first, second = random.randrange(64, 127), random.randrange(1, 255)
        self.pods: dict[str, LocalPod] = {}
        for template in pods(documents):
            for ordinal in range(template.workload["spec"]["replicas"]):
                name = f"{template.name}-{ordinal}"
                ip = f"127.{first}.{second}.{len(self.pods) + 1}"
                self.pods[name] = LocalPod(name, ip, template, directory / name)
        self._names = dict(self._service_names())
        for pod in self.pods.values():
            self._prepare(pod)

    def __enter__(self) -> LocalPods:
        return self

    def __exit__(self, *_: object) -> None:
        for pod in self.pods.values():
            for container in (*pod.init, *pod.containers):
                container.kill()

    def of(self, workload: str) -> list[LocalPod]:
        return [pod for pod in self.pods.values() if pod.template.name == workload]

    def _service_names(self) -> Iterator[tuple[str, str]]:
        """Names and addresses, longer names first."""
        found = {}
        for service in of_kind(self._documents, "Service"):
            name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
            for pod in self.pods.values():
                if (
                    pod.template.namespace == namespace
                    and pod.template.labels.items() >= service["spec"]["selector"].items()
                ):
                    found[f"{pod.name}.{name}.{namespace}.svc"] = pod.ip
                    found.setdefault(f"{name}.{namespace}.svc", pod.ip)
        yield from sorted(found.items(), key=lambda entry: -len(entry[0]))

    def _prepare(self, pod: LocalPod) -> None:
        spec = pod.template.spec
        for manifest in pod.template.all_containers:
            paths = {}
            for mount in manifest["volumeMounts"]:
                local = pod.directory / mount["name"]
                local.mkdir(parents=True, exist_ok=True)
                paths[mount["mountPath"]] = str(local)
            if "/etc/infinite-llm/config" in paths:
                for file, text in config_files(self._documents, pod.template, manifest).items():
                    here = self._here(text, pod, paths)
                    (Path(paths["/etc/infinite-llm/config"]) / file).write_text(here)
            self._put_secrets(pod)
            environment, entry_point = self._image(manifest)
            for variable in manifest.get("env", ()):
                environment[variable["name"]] = self._field(variable["valueFrom"]["fieldRef"]["fieldPath"], pod)
            argv = [*manifest.get("command", entry_point)]
            for argument in manifest.get("args", ()):
                expanded = re.sub(r"\$\((\w+)\)", lambda match: environment[match[1]], argument)  # noqa: B023
                argv.append(self._here(expanded, pod, paths))
            log = pod.directory / f"{manifest['name']}.log"
            container = Container(manifest["name"], manifest, argv, environment, log)
            (pod.containers if manifest in spec["containers"] else pod.init).append(container)

    def _put_secrets(self, pod: LocalPod) -> None:
        """What cert-manager would: the certificates that the overlay asks for."""
        for volume in pod.template.spec.get("volumes", ()):
            directory = pod.directory / volume["name"]
            if "secret" not in volume or (directory / "tls.crt").exists():
                continue
            (certificate,) = (
                document
                for document in of_kind(self._documents, "Certificate")
                if document["spec"]["secretName"] == volume["secret"]["secretName"]
            )
            names = [self._names.get(name, name) for name in certificate["spec"]["dnsNames"]]
            SecretDirectory(directory).put(self.authority.issue(*names), self.authority.pem)

    def _here(self, text: str, pod: LocalPod, paths: dict[str, str]) -> str:
        for name, ip in self._names.items():
            text = text.replace(name, ip)
        text = text.replace("0.0.0.0:", f"{pod.ip}:")
        # A path begins after a space or an equals sign, or is the whole text. All at once: what replaces one may hold
        # another.
        mounted = "|".join(re.escape(path) for path in sorted(paths, key=len, reverse=True))
        pattern = rf"(?<![\w/.-])({mounted})(?=$|[/\s])"
        return re.sub(pattern, lambda match: paths[match[1]], text, flags=re.MULTILINE)

    def _image(self, manifest: Document) -> tuple[dict[str, str], list[str]]:
        """Environment and entry point."""
        name = manifest["image"].rpartition(":")[0].removeprefix("infinite-llm/")
        if name not in IMAGES:
            binary = find_binary(manifest["command"][0])
            return {"PATH": f"{binary.parent}{os.pathsep}{PATH}"}, []
        file, target = IMAGES[name]
        stage = read_dockerfile(DOCKER / file)[target]
        environment = {
            key: value for key, value in stage.environment.items() if key not in ("PATH", "PYTHONPATH", "HOME")
        }
        return {**environment, "PATH": PATH}, list(stage.entrypoint)

    @staticmethod
    def _field(path: str, pod: LocalPod) -> str:
        return {"metadata.name": pod.name, "status.podIP": pod.ip}[path]


def _ask_health(address: str, service: str, timeout_s: float) -> str:
    with grpc.insecure_channel(address, options=(("grpc.enable_http_proxy", 0),)) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"  # type: ignore[attr-defined]
    serving = health_pb2.HealthCheckResponse.SERVING
    return "" if answer.status == serving else f"{service} says {answer.status}"
