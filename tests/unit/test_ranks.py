"""Parts of a model, and what a leader and its ranks have between them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from kvdaemon_rig import GEOMETRY, Rig, attend, segment
from signals import send_signal
from transformers import GPT2Config, LlamaConfig

from kernels import LayerParams, empty_partial
from kernels.reference import ReferenceKernels
from services.core.blocks import BlockKeySpace, HeadRange
from services.core.errors import ConfigError, PeerLostError, TransferTimeoutError, UnsupportedModelError
from services.dataplane.peers import LostPeer, PeerSet
from services.dataplane.remote_attention import PeerShare
from services.dataplane.transport import Limits
from services.dataplane.wire import Role
from services.instance.ranks.lockstep import LockstepRemoteAttention
from services.instance.ranks.orders import RankChannel, StepEnd
from services.instance.ranks.part import WHOLE, ModelPart, check_degree, check_heads
from services.instance.ranks.pulse import Watch

DEADLINE_S = 30.0
LLAMA = LlamaConfig(num_attention_heads=8, num_key_value_heads=2)


# Parts.


@pytest.mark.parametrize(
    ("degree", "what"),
    [
        (3, "3 does not divide the 8 query heads of m"),
        (4, "4 does not divide the 2 KV heads of m"),
        (16, "16 does not"),
    ],
)
def test_a_degree_that_does_not_divide_the_heads_is_refused(degree: int, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        check_degree("m", LLAMA, degree)


def test_degrees_that_are_possible() -> None:
    for degree in (1, 2):
        check_degree("m", LLAMA, degree)
    check_degree("m", GPT2Config(), 1)


def test_an_architecture_without_a_plan_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"m: transformers has no tensor-parallel plan .* for 'gpt2'"):
        check_degree("m", GPT2Config(), 2)


def test_a_plan_that_leaves_attention_whole_is_refused() -> None:
    check_heads("m", LLAMA, 4, 2)
    with pytest.raises(UnsupportedModelError, match="gives each of 2 ranks 8 of 8 query heads"):
        check_heads("m", LLAMA, 8, 2)


def test_the_parts_of_a_pool_are_views_that_cover_it() -> None:
    pool = torch.arange(2 * 3 * 6 * 2 * 4 * 5).view(2, 3, 6, 2, 4, 5)
    assert WHOLE.of_pool(pool) is pool
    assert WHOLE.heads(6) is None
    parts = [ModelPart(rank, 3).of_pool(pool) for rank in range(3)]
    assert torch.equal(torch.cat(parts, 2), pool)
    assert all(part.untyped_storage().data_ptr() == pool.untyped_storage().data_ptr() for part in parts)
    assert ModelPart(2, 3).heads(6) == HeadRange(4, 6)


def test_a_blocks_name_says_what_lies_in_it() -> None:
    """All heads, whoever has computed them; a pool for some of them only would have names of its own."""
    roots = {BlockKeySpace("m", "float32", heads).root() for heads in ((0, 4), (0, 2), (2, 4))}
    assert len(roots) == 3


# What is said.


@pytest.fixture
def channels() -> tuple[RankChannel, RankChannel]:
    ours, theirs = socket.socketpair()
    return RankChannel(ours.detach()), RankChannel(theirs.detach())


def test_messages_with_tensors_survive_the_way(channels: tuple[RankChannel, RankChannel]) -> None:
    leader, rank = channels
    sent = (StepEnd(7, "", (LostPeer("d", 1, "gone"),)), torch.arange(5), torch.empty(0, dtype=torch.int32), None)
    leader.send(sent)
    end, numbers, nothing, none = rank.receive(DEADLINE_S)  # type: ignore[misc]
    assert (end, none) == (sent[0], None)
    assert torch.equal(numbers, sent[1])
    assert (nothing.dtype, nothing.numel()) == (torch.int32, 0)


def test_files_are_passed_on(channels: tuple[RankChannel, RankChannel], tmp_path: Path) -> None:
    leader, rank = channels
    with (tmp_path / "a").open("w") as a, (tmp_path / "b").open("w") as b:
        leader.send_files([a.fileno(), b.fileno()])
        fds = rank.receive_files(2)
    os.write(fds[1], b"text")
    assert (tmp_path / "b").read_text() == "text"
    for fd in fds:
        os.close(fd)


def test_silence_and_the_end_of_a_channel(channels: tuple[RankChannel, RankChannel]) -> None:
    leader, rank = channels
    with pytest.raises(TransferTimeoutError):
        rank.receive(0.01)
    leader.close()
    with pytest.raises(PeerLostError):
        rank.receive(DEADLINE_S)
    with pytest.raises(PeerLostError):
        rank.receive_files(2)
    with pytest.raises(PeerLostError):
        rank.send("anything")


# Whether a rank is there.


@contextmanager
def watched(timeout_s: float) -> Iterator[tuple[Watch, list[subprocess.Popen[bytes]], Callable[[], str]]]:
    """Two processes that answer; the callable waits until one is lost."""
    code = (
        "import sys, time; from services.instance.ranks.pulse import answer_pulse; answer_pulse(int(sys.argv[1])); "
        "print(flush=True); time.sleep(600)"
    )
    sockets, processes = [], []
    for _ in range(2):
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-c", code, str(theirs.fileno())]
        processes.append(subprocess.Popen(command, pass_fds=(theirs.fileno(),), stdout=subprocess.PIPE))
        theirs.close()
        sockets.append(ours)
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    reasons: list[str] = []
    is_lost = threading.Event()

    def lost(reason: str) -> None:
        reasons.append(reason)
        is_lost.set()

    def reason() -> str:
        assert is_lost.wait(DEADLINE_S)
        return reasons[0]

    watch = Watch(sockets, processes, timeout_s, lost)
    try:
        yield watch, processes, reason
    finally:
        watch.close()
        for process in processes:
            process.kill()
            process.wait()


def test_a_rank_that_is_killed_is_missed_before_it_is_asked_anything() -> None:
    with watched(60.0) as (watch, processes, reason):
        assert watch.lost() is None
        processes[1].send_signal(signal.SIGKILL)
        assert reason() == "rank 2 was killed by SIGKILL"
        assert watch.lost() == "rank 2 was killed by SIGKILL"


def test_a_rank_that_is_stopped_is_missed_and_one_that_answers_is_not() -> None:
    with watched(0.5) as (watch, processes, reason):
        watch.ask()
        send_signal(processes[0].pid, signal.SIGSTOP)
        assert reason() == "rank 1 has not answered for 0.5 s"


# A step goes on to its end, whatever fails in it.


def test_a_lost_daemon_is_told_of_at_the_end_and_a_new_session_heals_it() -> None:
    with Rig() as rig:
        session = rig.open()
        blocks = rig.sealed(session, range(2))
        listed = [(handle, i * GEOMETRY.block_tokens) for i, handle in enumerate(blocks)]
        peers = PeerSet(rig.another_client(), Limits(1 << 20, 1 << 22), 1 << 16, Role.READER, HeadRange(1, 2))
        remote = LockstepRemoteAttention(peers, ReferenceKernels(), "float32", DEADLINE_S)
        peers.connect("d", rig.address, session)
        q = rig.random(1, 3, GEOMETRY.head_dim)

        def step(number: int, known: int) -> torch.Tensor:
            """Answers the last layer's out."""
            share = PeerShare("d", torch.arange(1), [segment(0, 1, 20, listed if known == 0 else [], known)], 5)
            remote.begin_step(number, [share])
            for layer in range(GEOMETRY.layers):
                out, lse = empty_partial(1, 3, GEOMETRY.head_dim)
                if remote.submit(LayerParams(layer, 0.25), q):
                    remote.collect(out, lse)
            return out

        def expected() -> torch.Tensor:
            return attend(rig.blocks()[:, :, 1:2], q, [(1, 20, listed)], LayerParams(1, 0.25))[0]

        torch.testing.assert_close(step(1, 0), expected())
        assert remote.failure is None
        rig.sessions.close(session)
        step(2, 2)
        assert isinstance(remote.failure, PeerLostError)
        assert [lost.session_id for lost in peers.take_lost()] == [session]
        assert not step(3, 2).any(), "begin_step fails, too, and nothing is asked"
        assert isinstance(remote.failure, PeerLostError)

        session = rig.open(epoch=2)
        listed = [(handle, i * GEOMETRY.block_tokens) for i, handle in enumerate(rig.sealed(session, range(5, 7)))]
        peers.connect("d", rig.address, session)
        torch.testing.assert_close(step(4, 0), expected())
        assert remote.failure is None
        remote.forget("d", 0)
        assert remote.forgotten == [("d", 0)]
        peers.close()
