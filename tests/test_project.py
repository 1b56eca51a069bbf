"""What is written in more than one place, and what other tools read, agrees, and names what exists."""

from __future__ import annotations

import importlib.util
import re
from glob import glob
from pathlib import Path
from typing import Any

import pytest

import rose_ops

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted(path.name for path in (ROOT / ".github" / "workflows").glob("*.yml"))
PAPER = "2022.emnlp-main.186"


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def yaml_of(name: str) -> Any:
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with what the tests train with")
    return yaml.safe_load(read(name))


def toml_of(name: str) -> Any:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    return tomllib.loads(read(name))


def setup_module() -> Any:
    spec = importlib.util.spec_from_file_location("setup_of_project", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------- package


def test_the_package_is_typed():
    assert (Path(rose_ops.__file__).parent / "py.typed").exists()
    tool = toml_of("pyproject.toml")["tool"]
    assert "py.typed" in tool["setuptools"]["package-data"]["rose_ops"]
    assert tool["mypy"]["strict"] is True


@pytest.mark.parametrize("name", rose_ops.__all__)
def test_a_public_function_is_annotated(name):
    value = getattr(rose_ops, name)
    functions = [value] if not isinstance(value, type) else [
        f for key, f in vars(value).items() if callable(f) and not key.startswith("_")
    ]  # fmt: skip
    for function in functions:
        function = getattr(function, "__wrapped__", function)
        if not hasattr(function, "__code__") or not function.__module__.startswith("rose_ops"):
            continue
        code = function.__code__
        arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        wanted = {x for x in arguments if x not in ("self", "cls")} | {"return"}
        assert wanted <= function.__annotations__.keys(), function


def test_versions_agree():
    version = rose_ops.__version__
    assert str(yaml_of("CITATION.cff")["version"]) == version
    headings = re.findall(r"^## \[([^\]]+)\](?: - (\d{4}-\d\d-\d\d))?$", read("CHANGELOG.md"), re.M)
    assert headings[0][0] in ("Unreleased", version)
    assert all(date for name, date in headings if name != "Unreleased")


def test_the_paper_is_named_alike():
    (paper,) = yaml_of("CITATION.cff")["references"]
    assert paper["doi"] == f"10.18653/v1/{PAPER}"
    urls = toml_of("pyproject.toml")["project"]["urls"]
    assert paper["url"] == urls["Paper"] == f"https://aclanthology.org/{PAPER}/"
    assert urls["Paper"] in read("README.md")


# ------------------------------------------------------------------------------------------ Makefile


def targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", read("Makefile"), re.M))


def test_docs_are_installed_by_make_docs_alone():
    """The tests' environment is no slower for them."""
    extras = toml_of("pyproject.toml")["project"]["optional-dependencies"]
    text = read("Makefile")
    (installed,) = re.findall(r'install --no-build-isolation -e "\.\[([\w,]+)\]"', text)
    assert "docs" not in installed.split(",")
    # What sed takes from the line is all of the extra.
    (line,) = re.findall(r"^docs = \[(.*)\]$", read("pyproject.toml"), re.M)
    assert re.findall(r'"([^"]+)"', line) == extras["docs"]


def test_linters_have_one_release():
    wanted = set(toml_of("pyproject.toml")["project"]["optional-dependencies"]["lint"])
    hooks = [hook for repo in yaml_of(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    pinned = {x for hook in hooks for x in hook.get("additional_dependencies", ())}
    assert pinned == {x for x in wanted if not x.startswith("mypy==")}  # which needs PyTorch beside it
    programs = {hook["entry"].split()[0].rpartition("/")[2] for hook in hooks}
    assert programs == {x.partition("==")[0] for x in wanted}


# ----------------------------------------------------------------------------------------- workflows


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_calls_what_there_is(name):
    workflow = yaml_of(f".github/workflows/{name}")
    assert workflow.keys() >= {"name", True, "jobs", "permissions"}  # YAML's "on" is True
    called = set()
    for job in workflow["jobs"].values():
        assert job["runs-on"]
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            if "uses" in step:
                assert re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"])
            for command in filter(None, re.split(r"&&|\n", step.get("run", ""))):
                program, *arguments = command.split()
                assert program in ("make", "apt-get")
                called |= {arguments[0]} if program == "make" else set()
    assert called
    assert called <= targets()


def test_workflows_run_what_they_are_named_after():
    texts = {name: read(f".github/workflows/{name}") for name in WORKFLOWS}
    assert WORKFLOWS == ["docs.yml", "test.yml", "wheels.yml"]
    assert "make docs" in texts["docs.yml"]
    assert "make wheel" in texts["wheels.yml"]
    assert "make lint" in texts["test.yml"]
    assert "make test" in texts["test.yml"]
    matrix = yaml_of(".github/workflows/test.yml")["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python"] == ["3.10", "3.11", "3.12", "3.13"]
    # Those that a wheel is built for are where the workflow looks for them.
    variants = yaml_of(".github/workflows/wheels.yml")["jobs"]["wheel"]["strategy"]["matrix"]["include"]
    assert {x["variant"]: x["cuda"] for x in variants} == {"cpu": "0", "cuda": "1"}


# -------------------------------------------------------------------------------------- kernels' hub


def test_the_hub_s_build_is_setup_py_s():
    build = toml_of("build.toml")
    assert build.keys() == {"general", "torch", "kernel"}
    general = build["general"]
    assert re.fullmatch(r"[a-z][-a-z0-9]*[a-z0-9]", general["name"])  # what the builder takes
    assert general["name"].replace("-", "_") == "rose_ops"
    assert general["license"] == "Apache-2.0"
    kernels = build["kernel"]
    assert {kernel["backend"] for kernel in kernels.values()} == set(general["backends"])
    assert set(build["torch"]["stable-abi"]) == set(general["backends"])

    def files(*patterns: str) -> set[str]:
        return {Path(x).as_posix() for pattern in patterns for x in glob(pattern, root_dir=ROOT)}

    shared = build["torch"]["src"]
    everything = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    cuda = files("csrc/cuda/*")
    listed = {name: [*shared, *kernels[name]["src"]] for name in ("cpu", "cuda")}
    assert set(listed["cpu"]) == everything - cuda, "build.toml lists other files than csrc/ has"
    assert set(listed["cuda"]) == everything, "build.toml lists other files than csrc/ has"
    for name, sources in listed.items():
        assert len(sources) == len(set(sources)), "a file is listed twice"
        folders = {folder for x in (build["torch"], kernels[name]) for folder in x["include"]}
        assert all((ROOT / folder).is_dir() for folder in folders)
    setup_sources = files("csrc/*.cpp", "csrc/cpu/*.cpp")  # as setup.py has them
    assert setup_sources == {x for x in listed["cpu"] if x.endswith(".cpp")}


def test_the_hub_s_flags_are_setup_py_s():
    build, setup = toml_of("build.toml"), setup_module()
    ours = {x for x in setup.compile_args if not x.startswith(("-W", "-g", "-DTORCH_TARGET"))}
    shared, kernels = build["torch"]["cxx-flags"], build["kernel"]
    assert set(shared) == set(kernels["cpu"]["cxx-flags"]) == ours
    assert set(kernels["cuda"]["cxx-flags"]) == ours | {"-DROSE_WITH_CUDA"}
    # Those of nvcc that change what is computed; the others are the builder's.
    of_nvcc = {x for x in setup.nvcc_args if not x.startswith(("--threads", "-Xcompiler"))}
    assert set(kernels["cuda"]["cuda-flags"]) == of_nvcc
    (target,) = (x for x in setup.compile_args if x.startswith("-DTORCH_TARGET_VERSION="))
    word = int(target.partition("=")[2], 16)
    version = f"{word >> 56}.{word >> 48 & 0xFF}"
    assert set(build["torch"]["stable-abi"].values()) == {version}
