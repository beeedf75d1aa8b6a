"""The command that removes what dead processes left, and the policies that the recipe gives up."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from opd_cache.retention import OldPolicy


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[learn.keep_policies.key=value...]")
@click.option(
    "--older-than",
    type=click.FloatRange(min=0),
    default=3600.0,
    show_default=True,
    help="Seconds without a write after which a file of another machine's process counts as left behind.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def gc(run_dir: Path, overrides: tuple[str, ...], older_than: float, dry_run: bool, as_json: bool) -> None:
    """Remove the temporary files of processes that have died, and the policies that learn.keep_policies gives up.

    Without learn.keep_policies.last, in the run's recipe or here, all policies stay. One that a stage, an evaluation that
    is still to come, a teacher or a reference needs stays in any case. Nothing else that is published is touched.

    Example: opd-cache gc runs/quickstart learn.keep_policies.last=3 --dry-run
    """
    from opd_cache.errors import ConfigError
    from opd_cache.recipes import stored_recipe
    from opd_cache.retention import removable_policies, remove_policies
    from opd_cache.run_dir import RunDir
    from opd_cache.status import read_identity
    from opd_cache.store.gc import dead_temporaries, remove_temporary

    run = RunDir(run_dir)
    for override in overrides:
        if not override.startswith("learn.keep_policies."):
            raise ConfigError(f"{override}: gc reads only learn.keep_policies.*; the rest is as in {run.run_json}.")
    recipe = stored_recipe(read_identity(run)["recipe"], overrides, str(run.run_json))
    found = list(dead_temporaries(run_dir, older_than))
    for path, _ in found:
        if not dry_run:
            remove_temporary(path)
    policies = removable_policies(run, recipe) if dry_run else remove_policies(run, recipe)
    total = sum(size for _, size in found)
    if as_json:
        listed = [{"version": old.version, "bytes": old.bytes} for old in policies]
        content = {"files": [str(path) for path, _ in found], "bytes": total, "policies": listed}
        click.echo(json.dumps({**content, "removed": not dry_run}))
    else:
        verb = "would remove" if dry_run else "removed"
        click.echo(f"{verb} {len(found)} temporary files, {total:,} bytes")
        if policies:
            click.echo(f"{verb} {_said(policies)} by learn.keep_policies")


def _said(policies: "list[OldPolicy]") -> str:
    versions = ", ".join(str(old.version) for old in policies)
    total = sum(old.bytes for old in policies)
    return f"{'policies' if len(policies) > 1 else 'policy'} {versions}, {total:,} bytes,"
