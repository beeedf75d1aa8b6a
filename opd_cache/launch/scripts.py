"""The batch scripts of a run: one a stage, rendered from a template into RUN/slurm, where hand edits are kept."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from opd_cache.config.cluster import JobOptions
from opd_cache.errors import ConfigError
from opd_cache.launch.clusters import DIRECTIVES, LoadedCluster
from opd_cache.run_dir import RunDir
from opd_cache.store.publish import digest_bytes, replace_file

TEMPLATE = Path(__file__).parent / "job.sh"
FIELD = re.compile(r"\{\{(\w+)\}\}")
MARK = "# unedited: "
# Slurm's own reading of `#SBATCH --output=...` stops at these or changes them.
UNFIT_FOR_A_DIRECTIVE = re.compile(r"[\s'\"\\%#\0]")
NUMBERED = {
    "rollout": '--episode "$number" --task "$task" --num-tasks "$num_tasks"',
    "score": '--episode "$number" --task "$task" --num-tasks "$num_tasks"',
    "learn": '--episode "$number"',
    "eval": '--policy-version "$number"',
}


@dataclass(frozen=True)
class Script:
    """A stage's batch script: where it lies, what it should say, and whether a hand has changed it there."""

    stage: str
    path: Path
    text: str
    is_edited: bool


def is_array(stage: str) -> bool:
    return stage in ("rollout", "score")


def render_scripts(run: RunDir, folder: Path, python: str, cluster: LoadedCluster) -> list[Script]:
    """The scripts of all stages, not yet written.

    run and folder (where jobs run) are absolute. Raises ConfigError when a path cannot be said in a batch
    script, or when the template has a field that is not known.
    """
    if UNFIT_FOR_A_DIRECTIVE.search(str(run.path)):
        raise ConfigError(
            f"run_dir = {str(run.path)!r}: Slurm reads its path from a script; choose one without blanks, quotes, backslashes, % and #."
        )
    template = TEMPLATE if cluster.template is None else Path(cluster.template)
    try:
        text = template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"template = {cluster.template!r} cannot be read: {error}. ({cluster.source})") from error
    scripts = []
    for stage, job in cluster.jobs.items():
        fields = _fields(stage, job, run, folder, python, cluster)
        scripts.append(_script(run.job_script(stage), stage, _filled(text, fields, template)))
    return scripts


def write_scripts(scripts: list[Script]) -> None:
    """Write those that no hand has changed."""
    for script in scripts:
        if not script.is_edited:
            replace_file(script.path, script.text, is_program=True)


def _script(path: Path, stage: str, rendered: str) -> Script:
    text = rendered + MARK + digest_bytes(rendered.encode())[:16] + "\n"
    if not path.exists():
        return Script(stage, path, text, False)
    found = path.read_text()
    body, mark, digest = found.rpartition(MARK)
    is_edited = not mark or digest.strip() != digest_bytes(body.encode())[:16]
    return Script(stage, path, found if is_edited else text, is_edited)


def _filled(text: str, fields: dict[str, str], template: Path) -> str:
    if unknown := sorted({name for name in FIELD.findall(text) if name not in fields}):
        raise ConfigError(f"{template}: {{{{{unknown[0]}}}}} is unknown. Known: {', '.join(sorted(fields))}.")
    return FIELD.sub(lambda match: fields[match[1]], text)


def _fields(
    stage: str, job: JobOptions, run: RunDir, folder: Path, python: str, cluster: LoadedCluster
) -> dict[str, str]:
    program = job.command or f"{shlex.quote(python)} -m opd_cache"
    command = f"{program} {stage} {shlex.quote(str(run.submitted_recipe))} {NUMBERED[stage]}"
    num_ranks = job.nodes * job.ranks_per_node
    stop = 'kill -USR1 "$stage"'
    if num_ranks > 1:
        command = f"srun --kill-on-bad-exit=1 {command}"
        # To the ranks and not to srun, which would end them; not as USR1, which NCCL uses.
        stop = 'scancel --signal=TERM "$SLURM_JOB_ID"'
    return {
        "stage": stage,
        "title": f"The {stage} stage of {run.path}",
        "log": str(run.job_log(stage, "%A_%a" if is_array(stage) else "%j")),
        "warning_s": str(cluster.warning_s),
        "patience_s": str(max(1, cluster.warning_s * 3 // 4)),
        "max_requeues": str(cluster.max_requeues),
        "sbatch": "\n".join(f"#SBATCH {option}" for option in _directives(job)),
        "folder": shlex.quote(str(folder)),
        "setup": "\n".join(job.setup or ()),
        "stop": stop,
        "command": command,
    }


def _directives(job: JobOptions) -> list[str]:
    options = [f"--{name}={value}" for name in DIRECTIVES if (value := getattr(job, name)) is not None]
    if job.cpus_per_task is not None:
        options.append(f"--cpus-per-task={job.cpus_per_task}")
    return [*options, f"--nodes={job.nodes}", f"--ntasks-per-node={job.ranks_per_node}", *(job.sbatch or ())]
