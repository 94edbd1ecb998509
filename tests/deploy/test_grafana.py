"""The dashboards' JSON is what their code generates, says what it shows, and is where Grafana looks for it."""

from __future__ import annotations

import configparser
import json
from typing import Any

import pytest
import yaml
from manifests import Document, Pod, named, overlay, pods

from deploy.dashboards.generate import DIRECTORY, generated

JSON = {path.name: path.read_text() for path in sorted(DIRECTORY.glob("*.json"))}
APPLIED_LIMIT = 262_144  # bytes of annotations, in which kubectl apply keeps the whole object


def test_the_committed_json_is_what_the_code_generates() -> None:
    assert generated() == JSON, "run 'make dashboards' and commit the result"


@pytest.mark.parametrize("name", JSON)
def test_panels_say_what_they_show(name: str) -> None:
    dashboard = json.loads(JSON[name])
    assert dashboard["uid"] == f"infinite-llm-{name.removesuffix('.json')}"
    assert dashboard["description"]
    panels: list[dict[str, Any]] = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len(panels) > 8
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert len({panel["title"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["targets"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            assert target["legendFormat" if panel["type"] != "table" else "format"]
            assert "$cluster" in target["expr"] or target["expr"].startswith("count(ALERTS")


@pytest.mark.parametrize("name", JSON)
def test_panels_do_not_overlap(name: str) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(JSON[name])["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        taken |= cells


@pytest.fixture(scope="module")
def documents() -> tuple[Document, ...]:
    return overlay("production")


@pytest.fixture(scope="module")
def mounted(documents: tuple[Document, ...]) -> dict[str, str]:
    """The files that Grafana's container finds, by path."""
    (pod,) = [pod for pod in pods(documents) if pod.name == "grafana"]
    return _mounted(documents, pod)


def _mounted(documents: tuple[Document, ...], pod: Pod) -> dict[str, str]:
    found: dict[str, str] = {}
    paths = [mount["mountPath"] for mount in pod.containers[0]["volumeMounts"]]
    # In a read-only volume no directory can be made for another one.
    assert not [(one, other) for one in paths for other in paths if other.startswith(f"{one}/")]
    for mount in pod.containers[0]["volumeMounts"]:
        volume = next((volume for volume in pod.spec["volumes"] if volume["name"] == mount["name"]), {})
        if "configMap" in volume:
            data = named(documents, "ConfigMap", pod.namespace, volume["configMap"]["name"])["data"]
            items = volume["configMap"].get("items") or [{"key": key, "path": key} for key in data]
            found |= {f"{mount['mountPath']}/{item['path']}": data[item["key"]] for item in items}
    return found


def test_grafana_finds_every_dashboard(mounted: dict[str, str]) -> None:
    (provider,) = yaml.safe_load(mounted["/etc/grafana/provisioning/dashboards/dashboards.yaml"])["providers"]
    directory = provider["options"]["path"]
    shown = {path.rpartition("/")[2]: text for path, text in mounted.items() if path.startswith(f"{directory}/")}
    assert shown == JSON
    ini = configparser.ConfigParser()
    ini.read_string(mounted["/etc/grafana/grafana.ini"])
    assert ini["dashboards"]["default_home_dashboard_path"] in mounted


def test_grafana_asks_the_components_prometheus(documents: tuple[Document, ...], mounted: dict[str, str]) -> None:
    (source,) = yaml.safe_load(mounted["/etc/grafana/provisioning/datasources/datasources.yaml"])["datasources"]
    service = named(documents, "Service", "infinite-llm", "prometheus")
    (port,) = service["spec"]["ports"]
    assert source["url"] == f"http://prometheus.infinite-llm.svc:{port['port']}"
    (pod,) = [pod for pod in pods(documents) if pod.name == "prometheus"]
    every = yaml.safe_load(_mounted(documents, pod)["/etc/prometheus/prometheus.yml"])["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == every


def test_nobody_may_change_anything(mounted: dict[str, str]) -> None:
    ini = configparser.ConfigParser()
    ini.read_string(mounted["/etc/grafana/grafana.ini"])
    assert ini["auth.anonymous"]["org_role"] == "Viewer"
    assert ini["auth"]["disable_login_form"] == "true"
    assert ini["auth.basic"]["enabled"] == "false"
    assert ini["security"]["disable_initial_admin_creation"] == "true"


def test_config_maps_can_be_applied(documents: tuple[Document, ...]) -> None:
    for document in documents:
        if document["kind"] == "ConfigMap":
            assert len(json.dumps(document).encode()) < APPLIED_LIMIT, document["metadata"]["name"]
