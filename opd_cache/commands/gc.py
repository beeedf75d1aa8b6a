"""The command that removes what dead processes left."""

import json
from pathlib import Path

import click


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option(
    "--older-than",
    type=click.FloatRange(min=0),
    default=3600.0,
    show_default=True,
    help="Seconds without a write after which a file of another machine's process counts as left behind.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def gc(run_dir: Path, older_than: float, dry_run: bool, as_json: bool) -> None:
    """Remove the temporary files of processes that have died. Nothing published is touched.

    Example: opd-cache gc runs/quickstart
    """
    from opd_cache.run_dir import RunDir
    from opd_cache.status import read_identity
    from opd_cache.store.gc import dead_temporaries, remove_temporary

    read_identity(RunDir(run_dir))
    found = list(dead_temporaries(run_dir, older_than))
    for path, _ in found:
        if not dry_run:
            remove_temporary(path)
    total = sum(size for _, size in found)
    if as_json:
        click.echo(json.dumps({"files": [str(path) for path, _ in found], "bytes": total, "removed": not dry_run}))
    else:
        click.echo(f"{'would remove' if dry_run else 'removed'} {len(found)} temporary files, {total:,} bytes")
