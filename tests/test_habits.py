"""What surrounds the code agrees with it: workflows, hooks, citation, changelog, pages, package."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

import rose_ops

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed; the test extra brings it")
ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def project() -> dict[str, Any]:
    if sys.version_info < (3, 11):
        pytest.skip("this Python has no tomllib")
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def pins(lines: Any) -> set[str]:
    return set(re.findall(r"[\w-]+==[\d.]+", " ".join(lines)))


def test_there_are_workflows():
    assert [path.name for path in WORKFLOWS] == ["docs.yml", "test.yml", "wheels.yml"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_targets_of_the_makefile(path):
    targets = set(re.findall(r"^([a-z-]+):(?!=)", MAKEFILE, re.M))
    targets |= set(re.findall(r"^VERIFY := (.*)$", MAKEFILE, re.M)[0].split())
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert True in workflow or "on" in workflow  # YAML 1.1 takes "on" for a boolean
    commands = [
        step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step
    ]
    assert commands
    for command in commands:
        make, target, *settings = command.split()
        assert make == "make"
        assert target in targets
        assert all(re.fullmatch(r"[A-Z_]+=\S+", setting) for setting in settings)
        assert all(re.search(rf"^{s.partition('=')[0]} \?=", MAKEFILE, re.M) for s in settings)


def test_hooks_are_the_linters_of_make_lint():
    wanted = pins(project()["project"]["optional-dependencies"]["lint"])
    hooks = [hook for repo in load(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    found = set().union(*(pins(hook.get("additional_dependencies", ())) for hook in hooks))
    # mypy is that of the environment, which `make` installs from the same list.
    assert found == {pin for pin in wanted if not pin.startswith("mypy==")}
    assert any(hook["entry"] == ".venv/bin/mypy" for hook in hooks)
    for hook in hooks:
        program = hook["entry"].split()[0].rpartition("/")[2]
        assert f"$(BIN)/{program}" in MAKEFILE


def test_citation():
    citation = load(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation["version"] == rose_ops.__version__
    assert citation["license"] == "Apache-2.0"
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == [
        "Jiang", "Zhou", "Lin", "Li", "Zhou", "Jiang",
    ]  # fmt: skip
    assert paper["url"] in (ROOT / "README.md").read_text(encoding="utf-8")


def test_changelog_is_of_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(.*?)\]", text, re.M)[0] == "Unreleased"
    assert rose_ops.__version__ in text


def test_the_package_is_typed():
    assert (Path(rose_ops.__file__).parent / "py.typed").is_file()
    assert "py.typed" in project()["tool"]["setuptools"]["package-data"]["rose_ops"]


def test_packages_are_all_there():
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "rose_ops").rglob("__init__.py")
    }
    assert set(project()["tool"]["setuptools"]["packages"]) == found


def test_documentation():
    """Each page is in the navigation, and `make docs` installs what the extra names."""
    config = load(ROOT / "mkdocs.yml")
    pages = [page for entry in config["nav"] for page in entry.values()]
    assert sorted(pages) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    for wanted in project()["project"]["optional-dependencies"]["docs"]:
        assert f'"{wanted}"' in MAKEFILE
