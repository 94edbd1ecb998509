"""A real Redis of a test."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import redis
from signals import send_signal

from services.launcher.binaries import find_binary
from services.launcher.ports import free_ports


class RedisProcess:
    """One redis-server that can be killed, stopped and started again."""

    def __init__(self, directory: Path) -> None:
        (self.port,) = free_ports(1)
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        command = [str(find_binary("redis-server")), "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        with (self._directory / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, cwd=self._directory)
        deadline = time.monotonic() + 20
        while True:
            try:
                self.client().ping()
                return
            except redis.exceptions.ConnectionError:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, socket_timeout=5)

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        if self._process.poll() is None:
            send_signal(self._process.pid, number)
        if number == signal.SIGKILL:
            self._process.wait(timeout=10)
