"""The profile of kernels, with ncu and the GPU replaced."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

for module in ("pandas", "psutil", "cpuinfo", "tabulate", "tqdm"):
    pytest.importorskip(module, reason=f"the benchmarks need {module}: pip install -e '.[bench]'")
sys.path.append(str(Path(__file__).parents[1]))

from benchmarks import ncu, profile_gpu  # noqa: E402
from benchmarks.device import Cpu, Cuda  # noqa: E402

FIRST = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size",'
    '"Grid Size","Device","CC"'
)
SPIN = "at::cuda::<unnamed>::spin_kernel(long)"
PASS = "void rose::cuda::step_pass_kernel<(bool)0, rose::Dtype>(rose::cuda::StepArguments)"
FUSED = (
    "void at::native::<unnamed>::multi_tensor_apply_kernel<at::native::FusedOptimizerTensorListMetadata"
    "<(int)4>, at::native::FusedAdamMathFunctor<float, (int)4>>(T1, T2, T3...)"
)


def _place(number: int, kernel: str) -> str:
    return (
        f'"{number}","77","python3.12","127.0.0.1","{kernel}","1","7","(256, 1, 1)","(1,056, 1, 1)",'
        '"0","9.0"'
    )


RAW = "\n".join([
    "==PROF== Connected to process 77 (/usr/bin/python3.12)",
    '==PROF== Profiling "spin_kernel" - 0: 0%....50%....100% - 4 passes',
    FIRST + ',"dram__bytes_read.sum","dram__bytes_write.sum","gpu__time_duration.sum",'
    '"launch__registers_per_thread","smsp__issue_active.avg.pct_of_peak_sustained_active",'
    '"smsp__thread_inst_executed.sum"',
    '"","","","","","","","","","","","Mbyte","byte","us","register/thread","%","inst"',
    _place(0, SPIN) + ',"0","0","1.5","16","3.1","1,000"',
    _place(1, FUSED) + ',"16.00","12,000,000","4","32","20","40,000,000"',
    _place(2, SPIN) + ',"0","0","1.5","16","3.1","1,000"',
    _place(3, PASS) + ',"8","6,000,000","4","64","30","80,000,000"',
    _place(4, PASS) + ',"8","6,000,000","12","64","70","n/a"',
    "==PROF== Disconnected from process 77",
])  # fmt: skip
BY_METRIC = "\n".join([
    FIRST + ',"Section Name","Metric Name","Metric Unit","Metric Value"',
    *(
        f'{_place(0, PASS)},"Command line profiler metrics","{name}","{unit}","{value}"'
        for name, unit, value in (
            ("dram__bytes_read.sum", "byte", "16,000,000"),
            ("gpu__time_duration.sum", "nsecond", "4,000"),
            ("something.else", "", "1"), ("dram__bytes_write.sum", "Kbyte", "12"),
        )
    ),
])  # fmt: skip


def test_both_layouts_of_ncu_are_read():
    kernels = ncu.parse(RAW)
    assert [kernel["kernel"] for kernel in kernels] == [SPIN, FUSED, SPIN, PASS, PASS]
    assert kernels[1] == {
        "kernel": FUSED, "read": 16e6, "written": 12e6, "seconds": pytest.approx(4e-6), "registers": 32,
        "issue": 20, "thread_instructions": 40e6,
    }  # fmt: skip
    assert "thread_instructions" not in kernels[4]
    assert ncu.parse(BY_METRIC) == [
        {"kernel": PASS, "read": 16e6, "seconds": pytest.approx(4e-6), "written": 12e3}
    ]
    assert ncu.parse("==ERROR== ERR_NVGPUCTRPERM") == []


def test_the_table_is_by_case_and_kernel():
    table = profile_gpu.table(profile_gpu.in_cases(ncu.parse(RAW)), 1_000_000, copy=7e12)
    table = table.set_index(["case", "kernel"])
    assert list(table.index) == [
        ("AdamW fused", "multi_tensor_apply_kernel"), ("AdamW fused", "whole step"),
        ("bracket", "step_pass_kernel<0, Dtype>"), ("bracket", "whole step"),
    ]  # fmt: skip
    fused, ours = table.iloc[0], table.iloc[2]
    assert (fused["us"], fused["read_per_element"], fused["written_per_element"]) == (4, 16, 12)
    assert fused["of_copy"] == pytest.approx(1.0)
    assert fused["instructions_per_element"] == 40
    assert (ours["launches"], ours["us"], ours["registers"]) == (2, 16, 64)
    assert ours["issue_percent"] == pytest.approx(60)  # by time


def _script(folder: Path, log: str, answer: str) -> str:
    """An ncu that writes ``log`` and says ``answer``."""
    (folder / "canned").write_text(log)
    path = folder / "ncu"
    path.write_text(
        "#!/bin/sh\nwhile [ $# -gt 0 ]; do if [ $1 = --log-file ]; then log=$2; fi; shift; done\n"
        f"cp {folder}/canned $log\necho '{answer}'\n"
    )
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(Cuda, "why_not", staticmethod(lambda: None))
    monkeypatch.setattr(profile_gpu, "Cuda", type("Fake", (Cpu,), {"why_not": Cuda.why_not}))


def test_a_whole_run(tmp_path, monkeypatch, gpu, capsys):
    script = _script(tmp_path, RAW, '{"failed": {"exact": "no luck"}, "kernels": [], "copy": 7e12}')
    monkeypatch.setattr(ncu, "find", lambda: script)
    out = tmp_path / "out"
    assert profile_gpu.main(["--elements", "1000000", "--output", str(out)]) == 1
    assert [path.name for path in out.iterdir()] == ["cpu-rehearsal-kernels.csv"]
    said = capsys.readouterr()
    assert "multi_tensor_apply_kernel" in said.out
    assert "FAILED: exact: no luck" in said.err


@pytest.mark.parametrize("how", ["ncu", "torch"])
def test_the_measured_process(monkeypatch, how):
    calls: list[str] = []
    for name in ("synchronize", "_sleep", "profiler.start", "profiler.stop"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *_, name=name: calls.append(name))
    monkeypatch.setattr(profile_gpu, "CASES", (
        profile_gpu.CASES[1], profile_gpu.Case("wrong", "nobody"), profile_gpu.CASES[-1],
    ))  # fmt: skip
    told = profile_gpu._child(Cpu(), 1 << 14, how)
    assert list(told["failed"]) == ["wrong"]
    assert told["copy"] > 0
    # A mark for the one that failed, too: cases are known by their number.
    marks = [name for name in calls if name != "synchronize"]
    assert marks == (["profiler.start", "_sleep", "profiler.stop"] * 3 if how == "ncu" else [])


@pytest.mark.parametrize("why", ["not there", "not allowed"])
def test_without_ncu_there_are_times(tmp_path, monkeypatch, gpu, capsys, why):
    log = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission"
    script = _script(tmp_path, log, "") if why == "not allowed" else None
    monkeypatch.setattr(ncu, "find", lambda: script)
    run = profile_gpu._run

    def by_torch(prefix, how, *rest):
        if how == "ncu":
            return run(prefix, how, *rest)
        return {
            "failed": {},
            "kernels": [{"case": 1, "kernel": PASS, "seconds": 1e-3}],
            "copy": 1e12,
        }, ""

    monkeypatch.setattr(profile_gpu, "_run", by_torch)
    assert profile_gpu.main(["--elements", "1000", "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "ncu: " + (log if script else "not found") in said
    assert "| bracket | step_pass_kernel<0, Dtype> |" in said


def test_what_hangs_is_ended(tmp_path, monkeypatch):
    path = tmp_path / "ncu"
    path.write_text("#!/bin/sh\nsleep 60\n")
    path.chmod(0o755)
    assert profile_gpu._run([str(path)], "ncu", 1, 0.3) == ({}, "no answer in 0 s")


def test_the_cases_are_rehearsed(capsys):
    assert profile_gpu.main(["--device", "cpu", "--elements", "64Ki"]) == 0
    assert "rehearsed 8 cases" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("how", [[], ["--no-ncu"]], ids=str)
def test_on_a_gpu(tmp_path, how):
    assert profile_gpu.main(["--elements", "1Mi", "--output", str(tmp_path), *how]) == 0
