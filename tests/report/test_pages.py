"""The pages in a browser: what they show, how they are walked by keyboard, and that no text of a run becomes markup."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opd_cache.queries import example_names
from opd_cache.report import live
from opd_cache.report.serve import PageServer
from opd_cache.run_dir import RunDir
from opd_cache.status import kept_warnings
from opd_cache.store.query import query_rows

Open = Callable[..., Any]
PAGES = {"overview": "Overview", "samples": "Samples", "response": "Rollout", "sql": "SQL", "health": "Health"}
# Every control has a name, every table a caption, every header a scope, and no two elements share an id.
FAULTS = """() => {
    const named = (e) => e.labels?.length || e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.textContent.trim();
    const bad = [...document.querySelectorAll('button, a, input, select, textarea, summary, [role=img], [role=listbox]')].filter((e) => !named(e));
    const tables = [...document.querySelectorAll('table')].filter((t) => !t.caption || [...t.querySelectorAll('thead th')].some((h) => h.scope !== 'col'));
    const ids = [...document.querySelectorAll('[id]')].map((e) => e.id);
    const twice = ids.filter((id, place) => ids.indexOf(id) !== place);
    const headings = document.querySelectorAll('h1').length === 1 ? [] : ['h1'];
    return [...bad, ...tables].map((e) => e.outerHTML.slice(0, 200)).concat(twice, headings);
}"""


def go(page: Any, address: str, place: str, title: str) -> None:
    page.goto(f"{address}#/{place}")
    page.get_by_role("heading", level=1, name=title).wait_for()


def rows_of(page: Any) -> list[str]:
    return page.locator(".samples tbody th").all_inner_texts()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_page_is_drawn_named_and_as_wide_as_the_screen(
    address: str, open_page: Open, tmp_path: Path, width: int, theme: str
) -> None:
    page = open_page(address, width=width, theme=theme)
    for place, title in PAGES.items():
        go(page, address, f"{place}?example=reverse-kl-by-episode", title)
        page.wait_for_timeout(100)
        assert page.evaluate(FAULTS) == []
        assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
        assert len(page.screenshot(path=tmp_path / f"{place}.png", full_page=True)) > 10_000
        bright = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9.]+/g).map(Number)[0]")
        assert (bright > 128) == (theme == "light")


def test_every_curve_has_ink_a_spoken_summary_and_a_table(address: str, open_page: Open, run_path: Path) -> None:
    page = open_page(address)
    page.wait_for_selector(".chart canvas")
    titles = page.locator(".chart h2").all_inner_texts()
    assert set(titles) >= {
        "Accuracy",
        "Reverse KL",
        "Entropy",
        "Teacher's entropy",
        "Response length",
        "Truncated",
        "Speed",
    }
    has_ink = "(c) => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((v) => v > 0)"
    assert all(canvas.evaluate(has_ink) for canvas in page.locator(".chart canvas").all())
    chart = page.locator("figure", has=page.get_by_role("heading", name="Reverse KL", exact=True))
    sql = "SELECT sum(reverse_kl_sum) / sum(num_scored_tokens) FROM samples GROUP BY episode ORDER BY episode"
    first, last = (f"{value:.{1 if value >= 10 else 2}f}" for (value,) in query_rows(run_path, sql)[1])
    spoken = chart.get_by_role("img").get_attribute("aria-label")
    assert f"rollouts: {first} at episode 0, {last} at episode 1." in spoken
    chart.get_by_text("Numbers").click()
    assert first in chart.locator("tbody").inner_text()
    toggle = chart.get_by_role("button", name="held-out")
    toggle.click()
    assert toggle.get_attribute("aria-pressed") == "false"
    assert "learn" in page.get_by_role("table", name="Cost by stage of tiny").inner_text()


def test_filters_narrow_the_table_and_stay_in_the_address(address: str, open_page: Open, run_path: Path) -> None:
    page = open_page(f"{address}#/samples")
    page.get_by_text("1 to 25 of 28").first.wait_for()
    page.get_by_label("Episode").select_option("1")
    page.get_by_text("1 to 14 of 14").first.wait_for()
    assert all(name.startswith("1/") for name in rows_of(page))
    page.get_by_label("Text in prompt").fill("onerror")
    page.get_by_role("button", name="Filter").click()
    page.get_by_text("1 to 2 of 2").first.wait_for()
    assert sorted(rows_of(page)) == ["1/1/0", "1/1/1"]
    page.reload()
    page.get_by_text("1 to 2 of 2").first.wait_for()
    assert page.get_by_label("Text in prompt").input_value() == "onerror"
    page.get_by_role("button", name="Clear").click()
    page.get_by_text("1 to 25 of 28").first.wait_for()
    page.get_by_role("button", name="Next").first.click()
    page.get_by_text("26 to 28 of 28").first.wait_for()
    assert page.get_by_role("status").first.inner_text() == "28 samples, from 26"
    page.get_by_label("Reverse KL from").fill("99")
    page.get_by_role("button", name="Filter").click()
    page.get_by_text("No sample is all of this.").first.wait_for()


def test_headers_sort_and_say_so(address: str, open_page: Open, run_path: Path) -> None:
    page = open_page(f"{address}#/samples")
    header = page.get_by_role("columnheader", name="Tokens")
    assert header.get_attribute("aria-sort") == "none"
    for way, word in (("DESC", "descending"), ("ASC", "ascending")):
        header.get_by_role("button").press("Enter")
        page.wait_for_selector(f"th[aria-sort={word}] [data-sort=num_response_tokens]")
        sql = f"SELECT rollout_id FROM samples ORDER BY num_response_tokens {way}, episode, rollout_id LIMIT 25"
        assert rows_of(page) == [one for (one,) in query_rows(run_path, sql)[1]]
        assert page.evaluate("document.activeElement.dataset.sort") == "num_response_tokens"


def test_the_token_view_shows_numbers_and_alternatives(address: str, open_page: Open, run_path: Path) -> None:
    sql = "SELECT rollout_id, position, advantage, student_logprob, teacher_logprob, len(topk_ids) FROM tokens WHERE episode = 1 AND position = 2 ORDER BY advantage LIMIT 1"
    ((rollout, position, advantage, student, teacher, top_k),) = query_rows(run_path, sql)[1]
    page = open_page(f"{address}#/samples?episode=1")
    page.get_by_role("link", name=rollout, exact=True).click()
    page.get_by_role("heading", level=1, name=f"Rollout {rollout}").wait_for()
    details, token = page.locator(".details"), page.locator(f"#token-{position}")
    token.hover()
    for value in (f"{advantage:+.3f} nats", f"({student:.3f})", f"({teacher:.3f})", f"{position} of "):
        assert value.replace("-", "−") in details.inner_text()
    assert details.locator(".alternatives tbody tr").count() == top_k + 1
    page.locator("h1").hover()
    assert f"{position} of " not in details.inner_text() or token.get_attribute("aria-selected") == "true"
    token.click()
    assert token.get_attribute("aria-selected") == "true"
    assert page.get_by_role("listbox").get_attribute("aria-activedescendant") == f"token-{position}"


def test_colours_follow_the_bands_of_inspect(address: str, open_page: Open, run_path: Path) -> None:
    page = open_page(f"{address}#/response?episode=0&rollout=0/2/0")
    sql = "SELECT advantage FROM tokens WHERE rollout_id = '0/2/0' ORDER BY position"
    limits = ((-5, "h-worst"), (-2, "h-bad"), (-0.5, "h-poor"), (0.5, "h-even"), (2, "h-good"), (99, "h-best"))
    wanted = [next(name for limit, name in limits if value < limit) for (value,) in query_rows(run_path, sql)[1]]
    found = page.locator(".response-text .token").evaluate_all("all => all.map((one) => one.className)")
    assert [name.split()[1] for name in found] == wanted
    assert len(set(wanted)) > 2


def test_a_response_is_read_with_the_keyboard_alone(address: str, open_page: Open) -> None:
    page = open_page(f"{address}#/response?episode=0&rollout=0/2/0")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    box = page.get_by_role("listbox")
    for _ in range(20):
        if box.evaluate("box => box === document.activeElement"):
            break
        page.keyboard.press("Tab")
    chosen = lambda: int(box.get_attribute("aria-activedescendant").removeprefix("token-"))  # noqa: E731
    last = page.locator(".response-text .token").count() - 1
    for key, place in (("Home", 0), ("ArrowLeft", 0), ("ArrowRight", 1), ("End", last), ("ArrowRight", last)):
        page.keyboard.press(key)
        assert chosen() == place
    page.keyboard.press("Home")
    low = page.locator(".token.h-bad, .token.h-worst").evaluate_all("all => all.map((one) => one.id).filter(Boolean)")
    page.keyboard.press("n")
    assert f"token-{chosen()}" == next((one for one in low if one != "token-0"), "token-0")
    page.keyboard.press("]")
    page.get_by_role("heading", level=1, name="Rollout 1/2/0").wait_for()
    assert page.evaluate("document.activeElement.tagName") == "H1"
    page.keyboard.press("[")
    page.get_by_role("heading", level=1, name="Rollout 0/2/0").wait_for()
    page.get_by_role("link", name=re.compile(r"episode 1 #1")).press("Enter")
    page.get_by_role("heading", level=1, name="Rollout 1/2/1").wait_for()
    page.go_back()
    page.get_by_role("heading", level=1, name="Rollout 0/2/0").wait_for()


def test_markup_in_a_prompt_is_shown_as_text(address: str, open_page: Open) -> None:
    page = open_page(f"{address}#/response?episode=0&rollout=0/0/0")
    assert page.locator(".prompt-text").inner_text() == "</script><script>document.title='run'</script>:"
    go(page, address, "samples?prompt=1", "Samples")
    assert "<img src=x onerror=alert(1)>:" in page.locator(".samples").inner_text()
    go(page, address, "sql", "SQL")
    page.get_by_label("One SELECT").fill("SELECT text, '<b>x</b>' AS \"<i>name</i>\" FROM prompts ORDER BY 1")
    page.get_by_role("button", name="Run").click()
    page.get_by_text("7 rows").wait_for()
    assert "<i>name</i>" in page.locator(".result thead").inner_text()
    assert page.locator("main img, main script, main b > i, .result b, .result i").count() == 0
    assert "opd-cache" in page.title()


def test_the_sql_box_answers_draws_and_refuses_in_one_line(address: str, open_page: Open) -> None:
    page = open_page(f"{address}#/sql")
    page.get_by_label("Ready query").select_option("reverse-kl-by-position")
    page.wait_for_selector(".answer .chart canvas")
    assert page.get_by_label("One SELECT").input_value().startswith("-- Mean reverse KL")
    box = page.get_by_label("One SELECT")
    box.fill("SELECT count(*) AS n FROM samples")
    box.press("Control+Enter")
    page.get_by_text("1 row in").wait_for()
    assert page.locator(".result tbody").inner_text().strip() == "28"
    box.fill("COPY samples TO '/tmp/x.csv'")
    page.get_by_role("button", name="Run").click()
    page.locator(".status.error").wait_for()
    assert page.locator(".status").inner_text() == "the query is COPY; expected SELECT, since a query only reads."
    assert page.locator(".result").count() == 0
    page.get_by_text("samples", exact=True).last.click()
    assert page.get_by_text("Sum over the scored tokens of student − teacher").is_visible()


def test_every_ready_query_can_be_chosen(address: str, open_page: Open) -> None:
    page = open_page(f"{address}#/sql")
    for name in example_names():
        page.get_by_label("Ready query").select_option(name)
        page.wait_for_function("name => location.hash.includes(name)", arg=name)
        page.wait_for_function("() => / rows? in /.test(document.querySelector('.status').textContent)")


def test_several_runs_share_their_plots_and_are_chosen_by_name(
    open_page: Open, serve: Callable[..., PageServer], run_path: Path, copied_run: Path
) -> None:
    server = serve(tiny=run_path, other=copied_run)
    page = open_page(server.url)
    legend = page.locator("figure", has=page.get_by_role("heading", name="Truncated")).locator(".legend")
    assert "tiny: truncated" in legend.inner_text()
    assert "other: truncated" in legend.inner_text()
    assert page.get_by_role("table", name="Runs side by side").locator("tbody tr").count() == 2
    go(page, server.url, "samples", "Samples")
    page.locator("select[name=run]").select_option("other")
    page.locator(".samples a[href*='run=other']").first.click()
    page.get_by_role("heading", level=1, name="Rollout").wait_for()
    assert "run=other" in page.url
    go(page, server.url, "sql", "SQL")
    page.locator("select[name=run]").select_option(label="all runs, as NAME.view")
    page.get_by_label("One SELECT").fill("SELECT count(*) AS n FROM tiny.steps JOIN other.steps USING (step)")
    page.get_by_role("button", name="Run").click()
    page.get_by_text("1 row in").wait_for()


def test_the_page_follows_a_live_run(
    open_page: Open, serve: Callable[..., PageServer], copied_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "RECHECK_S", 0.0)
    shutil.move(copied_run / "episode=1", tmp_path / "later")
    page = open_page(f"{serve(copy=copied_run).url}#/samples")
    page.get_by_text("1 to 14 of 14").first.wait_for()
    page.wait_for_timeout(300)
    shutil.move(tmp_path / "later", copied_run / "episode=1")
    page.get_by_text("1 to 25 of 28").first.wait_for()
    assert page.get_by_role("status").first.inner_text() == "The run has gone on; the page is up to date."


def test_the_theme_button_goes_round_and_is_remembered(address: str, open_page: Open) -> None:
    page = open_page(address, theme="dark")
    button = page.get_by_role("button", name="Theme")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    button.click()
    assert button.inner_text() == "Theme: light"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
    page.reload()
    assert button.inner_text() == "Theme: light"
    button.click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == dark


def test_health_shows_warnings_and_what_is_missing(
    open_page: Open, serve: Callable[..., PageServer], copied_run: Path
) -> None:
    page = open_page(f"{serve(copy=copied_run).url}#/health")
    warnings = kept_warnings(RunDir(copied_run))
    assert f"{len(warnings)} warnings, 0 stages with gaps" in page.locator(".verdict.warn").inner_text()
    shown = page.get_by_role("table", name="Warnings").inner_text()
    assert all(warning["text"] in shown and warning["query"] in shown for warning in warnings)
    shutil.rmtree(copied_run / "logs/health")
    page = open_page(f"{serve(copy=copied_run).url}#/health")
    assert "are there and sealed" in page.locator(".verdict.good").inner_text()
    (copied_run / "episode=1/scores/teacher=main/shard-00001-of-00002.parquet").unlink()
    page = open_page(f"{serve(copy=copied_run).url}#/health")
    assert "1 stages with gaps" in page.locator(".verdict.warn").inner_text()
    assert "sealed, but shards are gone" in page.get_by_role("table", name="Gaps").inner_text()


def test_what_the_server_refuses_is_said(open_page: Open, run_path: Path, serve: Callable[..., PageServer]) -> None:
    page = open_page(f"{serve(tiny=run_path).url}#/samples")
    page.route("**/api/samples*", lambda route: route.fulfill(status=400, json={"error": "it is no more"}))
    page.get_by_label("Episode").select_option("1")
    page.get_by_role("alert").wait_for()
    assert page.get_by_role("alert").inner_text() == "it is no more"
