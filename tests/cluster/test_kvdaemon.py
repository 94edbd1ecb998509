"""One kvdaemon as a real process, with clients that work, die, and stop."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kvdaemon_client import ClientProcess, KvDaemonProcess, wait_for

pytestmark = pytest.mark.cluster
StartClient = Callable[[str, str], ClientProcess]


@pytest.fixture
def daemon(tmp_path: Path, etcd_endpoint: str) -> Iterator[KvDaemonProcess]:
    daemon = KvDaemonProcess(tmp_path, etcd_endpoint)
    daemon.start()
    yield daemon
    daemon.close()


@pytest.fixture
def start_client(daemon: KvDaemonProcess) -> Iterator[StartClient]:
    """Starts a client (instance, kind) and waits until it has used its session."""
    clients: list[ClientProcess] = []

    def start(instance: str, kind: str) -> ClientProcess:
        clients.append(ClientProcess(daemon.address, instance, kind))
        clients[-1].wait_line("ready")
        return clients[-1]

    yield start
    for client in clients:
        client.close()


def test_killed_clients_leave_nothing_held(daemon: KvDaemonProcess, start_client: StartClient) -> None:
    remote = start_client("a", "remote")
    mapped = start_client("b", "mapped")
    pool = daemon.pool()
    assert pool.sessions == 2
    assert (pool.stats.total, pool.stats.workspace, pool.stats.reserved, pool.stats.in_use) == (64, 3, 2, 3)
    remote.signal(signal.SIGKILL)
    mapped.signal(signal.SIGKILL)
    wait_for("nobody holds anything", daemon.nobody_holds_anything)
    assert daemon.pool().stats.cached == 3


def test_stopped_remote_client_loses_its_session_and_its_holds(
    daemon: KvDaemonProcess, start_client: StartClient
) -> None:
    client = start_client("a", "remote")
    client.signal(signal.SIGSTOP)
    wait_for("nobody holds anything", daemon.nobody_holds_anything)
    assert daemon.pool().stats.cached == 2
    start_client("b", "remote")  # the daemon serves others meanwhile
    client.signal(signal.SIGCONT)
    client.wait_line("lost")


def test_stopped_mapped_client_keeps_its_blocks_until_it_is_dead(
    daemon: KvDaemonProcess, start_client: StartClient
) -> None:
    client = start_client("a", "mapped")
    client.signal(signal.SIGSTOP)
    wait_for("the session ends", lambda: daemon.pool().sessions == 0)
    stats = daemon.pool().stats
    assert (stats.workspace, stats.in_use) == (3, 1)
    start_client("a", "mapped")  # a successor: it gets other blocks
    assert daemon.pool().stats.workspace == 6
    client.signal(signal.SIGKILL)
    wait_for("the dead client's blocks are free", lambda: daemon.pool().stats.workspace == 3)
    assert daemon.pool().sessions == 1


def test_stopped_daemon_goes_on(daemon: KvDaemonProcess, start_client: StartClient) -> None:
    client = start_client("a", "remote")
    daemon.signal(signal.SIGSTOP)
    client.wait_line("lost")
    daemon.signal(signal.SIGCONT)
    wait_for("nobody holds anything", daemon.nobody_holds_anything)
    start_client("a", "remote")
    assert daemon.pool().sessions == 1


def test_killed_daemon_can_start_again_at_once(daemon: KvDaemonProcess, start_client: StartClient) -> None:
    client = start_client("a", "mapped")
    daemon.signal(signal.SIGKILL)
    client.wait_line("lost")
    daemon.close()
    daemon.start()
    wait_for("the new process is found", lambda: daemon.registered_addresses() == [daemon.address])


def test_sigterm_ends_it_cleanly(daemon: KvDaemonProcess, start_client: StartClient) -> None:
    client = start_client("a", "remote")
    daemon.signal(signal.SIGTERM)
    assert daemon.process.wait(20) == 0, daemon.log()
    client.wait_line("lost")
    assert daemon.registered_addresses() == []
    assert not list(daemon.directory.glob("kv-0.data")) + list(daemon.directory.glob("kv-0.pool"))


@pytest.mark.parametrize(
    ("line", "reason"),
    [("colour: red", "colour"), ("pool_mib: 0", "pool_mib"), ("transports: [pigeon]", "transports")],
)
def test_impossible_configuration_is_refused_by_name(tmp_path: Path, line: str, reason: str) -> None:
    config = tmp_path / "kv.yaml"
    keys = {"cluster": "c", "member_id": "m", "etcd": "[127.0.0.1:1]", "pool_mib": "1", "socket_dir": str(tmp_path)}
    keys.update([line.split(": ")])
    config.write_text("".join(f"{name}: {value}\n" for name, value in keys.items()))
    command = [sys.executable, "-m", "services.kvdaemon", "--config", str(config)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert reason in result.stderr
    assert result.stdout == ""
