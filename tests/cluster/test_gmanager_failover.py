"""Two gManagers beside a cluster that serves: the leader killed, stopped and continued, and none of them left.

What it does to requests: nothing. No token changes, no block stays held.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from cluster_process import Cluster, Completion
from signals import send_signal
from test_serving import SMALL_ENGINE, Reference, assert_same_tokens, prompt_of

from infinitellm import Client
from services.gmanager.instance_client import InstanceClients, MoveAnswer, MoveOrder
from services.runtime.election import Leader
from services.runtime.etcd import EtcdClient
from services.runtime.membership import Membership, decode_member

pytestmark = pytest.mark.cluster

LEASE_S = 4
TOKENS = 300
LONG = prompt_of(1300, seed=31)


@pytest.fixture
def cluster(clear_llama: Path, tmp_path: Path) -> Iterator[Cluster]:
    """Two instances and two memory-only daemons, with pools that hold no whole long request."""
    arguments = ("--gmanagers", "2", "--instances", "2", "--kvdaemons", "2", "--pool-mib", "2", "--dtype", "float32")
    config = {**SMALL_ENGINE, "gmanager": {"lease_ttl_s": LEASE_S}}
    with Cluster(clear_llama, tmp_path / "c", *arguments, config=config) as running:
        yield running


class Requests:
    """Completions in the background."""

    def __init__(self, cluster: Cluster, reference: Reference) -> None:
        self._cluster = cluster
        self._reference = reference
        self._pool = ThreadPoolExecutor(8)
        self._running: list[tuple[list[int], Future[Completion]]] = []

    def send(self, *prompts: list[int]) -> list[Future[Completion]]:
        futures = [self._pool.submit(self._cluster.complete, p, max_tokens=TOKENS, ignore_eos=True) for p in prompts]
        self._running += zip(prompts, futures, strict=True)
        return futures

    @contextmanager
    def kept_up(self, prompt: list[int]) -> Iterator[None]:
        """This prompt is sent again and again, two at a time: one alone may have ended before anybody looks."""
        done = threading.Event()

        def keep() -> None:
            while not done.is_set():
                self.send(prompt)[0].exception(180)

        keepers = [threading.Thread(target=keep) for _ in range(2)]
        for keeper in keepers:
            keeper.start()
        try:
            yield
        finally:
            done.set()
            for keeper in keepers:
                keeper.join(180)

    def wait_until_one_runs(self) -> None:
        deadline = time.monotonic() + 60
        while not self._cluster.placements():
            assert time.monotonic() < deadline, self._cluster.logs()
            time.sleep(0.05)

    def check(self) -> None:
        """All have ended, with the tokens of transformers, and hold nothing any more."""
        known = {tuple(prompt): self._reference(prompt, TOKENS) for prompt, _ in self._running}
        for prompt, future in self._running:
            assert_same_tokens(future.result(180).token_ids, *known[tuple(prompt)])
        self._pool.shutdown()
        self._cluster.wait_until_no_block_is_held()


def leaders(cluster: Cluster) -> list[str]:
    with Client(f"127.0.0.1:{cluster.grpc_port}") as client:
        return [gmanager.gmanager_id for gmanager in client.cluster_status().gmanagers if gmanager.leads]


def leader_by_etcd(cluster: Cluster) -> tuple[str, int]:
    """Id and fencing token of the leader."""

    async def look() -> Leader | None:
        config = yaml.safe_load((cluster.run_dir / "config" / "gmanager-0.yaml").read_text())
        etcd = EtcdClient(config["etcd"])
        try:
            async for leader in Membership(etcd, config["cluster"]).gmanager_election().observe():
                return leader
        finally:
            await etcd.close()
        return None

    leader = asyncio.run(look())
    member = None if leader is None else decode_member("", leader.value)
    return ("", 0) if leader is None or member is None else (member.member_id, leader.fencing_token)


def wait_for_successor(cluster: Cluster, old: str) -> int:
    """The other one must lead within two lease times; answers its fencing token."""
    deadline = time.monotonic() + 2 * LEASE_S
    while True:
        leader, token = leader_by_etcd(cluster)
        if leader not in ("", old):
            return token
        assert time.monotonic() < deadline, f"{leader!r} leads\n{cluster.logs()}"
        time.sleep(0.1)


def wait_for_status(cluster: Cluster, leader: str, requests: int) -> None:
    """The new leader knows everything again, from full heartbeats."""
    deadline = time.monotonic() + 20
    while True:
        status = cluster.status()
        ids = [gmanager.gmanager_id for gmanager in status.gmanagers if gmanager.leads]
        reported = [daemon for daemon in status.kvdaemons if daemon.use.total]
        if ids == [leader] and len(reported) == 4 and len(status.requests) >= requests:
            return
        assert time.monotonic() < deadline, f"{status}\n{cluster.logs()}"
        time.sleep(0.2)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_leader_is_lost_under_load(cluster: Cluster, clear_reference: Reference, how: signal.Signals) -> None:
    requests = Requests(cluster, clear_reference)
    with requests.kept_up(LONG):
        requests.wait_until_one_runs()
        (old,) = leaders(cluster)
        pid = cluster.pid(old)
        new = next(name for name in ("gmanager-0", "gmanager-1") if name != old)
        cluster.signal(old, how)
        requests.send(prompt_of(500, seed=33))  # while nobody leads
        wait_for_successor(cluster, old)
        wait_for_status(cluster, new, requests=1)
    if how is signal.SIGSTOP:
        os.kill(pid, signal.SIGCONT)
        requests.send(prompt_of(200, seed=35))
    requests.check()
    assert leaders(cluster) == [new]


def test_without_any_gmanager_requests_go_on_and_new_ones_begin(cluster: Cluster, clear_reference: Reference) -> None:
    """Prompts too long for any one pool: room elsewhere is known from before."""
    requests = Requests(cluster, clear_reference)
    with requests.kept_up(LONG):
        requests.wait_until_one_runs()
        pids = [cluster.pid(name) for name in ("gmanager-0", "gmanager-1")]
        for pid in pids:
            send_signal(pid, signal.SIGSTOP)
        try:
            time.sleep(LEASE_S + 1)
            late = requests.send(prompt_of(1200, seed=36), prompt_of(300, seed=32))
            assert all(len(future.result(180).token_ids) == TOKENS for future in late)
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
    requests.check()


def move_something(cluster: Cluster, number: int, token: int) -> MoveAnswer:
    """Orders a move of two blocks of any request that has some to move, until it is not refused for the cluster's
    state. Orders of the old leader are played: by itself it notices that it must not give any."""
    deadline = time.monotonic() + 60
    while True:
        order = _possible_move(cluster, f"m{number}", token)
        if order is not None:
            address, instruction = order
            answer = asyncio.run(_give(address, instruction))
            if answer.accepted_blocks or answer.refusal == "STALE_LEADER":
                return answer
        assert time.monotonic() < deadline, f"{order}\n{cluster.logs()}"
        number += 100
        time.sleep(0.2)


async def _give(address: str, order: MoveOrder) -> MoveAnswer:
    clients = InstanceClients()
    try:
        return await clients.move_blocks(address, order, timeout_s=20.0)
    finally:
        await clients.close()


def _possible_move(cluster: Cluster, move_id: str, token: int) -> tuple[str, MoveOrder] | None:
    """From the daemon with most blocks of a request to the one with most room."""
    with Client(f"127.0.0.1:{cluster.grpc_port}") as client:
        status = client.cluster_status()
    free = {daemon.kvdaemon_id: daemon.use.free for daemon in status.kvdaemons}
    addresses = {daemon.kvdaemon_id: daemon.address for daemon in status.kvdaemons}
    for request in status.requests:
        instance = next(one for one in status.instances if one.instance_id == request.instance_id)
        source = max(request.placement, key=lambda part: part.num_blocks, default=None)
        others = [name for name in free if source is not None and name != source.kvdaemon_id]
        if source is None or source.num_blocks < 4 or not others:
            continue
        target = max(others, key=lambda name: free[name])
        where = (source.kvdaemon_id, target, addresses[target])
        return instance.address, MoveOrder(move_id, token, request.request_id, *where, num_blocks=2)
    return None


def test_a_continued_leader_is_refused_by_its_fencing_token(cluster: Cluster, clear_reference: Reference) -> None:
    requests = Requests(cluster, clear_reference)
    with requests.kept_up(LONG):
        old, old_token = leader_by_etcd(cluster)
        pid = cluster.pid(old)
        assert move_something(cluster, 1, old_token).accepted_blocks
        send_signal(pid, signal.SIGSTOP)
        new_token = wait_for_successor(cluster, old)
        assert new_token > old_token
        assert move_something(cluster, 2, new_token).accepted_blocks
        os.kill(pid, signal.SIGCONT)
        assert move_something(cluster, 3, old_token) == MoveAnswer(0, "STALE_LEADER")
    requests.check()
