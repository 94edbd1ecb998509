"""The manifests as kubectl renders them, and what tests want to know of them."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
K8S = ROOT / "deploy" / "k8s"
OVERLAYS = tuple(sorted(path.name for path in (K8S / "overlays").iterdir()))
OLDEST_KUSTOMIZE = (5, 0)  # components that merge into generated ConfigMaps

Document = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """A pod template and the workload it belongs to."""

    workload: Document

    @property
    def name(self) -> str:
        return str(self.workload["metadata"]["name"])

    @property
    def namespace(self) -> str:
        return str(self.workload["metadata"]["namespace"])

    @property
    def labels(self) -> dict[str, str]:
        labels: dict[str, str] = self.workload["spec"]["template"]["metadata"]["labels"]
        return labels

    @property
    def spec(self) -> Document:
        spec: Document = self.workload["spec"]["template"]["spec"]
        return spec

    @property
    def containers(self) -> list[Document]:
        return [*self.spec["containers"]]

    @property
    def all_containers(self) -> list[Document]:
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]


@functools.cache
def kustomize(directory: Path) -> tuple[Document, ...]:
    """All documents of a kustomization. Skips the test where kubectl is missing or too old."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not on PATH")
    version = yaml.safe_load(
        subprocess.run(
            [kubectl, "version", "--client", "-o", "yaml"], capture_output=True, check=True, timeout=60
        ).stdout
    ).get("kustomizeVersion", "v0.0.0")
    if tuple(int(part) for part in version.removeprefix("v").split(".")[:2]) < OLDEST_KUSTOMIZE:
        pytest.skip(f"kubectl's kustomize is {version}; 5.0 or newer is needed")
    rendered = subprocess.run([kubectl, "kustomize", str(directory)], capture_output=True, text=True, timeout=120)
    assert rendered.returncode == 0, rendered.stderr
    assert not rendered.stderr, rendered.stderr  # deprecations
    return tuple(yaml.safe_load_all(rendered.stdout))


def overlay(name: str) -> tuple[Document, ...]:
    return kustomize(K8S / "overlays" / name)


def with_component(name: str, component: str, directory: Path) -> tuple[Document, ...]:
    """An overlay with one component more. ``directory`` is empty and the test's own."""
    up = "../" * len(directory.resolve().parts[1:])
    kustomization = {
        "resources": [f"{up}{K8S / 'overlays' / name}".replace("//", "/")],
        "components": [f"{up}{K8S / 'components' / component}".replace("//", "/")],
    }
    (directory / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return kustomize(directory.resolve())


def of_kind(documents: tuple[Document, ...], *kinds: str) -> list[Document]:
    return [document for document in documents if document["kind"] in kinds]


def pods(documents: tuple[Document, ...]) -> list[Pod]:
    return [Pod(document) for document in of_kind(documents, "Deployment", "StatefulSet")]


def named(documents: tuple[Document, ...], kind: str, namespace: str, name: str) -> Document:
    found = [
        document
        for document in of_kind(documents, kind)
        if document["metadata"]["name"] == name and document["metadata"].get("namespace") == namespace
    ]
    assert len(found) == 1, f"{len(found)} documents are {kind} {namespace}/{name}"
    return found[0]


def config_files(documents: tuple[Document, ...], pod: Pod, container: Document) -> dict[str, str]:
    """The files that the container finds in its configuration directory, by name."""
    mounted = [mount for mount in container["volumeMounts"] if mount["mountPath"] == "/etc/infinite-llm/config"]
    assert len(mounted) == 1, f"{pod.name}/{container['name']} mounts {len(mounted)} configurations"
    volume = next(volume for volume in pod.spec["volumes"] if volume["name"] == mounted[0]["name"])
    files: dict[str, str] = {}
    for source in volume["projected"]["sources"]:
        data = named(documents, "ConfigMap", pod.namespace, source["configMap"]["name"])["data"]
        assert not files.keys() & data.keys(), f"{pod.name}: {files.keys() & data.keys()} come from two ConfigMaps"
        files.update(data)
    return files


def mib(quantity: str) -> int:
    for suffix, factor in (("Gi", 1024), ("Mi", 1)):
        if quantity.endswith(suffix):
            return int(quantity.removesuffix(suffix)) * factor
    raise AssertionError(f"{quantity} is neither Mi nor Gi")


def cores(quantity: str) -> float:
    return int(quantity.removesuffix("m")) / 1000 if quantity.endswith("m") else float(quantity)


def strings(value: object) -> Iterator[str]:
    """Every text in a document."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from strings(key)
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif isinstance(value, str):
        yield value
