"""The examples of the README and of the pages of docs/ run as they stand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from forked import ROOT, torchrun
from stacks_support import accelerator as accelerator
from stacks_support import package
from training import one_thread as one_thread

from rose_ops import RoseFusedAdamW

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
        if not torch.distributed.is_available():
            pytest.skip("this PyTorch has no torch.distributed")
        (tmp_path / "train.py").write_text(source + DIGEST)
        said = torchrun(str(tmp_path / "train.py"), folder=tmp_path)
        assert len({*map(digest, said)}) == 1
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


def digest(out: str) -> str:
    return re.findall(r"^digest (\w+)$", out, re.M)[0]
