"""The examples of the README and of the pages of docs/ run as they stand."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stacks_support import accelerator as accelerator
from stacks_support import package
from training import one_thread as one_thread

import rose_ops
from rose_ops import RoseFusedAdamW

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")))
OTHERS = ("accelerate", "lightning", "peft", "transformers")


def examples() -> Iterator[Any]:
    """Named after the heading that they are under."""
    for page in PAGES:
        heading, number = "", 0
        text = (ROOT / page).read_text(encoding="utf-8")
        for title, source in re.findall(r"^## ([^\n]+)$|^```python\n(.*?)^```$", text, re.M | re.S):
            heading, number = (title, 0) if title else (heading, number + 1)
            if source:
                yield pytest.param(source, id=f"{page}-{heading}-{number}".replace(" ", "-"))


EXAMPLES = [*examples()]
assert len(EXAMPLES) > len(OTHERS), "none were found"


@pytest.mark.filterwarnings("ignore")  # of loaders without workers, and of Lightning's own imports
@pytest.mark.parametrize("source", EXAMPLES)
def test_example_runs(source: str, monkeypatch, tmp_path, request) -> None:
    for name in re.findall(r"^import (\w+)", source, re.M):
        if name in OTHERS:
            package(name)
    if "init_process_group" in source:
        assert len({digest(process) for process in two_processes(source, tmp_path)}) == 1
        return
    if "accelerate" in source or "transformers" in source:
        request.getfixturevalue("accelerator")  # what it shares is forgotten afterwards
    made: list[RoseFusedAdamW] = []
    make = RoseFusedAdamW.__init__
    monkeypatch.setattr(
        RoseFusedAdamW,
        "__init__",
        lambda self, *args, **options: (made.append(self), make(self, *args, **options))[1],
    )
    monkeypatch.chdir(tmp_path)
    exec(compile(source, "example", "exec"), {"__name__": "example"})
    if not made:
        assert "\nassert " in source, "an example without an optimizer has to say what it shows"
        return
    optimizer = made[-1]  # of those that a resumed run makes
    assert optimizer.state
    assert all(state["step"].item() >= 10 for state in optimizer.state.values())
    assert 0 < optimizer.selection["second"].kept < optimizer.selection["second"].ranked


# Appended to an example for several processes: what a process has trained, in the end.
DIGEST = """
import hashlib
trained = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
print("digest", hashlib.sha1(trained.numpy().tobytes()).hexdigest())
"""


def two_processes(source: str, folder: Path) -> Iterator[str]:
    """What an example prints in each of two processes, started as torchrun starts them."""
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    (folder / "train.py").write_text(source + DIGEST)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    package_path = str(Path(rose_ops.__file__).parents[1])
    environment = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
        "PYTHONPATH": package_path, "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "train.py"],
            cwd=folder,
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            out, _ = process.communicate(timeout=120)
            assert process.returncode == 0, out
            yield out
    finally:
        for process in processes:
            process.kill()
            process.wait()


def digest(out: str) -> str:
    return re.findall(r"^digest (\w+)$", out, re.M)[0]
