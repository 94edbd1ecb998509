"""The cluster simulator: it serves every token once, its costs and its policies are what its README says."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest

from benchmarks.simulator.cluster import Cluster
from benchmarks.simulator.comparison import Workload, compare, reference_rate, simulated
from benchmarks.simulator.costs import QUERY_S, Link, Rates, answer_s
from benchmarks.simulator.hardware import A100, H200
from benchmarks.simulator.instance import Serving
from benchmarks.simulator.lending import Pool, PooledMemory
from benchmarks.simulator.models import MODELS
from benchmarks.simulator.policies import OURS, POLICIES, REACTIVE, VLLM_MULTI, VLLM_SINGLE, ClusterSpec, Policy
from benchmarks.simulator.recorder import Outcome
from benchmarks.simulator.sequence import SimulatedSequence, make_sequence
from benchmarks.simulator.steps import Device, work
from benchmarks.simulator.traces import MAX_OUTPUT, SHORT, TRACES, Arrival, Lengths, arrivals
from services.core.sequence import RequestAge

LLAMA_7B, LLAMA_13B, LLAMA_70B, LLAMA3_8B, _ = MODELS


def spec(policy: Policy, devices: int = 4, computed_prompts: bool = True) -> ClusterSpec:
    return ClusterSpec(policy, LLAMA_7B, A100, devices, computed_prompts)


def served(cluster: Cluster) -> Outcome:
    outcome = cluster.run()
    cluster.check_integrity()
    assert all(pool.free == pool.blocks for pool in cluster.pools)
    return outcome


# ------------------------------------------------------------ costs


def test_a_step_takes_what_its_formula_says() -> None:
    rates = Rates.of(LLAMA_7B, A100, 1)
    reads = 2.039e12 * 0.8
    assert rates.kv_tokens == int((80e9 * 0.9 - 2e9 - 2 * 6.74e9) / 524_288)
    # Few tokens: reading the weights takes longest; many: arithmetic does.
    assert math.isclose(rates.other_s(1), 32 * 25e-6 + 2 * 6.74e9 / reads)
    assert math.isclose(rates.other_s(2048), 32 * 25e-6 + 2048 * 2 * 6.74e9 / (312e12 * 0.6))
    sequence = make_sequence(1, prompt=10_000, output=100, max_tokens=100, arrival_time=0.0)
    sequence.computed, sequence.local = 9_999, 157
    done = work([(sequence, 1)], 1, 64, 0, [Device(rates)], [])
    attention_s = 32 * 5e-6 + 9_999 * 524_288 / reads
    assert math.isclose(done.local_attention_s, attention_s)
    assert math.isclose(done.step_s, rates.other_s(1) + attention_s)
    # Half of the device computes for others: everything takes twice as long.
    busy = Device(rates)
    busy.host(7, 0.5)
    assert math.isclose(work([(sequence, 1)], 1, 64, 0, [busy], []).step_s, 2 * done.step_s)


def test_remote_attention_runs_beside_local_attention() -> None:
    rates, link = Rates.of(LLAMA_7B, A100, 1), Link(20e-6, 3e9)
    devices = [Device(rates), Device(rates)]
    sequence = make_sequence(1, prompt=64_000, output=100, max_tokens=100, arrival_time=0.0)
    sequence.computed, sequence.local = 64_000, 800
    sequence.put(1, 200)
    done = work([(sequence, 1)], 1, 64, 0, devices, [link, link])
    part = done.parts[1]
    assert (part.rows, part.context_tokens) == (1, 12_800)
    assert math.isclose(part.computing_s, 32 * QUERY_S + 12_800 * rates.context_token_s)
    way_s = 32 * (2 * 20e-6 + QUERY_S) + 2 * 32 * 8192 / 3e9
    assert math.isclose(part.answer_s, way_s + part.computing_s)
    assert math.isclose(part.answer_s, answer_s(rates, rates, link, 1, part.computing_s))
    assert part.answer_s < done.local_attention_s  # it hides
    assert math.isclose(done.attention_s, done.local_attention_s + 32e-6)
    sequence.put(1, 800)
    sequence.local -= 800
    late = work([(sequence, 1)], 1, 64, 0, devices, [link, link])
    assert math.isclose(late.attention_s, late.parts[1].answer_s + 32e-6)


def test_splitting_eight_ways_leaves_a_third_of_one_devices_rate() -> None:
    """The one number of the paper that the cost formulas can be held against."""
    one, eight = Rates.of(LLAMA_7B, A100, 1), Rates.of(LLAMA_7B, A100, 8)
    for batch in (1, 32, 128):
        assert 0.3 < one.other_s(batch) / 8 / eight.other_s(batch) < 0.4


def test_all_reduces_between_nodes_cost_more_than_in_one() -> None:
    eight, all_of_them = Rates.of(LLAMA_7B, A100, 8), Rates.of(LLAMA_7B, A100, 32)
    assert math.isclose(eight.reduce_s, 64 * 20e-6)
    assert math.isclose(all_of_them.reduce_s, 64 * (20e-6 + 4 * 20e-6))
    assert all_of_them.reduce_token_s > 5 * eight.reduce_token_s


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_shapes_are_the_published_ones(model) -> None:
    kilobytes = {"llama2-7b": 512, "llama2-13b": 800, "llama2-70b": 320, "llama3-8b": 128, "llama3-70b": 320}
    assert model.kv_bytes_per_token == 1024 * kilobytes[model.name]
    assert Rates.of(model, H200, model.devices).kv_tokens > Rates.of(model, A100, model.devices).kv_tokens > 100_000


def test_a_model_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        Rates.of(LLAMA_70B, A100, 1)


# ------------------------------------------------------------ traces


def test_traces_are_the_same_for_every_policy_and_keep_their_ranges() -> None:
    for trace in (SHORT, *TRACES):
        drawn = arrivals(trace, 50.0, 40.0, "poisson", seed=3)
        assert drawn == arrivals(trace, 50.0, 40.0, "poisson", seed=3) != arrivals(trace, 50.0, 40.0, "poisson", seed=4)
        assert 1_700 < len(drawn) < 2_300
        assert max(item.lengths.prompt for item in drawn) + MAX_OUTPUT <= trace.longest
        assert all(1 <= item.lengths.output <= MAX_OUTPUT for item in drawn)
        long = sum(item.lengths.prompt > 4096 for item in drawn) / len(drawn)
        assert abs(long - trace.long_share) < 0.05


def test_bursts_come_in_bursts() -> None:
    def variation(kind) -> float:
        times = [item.time_s for item in arrivals(SHORT, 100.0, 100.0, kind, seed=1)]
        gaps = [later - sooner for sooner, later in itertools.pairwise(times)]
        mean = sum(gaps) / len(gaps)
        return math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) / mean

    assert variation("poisson") == pytest.approx(1.0, abs=0.1)
    assert variation("bursty") == pytest.approx(3.0, abs=0.5)


# ------------------------------------------------------------ serving


@pytest.mark.parametrize("computed", [True, False])
@pytest.mark.parametrize("policy", [*POLICIES, REACTIVE], ids=lambda policy: policy.name)
@pytest.mark.parametrize("trace", [SHORT, TRACES[2], TRACES[3]], ids=lambda trace: trace.name)
def test_every_token_is_served_once_and_every_block_comes_back(trace, policy, computed) -> None:
    requests = arrivals(trace, 3.0, 15.0, "poisson", seed=1)
    cluster = Cluster(spec(policy, computed_prompts=computed), requests, 0.0)
    outcome = served(cluster)
    held = cluster.instances[0]._lending.most_blocks(0) * cluster.block_tokens
    fitting = [item.lengths for item in requests if item.lengths.prompt + MAX_OUTPUT <= held]
    assert outcome.refused == len(requests) - len(fitting)
    assert cluster.recorder.all_tokens == sum(lengths.output for lengths in fitting)
    assert cluster.recorder.ended == len(fitting)


def test_blocks_are_accounted_for_at_any_moment() -> None:
    requests = arrivals(TRACES[2], 12.0, 20.0, "poisson", seed=2)
    for end_s in (3.3, 7.7, 15.0, 19.9):
        cluster = Cluster(spec(OURS), requests, 0.0)
        cluster.run(end_s)
        cluster.check_integrity()


def test_the_same_seed_gives_the_same_outcome() -> None:
    workload = Workload(LLAMA_7B, TRACES[3], A100, 4, "computed", 1.2, 30.0)
    once, again = (compare(workload, POLICIES, lambda _: None) for _ in range(2))
    other = compare(replace(workload, seed=2), POLICIES, lambda _: None)
    assert once == again
    assert once.outcomes != other.outcomes
    assert once.ratio(OURS, VLLM_SINGLE) == once.of(OURS).tokens_per_s / once.of(VLLM_SINGLE).tokens_per_s
    assert once.ratio(OURS, REACTIVE) is None


def test_alone_an_instance_refuses_what_others_could_hold() -> None:
    one_of_many = [Arrival(0.0, Lengths(200_000, 10))]  # one pool holds half of it
    assert served(Cluster(spec(VLLM_MULTI), one_of_many, 0.0)).refused == 1
    for policy in (OURS, REACTIVE, VLLM_SINGLE):
        cluster = Cluster(spec(policy), one_of_many, 0.0)
        assert served(cluster).refused == 0
        assert cluster.recorder.all_tokens == 10


def test_a_request_longer_than_a_pool_lies_on_others() -> None:
    cluster = Cluster(spec(OURS), [Arrival(0.0, Lengths(200_000, 500))], 0.0)
    cluster.run(4.0)
    (sample,) = cluster.recorder.placements[-1:]
    assert sum(sample.own) + sum(sample.lent) >= 200_000 // 64
    assert sum(lent > 0 for lent in sample.lent) == 3
    assert all(own + lent <= blocks for own, lent, blocks in zip(sample.own, sample.lent, sample.blocks, strict=True))


def test_one_instance_with_nobody_to_borrow_from_is_vllm_multi() -> None:
    requests = arrivals(TRACES[0], 3.0, 20.0, "poisson", seed=1)
    # The same blocks and no workspace: then nothing but lending tells them apart.
    alone = replace(VLLM_MULTI, name="alone")
    outcomes = []
    for policy in (alone, _Unpooled("ours", pooled=True, planned=True, single=False)):
        cluster = Cluster(_EqualSpec(policy, LLAMA_7B, A100, 1, False), requests, 0.0)
        outcomes.append((served(cluster), cluster.recorder.all_tokens))
    (first, tokens), (second, tokens_too) = outcomes
    assert tokens == tokens_too
    assert replace(first, step_error=0.0) == replace(second, step_error=0.0, moves=0, moved_blocks=0)


class _Unpooled(Policy):
    @property
    def block_tokens(self) -> int:
        return 16


class _EqualSpec(ClusterSpec):
    def size(self, kv_tokens: int) -> tuple[int, int, Serving]:
        return kv_tokens // 16, 0, Serving(16, 256, 2048, False)


def test_who_prefills_takes_longer_to_the_first_token() -> None:
    ttft = []
    for computed in (True, False):
        cluster = Cluster(spec(VLLM_MULTI, 1, computed), [Arrival(0.0, Lengths(40_000, 5))], 0.0)
        ttft.append(served(cluster).ttft_s[0])
    rates = Rates.of(LLAMA_7B, A100, 1)
    assert ttft[1] - ttft[0] == pytest.approx(rates.prefill_s(40_000, 2048), rel=0.1)


def test_the_planner_moves_blocks_and_learns_what_steps_cost() -> None:
    # Two requests fill a pool; before they have outgrown it, blocks move to the other one, which is empty by then.
    lengths = (Lengths(51_000, 2_000), Lengths(58_000, 100), Lengths(51_000, 2_000), Lengths(500, 2_000))
    full = [Arrival(0.1 * number, item) for number, item in enumerate(lengths)]
    cluster = Cluster(spec(OURS, 2), full, 0.0)
    outcome = served(cluster)
    assert outcome.moves > 0
    assert outcome.moved_blocks > 0
    assert 0 < outcome.step_error < 0.15
    assert cluster.gmanager is not None
    assert cluster.gmanager.latest is not None
    assert served(Cluster(spec(REACTIVE, 2), full, 0.0)).moves == 0


# ------------------------------------------------------------ pools


def test_blocks_are_borrowed_as_the_rmanager_borrows_them() -> None:
    pools = [Pool(100), Pool(300), Pool(100), Pool(50)]
    lending = PooledMemory(pools)
    assert [(grant.instance, grant.blocks) for grant in lending.borrow(0, 90)] == [(1, 60), (2, 20), (3, 10)]
    assert [(grant.instance, grant.blocks) for grant in PooledMemory(pools).borrow(0, 3)] == [(1, 3)]
    pools[1].give(3)
    assert sum(grant.blocks for grant in lending.borrow(0, 1000)) == 360
    assert lending.borrow(0, 1) == []


def test_instances_whose_own_requests_wait_are_spared() -> None:
    lending = PooledMemory([Pool(100), Pool(300), Pool(100)])
    lending.waits(1, True)
    assert [grant.instance for grant in lending.borrow(0, 20, spare_wanted=True)] == [2]
    assert {grant.instance for grant in lending.borrow(0, 20)} == {1, 2}
    lending.waits(1, False)
    assert {grant.instance for grant in lending.borrow(0, 20, spare_wanted=True)} == {1, 2}


def test_the_oldest_starving_request_is_known_to_all() -> None:
    lending = PooledMemory([Pool(1), Pool(1)])
    older, younger = RequestAge(1.0, "a"), RequestAge(2.0, "b")
    lending.starves(0, younger)
    lending.starves(1, older)
    assert lending.oldest_starving() == older
    lending.starves(1, None)
    assert lending.oldest_starving() == younger
    lending.starves(0, None)
    assert lending.oldest_starving() is None


def test_blocks_that_were_computed_are_counted_where_they_lie() -> None:
    sequence: SimulatedSequence = make_sequence(1, prompt=1000, output=10, max_tokens=10, arrival_time=0.0)
    sequence.put(3, 10)
    sequence.local = 6
    sequence.computed = 300
    assert (sequence.away_tokens(64), sequence.resting(64)) == (300, 0)
    sequence.computed = 1000
    assert (sequence.away_tokens(64), sequence.resting(64)) == (640, 5)
    sequence.put(3, -10)
    assert (sequence.remote, sequence.away) == ({}, 0)


def test_the_reference_rate_grows_with_the_cluster() -> None:
    rates = [reference_rate(LLAMA_13B, TRACES[1], A100, devices, "computed") for devices in (2, 32, 1000)]
    assert rates[1] == pytest.approx(16 * rates[0])
    assert rates[2] == pytest.approx(500 * rates[0])
    assert reference_rate(LLAMA_13B, TRACES[1], A100, 2, "prefilled") < rates[0]
    assert simulated(Workload(LLAMA3_8B, SHORT, H200, 8, "computed", 0.5, 5.0), VLLM_SINGLE).spec.instances == 1


# ------------------------------------------------------------ command line


def test_the_command_line_writes_valid_json(tmp_path) -> None:
    file = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.simulator", "--quick", "--trace", "0", "3", "--json", str(file)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    result = json.loads(file.read_text())
    assert [row["trace"] for row in result["rows"]] == ["0", "3"]
    for row in result["rows"]:
        assert row["ours/multi"] == pytest.approx(row["ours_tokens_per_s"] / row["vllm-multi_tokens_per_s"])
        assert row["vllm-single_tokens_per_s"] > 0
    assert any("traces 3-8" in name for name in result["targets"])
