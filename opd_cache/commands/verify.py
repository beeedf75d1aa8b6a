"""The commands that compare a run's files with each other, and take out what is damaged."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from opd_cache.errors import CorruptShardError, visible

if TYPE_CHECKING:
    from opd_cache.verify.run import Verdict


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def verify(run_dir: Path, as_json: bool) -> None:
    """Read every file of a run: seals, digests, checksums, ids, values, and who was made from what. Writes nothing.

    Exit status 2 when something is wrong; each line names a file and what is wrong with it.

    Example: opd-cache verify runs/quickstart
    """
    from opd_cache.logs import set_up_logging
    from opd_cache.verify.run import verify_run

    set_up_logging()
    verdict = verify_run(run_dir)
    if as_json:
        click.echo(json.dumps(verdict.to_dict(), indent=2))
    else:
        _print(verdict)
    if verdict.findings:
        raise CorruptShardError(
            f"{run_dir}: {len(verdict.findings)} findings in {verdict.files:,} files. Run: opd-cache repair {run_dir}"
        )


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Only say what would be moved.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def repair(run_dir: Path, dry_run: bool, as_json: bool) -> None:
    """Verify a run and move what is damaged, with the seals over it, to RUN/quarantine. Nothing is deleted.

    The commands that it prints, or the run's own, then make what is missing.

    Example: opd-cache repair runs/quickstart
    """
    from opd_cache.logs import set_up_logging
    from opd_cache.verify.run import quarantine, verify_run

    set_up_logging()
    verdict = verify_run(run_dir)
    moved = [] if dry_run else quarantine(verdict)
    if as_json:
        pairs = [{"from": verdict.name(path), "to": verdict.name(target)} for path, target in moved]
        click.echo(json.dumps({**verdict.to_dict(), "moved": pairs}, indent=2))
    else:
        _print(verdict)
        for path, target in moved:
            click.echo(f"moved {verdict.name(path)} to {verdict.name(target)}")
        for again in dict.fromkeys(again for found in verdict.findings for again in found.again):
            click.echo(f"make it anew: {again}")
    if lost := [found for found in verdict.findings if not found.moves]:
        raise CorruptShardError(f"{lost[0].problem}. Nothing makes it anew: put it back from a copy.")


def _print(verdict: "Verdict") -> None:
    for found in verdict.findings:
        click.echo(visible(f"{verdict.name(found.file)}: {found.problem.removeprefix(str(found.file)).lstrip(': ')}"))
    rate = verdict.bytes / max(verdict.seconds, 1e-9) / 1e6
    what = f"{len(verdict.findings)} findings" if verdict.findings else "clean"
    click.echo(
        f"{what}: {verdict.files:,} files, {verdict.bytes:,} bytes in {verdict.seconds:.1f} s ({rate:,.0f} MB/s)"
    )
