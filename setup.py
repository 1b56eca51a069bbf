"""Builds the operator library. Metadata is in pyproject.toml, all but the license.

Environment:
    ROSE_CUDA: CUDA kernels, too? "auto" (the default): if there is an nvcc; "1": yes, or fail; "0": no.
    CUDA_HOME, CUDA_PATH, PATH: where nvcc is looked for, in this order.
    TORCH_CUDA_ARCH_LIST: what to compile for, such as "8.0;9.0+PTX".
    ROSE_CXXFLAGS, ROSE_NVCCFLAGS, ROSE_LDFLAGS: more flags.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from glob import glob
from pathlib import Path
from typing import NamedTuple

from setuptools import setup
from setuptools.errors import OptionError, PlatformError
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

# -ffp-contract=off: every product and sum is rounded, or masks drift apart between backends. The
# two -fno flags change no value: they let the compiler vectorize branches and square roots.
compile_args = [
    "-O3",
    "-std=c++17",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",  # in PyTorch's headers
    "-g0",
    # PyTorch's stable ABI as of 2.10: one build serves every later release and every Python.
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    *os.environ.get("ROSE_CXXFLAGS", "").split(),
]
nvcc_args = [
    "-O3",
    "-std=c++17",
    "-fmad=false",  # as -ffp-contract=off
    "--threads=0",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    *os.environ.get("ROSE_NVCCFLAGS", "").split(),
]

_ARCHS = "8.0;9.0;10.0;12.0+PTX"


def gencode(wanted: str | None, known: set[str]) -> list[str]:
    """nvcc's flags for a list of architectures.

    Args:
        wanted: as PyTorch's TORCH_CUDA_ARCH_LIST, without names; None: those of the default list that
            nvcc knows.
        known: what nvcc knows: {"80", "90", ...}.
    """
    if wanted is None:
        names = [name for name in _ARCHS[: -len("+PTX")].split(";") if _number(name) in known]
        if not names:
            raise PlatformError(f"nvcc knows none of the architectures {_ARCHS}")
        wanted = ";".join(names) + "+PTX"
    flags = []
    for item in re.split(r"[;\s]+", wanted.strip("; \t\n")):
        found = re.fullmatch(r"(\d+\.\d)([af]?)(\+PTX)?", item)
        if not found or _number(found[1]) not in known:
            raise OptionError(
                f"TORCH_CUDA_ARCH_LIST: {item!r} is no architecture that this nvcc knows; expected a "
                f"list such as 8.0;9.0+PTX, of {', '.join(sorted(known, key=int))} with a point "
                "before the last digit"
            )
        number = _number(found[1]) + found[2]
        codes = ["sm"] if found[3] is None else ["sm", "compute"]
        flags += [f"-gencode=arch=compute_{number},code={code}_{number}" for code in codes]
    return flags


def _number(name: str) -> str:
    return name.replace(".", "")


def without_paths(folders: Iterable[str]) -> list[str]:
    """Flags by which a library does not tell where on this machine its sources and headers were: errors
    that PyTorch's headers raise name theirs. Not among those of the fingerprint."""
    here = os.path.join(os.path.abspath(os.path.dirname(__file__)), "")
    return [
        f"-ffile-prefix-map={folder}=" for folder in (here, *(os.path.join(f, "") for f in folders))
    ]


