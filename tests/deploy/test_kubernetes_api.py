"""The pods that a gManager sees and the deletion costs that it writes, against an API server that misbehaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import kubernetes.client
import kubernetes.config
import pytest
from api_server import NAMESPACE, ApiServer

from services.core.errors import ConfigError, UnavailableError
from services.core.placement import Heartbeat, KvDaemonReport, PoolStats
from services.gmanager.deletion_cost import MAX_WRITES, costs, due, keep_deletion_costs, write_costs
from services.gmanager.view import ClusterView
from services.runtime.kubernetes_api import DELETION_COST, Pods, PodState, connect_in_cluster, make_client
from services.runtime.membership import Member

SELECTOR = "app.kubernetes.io/name=kvdaemon"
DEADLINE_S = 30.0


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as running:
        yield running
        assert running.violations == []


@pytest.fixture
def pods(server: ApiServer) -> Iterator[Pods]:
    following = Pods(make_client(kubernetes.client.Configuration(host=server.url)), NAMESPACE, SELECTOR)
    yield following
    following.close()


def wait_until(check: Callable[[], bool], what: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not check():
        assert time.monotonic() < deadline, what()
        time.sleep(0.02)


def wait_for_pods(pods: Pods, *names: str) -> None:
    wait_until(lambda: set(pods.latest) == set(names), lambda: (set(pods.latest), names))


def test_pods_are_followed_through_whatever_the_server_does(server: ApiServer, pods: Pods) -> None:
    server.faults["list"] = [500, 429, "cut"]
    server.add("kv-0")
    server.add("other", **{"app.kubernetes.io/name": "instance"})
    pods.start()
    wait_for_pods(pods, "kv-0")
    assert server.requests["list"] == 4

    server.faults["watch"] = [500, "cut", 429, 503]
    server.wait_for("watch", 1)
    server.add("kv-1")  # the first watch saw it, or the cut one lost it and it is seen again
    wait_for_pods(pods, "kv-0", "kv-1")
    server.annotate("kv-0", {DELETION_COST: "17"})
    wait_until(lambda: pods.latest["kv-0"].deletion_cost == 17, lambda: pods.latest)
    server.delete("kv-1")
    wait_for_pods(pods, "kv-0")
    assert server.requests["list"] == 4, "a watch that breaks is resumed"


def test_a_dropped_watch_loses_no_event(server: ApiServer, pods: Pods) -> None:
    server.faults["watch"] = ["cut", "cut", "cut"]
    pods.start()
    for number in range(4):
        server.wait_for("watch", number + 1)
        server.add(f"kv-{number}")
        wait_for_pods(pods, *(f"kv-{n}" for n in range(number + 1)))
    assert server.requests["list"] == 1


@pytest.mark.parametrize("how", ["status", "event", "odd event"])
def test_a_version_that_is_too_old_leads_to_a_new_list(how: str, server: ApiServer, pods: Pods) -> None:
    server.add("kv-0")
    server.faults["watch"] = [{"status": 410, "event": "gone", "odd event": "odd"}[how]]
    pods.start()
    server.wait_for("watch", 1)
    server.add("kv-1")
    wait_for_pods(pods, "kv-0", "kv-1")
    server.wait_for("list", 2)
    server.delete("kv-0")
    wait_for_pods(pods, "kv-1")


def test_closing_ends_a_watch_that_has_nothing_to_say(server: ApiServer, pods: Pods) -> None:
    pods.start()
    server.wait_for("watch", 1)
    server.add("kv-0")
    wait_for_pods(pods, "kv-0")
    pods.close()
    pods._thread.join(DEADLINE_S)
    assert not pods._thread.is_alive()


def test_writes(server: ApiServer, pods: Pods) -> None:
    server.add("kv-0")
    pods.start()
    wait_for_pods(pods, "kv-0")
    pod = pods.latest["kv-0"]
    assert pods.set_deletion_cost(pod, 40) is True
    assert server.writes == [("kv-0", {DELETION_COST: "40"})]
    wait_until(lambda: pods.latest["kv-0"].deletion_cost == 40, lambda: pods.latest)

    for status in (429, 500, 503, "cut"):
        server.faults["patch"] = [status]
        with pytest.raises(UnavailableError, match="pod kv-0: deletion cost not written"):
            pods.set_deletion_cost(pod, 50)
    server.faults["patch"] = [409]
    assert pods.set_deletion_cost(pod, 50) is False
    server.add("kv-0")  # replaced
    assert pods.set_deletion_cost(pod, 50) is False
    server.delete("kv-0")
    assert pods.set_deletion_cost(pod, 50) is False
    assert len(server.writes) == 1


def pod_of(name: str, cost: int | None, ending: bool = False) -> PodState:
    return PodState(name, f"uid-{name}", cost, ending)


def test_what_is_due() -> None:
    pods = {pod.name: pod for pod in (pod_of("a", None), pod_of("b", 50), pod_of("c", 3), pod_of("d", 0, ending=True))}
    assert due(pods, {}) == []
    assert due(pods, {"a": 0, "b": 54, "c": 4, "d": 90, "gone": 1}) == [(pods["a"], 0)]
    # Off by five, or wrong about being empty; the worst first.
    assert due(pods, {"b": 45, "c": 0}) == [(pods["b"], 45), (pods["c"], 0)]
    assert due(pods, {"b": 55, "c": 90}) == [(pods["c"], 90), (pods["b"], 55)]
    many = {f"p{n:03}": pod_of(f"p{n:03}", 0) for n in range(MAX_WRITES + 10)}
    assert len(due(many, dict.fromkeys(many, 100))) == MAX_WRITES


def view_of(**stats: PoolStats | None) -> ClusterView:
    view = ClusterView()
    view.set_kvdaemons({name: Member("kvdaemon", name, f"{name}:1") for name in stats}, 0.0)
    for stream, (name, own) in enumerate(stats.items()):
        if own is not None:
            view.apply(stream, Heartbeat(f"kvdaemon/{name}", 0, True, KvDaemonReport(own)), 0.0)
    return view


def test_costs_are_what_requests_hold() -> None:
    view = view_of(
        empty=PoolStats(1000, 10, 100, 100),
        cached=PoolStats(1000, 10, 100, 20, cached=80),
        one=PoolStats(10000, 10, 1000, 999, in_use=1),
        half=PoolStats(1000, 10, 100, 40, cached=10, in_use=45, reserved=5),
        full=PoolStats(1000, 10, 100, in_use=100),
        unformatted=PoolStats(1000),
        silent=None,
    )
    expected = {"empty": 0, "cached": 0, "one": 1, "half": 50, "full": 100, "unformatted": 0}
    assert costs(view.kvdaemons(0.0)) == expected


def test_a_round_goes_on_past_one_pod_and_ends_when_the_server_is_away(server: ApiServer, pods: Pods) -> None:
    for name in ("a", "b", "c"):
        server.add(name)
    pods.start()
    wait_for_pods(pods, "a", "b", "c")
    writes = [(pod, 30) for pod in pods.latest.values()]
    server.faults["patch"] = [409]
    asyncio.run(write_costs(pods, writes))
    assert [name for name, _ in server.writes] == ["b", "c"]
    server.faults["patch"] = [429]
    asyncio.run(write_costs(pods, writes))
    assert server.requests["patch"] == 4


def test_the_leader_keeps_the_costs_and_a_standby_does_not(server: ApiServer, pods: Pods) -> None:
    for name in ("kv-0", "kv-1"):
        server.add(name)
    leads = False
    view = view_of(**{"kv-0": PoolStats(1000, 10, 100, 100), "kv-1": PoolStats(1000, 10, 100, 25, in_use=75)})

    async def scenario() -> None:
        nonlocal leads
        task = asyncio.create_task(keep_deletion_costs(pods, 0.05, view, lambda: leads))
        await asyncio.to_thread(wait_for_pods, pods, "kv-0", "kv-1")
        await asyncio.sleep(0.3)  # some rounds
        assert server.requests["patch"] == 0
        server.faults["patch"] = [500, 409]
        leads = True
        wanted = {"kv-0": 0, "kv-1": 75}

        def written() -> bool:
            return {name: pod.deletion_cost for name, pod in pods.latest.items()} == wanted

        await asyncio.to_thread(wait_until, written, lambda: pods.latest)
        settled = server.requests["patch"]
        await asyncio.sleep(0.3)
        assert server.requests["patch"] == settled, "what is right is not written again"
        view.apply(9, Heartbeat("kvdaemon/kv-1", 0, True, KvDaemonReport(PoolStats(1000, 10, 100, 100))), 0.0)
        wanted["kv-1"] = 0
        await asyncio.to_thread(wait_until, written, lambda: pods.latest)
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(scenario())


def test_in_a_pod_the_service_account_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = kubernetes.config.incluster_config
    token, authority = tmp_path / "token", tmp_path / "ca.crt"
    monkeypatch.setattr(loader, "SERVICE_TOKEN_FILENAME", str(token))
    monkeypatch.setattr(loader, "SERVICE_CERT_FILENAME", str(authority))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match=r"kubernetes: .* service account's token"):
        connect_in_cluster()
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    token.write_text("first")
    with pytest.raises(ConfigError, match="kubernetes: "):
        connect_in_cluster()
    authority.write_text("some PEM")
    configuration = connect_in_cluster().configuration
    assert configuration.host == "https://127.0.0.1:443"
    assert configuration.ssl_ca_cert == str(authority)
    assert [entry["value"] for entry in configuration.auth_settings().values()] == ["bearer first"]
    assert configuration.retries is False
