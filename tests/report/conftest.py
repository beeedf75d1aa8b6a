"""What the tests of pages share: a run with markup in its prompts, a server on it, one browser."""

import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import complete, opd_cache_command, write_jsonl

from opd_cache.config import Recipe
from opd_cache.limits import Limits
from opd_cache.report.pages import Runs
from opd_cache.report.serve import PageServer

CHROMIUM = "/usr/bin/chromium"
MARKUP = "</script><script>document.title='run'</script>:"
PROMPTS = [MARKUP, "<img src=x onerror=alert(1)>:", *(f"sort {word}:" for word in ("ba", "cab", "dcb", "fed", "hig"))]


@pytest.fixture(scope="session")
def run_path(make_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two episodes that both sample all prompts twice. Copy it before changing anything."""
    folder = tmp_path_factory.mktemp("pages")
    prompts = write_jsonl(folder / "prompts.jsonl", [{"prompt": text, "answer": "ab"} for text in PROMPTS])
    recipe = make_recipe(
        folder / "tiny", f"prompts.path={prompts}", f"rollout.prompts_per_episode={len(PROMPTS)}",
        "rollout.max_new_tokens=10",
    )  # fmt: skip
    complete(recipe)
    return folder / "tiny"


@pytest.fixture
def copied_run(run_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_path, tmp_path / "copy"))


@pytest.fixture(scope="session")
def address(run_path: Path) -> Iterator[str]:
    """Of `opd-cache serve`, begun as a user does."""
    command = opd_cache_command("serve", str(run_path), "--port", "0", "--json")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        yield json.loads(process.stdout.readline())["url"]
        process.terminate()
        assert process.communicate()[1] == ""


@pytest.fixture
def serve() -> Iterator[Callable[..., PageServer]]:
    """serve(name=path, ..., host="...") answers in this process until the test ends."""
    started: list[PageServer] = []

    def begin(host: str = "127.0.0.1", partial: bool = False, **paths: Path) -> PageServer:
        server = PageServer(Runs(paths, partial, Limits("1GB", 30)), host, 0)
        server.runs.watch()
        started.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        return server

    yield begin
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    """Debian's Chromium. Ended with a file's tests: while it runs, others cannot start an event loop."""
    if not Path(CHROMIUM).exists():
        pytest.skip(f"no {CHROMIUM}: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Complaints(list):
    """What a page's console and its policy say, but for answers of the server that refuse something."""

    def watch(self, page: object) -> None:
        page.on("console", lambda message: "/api/" in message.location["url"] or self.append(message.text))
        page.on("pageerror", lambda error: self.append(str(error)))


@pytest.fixture
def open_page(browser: object) -> Iterator[Callable[..., object]]:
    """open_page(address, width=..., theme=..., offline=...) loads one in a fresh profile, which must complain of nothing."""
    contexts, complaints = [], Complaints()

    def load(address: str, width: int = 1280, theme: str = "light", offline: bool = False) -> object:
        viewport = {"width": width, "height": 900}
        contexts.append(browser.new_context(viewport=viewport, color_scheme=theme, offline=offline))
        page = contexts[-1].new_page()
        page.set_default_timeout(15_000)
        complaints.watch(page)
        page.goto(address)
        page.wait_for_selector("h1")
        return page

    yield load
    for context in contexts:
        context.close()
    assert complaints == []
