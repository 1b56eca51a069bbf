"""build.toml, for the Hugging Face kernels hub, lists what setup.py builds."""

from __future__ import annotations

import re
from glob import glob
from pathlib import Path
from typing import Any

import pytest
from gpu_machine import load_setup

ROOT = Path(__file__).parents[1]


def build_toml() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    return tomllib.loads((ROOT / "build.toml").read_text(encoding="utf-8"))


def test_the_hub_s_build_is_setup_py_s():
    build = build_toml()
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
    build, setup = build_toml(), load_setup()
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
