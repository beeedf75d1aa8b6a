"""Refusing one key at a time: unknown ones, and values of another type or out of range.

Every message names the key, what was found and what is known. Nothing is repaired.
"""

import dataclasses
import math
import re
import types
import typing
from typing import Any

from omegaconf import MISSING

from opd_cache import registry
from opd_cache.config.options import field_types
from opd_cache.errors import ConfigError

# NUL ends a path early; a lone surrogate is what Python makes of bytes that are no UTF-8. Neither can be stored.
NO_TEXT = re.compile("[\0\ud800-\udfff]")
LARGEST = 2**63 - 1  # what Parquet, and programs that read our JSON, can hold


def check_section(values: Any, config_type: type, prefix: str, where: str) -> None:
    """Refuse unknown keys and values of another type, which OmegaConf would convert where it can."""
    known = field_types(config_type)
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{prefix}{shown_key(key)} is unknown. Known: {', '.join(sorted(known))}. ({where})")
        _check_type(value, known[key], f"{prefix}{key}", where)


def _check_type(value: Any, kind: Any, key: str, where: str) -> None:
    if isinstance(value, str) and ("${" in value or value == MISSING):
        return  # known only when everything is merged
    optional = typing.get_origin(kind) is typing.Union
    if optional:
        if value is None:
            return
        kind = next(one for one in typing.get_args(kind) if one is not type(None))
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    accepted = (int, float) if kind is float else origin or (dict if dataclasses.is_dataclass(kind) else kind)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        quotes = ", in quotes" if kind is str and isinstance(value, int | float) else ""
        raise ConfigError(
            f"{key} = {shown(value)} must be {_expected(kind)}{quotes}{', or null' if optional else ''}. ({where})"
        )
    if isinstance(value, int):
        _check_size(value, key)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_type(item, parts[0], f"{key}[{index}]", where)
    elif origin is dict and isinstance(value, dict):
        for name, item in value.items():
            _check_name(name, key, where)
            if parts[1] is Any:
                _check_plain(item, f"{key}.{shown_key(name)}", where)
            else:
                _check_type(item, parts[1], f"{key}.{shown_key(name)}", where)
    elif dataclasses.is_dataclass(kind):
        check_section(value, typing.cast(type, kind), f"{key}.", where)


def _check_name(name: Any, key: str, where: str) -> None:
    if not isinstance(name, str):
        raise ConfigError(f"{key}.{shown(name)}: a name must be text, in quotes. ({where})")


def _check_plain(value: Any, key: str, where: str) -> None:
    """Refuse what JSON could not give back as it was: run.json stores it and every later start compares it."""
    if isinstance(value, dict):
        for name, item in value.items():
            _check_name(name, key, where)
            _check_plain(item, f"{key}.{shown_key(name)}", where)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_plain(item, f"{key}[{index}]", where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} = {value} is not a finite number. ({where})")
    elif isinstance(value, int):
        _check_size(value, key)
    elif isinstance(value, str):
        _check_text(value, key)


def _check_size(value: int, key: str) -> None:
    if abs(value) > LARGEST:
        raise ConfigError(f"{key} = {shown(value)} is too large; it must be at most {LARGEST}.")


def _check_text(value: str, key: str) -> None:
    if NO_TEXT.search(value):
        raise ConfigError(f"{key} = {shown(value)} holds what is no UTF-8 text.")


def _expected(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list"}
    return names.get(typing.get_origin(kind) or kind, "a mapping of keys")


def shown(value: Any) -> str:
    """A value as a recipe would say it, on one line and not too long."""
    words = {None: "null", True: "true", False: "false"}
    try:
        text = words[value] if value is None or isinstance(value, bool) else repr(value)
    except ValueError:  # a number of so many digits that Python refuses to write it out
        text = f"{type(value).__name__} with a very long number"
    return text if len(text) <= 80 else f"{text[:77]}..."


def shown_key(key: Any) -> str:
    return key if isinstance(key, str) and key.isprintable() and 0 < len(key) <= 80 else shown(key)


def check_limits(config: Any, prefix: str) -> None:
    for f in dataclasses.fields(config):
        value, key = getattr(config, f.name), f"{prefix}{f.name}"
        if dataclasses.is_dataclass(value):
            check_limits(value, f"{key}.")
        elif isinstance(value, dict):
            for name, entry in value.items():
                if dataclasses.is_dataclass(entry):
                    check_limits(entry, f"{key}.{name}.")
                elif isinstance(entry, float):
                    _check_value(entry, f"{key}.{shown_key(name)}", f.metadata)
        elif isinstance(value, list):
            if not value:
                raise ConfigError(f"{key} = [] is empty; leave it out, or give at least one.")
            for index, item in enumerate(value):
                _check_value(item, f"{key}[{index}]", f.metadata)
        elif value is not None:
            if value == "" and f.default == MISSING:
                raise ConfigError(f"{key} = '' is empty.")
            _check_value(value, key, f.metadata)


def _check_value(value: Any, key: str, limits: types.MappingProxyType[str, Any]) -> None:
    if isinstance(value, str):
        _check_text(value, key)
    if "table" in limits:
        registry.check_name(limits["table"], value, key)
    if "choices" in limits and value not in limits["choices"]:
        raise ConfigError(f"{key} = {shown(value)} is unknown. Known: {', '.join(limits['choices'])}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} = {value} is not a finite number.")
    if "min" in limits and value < limits["min"]:
        raise ConfigError(f"{key} = {value} is too small; it must be at least {limits['min']}.")
    if "above" in limits and value <= limits["above"]:
        raise ConfigError(f"{key} = {value} is too small; it must be above {limits['above']}.")
    if "max" in limits and value > limits["max"]:
        raise ConfigError(f"{key} = {value} is too large; it must be at most {limits['max']}.")
    if "below" in limits and value >= limits["below"]:
        raise ConfigError(f"{key} = {value} is too large; it must be below {limits['below']}.")
