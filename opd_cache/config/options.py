"""What a recipe key is: a dataclass field with a default, one line of documentation, and limits."""

import dataclasses
import typing
from dataclasses import field
from typing import Any


def option(default: Any, doc: str, **limits: Any) -> Any:
    """A recipe key: its default, one line of documentation, and limits (min, above, max, below, choices, table)."""
    metadata = {"doc": doc, **limits}
    if isinstance(default, type) or callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def field_types(config_type: type) -> dict[str, Any]:
    """The declared type of every key of a section."""
    hints = typing.get_type_hints(config_type)
    return {f.name: hints[f.name] for f in dataclasses.fields(config_type)}
