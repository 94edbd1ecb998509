"""Every overlay: it renders, every document is what its schema says, and whatever it refers to exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from manifests import K8S, OVERLAYS, Document, Pod, mib, named, of_kind, overlay, pods, with_component

KUBERNETES = ("1.32", "1.37")  # the oldest and the newest that must take the manifests
CHOSEN_BY_NONE = ("rdma/aws-efa", "rdma/nvidia-sriov", "external-state", "huge-pages")  # of the overlays
RESOURCES = json.loads((Path(__file__).parent / "schemas" / "cert-manager.io_v1.json").read_text())


def validate(document: Document, version: str) -> None:
    if document["apiVersion"] == "cert-manager.io/v1":
        jsonschema.validate(document, RESOURCES[document["kind"]])
    else:  # an unknown kind raises: what would be a warning on the command line is a failure here
        kubernetes_validate.validate(document, version, strict=True)


@pytest.fixture(params=OVERLAYS)
def documents(request: pytest.FixtureRequest) -> tuple[Document, ...]:
    return overlay(request.param)


@pytest.mark.parametrize("version", KUBERNETES)
def test_every_document_is_valid(documents: tuple[Document, ...], version: str) -> None:
    assert len(documents) > 20
    for document in documents:
        validate(document, version)
    ids = [(d["kind"], d["metadata"].get("namespace"), d["metadata"]["name"]) for d in documents]
    assert len(set(ids)) == len(ids)


def test_validation_finds_what_is_wrong(documents: tuple[Document, ...]) -> None:
    workload = json.loads(json.dumps(pods(documents)[0].workload))
    workload["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(workload, KUBERNETES[-1])
    with pytest.raises(kubernetes_validate.SchemaNotFoundError):
        validate({"apiVersion": "example.com/v1", "kind": "Unknown"}, KUBERNETES[-1])
    certificate = next((d for d in documents if d["kind"] == "Certificate"), None)
    if certificate is not None:
        with pytest.raises(jsonschema.ValidationError):
            validate({**certificate, "spec": {**certificate["spec"], "dnsName": "x"}}, KUBERNETES[-1])


def test_every_object_is_in_a_namespace_that_exists(documents: tuple[Document, ...]) -> None:
    namespaces = {document["metadata"]["name"] for document in of_kind(documents, "Namespace")}
    for document in documents:
        namespace = document["metadata"].get("namespace")
        if document["kind"] not in ("Namespace", "ClusterIssuer"):
            # The authority's own secret lies where cert-manager looks for it.
            assert namespace in namespaces | {"cert-manager"}, document["metadata"]
            assert namespace != "cert-manager" or document["spec"]["isCA"]


def test_pods_refer_to_what_exists(documents: tuple[Document, ...]) -> None:
    for pod in pods(documents):
        assert pod.labels.items() >= pod.workload["spec"]["selector"]["matchLabels"].items()
        named(documents, "ServiceAccount", pod.namespace, pod.spec["serviceAccountName"])
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", ())}
        claims = pod.workload["spec"].get("volumeClaimTemplates", ())
        volumes |= {claim["metadata"]["name"]: {} for claim in claims}
        for volume in volumes.values():
            _check_volume(documents, pod, volume)
        used = set()
        for container in pod.all_containers:
            paths = [mount["mountPath"] for mount in container["volumeMounts"]]
            assert len(set(paths)) == len(paths)
            used |= {mount["name"] for mount in container["volumeMounts"]}
            _check_probes(container)
        assert used == set(volumes), f"{pod.name}: volumes {set(volumes)}, mounts {used}"
        if pod.workload["kind"] == "StatefulSet":
            service = named(documents, "Service", pod.namespace, pod.workload["spec"]["serviceName"])
            assert pod.labels.items() >= service["spec"]["selector"].items()
        for spread in pod.spec.get("topologySpreadConstraints", ()):
            assert pod.labels.items() >= spread["labelSelector"]["matchLabels"].items()


def _check_volume(documents: tuple[Document, ...], pod: Pod, volume: Document) -> None:
    for source in (volume, *volume.get("projected", {}).get("sources", ())):
        if "configMap" in source:
            named(documents, "ConfigMap", pod.namespace, source["configMap"]["name"])
        if "secret" in source:
            secrets = {
                document["spec"]["secretName"]
                for document in of_kind(documents, "Certificate")
                if document["metadata"]["namespace"] == pod.namespace
            }
            assert source["secret"]["secretName"] in secrets
        if "persistentVolumeClaim" in source:
            claim = source["persistentVolumeClaim"]["claimName"]
            named(documents, "PersistentVolumeClaim", pod.namespace, claim)


def _check_probes(container: Document) -> None:
    ports = {port["name"]: port["containerPort"] for port in container.get("ports", ())}
    probes = [container[kind] for kind in ("startupProbe", "livenessProbe", "readinessProbe") if kind in container]
    for probe in probes:
        (handler,) = [probe[kind] for kind in ("grpc", "httpGet", "tcpSocket", "exec") if kind in probe]
        assert "command" in handler or handler["port"] in ports or handler["port"] in ports.values()


def test_services_and_budgets_select_pods_and_their_ports(documents: tuple[Document, ...]) -> None:
    for service in of_kind(documents, "Service"):
        chosen = _chosen(documents, service, service["spec"]["selector"])
        for port in service["spec"]["ports"]:
            for pod in chosen:
                names = [p["name"] for container in pod.containers for p in container.get("ports", ())]
                assert names.count(port["targetPort"]) == 1
    budgets = of_kind(documents, "PodDisruptionBudget")
    for budget in budgets:
        _chosen(documents, budget, budget["spec"]["selector"]["matchLabels"])
    covered = {(budget["metadata"]["namespace"], budget["metadata"]["name"]) for budget in budgets}
    assert {pod.name for pod in pods(documents)} - {name for _, name in covered} <= {"prometheus", "grafana"}


def _chosen(documents: tuple[Document, ...], document: Document, selector: dict[str, str]) -> list[Pod]:
    namespace = document["metadata"]["namespace"]
    chosen = [pod for pod in pods(documents) if pod.namespace == namespace and pod.labels.items() >= selector.items()]
    assert chosen, f"{document['kind']} {document['metadata']['name']} selects no pod"
    return chosen


def test_roles_are_bound_to_accounts_that_exist_and_allow_little(documents: tuple[Document, ...]) -> None:
    for binding in of_kind(documents, "RoleBinding"):
        named(documents, "Role", binding["metadata"]["namespace"], binding["roleRef"]["name"])
        for subject in binding["subjects"]:
            named(documents, "ServiceAccount", subject["namespace"], subject["name"])
    assert not of_kind(documents, "ClusterRole", "ClusterRoleBinding")
    for role in of_kind(documents, "Role"):
        for rule in role["rules"]:
            assert "*" not in (*rule["verbs"], *rule["resources"], *rule["apiGroups"])
            assert set(rule["resources"]) == {"pods"}
            assert not {"create", "delete", "update", "deletecollection"} & set(rule["verbs"])
    bound = {subject["name"] for b in of_kind(documents, "RoleBinding") for subject in b["subjects"]}
    for pod in pods(documents):  # nobody has a token who has no use for it
        assert pod.spec["automountServiceAccountToken"] is (pod.spec["serviceAccountName"] in bound)


def test_probes_mean_different_things(documents: tuple[Document, ...]) -> None:
    for pod in pods(documents):
        for container in pod.containers:
            start, live, ready = (container[f"{kind}Probe"] for kind in ("startup", "liveness", "readiness"))
            if "grpc" in live:
                assert [probe["grpc"]["service"] for probe in (start, live, ready)] == ["live", "live", "ready"]
            patience = {kind: _patience_s(container[f"{kind}Probe"]) for kind in ("startup", "liveness")}
            assert patience["startup"] > patience["liveness"] or "grpc" not in live
            if container["name"] == "instance":
                assert patience["startup"] >= 1800


def _patience_s(probe: Document) -> int:
    return int(probe.get("failureThreshold", 3)) * int(probe.get("periodSeconds", 10))


def test_nobody_may_do_more_than_needed(documents: tuple[Document, ...]) -> None:
    """The rules of Pod Security's restricted level, and a read-only root file system."""
    levels = {
        namespace["metadata"]["name"]: namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
        for namespace in of_kind(documents, "Namespace")
    }
    assert levels["infinite-llm"] == "restricted"
    for pod in pods(documents):
        context = pod.spec["securityContext"]
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.spec.keys()
        assert not any("hostPath" in volume for volume in pod.spec.get("volumes", ()))
        rdma = levels[pod.namespace] == "privileged"
        if not rdma:
            assert levels[pod.namespace] == "restricted"
            assert context["runAsNonRoot"] is True
            assert context["runAsUser"] > 0
        for container in pod.all_containers:
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False
            assert own["readOnlyRootFilesystem"] is True
            assert own["capabilities"]["drop"] == ["ALL"]
            locks_memory = rdma and container in pod.containers
            assert own["capabilities"].get("add", []) == (["IPC_LOCK"] if locks_memory else [])
            assert "privileged" not in own


