"""What the launcher would start, and what it refuses before it starts anything."""

from __future__ import annotations

import dataclasses
import json
import re
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from infinitellm import (
    BlockPlacement,
    ClusterStatus,
    GManagerStatus,
    InstanceStatus,
    KvDaemonStatus,
    PeerTransport,
    PoolUse,
    RequestStatus,
)
from services.core.errors import ConfigError
from services.launcher.checkpoint_info import CheckpointInfo, inspect_checkpoint
from services.launcher.cli import main
from services.launcher.console import table
from services.launcher.demo import DemoOptions, plan_demo
from services.launcher.options import ClusterOptions
from services.launcher.plan import ProcessSpec, Surroundings, make_plan
from services.launcher.run_directory import RunDirectory
from services.launcher.status import status_text
from services.launcher.top import top_text

AROUND = Surroundings(
    python="/venv/python",
    etcd_binary=Path("/bin/etcd"),
    redis_binary=Path("/bin/redis-server"),
    etcd_port=1001,
    etcd_peer_port=1002,
    redis_port=1003,
    http_port=8000,
    grpc_port=50051,
    configs=Path("/run/config"),
    data=Path("/run/data"),
    sockets=Path("/run/sockets"),
    cpus=2,
)
CHECKPOINT = CheckpointInfo(Path("/models/m"), "m", True, layers=4, kv_heads=2, head_dim=128)


def plan(**options: object) -> dict[str, ProcessSpec]:
    specs = make_plan(ClusterOptions(model=Path("/models/m"), **options), CHECKPOINT, AROUND)
    assert len({spec.name for spec in specs}) == len(specs)
    return {spec.name: spec for spec in specs}


def test_the_default_cluster() -> None:
    specs = plan()
    assert list(specs) == [
        "etcd",
        "redis",
        "gmanager-0",
        "kvdaemon-0",
        "kvdaemon-1",
        "kvdaemon-mem-0",
        "kvdaemon-mem-1",
        "instance-0",
        "instance-1",
        "gateway-0",
    ]
    assert not specs["etcd"].restart
    assert not specs["redis"].restart
    assert all(spec.restart for name, spec in specs.items() if name not in ("etcd", "redis"))
    assert specs["kvdaemon-mem-1"].argv == (
        "/venv/python",
        "-m",
        "services.kvdaemon",
        "--config",
        "/run/config/kvdaemon-mem-1.yaml",
    )
    assert specs["kvdaemon-mem-1"].config == {
        "cluster": "local",
        "etcd": ["127.0.0.1:1001"],
        "member_id": "kvdaemon-mem-1",
        "listen": "127.0.0.1:0",
        "pool_mib": 64,
        "device": "cpu",
        "transports": ["auto"],
        "link": None,
        "socket_dir": "/run/sockets",
        "num_threads": 1,
        "metrics_listen": "127.0.0.1:0",
    }
    assert specs["instance-1"].config == {
        "cluster": "local",
        "etcd": ["127.0.0.1:1001"],
        "member_id": "instance-1",
        "listen": "127.0.0.1:0",
        "model": "/models/m",
        "dtype": "bfloat16",
        "device": "cpu",
        "local_kvdaemon_id": "kvdaemon-1",
        "transport": "auto",
        "link": None,
        "socket_dir": "/run/sockets",
        "max_model_len": None,
        "num_threads": 1,
        "tensor_parallel": 1,
        "metrics_listen": "127.0.0.1:0",
    }
    assert specs["gateway-0"].config == {
        "cluster": "local",
        "etcd": ["127.0.0.1:1001"],
        "member_id": "gateway-0",
        "http_listen": "127.0.0.1:8000",
        "grpc_listen": "127.0.0.1:50051",
        "redis_url": "redis://127.0.0.1:1003/0",
        "model": "/models/m",
        "ready_instances": 2,
        "ready_kvdaemons": 4,
    }


