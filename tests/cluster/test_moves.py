"""Blocks of running requests move between real daemons: the tokens stay transformers', whoever is lost meanwhile."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from cluster_process import Cluster
from moving import TOKEN, Mover, Stream
from random_llama import write_random_llama
from reference import Reference
from signals import send_signal
from test_serving import prompt_of

pytestmark = pytest.mark.cluster

# 32 rBlocks a pool (see test_serving.SMALL_ENGINE); 6 of the instance's are its workspace.
ENGINE = {"instance": {"max_batch_tokens": 128, "max_num_seqs": 4}}
HOME, LENDERS = "kvdaemon-0", ("kvdaemon-mem-0", "kvdaemon-mem-1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "random-llama"
    write_random_llama(path, logit_scale=4.0)
    return path


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


def start(model: Path, run_dir: Path, kvdaemons: int = 2, transport: str = "shm", **instance: object) -> Cluster:
    """``instance``: further settings of it."""
    arguments = ("--instances", "1", "--kvdaemons", str(kvdaemons), "--pool-mib", "4", "--dtype", "float32")
    return Cluster(
        model, run_dir, *arguments, "--transport", transport, config={"instance": {**ENGINE["instance"], **instance}}
    )


@pytest.fixture(scope="module", params=["shm", "tcp"])
def cluster(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One instance with its daemon, and two lenders."""
    with start(model, tmp_path_factory.mktemp("run") / "c", transport=request.param) as running:
        yield running


def evict_home(cluster: Cluster, seed: int) -> None:
    """A request that takes all that is free in the instance's own pool, what is cached included."""
    cluster.complete(prompt_of(64 * 24, seed), max_tokens=1, ignore_eos=True)


def test_blocks_go_round_while_the_request_decodes(cluster: Cluster, reference: Reference) -> None:
    prompt, count = prompt_of(64 * 10, seed=41), 1200
    mover = Mover(cluster)
    stream = Stream(cluster, prompt, count)
    stream.wait_for_tokens(3)
    (request,) = mover.requests()
    for number in range(3):
        mover.move(request, HOME, LENDERS[0], 6)
        stream.wait_for_more(2)
        mover.move(request, LENDERS[0], LENDERS[1], 6)
        stream.wait_for_more(2)
        mover.move(request, LENDERS[1], LENDERS[0], 2)
        if number == 0:
            evict_home(cluster, seed=42)
        mover.move(request, LENDERS[1], HOME, 4)
        stream.wait_for_more(2)
        mover.move(request, LENDERS[0], HOME, 2)
    assert stream.running, "the request should have been decoding all the while"
    assert all(mover.written_on_behalf(daemon) for daemon in (HOME, LENDERS[1])), "nothing was copied by a daemon"
    reference.generate(prompt, count).check_tokens(stream.finish())
    mover.check_ledgers()


def test_blocks_that_two_requests_share(cluster: Cluster, reference: Reference) -> None:
    common = prompt_of(64 * 8, seed=43)
    prompts, count = [common + prompt_of(40, seed=44), common + prompt_of(90, seed=45)], 500
    mover = Mover(cluster)
    streams = []
    for prompt in prompts:  # one after the other, so that the second attaches to the first one's blocks
        streams.append(Stream(cluster, prompt, count))
        streams[-1].wait_for_tokens(2)
    first, second = mover.requests(2)
    mover.move(first, HOME, LENDERS[0], 8)
    mover.move(second, HOME, LENDERS[1], 4)
    mover.move(first, LENDERS[0], LENDERS[1], 8)
    mover.move(second, LENDERS[1], LENDERS[0], 4)
    mover.move(first, LENDERS[1], HOME, 3)
    assert all(stream.running for stream in streams), "both should have been decoding all the while"
    for prompt, stream in zip(prompts, streams, strict=True):
        reference.generate(prompt, count).check_tokens(stream.finish())
    mover.check_ledgers()


def test_refusals(cluster: Cluster, reference: Reference) -> None:
    prompt, count = prompt_of(64 * 6, seed=46), 1500
    mover = Mover(cluster)
    stream = Stream(cluster, prompt, count)
    stream.wait_for_tokens(3)
    (request,) = mover.requests()

    def refusal(*arguments: object, **fields: object) -> str:
        answer = mover.instruct(*arguments, **fields)  # type: ignore[arg-type]
        assert answer.accepted_blocks == 0
        return answer.refusal

    assert refusal(("nobody", request[1]), HOME, LENDERS[0], 3) == "UNKNOWN_REQUEST"
    assert refusal(request, LENDERS[0], HOME, 3) == "NOTHING_TO_MOVE"
    assert refusal(request, HOME, "gone", 3, destination_address="127.0.0.1:1") == "DESTINATION_UNREACHABLE"
    accepted = mover.instruct(request, HOME, LENDERS[0], 2, move_id="twice")
    assert mover.instruct(request, HOME, LENDERS[0], 2, move_id="twice") == accepted
    assert accepted.accepted_blocks == 2
    assert refusal(request, HOME, LENDERS[0], 3, fencing_token=TOKEN - 1) == "STALE_LEADER"
    for source, destination, blocks in ((HOME, HOME, 1), (HOME, LENDERS[0], 0)):
        with pytest.raises(grpc.RpcError, match="INVALID_ARGUMENT"):
            mover.instruct(request, source, destination, blocks)
    reference.generate(prompt, count).check_tokens(stream.finish())
    assert mover.end_of("twice") == (2, "DONE")
    mover.check_ledgers()


@pytest.mark.parametrize(
    ("lost", "how", "transport"),
    [
        pytest.param("source", signal.SIGKILL, "shm", id="source-killed"),
        pytest.param("source", signal.SIGSTOP, "tcp", id="source-stopped"),
        pytest.param("destination", signal.SIGKILL, "tcp", id="destination-killed"),
        pytest.param("destination", signal.SIGSTOP, "shm", id="destination-stopped"),
    ],
)
def test_a_daemon_is_lost_in_the_middle_of_a_move(
    model: Path, reference: Reference, tmp_path: Path, lost: str, how: signal.Signals, transport: str
) -> None:
    prompt, count = prompt_of(64 * 18, seed=47), 1500
    with start(model, tmp_path / "c", kvdaemons=3, transport=transport, move_bytes_per_s=1.0) as cluster:
        mover = Mover(cluster)
        stream = Stream(cluster, prompt, count)
        stream.wait_for_tokens(3)
        (request,) = mover.requests()
        mover.move(request, HOME, LENDERS[0], 16)
        pid = cluster.pid(LENDERS[0 if lost == "source" else 1])
        answer = mover.instruct(request, LENDERS[0], LENDERS[1], 16, move_id="middle")
        send_signal(pid, how)
        assert answer.accepted_blocks == 16
        moved, end = mover.end_of("middle")
        expected = {"SOURCE_LOST" if lost == "source" else "DESTINATION_LOST", "COPY_FAILED"}
        if (lost, how) == ("destination", signal.SIGSTOP):
            expected.add(
                "REQUEST_ENDED"
            )  # who asks nothing of it yet does not wait, and may be done before that is known
        assert end in expected
        assert moved < 16
        reference.generate(prompt, count).check_tokens(stream.finish())
        if how is signal.SIGSTOP:
            os.kill(pid, signal.SIGCONT)
        mover.check_ledgers()
