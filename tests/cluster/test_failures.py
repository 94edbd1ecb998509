"""Processes killed and stopped while they serve: a recomputation, never an error and never another token."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import pytest
from cluster_process import Cluster
from test_serving import SMALL_ENGINE, prompt_of

pytestmark = pytest.mark.cluster

PROMPT = prompt_of(1300, seed=21)
TOKENS = 160


@pytest.fixture(scope="module")
def expected(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """What an undisturbed cluster answers."""
    arguments = ("--instances", "1", "--kvdaemons", "2", "--pool-mib", "2", "--dtype", "float32")
    with Cluster(random_llama, tmp_path_factory.mktemp("run") / "c", *arguments, config=SMALL_ENGINE) as cluster:
        return cluster.complete(PROMPT, max_tokens=TOKENS, ignore_eos=True).token_ids


class DisturbedRequest:
    """Streams PROMPT's completion in a thread, so that a test can do harm in mid-stream."""

    def __init__(self, cluster: Cluster) -> None:
        self.token_ids: list[int] = []
        self._cluster = cluster
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            for chunk in self._cluster.stream(PROMPT, max_tokens=TOKENS, ignore_eos=True):
                self.token_ids += chunk["choices"][0].get("token_ids") or []  # type: ignore[index]
        except BaseException as failure:
            self._failure = failure

    def wait_for_tokens(self, count: int) -> None:
        deadline = time.monotonic() + 120
        while len(self.token_ids) < count:
            assert self._thread.is_alive(), f"ended early: {self._failure}\n{self._cluster.logs()}"
            assert time.monotonic() < deadline, self._cluster.logs()
            time.sleep(0.01)

    def finish(self) -> list[int]:
        self._thread.join(150)
        assert not self._thread.is_alive(), f"the stream hangs at {len(self.token_ids)}\n{self._cluster.logs()}"
        assert self._failure is None, f"{self._failure}\n{self._cluster.logs()}"
        return self.token_ids


@pytest.fixture
def cluster(random_llama: Path, tmp_path: Path):
    """Two instances, three memory-only daemons: enough room even after a loss."""
    arguments = ("--instances", "2", "--kvdaemons", "3", "--pool-mib", "2", "--dtype", "float32")
    with Cluster(random_llama, tmp_path / "c", *arguments, config=SMALL_ENGINE) as running:
        yield running


def placed_on(cluster: Cluster) -> tuple[str, str]:
    """The instance that computes the one running request, and a daemon that holds blocks for it."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for request in cluster.requests():
            lenders = [place.kvdaemon_id for place in request.placement if not place.local]
            if lenders:
                return request.instance_id, lenders[0]
        time.sleep(0.05)
    raise AssertionError(f"no request with blocks elsewhere\n{cluster.logs()}")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lender_is_lost(cluster: Cluster, expected: list[int], how: signal.Signals):
    request = DisturbedRequest(cluster)
    request.wait_for_tokens(5)
    _, lender = placed_on(cluster)
    pid = cluster.pid(lender)
    cluster.signal(lender, how)
    assert request.finish() == expected
    if how is signal.SIGSTOP:
        import os

        os.kill(pid, signal.SIGCONT)
    cluster.wait_until_no_block_is_held()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_computing_instance_is_lost(cluster: Cluster, expected: list[int], how: signal.Signals):
    request = DisturbedRequest(cluster)
    request.wait_for_tokens(5)
    instance, _ = placed_on(cluster)
    pid = cluster.pid(instance)
    cluster.signal(instance, how)
    assert request.finish() == expected
    if how is signal.SIGSTOP:
        import os

        os.kill(pid, signal.SIGCONT)
    cluster.wait_until_no_block_is_held()
