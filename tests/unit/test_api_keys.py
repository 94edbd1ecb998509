from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from services.core.errors import ConfigError, UnauthenticatedError
from services.launcher.cli import main
from services.runtime import api_keys
from services.runtime.api_keys import ApiKeys, new_key


def test_a_key_is_known_by_its_name_and_kept_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\n")
    for name in ("alice", "bob@example.org"):
        assert main(["new-key", name, "--file", str(file)]) == 0
    alice, bob = capsys.readouterr().out.split()
    assert alice not in file.read_text()
    assert hashlib.sha256(alice.encode()).hexdigest() in file.read_text()
    keys = ApiKeys(file)
    assert keys.name_of(f"Bearer {alice}") == "alice"
    assert keys.name_of(f"bearer  {bob} ") == "bob@example.org"


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic YTpi", "illm-x", "Bearer illm-x", "Bearer é"])
def test_who_has_none(tmp_path: Path, header: str | None) -> None:
    file = tmp_path / "keys"
    file.write_text(new_key("alice")[1])
    with pytest.raises(UnauthenticatedError, match="API key"):
        ApiKeys(file).name_of(header)


def test_a_key_is_revoked_by_removing_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_keys, "_LOOK_S", 0.0)
    file = tmp_path / "keys"
    (first, first_line), (second, second_line) = new_key("first"), new_key("second")
    file.write_text(first_line)
    keys = ApiKeys(file)
    assert keys.name_of(f"Bearer {first}") == "first"
    file.write_text(f"{second_line}\n# {first_line}\n")
    assert keys.name_of(f"Bearer {second}") == "second"
    with pytest.raises(UnauthenticatedError):
        keys.name_of(f"Bearer {first}")
    file.write_text("nonsense")
    assert keys.name_of(f"Bearer {second}") == "second", "a slip locks nobody out"
    file.unlink()
    assert keys.name_of(f"Bearer {second}") == "second"


@pytest.mark.parametrize("line", ["alice", "alice sha256:12", f"a b sha256:{'0' * 64}", f"alice md5:{'0' * 64}"])
def test_lines_that_are_none(tmp_path: Path, line: str) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# one\n{line}\n")
    with pytest.raises(ConfigError, match="line 2"):
        ApiKeys(file)


def test_what_cannot_be_made_or_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        ApiKeys(tmp_path / "none")
    with pytest.raises(ConfigError, match="name"):
        new_key("a b")
    assert main(["new-key", "alice", "--file", str(tmp_path / "no" / "keys")]) == 2
