"""What the GPU's benchmark would put where, on GPUs that this machine does not have."""

from __future__ import annotations

import pytest

from benchmarks.checkpoints import SHAPES
from benchmarks.gpu_plan import LENDERS, deal, fit, geometry_of, pool_blocks, weight_bytes, with_layers
from services.core.errors import ConfigError

SHAPE = SHAPES["llama-3-8b"]
H200_MIB, A100_MIB = 141_000, 80_000


def test_the_model_is_a_llama_3_8b() -> None:
    assert weight_bytes(SHAPE) == pytest.approx(2 * 8.03e9, rel=0.01)
    assert geometry_of(SHAPE).block_bytes == 64 * 128 * 1024  # 128 KiB of KV a token
    assert with_layers(SHAPE, 3).make_config().num_hidden_layers == 3


def test_a_long_context_leaves_room_for_fewer_layers() -> None:
    assert fit(SHAPE, H200_MIB, 131_072, 4096, False).layers == 32
    assert fit(SHAPE, H200_MIB, 524_288, 4096, True).layers == 32
    million = fit(SHAPE, H200_MIB, 1_048_576, 4096, False)
    assert 24 <= million.layers < 32
    assert fit(SHAPE, A100_MIB, 1_048_576, 4096, False).layers < million.layers
    with pytest.raises(ConfigError, match="holds no layer"):
        fit(SHAPE, 3000, 131_072, 4096, False)


@pytest.mark.parametrize("spread", [False, True])
def test_pools_hold_their_part(spread: bool) -> None:
    planned = fit(SHAPE, H200_MIB, 524_288, 4096, spread)
    geometry = geometry_of(with_layers(SHAPE, planned.layers))
    assert planned.daemons == (4 if spread else 1)
    blocks = (planned.pool_mib << 20) // geometry.block_bytes
    assert blocks >= pool_blocks(geometry, 524_288, 4096, spread)
    assert blocks - 8192 // planned.daemons > 2 * 64  # two chunks


def test_every_beginning_of_a_context_is_dealt_out_alike() -> None:
    keys = [bytes([number]) for number in range(40)]
    whole = deal(keys, 0, True)
    assert list(whole) == ["kvdaemon-0", *LENDERS]
    assert [len(part) for part in whole.values()] == [10, 10, 10, 10]
    begun = deal(keys[:8], 0, True)
    rest = deal(keys, 8, True)
    assert {name: begun[name] + rest[name] for name in whole} == whole
    assert [len(part) for part in begun.values()] == [2, 2, 2, 2]
    assert deal(keys, 30, False) == {"kvdaemon-0": keys[30:]}
