"""What the liveness probe is told: a worker thread that goes round, idle or not, and one that is stuck."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_rig import EngineRig
from kvdaemon_rig import Rig
from random_llama import write_random_llama

from services.dataplane.transport import Event
from services.instance.assembly import SnapshotBoard
from services.instance.outputs import EngineSnapshot

DEADLINE_S = 30.0


def wait_until(check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_idle_daemon_goes_round_and_a_stuck_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with Rig() as rig:
        for _ in range(2):
            before = rig.worker.round_at
            wait_until(lambda before=before: rig.worker.round_at > before)
        stuck, go_on = threading.Event(), threading.Event()
        poll = rig.worker._transport.poll

        def hang(timeout: float) -> list[Event]:
            stuck.set()
            assert go_on.wait(DEADLINE_S)
            return poll(timeout)

        monkeypatch.setattr(rig.worker._transport, "poll", hang)
        assert stuck.wait(DEADLINE_S)
        since = rig.worker.round_at
        time.sleep(0.05)
        assert rig.worker.round_at == since
        go_on.set()
        wait_until(lambda: rig.worker.round_at > since)


def test_an_idle_engine_goes_round(tmp_path: Path) -> None:
    write_random_llama(tmp_path / "model")
    with EngineRig(tmp_path / "model") as rig:
        for _ in range(2):
            before = rig.snapshot
            wait_until(lambda before=before: rig.snapshot is not before)


def test_the_board_knows_when_the_engine_went_round_last() -> None:
    board = SnapshotBoard("kv-0", max_running=4)
    before = board.put_at
    wait_until(lambda: time.monotonic() > before)
    board.put(EngineSnapshot(running=1))
    assert before < board.put_at <= time.monotonic()
