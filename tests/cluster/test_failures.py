"""Processes killed and stopped while they serve: a recomputation, never an error and never another token."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cluster_process import Cluster
from signals import send_signal
from test_serving import SMALL_ENGINE, Reference, assert_same_tokens, prompt_of

pytestmark = pytest.mark.cluster

TOKENS = 160
START_TIMEOUT_S = 120.0


class DisturbedRequest:
    """Streams a completion in a thread, so that a test can do harm in mid-stream."""

    def __init__(self, cluster: Cluster, prompt: list[int]) -> None:
        self.token_ids: list[int] = []
        self._cluster = cluster
        self._prompt = prompt
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            for chunk in self._cluster.stream(self._prompt, max_tokens=TOKENS, ignore_eos=True):
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


@pytest.fixture(scope="module")
def shared(clear_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two instances, three memory-only daemons: enough room even after a loss."""
    arguments = ("--instances", "2", "--kvdaemons", "3", "--pool-mib", "2", "--dtype", "float32")
    with Cluster(clear_llama, tmp_path_factory.mktemp("run") / "c", *arguments, config=SMALL_ENGINE) as running:
        yield running


@pytest.fixture
def cluster(shared: Cluster) -> Cluster:
    """With everything there: what the test before has killed is started again."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not shared.healthy():
        assert time.monotonic() < deadline, shared.logs()
        time.sleep(0.1)
    return shared


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


# Each has a prompt of its own: none finds its blocks in a pool already. A stopped instance comes last: when it goes on
# it ends, and is away for a while.
@pytest.mark.parametrize(("how", "seed"), [(signal.SIGKILL, 21), (signal.SIGSTOP, 22)])
def test_a_lender_is_lost(cluster: Cluster, clear_reference: Reference, how: signal.Signals, seed: int) -> None:
    prompt = prompt_of(1300, seed=seed)
    request = DisturbedRequest(cluster, prompt)
    request.wait_for_tokens(5)
    _, lender = placed_on(cluster)
    with harmed(cluster, lender, how):
        tokens = request.finish()
    assert_same_tokens(tokens, *clear_reference(prompt, TOKENS))
    cluster.wait_until_no_block_is_held()


@pytest.mark.parametrize(("how", "seed"), [(signal.SIGKILL, 23), (signal.SIGSTOP, 24)])
def test_the_computing_instance_is_lost(
    cluster: Cluster, clear_reference: Reference, how: signal.Signals, seed: int
) -> None:
    prompt = prompt_of(1300, seed=seed)
    request = DisturbedRequest(cluster, prompt)
    request.wait_for_tokens(5)
    instance, _ = placed_on(cluster)
    with harmed(cluster, instance, how):
        tokens = request.finish()
    assert_same_tokens(tokens, *clear_reference(prompt, TOKENS))
    cluster.wait_until_no_block_is_held()


@contextmanager
def harmed(cluster: Cluster, member: str, how: signal.Signals) -> Iterator[None]:
    """Who is stopped goes on afterwards."""
    pid = cluster.pid(member)
    send_signal(pid, how)
    try:
        yield
    finally:
        if how is signal.SIGSTOP:
            os.kill(pid, signal.SIGCONT)
