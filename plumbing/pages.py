"""One HTML file out of data, a template and the plotly library: it works from the disk, offline, and asks nobody.

What a model wrote is hostile until shown to be text. So data stand in the page as JSON, in an element that no browser
runs; report_page/page.js sets every text as text; and the page's own security policy lets nothing run but the two
scripts that are named in it by their hash, and nothing be fetched at all.
"""

import base64
import gzip
import hashlib
import html
import json
import math
import re
from pathlib import Path

from plumbing.errors import explain

TEMPLATE = Path(__file__).parent / "report_page"
REMEDY = "pip install -r requirements-report.txt"


def plotly_source():
    """The JavaScript of plotly, which its Python package carries. Raises UserError where it is not installed."""
    with explain("report.py: the package plotly is missing", REMEDY, ImportError):
        from plotly.offline import get_plotlyjs
    return get_plotlyjs()


def build_page(title, data, library):
    """The whole page as text. data: what JSON can hold; library: the source of plotly.

    The library is packed, 2 MB where it would be 5; the browser unpacks it.
    """
    script = (TEMPLATE / "page.js").read_text(encoding="utf-8")
    parts = {
        "TITLE": html.escape(title),
        "POLICY": policy_of([script, library]),
        "STYLE": (TEMPLATE / "page.css").read_text(encoding="utf-8"),
        "LIBRARY": packed(library),
        "DATA": to_json(data),
        "SCRIPT": script,
    }
    template = (TEMPLATE / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda match: parts[match.group(1)], template)


def policy_of(scripts):
    """A content security policy under which these scripts run and no other, and no request leaves the page."""
    hashes = []
    for script in scripts:
        digest = hashlib.sha256(script.encode("utf-8")).digest()
        hashes.append(f"'sha256-{base64.b64encode(digest).decode()}'")
    return f"default-src 'none'; script-src {' '.join(hashes)}; style-src 'unsafe-inline'; img-src data: blob:"


def packed(text):
    """A text, compressed, in letters that can stand in a page. The same text gives the same letters."""
    return base64.b64encode(gzip.compress(text.encode("utf-8"), mtime=0)).decode()


def to_json(value):
    """A value as JSON that can stand in a <script>: it holds no '<'. Half characters become question marks."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text.replace("<", "\\u003c")


def short(value, digits=5):
    """A number with so many significant digits, which is what a page can show; None for one that is not finite."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        value = float(f"{value:.{digits}g}")
        if value.is_integer() and abs(value) < 1e15:
            return int(value)
    return value


def definitions_in(page):
    """What a page of docs/ says about names: rows '| `a`, `b` | meaning |' of its tables, name -> meaning. {} without
    the page; the last cell of a row is its meaning."""
    if not page.is_file():
        return {}
    found = {}
    for line in page.read_text(encoding="utf-8").splitlines():
        row = re.fullmatch(r"\| (`.*?) \| (?:.* \| )?(.*?) \|", line)
        if row:
            for name in re.findall(r"`(?:--)?(\w+)`", row.group(1)):
                found.setdefault(name, row.group(2).replace("`", ""))
    return found
