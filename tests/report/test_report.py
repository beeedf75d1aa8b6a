"""opd-cache report: one file that opens from the disk without a network, and what it shows of the run."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import run_command
from test_pages import FAULTS, PAGES, rows_of

from opd_cache.queries import example_names
from opd_cache.store.query import query_rows

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def report(run_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "tiny.html"
    done = run_command("report", str(run_path), "--output", str(path), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    printed = json.loads(done.stdout)
    assert (printed["file"], printed["bytes"]) == (str(path), path.stat().st_size)
    assert 12 <= printed["responses"] < 28
    return path


def test_a_report_names_no_other_file_and_holds_its_texts_as_data(report: Path) -> None:
    text = report.read_text()
    assert re.findall(r"""(?:src|href)=["'](?!#main|data:,)[^"']*["']""", text.split("<script")[0]) == []
    assert len(re.findall(r"</script", text)) == 3  # the data, the import map, the start
    assert "onerror" in text
    assert "<img" not in text
    assert "Content-Security-Policy" in text.split("<style")[0]


def test_a_report_opens_from_the_disk_without_a_network(report: Path, open_page: Open, tmp_path: Path) -> None:
    page = open_page(report.as_uri(), offline=True)
    for place, title in PAGES.items():
        page.goto(f"{report.as_uri()}#/{place}")
        page.get_by_role("heading", level=1, name=title).wait_for()
        assert page.evaluate(FAULTS) == []
        assert len(page.screenshot(path=tmp_path / f"{place}.png")) > 10_000
    assert page.locator("#live").inner_text() == ""


def test_its_samples_are_filtered_sorted_and_read(report: Path, open_page: Open, run_path: Path) -> None:
    page = open_page(f"{report.as_uri()}#/samples", offline=True)
    assert "some of 28 samples" in page.locator("main").inner_text()
    page.get_by_label("Chosen as").select_option("worst")
    page.get_by_text("of 6").first.wait_for()
    sql = "SELECT rollout_id FROM samples WHERE episode = {} ORDER BY reverse_kl_mean DESC LIMIT 3"
    worst = [one for episode in (0, 1) for (one,) in query_rows(run_path, sql.format(episode))[1]]
    assert sorted(rows_of(page)) == sorted(worst)
    page.get_by_role("button", name="Clear").click()
    page.get_by_label("Text in prompt").fill("ONERROR")
    page.get_by_role("button", name="Filter").click()
    page.wait_for_function("() => document.querySelector('.samples tbody').innerText.includes('onerror')")
    assert {name.split("/")[1] for name in rows_of(page)} == {"1"}
    page.locator(".samples a").first.click()
    page.get_by_role("heading", level=1, name="Rollout").wait_for()
    assert page.locator(".prompt-text").inner_text() == "<img src=x onerror=alert(1)>:"
    page.goto(f"{report.as_uri()}#/samples?chosen=followed&episode=0")
    page.locator(".samples a[href*='episode=0']").first.click()
    page.get_by_role("heading", level=1, name="Rollout 0/").wait_for()
    page.keyboard.press("]")
    page.get_by_role("heading", level=1, name="Rollout 1/").wait_for()
    assert page.locator("main img").count() == 0


def test_it_shows_the_answers_of_all_ready_queries(report: Path, open_page: Open) -> None:
    page = open_page(f"{report.as_uri()}#/sql", offline=True)
    for name in example_names():
        page.get_by_label("Ready query").select_option(name)
        page.wait_for_function("name => location.hash.includes(name)", arg=name)
        assert page.locator(".status").inner_text().split()[1].startswith("row")
    assert page.get_by_label("Its SQL").get_attribute("readonly") is not None


def test_a_report_is_named_by_its_run_and_never_overwritten(run_path: Path, report: Path, tmp_path: Path) -> None:
    done = run_command("report", str(run_path), "--run", f"other={run_path}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tiny.html: ")
    done = run_command("report", str(run_path), "--output", str(report))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"ConfigError: {report}: exists and is not overwritten; choose another name.\n"
