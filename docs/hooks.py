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
