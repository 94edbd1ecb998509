"""A real cluster, scraped as Prometheus would: every metric is there, and its values are what happened."""

from __future__ import annotations

import signal

import pytest
from metrics_rig import DAEMON, GATEWAY, GMANAGER, INSTANCE, LENDER, Run, eventually, scrape
from moving import Stream
from prometheus_tools import promtool
from test_serving import prompt_of

from services.runtime import metrics
from services.runtime.metric_spec import MetricSpec
from services.runtime.vllm_names import VLLM_NAMES

pytestmark = pytest.mark.cluster

# Nothing need move here: tests/unit/test_gmanager_metrics.py has them move.
OF_MOVES = {metrics.MOVES, metrics.MOVED_BLOCKS, metrics.PREDICTED_GAIN, metrics.MEASURED_GAIN}
# May be 0 all the time; each has a test of its own beside its code's.
MAY_BE_0 = {
    *(metrics.MOVES_IN_PROGRESS, metrics.LEADER_CHANGES, metrics.FAILOVERS, metrics.JOURNAL_DROPPED),
    *(metrics.DISCARDED_STEPS, metrics.REQUESTS_WAITING, metrics.STEP_PREDICTION_ERROR, metrics.PLANNED_THROUGHPUT),
    metrics.RESUMED,
}


def test_everybody_is_named(run: Run) -> None:
    targets = run.cluster.http.get("/metrics/targets").json()
    services = {target["labels"]["member"]: target["labels"]["service"] for target in targets}
    members = {INSTANCE: "instance", LENDER: "kvdaemon", DAEMON: "kvdaemon", GATEWAY: "gateway", GMANAGER: "gmanager"}
    assert services == members
    addresses = {target["labels"]["member"]: target["targets"] for target in targets}
    assert addresses[GATEWAY] == [f"127.0.0.1:{run.cluster.http_port}"]


def test_every_declared_metric_is_served_as_declared(run: Run) -> None:
    kinds = {INSTANCE: "instance", LENDER: "kvdaemon", DAEMON: "kvdaemon", GATEWAY: "gateway", GMANAGER: "gmanager"}
    by_name = {spec.name.removesuffix("_total"): spec for spec in metrics.ALL}
    for member, told in run.quiet.items():
        own = {name: family for name, family in told.families.items() if name.startswith("infinite_llm_")}
        assert own.keys() == {name for name, spec in by_name.items() if kinds[member] in spec.services}, member
        for name, family in own.items():
            spec = by_name[name]
            assert (family.type, family.documentation) == (spec.kind, spec.help)
            for sample in family.samples:
                assert set(sample.labels) - {"le"} == set(spec.labels)


def test_every_declared_metric_says_something(run: Run) -> None:
    def spoke(spec: MetricSpec, least: float) -> bool:
        families = (told.families.get(spec.name.removesuffix("_total")) for told in both)
        return any(abs(sample.value) > least for family in families if family for sample in family.samples)

    both = [*run.busy.values(), *run.quiet.values()]
    silent = {spec.name for spec in set(metrics.ALL) - OF_MOVES if not spoke(spec, -1.0)}
    assert silent <= {metrics.STEP_PREDICTION_ERROR.name}
    # What only failures and want of memory bring about is looked at below.
    of_failures = {metrics.PREEMPTIONS, metrics.RECOMPUTED_TOKENS, metrics.JOURNAL_FAILURES, metrics.JOURNAL_QUEUED}
    assert not {spec.name for spec in set(metrics.ALL) - OF_MOVES - MAY_BE_0 - of_failures if not spoke(spec, 0.0)}


def test_requests_and_tokens(run: Run) -> None:
    gateway, instance = run.quiet[GATEWAY], run.quiet[INSTANCE]
    outcomes = {"stop": 0, "length": run.requests, "aborted": 0, "refused": 1}
    assert gateway.by("outcome", "infinite_llm_requests_total") == outcomes
    assert gateway.by("reason", "infinite_llm_refusals_total") == {"CONTEXT_TOO_LONG": 1}
    assert gateway.value("infinite_llm_generation_tokens_total") == run.generated_tokens
    refused = gateway.value("infinite_llm_prompt_tokens_total") - run.prompt_tokens
    assert refused == 4000  # admitted here, refused by the instance, which knows the cluster's memory
    cached = gateway.value("infinite_llm_cached_prompt_tokens_total")
    assert cached == 192
    assert gateway.value("infinite_llm_time_to_first_token_seconds_count") == run.requests
    assert gateway.value("infinite_llm_request_duration_seconds_count") == run.requests
    assert gateway.value("infinite_llm_inter_token_latency_seconds_count") == run.generated_tokens - run.requests
    together = (gateway.value(f"infinite_llm_{n}_seconds_sum") for n in ("time_to_first_token", "inter_token_latency"))
    assert sum(together) <= gateway.value("infinite_llm_request_duration_seconds_sum")
    computed = sum(instance.by("phase", "infinite_llm_computed_tokens_total").values())
    # The last token of an answer is drawn and not computed.
    assert computed == run.prompt_tokens + run.generated_tokens - run.requests - cached
    assert instance.value("infinite_llm_batch_tokens_sum") == computed
    parts = instance.by("part", "infinite_llm_step_part_seconds_total")
    assert sum(parts.values()) == pytest.approx(sum(instance.by("phase", "infinite_llm_step_seconds_sum").values()))


