"""``python -m rose_ops doctor``."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import rose_ops
from rose_ops import backends, cli, doctor, reference
from rose_ops._ops import OPERATORS
from rose_ops.backends import Backend
from rose_ops.definitions import Mode


@pytest.fixture
def no_interpreter(monkeypatch):
    """Without Triton where it is interpreted: that takes half a minute each time."""
    if backends._INTERPRETED:
        monkeypatch.delitem(backends.BACKENDS, "triton")


def test_a_sound_installation(capsys, no_interpreter):
    assert cli.main(["doctor"]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines() if line)
    assert lines["torch"] == torch.__version__
    assert lines["cpu"] == "equals the reference"
    assert lines["cuda"] == "equals the reference" or "not available: " in lines["cuda"]


@pytest.mark.slow
def test_triton_is_sound():
    if (reason := backends.BACKENDS["triton"].why_not()) is not None:
        pytest.skip(reason)
    triton = backends.BACKENDS["triton"]
    assert [d for device in triton.devices for d in doctor.check(triton.ops, device)] == []


def test_it_runs_as_a_command(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = subprocess.run([sys.executable, "-m", "rose_ops", "doctor"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "equals the reference" in done.stdout


MODES = ["by-masks", *(mode.name for mode in Mode)]
BROKEN = [
    *(f"{name} {mode}" for name in ("rank_", "step_") for mode in MODES),
    "count_keys", "sums_of_squares", "clip_factors", "select_tensors_",
]  # fmt: skip
BROKEN = [name for name in BROKEN if name != "rank_ by-masks" and "APPROX" not in name]


def test_a_right_backend_is_not():
    assert doctor.check(reference, "cpu") == []


@pytest.mark.thin(2)
@pytest.mark.parametrize("broken", BROKEN)
def test_a_wrong_backend_is_reported(monkeypatch, capsys, broken):
    """Whatever the operator and its mode, with one bit wrong in its result or in what it writes."""
    name, _, mode = broken.partition(" ")

    def off_by_one(*args):
        result = getattr(reference, name)(*args)
        changed = result
        if name == "rank_":
            changed = args[0][0]
        if name == "select_tensors_":
            changed = args[0]
        if name == "step_":  # parameters are compared with a tolerance, moments are not
            changed = args[2][0]
        if mode:
            ranking = args[-1 if name == "rank_" else -2]
            if mode != (Mode(ranking[0]).name if ranking else "by-masks"):
                return result
        changed.view(torch.uint8).reshape(-1)[-1 if changed.is_floating_point() else 0] += 1
        return result

    tensors = doctor._tensors
    monkeypatch.setattr(doctor, "_tensors", lambda *args: [t[:1009] for t in tensors(*args)])
    functions = {name: getattr(reference, name) for name in (*OPERATORS, "_set_bracket_width")}
    ops = SimpleNamespace(**functions)
    setattr(ops, name, off_by_one)
    wrong = Backend("wrong", frozenset({"cpu"}), lambda: ops, lambda: None)
    monkeypatch.setattr(backends, "BACKENDS", {"wrong": wrong})
    assert cli.main(["doctor"]) == 1
    captured = capsys.readouterr()
    assert "wrong: " in captured.out
    assert "do not train with it" in captured.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("backend", ["auto", "cuda", "triton"])
def test_cuda_parameters_without_a_gpu(monkeypatch, backend):
    """As the optimizer would see them; real ones cannot be made here."""
    monkeypatch.setattr(backends, "_INTERPRETED", False)
    triton = dataclasses.replace(backends.BACKENDS["triton"], devices=frozenset({"cuda"}))
    monkeypatch.setitem(backends.BACKENDS, "triton", triton)
    with FakeTensorMode():
        p = torch.nn.Parameter(torch.ones(3, device="cuda"))
    reason = "no driver, or a PyTorch built without|built without CUDA kernels|not installed"
    with pytest.raises(RuntimeError, match=reason) as caught:
        rose_ops.RoseFusedAdamW([p], backend=backend)
    assert ("no usable backend for cuda parameters" in str(caught.value)) == (backend == "auto")


@pytest.mark.parametrize("cuda", [None, "its reason"])
def test_cuda_comes_before_triton(monkeypatch, recwarn, cuda):
    """With a warning that says once why not, where it cannot be used."""
    names = {"cuda": cuda, "triton": None}
    for name, reason in names.items():
        backend = Backend(name, frozenset({"cuda"}), lambda: reference, lambda reason=reason: reason)
        monkeypatch.setitem(backends.BACKENDS, name, backend)
    backends._first_usable.cache_clear()
    chosen = [backends.resolve("auto", torch.device("cuda")).name for _ in range(2)]
    backends._first_usable.cache_clear()
    assert chosen == [("cuda" if cuda is None else "triton")] * 2
    said = [str(warning.message) for warning in recwarn]
    assert said == ([] if cuda is None else ["rose_ops uses the backend 'triton': 'cuda': its reason"])


def test_why_cuda_cannot_be_used(monkeypatch):
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for built, reason in ((True, "finds no CUDA device"), (False, "built without CUDA kernels")):
        monkeypatch.setattr(
            torch._C,
            "_dispatch_has_kernel_for_dispatch_key",
            lambda name, key, built=built: built if key == "CUDA" else has_kernel(name, key),
        )
        assert reason in backends.BACKENDS["cuda"].why_not()
        backends._first_usable.cache_clear()
        monkeypatch.setattr(backends, "_INTERPRETED", False)
        monkeypatch.delitem(backends.BACKENDS, "triton", raising=False)
        with pytest.raises(RuntimeError, match=reason):
            backends.resolve("auto", torch.device("cuda"))
    backends._first_usable.cache_clear()
