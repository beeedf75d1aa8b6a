"""Makes the README's screenshots of `opd-cache serve` from a real run, like the quickstart's.

    python tools/screenshots.py [--run RUN] [--into docs/screenshots] [--keep FOLDER]

Without --run the quickstart is run with fewer prompts, so that later episodes sample the same ones again: minutes on two
cores, in a temporary folder or in --keep FOLDER. Needs Playwright and Debian's Chromium.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parent.parent
CHROMIUM = "/usr/bin/chromium"
LARGEST_BYTES = 300_000
# name, address, theme, width and height
SHOTS = [
    ("overview-light", "overview", "light", (1280, 860)),
    ("tokens-dark", "response", "dark", (1280, 720)),
    ("samples-light", "samples", "light", (1280, 720)),
    ("sql-dark", "sql?example=reverse-kl-by-position", "dark", (1280, 860)),
]
WORST = "SELECT episode, rollout_id FROM samples WHERE episode = 1 AND num_response_tokens BETWEEN 9 AND 12 ORDER BY reverse_kl_sum DESC LIMIT 1"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "opd_cache", *arguments]


def make_run(folder: Path) -> Path:
    """The quickstart on 640 prompts, all of them in every episode."""
    subprocess.run(command("run", "quickstart", "prompts.limit=640"), cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder / "runs" / "quickstart"


@contextmanager
def served(run: Path) -> Iterator[str]:
    """The address of a server on this run."""
    with subprocess.Popen(
        command("serve", str(run), "--port", "0", "--json"), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"]
        process.terminate()


def response_address(run: Path) -> str:
    """Of a response that the teacher minds, short enough to be seen whole."""
    done = subprocess.run(command("query", str(run), WORST, "--json"), check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    return f"response?episode={found['episode']}&rollout={found['rollout_id']}"


def shoot(page: Page, address: str, path: Path) -> None:
    page.goto(address)
    page.wait_for_selector("h1")
    page.wait_for_timeout(500)
    page.screenshot(path=path)
    if path.stat().st_size > LARGEST_BYTES:
        sys.exit(f"{path}: {path.stat().st_size} bytes, at most {LARGEST_BYTES}.")
    print(f"{path}: {path.stat().st_size:,} bytes")


def take_all(run: Path, into: Path) -> None:
    into.mkdir(parents=True, exist_ok=True)
    places: dict[str, Any] = {"response": response_address(run)}
    with served(run) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name, place, theme, (width, height) in SHOTS:
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)
            shoot(page, f"{url}#/{places.get(place, place)}", into / f"{name}.png")
            page.close()
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="default: one is made")
    parser.add_argument("--into", type=Path, default=ROOT / "docs" / "screenshots")
    parser.add_argument("--keep", type=Path, help="where the run is made and stays")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = options.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        take_all(options.run or make_run(folder), options.into)


if __name__ == "__main__":
    main()
