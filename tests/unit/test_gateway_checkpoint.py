"""What is read from a checkpoint's JSON files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.core.errors import ConfigError
from services.gateway.checkpoint import load_checkpoint
from services.gateway.config import GatewayConfig
from services.runtime.config import parse_config

CONFIG = {"vocab_size": 10, "max_position_embeddings": 100, "eos_token_id": 3}


def write(directory: Path, **files: object) -> Path:
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize(
    ("config", "generation", "eos"),
    [
        (CONFIG, None, (3,)),
        (CONFIG, {"eos_token_id": [4, 5]}, (4, 5)),
        (CONFIG, {"eos_token_id": 0}, (0,)),
        (CONFIG, {}, (3,)),
        (CONFIG | {"eos_token_id": None}, None, ()),
        ({"text_config": CONFIG, "eos_token_id": 9}, None, (3,)),
    ],
)
def test_the_end_tokens(tmp_path: Path, config: object, generation: object, eos: tuple[int, ...]) -> None:
    files = {"config": config} | ({} if generation is None else {"generation_config": generation})
    checkpoint = load_checkpoint(write(tmp_path, **files), None, None)
    assert checkpoint.eos_ids == eos
    assert (checkpoint.vocab_size, checkpoint.max_model_len, checkpoint.name) == (10, 100, tmp_path.name)


@pytest.mark.parametrize(
    ("tokenizer", "bos"),
    [
        ({"bos_token": "<s>", "add_bos_token": True}, "<s>"),
        ({"bos_token": {"content": "<s>"}, "add_bos_token": True}, "<s>"),
        ({"bos_token": "<s>"}, ""),
        ({"bos_token": None, "add_bos_token": True}, ""),
    ],
)
def test_the_begin_token(tmp_path: Path, tokenizer: object, bos: str) -> None:
    directory = write(tmp_path, config=CONFIG, tokenizer_config=tokenizer)
    assert load_checkpoint(directory, "name", 50).bos_token == bos


def test_the_other_name_of_the_limit(tmp_path: Path) -> None:
    config = {"vocab_size": 10, "n_positions": 100}
    assert load_checkpoint(write(tmp_path, config=config), None, None).max_model_len == 100


def test_limits_and_names(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(write(tmp_path, config=CONFIG), "name", 50)
    assert (checkpoint.name, checkpoint.max_model_len) == ("name", 50)
    with pytest.raises(ConfigError, match="max_model_len"):
        load_checkpoint(tmp_path, None, 101)


@pytest.mark.parametrize("config", [{}, [], CONFIG | {"vocab_size": "10"}, CONFIG | {"max_position_embeddings": 0}])
def test_refusals_name_the_file(tmp_path: Path, config: object) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_checkpoint(write(tmp_path, config=config), None, None)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_checkpoint(tmp_path / "nowhere", None, None)


@pytest.mark.parametrize(
    ("key", "value"), [("etcd", []), ("max_queue", 0), ("stream_timeout_s", 0), ("ready_instances", -1), ("typo", 1)]
)
def test_the_gateways_own_configuration(key: str, value: object) -> None:
    keys = {"cluster": "c", "member_id": "g", "http_listen": "a", "grpc_listen": "b", "etcd": ["e"], "model": "m"}
    parse_config(GatewayConfig, keys)
    with pytest.raises(ConfigError, match=key):
        parse_config(GatewayConfig, {**keys, key: value})
