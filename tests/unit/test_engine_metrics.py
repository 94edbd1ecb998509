"""What an engine counts, held against what it did; and the data plane seen from both of its ends."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path

import pytest
from engine_rig import EngineRig
from scraped import Scraped, scraped
from test_engine import model, prompt_of  # noqa: F401  (model is a fixture)

from services.core.errors import PeerLostError
from services.core.placement import PoolStats
from services.core.sequence import Request, SamplingParams, Sequence
from services.dataplane.loopback import LoopbackHub, LoopbackTransport
from services.dataplane.peers import PeerSet
from services.dataplane.remote_attention import PeerShare
from services.dataplane.transport import Limits
from services.instance.assembly import SnapshotBoard
from services.instance.metrics import InstanceState
from services.instance.outputs import EngineSnapshot
from services.kvdaemon.metrics import DaemonState
from services.kvdaemon.traffic import Traffic
from services.runtime.metrics_port import make_registry


@dataclass
class PlayedSession:
    """The session with the local daemon, as far as metrics look at it."""

    kvdaemon_id: str
    pool: PoolStats | None


def told_by_instance(rig: EngineRig) -> Scraped:
    registry = make_registry()
    board = SnapshotBoard("local", 4, latest=rig.snapshot)
    local = PlayedSession("local", rig.stats()[0])
    registry.register(InstanceState("i", board, rig.peers, local))  # type: ignore[arg-type]
    return scraped(registry)


def told_by_lender(rig: EngineRig) -> Scraped:
    (lender,) = rig.lenders
    registry = make_registry()
    registry.register(DaemonState("lender-0", lender.shared, lender.worker))
    return scraped(registry)


def computed(told: Scraped) -> float:
    return sum(told.by("phase", "infinite_llm_computed_tokens_total").values())


def test_steps_and_tokens(model: Path) -> None:  # noqa: F811
    prompts = {"a": 300, "b": 70}
    with EngineRig(model, local_blocks=64) as rig:
        for name, length in prompts.items():
            rig.submit(name, prompt_of(length, length), 40)
        rig.wait(*prompts)
        again = prompt_of(300, 300)  # four of its blocks are there still
        rig.submit("c", again, 1)
        rig.wait("c")
        cached = rig.cached_tokens("c")
    told = scraped(rig.registry)
    assert cached == 256
    # The last token of an answer is drawn and not computed.
    assert computed(told) == sum(length + 39 for length in prompts.values()) + 300 - cached
    steps = sum(told.by("phase", "infinite_llm_step_seconds_count").values())
    assert steps == told.value("infinite_llm_batch_tokens_count") == told.value("infinite_llm_batch_requests_count")
    assert told.value("infinite_llm_batch_tokens_sum") == computed(told)
    assert steps < told.value("infinite_llm_batch_requests_sum") <= 2 * steps
    parts = told.by("part", "infinite_llm_step_part_seconds_total")
    assert sum(parts.values()) == pytest.approx(sum(told.by("phase", "infinite_llm_step_seconds_sum").values()))
    assert parts["local_attention"] > 0
    assert parts["merge"] == 0
    assert told.value("infinite_llm_recomputed_tokens_total") == 0
    assert set(told.by("reason", "infinite_llm_preemptions_total").values()) == {0}


def test_a_lender_and_what_it_is_asked(model: Path) -> None:  # noqa: F811
    prompt, count = prompt_of(900, 60), 300
    with EngineRig(model, local_blocks=12, lenders=(16,)) as rig:
        rig.submit("r", prompt, count)
        rig.wait_until(lambda: dict(rig.snapshot.placement).get("r", {}).get("lender-0", 0) >= 8)
        borrowed = told_by_instance(rig).value("infinite_llm_borrowed_blocks", instance_id="i", kvdaemon_id="lender-0")
        lent = told_by_lender(rig).value("infinite_llm_lent_blocks", instance_id="i", kvdaemon_id="lender-0")
        assert 8 <= borrowed <= lent <= 16
        rig.wait("r")
        rig.check_nothing_held()
        here, there, engine = told_by_instance(rig), told_by_lender(rig), scraped(rig.registry)
    ours, theirs = {"peer": "lender-0", "transport": "loopback"}, {"peer": "i", "transport": "loopback"}
    for one, other in (("sent", "received"), ("received", "sent")):
        exchanged = here.value(f"infinite_llm_dataplane_{one}_bytes_total", **ours)
        assert exchanged == there.value(f"infinite_llm_dataplane_{other}_bytes_total", **theirs)
        assert exchanged > 1 << 16
    answers = here.value("infinite_llm_remote_answer_seconds_count", **ours)
    assert answers == there.value("infinite_llm_hosted_attention_seconds_count") > 3 * (count - 1)
    waited = here.value("infinite_llm_remote_answer_seconds_sum", **ours)
    assert waited > there.value("infinite_llm_hosted_attention_seconds_sum") > 0
    parts = engine.by("part", "infinite_llm_step_part_seconds_total")
    assert min(parts[part] for part in ("send", "remote_wait", "merge", "non_attention", "local_attention")) > 0
    assert not here.by("kvdaemon_id", "infinite_llm_borrowed_blocks")
    assert here.value("infinite_llm_kv_cache_usage_ratio") == 0
    pool = there.by("state", "infinite_llm_pool_blocks")
    assert sum(pool.values()) == 16
    assert pool["cached"] >= 8


def test_a_lost_daemon_and_what_it_costs(model: Path) -> None:  # noqa: F811
    prompt = prompt_of(900, 60)
    with EngineRig(model, local_blocks=12, lenders=(16,)) as rig:
        rig.submit("r", prompt, 60)
        rig.wait_until(lambda: len(rig.tokens("r")) >= 20)
        rig.lenders[0].revoke()
        rig.wait("r")
    told = scraped(rig.registry)
    assert told.by("reason", "infinite_llm_preemptions_total") == {"memory": 0, "kvdaemon_lost": 1}
    recomputed = told.value("infinite_llm_recomputed_tokens_total")
    assert recomputed > 0
    assert computed(told) == 900 + 59 + recomputed


def test_growth_without_room_is_a_preemption_for_memory(model: Path) -> None:  # noqa: F811
    with EngineRig(model, local_blocks=10, workspace=4, max_num_seqs=2) as rig:
        for name, seed in (("old", 40), ("young", 41)):
            rig.submit(name, prompt_of(60, seed), 300)  # 6 blocks each: with 5 each, neither can go on
        rig.wait("old", "young")
    told = scraped(rig.registry)
    assert told.by("reason", "infinite_llm_preemptions_total")["memory"] >= 1
    assert computed(told) == 2 * (60 + 299) + told.value("infinite_llm_recomputed_tokens_total")


def test_a_discarded_step(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    with EngineRig(model) as rig:
        begin, losses = rig.remote.begin_step, [PeerLostError("gone")]

        def begin_step(step: int, shares: SequenceOf[PeerShare]) -> None:
            if losses:
                raise losses.pop()
            begin(step, shares)

        monkeypatch.setattr(rig.remote, "begin_step", begin_step)
        rig.submit("r", prompt_of(50, 1), 5)
        rig.wait("r")
    told = scraped(rig.registry)
    assert told.value("infinite_llm_discarded_steps_total") == 1
    assert computed(told) == 50 + 4


def test_an_instance_is_told_of_as_long_as_it_is_connected() -> None:
    traffic = Traffic()
    first, second, other = (traffic.begin(name, "shm") for name in ("i", "i", "j"))
    first.sent_bytes += 5
    second.received_bytes += 7
    traffic.end(first)
    assert [(t.instance_id, t.sent_bytes, t.received_bytes) for t in traffic.all()] == [("i", 5, 7), ("j", 0, 0)]
    traffic.end(second)
    assert traffic.all() == (other,)


def test_what_waits() -> None:
    peers = PeerSet(LoopbackTransport(LoopbackHub(), "i"), Limits(1 << 12, 1 << 12), query_room=0)
    board = SnapshotBoard("local", 4, latest=EngineSnapshot(running=2, waiting=3))
    registry = make_registry()
    registry.register(InstanceState("i", board, peers, PlayedSession("local", None)))  # type: ignore[arg-type]
    told = scraped(registry)
    assert told.value("infinite_llm_requests_running") == 2
    assert told.value("infinite_llm_requests_waiting") == 3
    assert told.value("infinite_llm_kv_cache_usage_ratio") == 0  # the daemon has not told of its pool yet
    assert not told.by("peer", "infinite_llm_dataplane_sent_bytes_total")


def sequence(tokens: int, prompt_tokens: int) -> Sequence:
    return Sequence(Request("r", (1,) * tokens, prompt_tokens, SamplingParams(0.0, 1, 99), 0.0, 1))


def test_what_counts_as_computed_before() -> None:
    fresh = sequence(100, 100)
    fresh.computed = 100
    assert fresh.recomputed(100) == 0
    continued = sequence(110, 100)  # ten tokens came from another instance, which had not computed the last one
    continued.computed = 64
    assert continued.recomputed(64) == 64
    continued.computed = 110
    assert continued.recomputed(46) == 45
    continued.computed = 111
    assert continued.recomputed(1) == 0
