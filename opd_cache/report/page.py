"""The page that `serve` answers and `report` writes: web/page.html with styles and scripts as links, or within.

The modules name each other as "opd/NAME.js"; an import map says where they are: files of the server, or data in the file.
"""

import base64
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

WEB = Path(__file__).parent / "web"
STYLES = ("vendor/uplot/uPlot.min.css", "base.css", "pages.css")
UPLOT = "vendor/uplot/uPlot.esm.js"
START = 'import "opd/app.js";'
TYPES = {".js": "text/javascript", ".css": "text/css"}


class Page(NamedTuple):
    """HTML and the policy under which a browser may show it."""

    html: str
    policy: str


def modules() -> dict[str, str]:
    """Import name → file below web/."""
    return {f"opd/{path.name}": path.name for path in sorted(WEB.glob("*.js"))} | {"uplot": UPLOT}


def static_files() -> dict[str, tuple[str, bytes]]:
    """Name → (media type, content) of all that the served page loads."""
    names = [*modules().values(), *STYLES]
    return {name: (f"{TYPES[Path(name).suffix]}; charset=utf-8", (WEB / name).read_bytes()) for name in names}


def served_page(title: str) -> Page:
    """Links to static_files(); data is asked from the server."""
    import_map = json.dumps({"imports": {name: f"./static/{file}" for name, file in modules().items()}})
    styles = "\n".join(f'<link rel="stylesheet" href="static/{name}">' for name in STYLES)
    policy = {
        "script-src": f"'self' {_hash(import_map)} {_hash(START)}", "style-src": "'self'", "img-src": "data:",
        "connect-src": "'self'", "frame-ancestors": "'none'",
    }  # fmt: skip
    return Page(_filled(title, "", styles, _scripts(import_map)), _policy(policy))


def report_page(title: str, data: str) -> Page:
    """All in one; `data` is the JSON that the served page would ask for."""
    imports = {name: _as_data((WEB / file).read_bytes()) for name, file in modules().items()}
    import_map, style = json.dumps({"imports": imports}), "\n".join((WEB / name).read_text() for name in STYLES)
    policy = _policy({
        "script-src": f"{_hash(import_map)} {_hash(START)} data:", "style-src": _hash(style), "img-src": "data:",
    })  # fmt: skip
    element = f'<script type="application/json" id="data">{embedded(data)}</script>\n'
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    return Page(_filled(title, meta, f"<style>{style}</style>", element + _scripts(import_map)), policy)


def embedded(data: str) -> str:
    """JSON as it may stand in a page: `<` in a text would end its element, or open another one."""
    return data.replace("<", "\\u003c")


def _filled(title: str, meta: str, styles: str, scripts: str) -> str:
    first, rest = (WEB / "page.html").read_text().split("<!-- head -->")
    middle, last = rest.split("<!-- scripts -->")
    safe = title.replace("&", "&amp;").replace("<", "&lt;")
    return f"{first}{meta}\n<title>{safe}</title>\n{styles}{middle}{scripts}{last}"


def _scripts(import_map: str) -> str:
    return f'<script type="importmap">{import_map}</script>\n<script type="module">{START}</script>'


def _as_data(content: bytes) -> str:
    return "data:text/javascript;base64," + base64.b64encode(content).decode()


def _policy(allowed: dict[str, str]) -> str:
    rules = {"default-src": "'none'", **allowed, "base-uri": "'none'", "form-action": "'none'"}
    return "; ".join(f"{name} {sources}" for name, sources in rules.items())


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
