"""An instance that was stopped until it lost everything, and is then continued, harms nobody.

When it goes on it is in the middle of a step: its next queries and block writes go to daemons that have given its
blocks to others meanwhile. What is looked at: the others' answers while it goes on, their answers afterwards (computed
from the same sealed blocks, attached to by their content), and what its own daemon kept for it, in whose pool it writes
without asking.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
from disturbed_cluster import DisturbedCluster, Stream, ask_pool
from known_requests import KnownRequests
from signals import send_signal

from infinitellm.internal.v1 import kvdaemon_pb2 as pb

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

STOPPED = "instance-0"
OWN_DAEMON = "kvdaemon-0"
FIRST, SECOND = range(100, 108), range(108, 116)


def test_a_continued_instance_writes_nothing_into_blocks_of_others(clusters, known: KnownRequests) -> None:
    cluster: DisturbedCluster = clusters.take()
    sound, pid = False, cluster.cluster.pid(STOPPED)
    # Making a request takes longer than answering it: all are made before the first one is sent.
    requests = {number: known.request(number) for number in (*FIRST, *SECOND)}
    first = [Stream(cluster.cluster, requests[number]) for number in FIRST]
    try:
        # It decodes, and has blocks on daemons that it does not map.
        wait_for("the instance has blocks elsewhere", lambda: lent_blocks(cluster) > 0 and tokens(first) > 20)
        send_signal(pid, signal.SIGSTOP)

        # The others take its requests over. Its blocks are free, but those that it maps.
        cluster.check_answers(first)
        wait_for(
            "its sessions end elsewhere", lambda: all(pool(cluster, name).sessions <= 1 for name in lenders(cluster))
        )
        kept = pool(cluster, OWN_DAEMON).stats
        assert kept.workspace > 0
        assert pool(cluster, OWN_DAEMON).sessions <= 1, "its own session is over as well"

        # Others fill the pools, and it goes on in the middle of that.
        second = [Stream(cluster.cluster, requests[number]) for number in SECOND]
        wait_for("others use the blocks", lambda: tokens(second) > 50)
        assert pool(cluster, OWN_DAEMON).stats.workspace == kept.workspace, "kept as long as the process lives"
        os.kill(pid, signal.SIGCONT)
        cluster.check_answers(second)

        # What is cached now was written before, while or after it went on.
        again = [Stream(cluster.cluster, requests[number]) for number in SECOND]
        cluster.check_answers(again)
        cluster.check_sound(known.request(SECOND.stop), everything_lives=True)
        assert cluster.cluster.pid(STOPPED) != pid, "it ended when it found its sessions over, and was started anew"
        sound = True
    finally:
        if cluster.cluster.pids().get(STOPPED) == pid:
            os.kill(pid, signal.SIGCONT)
        clusters.give_back(cluster, usable=sound)


def tokens(streams: list[Stream]) -> int:
    return sum(len(stream.token_ids) for stream in streams)


def lent_blocks(cluster: DisturbedCluster) -> int:
    """Blocks that the instance to be stopped has on daemons other than its own."""
    return sum(
        place.num_blocks
        for request in cluster.cluster.requests()
        if request.instance_id == STOPPED
        for place in request.placement
        if not place.local
    )


def lenders(cluster: DisturbedCluster) -> list[str]:
    return [name for name in addresses(cluster) if name.startswith("kvdaemon-mem")]


def addresses(cluster: DisturbedCluster) -> dict[str, str]:
    return {daemon.kvdaemon_id: daemon.address for daemon in cluster.cluster.status().kvdaemons}


def pool(cluster: DisturbedCluster, name: str) -> pb.GetPoolResponse:
    answer = ask_pool(addresses(cluster)[name])
    assert answer is not None
    assert not answer.violations
    return answer


def wait_for(what: str, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"timed out: {what}"
        time.sleep(0.05)
