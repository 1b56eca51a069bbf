"""The pages of docs/: every code block runs, or is a file that other tests run; tables are what results
say; and, where mkdocs is installed, the site builds without a warning."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from test_examples import RUNS
from test_readme import PAGES as PAGES_OF_README
from training import one_thread as one_thread

import rose_ops
from rose_ops import checkpoint, cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
INCLUDED = re.compile(r'^--8<-- "([^":]+)(?::(\w+))?"$', re.M)

spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
assert spec is not None
assert spec.loader is not None
hooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hooks)


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def blocks(*languages: str) -> Iterator[Any]:
    """Of all pages, but those in other languages."""
    for page in PAGES:
        found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", text_of(page), re.M | re.S)
        for number, (_, language, source) in enumerate(found, start=1):
            if language in languages:
                yield pytest.param(textwrap.dedent(source), id=f"{page}-{number}")


# Those of in-your-stack.md are complete trainings, which test_readme.py looks at more closely.
PYTHON = [x for x in blocks("python") if f"docs/{x.id.rpartition('-')[0]}" not in PAGES_OF_README]


def test_every_block_is_in_a_language_that_is_tested():
    assert len([*blocks("python", "bash", "text")]) == sum(
        len(re.findall(r"^ *```\w*$", text_of(page), re.M)) / 2 for page in PAGES
    )
    assert len(PYTHON) > 10


@pytest.mark.filterwarnings("error::UserWarning:rose_ops")
@pytest.mark.parametrize("source", PYTHON)
def test_a_block_runs(source, monkeypatch, tmp_path):
    if included := INCLUDED.fullmatch(source.strip()):
        folder, _, name = included[1].partition("/")
        assert folder == "examples"
        assert name in {"resume.py", *(name for name, *_ in RUNS)}, "no test runs it"
        return
    assert "assert " in source, "it shows nothing that could fail"
    monkeypatch.chdir(tmp_path)
    exec(compile(source, "block", "exec"), {"__name__": "block"})


@pytest.mark.parametrize("source", [*blocks("bash")])
def test_a_command_can_be_given(source):
    """What it calls is there, and knows these arguments, as far as that is seen without running it."""
    for line in source.splitlines():
        program, *arguments = shlex.split(line)
        if program == "make":
            assert arguments[0] in TARGETS
        elif program == "pip":
            assert arguments[0] == "install"
        elif arguments[0] == "-m":
            assert importlib.util.find_spec(arguments[1].partition(".")[0]) or (
                ROOT / arguments[1] / "__main__.py"
            )
            if arguments[1] == "rose_ops":
                cli._parser().parse_args(arguments[2:])
        else:
            text = (ROOT / arguments[0]).read_text(encoding="utf-8")
            options = {x for x in arguments[1:] if x.startswith("--")}
            assert options <= set(re.findall(r'"(--[\w-]+)"', text))


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_includes_is_there(page):
    for name, section in INCLUDED.findall(text_of(page)):
        text = (ROOT / name).read_text(encoding="utf-8")
        if section:
            assert text.count(f"--8<-- [start:{section}]") == 1
            assert text.count(f"--8<-- [end:{section}]") == 1


# -------------------------------------------------------------------------------------------- tables


def test_tables_are_what_results_say():
    found = [name for page in PAGES for name in hooks.PLACEHOLDER.findall(text_of(page))]
    assert found
    named = set()
    for name in found:
        with (hooks.RESULTS / name).open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["against"] == "AdamW fused"]
        named |= {row["contender"] for row in rows}
        table = hooks.on_page_markdown(f"<!-- ratios: {name} -->")
        row = next(r for r in rows if r["contender"] == "rose bracket")
        line = next(x for x in table.splitlines() if x.startswith("| second order |"))
        assert line.split("|")[2].strip() == f"{float(row['ratio']):.2f}"
        columns = {line.count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(columns) == 1
    assert set(hooks.CONTENDERS) <= named, "a row that no result has"


def test_a_case_has_a_column_of_its_own(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(
        "work,data,threads,beside,device,contender,against,ratio,machine,torch,date\n"
        "flat,ties,2,0,cpu,AdamW fused,AdamW fused,1,M,2.13.0,2026-01-02T03\n"
        "flat,ties,2,0,cpu,rose bracket,AdamW fused,1.016,M,2.13.0,2026-01-02T03\n"
        "flat,ties,2,1,cpu,rose bracket,AdamW fused,,M,2.13.0,2026-01-02T03\n"
        "flat,ties,1,0,cpu,eager ROSE,AdamW fused,844.4,M,2.13.0,2026-01-02T03\n"
        "flat,ties,1,0,cpu,kthvalue,kthvalue,1,M,2.13.0,2026-01-02T03\n"
    )
    assert hooks.ratios(path).splitlines() == [
        "| | flat, ties, 2 threads | flat, ties, 1 thread |",
        "| --- | --- | --- |",
        "| second order | 1.02 |  |",
        "| eager ROSE |  | 844 |",
        "",
        "*M; PyTorch 2.13.0; 2026-01-02.*",
    ]


def test_docstrings_as_pages_show_them():
    html = "<p>See :func:<code>x</code> and :class:<code>~a.B</code>::</p>"
    assert hooks.on_page_content(html) == "<p>See <code>x</code> and <code>a.B</code>:</p>"


# ---------------------------------------------------------------------------------------------- site


def test_pictures_need_nothing_from_elsewhere():
    for path in DOCS.glob("*.svg"):
        root = ElementTree.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.find("{http://www.w3.org/2000/svg}title") is not None
        assert "href" not in path.read_text(encoding="utf-8")


def test_the_format_of_checkpoints_is_the_one_described():
    assert re.search(
        rf"`\"format\"` \| the version .*: {checkpoint.FORMAT} \|", text_of("checkpoints.md")
    )


def test_every_public_name_is_in_the_api():
    named = set(re.findall(r"^::: rose_ops\.([\w.]+)$", text_of("api.md"), re.M))
    assert set(rose_ops.__all__) <= named


def test_every_page_is_in_the_menu():
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with what the tests train with")
    # Without the tags of Python that mkdocs knows: there are none.
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(re.findall(r"[\w-]+\.md", str(nav))) == PAGES


def test_the_site_builds_without_a_warning(tmp_path):
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed; `make docs` builds the site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
