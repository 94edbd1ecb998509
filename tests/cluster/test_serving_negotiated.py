"""An instance reaches each daemon over the best transport that both have, all at once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from cluster_process import Cluster
from test_serving import SMALL_ENGINE, assert_same_tokens, prompt_of

pytestmark = pytest.mark.cluster

NEAR, FAR = "kvdaemon-mem-0", "kvdaemon-far"
DEADLINE_S = 60.0


@pytest.fixture
def cluster(random_llama: Path, tmp_path: Path) -> Iterator[Cluster]:
    """One instance with its daemon, a lender on the same host, and one whose Unix sockets this host does not have."""
    arguments = ("--instances", "1", "--kvdaemons", "1", "--pool-mib", "2", "--dtype", "float32")
    with Cluster(random_llama, tmp_path / "c", *arguments, config=SMALL_ENGINE) as cluster:
        config = yaml.safe_load(next(cluster.run_dir.rglob(f"{NEAR}.yaml")).read_text())
        sockets = tmp_path / "far"
        sockets.mkdir()
        path = tmp_path / "far.yaml"
        path.write_text(json.dumps({**config, "member_id": FAR, "socket_dir": str(sockets)}))
        with (tmp_path / "far.log").open("wb") as log:
            command = [sys.executable, "-m", "services.kvdaemon", "--config", str(path)]
            far = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_for(lambda: far.poll() is None and has_daemon(cluster, FAR), (tmp_path / "far.log").read_text)
            (sockets / f"{FAR}.data").unlink()
            yield cluster
        finally:
            far.terminate()
            far.wait(20)


def has_daemon(cluster: Cluster, kvdaemon_id: str) -> bool:
    return kvdaemon_id in [daemon.kvdaemon_id for daemon in cluster.status().kvdaemons]


def wait_for(condition: Callable[[], bool], explain: Callable[[], str]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.1)


def transports(cluster: Cluster) -> dict[str, str]:
    """By daemon, as ``infinite-llm status`` tells it of the instance."""
    (instance,) = cluster.status().instances
    return {peer.kvdaemon_id: peer.transport for peer in instance.transports}


def test_one_daemon_over_shm_and_another_over_tcp(
    cluster: Cluster, greedy_reference: Callable[[list[int], int], tuple[list[int], list[float]]]
) -> None:
    prompt = prompt_of(1500, seed=1)
    expected, margins = greedy_reference(prompt, 24)
    assert transports(cluster) == {}
    assert_same_tokens(cluster.complete(prompt, max_tokens=24, ignore_eos=True).token_ids, expected, margins)
    wait_for(lambda: transports(cluster) == {NEAR: "shm", FAR: "tcp"}, cluster.logs)
    cluster.wait_until_no_block_is_held()
    log = next(cluster.run_dir.rglob("instance-0.log")).read_text()
    for kvdaemon_id, scheme in ((NEAR, "shm"), (FAR, "tcp")):
        assert any(kvdaemon_id in line and f"{scheme}:" in line for line in log.splitlines()), log
