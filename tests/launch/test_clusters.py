"""Cluster files: what they may say, and the batch scripts that come of it. No Slurm is needed."""

import subprocess
from pathlib import Path

import pytest

from opd_cache.errors import ConfigError
from opd_cache.launch.clusters import load_cluster, packaged_clusters
from opd_cache.launch.scripts import render_scripts, write_scripts
from opd_cache.launch.slurm import array_indices, array_text, job_label
from opd_cache.run_dir import RunDir


@pytest.fixture
def cluster_file(tmp_path: Path) -> Path:
    return tmp_path / "cluster.yaml"


@pytest.mark.parametrize("name", sorted(packaged_clusters()))
def test_every_packaged_cluster_gives_scripts_that_bash_can_read(name: str, tmp_path: Path) -> None:
    scripts = render_scripts(RunDir(tmp_path / "run"), tmp_path, "/usr/bin/python3", load_cluster(name))
    assert [script.stage for script in scripts] == ["rollout", "score", "learn", "eval"]
    for script in scripts:
        subprocess.run(["bash", "-n"], input=script.text, text=True, check=True)


def test_a_stage_says_more_than_the_defaults_and_the_command_line_most(cluster_file: Path) -> None:
    cluster_file.write_text("defaults: {mem: 1G, time: '10:00'}\nscore: {mem: 2G, num_tasks: 4}\n")
    jobs = load_cluster(str(cluster_file), ["cluster.score.num_tasks=8"]).jobs
    assert (jobs["rollout"].mem, jobs["rollout"].time) == ("1G", "10:00")
    assert (jobs["score"].mem, jobs["score"].time, jobs["score"].num_tasks) == ("2G", "10:00", 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rolout: {}", r"rolout is unknown\. Known: defaults, eval, learn"),
        ("score: {partitoin: a}", r"score\.partitoin is unknown"),
        ("score: {time: 60}", r"score\.time = 60 must be text, in quotes"),
        ("score: {num_tasks: 0}", r"score\.num_tasks = 0 is too small"),
        ("score: {nodes: 2}", r"score\.nodes = 2: only learn runs as several processes"),
        ('score: {partition: "a b"}', r"score\.partition = 'a b' must be one word without quotes"),
        ('score: {account: "$(id)"}', r"score\.account = '\$\(id\)' must be one word"),
        ('score: {gres: "gpu:1\\n#SBATCH --uid=0"}', r"score\.gres = .* must be one word"),
        ('score: {sbatch: ["--comment=a\\nrm"]}', r"score\.sbatch = .* must be an sbatch option on one line"),
        ("score: {sbatch: [exclusive]}", r"score\.sbatch = 'exclusive' must be an sbatch option"),
        ('score: {command: "a\\nb"}', r"score\.command = .* must be one line"),
    ],
)
def test_what_a_cluster_file_must_not_say_is_one_line(cluster_file: Path, text: str, message: str) -> None:
    cluster_file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_cluster(str(cluster_file))
    assert "\n" not in str(caught.value)


def test_an_edited_script_is_kept_and_an_unedited_one_follows_the_cluster_file(
    cluster_file: Path, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")

    def render(text: str) -> dict[str, tuple[str, bool]]:
        cluster_file.write_text(text)
        scripts = render_scripts(run, tmp_path, "python3", load_cluster(str(cluster_file)))
        write_scripts(scripts)
        return {script.stage: (script.path.read_text(), script.is_edited) for script in scripts}

    render("defaults: {mem: 1G}")
    score = run.job_script("score")
    score.write_text(score.read_text().replace("--mem=1G", "--mem=7G"))
    found = render("defaults: {mem: 2G}")
    assert "--mem=2G" in found["rollout"][0]
    assert not found["rollout"][1]
    assert "--mem=7G" in found["score"][0]
    assert found["score"][1]
    score.unlink()
    assert "--mem=2G" in render("defaults: {mem: 2G}")["score"][0]


def test_a_template_of_ones_own_is_filled_and_an_unknown_field_refused(cluster_file: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.sh"
    own.write_text("#!/bin/bash\n#SBATCH --output={{log}}\n{{sbatch}}\nnumber=$1\n{{command}}\n")
    cluster_file.write_text(f"template: {own}\ndefaults: {{partition: a}}\n")

    def render() -> str:
        scripts = render_scripts(RunDir(tmp_path / "run"), tmp_path, "python3", load_cluster(str(cluster_file)))
        return scripts[0].text

    assert "#SBATCH --partition=a\n" in render()
    assert "python3 -m opd_cache rollout " in render()
    own.write_text("{{wall_time}}")
    with pytest.raises(ConfigError, match=r"\{\{wall_time\}\} is unknown\. Known: command"):
        render()


def test_a_run_directory_that_no_batch_script_can_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose one without blanks"):
        render_scripts(RunDir(tmp_path / "my run"), tmp_path, "python3", load_cluster("single_node"))


@pytest.mark.parametrize(
    ("indices", "text"), [([0], "0"), ([3, 5, 6, 7], "3,5-7"), ([0, 1, 2], "0-2"), ([9, 2, 4], "2,4,9")]
)
def test_array_indices_are_written_and_read_alike(indices: list[int], text: str) -> None:
    assert array_text(indices) == text
    assert array_indices(f"{text}%3") == sorted(indices)


def test_runs_of_one_name_in_different_folders_have_jobs_of_different_names(tmp_path: Path) -> None:
    labels = {job_label(tmp_path / "a" / "run"), job_label(tmp_path / "b" / "run")}
    assert len(labels) == 2
    assert all("." not in label for label in labels)
