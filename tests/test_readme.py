"""The README does what it says: the quickstart's figures, every command in it, every table."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from opd_cache.queries import example_names, example_sql
from opd_cache.recipes import load_recipe
from opd_cache.schema import TABLES
from opd_cache.store.query import query_rows

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def bash(script: str, folder: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "120"}
    return subprocess.run(
        ["bash", "-euc", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the real quickstart was run, models made included."""
    folder = tmp_path_factory.mktemp("quickstart")
    result = bash("opd-cache run quickstart", folder)
    assert result.returncode == 0, result.stderr
    for text in ("student before", "student after episode 11", "teacher main", "time: rollout", "bytes", "next:"):
        assert text in result.stdout
    return folder


def test_the_quickstart_teaches_the_student(quickstart: Path) -> None:
    status = json.loads(bash("opd-cache status runs/quickstart --json", quickstart).stdout)
    before, teacher = status["baseline"], status["teacher"]
    after = status["episodes"][-1]["eval"]
    assert status["episodes_done"] == status["num_episodes"] == 12
    assert after["sampled_accuracy"] - before["sampled_accuracy"] >= 0.40
    assert teacher["sampled_accuracy"] - after["sampled_accuracy"] <= 0.08
    assert after["reverse_kl"] < 0.1 < before["reverse_kl"]


def test_the_commands_under_next_work(quickstart: Path) -> None:
    output = bash("opd-cache run quickstart", quickstart).stdout
    commands = [line.strip() for line in output.split("next:")[1].splitlines() if line.strip()]
    assert len(commands) == 3
    for command in commands:
        result = bash(command, quickstart)
        assert result.returncode == 0, result.stderr


def test_every_command_of_the_readme_works(quickstart: Path) -> None:
    blocks = [block for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if "tools/" not in block]
    assert len(blocks) >= 3
    for block in blocks:
        result = bash(block, quickstart)
        assert result.returncode == 0, f"{block}\n{result.stderr}"


def test_every_ready_query_and_documented_column_has_something_to_say_of_the_quickstart(quickstart: Path) -> None:
    run = quickstart / "runs/quickstart"
    rows = {name: query_rows(run, example_sql(name))[1] for name in example_names()}
    # There is one teacher, no prompt comes twice, and a good run has nothing to warn of.
    assert {name for name, found in rows.items() if not found} <= {
        "teacher-disagreement", "prompts-that-got-worse", "empty-responses", "loops", "unlikely-tokens",
    }  # fmt: skip
    for view, columns in TABLES.items():
        if view != "teacher_prompts":  # the quickstart's teacher has no prompts of its own
            names = [column.name for column in columns if not column.optional]
            assert len(query_rows(run, f"SELECT {', '.join(names)} FROM {view} LIMIT 5")[1]) > 0, view


def test_the_readmes_own_loss_can_be_named_in_a_recipe(quickstart: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (quickstart / "my_losses.py").write_text(code)
    script = """
    mkdir -p runs/own/episode=0
    cp runs/quickstart/run.json runs/quickstart/*.parquet runs/own/
    cp -rl runs/quickstart/episode=0/plan.json runs/quickstart/episode=0/rollouts runs/quickstart/episode=0/scores runs/own/episode=0/
    opd-cache learn quickstart run_dir=runs/own learn.loss.name=my_losses:SQUARED --episode 0
    """
    result = bash(script, quickstart)
    assert result.returncode == 0, result.stderr
    assert (quickstart / "runs/own/episode=0/policy/_COMPLETE.json").exists()


def test_the_recipes_of_the_readme_are_recipes(tmp_path: Path) -> None:
    snippets = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    learned_from = []
    for snippet in snippets:
        (tmp_path / "more.yaml").write_text(snippet)
        learned_from.append(load_recipe(["gsm8k_qwen", str(tmp_path / "more.yaml")]).learning_teachers())
    assert learned_from == [["main"], ["main"], ["main", "math", "hinted"]]


def test_the_tables_of_columns_are_those_of_the_schema() -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools/render_readme.py"), "--check"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_the_files_that_the_readme_names_exist() -> None:
    named = set(re.findall(r"`((?:opd_cache|configs|tools)/[\w./]+)`", README))
    assert len(named) > 8
    assert [name for name in named if not (ROOT / name).exists()] == []
