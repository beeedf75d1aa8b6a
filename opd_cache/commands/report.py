"""opd-cache report and opd-cache serve."""

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from opd_cache.commands.query import named_runs
from opd_cache.limits import DEFAULT_MEMORY, Limits

if TYPE_CHECKING:
    from opd_cache.report.pages import Runs

PORT = 8642
PAGE_TIMEOUT_S = 60.0
other_runs = click.option("--run", "named", multiple=True, metavar="NAME=PATH", help="Further runs to compare with.")
partial_option = click.option(
    "--partial", is_flag=True, help="Read published shards of stages that are not sealed, too."
)


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path), metavar="RUN")
@other_runs
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="A new file; without it NAME.html.")
@partial_option
@click.option("--json", "as_json", is_flag=True, help="Print what was written for programs.")
def report(run_dir: Path, named: tuple[str, ...], output: Path | None, partial: bool, as_json: bool) -> None:
    """Write a run as one HTML file that opens anywhere, without a network.

    It has the curves, the health, the answers of the ready queries, and some responses of every episode token by token:
    the worst, the best, the longest, random ones, and a few prompts through all episodes.

    Example: opd-cache report runs/quickstart --output report.html
    """
    runs = _opened(run_dir, named, partial, Limits(DEFAULT_MEMORY, PAGE_TIMEOUT_S))
    from opd_cache.commands.output import check_new_file, write_new_file
    from opd_cache.logs import StageProgress
    from opd_cache.report.write import num_steps, write_report

    path = output or Path(f"{next(iter(runs.by_name))}.html")
    check_new_file(path)
    with StageProgress("report", str(run_dir), num_steps(runs), "parts") as progress:
        text, responses = write_report(runs, lambda _: progress.advance(1, 0))
    content = text.encode()
    write_new_file(path, lambda file: file.write(content))
    if as_json:
        click.echo(json.dumps({"file": str(path), "bytes": len(content), "responses": responses}))
    else:
        click.echo(f"{path}: {len(content) / 1e6:.1f} MB, {responses} responses token by token; open it in a browser.")


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path), metavar="RUN")
@other_runs
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; 0.0.0.0 lets other machines in.")  # fmt: skip
@click.option(
    "--port", type=click.IntRange(0, 65535), default=PORT, show_default=True, help="0 takes any that is free."
)
@partial_option
@click.option("--memory", default=DEFAULT_MEMORY, show_default=True, help="What a query may use.")
@click.option("--timeout", type=click.FloatRange(min=0), default=PAGE_TIMEOUT_S, show_default=True, help="Seconds it may take.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the address for programs.")
def serve(
    run_dir: Path,
    named: tuple[str, ...],
    host: str,
    port: int,
    partial: bool,
    memory: str,
    timeout: float,
    as_json: bool,
) -> None:
    """Show a run in a browser while it goes on: curves, samples, every token, SQL, health.

    The address that is printed holds a random part; only who knows it can read the run, and nobody can change it.
    From a cluster: ssh -L 8642:localhost:8642 HOST, then open the address with localhost.

    Example: opd-cache serve runs/quickstart --port 8642
    """
    from opd_cache.report.serve import PageServer

    runs = _opened(run_dir, named, partial, Limits(memory, timeout))
    with PageServer(runs, host, port) as server:
        runs.watch()
        if not server.is_local:
            click.echo(f"--host {host}: whoever reaches this machine and learns the address can read the run; it is not encrypted.", err=True)  # fmt: skip
        try:
            click.echo(json.dumps({"url": server.url}) if as_json else f"open {server.url}\nCtrl-C ends it.")
            server.serve_forever()
        except KeyboardInterrupt:
            click.echo("ended.", err=True)
            os._exit(0)  # nothing is being written; threads inside DuckDB would hold up an orderly end, or abort it


def _opened(run_dir: Path, named: tuple[str, ...], partial: bool, limits: Limits) -> "Runs":
    """The runs, each looked at once. Raises what is wrong with one of them."""
    others = named_runs(named)
    own = next(name for name in _names_for(run_dir) if name not in others)
    from opd_cache.report.pages import Runs
    from opd_cache.store.query import checked_name

    runs = Runs({own: run_dir, **{checked_name(name): Path(path) for name, path in others.items()}}, partial, limits)
    runs.check()
    return runs


def _names_for(run_dir: Path) -> list[str]:
    """How a run may be called in SQL, the best first: as its folder."""
    plain = re.sub(r"\W", "_", run_dir.absolute().name, flags=re.ASCII) or "run"
    return [f"run_{plain}" if plain[0].isdigit() or plain == "main" else plain, f"this_{plain}", "this_run"]
