"""Renders the parts of the README that follow from the code and from measured figures: the tables of columns, of SQL views,
of health checks and of targets.

python tools/render_readme.py [--check]
"""

import re
import sys
from pathlib import Path

from opd_cache.health.checks import markdown_checks
from opd_cache.schema import TABLES, markdown_table, markdown_views

sys.path.insert(0, str(Path(__file__).parent / "bench"))
from render import markdown as markdown_targets

README = Path(__file__).parent.parent / "README.md"


def render(text: str) -> str:
    """The README with everything between its <!-- NAME --> and <!-- /NAME --> made anew."""

    def block(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- columns:{name} -->\n**{name}**\n\n{markdown_table(TABLES[name])}\n<!-- /columns:{name} -->"

    health = f"<!-- health -->\n{markdown_checks()}\n<!-- /health -->"
    text = re.sub(r"<!-- health -->.*?<!-- /health -->", lambda _: health, text, flags=re.DOTALL)
    views = f"<!-- views -->\n{markdown_views()}\n<!-- /views -->"
    text = re.sub(r"<!-- views -->.*?<!-- /views -->", lambda _: views, text, flags=re.DOTALL)
    targets = f"<!-- targets -->\n{markdown_targets()}\n<!-- /targets -->"
    text = re.sub(r"<!-- targets -->.*?<!-- /targets -->", lambda _: targets, text, flags=re.DOTALL)
    return re.sub(r"<!-- columns:(\w+) -->.*?<!-- /columns:\1 -->", block, text, flags=re.DOTALL)


def main() -> None:
    text = README.read_text()
    if "--check" in sys.argv[1:]:
        sys.exit(
            0
            if render(text) == text
            else "README.md: its rendered tables are stale. Run: python tools/render_readme.py"
        )
    README.write_text(render(text))


if __name__ == "__main__":
    main()
