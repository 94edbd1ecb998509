"""A real cluster for tests: ``infinite-llm up`` as a child process, spoken to over HTTP as a client would."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from signals import send_signal

from infinitellm import Client, ClusterStatus, RequestStatus
from services.launcher.ports import free_ports

START_TIMEOUT_S = 120.0
REQUEST_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Completion:
    """One answered request."""

    text: str
    token_ids: list[int]
    finish_reason: str
    token_logprobs: list[float]  # of the drawn tokens; empty where none were asked for
    top_logprobs: list[dict[str, float]]  # by position; likewise
    request_id: str


class Cluster:
    """Started by ``with Cluster(...)``; every process it started is gone afterwards."""

    def __init__(self, model: Path, run_dir: Path, *arguments: str, config: dict[str, dict[str, object]] | None = None):
        self.run_dir = run_dir
        self.http_port, self.grpc_port = free_ports(2)
        command = [
            *(sys.executable, "-m", "services.launcher.cli", "up", "--model", str(model), "--run-dir", str(run_dir)),
            *("--http-port", str(self.http_port), "--grpc-port", str(self.grpc_port), *arguments),
        ]
        if config:
            overlay = run_dir.parent / f"{run_dir.name}-overlay.yaml"
            overlay.write_text(json.dumps(config))  # JSON is YAML
            command += ["--config", str(overlay)]
        self._log = (run_dir.parent / f"{run_dir.name}-up.log").open("wb")
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        self.http = httpx.Client(  # used by many threads: each request has a connection of its own
            base_url=f"http://127.0.0.1:{self.http_port}",
            timeout=REQUEST_TIMEOUT_S,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )
        self.model_name = model.name

    def __enter__(self) -> Cluster:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.healthy():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise AssertionError(f"the cluster did not start:\n{self.logs()}")
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        self._log.close()

    def healthy(self) -> bool:
        try:
            return self.http.get("/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def logs(self) -> str:
        """The last lines of every log, for a failed test."""
        files = [Path(self._log.name), *sorted(self.run_dir.rglob("*.log"))]
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-3000:]}" for file in files)

    def complete(self, prompt: str | Sequence[int], **parameters: object) -> Completion:
        """A completion that must succeed; greedy unless said otherwise."""
        response = self.request(prompt, **parameters)
        assert response.status_code == 200, f"{response.status_code}: {response.text}\n{self.logs()}"
        body = response.json()
        choice = body["choices"][0]
        logprobs = choice.get("logprobs") or {}
        return Completion(
            choice["text"],
            choice["token_ids"],
            choice["finish_reason"],
            logprobs.get("token_logprobs") or [],
            logprobs.get("top_logprobs") or [],
            body["id"],
        )

    def request(self, prompt: str | Sequence[int], **parameters: object) -> httpx.Response:
        body = {
            "model": self.model_name,
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "temperature": 0,
            "return_token_ids": True,
            **parameters,
        }
        return self.http.post("/v1/completions", json=body)

    def stream(self, prompt: str | Sequence[int], **parameters: object) -> Iterator[dict[str, object]]:
        """The chunks of a streamed completion."""
        body = {"model": self.model_name, "prompt": prompt, "temperature": 0, "return_token_ids": True, "stream": True}
        with self.http.stream("POST", "/v1/completions", json={**body, **parameters}) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield json.loads(line.removeprefix("data: "))

    def complete_watched(self, prompt: str | Sequence[int], **parameters: object) -> tuple[Completion, dict[str, int]]:
        """As ``complete``, alone; also where its rBlocks lay when they were most."""
        placements: list[dict[str, int]] = [{}]
        done = threading.Event()

        def watch() -> None:
            while not done.is_set():
                placements.extend(self.placements())
                time.sleep(0.05)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            answer = self.complete(prompt, **parameters)
        finally:
            done.set()
            watcher.join(30)
        return answer, max(placements, key=lambda placement: sum(placement.values()))

    def status(self) -> ClusterStatus:
        with Client(f"127.0.0.1:{self.grpc_port}") as client:
            return client.cluster_status()

    def requests(self) -> tuple[RequestStatus, ...]:
        """The running requests."""
        return self.status().requests

    def placements(self) -> list[dict[str, int]]:
        """For each running request, its rBlocks by daemon."""
        return [{place.kvdaemon_id: place.num_blocks for place in request.placement} for request in self.requests()]

    def wait_for_lender(self, kvdaemon_id: str, timeout_s: float = 20.0) -> None:
        """Until the one request that runs is known to have blocks there: its instance tells once in a while."""
        deadline = time.monotonic() + timeout_s
        while not any(kvdaemon_id in placement for placement in self.placements()):
            assert time.monotonic() < deadline, f"no request is known to use {kvdaemon_id}\n{self.logs()}"
            time.sleep(0.02)

    def pids(self) -> dict[str, int]:
        """The launcher's living children: "etcd", "redis", and the services by their member ids."""
        found = {}
        for process in Path("/proc").iterdir():
            if not process.name.isdecimal():
                continue
            try:
                parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
                command = (process / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
            except OSError:
                continue
            if int(parent) != self._process.pid:
                continue
            if "--config" in command:
                found[Path(command[-1]).stem] = int(process.name)
            elif name := Path(command[0].partition(" ")[0]).name:  # Redis writes its address behind its name
                found[name.removesuffix("-server")] = int(process.name)
        return found

    def pid(self, member: str) -> int:
        """Process id of a service, by its member id."""
        pids = self.pids()
        assert member in pids, f"no process of {member} in {self.run_dir}"
        return pids[member]

    def signal(self, member: str, signum: signal.Signals) -> None:
        send_signal(self.pid(member), signum)

    def wait_until_no_block_is_held(self, timeout_s: float = 20.0) -> None:
        """Every pool is free or cached without users, apart from the instances' workspaces."""
        deadline = time.monotonic() + timeout_s
        while True:
            status = self.status()
            pools = {daemon.kvdaemon_id: daemon.use for daemon in status.kvdaemons}
            held = {name: use for name, use in pools.items() if use.in_use or use.reserved}
            if not held and not status.requests:
                return
            assert time.monotonic() < deadline, f"blocks are still held: {held}, requests {status.requests}"
            time.sleep(0.1)
