"""The command line. Heavy packages are imported inside the commands that need them, so that --help and status are quick."""

import contextlib
import sys
from typing import NoReturn

import click

from opd_cache import __version__
from opd_cache.commands.check import check
from opd_cache.commands.export import export
from opd_cache.commands.gc import gc
from opd_cache.commands.import_ import import_rollouts
from opd_cache.commands.inspect import inspect
from opd_cache.commands.plot import plot
from opd_cache.commands.query import query
from opd_cache.commands.report import report, serve
from opd_cache.commands.run import replay, run
from opd_cache.commands.slurm import cancel, submit
from opd_cache.commands.stages import evaluate, learn, rollout, score
from opd_cache.commands.status import config, status
from opd_cache.commands.verify import repair, verify
from opd_cache.errors import FirstRankFailedError, LostRanksError, OpdCacheError, TryAgainError, error_line
from opd_cache.shortage import shortage
from opd_cache.store.disk import disk_error


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}, invoke_without_command=True
)
@click.version_option(__version__, prog_name="opd-cache")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """On-policy distillation in three restartable stages joined by Parquet shards.

    \b
    opd-cache run quickstart                    a whole run on this machine
    opd-cache status runs/quickstart            what is done
    opd-cache query runs/quickstart "select avg(num_response_tokens) from rollouts"
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


COMMANDS = (
    rollout, score, learn, evaluate, run, replay, status, config, check, query, plot, export, import_rollouts, inspect,
    report, serve, submit, cancel, verify, repair, gc,
)  # fmt: skip
for command in COMMANDS:
    cli.add_command(command)


def main() -> None:
    """Entry point: errors that a user can mend are one line and the status of their class."""
    debug = "--debug" in sys.argv[1:]
    try:
        cli(prog_name="opd-cache", standalone_mode=False)
    except FirstRankFailedError as error:
        sys.exit(error.exit_status)
    except LostRanksError as error:
        from opd_cache.stop import end_process

        end_process(str(error))
    except OpdCacheError as error:
        if debug:
            raise
        _stop(type(error).__name__, str(error), error.exit_status)
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        _stop(
            "UsageError", f"{error.format_message()} See: {context.command_path if context else 'opd-cache'} --help", 2
        )
    except Exception as error:
        if debug:
            raise
        name = error.filename if isinstance(error, OSError) else None
        if explained := disk_error(error, name or "a file of the run"):
            _stop(type(explained).__name__, str(explained), explained.exit_status)
        if (lacking := shortage(error)) is not None:
            message = f"{lacking}. Nothing unfinished was published; the same command goes on once there is more."
            _stop(TryAgainError.__name__, message, TryAgainError.exit_status)
        if isinstance(error, OSError) and name is not None:
            _stop(type(error).__name__, f"{name}: {error.strerror}.", 2)
        raise
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped; the same command goes on from what is published.", err=True)
        sys.exit(130)
    finally:
        with contextlib.suppress(OSError, AttributeError):  # nobody reads it, or it was closed from the start
            sys.stdout.flush()


def _stop(kind: str, message: str, status: int) -> NoReturn:
    """Print the error as one line and exit; with this status also where the line finds no room."""
    with contextlib.suppress(OSError):
        click.echo(error_line(kind, message), err=True)
    sys.exit(status)
