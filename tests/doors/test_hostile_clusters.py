"""Cluster files with shell in every field: nothing of it is run by the batch scripts but setup and command, which are shell."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from doors import answered_or_refused, examples, refusal, touching_only
from fault_log import FaultLog, SilentError
from hypothesis import given
from hypothesis import strategies as st

from opd_cache.errors import ConfigError
from opd_cache.launch.clusters import load_cluster
from opd_cache.launch.scripts import render_scripts
from opd_cache.run_dir import RunDir

ROW = "hostile cluster files"
SHELL = [
    "$(touch canary)", "`touch canary`", "$(touch${IFS}canary)", "a; touch canary", "a\ntouch canary", "a\rtouch canary", "a\0b",
    "a && touch canary", "a | touch canary", "' ; touch canary ; '", '" ; touch canary ; "', "\\\ntouch canary", "-x", "--help",
    "--wrap=touch canary", "#\ntouch canary", "\u2028touch canary", "\x0btouch canary", "\x85touch canary", "${PATH:0:1}",
    "{{command}}", "{{setup}}\n", "%j", "a\n#SBATCH --uid=0", "$'\\ntouch canary'", "<(touch canary)", "!!", "~", "*", "a" * 5000,
]  # fmt: skip
TEXTS = ["partition", "account", "qos", "constraint", "gres", "mem", "time"]


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs that do nothing, in the place of Slurm's and of Python."""
    folder = tmp_path_factory.mktemp("stubs")
    for name in ("srun", "squeue", "scontrol", "scancel", "python", "hostname", "date"):
        (folder / name).write_text("#!/bin/bash\nexit 0\n")
        (folder / name).chmod(0o755)
    return folder


def executed(scripts: list, stubs: Path, folder: Path) -> None:
    """Read by bash, then run; what makes a file named canary was run."""
    for script in scripts:
        for shell in (["bash", "-n"], ["bash", "-s", "0", "1"]):
            environment = {"PATH": f"{stubs}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "HOME": str(folder)}
            ended = subprocess.run(
                shell, input=os.fsencode(script.text), cwd=folder, env=environment, capture_output=True, timeout=20
            )
            assert ended.returncode == 0, (ended.stderr, script.text)
    if found := [path for path in folder.rglob("*canary*") if path.is_file()]:
        raise SilentError(f"a field was run: {found}")


@examples(60, 3000)
@given(
    fields=st.dictionaries(st.sampled_from(TEXTS), st.sampled_from(SHELL) | st.text(max_size=12), max_size=3),
    sbatch=st.lists(st.sampled_from([f"--comment={one}" for one in SHELL] + SHELL), max_size=2),
    stage=st.sampled_from(["defaults", "rollout", "score", "learn", "eval"]),
)
def test_no_field_of_a_cluster_file_is_run(
    faults: FaultLog, stubs: Path, tmp_path: Path, fields: dict[str, str], sbatch: list[str], stage: str
) -> None:
    job = {**fields, **({"sbatch": sbatch} if sbatch else {})}
    (tmp_path / "cluster.yaml").write_text(
        yaml.safe_dump({stage: job}, allow_unicode=True), encoding="utf-8", errors="replace"
    )
    with faults.trial(ROW, "shell in fields"):
        with refusal() as said:
            cluster = load_cluster(str(tmp_path / "cluster.yaml"))
        if said:
            return
        executed(render_scripts(RunDir(tmp_path / "run"), tmp_path, str(stubs / "python"), cluster), stubs, tmp_path)


def test_what_gets_through_a_field_is_still_one_option(tmp_path: Path, stubs: Path, faults: FaultLog) -> None:
    """The strings that are taken, one by one: each stays on the line of its option."""
    taken = 0
    for text in SHELL:
        (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({"defaults": {"sbatch": [f"--comment={text}"]}}))
        try:
            cluster = load_cluster(str(tmp_path / "cluster.yaml"))
        except ConfigError:
            continue
        taken += 1
        with faults.trial(ROW, f"sbatch option {text[:30]!r}"):
            scripts = render_scripts(RunDir(tmp_path / "run"), tmp_path, str(stubs / "python"), cluster)
            assert f"\n#SBATCH --comment={text}\n" in scripts[0].text
            executed(scripts, stubs, tmp_path)
    assert taken > 10


@pytest.mark.parametrize(
    "name", [one for one in SHELL if "/" not in one and "\0" not in one and len(one) < 200], ids=ascii
)
def test_no_name_of_a_folder_or_a_program_is_run(faults: FaultLog, tmp_path: Path, stubs: Path, name: str) -> None:
    folder = tmp_path / f"x{name}"
    folder.mkdir()
    python = folder / "python"
    python.write_text("#!/bin/bash\nexit 0\n")
    python.chmod(0o755)
    cluster = load_cluster("single_node")
    with faults.trial(ROW, f"a folder named {name[:30]!r}"):
        for run in (folder / "run", tmp_path / "run"):
            with refusal() as said:
                scripts = render_scripts(RunDir(run), folder, str(python), cluster)
            if said:
                assert "run_dir = " in said[0]
                continue
            executed(scripts, stubs, tmp_path)


@pytest.mark.parametrize("value", [*SHELL, 3, -1, 2**63, [], {}, None, True, 1.5], ids=ascii)
def test_the_command_refuses_in_one_line_or_shows_the_scripts(
    faults: FaultLog, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: object
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    for key in ("partition", "num_tasks", "setup"):
        (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({"defaults": {key: value}}))
        with faults.trial(ROW, f"submit --dry-run {key} = {value!r:.30}"), touching_only():
            answered_or_refused(
                "submit", task / "recipe.yaml", tmp_path / "cluster.yaml", f"run_dir={tmp_path}/run", "--dry-run"
            )
        assert not (tmp_path / "run").exists()
