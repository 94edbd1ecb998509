"""Starting, watching and ending real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from services.core.errors import UnavailableError
from services.launcher.binaries import find_binary
from services.launcher.plan import ProcessSpec
from services.launcher.ports import free_ports
from services.launcher.supervisor import Supervisor
from services.runtime import die_with_parent

DEADLINE_S = 30.0
FOREVER = (sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)")
STUBBORN = (
    sys.executable,
    "-c",
    "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)",
)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def eventually(check: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not check():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.02)


class Setup:
    def __init__(self, directory: Path) -> None:
        self.logs = directory
        self.reports: list[str] = []
        self.supervisor = Supervisor(directory, directory, self.reports.append)

    async def started(self, *specs: ProcessSpec) -> None:
        """Starts them and waits for the first line of each one's log."""
        self.supervisor.start(specs)
        for spec in specs:
            await eventually(lambda spec=spec: (self.logs / f"{spec.name}.log").stat().st_size, f"{spec.name} is up")


def test_a_dead_service_is_started_again_and_etcd_is_not(tmp_path: Path) -> None:
    async def scenario() -> None:
        setup = Setup(tmp_path)
        await setup.started(ProcessSpec("etcd", "etcd", FOREVER), ProcessSpec("i", "instance", FOREVER, restart=True))
        watching = asyncio.create_task(setup.supervisor.run())
        before = setup.supervisor.pids()
        for pid in before.values():
            os.kill(pid, signal.SIGKILL)
        await eventually(lambda: setup.supervisor.pids().get("i", before["i"]) != before["i"], "the restart")
        assert "etcd" not in setup.supervisor.pids()
        text = "\n".join(setup.reports)
        assert "etcd was killed by SIGKILL; restart the cluster" in text
        assert "i was killed by SIGKILL; starting it again in 0.5 s" in text
        # The pauses grow while it keeps dying.
        os.kill(setup.supervisor.pids()["i"], signal.SIGKILL)
        await eventually(lambda: "starting it again in 1 s" in "\n".join(setup.reports), "a longer pause")
        watching.cancel()
        await setup.supervisor.stop()

    asyncio.run(scenario())


def test_the_end_is_in_reverse_order_and_sure(tmp_path: Path) -> None:
    async def scenario() -> None:
        setup = Setup(tmp_path)
        await setup.started(ProcessSpec("a", "instance", STUBBORN), ProcessSpec("b", "gateway", FOREVER))
        pids = setup.supervisor.pids()
        await setup.supervisor.stop(grace_s=1.0)
        assert not any(alive(pid) for pid in pids.values())
        assert setup.reports == ["a did not end in time and is killed"]

    asyncio.run(scenario())


def test_a_death_while_starting_shows_the_log(tmp_path: Path) -> None:
    async def scenario() -> None:
        setup = Setup(tmp_path)
        script = "import sys; print('noise'); sys.exit('the pool is too small')"
        setup.supervisor.start([ProcessSpec("i", "instance", (sys.executable, "-c", script), {"key": 1})])

        def died() -> bool:
            try:
                setup.supervisor.require_running()
            except UnavailableError:
                return True
            return False

        await eventually(died, "the death")
        with pytest.raises(UnavailableError, match=r"(?s)i ended with exit code 1 while .*the pool is too small"):
            setup.supervisor.require_running()
        assert (tmp_path / "i.yaml").read_text() == "key: 1\n"
        await setup.supervisor.stop()

    asyncio.run(scenario())


LAUNCHER = """
import sys, time
from pathlib import Path
from services.launcher.binaries import find_binary
from services.launcher.plan import ProcessSpec
from services.launcher.ports import free_ports
from services.launcher.supervisor import Supervisor
from services.runtime import die_with_parent

directory = Path(sys.argv[1])
redis = (str(find_binary("redis-server")), "--port", sys.argv[2], "--bind", "127.0.0.1", "--save", "")
supervisor = Supervisor(directory, directory, print)
supervisor.start([ProcessSpec("redis", "redis", redis), ProcessSpec("sleep", "instance", tuple(sys.argv[3:]))])
print(*supervisor.pids().values(), flush=True)
time.sleep(600)
"""


def test_children_die_with_a_killed_launcher(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(tmp_path), str(port), *STUBBORN],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert launcher.stdout is not None
    pids = [int(pid) for pid in launcher.stdout.readline().split()]

    async def scenario() -> None:
        await eventually(lambda: (tmp_path / "sleep.log").read_text() == "up\n", "the stubborn child")
        await eventually(lambda: "Ready to accept" in (tmp_path / "redis.log").read_text(), "redis")
        assert all(alive(pid) for pid in pids)
        launcher.kill()
        launcher.wait()
        await eventually(lambda: not any(alive(pid) for pid in pids), "the children's death")

    try:
        asyncio.run(scenario())
    finally:
        launcher.kill()
        launcher.wait()


def test_a_child_whose_launcher_died_before_it_could_tell_ends(tmp_path: Path) -> None:
    shim = Path(die_with_parent.__file__)
    not_the_parent = str(os.getppid())
    ended = subprocess.run(
        [sys.executable, str(shim), not_the_parent, "/bin/true"], capture_output=True, text=True, timeout=30
    )
    assert ended.returncode == 1
    assert "the parent is gone" in ended.stderr


def test_binaries_are_found() -> None:
    for name in ("etcd", "redis-server"):
        version = subprocess.run([find_binary(name), "--version"], capture_output=True, text=True, timeout=30)
        assert version.returncode == 0
