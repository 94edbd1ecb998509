"""Configuration: one YAML file, or a directory of them, becomes one frozen dataclass, once, at start.

The dataclass is the schema. A key that it does not have, or a value of another type, is refused with a message that
names the file and the key; a missing key takes the field's default, and a field without default must be there. What a
value may be beyond its type is the dataclass's own business: its ``__post_init__`` raises ``ConfigError``.

Of a directory, all ``*.yaml`` files count, in the order of their names; a key of a later file replaces the same key of
an earlier one as a whole. The environment is not configuration, with one exception: who this process is, it learns only
from outside. So a text may contain ``${POD_NAME}``, ``${POD_IP}`` and ``${NODE_NAME}``, and no other variables.

Understood field types: ``str``, ``int``, ``float`` (an integer will do), ``bool``, ``Path``, ``tuple[X, ...]`` (a YAML
list), ``X | None``, ``Literal[...]``, and dataclasses of such fields (a YAML mapping).
"""

from __future__ import annotations

import dataclasses
import os
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from services.core.errors import ConfigError

T = TypeVar("T")

# Who this process is, as its pod's manifest hands it on.
IDENTITY_VARIABLES = ("POD_NAME", "POD_IP", "NODE_NAME")
_VARIABLE = re.compile(r"\$\{([^}]*)\}")


def load_config(cls: type[T], path: Path) -> T:
    """Reads the file ``path``, or the ``*.yaml`` files of the directory ``path``, into the dataclass ``cls``.

    Raises:
        ConfigError: a file cannot be read, is not YAML, names a variable that is unknown or not set, or does not fit
            the dataclass.
    """
    files = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"{path}: no *.yaml file is in this directory")
    data: dict[object, object] = {}
    for file in files:
        try:
            data.update(_read(file))
        except ConfigError as exc:
            raise ConfigError(f"{file}: {exc}") from exc
    try:
        return parse_config(cls, data)
    except ConfigError as exc:
        raise ConfigError(f"{path}: {exc}") from exc


def parse_config(cls: type[T], data: object) -> T:
    """Turns what a YAML parser answers into the dataclass ``cls``.

    Raises:
        ConfigError: an unknown or missing key, or a value of another type; the message names the key.
    """
    return typing.cast(T, _dataclass(cls, data, ""))


def _read(file: Path) -> dict[object, object]:
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"cannot be read: {exc.strerror}") from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise ConfigError(f"is not a YAML file: {exc}") from exc
    if data is not None and not isinstance(data, dict):
        raise ConfigError(f"the file must be a mapping of keys to values, got {_show(data)}")
    return {key: _with_identity(value, str(key)) for key, value in (data or {}).items()}


def _with_identity(value: object, where: str) -> object:
    """The value with the variables in its texts replaced."""
    if isinstance(value, dict):
        return {key: _with_identity(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_with_identity(item, where) for item in value]
    return _VARIABLE.sub(lambda match: _identity(match[1], where), value) if isinstance(value, str) else value


def _identity(name: str, where: str) -> str:
    if name not in IDENTITY_VARIABLES:
        raise ConfigError(f"{where}: ${{{name}}} is not one of the variables {', '.join(IDENTITY_VARIABLES)}")
    value = os.environ.get(name)
    if not value:
        raise ConfigError(f"{where}: the environment variable {name} is not set")
    return value


def _dataclass(cls: type[Any], data: object, where: str) -> object:
    if not isinstance(data, dict):
        raise ConfigError(f"{where or 'a configuration'} must be a mapping of keys to values, got {_show(data)}")
    types_by_name = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    prefix = f"{where}." if where else ""
    for key in data:
        if key not in fields:
            raise ConfigError(f"unknown key {prefix}{key}; known keys are {', '.join(sorted(fields))}")
    values: dict[str, object] = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _value(types_by_name[name], data[name], prefix + name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"key {prefix}{name} is missing")
    try:
        return cls(**values)
    except ConfigError as exc:
        raise ConfigError(f"{where}: {exc}" if where else str(exc)) from exc


def _value(wanted: Any, value: object, where: str) -> object:
    origin = typing.get_origin(wanted)
    if origin in (types.UnionType, typing.Union):
        return _optional(wanted, value, where)
    if origin is typing.Literal:
        return _literal(wanted, value, where)
    if origin is tuple:
        return _tuple(wanted, value, where)
    if dataclasses.is_dataclass(wanted):
        return _dataclass(typing.cast("type[Any]", wanted), value, where)
    return _scalar(wanted, value, where)


def _optional(wanted: Any, value: object, where: str) -> object:
    choices = [choice for choice in typing.get_args(wanted) if choice is not type(None)]
    if len(choices) != 1:
        raise TypeError(f"{where}: of unions only X | None is understood, not {wanted}")
    return None if value is None else _value(choices[0], value, where)


def _literal(wanted: Any, value: object, where: str) -> object:
    choices = typing.get_args(wanted)
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    raise ConfigError(f"{where} must be one of {', '.join(map(repr, choices))}, got {_show(value)}")


def _tuple(wanted: Any, value: object, where: str) -> object:
    args = typing.get_args(wanted)
    if len(args) != 2 or args[1] is not Ellipsis:
        raise TypeError(f"{where}: of tuples only tuple[X, ...] is understood, not {wanted}")
    if not isinstance(value, list):
        raise ConfigError(f"{where} must be a list, got {_show(value)}")
    return tuple(_value(args[0], item, f"{where}[{index}]") for index, item in enumerate(value))


def _scalar(wanted: Any, value: object, where: str) -> object:
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if wanted is Path and isinstance(value, str):
        return Path(value)
    if wanted not in (str, int, float, bool, Path):
        raise TypeError(f"{where}: fields of type {wanted} are not understood")
    # bool is a subclass of int, but `true` is no number.
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        name = {str: "a string", int: "an integer", float: "a number", bool: "true or false", Path: "a path"}[wanted]
        raise ConfigError(f"{where} must be {name}, got {_show(value)}")
    return value


def _show(value: object) -> str:
    return "nothing" if value is None else f"{value!r} ({type(value).__name__})"
