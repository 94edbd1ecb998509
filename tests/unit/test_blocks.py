import pytest

from services.core import errors as errors_module
from services.core.blocks import BlockKeySpace, PoolGeometry, block_keys, next_block_key
from services.core.errors import ConfigError, InfiniteLLMError, all_errors

SPACE = BlockKeySpace("model", "bfloat16", (0, 8))


def test_keys_are_chained():
    tokens = list(range(200))
    keys = block_keys(SPACE, tokens, 64)
    assert len(keys) == 3
    assert keys[0] == next_block_key(SPACE.root(), tokens[:64])
    assert keys[2] == next_block_key(keys[1], tokens[128:192])
    changed = block_keys(SPACE, [99, *tokens[1:]], 64)
    assert not set(keys) & set(changed), "a token at the beginning changes every key after it"


@pytest.mark.parametrize(
    "other",
    [
        BlockKeySpace("model2", "bfloat16", (0, 8)),
        BlockKeySpace("model", "float32", (0, 8)),
        BlockKeySpace("model", "bfloat16", (0, 4)),
        BlockKeySpace("model", "bfloat16", (0, 8), rotary="long"),
        BlockKeySpace("model", "bfloat16", (0, 8), salt=b"tenant"),
    ],
)
def test_spaces_share_no_keys(other: BlockKeySpace):
    assert block_keys(SPACE, list(range(64)), 64) != block_keys(other, list(range(64)), 64)


def test_geometry():
    geometry = PoolGeometry(4, 2, 64, 128, "bfloat16")
    assert geometry.block_bytes == 4 * 2 * 2 * 64 * 128 * 2
    assert [geometry.blocks_for(tokens) for tokens in (0, 1, 64, 65)] == [0, 1, 1, 2]
    with pytest.raises(ConfigError, match="kv_heads"):
        PoolGeometry(4, 0, 64, 128, "bfloat16")
    with pytest.raises(ConfigError, match="int3"):
        PoolGeometry(4, 2, 64, 128, "int3")


def test_every_error_has_a_reason_of_its_own():
    errors = all_errors()
    assert errors["INTERNAL"] is InfiniteLLMError
    assert all(cls.reason == reason for reason, cls in errors.items())
    tree = {cls for cls in vars(errors_module).values() if isinstance(cls, type)}
    assert tree == {cls for cls in errors.values() if cls.__module__ == errors_module.__name__}