def test_threads_share_the_processors() -> None:
    specs = make_plan(
        ClusterOptions(model=Path("m"), instances=1, kvdaemons=1), CHECKPOINT, dataclasses.replace(AROUND, cpus=16)
    )
    threads = {spec.name: spec.config["num_threads"] for spec in specs if spec.config and "num_threads" in spec.config}
    assert threads == {"kvdaemon-0": 5, "kvdaemon-mem-0": 5, "instance-0": 5}


def test_each_instance_has_its_degree() -> None:
    around = dataclasses.replace(AROUND, cpus=20)

    def instances(*degrees: int) -> list[tuple[object, object]]:
        options = ClusterOptions(model=Path("m"), instances=2, kvdaemons=0, tensor_parallel=degrees)
        configs = [spec.config for spec in make_plan(options, CHECKPOINT, around) if spec.kind == "instance"]
        return [(config["tensor_parallel"], config["num_threads"]) for config in configs if config]

    assert instances(4) == [(4, 2), (4, 2)]
    assert instances(1, 2) == [(1, 4), (2, 4)]
    for degrees in ((1, 2, 3), (), (0,)):
        with pytest.raises(ConfigError, match="--tensor-parallel must be"):
            instances(*degrees)


def test_several_gmanagers_stand_for_election() -> None:
    specs = plan(gmanagers=3)
    names = [name for name in specs if name.startswith("gmanager")]
    assert names == ["gmanager-0", "gmanager-1", "gmanager-2"]
    assert specs["gmanager-2"].config == {
        "cluster": "local",
        "etcd": ["127.0.0.1:1001"],
        "member_id": "gmanager-2",
        "listen": "127.0.0.1:0",
        "metrics_listen": "127.0.0.1:0",
    }


def test_a_gpu_and_daemons_that_lend_host_memory_to_it() -> None:
    specs = plan(device="cuda")
    assert [specs[name].config["device"] for name in ("kvdaemon-0", "kvdaemon-mem-0", "instance-0")] == ["cuda"] * 3
    specs = plan(device="cuda:1", memory_device="cpu")
    wanted = {"kvdaemon-1": "cuda:1", "kvdaemon-mem-1": "cpu", "instance-1": "cuda:1"}
    assert {name: specs[name].config["device"] for name in wanted} == wanted


def test_overlay_adds_keys_to_every_service_of_a_kind() -> None:
    specs = plan(overlay={"instance": {"max_num_seqs": 8, "num_threads": 3}})
    for name in ("instance-0", "instance-1"):
        assert specs[name].config["max_num_seqs"] == 8
        assert specs[name].config["num_threads"] == 3
    assert "max_num_seqs" not in specs["kvdaemon-0"].config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlay": {"instances": {}}}, "unknown service instances"),
        ({"overlay": {"instance": {"member_id": "x"}}}, r"instance\.member_id is set by the launcher"),
        ({"overlay": {"instance": {"block_tokens": 32768}}}, "--pool-mib 64 is smaller than one rBlock"),
        ({"overlay": {"instance": {"block_tokens": "many"}}}, "block_tokens must be an integer"),
        ({"gmanagers": 0}, "--gmanagers must be at least 1"),
        ({"instances": 0}, "--instances must be at least 1"),
        ({"kvdaemons": -1}, "--kvdaemons must be at least 0"),
        ({"pool_mib": 0}, "--pool-mib must be at least 1"),
        ({"http_port": 70000}, "--http-port must be at most 65535"),
        ({"http_port": 9, "grpc_port": 9}, "must differ"),
        ({"link": "25gbit"}, "25gbit,50us"),
        ({"device": "gpu"}, "device 'gpu': wanted is cpu, cuda, cuda:N"),
        ({"memory_device": "cuda:first"}, "device 'cuda:first'"),
        ({"overlay": {"instance": {"device": "cuda"}}}, r"instance\.device is set by the launcher"),
    ],
)
def test_impossible_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(**options)


