"""The commands that compare a run's files with each other, and take out what is damaged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from opd_cache.errors import ConfigError, CorruptShardError, visible

if TYPE_CHECKING:
    from opd_cache.verify.run import Verdict


def _deep_options(command: Callable) -> Callable:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="For programs."),
        click.option("--seed", type=int, default=0, show_default=True, help="--deep: draws the rows."),
        click.option(
            "--rows",
            type=click.IntRange(min=1),
            default=16,
            show_default=True,
            help="--deep: of each teacher and of the student, over all episodes.",
        ),
        click.option("--deep", is_flag=True, help="Also score some rows again with the models, and compare."),
        click.argument("overrides", nargs=-1, metavar="[teachers.NAME.key=value...]"),
        click.argument("run_dir", type=click.Path(path_type=Path)),
    ):
        command = option(command)
    return command


@click.command(epilog="teachers.NAME.model=FOLDER says where a teacher lies on this machine (--deep).")
@_deep_options
def verify(run_dir: Path, overrides: tuple[str, ...], deep: bool, rows: int, seed: int, as_json: bool) -> None:
    """Read every file of a run: seals, digests, checksums, ids, values, and who was made from what. Writes nothing.

    Exit status 2 when something is wrong; each line names a file and what is wrong with it.

    --deep loads the teachers, one at a time, and the policies that sampled: stored log-probs must be what they give now,
    within what the dtype explains. Status 75 when a teacher's server does not answer.

    Example: opd-cache verify runs/quickstart
    """
    verdict = _verdict(run_dir, overrides, deep, rows, seed)
    if as_json:
        click.echo(json.dumps(verdict.to_dict(), indent=2))
    else:
        _print(verdict)
    if verdict.findings:
        again = " ".join(["opd-cache repair", str(run_dir), *(_deep_arguments(rows, seed, overrides) if deep else [])])
        raise CorruptShardError(f"{run_dir}: {len(verdict.findings)} findings in {verdict.files:,} files. Run: {again}")


def _deep_arguments(rows: int, seed: int, overrides: tuple[str, ...]) -> list[str]:
    return ["--deep", "--rows", str(rows), "--seed", str(seed), *overrides]


def _verdict(run_dir: Path, overrides: tuple[str, ...], deep: bool, rows: int, seed: int) -> "Verdict":
    from opd_cache.commands.running import quiet_libraries
    from opd_cache.logs import set_up_logging
    from opd_cache.verify.run import verify_deeply, verify_run

    set_up_logging()
    if not deep:
        if overrides:
            raise ConfigError(f"{overrides[0]}: only --deep reads it.")
        return verify_run(run_dir)
    quiet_libraries()
    return verify_deeply(run_dir, rows, seed, overrides)


@click.command()
@_deep_options
@click.option("--dry-run", is_flag=True, help="Only say what would be moved.")
def repair(
    run_dir: Path, overrides: tuple[str, ...], deep: bool, rows: int, seed: int, dry_run: bool, as_json: bool
) -> None:
    """Verify a run and move what is damaged, with the seals over it, to RUN/quarantine. Nothing is deleted.

    The commands that it prints, or the run's own, then make what is missing.

    Example: opd-cache repair runs/quickstart
    """
    from opd_cache.verify.run import quarantine

    verdict = _verdict(run_dir, overrides, deep, rows, seed)
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
    if lost := [found for found in verdict.findings if not (found.moves or found.again)]:
        raise CorruptShardError(f"{lost[0].problem}. Nothing makes it anew: put it back from a copy.")


def _print(verdict: "Verdict") -> None:
    for found in verdict.findings:
        click.echo(visible(f"{verdict.name(found.file)}: {found.problem.removeprefix(str(found.file)).lstrip(': ')}"))
    for one in verdict.compared or ():
        skipped = f"; not compared: {'; '.join(one.skipped)}" if one.skipped else ""
        click.echo(
            visible(
                f"{one.who}: {one.rows} rows, {one.tokens:,} tokens scored again, largest difference {one.largest:.2g} nats, mean {one.mean:.2g}{skipped}"
            )
        )
    rate = verdict.bytes / max(verdict.seconds, 1e-9) / 1e6
    what = f"{len(verdict.findings)} findings" if verdict.findings else "clean"
    click.echo(
        f"{what}: {verdict.files:,} files, {verdict.bytes:,} bytes in {verdict.seconds:.1f} s ({rate:,.0f} MB/s)"
    )
