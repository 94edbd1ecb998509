"""``infinite-llm up`` as a person uses it: ready, a service killed, the launcher killed, started again, ended."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.launcher.needle.checkpoint import write_checkpoint
from services.launcher.needle.spec import needle_spec
from services.launcher.ports import free_ports

DEADLINE_S = 120.0
SERVICES = ("gmanager-0", "kvdaemon-0", "instance-0", "gateway-0")


def wait_for(check: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


class Launcher:
    """One ``infinite-llm up`` with fixed ports and run directory."""

    def __init__(self, directory: Path) -> None:
        self.run_dir = directory / "run"
        self.http_port, self.grpc_port = free_ports(2)
        self.output = directory / "output"
        self.model = directory / "needle"
        write_checkpoint(self.model, needle_spec("mini"), "bfloat16")

    def start(self) -> subprocess.Popen[bytes]:
        command = [
            *(sys.executable, "-m", "services.launcher.cli", "up", "--model", str(self.model)),
            *("--instances", "1", "--kvdaemons", "0", "--pool-mib", "24", "--run-dir", str(self.run_dir)),
            *("--http-port", str(self.http_port), "--grpc-port", str(self.grpc_port)),
        ]
        with self.output.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        wait_for(lambda: process.poll() is not None or "Ctrl-C ends it." in self.output.read_text(), "ready")
        assert process.poll() is None, self.output.read_text()
        return process

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def pids(self) -> dict[str, int]:
        """Living processes that have this run directory in their command line, the launcher left out."""
        found = {}
        for process in Path("/proc").iterdir():
            try:
                command = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if "up" in command or not any(str(self.run_dir) in word for word in command):
                continue
            name = next((Path(word).stem for word in command if word.endswith(".yaml")), Path(command[0]).name)
            found[name] = int(process.name)
        return found


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    with tempfile.TemporaryDirectory(prefix="up-", dir="/tmp") as directory:
        yield Launcher(Path(directory))


def test_a_run_survives_its_services_and_leaves_nothing_behind(launcher: Launcher) -> None:
    process = launcher.start()
    try:
        assert launcher.healthy()
        before = launcher.pids()
        assert set(SERVICES) <= set(before)

        # The daemon's death takes the instance with it; both come back.
        subprocess.run(["kill", "-KILL", str(before["kvdaemon-0"])], check=True)
        wait_for(lambda: launcher.pids().get("instance-0", before["instance-0"]) != before["instance-0"], "restart")
        assert launcher.pids()["gateway-0"] == before["gateway-0"]
        wait_for(launcher.healthy, "health after the restart")
        assert "kvdaemon-0 was killed by SIGKILL; starting it again" in launcher.output.read_text()

        # A killed launcher leaves no process, and nothing that stops the next one with the same ports and directory.
        process.kill()
        process.wait()
        wait_for(lambda: not launcher.pids(), "the children's end")
        process = launcher.start()
        assert launcher.healthy()
        status = subprocess.run(
            [sys.executable, "-m", "services.launcher.cli", "status", "--json", "--grpc-port", str(launcher.grpc_port)],
            capture_output=True,
            check=True,
            timeout=60,
        )
        assert [daemon["kvdaemon_id"] for daemon in json.loads(status.stdout)["kvdaemons"]] == ["kvdaemon-0"]

        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert not launcher.pids()
        assert "is killed" not in launcher.output.read_text()
    finally:
        process.kill()
        process.wait()