def test_images_are_pinned_and_resources_named(documents: tuple[Document, ...]) -> None:
    for pod in pods(documents):
        for container in pod.all_containers:
            assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*", container["image"]), container["image"]
            requests, limits = container["resources"]["requests"], container["resources"]["limits"]
            assert mib(requests["memory"]) <= mib(limits["memory"])
            assert "cpu" in requests
    etcd = next(pod for pod in pods(documents) if pod.name == "etcd")
    version = tuple(map(int, etcd.containers[0]["image"].partition(":v")[2].split(".")))
    assert version >= (3, 5, 21)
    assert etcd.workload["spec"]["replicas"] == 3


@pytest.mark.parametrize("component", [*CHOSEN_BY_NONE, "tls", "elastic"])
def test_components_fit_the_smallest_overlay(component: str, tmp_path: Path) -> None:
    """Those that no overlay chooses, and those that might be added to any."""
    documents = with_component("laptop", component, tmp_path)
    for document in documents:
        validate(document, KUBERNETES[-1])
    names = {pod.name for pod in pods(documents)}
    assert ("etcd" in names) is (component != "external-state")
    test_pods_refer_to_what_exists(documents)
    test_services_and_budgets_select_pods_and_their_ports(documents)
    test_nobody_may_do_more_than_needed(documents)


def test_every_component_is_rendered_by_some_test() -> None:
    components = {path.parent for path in (K8S / "components").rglob("kustomization.yaml")}
    used: set[Path] = set()
    todo = [K8S / "overlays" / name for name in OVERLAYS]
    todo += [K8S / "components" / name for name in CHOSEN_BY_NONE]
    while todo:
        directory = todo.pop()
        used.add(directory)
        chosen = yaml.safe_load((directory / "kustomization.yaml").read_text()).get("components", ())
        todo += [(directory / name).resolve() for name in chosen]
    assert components <= used
