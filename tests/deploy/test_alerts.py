"""Every alert, evaluated by promtool over series as a cluster tells them: silent while all is well, and on time."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from manifests import K8S
from prometheus_tools import promtool

from services.runtime import metrics

RULES = sorted((K8S / "components" / "monitoring" / "config").glob("*.rules.yml"))
GROUPS = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
ALERTS = {rule["alert"]: rule for group in GROUPS for rule in group["rules"] if "alert" in rule}
MINUTES = 180
MEMBERS = {
    "gateway": ["gateway-0"],
    "gmanager": ["gmanager-0", "gmanager-1"],
    "instance": ["instance-0", "instance-1"],
    "kvdaemon": ["kvdaemon-0", "kvdaemon-1", "kvdaemon-2"],
}
STEADY, NONE = "1+0x180", "0+0x180"


def _of(member: str, **labels: str) -> str:
    service = member.rpartition("-")[0]
    pairs = {"cluster": "c", "instance": f"{member}:80", "job": "infinite-llm", "member": member, "service": service}
    return "{" + ",".join(f'{name}="{value}"' for name, value in sorted((pairs | labels).items())) + "}"


def _healthy() -> dict[str, str]:
    """Three hours of a cluster in which nothing is wrong, minute by minute."""
    told: dict[str, str] = {}
    for members in MEMBERS.values():
        for member in members:
            told["up" + _of(member)] = STEADY
            told["process_start_time_seconds" + _of(member)] = "1000+0x180"

    def tell(member: str, name: str, values: str, **labels: str) -> None:
        told[f"infinite_llm_{name}{_of(member, **labels)}"] = values

    for index, member in enumerate(MEMBERS["gmanager"]):
        for kind in ("gmanager", "instance", "kvdaemon"):
            tell(member, "members", f"{len(MEMBERS[kind])}+0x180", kind=kind)
        tell(member, "gmanager_leads", NONE if index else STEADY)
        tell(member, "leader_changes_total", STEADY)
    for member in MEMBERS["gateway"]:
        tell(member, "connected_instances", "2+0x180")
        tell(member, "requests_total", "0+60x180", outcome="length")
        tell(member, "requests_total", "0+30x180", outcome="refused")
        tell(member, "refusals_total", "0+30x180", reason="CONTEXT_TOO_LONG")
        tell(member, "refusals_total", NONE, reason="QUEUE_FULL")
        tell(member, "failovers_total", NONE)
        tell(member, "journal_failures_total", NONE)
        tell(member, "journal_dropped_entries_total", NONE)
        for name, bounds in (("time_to_first_token", (10, 100, 1000)), ("inter_token_latency", (1, 5, 10))):
            for bound in (*bounds, "+Inf"):
                tell(member, f"{name}_seconds_bucket", "0+60x180", le=str(bound))
    for member in MEMBERS["instance"]:
        tell(member, "step_seconds_count", "0+600x180", phase="decode")
        tell(member, "requests_running", "3+0x180")
        tell(member, "requests_waiting", NONE)
        tell(member, "preemptions_total", NONE, reason="memory")
        tell(member, "preemptions_total", NONE, reason="kvdaemon_lost")
        tell(member, "discarded_steps_total", NONE)
        tell(member, "computed_tokens_total", "0+1000x180", phase="decode")
        tell(member, "recomputed_tokens_total", "0+10x180")
        tell(member, "step_part_seconds_total", "0+40x180", part="non_attention")
        tell(member, "step_part_seconds_total", "0+10x180", part="remote_wait")
        for peer in MEMBERS["kvdaemon"]:
            tell(member, "remote_answer_seconds_count", "0+1000x180", peer=peer)
            tell(member, "remote_answer_seconds_sum", "0+2x180", peer=peer)
        tell("gmanager-0", "step_prediction_error_ratio", "0.1+0x180", instance_id=member)
    for member in MEMBERS["kvdaemon"]:
        for state, blocks in (("free", 40), ("cached", 10), ("in_use", 40), ("reserved", 10), ("workspace", 5)):
            tell(member, "pool_blocks", f"{blocks}+0x180", state=state)
    tell("gmanager-0", "move_predicted_gain_tokens_per_second", "10+0x180", kind="lend")
    tell("gmanager-0", "move_measured_gain_tokens_per_second", "9+0x180", kind="lend")
    tell("gmanager-0", "moves_total", "0+1x180", kind="lend", end="DONE")
    tell("gmanager-0", "moves_total", NONE, kind="lend", end="EXPIRED")
    for member in ("etcd-0", "etcd-1", "etcd-2"):
        told["up" + _of(member, job="etcd")] = STEADY
        told["etcd_server_has_leader" + _of(member, job="etcd")] = STEADY
        for bound in ("0.01", "1", "+Inf"):
            told["etcd_disk_wal_fsync_duration_seconds_bucket" + _of(member, job="etcd", le=bound)] = "0+60x180"
    return told


@dataclass(frozen=True)
class Case:
    """Something goes wrong in the second hour.

    Attributes:
        series: those of the healthy cluster whose text has all of ``words``, and their values instead, by words.
        at: the minute at which the alert fires.
        labels: of the alert, but for the cluster and the severity.
        quiet_at: a minute, after things have gone wrong, at which it does not fire yet.
    """

    alert: str
    series: dict[tuple[str, ...], str]
    at: int
    summary: str
    labels: dict[str, str] = field(default_factory=dict)
    quiet_at: int = 60
    cluster: bool = True


def _member(member: str, *names: str) -> dict[str, str]:
    """The labels that a target has, those that are named, or all."""
    labels = dict(re.findall(r'(\w+)="(.*?)"', _of(member)))
    return {name: labels[name] for name in names} if names else {n: v for n, v in labels.items() if n != "cluster"}


FELL, ROSE = "1+0x60 0+0x120", "0+0x60 1+0x120"
FIRST = 'member="instance-0"'
CASES = (
    Case(
        "ProcessDown",
        {("up{", "kvdaemon-1"): FELL},
        64,
        "kvdaemon-1 is registered and does not answer",
        _member("kvdaemon-1"),
        62,
    ),
    Case("NoGateway", {("up{", "gateway-0"): FELL}, 63, "no gateway answers; clients are not served", {}, 61, False),
    Case(
        "ProcessMissing",
        {("members", 'kind="kvdaemon"'): "3+0x60 2+0x120"},
        67,
        "2 processes of kind kvdaemon are registered, fewer than within the last hour",
        {"kind": "kvdaemon"},
        64,
    ),
    Case(
        "CrashLoop",
        {("process_start", "instance-1"): "1000+0x60 2000+100x120"},
        64,
        "instance-1 has been started again 4 times within 15 minutes",
        _member("instance-1", "member", "service"),
        61,
    ),
    Case(
        "NoLeader",
        {("leads", "gmanager-0"): FELL},
        63,
        "no gManager leads; requests go on with what was known of room, nothing is planned",
    ),
    Case(
        "LeaderChangesOften",
        {("leader_changes", "gmanager-1"): "0+0x60 1+1x120"},
        120,
        "the leading gManager has changed 60 times within an hour",
    ),
    Case(
        "NoInstance",
        {("connected",): FELL},
        64,
        "no gateway is connected to any instance; all requests wait or are refused",
        {},
        62,
    ),
    Case(
        "GatewayCutOff",
        {("connected",): "2+0x60 1+0x120"},
        67,
        "gateway-0 is connected to 1 instances, fewer than there are",
        _member("gateway-0"),
        64,
    ),
    Case(
        "EngineStuck",
        {("step_seconds_count", FIRST): "0+600x60 36000+0x120"},
        66,
        "instance-0 has running requests and has ended no step for minutes",
        _member("instance-0", "member"),
        63,
    ),
    Case(
        "PoolsNearlyFull",
        {("pool_blocks", 'state="free"'): "40+0x60 2+0x120", ("pool_blocks", 'state="cached"'): "10+0x60 0+0x120"},
        72,
        "3.846% of the KV memory can be had",
        {},
        69,
    ),
    Case(
        "RequestsWaitForMemory",
        {("waiting", FIRST): "0+0x60 4+0x120"},
        77,
        "4 requests wait for KV memory, and some have for 15 minutes",
        {},
        74,
    ),
    Case(
        "PreemptionsRising",
        {("preemptions", 'reason="memory"', FIRST): "0+0x60 0+6x120"},
        72,
        "0.1 requests a second give up their KV for want of memory, twice as many as before",
        {},
        62,
    ),
    Case(
        "RecomputationHigh",
        {("recomputed",): "0+10x60 600+500x120"},
        90,
        "50% of what is computed had been computed before",
        {},
        74,
    ),
    Case(
        "RefusalsHigh",
        {("refusals", "QUEUE_FULL"): "0+0x60 0+9x120"},
        75,
        "10% of the requests are refused for reasons of the cluster",
        {},
        64,
    ),
    Case(
        "TimeToFirstTokenHigh",
        {("time_to_first_token", 'le="10"'): NONE},
        75,
        "one request in 20 waits longer than 1m 35s for its first token",
        {},
        9,
    ),
    Case(
        "InterTokenLatencyHigh",
        {("inter_token", 'le="1"'): NONE},
        75,
        "one token in 100 comes later than 4.96s after the one before",
        {},
        9,
    ),
    Case(
        "FailoversHigh", {("failovers",): "0+0x60 5+0x120"}, 62, "5 requests have lost their instance within 15 minutes"
    ),
    Case(
        "DataPlanePeerLost",
        {("discarded_steps", FIRST): ROSE},
        62,
        "instance-0 has lost a daemon that held blocks of its requests",
        _member("instance-0", "member"),
    ),
    Case(
        "DataPlanePeerSlow",
        {("remote_answer_seconds_sum", 'peer="kvdaemon-2"', FIRST): "0+2x60 120+20x120"},
        90,
        "kvdaemon-2 answers instance-0 within 20ms, much later than others do",
        {**_member("instance-0", "member"), "peer": "kvdaemon-2"},
        69,
    ),
    Case(
        "RemoteWaitHigh",
        {("step_part", 'part="remote_wait"', FIRST): "0+10x60 600+60x120"},
        110,
        "instance-0 spends 60% of its steps waiting for other daemons",
        {**_member("instance-0", "member"), "part": "remote_wait"},
        89,
    ),
    Case(
        "JournalBehind",
        {("journal_failures",): "0+0x60 0+10x120"},
        70,
        "gateway-0 cannot write its journal to Redis; requests go on without it",
        _member("gateway-0", "member"),
        63,
    ),
    Case(
        "JournalEntriesLost",
        {("journal_dropped",): "0+0x60 7+0x120"},
        62,
        "gateway-0 has given up 7 journal entries",
        _member("gateway-0", "member"),
    ),
    Case(
        "StepPredictionOff",
        {("step_prediction_error", 'instance_id="instance-1"'): "0.1+0x60 0.8+0x120"},
        92,
        "the predicted step times of instance-1 are wrong by 80%",
        {"instance_id": "instance-1"},
        89,
    ),
    Case(
        "MoveGainsMissed",
        {("move_measured_gain",): "9+0x60 1+0x120"},
        122,
        "moves of kind lend gain less than a quarter of what was predicted",
        {"kind": "lend"},
        119,
    ),
    Case(
        "MovesFail",
        {("moves_total", 'end="EXPIRED"'): "0+0x60 0+2x120"},
        100,
        "60 moves have ended early within half an hour, more than half of all",
        {},
        65,
    ),
    Case(
        "EtcdHasNoLeader",
        {("etcd_server_has_leader",): FELL},
        63,
        "etcd has no leader; running requests go on, but nothing can join the cluster",
        {},
        61,
        False,
    ),
    Case(
        "EtcdMemberAway",
        {("up{", "etcd-2"): FELL},
        72,
        "fewer than three etcd members answer; the loss of one more may stop etcd",
        {},
        69,
        False,
    ),
    Case(
        "EtcdSlowDisk",
        {("fsync", 'le="0.01"', "etcd-1"): NONE},
        75,
        "writes to etcd's disk take over half a second; leases may be lost although their holders are well",
        _member("etcd-1", "instance"),
        9,
        False,
    ),
)


def _series(told: dict[str, str]) -> list[dict[str, str]]:
    return [{"series": name, "values": values} for name, values in told.items()]


def _disturbed(case: Case) -> dict[str, str]:
    told = _healthy()
    for words, values in case.series.items():
        chosen = [name for name in told if all(word in name for word in words)]
        assert chosen, f"{case.alert}: no series has {words}"
        told.update(dict.fromkeys(chosen, values))
    return told


def _check(tmp_path: Path, series: dict[str, str], expected: list[dict[str, object]]) -> None:
    test = {"interval": "1m", "input_series": _series(series), "alert_rule_test": expected}
    document = {
        "rule_files": [str(path) for path in RULES],
        "evaluation_interval": "1m",
        "group_eval_order": sorted((group["name"] for group in GROUPS), key=lambda name: name != "recorded"),
        "tests": [test],
    }
    file = tmp_path / "alerts.test.yml"
    file.write_text(yaml.safe_dump(document))
    code, printed = promtool("test", "rules", str(file))
    assert code == 0, printed


def test_rules_are_valid() -> None:
    code, printed = promtool("check", "rules", *map(str, RULES))
    assert code == 0, printed
    assert printed.count("SUCCESS") == len(RULES)


def test_rules_are_of_declared_metrics() -> None:
    recorded = {rule["record"] for group in GROUPS for rule in group["rules"] if "record" in rule}
    declared = {spec.name for spec in metrics.ALL}
    for group in GROUPS:
        for rule in group["rules"]:
            own = set(re.findall(r"\binfinite_llm(?:_\w+|:[\w:]+)", rule["expr"]))
            ends = {name: re.sub(r"_(bucket|sum|count)$", "", name) for name in own}
            assert all(name in declared | recorded or end in declared for name, end in ends.items()), own


def test_nothing_fires_while_all_is_well(tmp_path: Path) -> None:
    minutes = (30, 90, MINUTES)
    expected: list[dict[str, object]] = [
        {"eval_time": f"{minute}m", "alertname": name, "exp_alerts": []} for name in ALERTS for minute in minutes
    ]
    _check(tmp_path, _healthy(), expected)


def test_every_alert_has_a_case() -> None:
    assert sorted(case.alert for case in CASES) == sorted(ALERTS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.alert)
def test_it_fires_when_it_should(case: Case, tmp_path: Path) -> None:
    rule = ALERTS[case.alert]
    labels = {**case.labels, **rule["labels"], **({"cluster": "c"} if case.cluster else {})}
    annotations = {"summary": case.summary, "runbook": f"docs/runbooks.md#{case.alert.lower()}"}
    fires = {"exp_labels": labels, "exp_annotations": annotations}
    expected: list[dict[str, object]] = [
        {"eval_time": f"{case.quiet_at}m", "alertname": case.alert, "exp_alerts": []},
        {"eval_time": f"{case.at}m", "alertname": case.alert, "exp_alerts": [fires]},
    ]
    _check(tmp_path, _disturbed(case), expected)
