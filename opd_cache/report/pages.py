"""What the page asks for, by name: the same answers whether a server gives them or a report holds them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd_cache.errors import ConfigError
from opd_cache.limits import Limits
from opd_cache.queries import described_examples, example_sql
from opd_cache.report.answers import answer_query, view_columns
from opd_cache.report.health import run_health
from opd_cache.report.live import LiveRun
from opd_cache.report.overview import run_overview
from opd_cache.report.responses import checked_place, response_page
from opd_cache.report.samples import parse_query, sample_choices, sample_page


class Runs:
    """The runs of one page by name; the first is the one that is shown first."""

    def __init__(self, paths: Mapping[str, Path], partial: bool, limits: Limits) -> None:
        self.partial, self.limits = partial, limits
        self.by_name = {name: LiveRun(name, path, partial, limits) for name, path in paths.items()}

    def check(self) -> None:
        """Look at every run once. Raises MissingInputError, MismatchError."""
        for run in self.by_name.values():
            run.files()

    def watch(self) -> None:
        """Make ready what pages will ask for, now and whenever a run has gone on."""
        for run in self.by_name.values():
            run.watch()

    def named(self, name: str) -> LiveRun:
        """Raises ConfigError where the page does not show it."""
        if name not in self.by_name:
            raise ConfigError(f"run {name[:40]!r} is not shown here; known: {', '.join(self.by_name)}.")
        return self.by_name[name]

    def about(self) -> dict[str, Any]:
        """What never changes while the page is open."""
        examples = [{"name": name, "answers": text, "sql": example_sql(name)} for name, text in described_examples()]
        return {"runs": list(self.by_name), "examples": examples, "views": view_columns()}

    def keys(self) -> dict[str, str]:
        """Run → what changes whenever its data does."""
        return {name: run.key() for name, run in self.by_name.items()}

    def overview(self) -> list[dict[str, Any]]:
        return [run_overview(run) for run in self.by_name.values()]

    def health(self) -> list[dict[str, Any]]:
        return [run_health(run) for run in self.by_name.values()]

    def choices(self, given: Mapping[str, str]) -> dict[str, Any]:
        return sample_choices(self.named(given.get("run", "")).state())

    def samples(self, given: Mapping[str, str]) -> dict[str, Any]:
        return sample_page(self.named(given.get("run", "")).state(), parse_query(given))

    def response(self, given: Mapping[str, str]) -> dict[str, Any]:
        episode, rollout = checked_place(given.get("episode", ""), given.get("rollout", ""))
        return response_page(self.named(given.get("run", "")).state(), episode, rollout, given.get("teacher") or None)

    def query(self, run: str, sql: str) -> dict[str, Any]:
        """Of one run, or of all of them in a schema each where no run is named."""
        path: Any = self.named(run).path if run else {name: one.path for name, one in self.by_name.items()}
        return answer_query(path, sql, self.partial, self.limits)
