"""Where metrics go beside steps.parquet, which is always written and is what every other command reads."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from opd_cache import registry
from opd_cache.errors import ConfigError


class MetricsLogger(Protocol):
    """A place for the figures of each step."""

    def __init__(self, folder: Path, run_id: str, recipe: dict[str, Any], first_step: int) -> None: ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One step's row of steps.parquet. After a restart, steps since the last checkpoint come again."""

    def close(self) -> None: ...


class TensorBoardLogger:
    """Event files in RUN/logs/tensorboard; `tensorboard --logdir RUN/logs` shows them."""

    def __init__(self, folder: Path, run_id: str, recipe: dict[str, Any], first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _not_installed("tensorboard") from error
        # Steps that a killed process logged after its last checkpoint are dropped.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(f"learn/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """Weights & Biases, one W&B run a run; WANDB_MODE=offline writes to RUN/logs/wandb without a network."""

    def __init__(self, folder: Path, run_id: str, recipe: dict[str, Any], first_step: int) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _not_installed("wandb") from error
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project="opd-cache", id=run_id, name=folder.parent.name, dir=folder, config=recipe, resume="allow"
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({f"learn/{name}": value for name, value in metrics.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


def _not_installed(name: str) -> ConfigError:
    return ConfigError(f"learn.loggers names {name}, which is not installed. Run: pip install 'opd-cache[{name}]'")


@contextlib.contextmanager
def open_loggers(
    names: Sequence[str], folder: Path, run_id: str, recipe: dict[str, Any], first_step: int
) -> Iterator[list[MetricsLogger]]:
    """The recipe's loggers, closed at the end of the block."""
    with contextlib.ExitStack() as stack:
        loggers = []
        for name in names:
            logger = registry.load(registry.LOGGERS, name, "learn.loggers")(folder, run_id, recipe, first_step)
            stack.callback(logger.close)
            loggers.append(logger)
        yield loggers