def fingerprint() -> str:
    """SHA-1 of sources and flags. A library's build ID is this and, in ASCII, what it has CUDA kernels
    for, so that it says itself whether it is up to date. Dates of files do not, once copied."""
    digest = hashlib.sha1(repr((compile_args, nvcc_args)).encode())
    folder = Path(__file__).resolve().parent
    for path in sorted(path for path in (folder / "csrc").rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()


class Toolkit(NamedTuple):
    """What CUDA kernels are built with."""

    nvcc: str
    release: str
    known: set[str]
    runtime: str  # libcudart_static.a

    @classmethod
    def at(cls, nvcc: str) -> Toolkit:
        """Raises:
        PlatformError: it does not run, or lacks the static runtime.
        """

        def ask(*arguments: str) -> str:
            try:
                done = subprocess.run(
                    [nvcc, *arguments], capture_output=True, text=True, check=True, timeout=60
                )
            except (OSError, subprocess.SubprocessError) as error:
                raise PlatformError(f"{nvcc} does not work: {error}") from None
            return done.stdout + done.stderr

        release = re.search(r"release ([\d.]+)", ask("--version"))
        known = set(re.findall(r"compute_(\d+)\b", ask("--list-gpu-arch")))
        # nvcc may be a script somewhere else than the toolkit; what it would run says where that is.
        dry_run = ask("--dryrun", "-x", "cu", os.devnull, "-o", os.devnull)
        folders = re.findall(r'"-L([^"]+)"', "".join(re.findall(r"LIBRARIES=(.*)", dry_run)))
        for folder in folders:
            runtime = Path(folder, "libcudart_static.a")
            if runtime.exists():
                return cls(nvcc, release[1] if release else "?", known, str(runtime.resolve()))
        raise PlatformError(f"{nvcc} comes without libcudart_static.a (looked in {folders})")


def find_toolkit(environ: Mapping[str, str]) -> tuple[Toolkit | None, str]:
    """The toolkit to use, if any, and why none.

    Raises:
        OptionError: ROSE_CUDA is something else. PlatformError: it is 1 and there is no toolkit.
    """
    choice = environ.get("ROSE_CUDA") or "auto"
    if choice not in ("auto", "0", "1"):
        raise OptionError(f"ROSE_CUDA={choice!r}; expected auto, 1 or 0")
    if choice == "0":
        return None, "ROSE_CUDA=0"
    homes = (environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name))
    path = os.pathsep.join([*(os.path.join(home, "bin") for home in homes), environ.get("PATH", "")])
    nvcc = shutil.which("nvcc", path=path)
    try:
        if nvcc is None:
            raise PlatformError("there is no nvcc in CUDA_HOME, CUDA_PATH or PATH")
        return Toolkit.at(nvcc), ""
    except PlatformError as error:
        if choice == "1":
            raise PlatformError(
                f"ROSE_CUDA=1, but {error}; install the CUDA toolkit and set CUDA_HOME to it, or "
                "set ROSE_CUDA=auto or 0"
            ) from None
        return None, str(error)


class BuildWithCuda(BuildExtension):
    """Adds the CUDA kernels. They do not need PyTorch, so nvcc compiles them by itself: PyTorch's own
    way refuses where PyTorch was built without CUDA."""

    def build_extension(self, extension) -> None:
        toolkit, why_not = find_toolkit(os.environ)
        codes = ""
        if toolkit is None:
            print(f"rose_ops: without CUDA kernels: {why_not}", flush=True)
        else:
            archs = gencode(os.environ.get("TORCH_CUDA_ARCH_LIST") or None, toolkit.known)
            codes = " ".join(flag.rpartition("=")[2] for flag in archs)
            made_by = f"{toolkit.nvcc} {toolkit.release}"
            print(f"rose_ops: with CUDA kernels for {codes} by {made_by}", flush=True)
            self._add_kernels(extension, toolkit, archs)
        if sys.platform == "linux":
            build_id = fingerprint() + f"{codes};".encode().hex()
            extension.extra_link_args.append(f"-Wl,--build-id=0x{build_id}")
        extension.extra_compile_args["cxx"].extend(without_paths(include_paths()))
        self.force = True  # what was chosen may have changed, where no source has
        super().build_extension(extension)

    def _add_kernels(self, extension, toolkit: Toolkit, archs: list[str]) -> None:
        folder = Path(self.build_temp, "csrc", "cuda").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for source in sorted(glob("csrc/cuda/*.cu")):
            target = str(folder / (Path(source).name + ".o"))
            command = [toolkit.nvcc, *nvcc_args, *archs, "-Icsrc/include", "-c", source, "-o", target]
            self.spawn(command)
            extension.extra_objects.append(target)
        extension.sources += sorted(glob("csrc/cuda/*.cpp"))
        extension.extra_compile_args["cxx"].append("-DROSE_WITH_CUDA")
        # The runtime is linked statically, and stays inside: the library loads where there is no CUDA.
        # libtorch, of which nothing is used directly, brings in libtorch_cuda where there is one.
        extension.extra_link_args += [
            toolkit.runtime,
            f"-Wl,--exclude-libs,{Path(toolkit.runtime).name}",
            *("-ldl", "-lrt", "-lpthread", "-Wl,--no-as-needed", "-ltorch"),
        ]


if __name__ == "__main__":
    setup(
        license="Apache-2.0",
        ext_modules=[
            CppExtension(
                "rose_ops._C",
                sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")),
                include_dirs=[os.path.abspath("csrc/include"), os.path.abspath("csrc/cpu")],
                extra_compile_args={"cxx": [*compile_args]},
                extra_link_args=os.environ.get("ROSE_LDFLAGS", "").split(),
                py_limited_api=True,
            )
        ],
        cmdclass={"build_ext": BuildWithCuda},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
