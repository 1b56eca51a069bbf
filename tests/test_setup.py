"""What setup.py makes of ROSE_CUDA, of what it finds, and of TORCH_CUDA_ARCH_LIST."""

from __future__ import annotations

import email
import ensurepip
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from gpu_machine import load_setup
from setuptools.errors import OptionError, PlatformError

SETUP = Path(__file__).parents[1] / "setup.py"
setup = load_setup()

KNOWN = {"75", "80", "86", "90", "100", "120"}


def arch(number: str, *codes: str) -> list[str]:
    return [f"-gencode=arch=compute_{number},code={code}_{number}" for code in codes or ("sm",)]


@pytest.mark.parametrize(
    ("wanted", "known", "flags"),
    [
        (None, KNOWN, [*arch("80"), *arch("90"), *arch("100"), *arch("120", "sm", "compute")]),
        (None, {"75", "80", "90"}, [*arch("80"), *arch("90", "sm", "compute")]),
        ("8.0;9.0+PTX", KNOWN, [*arch("80"), *arch("90", "sm", "compute")]),
        ("8.6 9.0a", KNOWN, [*arch("86"), *arch("90a")]),
        ("12.0;", KNOWN, arch("120")),
    ],
)
def test_architectures(wanted, known, flags):
    assert setup.gencode(wanted, known) == flags


@pytest.mark.parametrize("wanted", ["Hopper", "90", "9.9", "8.0,9.0", "8.0+ptx"])
def test_an_architecture_that_is_none(wanted):
    with pytest.raises(OptionError, match="is no architecture that this nvcc knows; expected a list"):
        setup.gencode(wanted, KNOWN)


def test_an_nvcc_too_old_for_any_of_the_default_architectures():
    with pytest.raises(PlatformError, match="knows none of the architectures"):
        setup.gencode(None, {"50", "60"})


def nvcc(folder: Path, *, runtime: bool = True, status: int = 0) -> Path:
    """A stand-in for one, in a toolkit of its own."""
    (folder / "bin").mkdir(parents=True)
    (folder / "lib").mkdir()
    if runtime:
        (folder / "lib" / "libcudart_static.a").touch()
    script = folder / "bin" / "nvcc"
    script.write_text(f"""#!/bin/sh
    case $1 in
      --version) echo "Cuda compilation tools, release 13.0, V13.0.88";;
      --list-gpu-arch) echo compute_80; echo compute_90;;
      *) echo '#$ LIBRARIES=  "-L{folder}/lib/stubs" "-L{folder}/lib"' >&2;;
    esac
    exit {status}
    """)
    script.chmod(0o755)
    return folder


def found(folder: Path | None, **environ: str):
    return setup.find_toolkit({"PATH": "" if folder is None else f"{folder}/bin", **environ})


@pytest.mark.parametrize("choice", ["", "auto", "1"])
def test_where_there_is_an_nvcc(tmp_path, choice):
    toolkit, why_not = found(nvcc(tmp_path), ROSE_CUDA=choice)
    assert toolkit == (
        f"{tmp_path}/bin/nvcc", "13.0", {"80", "90"}, f"{tmp_path}/lib/libcudart_static.a",
    )  # fmt: skip
    assert why_not == ""


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
def test_a_toolkit_that_is_named_comes_first(tmp_path, name):
    first, other = nvcc(tmp_path / "named"), nvcc(tmp_path / "other")
    toolkit, _ = found(other, **{name: str(first)})
    assert toolkit.nvcc == f"{first}/bin/nvcc"


def test_without_cuda_on_request(tmp_path):
    assert found(nvcc(tmp_path), ROSE_CUDA="0") == (None, "ROSE_CUDA=0")


BROKEN = {
    "none": (lambda folder: None, "there is no nvcc in CUDA_HOME, CUDA_PATH or PATH"),
    "fails": (lambda folder: nvcc(folder, status=1), "nvcc does not work"),
    "no-runtime": (lambda folder: nvcc(folder, runtime=False), "without libcudart_static.a"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_without_a_usable_nvcc(tmp_path, name):
    """auto goes on without CUDA and says why; 1 fails and says what to do."""
    make, reason = BROKEN[name]
    folder = make(tmp_path)
    toolkit, why_not = found(folder)
    assert toolkit is None
    assert reason in why_not
    with pytest.raises(PlatformError, match=r"ROSE_CUDA=1, but .*install the CUDA toolkit") as caught:
        found(folder, ROSE_CUDA="1")
    assert reason in str(caught.value)


def test_a_choice_that_is_none():
    with pytest.raises(OptionError, match="ROSE_CUDA='yes'; expected auto, 1 or 0"):
        setup.find_toolkit({**os.environ, "ROSE_CUDA": "yes"})


def test_a_fingerprint_is_of_every_source(tmp_path):
    """And of nothing else: not of the folder, nor of dates."""
    shutil.copy(SETUP, tmp_path)
    shutil.copytree(SETUP.parent / "csrc", tmp_path / "csrc")
    before = load_setup(tmp_path).fingerprint()
    assert before == setup.fingerprint()
    for name in ("csrc/cuda/launch.cu", "csrc/include/rose/element.h"):
        source = tmp_path / name
        text = source.read_text()
        source.write_text(text + "// more\n")
        assert load_setup(tmp_path).fingerprint() != before, name
        source.write_text(text)
        assert load_setup(tmp_path).fingerprint() == before


# ------------------------------------------------------------------------------------------ metadata

BUNDLED = sorted(Path(ensurepip.__file__).parent.glob("_bundled/setuptools-*.whl"))


@pytest.mark.thin(2)
@pytest.mark.parametrize("which", ["bundled", "installed"])
def test_metadata_by_old_and_new_setuptools(which, tmp_path):
    """The release that a new environment of Python 3.11 has knows nothing of license expressions; newer
    ones are about to refuse what it wanted instead."""
    tree, path = tmp_path / "tree", tmp_path / "path"
    tree.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(SETUP.parent / name, tree)
    for name in ("csrc", "rose_ops"):
        (tree / name).symlink_to(SETUP.parent / name)
    if which == "bundled":
        if not BUNDLED:
            pytest.skip("this Python brings no setuptools (3.12 and later have none)")
        zipfile.ZipFile(BUNDLED[0]).extractall(path)
    done = subprocess.run(
        [
            sys.executable, "-W", "always", "-c",
            "from setuptools import build_meta as b; print(b.prepare_metadata_for_build_wheel('.'))",
        ],
        cwd=tree, env={**os.environ, "PYTHONPATH": str(path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "SetuptoolsDeprecationWarning" not in done.stderr
    folder = tree / done.stdout.splitlines()[-1]
    metadata = email.message_from_string((folder / "METADATA").read_text(encoding="utf-8"))
    assert metadata["License"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert list(folder.rglob("LICENSE"))
    always = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert sorted(re.match(r"\w+", r)[0] for r in always) == ["numpy", "torch"]
