"""docs/operations.md: its figures follow from its formulas, and what it names exists."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import yaml
from manifests import K8S, ROOT

from services.core.blocks import PoolGeometry
from services.runtime import metrics

PAGE = (ROOT / "docs" / "operations.md").read_text()
POOL_BYTES = 65536 << 20
NOT_ALERTS = {
    "NetworkPolicy",
    "NetworkPolicies",
    "OOMKilled",
}  # written like alerts, and none


def rows(first: str) -> list[list[str]]:
    """The cells of the table whose header begins with ``first``."""
    lines = PAGE.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(f"| {first} |"))
    table = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table


def test_the_sizing_table() -> None:
    table = rows("model")
    assert len(table) >= 5
    for _, *cells in table:
        layers, heads, head_dim, kib, tokens, for_1m, for_10m = (int(cell.replace(",", "")) for cell in cells)
        geometry = PoolGeometry(layers, heads, 64, head_dim, "bfloat16")
        assert kib * 1024 * 64 == geometry.block_bytes
        assert tokens == POOL_BYTES // geometry.block_bytes * 64
        assert [for_1m, for_10m] == [math.ceil(wanted / tokens) for wanted in (1_000_000, 10_000_000)]


def test_the_table_of_metrics() -> None:
    """It is what services/runtime/metrics.py declares, in the same order."""
    every = {"gateway", "gmanager", "instance", "kvdaemon"}
    assert rows("metric") == [
        [
            f"`{spec.name}`",
            spec.kind,
            ", ".join(spec.labels),
            "every process" if set(spec.services) == every else ", ".join(spec.services),
            spec.help,
        ]
        for spec in metrics.ALL
    ]
    named = set(re.findall(r"infinite_llm_\w+", PAGE))
    assert named == {spec.name for spec in metrics.ALL}


def test_overlays_and_components_are_all_there() -> None:
    overlays = {re.sub(r"\[(.*?)\].*", r"\1", row[0]) for row in rows("overlay")}
    assert overlays == {path.name for path in (K8S / "overlays").iterdir()}
    named = {name for row in rows("component") for name in re.findall(r"`([\w/-]+)`", row[0])}
    there = {str(path.parent.relative_to(K8S / "components")) for path in K8S.glob("components/**/kustomization.yaml")}
    assert named == there - {"rdma/common"}


@pytest.mark.parametrize("page", ["operations.md", "runbooks.md"])
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / "docs" / page
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", path.read_text()):
        there = path.parent / target if target else path
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), f"{target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """What a page's sections are linked by."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_alert_has_its_runbook() -> None:
    """Its section says what the alert means, what to look at and what to do; and no section is of no alert."""
    sections: dict[str, str] = {}
    for section in (ROOT / "docs" / "runbooks.md").read_text().split("\n## ")[1:]:
        heading, _, text = section.partition("\n")
        sections[heading] = text
    alerts = []
    for file in sorted((K8S / "components" / "monitoring" / "config").glob("*.rules.yml")):
        for group in yaml.safe_load(file.read_text())["groups"]:
            for rule in group["rules"]:
                if "alert" in rule:
                    alerts.append(rule["alert"])
                    assert rule["annotations"]["runbook"] == f"docs/runbooks.md#{rule['alert'].lower()}"
                    assert rule["annotations"]["summary"]
                    assert rule["labels"]["severity"] in ("critical", "warning")
    assert sorted(alerts) == sorted(sections)
    for heading, text in sections.items():
        assert [part for part in ("*Means*:", "*Look*:", "*Do*:") if part in text] == ["*Means*:", "*Look*:", "*Do*:"]
        for other in re.findall(r"\b[A-Z][a-z]+(?:[A-Z][a-z]+)+\b", text):
            assert other in sections or other in NOT_ALERTS, f"{heading} names {other}"
