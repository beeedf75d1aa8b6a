"""Figures of real runs: what they show is what queries say, and they are images that programs can open."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import run_command
from PIL import Image

from opd_cache.errors import ConfigError, MissingInputError
from opd_cache.plots.data import MAX_BINS, Chosen, curve, positions, spread, token_shares
from opd_cache.queries import example_sql
from opd_cache.run import Run
from opd_cache.store.query import query_rows

TOOLS = Path(__file__).parent.parent.parent / "tools"


@pytest.fixture(scope="module")
def big_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made run with responses of hundreds of tokens, never evaluated."""
    path = tmp_path_factory.mktemp("big") / "run"
    command = [
        sys.executable,
        TOOLS / "make_big_run.py",
        path,
        "--tokens",
        "60000",
        "--episodes",
        "12",
        "--shards",
        "1",
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return path


def test_a_curve_is_the_evaluations_and_the_episodes(finished_run: Run) -> None:
    run = finished_run.dir.path
    found = curve(Chosen("a", str(run)))
    status = json.loads(run_command("status", run, "--json").stdout)
    evaluations = [status["baseline"], *(episode["eval"] for episode in status["episodes"])]
    for points, key in ((found.sampled, "sampled_accuracy"), (found.greedy, "greedy_accuracy"), (found.heldout_kl, "reverse_kl")):  # fmt: skip
        assert points == [(version, pytest.approx(one[key])) for version, one in enumerate(evaluations)]
    assert found.teacher == pytest.approx(status["teacher"]["sampled_accuracy"])
    columns, rows = query_rows(run, example_sql("reverse-kl-by-episode"))
    place = columns.index("reverse_kl")
    assert found.training_kl == [(row[0], pytest.approx(row[place])) for row in rows]


def test_positions_are_those_of_the_query_without_the_thin_end(finished_run: Run) -> None:
    run = finished_run.dir.path
    sql = """SELECT episode, position, -avg(advantage), count(*) AS n FROM tokens GROUP BY 1, 2
        QUALIFY n >= 0.02 * max(n) OVER () ORDER BY 1, 2"""
    expected: dict[int, list] = {}
    for episode, position, value, _ in query_rows(run, sql)[1]:
        expected.setdefault(episode, []).append((position, pytest.approx(value)))
    assert positions(Chosen("a", str(run))).lines == expected


def test_long_responses_and_many_episodes_become_few_points(big_run: Path) -> None:
    lines = positions(Chosen("a", str(big_run))).lines
    assert list(lines) == [0, 2, 3, 5, 6, 8, 9, 11]
    assert all(20 < len(points) <= MAX_BINS for points in lines.values())
    assert spread([4, 5], 8) == [4, 5]


def test_token_shares_add_up_over_the_last_episode(finished_run: Run) -> None:
    run = finished_run.dir.path
    episode, tokens = token_shares(Chosen("a", str(run)))
    total, most = query_rows(run, "SELECT sum(-advantage), NULL FROM tokens WHERE episode = 1")[1][0][0], tokens[0]
    sql = "SELECT text, sum(-advantage), -avg(advantage) FROM tokens WHERE episode = 1 GROUP BY text, token_id ORDER BY 2 DESC LIMIT 1"
    ((text, kl, mean),) = query_rows(run, sql)[1]
    assert (episode, most.text) == (1, text)
    assert (most.share, most.mean) == (pytest.approx(kl / total), pytest.approx(mean))
    assert [token.share for token in tokens] == sorted((token.share for token in tokens), reverse=True)
    assert token_shares(Chosen("a", str(run), episode=0))[0] == 0


@pytest.mark.parametrize("kind", ["curve", "position", "tokens"])
def test_every_kind_is_an_image_of_one_run_and_of_two(
    kind: str, finished_run: Run, big_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_command("plot", finished_run.dir.path, kind)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{kind}.png\n", "")
    with Image.open(tmp_path / f"{kind}.png") as image:
        assert image.size[0] >= 1000
        assert len(image.convert("L").getcolors()) > 20  # something is drawn
    both = ("--run", f"ours={finished_run.dir.path}", "--run", f"$made$={big_run}")
    for ending in ("svg", "pdf"):
        done = run_command("plot", *both, kind, "--title", "two $runs$", "--output", f"{kind}.{ending}")
        assert (done.returncode, done.stdout) == (0, f"{kind}.{ending}\n"), done.stderr
    svg = (tmp_path / f"{kind}.svg").read_text()
    assert "reverse KL" in svg
    assert "two $runs$" in svg
    assert svg.count("ours") >= 1
    assert (tmp_path / f"{kind}.pdf").read_bytes().startswith(b"%PDF")


def test_what_cannot_be_drawn_is_one_line(finished_run: Run, tmp_path: Path) -> None:
    run = finished_run.dir.path
    (tmp_path / "taken.png").write_text("mine")
    for arguments, message in (
        (("plot", run, "pie"), f"UsageError: found {run} pie, expected RUN curve|position|tokens. See: opd-cache plot --help"),
        (("plot", run, "curve", "--output", "x.bmp"), "ConfigError: --output x.bmp: expected a name that ends in .png, .svg, .pdf."),
        (("plot", run, "curve", "--output", tmp_path / "taken.png"), f"ConfigError: {tmp_path}/taken.png: exists and is not overwritten; choose another name."),
        (("plot", run, "curve", "--episode", "1"), "ConfigError: --episode is for tokens; curve shows all episodes."),
    ):  # fmt: skip
        done = run_command(*arguments)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{message}\n")
    with pytest.raises(ConfigError, match=r"--teacher 'who' scored nothing in .*Known: main"):
        curve(Chosen("a", str(run), "who"))
    with pytest.raises(ConfigError, match="--episode 9: main has no sealed scores of it"):
        token_shares(Chosen("a", str(run), episode=9))
    with pytest.raises(MissingInputError):
        curve(Chosen("a", str(tmp_path)))


def test_without_matplotlib_the_command_says_what_to_install(finished_run: Run, tmp_path: Path) -> None:
    # An interpreter that finds no matplotlib, as where it was never installed.
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['matplotlib'] = None\n")
    places = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = run_command("plot", finished_run.dir.path, "curve", env={**os.environ, "PYTHONPATH": places})
    assert (done.returncode, done.stderr) == (
        2, "ConfigError: plot needs matplotlib, which is not installed. Run: pip install 'opd-cache[plot]'\n"
    )  # fmt: skip
