"""What a query may take before it is stopped."""

from dataclasses import dataclass

DEFAULT_MEMORY, DEFAULT_TIMEOUT_S = "4GB", 600.0


@dataclass(frozen=True)
class Limits:
    """Memory as DuckDB reads it, such as 4GB; seconds of wall time."""

    memory: str = DEFAULT_MEMORY
    timeout_s: float = DEFAULT_TIMEOUT_S


DEFAULT_LIMITS = Limits()
