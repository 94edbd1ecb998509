"""Whatever a configuration says, it is taken or refused with the key that is wrong; it never fails in another way."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
from fuzzing import cases
from hypothesis import given
from hypothesis import strategies as st
from odd_values import VALUES

from services.core.errors import ConfigError
from services.gateway.config import GatewayConfig
from services.gmanager.config import GManagerConfig
from services.instance.config import InstanceConfig
from services.kvdaemon.config import KvDaemonConfig
from services.runtime.config import load_config, parse_config

KINDS = [GatewayConfig, GManagerConfig, InstanceConfig, KvDaemonConfig]
OF_TYPE = {
    "int": st.integers(-2, 2**40),
    "float": st.floats() | st.integers(-2, 10) | st.just(math.nan),
    "bool": st.booleans(),
    "str": st.text(max_size=8) | st.sampled_from(["127.0.0.1:0", "1gbit,50us", "${POD_NAME}", "http://[", "a:b:c"]),
    "Path": st.text(max_size=8),
    "tuple": st.lists(st.text(max_size=8), max_size=3),
}


def needed_by(kind: type) -> dict[str, object]:
    """The keys that must be there."""
    sound = {"int": 64, "tuple": ["127.0.0.1:1"]}
    return {
        field.name: sound.get(str(field.type).partition("[")[0], "x")
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }


def odd(kind: type) -> st.SearchStrategy[dict[str, object]]:
    """Up to three keys: values of the right type, which may be impossible all the same, or of any."""
    types = {field.name: re.split(r"[\[ ]", str(field.type))[0] for field in dataclasses.fields(kind)}
    fields = {name: OF_TYPE[wanted] for name, wanted in types.items() if wanted in OF_TYPE}
    typed = st.sampled_from([*fields]).flatmap(lambda name: st.tuples(st.just(name), fields[name]))
    anything = st.tuples(st.sampled_from([*types]) | st.text(max_size=4), VALUES)
    return st.lists(typed | typed | anything, max_size=3).map(dict)


@pytest.mark.parametrize("kind", KINDS)
def test_any_mapping(kind: type) -> None:
    names = [field.name for field in dataclasses.fields(kind)]
    taken = 0

    @cases(400)
    @given(odd(kind), st.booleans() | st.just(True))
    def mappings(values: dict[str, object], complete: bool) -> None:
        nonlocal taken
        refusal = None
        try:
            assert isinstance(parse_config(kind, (needed_by(kind) if complete else {}) | values), kind)
            taken += 1
        except ConfigError as error:
            refusal = str(error)
        assert refusal is None or any(name in refusal for name in (*names, *values)), f"{refusal!r} names no key"

    mappings()
    assert taken > 20, "hardly anything was taken: this shows nothing"


@cases(300)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_file(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = Path(tmp_path_factory.getbasetemp()) / "any.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"any\.yaml"):
        load_config(InstanceConfig, path)
