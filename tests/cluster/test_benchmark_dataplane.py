"""``python -m benchmarks.dataplane`` as a person calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.dataplane import ECHOES, KIB, MEMCPY, SOCKET, STREAM
from benchmarks.pinned_process import PinnedProcess


@pytest.mark.cluster
def test_a_quick_run_measures_every_exchange_over_every_transport(tmp_path: Path):
    file = tmp_path / "dataplane.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.dataplane",
        "--quick",
        "--transports",
        "shm",
        "tcp",
        "--json",
        str(file),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    rows = {(row["part"], row["message_kib"], row["by"]): row for row in result["rows"]}
    peers = (MEMCPY, SOCKET, "shm", "tcp")
    assert set(rows) == {(e.kind, e.size // KIB, peer) for e in (*ECHOES, STREAM) for peer in peers}
    for (part, kib, by), row in rows.items():
        assert 0 < row["time_of_socket_min"] <= row["time_of_socket"] <= row["time_of_socket_max"]
        assert row["time_of_socket"] == 1 or by != SOCKET
        if part == "stream":
            assert row["gb_per_s"] == pytest.approx(kib * KIB / row["us"] * 1e-3)
    for by in ("shm", "tcp"):
        value = result["targets"][f"{by}_64k_round_trip_of_socket"]["value"]
        assert value == rows["echo", 64, by]["time_of_socket"]


def fail(pipe, message):
    raise ValueError(message)


def leave(pipe):
    pipe.close()


def test_what_goes_wrong_in_a_process_is_told() -> None:
    with PinnedProcess(0, fail, "no such thing") as process, pytest.raises(RuntimeError, match="no such thing"):
        process.hear(30)
    with PinnedProcess(0, leave) as process, pytest.raises(RuntimeError, match="has ended"):
        process.hear(30)
