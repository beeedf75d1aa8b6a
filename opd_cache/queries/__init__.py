"""Ready queries, one file each: `-- what it answers` on the first line, then one SELECT over the views of one run."""

from pathlib import Path

from opd_cache.errors import ConfigError


def example_names() -> list[str]:
    return sorted(path.stem for path in Path(__file__).parent.glob("*.sql"))


def example_sql(name: str) -> str:
    """The SQL of a ready query, its comment included. Raises ConfigError."""
    if name not in example_names():
        raise ConfigError(f"--example {name!r} is unknown. Known: {', '.join(example_names())}.")
    return (Path(__file__).parent / f"{name}.sql").read_text()


def described_examples() -> list[tuple[str, str]]:
    """(name, what it answers) of every ready query."""
    return [(name, example_sql(name).splitlines()[0].removeprefix("-- ")) for name in example_names()]
