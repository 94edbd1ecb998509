"""A real Prometheus watches a real cluster at work: all that dashboards and alerts ask for is there.

It runs before the tests that kill what is watched: pytest takes files by name.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from metrics_rig import DEADLINE_S, Run
from prometheus_process import CONFIG, PrometheusProcess
from test_serving import prompt_of

from services.runtime import metrics

pytestmark = pytest.mark.cluster

DASHBOARDS = sorted((CONFIG.parent / "dashboards").glob("*.json"))
# What a person would have chosen.
VARIABLES = {"$__rate_interval": "1m", "$cluster": "infinite-llm", "$instance": "instance-0|instance-1"}
# A healthy cluster may have nothing to say of these.
RIGHTLY_EMPTY = {
    metrics.MOVES.name: "nothing has to move with one instance",
    metrics.MOVED_BLOCKS.name: "likewise",
    metrics.PREDICTED_GAIN.name: "no move's gain has been measured",
    metrics.MEASURED_GAIN.name: "likewise",
    metrics.STEP_PREDICTION_ERROR.name: "the gManager predicts after it has learned for a while",
}
# Conditions that may hold here for a moment; their alerts fire after minutes.
RIGHTLY_TRUE = {
    "EtcdMemberAway": "the launcher runs one etcd",
    "RequestsWaitForMemory": "a request may wait until the one before has given back its blocks",
    "PoolsNearlyFull": "the pools hold one request",
    "ProcessDown": "a busy machine may not answer within the second that a scrape has here",
    "InterTokenLatencyHigh": "a busy machine",
    "RemoteWaitHigh": "a small model's local attention hides little",
    "StepPredictionOff": "the gManager has only begun to learn",
}


class Load:
    """Requests that borrow blocks, one after the other, from ``start`` until ``stop``."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._requests)
        self.failure: BaseException | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(60)
        assert not self._thread.is_alive()
        assert self.failure is None

    def _requests(self) -> None:
        try:
            seed = 60
            while not self._ended.is_set():
                seed += 1
                self._run.cluster.complete(prompt_of(600, seed=seed), max_tokens=300, ignore_eos=True)
        except BaseException as failure:
            self.failure = failure


@pytest.fixture(scope="module")
def watched(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrometheusProcess]:
    """A Prometheus that has evaluated all rules, while requests run."""
    prometheus, load = PrometheusProcess(tmp_path_factory.mktemp("prometheus"), run.cluster), Load(run)
    load.start()
    try:
        prometheus.start()
        deadline = time.monotonic() + DEADLINE_S
        while not prometheus.query("infinite_llm:step_part:ratio_rate5m > 0"):
            assert time.monotonic() < deadline, prometheus.log()
            time.sleep(0.2)
        yield prometheus
    finally:
        load.stop()
        prometheus.stop()


def expressions(dashboard: dict[str, object]) -> Iterator[tuple[str, str]]:
    """Every panel's title, and an expression of it with the variables' values in it."""
    for panel in dashboard["panels"]:  # type: ignore[attr-defined]
        for target in panel.get("targets", ()):
            expr = target["expr"]
            for name, value in VARIABLES.items():
                expr = expr.replace(name, value)
            assert "$" not in expr, expr
            yield panel["title"], expr


def may_be_empty(expr: str) -> bool:
    return any(re.search(rf"\b{name}\b", expr) for name in RIGHTLY_EMPTY)


def without_data(prometheus: PrometheusProcess, asked: dict[str, str]) -> dict[str, str]:
    """Those expressions, by what they belong to, that give no number at all; each has some time to get one."""
    deadline, waiting = time.monotonic() + DEADLINE_S / 2, dict(asked)
    while True:
        for name, expr in list(waiting.items()):
            if any(not math.isnan(value) for _, value in prometheus.query(expr)):
                del waiting[name]
        if time.monotonic() > deadline or all(may_be_empty(expr) for expr in waiting.values()):
            return waiting
        time.sleep(0.2)


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_panel_has_data(path: Path, watched: PrometheusProcess) -> None:
    asked = {f"{title} / {index}": e for index, (title, e) in enumerate(expressions(json.loads(path.read_text())))}
    assert len(asked) > 8
    empty = without_data(watched, asked)
    assert not {name: expr for name, expr in empty.items() if not may_be_empty(expr)}


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_variable_has_values(path: Path, watched: PrometheusProcess) -> None:
    variables = [v for v in json.loads(path.read_text())["templating"]["list"] if v["type"] == "query"]
    assert "cluster" in {variable["name"] for variable in variables}
    for variable in variables:
        words = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
        assert words is not None
        series, label = words[1].replace("$cluster", "infinite-llm"), words[2]
        assert all(labels[label] for labels, _ in watched.query(f"count by ({label}) ({series})"))
        assert watched.query(series)


def test_prometheus_takes_every_rule(watched: PrometheusProcess) -> None:
    rules = watched.rules()
    assert len(rules) > 30
    assert not {rule["name"]: rule.get("lastError") for rule in rules if rule["health"] != "ok"}


def compared(expr: str) -> str:
    """With comparisons that answer 0 or 1 instead of dropping series: there is an answer if there is data."""
    outside = re.split(r"(\{[^}]*\})", expr)  # matchers of labels have signs of their own
    outside[::2] = [re.sub(r"(==|!=|>=|<=|>|<)", r"\1 bool", part) for part in outside[::2]]
    return "".join(outside)


def test_every_alert_has_data_and_none_fires(watched: PrometheusProcess) -> None:
    alerts = {rule["name"]: rule["query"] for rule in watched.rules() if rule["type"] == "alerting"}
    empty = without_data(watched, {name: compared(expr) for name, expr in alerts.items()})
    assert not {name: expr for name, expr in empty.items() if not may_be_empty(expr)}
    true = {name for name, expr in alerts.items() if watched.query(expr)}
    assert true <= set(RIGHTLY_TRUE)
    assert not {rule["name"] for rule in watched.rules() if rule.get("state") == "firing"}


def test_recorded_rules_say_something_sensible(watched: PrometheusProcess) -> None:
    recorded = {rule["name"] for rule in watched.rules() if rule["type"] == "recording"}
    assert not without_data(watched, {name: name for name in recorded})
    for name in (name for name in recorded if ":ratio" in name):
        for labels, value in watched.query(name):
            assert math.isnan(value) or -1e-9 <= value <= 1 + 1e-9, (name, labels, value)
    shares: dict[str, float] = {}
    for labels, value in watched.query("infinite_llm:step_part:ratio_rate5m"):
        assert labels["cluster"] == "infinite-llm"
        shares[labels["member"]] = shares.get(labels["member"], 0.0) + value
    assert shares == {"instance-0": pytest.approx(1)}
