"""What commands that run stages share: the recipe's arguments, quiet libraries, an end by a signal."""

import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

import click

from opd_cache.garbage import no_garbage_collection

EPILOG_RECIPE = "RECIPE: YAML files and packaged names, merged left to right, then key=value."


def stage_command(command: Callable) -> Callable:
    """What commands that run stages of a recipe share."""
    argument = click.argument("recipe", nargs=-1, required=True, metavar="RECIPE... [key=value...]")
    return argument(stoppable_command(command))


def stoppable_command(command: Callable) -> Callable:
    """The command with an end by SIGTERM and SIGUSR1: one line and status 75."""

    @functools.wraps(command)
    def stoppable(**arguments: Any) -> None:
        from opd_cache.stop import stopping_signals

        with stopping_signals():
            command(**arguments)

    return stoppable


def load_recipe_arguments(recipe: tuple[str, ...], stage: str | None = None) -> Any:
    """The recipe of a stage that is about to run, in the environment that it wants."""
    from opd_cache.launch.environments import enter
    from opd_cache.logs import set_up_logging
    from opd_cache.recipes import load_recipe

    set_up_logging()
    loaded = load_recipe(recipe)
    if stage is not None:
        enter(loaded, stage, sys.argv[1:])
    quiet_libraries()
    return loaded


def quiet_libraries() -> None:
    """What other packages would print on import, and how their threads wait. Before they are imported."""
    # Two busy OpenMP threads on two cores spin against each other unless they sleep while waiting.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DistributedDataParallel warns of what we ask it for
    if importlib.util.find_spec("deepspeed"):
        with no_garbage_collection():
            import torch

        # transformers imports DeepSpeed wherever it is installed; where it has to guess, it says so on standard output.
        if not torch.accelerator.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def console() -> Any:
    """Standard output, for tables. Brackets in paths, names and texts are just brackets."""
    from rich.console import Console

    return Console(markup=False, emoji=False)
