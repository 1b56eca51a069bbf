"""Hooks of mkdocs: tables from the committed measurements, and docstrings as Markdown.

A line ``<!-- ratios: NAME.csv -->`` in a page becomes a table of the time of a step over that of
``torch.optim.AdamW(fused=True)`` in the same run, from ``benchmarks/results/NAME.csv``: no measured
number is written into a page by hand.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"

# Rows of tables: contenders of benchmarks/specs.py, and what they are.
CONTENDERS = {
    "rose upper=1": "`upper=1` (AdamW)",
    "rose approx": 'second order, `"approx"`',
    "rose bracket": "second order",
    "rose bracket, graph": "the same, replayed as a CUDA graph",
    "rose exact": 'second order, `"exact"`',
    "rose bracket, clip": "second order, clipping inside",
    "AdamW fused, clip": "AdamW fused + `clip_grad_norm_`",
    "rose ensemble, bracket": "ensemble, with its capture",
    "rose bracket, bf16 moments": "second order, bfloat16 moments",
    "rose bracket, stochastic": "second order, stochastic rounding",
    "rose tensors, 40%": "whole tensors, 40% kept",
    "AdamW foreach": "AdamW foreach",
    "eager ROSE": "eager ROSE",
}
PLACEHOLDER = re.compile(r"^<!-- ratios: ([\w.-]+\.csv) -->$", re.M)


def _case(row: dict[str, str]) -> str:
    """What a column is of."""
    threads = int(row["threads"])
    parts = [row["work"], row["data"]]
    if row["device"] == "cpu":
        parts.append("1 thread" if threads == 1 else f"{threads} threads")
    if row.get("beside", "0") not in ("", "0"):
        parts.append("beside a busy process")
    return ", ".join(parts)


def ratios(path: Path) -> str:
    """A table of the ratios in a result of the benchmarks, one column for each case."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["against"] == "AdamW fused" and row["ratio"]]
    cases = list(dict.fromkeys(map(_case, rows)))
    found = {(row["contender"], _case(row)): float(row["ratio"]) for row in rows}
    lines = ["| | " + " | ".join(cases) + " |", "| --- " * (len(cases) + 1) + "|"]
    for contender, shown in CONTENDERS.items():
        values = [found.get((contender, case)) for case in cases]
        if any(value is not None for value in values):
            cells = ("" if x is None else f"{x:.2f}" if x < 100 else f"{x:.0f}" for x in values)
            lines.append(f"| {shown} | " + " | ".join(cells) + " |")
    machine = rows[0].get("gpu") or rows[0]["machine"]
    lines += ["", f"*{machine}; PyTorch {rows[0]['torch']}; {rows[0]['date'][:10]}.*"]
    return "\n".join(lines)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fills in the tables."""
    return PLACEHOLDER.sub(lambda found: ratios(RESULTS / found[1]), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings have roles and ``::`` of reStructuredText, which Python's help() shows well."""
    html = re.sub(r":(?:class|func|meth|mod|attr):<code>~?([^<]+)</code>", r"<code>\1</code>", html)
    return html.replace("::</p>", ":</p>")