def test_what_is_held_while_a_request_runs(run: Run) -> None:
    by_status, borrowed, lent = run.pairs
    assert by_status == borrowed == lent
    assert borrowed[LENDER] >= 3
    assert run.busy[INSTANCE].value("infinite_llm_requests_running") == 1
    assert run.busy[GATEWAY].value("infinite_llm_requests_in_progress") == 1
    assert run.busy[GATEWAY].value("infinite_llm_connected_instances") == 1
    assert 0 < run.busy[INSTANCE].value("infinite_llm_kv_cache_usage_ratio") <= 1
    assert run.busy[GMANAGER].by("kind", "infinite_llm_members") == {"instance": 1, "kvdaemon": 2, "gmanager": 1}


def test_pools_are_those_of_status(run: Run) -> None:
    assert run.use.keys() == {DAEMON, LENDER}
    for member, use in run.use.items():
        told = run.quiet[member]
        states = told.by("state", "infinite_llm_pool_blocks")
        assert states == {state: use[state] for state in ("free", "cached", "workspace", "reserved", "in_use")}
        assert sum(states.values()) == use["total"] == 16
        assert told.value("infinite_llm_pool_bytes") == 2 << 20
        assert told.value("infinite_llm_block_bytes") == 128 << 10


def test_the_data_plane_is_the_same_from_both_ends(run: Run) -> None:
    instance, lender = run.quiet[INSTANCE], run.quiet[LENDER]
    for one, other in (("sent", "received"), ("received", "sent")):
        ours = instance.value(f"infinite_llm_dataplane_{one}_bytes_total", peer=LENDER, transport="shm")
        theirs = lender.value(f"infinite_llm_dataplane_{other}_bytes_total", peer=INSTANCE, transport="shm")
        assert ours == theirs > 1 << 16
    answers = instance.value("infinite_llm_remote_answer_seconds_count", peer=LENDER, transport="shm")
    assert answers == lender.value("infinite_llm_hosted_attention_seconds_count") > 1000
    waited = instance.value("infinite_llm_remote_answer_seconds_sum", peer=LENDER, transport="shm")
    assert waited > lender.value("infinite_llm_hosted_attention_seconds_sum")


def test_vllm_names(run: Run) -> None:
    model, found = run.cluster.model_name, set()
    for member in (GATEWAY, INSTANCE):
        for family in run.quiet[member].families.values():
            if family.name.startswith("vllm:"):
                found.add(family.name)
                assert {sample.labels["model_name"] for sample in family.samples} == {model}
    assert found == {name.removesuffix("_total") for names in VLLM_NAMES.values() for name in names}
    gateway = run.quiet[GATEWAY]
    assert gateway.value("vllm:generation_tokens_total", model_name=model) == run.generated_tokens
    assert gateway.by("finished_reason", "vllm:request_success_total") == {
        "stop": 0,
        "length": run.requests,
        "abort": 0,
    }
    assert run.busy[INSTANCE].value("vllm:num_requests_running", model_name=model) == 1


def test_promtool_finds_nothing_wrong(run: Run) -> None:
    for told in (*run.busy.values(), *run.quiet.values()):
        own = [line for line in told.text.splitlines(keepends=True) if "vllm:" not in line]  # colons are not for names
        assert promtool("check", "metrics", given="".join(own)) == (0, "")


def test_losses_are_told(run: Run) -> None:
    """Runs last: a client that goes away, a lender that is killed, and Redis."""
    cluster = run.cluster
    for count, _ in enumerate(cluster.stream(prompt_of(100, seed=54), max_tokens=800, ignore_eos=True)):
        if count == 3:
            break
    eventually(cluster, lambda: scrape(cluster)[GATEWAY].by("outcome", "infinite_llm_requests_total")["aborted"] == 1)

    stream = Stream(cluster, prompt_of(700, seed=55), 300)
    stream.wait_for_tokens(20)
    cluster.signal(LENDER, signal.SIGKILL)
    cluster.signal("redis", signal.SIGKILL)
    assert len(stream.finish()) == 300
    told = scrape(cluster)
    assert told[INSTANCE].by("reason", "infinite_llm_preemptions_total")["kvdaemon_lost"] >= 1
    assert told[INSTANCE].value("infinite_llm_recomputed_tokens_total") > 0

    def journal_waits() -> bool:
        told = scrape(cluster)[GATEWAY]
        waits = told.value("infinite_llm_journal_queued_bytes") > 0
        return waits and told.value("infinite_llm_journal_failures_total") > 0

    eventually(cluster, journal_waits)

    def lender_is_back() -> bool:
        told, started = scrape(cluster).get(LENDER), "process_start_time_seconds"
        return told is not None and told.value(started) > run.quiet[LENDER].value(started)

    eventually(cluster, lender_is_back)
