"""What ``make gpu`` does with PyTorch and setuptools, in a process of its own: look, and build."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "rose_ops" / "_C.abi3.so"


def load_setup(folder: Path = ROOT) -> ModuleType:
    """setup.py, which knows how the library is built."""
    spec = importlib.util.spec_from_file_location("rose_ops_setup", folder / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def probe() -> None:
    """Print what this machine is, as JSON."""
    facts = {"device": "", "torch": torch.__version__}
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        facts["device"], facts["architecture"] = p.name, f"{p.major}.{p.minor}"
        facts["memory"] = f"{p.total_memory / 2**30:.0f} GiB"
    # The first of a name is the one that is imported.
    installed = {d.name: d.version for d in reversed([*importlib.metadata.distributions()])}
    facts |= {name: installed.get(name, "none") for name in ("triton", "setuptools")}
    digest = hashlib.sha1(load_setup().fingerprint().encode())
    for path in sorted((ROOT / "rose_ops").rglob("*.py")):
        digest.update(path.read_bytes())
    facts["sources"] = digest.hexdigest()[:12]  # where there is no git to say the commit
    print(json.dumps(facts))


def build(arch: str, work: str, how: str) -> None:
    """Build the library for one architecture.

    Args:
        arch: such as 9.0.
        work: where to build. Not in the tree: an old setuptools cannot read its pyproject.toml.
        how: "install" to put it where the package looks for it, "scratch" to leave it there.
    """
    code, fingerprint = f"sm_{arch.replace('.', '')}", load_setup().fingerprint()
    if how == "install" and code in codes(LIBRARY, fingerprint):
        print(f"{LIBRARY} is of these sources and has kernels for {code}: taken as it is")
    else:
        tree = Path(work, "tree")
        shutil.rmtree(tree, ignore_errors=True)
        (tree / "rose_ops").mkdir(parents=True)
        for name in ("csrc", "setup.py"):
            (tree / name).symlink_to(ROOT / name)
        env = {**os.environ, "ROSE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": arch}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        if (status := subprocess.run(command, cwd=tree, env=env).returncode) != 0:
            sys.exit(f"setup.py failed with exit status {status}")
        made = tree / "rose_ops" / LIBRARY.name
        if code not in codes(made, fingerprint):
            sys.exit(f"{made} says that it has no kernels for {code}")
        if how != "install":
            torch.ops.load_library(made)
            print(f"built {made} for {code}")
            return
        new = LIBRARY.with_name(LIBRARY.name + ".new")
        shutil.copy(made, new)
        new.replace(LIBRARY)  # at once, and beside the old one where that is loaded
        print(f"built for {code}")
    import rose_ops
    from rose_ops import _ops

    where = Path(rose_ops.__file__).resolve().parent
    if _ops.load_error or where != LIBRARY.parent:
        sys.exit(f"rose_ops of {where} is imported: {_ops.load_error or 'not the one of this tree'}")
    print(f"{LIBRARY} is what is imported")


def codes(library: Path, fingerprint: str) -> list[str]:
    """What a library has CUDA kernels for; nothing if it is of other sources (see setup.py)."""
    data = library.read_bytes() if library.exists() else b""
    _, _, rest = data.partition(bytes.fromhex(fingerprint))
    return rest[:200].partition(b";")[0].decode("ascii", "replace").split()


if __name__ == "__main__":
    {"build": build, "probe": probe}[sys.argv[1]](*sys.argv[2:])
