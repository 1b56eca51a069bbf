"""Builds the operator library. Metadata is in pyproject.toml."""

import os
from glob import glob

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

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

setup(
    ext_modules=[
        CppExtension(
            "rose_ops._C",
            sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")),
            include_dirs=[os.path.abspath("csrc/include"), os.path.abspath("csrc/cpu")],
            extra_compile_args={"cxx": compile_args},
            extra_link_args=os.environ.get("ROSE_LDFLAGS", "").split(),
            depends=glob("csrc/**/*.[hi]*", recursive=True),
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
