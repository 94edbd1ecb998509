"""A real etcd for tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

from signals import send_signal

from services.launcher.binaries import find_binary
from services.launcher.ports import free_ports

START_TIMEOUT_S = 30.0


class EtcdProcess:
    """One etcd that can be killed, stopped and started again with the same data and address."""

    def __init__(self, directory: Path, extra_args: tuple[str, ...] = (), scheme: str = "http") -> None:
        port, hidden_port, peer_port = free_ports(3)
        self.endpoint = f"127.0.0.1:{port}"
        self.hidden_endpoint = f"127.0.0.1:{hidden_port}"
        self.directory = directory
        self._peer = f"http://127.0.0.1:{peer_port}"
        self._scheme = scheme
        self._extra_args = extra_args
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, hidden: bool = False) -> None:
        """Starts it on the same data; ``hidden`` on another address, which only who knows it finds."""
        endpoint = self.hidden_endpoint if hidden else self.endpoint
        client = f"{self._scheme}://{endpoint}"
        args = [
            str(find_binary("etcd")),
            "--name=test",
            f"--data-dir={self.directory / 'data'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={self._peer}",
            f"--initial-advertise-peer-urls={self._peer}",
            f"--initial-cluster=test={self._peer}",
            "--unsafe-no-fsync",
            "--log-level=error",
            *self._extra_args,
        ]
        with (self.directory / "etcd.log").open("ab") as log:
            self._process = subprocess.Popen(args, stdout=log, stderr=log)
        host, port = endpoint.split(":")
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                socket.create_connection((host, int(port)), timeout=1).close()
                return
            except OSError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise AssertionError((self.directory / "etcd.log").read_text()) from None
                time.sleep(0.05)

    def kill(self) -> None:
        if self._process is not None:
            os.kill(self._process.pid, signal.SIGKILL)
            self._process.wait(timeout=10)
            self._process = None

    def pause(self) -> None:
        assert self._process is not None
        send_signal(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def compact(self, endpoint: str, revision: int) -> None:
        etcdctl = find_binary("etcd").resolve().with_name("etcdctl")
        subprocess.run(
            [str(etcdctl), f"--endpoints={endpoint}", "compact", str(revision)],
            check=True,
            timeout=20,
            capture_output=True,
        )
