"""Choosing sizes of tiles by measuring, and keeping them in a file. No GPU: what measures is handed in."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing here is interpreted", allow_module_level=True)

from kernels.triton.tiling import Gpu, Kind, Shape, Tiling, candidates, decode_rows, default, fits
from kernels.triton.tune import tune
from kernels.triton.tuning import CACHE_VARIABLE, TilingCache, cache_directory, choose

H200 = Gpu("NVIDIA H200", (9, 0), 132, 227 * 1024)
A100 = Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 163 * 1024)
SMALL = Gpu("NVIDIA L4", (8, 9), 58, 99 * 1024)
DECODE = Shape(Kind.DECODE, "bfloat16", 2, 128, 4, 64)
PREFILL = Shape(Kind.PREFILL, "bfloat16", 2, 128, 4, 64)
FILE = "triton-tilings.json"


@pytest.mark.parametrize("gpu", [H200, A100, SMALL])
@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("head_dim", [20, 64, 128, 256])
@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4)])
def test_defaults_fit_everywhere(gpu: Gpu, kind: Kind, head_dim: int, dtype: str, size: int) -> None:
    for group, block_tokens in ((1, 16), (8, 64), (71, 128)):
        shape = Shape(kind, dtype, size, head_dim, group, block_tokens)
        tiling = default(gpu, shape)
        assert fits(gpu, shape, tiling)
        assert tiling.tile_keys <= block_tokens
        if kind is Kind.DECODE:
            assert tiling.tile_rows == decode_rows(group)
        tried = candidates(gpu, shape)
        assert tried[0] == tiling
        assert len(set(tried)) == len(tried)


def test_the_fastest_is_chosen_and_what_cannot_be_launched_is_passed_over() -> None:
    tried: list[Tiling] = []

    def measure(tiling: Tiling) -> float:
        tried.append(tiling)
        if tiling.num_warps == 8:
            raise RuntimeError("out of resource: shared memory")
        return 1.0 if tiling.num_stages == 4 and tiling.programs == 16 else 2.0 + tiling.num_warps / tiling.num_stages

    chosen = choose(H200, DECODE, measure)
    assert chosen is not None
    assert (chosen.num_stages, chosen.programs) == (4, 16)
    assert any(tiling.num_warps == 8 for tiling in tried)

    def refuse(tiling: Tiling) -> float:
        raise RuntimeError("no")

    assert choose(H200, PREFILL, refuse) is None


def test_what_was_tuned_is_found_by_the_next_process(tmp_path: Path) -> None:
    best, other = Tiling(16, 32, 2, 4, 8), Tiling(128, 64, 8, 2, 4, 128)
    first, second = TilingCache(tmp_path / "new"), TilingCache(tmp_path / "new")
    assert second.tiling(H200, PREFILL) == default(H200, PREFILL)
    first.keep(H200, DECODE, best)
    second.keep(H200, PREFILL, other)  # has not seen what the first wrote
    third = TilingCache(tmp_path / "new")
    assert third.tiling(H200, DECODE) == best
    assert third.tiling(H200, PREFILL) == other
    assert third.tiling(A100, DECODE) == default(A100, DECODE)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [FILE]


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[]",
        '{"version": 0, "gpus": {}}',
        '{"version": 1}',
        '{"version": 1, "gpus": {"NVIDIA H200": {"x": {"tile_rows": 16}}}}',
        '{"version": 1, "gpus": {"NVIDIA H200": {"x": 3}}}',
        "bytes",
    ],
)
def test_a_file_of_another_make_is_ignored(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FILE).write_bytes(b"\xff\xfe" if content == "bytes" else content.encode())
    cache = TilingCache(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert cache.tiling(H200, DECODE) == default(H200, DECODE)
    assert str(tmp_path / FILE) in caplog.text
    cache.keep(H200, DECODE, Tiling(16, 32, 2, 4, 8))
    assert TilingCache(tmp_path).tiling(H200, DECODE) == Tiling(16, 32, 2, 4, 8)


@pytest.mark.parametrize("wrong", [{"tile_keys": 48}, {"num_warps": 0}, {"num_stages": -1}, {"programs": "4"}])
def test_sizes_that_no_kernel_has_are_ignored(
    tmp_path: Path, wrong: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    TilingCache(tmp_path).keep(H200, DECODE, Tiling(16, 32, 2, 4, 8))
    found = json.loads((tmp_path / FILE).read_text())
    found["gpus"][H200.name][DECODE.key].update(wrong)
    (tmp_path / FILE).write_text(json.dumps(found))
    with caplog.at_level(logging.WARNING):
        assert TilingCache(tmp_path).tiling(H200, DECODE) == default(H200, DECODE)
    assert "ignored" in caplog.text


def test_a_place_that_cannot_be_written_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    cache = TilingCache(tmp_path / "file" / "directory")
    with caplog.at_level(logging.WARNING):
        cache.keep(H200, DECODE, Tiling(16, 32, 2, 4, 8))
    assert cache.tiling(H200, DECODE) == Tiling(16, 32, 2, 4, 8)
    assert "not kept" in caplog.text


def test_the_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_directory() == Path("/xdg/infinite-llm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_directory() == Path("/home/somebody/.cache/infinite-llm")
    monkeypatch.setenv(CACHE_VARIABLE, "/chosen")
    assert cache_directory() == Path("/chosen")


def test_each_shape_is_measured_once(tmp_path: Path) -> None:
    pool = torch.zeros(4, 1, 2, 2, 64, 64, dtype=torch.bfloat16)
    measured: list[tuple[int, Kind]] = []

    def measurement(pool: torch.Tensor, q_heads: int, kind: Kind):
        measured.append((q_heads, kind))
        return lambda tiling: float(tiling.num_warps)

    first = tune(pool, 8, TilingCache(tmp_path), measurement=measurement)
    assert measured == [(8, Kind.DECODE), (8, Kind.PREFILL)]
    assert first[Kind.DECODE].num_warps == 2
    assert tune(pool, 8, TilingCache(tmp_path), measurement=measurement) == first
    assert len(measured) == 2
    tune(pool, 2, TilingCache(tmp_path), kinds=[Kind.DECODE], measurement=measurement)
    tune(pool, 8, TilingCache(tmp_path), kinds=[Kind.PREFILL], again=True, measurement=measurement)
    assert measured[2:] == [(2, Kind.DECODE), (8, Kind.PREFILL)]
