"""load_config: what becomes of a YAML file, and how it is refused."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from services.core.errors import ConfigError
from services.runtime.config import load_config
from services.runtime.logs import JsonFormatter


@dataclass(frozen=True)
class Tls:
    ca: Path
    verify: bool = True


@dataclass(frozen=True)
class Example:
    name: str
    endpoints: tuple[str, ...]
    retries: int = 3
    interval_s: float = 0.5
    transport: Literal["shm", "tcp"] = "shm"
    limit: int | None = None
    tls: Tls | None = None
    peers: tuple[Tls, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.retries < 0:
            raise ConfigError(f"retries must not be negative, got {self.retries}")


def load(tmp_path: Path, text: str) -> Example:
    path = tmp_path / "example.yaml"
    path.write_text(text)
    return load_config(Example, path)


def test_every_kind_of_field(tmp_path: Path) -> None:
    assert load(tmp_path, "{name: a, endpoints: [x, y]}") == Example("a", ("x", "y"))
    full = """
name: b
endpoints: []
retries: 0
interval_s: 2
transport: tcp
limit: 7
tls: {ca: /ca.pem, verify: false}
peers: [{ca: a}, {ca: b}]
"""
    wanted = Example("b", (), 0, 2.0, "tcp", 7, Tls(Path("/ca.pem"), False), (Tls(Path("a")), Tls(Path("b"))))
    got = load(tmp_path, full)
    assert got == wanted
    assert isinstance(got.interval_s, float)
    assert load(tmp_path, "{name: a, endpoints: [], limit: null}").limit is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{name: a, endpoints: [], retires: 2}", r"unknown key retires; known keys are endpoints"),
        ("{name: a}", r"key endpoints is missing"),
        ("", r"key name is missing"),
        ("{name: 5, endpoints: []}", r"name must be a string, got 5 \(int\)"),
        ("{name: a, endpoints: x}", r"endpoints must be a list"),
        ("{name: a, endpoints: [x, 1]}", r"endpoints\[1\] must be a string"),
        ("{name: a, endpoints: [], retries: true}", r"retries must be an integer, got True"),
        ("{name: a, endpoints: [], retries: 1.5}", r"retries must be an integer"),
        ("{name: a, endpoints: [], retries: null}", r"retries must be an integer, got nothing"),
        ("{name: a, endpoints: [], retries: -1}", r"retries must not be negative"),
        ("{name: a, endpoints: [], transport: rdma}", r"transport must be one of 'shm', 'tcp', got 'rdma'"),
        ("{name: a, endpoints: [], tls: {verify: true}}", r"key tls.ca is missing"),
        ("{name: a, endpoints: [], tls: yes}", r"tls must be a mapping"),
        ("{name: a, endpoints: [], peers: [{ca: a, x: 1}]}", r"unknown key peers\[0\].x"),
        ("[1, 2]", r"the file must be a mapping"),
        ("{name: ", r"is not a YAML file"),
    ],
)
def test_refusals_name_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"example\.yaml: .*{message}"):
        load(tmp_path, text)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        load_config(Example, tmp_path / "none.yaml")


def test_a_directory_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "10-base.yaml").write_text("{name: a, endpoints: [x, y], tls: {ca: a, verify: false}}")
    (tmp_path / "20-site.yaml").write_text("{endpoints: [z], tls: {ca: b}}")
    (tmp_path / "30-empty.yaml").write_text("# nothing\n")
    (tmp_path / "notes.txt").write_text("{retries: 9}")
    assert load_config(Example, tmp_path) == Example("a", ("z",), tls=Tls(Path("b")))
    (tmp_path / "40-odd.yaml").write_text("[1]")
    with pytest.raises(ConfigError, match=r"40-odd\.yaml: the file must be a mapping"):
        load_config(Example, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty: no \*\.yaml file"):
        load_config(Example, tmp_path / "empty")


def test_identity_comes_from_the_environment_and_nothing_else_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POD_NAME", "kv-0")
    monkeypatch.setenv("POD_IP", "10.0.0.7")
    monkeypatch.delenv("NODE_NAME", raising=False)
    text = 'name: "${POD_NAME}"\nendpoints: ["${POD_IP}:70", "$POD_IP"]\ntls: {ca: "/etc/${POD_NAME}.pem"}\n'
    assert load(tmp_path, text) == Example("kv-0", ("10.0.0.7:70", "$POD_IP"), tls=Tls(Path("/etc/kv-0.pem")))
    with pytest.raises(ConfigError, match=r"name: \$\{HOME\} is not one of the variables POD_NAME"):
        load(tmp_path, 'name: "${HOME}"\nendpoints: []\n')
    with pytest.raises(ConfigError, match=r"tls\.ca: the environment variable NODE_NAME is not set"):
        load(tmp_path, 'name: a\nendpoints: []\ntls: {ca: "${NODE_NAME}"}\n')


def test_log_lines_are_json() -> None:
    formatter = JsonFormatter("instance", "instance-0")
    record = logging.getLogger("x").makeRecord("x", logging.INFO, "f", 1, "hello %s", ("you",), None)
    record.request_id = "r1"
    line = json.loads(formatter.format(record))
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "INFO",
        "service": "instance",
        "member": "instance-0",
        "logger": "x",
        "message": "hello you",
        "request_id": "r1",
    }
