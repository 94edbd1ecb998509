"""Dockerfiles, read as far as tests need them: stages, what they copy from where to where, how they start."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "deploy" / "docker"


@dataclass
class Stage:
    """One FROM, with everything it inherits from the stage it is built on.

    Attributes:
        base: image or stage that it is built on.
        copies: sources, destination and the stage they come from ("" for the build context), in order.
    """

    name: str
    base: str
    copies: list[tuple[tuple[str, ...], str, str]] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    entrypoint: tuple[str, ...] = ()
    user: str = ""
    stop_signal: str = ""
    workdir: str = "/"


def read_dockerfile(path: Path) -> dict[str, Stage]:
    """The stages by name; the last one without a name is called "final"."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE))
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    stage = Stage("", "")
    for line in filter(None, (line.strip() for line in text.splitlines())):
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if word == "ARG":
            name, _, value = rest.partition("=")
            arguments[name] = value
        elif word == "FROM":
            base, _, name = rest.partition(" AS ")
            base = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], base)
            parent = stages.get(base)
            stage = Stage(name or "final", base)
            if parent is not None:
                stage = Stage(
                    *(stage.name, parent.base, list(parent.copies), dict(parent.environment)),
                    *(parent.entrypoint, parent.user, parent.stop_signal, parent.workdir),
                )
            stages[stage.name] = stage
        elif word == "COPY":
            words = rest.split()
            source = words.pop(0).removeprefix("--from=") if words[0].startswith("--from=") else ""
            destination = words[-1] if words[-1].startswith("/") else f"{stage.workdir.rstrip('/')}/{words[-1]}"
            stage.copies.append((tuple(words[:-1]), destination, source))
        elif word == "ENV":
            stage.environment.update(re.findall(r"(\w+)=(\S+)", rest))
        elif word == "WORKDIR":
            stage.workdir = rest
        elif word == "USER":
            stage.user = rest
        elif word == "STOPSIGNAL":
            stage.stop_signal = rest
        elif word == "ENTRYPOINT":
            stage.entrypoint = tuple(json.loads(rest))
        else:
            assert word == "RUN", f"{path.name}: {word} is not understood here"
    return stages


def lay_out(stage: Stage, target: Path) -> None:
    """Puts what a stage copies from the build context under ``target``, as the image would have it."""
    for sources, destination, source_stage in stage.copies:
        if source_stage:
            continue
        for source in sources:
            place = target / destination.lstrip("/")
            if (ROOT / source).is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "*.so")
                shutil.copytree(ROOT / source, place, ignore=ignored, dirs_exist_ok=True)
            else:
                if destination.endswith(("/", ".")):
                    place = place / Path(source).name
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, place)
