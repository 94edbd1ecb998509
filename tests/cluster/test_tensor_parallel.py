"""An instance of two ranks beside one of a single process: the same tokens, the same blocks, one end for all ranks."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from uuid import uuid4

import pytest
from cluster_process import Cluster
from greedy import Reference
from moving import Stream
from signals import send_signal
from test_serving import assert_same_tokens, prompt_of

from infinitellm import Client
from services.gateway.instance_client import Ended, InstanceClient, TokensDrawn
from services.gateway.requests import GenerationRequest

pytestmark = pytest.mark.cluster

ALONE, RANKED = "instance-0", "instance-1"
CONFIG = {"instance": {"max_batch_tokens": 128, "max_num_seqs": 4, "rank_timeout_s": 5.0}}
DEADLINE_S = 90.0


@pytest.fixture(scope="module")
def cluster(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Pools of 16 rBlocks: longer prompts borrow from the memory-only daemon."""
    size = ("--instances", "2", "--tensor-parallel", "1,2", "--kvdaemons", "1", "--pool-mib", "2")
    directory = tmp_path_factory.mktemp("run") / "c"
    with Cluster(random_llama, directory, *size, "--dtype", "float32", config=CONFIG) as cluster:
        yield cluster


def complete(
    cluster: Cluster,
    instance_id: str,
    prompt: Sequence[int],
    max_tokens: int,
    when_it_decodes: Callable[[], None] = lambda: None,
) -> tuple[list[int], int]:
    """A request to this very instance: its tokens, and how many of the prompt's were cached."""

    async def request() -> tuple[list[int], int]:
        with Client(f"127.0.0.1:{cluster.grpc_port}") as client:
            chosen = next(one for one in client.cluster_status().instances if one.instance_id == instance_id)
        changed = asyncio.Event()
        instance = InstanceClient(instance_id, chosen.address, "test", 30.0, changed.set)
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not instance.ready:
                    await changed.wait()
                    changed.clear()
                attempt = instance.submit(
                    GenerationRequest(
                        request_id=uuid4().hex,
                        prompt_ids=tuple(prompt),
                        max_tokens=max_tokens,
                        temperature=0.0,
                        seed=1,
                        stop_token_ids=(),
                        logprobs=0,
                        progress=False,
                        arrival_time=time.time(),
                    ),
                    (),
                )
                tokens: list[int] = []
                cached = 0
                while not isinstance(event := await attempt.next(), Ended):
                    if isinstance(event, TokensDrawn):
                        if not tokens:
                            when_it_decodes()
                        tokens += event.ids
                        cached = max(cached, event.cached_tokens)
                return tokens, cached
        finally:
            await instance.close()

    return asyncio.run(request())


def rank_of(cluster: Cluster) -> int:
    """Process id of the ranked instance's further rank."""
    leader = cluster.pid(RANKED)
    (rank,) = Path(f"/proc/{leader}/task/{leader}/children").read_text().split()
    return int(rank)


def wait_for_a_new_one(cluster: Cluster, old: str) -> None:
    """Until the ranked instance, which had this address, has ended and its successor serves."""
    deadline = time.monotonic() + DEADLINE_S
    while address_of(cluster) in (None, old):
        assert time.monotonic() < deadline, cluster.logs()
        time.sleep(0.2)


def address_of(cluster: Cluster) -> str | None:
    """Of the ranked instance; None while it does not serve."""
    with Client(f"127.0.0.1:{cluster.grpc_port}") as client:
        found = {one.instance_id: one.address for one in client.cluster_status().instances}
    return found.get(RANKED)


def log_of(cluster: Cluster) -> str:
    return (cluster.run_dir / "logs" / f"{RANKED}.log").read_text()


def test_blocks_on_several_daemons_give_the_tokens_of_transformers(cluster: Cluster, greedy_reference: Reference):
    prompt = prompt_of(1500, seed=1)  # 24 rBlocks
    expected, margins = greedy_reference(prompt, 60)
    tokens, cached = complete(cluster, RANKED, prompt, 60)
    assert cached == 0
    assert_same_tokens(tokens, expected, margins)
    assert '"remote_blocks": 0' not in log_of(cluster), "some of its blocks lie elsewhere"
    cluster.wait_until_no_block_is_held()


@pytest.mark.parametrize(("writer", "reader"), [(ALONE, RANKED), (RANKED, ALONE)])
def test_a_prefix_is_read_whatever_the_degree_that_wrote_it(
    cluster: Cluster, greedy_reference: Reference, writer: str, reader: str
):
    complete(cluster, reader, prompt_of(2050, seed=10), 1)  # needs every pool, so it has a session with every daemon
    prompt = prompt_of(600, seed=20 + int(writer == ALONE))
    more = prompt_of(50, seed=30)
    expected, margins = greedy_reference(prompt, 8)
    tokens, cached = complete(cluster, writer, prompt, 8)
    assert (cached, len(tokens)) == (0, 8)
    assert_same_tokens(tokens, expected, margins)
    expected, margins = greedy_reference(prompt + more, 24)
    tokens, cached = complete(cluster, reader, prompt + more, 24)
    assert cached == 9 * 64, "all full blocks of the prompt"
    assert_same_tokens(tokens, expected, margins)
    cluster.wait_until_no_block_is_held()


def test_a_daemon_that_is_lost_voids_the_step_on_all_ranks(cluster: Cluster, greedy_reference: Reference):
    prompt = prompt_of(1500, seed=3)
    expected, margins = greedy_reference(prompt, 120)

    def kill_a_lender() -> None:
        cluster.wait_for_lender("kvdaemon-mem-0")
        cluster.signal("kvdaemon-mem-0", signal.SIGKILL)

    tokens, _ = complete(cluster, RANKED, prompt, 120, kill_a_lender)
    assert_same_tokens(tokens, expected, margins)
    assert '"message": "step discarded"' in log_of(cluster)
    cluster.wait_until_no_block_is_held()


@pytest.mark.parametrize(
    ("signum", "reason"),
    [(signal.SIGKILL, "rank 1 was killed by SIGKILL"), (signal.SIGSTOP, "rank 1 has not answered for 5 s")],
)
def test_a_rank_that_is_lost_ends_the_instance_and_its_requests_go_on_elsewhere(
    cluster: Cluster, greedy_reference: Reference, signum: signal.Signals, reason: str
):
    address, rank = address_of(cluster), rank_of(cluster)
    assert address is not None
    prompts = [prompt_of(100, seed=40 + number) for number in range(2)]
    streams = [Stream(cluster, prompt, 150) for prompt in prompts]  # one on each instance
    for stream in streams:
        stream.wait_for_tokens(5)
    send_signal(rank, signum)
    for stream, prompt in zip(streams, prompts, strict=True):
        assert_same_tokens(stream.finish(), *greedy_reference(prompt, 150))
    wait_for_a_new_one(cluster, address)
    assert f'"why": "{reason}"' in log_of(cluster)
    assert not Path(f"/proc/{rank}").exists(), "no rank outlives its leader"
    cluster.wait_until_no_block_is_held()
    prompt = prompt_of(70, seed=50)
    assert_same_tokens(complete(cluster, RANKED, prompt, 8)[0], *greedy_reference(prompt, 8))
