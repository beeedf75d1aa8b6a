"""Reading a cluster file: defaults, then what each stage says, then `cluster.key=value` from the command line."""

import dataclasses
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opd_cache.config.cluster import Cluster, JobOptions
from opd_cache.config.values import check_limits, check_section, shown
from opd_cache.errors import ConfigError
from opd_cache.recipes import find_config, packaged_configs, read_override, read_yaml

PREFIX = "cluster."
STAGES = ("rollout", "score", "learn", "eval")
# These become #SBATCH lines: a blank, a quote or a line break would end the option and begin another.
PLAIN = re.compile(r"[^\s'\"\\`$;#\0]+")
ONE_LINE = re.compile(r"[^\n\r\0]*")
DIRECTIVES = ("partition", "account", "qos", "constraint", "gres", "mem", "time")


@dataclass(frozen=True)
class LoadedCluster:
    """A cluster file as it holds for each stage."""

    source: str
    jobs: dict[str, JobOptions]
    max_requeues: int
    warning_s: int
    template: str | None


def packaged_clusters() -> dict[str, Path]:
    """Names that `opd-cache submit RECIPE NAME` knows without a file, and their files."""
    return packaged_configs("clusters")


def load_cluster(name: str, overrides: Sequence[str] = ()) -> LoadedCluster:
    """Read a cluster file, or a packaged one by name; overrides are `cluster.score.num_tasks=8` and the like.

    Raises ConfigError, naming the key, what was found and what is known.
    """
    path = find_config("clusters", name)
    updates = [(read_yaml(path), str(path))]
    for override in overrides:
        key, _, value = override.removeprefix(PREFIX).partition("=")
        updates.append((read_override(f"{key}={value}"), override))
    merged = DictConfig({})
    try:
        for update, where in updates:
            check_section(OmegaConf.to_container(update), Cluster, "", where)
            merged = typing.cast(DictConfig, OmegaConf.merge(merged, update))
        whole = typing.cast(Cluster, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Cluster), merged)))
        jobs = {stage: _job(merged, stage) for stage in STAGES}
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0].rstrip('.')}.") from error
    check_limits(whole, "")
    for stage, job in jobs.items():
        _check_job(job, stage, str(path))
    return LoadedCluster(name, jobs, whole.max_requeues, whole.warning_s, whole.template)


def _job(merged: DictConfig, stage: str) -> JobOptions:
    parts = [merged.get(section) or {} for section in ("defaults", stage)]
    return typing.cast(JobOptions, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(JobOptions), *parts)))


def _check_job(job: JobOptions, stage: str, where: str) -> None:
    for name in DIRECTIVES:
        _check_text(getattr(job, name), PLAIN, f"{stage}.{name}", "one word without quotes", where)
    for key, lines in (("setup", job.setup), ("command", job.command and [job.command])):
        for line in lines or ():
            _check_text(line, ONE_LINE, f"{stage}.{key}", "one line", where)
    for extra in job.sbatch or ():
        _check_text(
            extra, re.compile(r"--?[A-Za-z][^\n\r\0]*"), f"{stage}.sbatch", "an sbatch option on one line", where
        )
    only = {"rollout": (), "score": (), "learn": ("nodes", "ranks_per_node"), "eval": ()}[stage]
    defaults = {f.name: f.default for f in dataclasses.fields(JobOptions)}
    for name in ("nodes", "ranks_per_node"):
        if name not in only and getattr(job, name) != defaults[name]:
            raise ConfigError(f"{stage}.{name} = {getattr(job, name)}: only learn runs as several processes. ({where})")


def _check_text(value: Any, form: re.Pattern[str], key: str, expected: str, where: str) -> None:
    if value is not None and not form.fullmatch(value):
        raise ConfigError(f"{key} = {shown(value)} must be {expected}. ({where})")
