"""Which connection the NetworkPolicies let through: those that the services make, and no other."""

from __future__ import annotations

import pytest
from manifests import OVERLAYS, Document, Pod, of_kind, overlay, pods

WORKERS = ("instance", "kvdaemon")
# Who connects to whom, port by port; "" stands for clients from anywhere.
CONNECTIONS = {
    ("", "gateway", 8000),
    ("", "gateway", 50051),
    ("gateway", "gmanager", 7000),
    ("instance", "gmanager", 7000),
    ("kvdaemon", "gmanager", 7000),
    ("gateway", "instance", 7100),
    ("gmanager", "instance", 7100),
    *((here, there, port) for here in WORKERS for there in WORKERS for port in (7200, 7300, 7301)),
    ("gateway", "redis", 6379),
    ("etcd", "etcd", 2379),
    ("etcd", "etcd", 2380),
    *((name, "etcd", 2379) for name in ("gateway", "gmanager", "instance", "kvdaemon")),
}
SCRAPED = {("gmanager", 8083), ("instance", 8083), ("instance", 8084), ("kvdaemon", 8084), ("etcd", 2381)}
MONITORING = {
    ("", "prometheus", 9090),
    ("", "grafana", 3000),
    ("grafana", "prometheus", 9090),  # likewise as from anywhere
    ("prometheus", "gateway", 8000),  # as from anywhere; named as its egress must let it through
    *(("prometheus", target, port) for target, port in SCRAPED),
    *((name, "otel-collector", 4317) for name in ("gateway", "gmanager", "instance", "kvdaemon")),
}


def policies(documents: tuple[Document, ...], pod: Pod, direction: str) -> list[Document]:
    return [
        policy
        for policy in of_kind(documents, "NetworkPolicy")
        if policy["metadata"]["namespace"] == pod.namespace
        and direction in policy["spec"]["policyTypes"]
        and pod.labels.items() >= policy["spec"]["podSelector"].get("matchLabels", {}).items()
    ]


def allowed(documents: tuple[Document, ...], here: Pod, direction: str, there: Pod | None, port: int) -> bool:
    """As Kubernetes says it: a pod that no policy selects is open; otherwise one rule of any of them must fit."""
    selecting = policies(documents, here, direction)
    key = "from" if direction == "Ingress" else "to"
    rules = [rule for policy in selecting for rule in policy["spec"].get(direction.lower(), ())]
    return not selecting or any(
        ("ports" not in rule or port in [entry["port"] for entry in rule["ports"]])
        and (key not in rule or any(_is_peer(peer, here, there) for peer in rule[key]))
        for rule in rules
    )


def _is_peer(peer: Document, here: Pod, there: Pod | None) -> bool:
    if there is None:
        return False
    if "namespaceSelector" in peer:
        in_namespace = peer["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": there.namespace}
    else:
        in_namespace = here.namespace == there.namespace
    return in_namespace and there.labels.items() >= peer.get("podSelector", {}).get("matchLabels", {}).items()


@pytest.mark.parametrize("name", OVERLAYS)
def test_what_is_needed_is_let_through_and_nothing_else(name: str) -> None:
    documents = overlay(name)
    by_name = {pod.name: pod for pod in pods(documents)}
    wanted = CONNECTIONS | (MONITORING if "prometheus" in by_name else set())
    ports = {
        (pod.name, port["containerPort"])
        for pod in by_name.values()
        for container in pod.containers
        for port in container["ports"]
        if not port["name"].endswith("health")  # probes come from the node
    }
    assert {(target, port) for _, target, port in wanted} | SCRAPED == ports
    open_ = {
        (source.name if source else "", target.name, port)
        for target_name, port in ports
        for target in [by_name[target_name]]
        for source in (None, *by_name.values())
        if allowed(documents, target, "Ingress", source, port)
        and (source is None or allowed(documents, source, "Egress", target, port))
    }
    assert open_ == wanted


def test_names_are_resolved_from_every_pod() -> None:
    for name in OVERLAYS:
        documents = overlay(name)
        dns = Pod(
            {
                "metadata": {"name": "dns", "namespace": "kube-system"},
                "spec": {"template": {"metadata": {"labels": {}}}},
            }
        )
        for pod in pods(documents):
            assert allowed(documents, pod, "Egress", dns, 53)
            assert not allowed(documents, pod, "Egress", dns, 80)
