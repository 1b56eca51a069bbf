"""Links out of docs/ are for readers of the repository: the site, which has no such pages, shows their
text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, **given: Any) -> str:
    def text_of(link: re.Match[str]) -> str:
        text, target = link.groups()
        if not (ROOT / target.partition("#")[0]).exists():
            raise FileNotFoundError(f"{given['page'].file.src_uri}: ../{target}")
        return text

    return re.sub(r"\[([^\]]+)\]\(\.\./([^)\s]+)\)", text_of, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings have roles and ``::`` of reStructuredText, which Python's help() shows well."""
    html = re.sub(r":(?:class|func|meth|mod|attr):<code>~?([^<]+)</code>", r"<code>\1</code>", html)
    return html.replace("::</p>", ":</p>")