def write_checkpoint(directory: Path, **config: object) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").touch()
    return directory


def test_checkpoints(tmp_path: Path) -> None:
    small = write_checkpoint(tmp_path / "small", num_hidden_layers=2, num_attention_heads=8, hidden_size=256)
    info = inspect_checkpoint(small)
    assert (info.name, info.has_tokenizer) == ("small", False)
    geometry = info.geometry(64, "float32")
    assert geometry is not None
    assert (geometry.layers, geometry.kv_heads, geometry.head_dim) == (2, 8, 32)
    nested = write_checkpoint(tmp_path / "nested", text_config={"num_hidden_layers": 3})
    assert inspect_checkpoint(nested).layers == 3
    assert inspect_checkpoint(nested).geometry(64, "float32") is None
    for broken, message in (
        (tmp_path / "missing", "there is no such directory"),
        (tmp_path, "has no config.json"),
    ):
        with pytest.raises(ConfigError, match=message):
            inspect_checkpoint(broken)
    (small / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        inspect_checkpoint(small)
    (small / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no \*\.safetensors"):
        inspect_checkpoint(small)


def test_commands_fail_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_checkpoint(
        tmp_path / "m", num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, hidden_size=8192
    )
    run_dir = tmp_path / "run"
    up = ["up", "--run-dir", str(run_dir), "--http-port", "0", "--grpc-port", "0"]
    assert main([*up, "--model", str(tmp_path)]) == 2
    assert "has no config.json" in capsys.readouterr().err
    assert main([*up, "--model", str(model), "--pool-mib", "8"]) == 2
    assert "--pool-mib 8 is smaller than one rBlock of this model (20.0 MiB" in capsys.readouterr().err
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("instance: 5")
    assert main([*up, "--model", str(model), "--config", str(overlay)]) == 2
    assert "instance must be a mapping" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main([*up[:-2], "--grpc-port", str(port), "--model", str(model)]) == 2
        assert f"--grpc-port {port}: the port is taken" in capsys.readouterr().err
    assert not run_dir.exists()
    assert main(["status", "--grpc-port", "1"]) == 1
    assert "infinite-llm status:" in capsys.readouterr().err


def test_every_command_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("up", "status", "top", "generate", "demo", "new-key", "doctor"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert f"example: infinite-llm {command}" in " ".join(capsys.readouterr().out.split())


def test_the_doctor_says_what_is_wrong(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["doctor", "--http-port", "0", "--grpc-port", "0"]) == 0
    healthy = capsys.readouterr().out
    for subject in ("Python", "torch", "CPU kernels", "etcd", "redis-server", "memory", "--http-port"):
        assert re.search(rf"^{subject} +(ok|slow) ", healthy, re.MULTILINE), healthy
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("PATH", "")
        monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
        assert main(["doctor", "--http-port", str(port), "--grpc-port", "0"]) == 1
    sick = capsys.readouterr().out
    assert f"--http-port {port}: the port is taken" in sick
    assert re.search(r"^etcd +FAILS +etcd is not on PATH; install it", sick, re.MULTILINE), sick


def test_the_demonstration_needs_several_pools(tmp_path: Path) -> None:
    model = write_checkpoint(
        tmp_path / "m", num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=128, hidden_size=256
    )
    options = plan_demo(DemoOptions(), model)
    kv_bytes = DemoOptions().tokens * 4 * 2 * 2 * 128 * 2
    assert DemoOptions().tokens >= 48_000
    assert kv_bytes >= 4 * (options.pool_mib << 20)
    assert (options.pool_mib << 20) * options.kvdaemons >= kv_bytes
    with pytest.raises(ConfigError, match="too short"):
        plan_demo(DemoOptions(tokens=1000), model)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose path leaves room for sockets' names."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as path:
        yield Path(path)


def test_run_directories(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path = short_path
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    first, second = RunDirectory.create(None), RunDirectory.create(None)
    assert first.path != second.path
    first.close(keep=True)
    assert first.logs.is_dir()
    third = RunDirectory.create(None)  # clears away what no launcher holds any more
    assert not first.path.exists()
    assert second.path.exists()
    for run in (second, third):
        run.close(keep=False)
        assert not run.path.exists()

    wanted = tmp_path / "mine"
    run = RunDirectory.create(wanted)
    (run.logs / "x.log").touch()
    with pytest.raises(ConfigError, match="used by another launcher"):
        RunDirectory.create(wanted)
    run.close(keep=False)
    assert (wanted / "logs/x.log").exists()
    run = RunDirectory.create(wanted)
    assert not (wanted / "logs/x.log").exists()
    run.close(keep=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    with pytest.raises(ConfigError, match="not empty"):
        RunDirectory.create(tmp_path / "other")
    with pytest.raises(ConfigError, match="too long"):
        RunDirectory.create(tmp_path / ("x" * 90))


def test_status_shows_who_leads() -> None:
    gmanagers = (GManagerStatus("g-0", "127.0.0.1:1", False), GManagerStatus("g-1", "127.0.0.1:2", True))
    lines = status_text(ClusterStatus((), (), (), ("m",), gmanagers)).splitlines()
    assert [line.split(maxsplit=2) for line in lines if line.startswith("g-")] == [
        ["g-0", "127.0.0.1:1", "stands by"],
        ["g-1", "127.0.0.1:2", "leads"],
    ]


def test_status_shows_how_daemons_are_reached() -> None:
    alone = InstanceStatus("i-0", "127.0.0.1:1", "kv-0", 0, 0, 0.1)
    assert "no instance is connected to another's daemon" in status_text(ClusterStatus((alone,), (), (), ("m",), ()))
    peers = (PeerTransport("kv-1", "shm"), PeerTransport("kv-2", "rdma"))
    lines = status_text(ClusterStatus((dataclasses.replace(alone, transports=peers),), (), (), ("m",), ())).splitlines()
    header = next(number for number, line in enumerate(lines) if "REACHES" in line)
    rows = [line.split() for line in lines[header + 1 : header + 3]]
    assert rows == [["i-0", "kv-1", "shm"], ["i-0", "kv-2", "rdma"]]


def test_top_shows_pools_and_who_lends_to_whom() -> None:
    daemons = (
        KvDaemonStatus("kv-b", "127.0.0.1:1", 100, 1, PoolUse(100, 0, 40, 10, 0, 50), 0.1),
        KvDaemonStatus("kv-a", "127.0.0.1:2", 100, 1, PoolUse(100, 99, 0, 0, 1, 0), 0.1),
    )
    instances = (InstanceStatus("i-0", "127.0.0.1:3", "kv-b", 2, 1, 0.1),)
    requests = tuple(
        RequestStatus(name, "i-0", (BlockPlacement("kv-b", 50, True), BlockPlacement("kv-a", blocks, False)))
        for name, blocks in (("r", 3), ("s", 4))
    )
    text = top_text(ClusterStatus(instances, daemons, requests, ("m",), ()))
    lines = [line.split() for line in text.splitlines()]
    assert text.startswith("2 requests run, 1 wait; 61 of 200 rBlocks are taken")
    assert "[" + "#" * 15 + "w" * 3 + "." * 12 + "]" in text
    assert ["kv-a", "[=", "]", "1%", "100"] in lines, "the smallest part shows"
    assert ["kv-a", "i-0", "7"] in lines
    assert "nobody borrows" in top_text(ClusterStatus(instances, daemons, (), ("m",), ()))


def test_tables() -> None:
    assert table(("NAME", "N"), [("a", "5"), ("bcdef", "12")]) == "NAME    N\na       5\nbcdef  12"
    assert table(("NAME", "N"), []) == "NAME  N"
