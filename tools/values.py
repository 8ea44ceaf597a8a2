"""Frozen values ⇄ plain JSON data, for the control socket.

Works for the value classes of `repl.config`, `repl.events` and `repl.errors`: dataclasses of numbers,
strings, enumerations, tuples, dictionaries of strings and other such dataclasses. What comes in is
checked against the declared types, so that a malformed message is a `ValueError` here and nothing later.
"""

from __future__ import annotations

import types
from dataclasses import fields, is_dataclass
from enum import IntEnum
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    _T = TypeVar("_T", bound=DataclassInstance)
else:
    _T = TypeVar("_T")

Json = dict[str, Any]


def pack(value: DataclassInstance) -> Json:
    """*value* as JSON data: an object with the field names as keys."""
    return {f.name: _pack(getattr(value, f.name)) for f in fields(value)}


def unpack(cls: type[_T], data: object) -> _T:
    """The value of class *cls* that `pack` turned into *data*.

    Fields that are missing take their default; unknown keys are ignored, so that an older and a newer
    program can talk. ValueError says which field is wrong.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{cls.__name__} must be an object")
    known = {}
    for name, wanted in _hints(cls).items():
        if name in data:
            known[name] = _unpack(wanted, data[name], f"{cls.__name__}.{name}")
    try:
        return cls(**known)
    except TypeError as error:
        raise ValueError(f"{cls.__name__}: {error}") from error


@cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    wanted = {f.name for f in fields(cls)}
    return {name: hint for name, hint in get_type_hints(cls).items() if name in wanted}


def _pack(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return pack(value)
    if isinstance(value, IntEnum):
        return int(value)
    if isinstance(value, tuple | list):
        return [_pack(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _pack(item) for key, item in value.items()}
    assert value is None or isinstance(value, bool | int | float | str), value
    return value


def _unpack(wanted: Any, data: object, where: str) -> object:
    origin = get_origin(wanted)
    if origin in (Union, types.UnionType):
        if data is None:
            return None
        (inner,) = (part for part in get_args(wanted) if part is not type(None))
        return _unpack(inner, data, where)
    if origin is tuple:
        if not isinstance(data, list):
            raise ValueError(f"{where} must be a list")
        return tuple(_unpack(get_args(wanted)[0], item, where) for item in data)
    if origin is dict:
        if not isinstance(data, dict):
            raise ValueError(f"{where} must be an object")
        return {key: _unpack(get_args(wanted)[1], item, where) for key, item in data.items()}
    return _unpack_plain(wanted, data, where)


def _unpack_plain(wanted: Any, data: object, where: str) -> object:
    if is_dataclass(wanted):
        return unpack(wanted, data)  # type: ignore[arg-type]
    if wanted is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if isinstance(wanted, type) and issubclass(wanted, IntEnum):
        if not isinstance(data, int):
            raise ValueError(f"{where} must be a number")
        return wanted(data)
    if type(data) is not wanted:
        raise ValueError(f"{where} must be {wanted.__name__}")
    return data
