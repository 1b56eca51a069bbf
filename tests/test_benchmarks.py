"""The benchmarks measure what they say, at small sizes.

What runs on a GPU is rehearsed on the CPU, with the calls of torch.cuda replaced.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

for module in ("pandas", "psutil", "cpuinfo", "tabulate", "tqdm", "matplotlib"):
    pytest.importorskip(module, reason=f"the benchmarks need {module}: pip install -e '.[bench]'")
sys.path.append(str(Path(__file__).parents[1]))

import pandas as pd  # noqa: E402
import psutil  # noqa: E402

from benchmarks import (  # noqa: E402
    beside,
    compare,
    contenders,
    device,
    machine,
    memory,
    ours,
    parity,
    preset,
    record,
    report,
    run,
    specs,
    targets,
    work,
)
from benchmarks.device import Clock, Cpu, Cuda  # noqa: E402
from benchmarks.work import Numbers, Problem, Work  # noqa: E402
from rose_ops import RoseFusedAdamW  # noqa: E402

CPU = torch.device("cpu")
FLOAT, BF16 = torch.float32, torch.bfloat16
plot = report.plot  # the real one
get_cpu_info = functools.cache(machine.cpuinfo.get_cpu_info)  # which takes a second
SHAPES = [(40, 50), (7,), (3, 4, 5), (1,), (800,), (8,), (64, 9), (33,)]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """One thread; tiles so short that they repeat; compilers and pictures off, which take seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(work, "_LENGTHS", dict(zip(work.ROLES, (401, 397, 389, 383, 379), strict=True)))
    monkeypatch.setattr(work, "_MAX_CHUNK", 512)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(machine.cpuinfo, "get_cpu_info", get_cpu_info)
    monkeypatch.setattr(report, "plot", lambda frame, path: path.touch())
    work._tiles.cache_clear()
    yield
    work._tiles.cache_clear()
    torch.set_num_threads(threads)


@pytest.fixture
def recorded(monkeypatch, generator):
    """Instead of a fine-tuning run: numbers of one length, some without history or signal."""
    roles = {role: torch.randn(1000, generator=generator) for role in work.ROLES}
    for role in ("grads", "kl_grads", "exp_avgs"):
        roles[role][:300] = 0
    roles["exp_avg_sqs"].square_()
    monkeypatch.setattr(record, "load", lambda: roles)


class Small(Cpu):
    _CACHE = 1 << 16
    chunk = 256


# ------------------------------------------------------------------------------------------- numbers


def test_works_have_the_sizes_that_they_say():
    assert (work.roberta().elements, len(work.roberta().shapes)) == (124_647_170, 201)
    assert (work.llama().elements, len(work.llama().shapes)) == (1_235_814_400, 146)
    assert (work.minilm().elements, len(work.minilm().shapes)) == (22_713_986, 105)
    assert work.tiny().elements == 640_000
    assert work.flat(1 << 26).name == "flat-64Mi"


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
@pytest.mark.parametrize("data", work.DATA)
def test_any_part_of_the_numbers_is_the_same_again(recorded, data, dtype):
    numbers = Numbers(Work("mixed", SHAPES, dtype), data, CPU)
    for role in work.ROLES:
        tensors = [torch.full(shape, torch.nan, dtype=dtype) for shape in SHAPES]
        numbers.fill(role, tensors)
        for chunk in (64, 512):
            for part in numbers.parts(chunk):
                i, start, stop = part
                expected = tensors[i].view(-1)[start:stop]
                assert torch.equal(numbers.part(role, *part, dtype), expected), (role, part)
    covered = sum(stop - start for _, start, stop in numbers.parts(64))
    assert covered == numbers.work.elements


@pytest.mark.parametrize("data", ["gaussian", "heavy", "ties", "denormals"])
def test_the_numbers_are_what_their_description_says(monkeypatch, data):
    n = 100_000
    monkeypatch.setattr(work, "_LENGTHS", dict.fromkeys(work.ROLES, n))
    problem = Problem(work.flat(n), data, CPU)
    (g,), (kl,) = problem.grads, problem.kl_grads
    (m,), (v,) = problem.moments(FLOAT)
    assert (m != 0).all()
    assert (kl != 0).all()
    assert (v > 0).all()
    denormal = [float(((t.abs() < 2.0**-126) & (t != 0)).float().mean()) for t in (g, kl, m, v)]
    expected = 0.1 if data == "denormals" else 0.0
    assert denormal == pytest.approx([expected] * 4, abs=0.01)
    risk = (0.1 * g.abs() / m.abs() - 1).abs()
    tied = float((risk == 1).float().mean())
    # A denormal gradient over a normal moment is next to nothing.
    assert tied == pytest.approx({"ties": 0.5, "denormals": 0.09}.get(data, 0.0), abs=0.01)
    if data == "ties":
        assert risk.kthvalue(int(0.6 * n)).values == 1
        assert len(kl.unique()) < 100
    kurtosis = float((g / g.std()).pow(4).mean())
    assert (kurtosis > 50) == (data == "heavy")


def test_seeds_make_other_numbers():
    a, b = (Problem(work.flat(1000), "gaussian", CPU, seed).grads[0] for seed in (0, 1))
    assert not torch.equal(a, b)


def test_the_share_of_tensors_is_the_nearest(generator):
    problem = Problem(Work("mixed", SHAPES), "gaussian", CPU)
    upper, kept = ours.share_of_tensors(problem, 0.4)
    contender = ours.RoseTensor(problem, 0.4)
    contender.restore()
    contender.step(Clock())
    assert contender.kept() == pytest.approx(kept)
    shares = [ours.share_of_tensors(problem, x / 20)[1] for x in range(1, 20)]
    assert abs(kept - 0.4) == min(abs(share - 0.4) for share in shares)
    assert 0 < upper < 1


class _Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.2), nn.Linear(16, 3))
        self.unused = nn.Parameter(torch.zeros(2))

    def forward(self, inputs):
        return SimpleNamespace(logits=self.layers(inputs))


def test_recording_keeps_what_the_next_step_meets(generator):
    batches = [
        (torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator))
        for _ in range(4)
    ]
    model = _Classifier()
    start = [p.detach().clone() for p in model.layers.parameters()]
    kept = record.record(model, batches, lr=1e-2)
    assert list(kept) == list(work.ROLES)
    for role in kept:
        assert [t.shape for t in kept[role]] == [p.shape for p in start], role
        assert all(t.isfinite().all() and t.any() for t in kept[role]), role
    assert not any(torch.equal(p, s) for p, s in zip(kept["params"], start, strict=True))
    # Two passes differ by their dropout alone: the gradient of their divergence is not that of ce.
    assert not torch.allclose(kept["grads"][0], kept["kl_grads"][0])
    assert all((v >= 0).all() for v in kept["exp_avg_sqs"])


# --------------------------------------------------------------------------------------------- parity


def _check(name: str, problem: Problem, where: device.Device | None = None) -> None:
    where = where or Small()
    spec = specs.specs(where)[name]
    parity.check(name, spec.rtol, spec.make(problem), parity.Expected(problem, where))


@pytest.mark.parametrize("data", ["gaussian", "ties", "recorded"])
@pytest.mark.parametrize("shapes", [[(5000,)], SHAPES], ids=["flat", "list"])
@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
def test_everyone_computes_the_same(recorded, data, shapes, dtype):
    problem = Problem(Work("work", shapes, dtype), data, CPU)
    parity.check_kernels(problem)
    where = Small()
    ran = set()
    for name, spec in specs.specs(where).items():
        if spec.obstacle(problem, where) is None:
            with suppress(contenders.Unavailable, NotImplementedError):
                _check(name, problem, where)
                ran.add(name)
    assert {"AdamW fused", "AdamW fused, clip", "AdamW foreach", "AdamW single", "kthvalue"} <= ran
    assert {"rose exact", "rose approx", "rose first", "rose ensemble", "rose select"} <= ran
    assert {"rose bracket", "rose bracket, clip", "rose ensemble, bracket", "rose exact, clip"} <= ran
    assert {"rose bracket, flat", "rose exact, flat"} <= ran
    assert ("rose bracket, stochastic" in ran) == (dtype == BF16)
    assert ("eager ROSE" in ran) == (dtype == FLOAT and data != "recorded")
    assert ("rose tensors, 40%" in ran) == (len(shapes) > 1)
    assert ("eager ROSE, tensors" in ran) == (len(shapes) > 1 and dtype == FLOAT and data != "recorded")
    assert ("rose exact, bf16 moments" in ran) == (dtype == FLOAT)


def _break_update(step):
    def wrong(self, closure=None):
        step(self, closure)
        p = self.param_groups[0]["params"][0]
        p.data.view(-1)[0] *= 1.01

    return wrong


def _break_moment(step):
    def wrong(self, closure=None):
        step(self, closure)
        p = self.param_groups[0]["params"][0]
        self.state[p]["exp_avg_sq"].mul_(1.0001)

    return wrong


def _break_gradient(step):
    def wrong(self, closure=None):
        step(self, closure)
        self.param_groups[0]["params"][0].grad.view(-1)[1] += 1

    return wrong


@pytest.mark.parametrize("fault", [_break_update, _break_moment, _break_gradient])
@pytest.mark.parametrize("name", ["rose bracket", "rose exact", "rose upper=1"])
def test_a_wrong_step_is_noticed(monkeypatch, fault, name):
    problem = Problem(work.flat(5000), "gaussian", CPU)
    _check(name, problem)
    monkeypatch.setattr(RoseFusedAdamW, "step", fault(RoseFusedAdamW.step))
    with pytest.raises(parity.ParityError, match=name):
        _check(name, problem)


def test_a_peer_that_clips_by_a_wrong_norm_stays_out(monkeypatch):
    problem = Problem(work.flat(5000), "gaussian", CPU)
    _check("AdamW fused, clip", problem)
    right = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: right(*args) * 0.9)
    with pytest.raises(contenders.Unavailable, match="off by 10%"):
        _check("AdamW fused, clip", problem)


@pytest.mark.parametrize("module", ["parity", "ours"])
def test_a_threshold_one_rank_off_is_noticed(monkeypatch, module):
    problem = Problem(work.flat(1000), "gaussian", CPU)
    owner = {"parity": parity, "ours": ours}[module]
    right = owner.select_threshold

    def wrong(*args, upper, **how):
        return right(*args, upper=upper + 0.001, **how)

    monkeypatch.setattr(owner, "select_threshold", wrong)
    with pytest.raises(parity.ParityError, match="threshold"):
        _check("rose select", problem)


def test_a_threshold_of_another_sample_is_noticed(monkeypatch):
    n = parity.APPROX_FEWEST
    problem = Problem(Work("two", [(n // 2 + 9,), (n // 2,)]), "gaussian", CPU)
    _check("rose approx, flat", problem, Cpu())
    monkeypatch.setattr(parity, "_FIRST_DRAW", 1)
    with pytest.raises(parity.ParityError, match="mask differs"):
        _check("rose approx, flat", problem, Cpu())


def test_a_mask_with_one_wrong_bit_is_noticed(monkeypatch):
    problem = Problem(work.flat(1000), "gaussian", CPU)
    right = parity.capture_mask

    def wrong(*args, **how):
        masks, selection = right(*args, **how)
        masks[0][60] ^= 4
        return masks, selection

    monkeypatch.setattr(parity, "capture_mask", wrong)
    with pytest.raises(parity.ParityError, match="mask differs"):
        _check("rose exact", problem)
    with pytest.raises(parity.ParityError, match="reference"):
        parity.check_kernels(problem)


# ------------------------------------------------------------------------------------------ whole runs


def _main(tmp_path: Path, *args: str, where: device.Device | None = None) -> tuple[int, pd.DataFrame]:
    status = run.main([*args, "--output", str(tmp_path)], where or Small())
    (path,) = tmp_path.glob("*.csv")
    return status, pd.read_csv(path)


def _replace_work(monkeypatch, name: str, by: Work) -> None:
    monkeypatch.setitem(run._WORKS, name, (lambda sizes: [by], *run._WORKS[name][1:]))


@pytest.fixture
def beside_whom(monkeypatch) -> list[list[int]]:
    """The processes that every case had, which were children of this one."""
    seen = []

    class Seen(beside.Busy):
        def __enter__(self):
            super().__enter__()
            seen.append(self.pids)
            assert all(psutil.Process(pid).ppid() == os.getpid() for pid in self.pids)
            return self

    monkeypatch.setattr(run, "Busy", Seen)
    return seen


def test_a_run_lists_everyone_with_a_time_or_a_reason(tmp_path, capsys, recorded, beside_whom):
    status, frame = _main(
        tmp_path, "--works", "flat", "--sizes", "2000", "--no-memory", "--repeats", "2",
        "--beside", "0", "2",
    )  # fmt: skip
    assert status == 0
    assert [len(pids) for pids in beside_whom] == [0] * len(work.DATA) + [2]
    assert not any(psutil.pid_exists(pid) for pid in beside_whom[-1])
    assert set(frame["beside"]) == {0, 2}
    busy = frame[frame["beside"] == 2].set_index("contender")
    assert set(busy["data"]) == {"gaussian"}  # by default
    for name in ("eager ROSE", "kthvalue", "rose select"):
        assert busy.at[name, "skipped"] == "by default not beside busy processes; see --only"
    own = busy["ms_p50"] / busy.at["AdamW fused", "ms_p50"]
    assert busy.at["rose approx", "ratio"] == pytest.approx(own["rose approx"], rel=1e-4)
    names = list(specs.specs(Small()))
    for _, case in frame.groupby(report.CASE):
        assert list(case["contender"]) == names
    assert set(frame["data"]) == set(work.DATA)
    timed = frame["ms_p50"].notna()
    assert (timed ^ frame["skipped"].notna()).all()
    assert (frame.loc[timed, "rounds"] >= 1).all()
    steps = timed & (frame["against"] == "AdamW fused")
    assert frame.loc[steps, "ratio"].notna().all()
    assert (frame.loc[frame["contender"] == "AdamW fused", "ratio"] == 1).all()
    exact = frame["contender"] == "rose exact"
    assert (frame.loc[exact, "bytes_per_element"] == 36).all()
    assert [path.name for path in tmp_path.glob("*.png")] == ["cpu.png"]
    out = capsys.readouterr().out
    assert "Not run: rose" in out
    assert "## flat-2000, gaussian, 1 threads, beside 2 busy processes" in out


def test_a_run_of_several_works(tmp_path, monkeypatch, recorded):
    for name, dtype in (("roberta", FLOAT), ("llama", BF16)):
        _replace_work(monkeypatch, name, Work(name, SHAPES, dtype))
    status, frame = _main(
        tmp_path, "--works", "roberta", "llama", "--no-memory", "--repeats", "1", "--threads", "2", "1",
        "--inputs", "2", "--only", "AdamW fused", "rose exact", "rose bracket",
    )  # fmt: skip
    assert status == 0
    assert set(zip(frame["work"], frame["data"], frame["threads"], strict=True)) == {
        (name, data, threads)
        for threads in (1, 2)
        for name, data in (("roberta", "gaussian"), ("roberta", "recorded"), ("llama", "gaussian"))
    }
    row = frame[(frame["work"] == "llama") & (frame["contender"] == "rose exact")].iloc[0]
    assert row["bytes_per_element"] == 18  # half of that in float32


_DIES = """
import os
from benchmarks.beside import Busy
with Busy(1) as busy:
    print(busy.pids[0], flush=True)
    os.kill(os.getpid(), 9)
"""


def _gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE  # nobody waits for it
    except psutil.NoSuchProcess:
        return True


def test_busy_processes_are_busy_and_end_in_any_case():
    with beside.Busy(1) as busy:
        child = psutil.Process(busy.pids[0])
        start, limit = sum(child.cpu_times()[:2]), time.monotonic() + 20
        while sum(child.cpu_times()[:2]) < start + 0.05:
            assert time.monotonic() < limit
    assert not child.is_running()
    with pytest.raises(KeyboardInterrupt), beside.Busy(2) as busy:
        raise KeyboardInterrupt
    assert all(map(_gone, busy.pids))
    busy = beside.Busy(2).__enter__()
    psutil.Process(busy.pids[1]).kill()
    psutil.Process(busy.pids[1]).wait()
    with pytest.raises(RuntimeError, match="too early"):
        busy.__exit__(None)
    assert all(map(_gone, busy.pids))
    died = subprocess.run(
        [sys.executable, "-c", _DIES], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    pid, limit = int(died.stdout), time.monotonic() + 20
    while not _gone(pid):
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_what_is_meant_to_be_busy_is_not_noise(monkeypatch):
    seconds = iter([(100.0, 10.0, 20.0), (109.0, 12.0, 25.0)])  # of all, this process and the other one

    class Process:
        def __init__(self, pid: int = 0) -> None:
            self.pid = pid

        def cpu_times(self):
            return SimpleNamespace(user=now[1 + self.pid], system=0.0)

    class Total(tuple):
        idle = 0.0

    monkeypatch.setattr(psutil, "Process", Process)
    monkeypatch.setattr(psutil, "cpu_times", lambda: Total([now[0]]))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0] / 9)
    now = next(seconds)
    others = machine.Others([1])
    now = next(seconds)
    assert others.cores() == pytest.approx(9 - 2 - 5)


@pytest.mark.parametrize("name", ["cpu", "cpu-avx512", "cpu-large", "cpu-xeon", "nvidia-h200"])
def test_committed_tables_are_read_as_beside_nobody(name, capsys):
    path = Path(run.__file__).parent / "results" / f"{name}.csv"
    frame = report.read(path)
    assert set(frame["beside"]) >= {0}
    assert report.title(frame).endswith(" threads")
    assert run.main(["--check", str(path)]) == 0
    assert "second order over AdamW fused: " in capsys.readouterr().out


@pytest.mark.parametrize("text", [None, "", "a,b\n1,2\n", b"\x89PNG\r\n\x1a\n\xff"])
def test_other_files_are_refused(tmp_path, capsys, text):
    path = tmp_path / "a.csv"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert run.main(["--check", str(path)]) == 2
    assert f"{path}: expected a table that `python -m benchmarks` wrote" in capsys.readouterr().err


def test_nothing_is_timed_if_parity_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(RoseFusedAdamW, "step", _break_update(RoseFusedAdamW.step))
    args = ["--works", "flat", "--sizes", "2000", "--data", "gaussian", "--output", str(tmp_path)]
    assert run.main(args, Small()) == 1
    assert not list(tmp_path.iterdir())
    assert "PARITY FAILED: flat-2000" in capsys.readouterr().err


def test_a_contender_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def fail(self):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(contenders.TorchAdamW, "_step", fail)
    monkeypatch.setattr(report, "plot", plot)
    status, frame = _main(
        tmp_path, "--works", "flat", "--sizes", "2000", "--data", "gaussian", "--repeats", "1",
        "--only", "rose exact", "--no-memory",
    )  # fmt: skip
    assert status == 1
    frame = frame.set_index("contender")
    assert frame.at["AdamW fused", "skipped"] == "FAILED: RuntimeError: out of luck"
    assert frame.at["rose exact", "ms_p50"] > 0
    assert (tmp_path / "cpu.png").stat().st_size > 1000
    assert "AdamW fused FAILED: RuntimeError: out of luck" in capsys.readouterr().err


def test_settings_that_are_not_there_yet_are_listed(tmp_path, monkeypatch):
    def old(*args, selection="exact", **settings):
        if selection == "bracket":
            raise NotImplementedError("not in this year")
        return RoseFusedAdamW(*args, selection=selection, **settings)

    monkeypatch.setattr(ours, "RoseFusedAdamW", old)
    status, frame = _main(
        tmp_path, "--works", "flat", "--sizes", "2000", "--data", "gaussian", "--repeats", "1",
        "--only", "rose bracket", "--no-memory",
    )  # fmt: skip
    assert status == 0
    frame = frame.set_index("contender")
    assert frame.at["rose bracket", "skipped"] == "not in this year"
    assert list(frame.index[frame["ms_p50"].notna()]) == ["AdamW fused"]


def test_nothing_to_measure_is_said(tmp_path, capsys):
    assert run.main(["--works", "tiny", "--beside", "1", "--output", str(tmp_path)], Small()) == 0
    assert "nothing to measure" in capsys.readouterr().out.splitlines()[-1]


def test_wrong_names_are_refused(capsys):
    assert run.main(["--only", "sgd"], Small()) == 2
    assert "--only sgd: no such contender" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run.main(["--beside", "-1"], Small())
    assert "--beside: expected" in capsys.readouterr().err


def test_recordings_that_fail_are_a_reason(tmp_path, monkeypatch, capsys):
    def fail():
        raise record.NoRecording("no network")

    monkeypatch.setattr(record, "load", fail)
    args = ["--works", "flat", "--sizes", "99", "--data", "recorded", "--output", str(tmp_path)]
    assert run.main(args, Small()) == 0
    assert "skipped: no network" in capsys.readouterr().out


@pytest.mark.thin(3)
def test_temporaries_are_those_of_the_step():
    n = 1 << 22
    foreach = memory.measure("AdamW foreach", work.flat(n), Cpu(), 1)
    exact = memory.measure("rose exact", work.flat(n), Cpu(), 1)
    if isinstance(foreach, str) or isinstance(exact, str):
        pytest.skip(f"not measured here: {foreach}, {exact}")
    assert 3.5 * n < foreach < 10 * n
    assert exact < n


# --------------------------------------------------------------------------------------------- targets


def _frame(ratios: dict[str, float], **columns) -> pd.DataFrame:
    rows = [
        {
            "device": "cpu", "work": "flat-64Mi", "data": "gaussian", "threads": 2, "beside": 0,
            "elements": 1 << 26, "full_size": True, "others_busy_cores": 0.0, "contender": name,
            "against": "AdamW fused", "ms_p50": ratio, "peak_bytes": 1 << 20, "gb_per_s": 1.0,
            **columns,
        }
        for name, ratio in ratios.items()
    ]  # fmt: skip
    return report.compare(rows)


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (1.0, "PASS: 1 (at most 1.12; aim 1.06 met)"),
        (1.1, "PASS: 1.1 (at most 1.12; aim 1.06 missed)"),
        (1.2, "FAIL: 1.2 (at most 1.12; aim 1.06 missed)"),
    ],
)
def test_targets(ratio, verdict):
    says = "flat-64Mi, gaussian, 2 threads: second order over AdamW fused: "
    ratios = {"AdamW fused": 1.0, "rose bracket": ratio}
    assert says + verdict in targets.judge(_frame(ratios))
    (busy, *_) = targets.judge(_frame(ratios, others_busy_cores=0.5))
    assert busy == says + verdict.replace(")", "; on a busy machine)")
    for elsewhere in ({"threads": 3}, {"beside": 2}, {"threads": 1, "beside": 1}, {"work": "flat-2Mi"}):
        (other, *_) = targets.judge(_frame(ratios, **elsewhere))
        assert "not judged" in other
        assert "PASS" not in other


@pytest.mark.parametrize(
    ("name", "over", "bound", "where"),
    [
        ("rose approx", "AdamW fused", (1.06, 1.03), {}),
        ("rose bracket", "AdamW fused", (1.12, 1.06), {}),
        ("rose bracket", "AdamW fused", (1.12, 1.06), {"work": "roberta-base"}),
        ("rose bracket", "AdamW fused", (1.25, 1.12), {"work": "roberta-base", "data": "recorded"}),
        ("rose bracket", "AdamW fused", (1.25, 1.12), {"data": "heavy"}),
        ("rose bracket", "AdamW fused", (1.25, 1.12), {"data": "ties"}),
        ("rose bracket", "AdamW fused", (1.25, 1.12), {"data": "denormals"}),
        ("rose bracket", "AdamW fused", (1.25, 1.10), {"threads": 1}),
        ("rose bracket", "AdamW fused", (1.30, 1.10), {"beside": 1}),
        ("rose bracket", "AdamW fused", (1.20, 1.05), {"work": "llama-1b"}),
        ("rose bracket", "AdamW fused", (1.40, 1.15), {"work": "flat-1Mi"}),
        ("rose bracket, clip", "AdamW fused, clip", (0.85, 0.80), {}),
        ("rose ensemble, bracket", "AdamW fused", (1.35, 1.25), {"work": "roberta-base"}),
        ("rose bracket, bf16 moments", "AdamW fused", (0.85, 0.75), {}),
        ("rose tensors, 40%", "AdamW fused", (0.80, 0.66), {"work": "roberta-base"}),
        ("rose exact", "AdamW fused", (1.45, 1.35), {}),
    ],
)
def test_bounds(name, over, bound, where):
    reach, aim = bound
    for value, verdict in ((aim, "PASS"), (reach, "PASS"), (reach + 0.01, "FAIL")):
        (first, *_) = targets.judge(_frame({over: 2.0, name: 2 * value}, **where))
        assert f": {verdict}: {value:.3g} (at most {reach:.3g}; aim {aim:.3g}" in first
        assert first.endswith("met)" if value == aim else "missed)")
    assert ("beside 1 busy process" in first) == ("beside" in where)


def test_targets_on_a_gpu():
    gpu = {"device": "cuda", "threads": 16, "dtype": "float32"}
    ratios = {"AdamW fused": 1.0, "AdamW fused, clip": 1.4, "rose bracket [cuda]": 1.2,
              "rose bracket, clip": 1.3, "rose exact": 1.6, "rose ensemble, bracket": 1.3}  # fmt: skip
    wide = _frame(ratios, **gpu).assign(ns_per_element=lambda frame: frame["ratio"], host_ms=0.5)
    narrow = wide.assign(work="flat-64Mi-bf16", dtype="bfloat16", full_size=False)
    narrow["ns_per_element"] /= 2
    narrow["host_ms"] = 2.0
    assert targets.judge(pd.concat([wide, narrow])) == [
        "flat-64Mi, gaussian: second order over AdamW fused: FAIL: 1.2 (at most 1.1)",
        "flat-64Mi, gaussian: second order with clipping over AdamW fused, clip: PASS: 0.929 "
        "(at most 0.95)",
        "flat-64Mi, gaussian: exact over AdamW fused: FAIL: 1.6 (at most 1.5)",
        "flat-64Mi, gaussian: ensemble with its capture over AdamW fused: PASS: 1.3 (at most 1.4)",
        "flat-64Mi, gaussian: host's time of a step over the device's, worst: PASS: 0.417, "
        "rose bracket (below 1)",
        "flat-64Mi-bf16, gaussian: host's time of a step over the device's, worst: 1.67, rose bracket; "
        "not judged, meant for full sizes",
        "flat-64Mi-bf16 to flat-64Mi, gaussian: bfloat16 parameters and moments over AdamW fused in "
        "float32, per element: FAIL: 0.6 (at most 0.55)",
    ]
    # A list that has no twin in float32 is compared with the flat work.
    (verdict,) = targets.judge(pd.concat([wide, narrow.assign(work="llama-1b")]))[-1:]
    assert verdict.startswith("llama-1b to flat-64Mi, gaussian: bfloat16 parameters")


def test_target_of_scaling():
    parts = [
        _frame({"AdamW fused": 1.0, "rose bracket": ratio}, work=f"flat-{n}Mi", elements=n << 20)
        for n, ratio in ((16, 1.0), (512, 1.04))
    ]
    (*_, verdict) = targets.judge(pd.concat(parts))
    assert "at 512Mi over at 16Mi: PASS: 1.04 (at most 1.05; aim 1 missed)" in verdict
    parts.append(parts[1].assign(beside=1, ratio=2.0))  # nobody's counterpart
    assert targets.judge(pd.concat(parts))[-1] == verdict
    parts.append(parts[0].assign(beside=1))
    (*_, other) = targets.judge(pd.concat(parts))
    assert other.startswith(
        "gaussian, 2 threads, beside 1 busy process: second order over AdamW fused: "
    )
    assert other.endswith("at 512Mi over at 16Mi: 2; not judged, no bound is meant for it")


# ------------------------------------------------------------------------------------------ two results


def _result(path: Path, ratios: dict[str, float], spread: float = 0.01, **columns) -> Path:
    frame = _frame(ratios, **{"machine": "a machine", "torch": "2.13", "rounds": 5, **columns})
    if "skipped" in columns:
        frame = pd.concat([frame, frame.assign(contender=columns["skipped"], ratio=None)])
    low, high = (frame["ratio"] * (1 + sign * spread) for sign in (-1, 1))
    frame.assign(ratio_p20=low, ratio_p80=high).to_csv(path, index=False)
    return path


@pytest.fixture
def compared(tmp_path, capsys):
    """The exit status and what is printed for two results."""

    def compared(old: Path, new: Path, *args: str) -> tuple[int, str]:
        status = compare.main([str(old), str(new), *args])
        out, err = capsys.readouterr()
        return status, out + err

    return compared


BASE = {"AdamW fused": 2.0, "AdamW foreach": 4.0, "rose exact": 3.0}


@pytest.mark.parametrize(
    ("after", "spread", "args", "verdict"),
    [
        (2.3, 0.01, [], "WORSE"),  # noise: 3 * 1.49 * 1% * (2 / 5)**0.5 = 2.8%
        (2.27, 0.01, [], "WORSE"),
        (2.25, 0.01, [], ""),
        (2.55, 0.05, [], "WORSE"),
        (2.45, 0.05, [], ""),
        (2.3, 0.01, ["--tolerance", "0.1"], ""),
        (2.235, 0.0, [], ""),  # by less than the least that counts
        (2.25, 0.0, [], "WORSE"),
        (2.2, 0.01, [], ""),
        (2.1, 0.01, [], "better"),
    ],
)
def test_a_ratio_that_rises_beyond_the_noise_fails(tmp_path, compared, after, spread, args, verdict):
    old = _result(tmp_path / "old.csv", BASE | {"rose bracket": 2.2}, spread)
    new = _result(tmp_path / "new.csv", BASE | {"rose bracket": after}, spread)
    status, out = compared(old, new, *args)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()]
    (row,) = (row for row in rows if row[:1] == ["rose bracket"])
    assert row[1:4] == ["AdamW fused", "1.1", f"{after / 2:.3g}"]
    assert status == (verdict == "WORSE") == ("WORSE: flat-64Mi, gaussian, 2 threads: rose br" in out)
    assert f"Of 2 ratios of rose_ops, {int(status)} are worse, {int(verdict == 'better')} better" in out
    assert row[6:] == ([verdict] if verdict else [])
    assert "Warning" not in out
    assert "Only in" not in out


@pytest.mark.parametrize("name", ["cpu-avx512", "nvidia-h200"])
def test_a_result_is_as_good_as_itself(compared, name):
    path = Path(run.__file__).parent / "results" / f"{name}.csv"
    status, out = compared(path, path, "--tolerance", "0")
    assert status == 0
    assert " 0 are worse, 0 better" in out
    assert "Only in" not in out


def test_noise_is_of_both_results_and_falls_with_rounds(tmp_path, compared):
    calm, loud, often = (
        _result(tmp_path / f"{name}.csv", BASE | {"rose bracket": ratio}, spread, rounds=rounds)
        for name, ratio, spread, rounds in (
            ("calm", 2.2, 0.0, 5), ("loud", 2.4, 0.1, 5), ("often", 2.4, 0.1, 80),
        )
    )  # fmt: skip
    assert compared(calm, loud)[0] == 0
    assert compared(calm, often)[0] == 1
    twice = _result(tmp_path / "twice.csv", BASE | {"rose bracket": 2.9}, 0.0, rounds=2)
    status, out = compared(calm, twice)
    assert status == 0
    assert out.count("too few rounds") == 3
    # Rounds in which the one it is compared with took no part tell nothing of the ratio.
    frame = pd.read_csv(_result(tmp_path / "slow.csv", BASE | {"rose bracket": 2.9}, 0.0))
    frame.loc[frame["contender"] == "AdamW fused", "rounds"] = 2
    frame.to_csv(tmp_path / "slow.csv", index=False)
    assert compared(calm, tmp_path / "slow.csv")[0] == 0


def test_peers_that_moved_are_a_warning(tmp_path, compared):
    old = _result(tmp_path / "old.csv", BASE)
    status, out = compared(old, _result(tmp_path / "new.csv", BASE | {"AdamW foreach": 8.0}))
    assert status == 0
    assert "perhaps the machine did:\n- flat-64Mi, gaussian, 2 threads: AdamW foreach\n" in out


def test_rows_of_one_result_are_listed(tmp_path, compared):
    parts = [
        _result(tmp_path / f"{i}.csv", BASE | {"rose bracket": 2.2}, **columns)
        for i, columns in enumerate(({}, {"beside": 1}, {"data": "heavy"}))
    ]
    both = pd.concat(map(pd.read_csv, parts))
    both[both["beside"] == 0].drop(columns="beside").to_csv(old := tmp_path / "old.csv", index=False)
    new = both[both["data"] == "gaussian"].reset_index(drop=True)
    gone = (new["contender"] == "rose bracket") & (new["beside"] == 0)
    new.loc[gone, ["ms_p50", "ratio"]] = None
    new["beside"] = new["beside"].where(new["beside"] > 0)
    new["skipped"] = pd.Series("FAILED: no luck", new.index).where(gone)
    new.to_csv(tmp_path / "new.csv", index=False)
    status, out = compared(old, tmp_path / "new.csv")
    assert status == 0
    assert (
        f"Only in old, {old}:\n"
        "- flat-64Mi, gaussian, 2 threads: rose bracket (in the other: FAILED: no luck)\n"
        "- flat-64Mi, heavy, 2 threads: the whole case, 3 contenders\n"
    ) in out
    assert (
        "- flat-64Mi, gaussian, 2 threads, beside 1 busy process: the whole case, 3 contenders\n" in out
    )
    assert "Of 1 ratios of rose_ops, 0 are worse" in out
    status, out = compared(parts[0], parts[1])
    assert status == 2
    assert "have no rows in common: nothing was compared" in out


def test_doubts_are_warnings(tmp_path, compared):
    old = _result(tmp_path / "old.csv", BASE)
    new = _result(tmp_path / "new.csv", BASE, machine="another", torch="2.14", others_busy_cores=0.5)
    status, out = compared(old, new)
    assert status == 0
    assert "Warning: not the same machine, software or threads, so this means little:\n" in out
    assert "- machine: a machine; now another\n- torch: 2.13; now 2.14\n" in out
    assert "kept the machine busy during:\n- flat-64Mi, gaussian, 2 threads\n" in out
    (row,) = (line for line in out.splitlines() if line.startswith("| rose exact"))
    assert row.split("|")[-2].strip() == "new"
    frame = pd.read_csv(old)
    both = pd.concat([frame, frame.assign(threads=1)])
    both.to_csv(new, index=False)
    assert "- threads: 2; now 1, 2\n" in compared(old, new)[1]
    frame.loc[frame["contender"] == "rose exact", ["against", "ratio"]] = "AdamW foreach", 99.0
    frame.to_csv(new, index=False)
    status, out = compared(old, new)
    assert status == 0
    assert "not over AdamW fused" in out


def test_what_cannot_be_compared_is_refused(tmp_path, compared, capsys):
    good = _result(tmp_path / "good.csv", BASE)
    frame = pd.read_csv(good)
    bad = tmp_path / "bad.csv"
    for change, says in (
        (pd.concat([frame, frame]), "'AdamW fused' twice in flat-64Mi, gaussian, 2 threads"),
        (frame.assign(ratio="fast"), "expected a table that `python -m benchmarks` wrote"),
        (frame.assign(work=None), "rows without one of device, work"),
        (frame.drop(columns="ratio_p20"), "it lacks the columns ratio_p20"),
    ):
        change.to_csv(bad, index=False)
        for files in ((good, bad), (bad, good)):
            status, out = compared(*files)
            assert status == 2
            assert out.startswith(f"{bad}: expected")
            assert says in out
    for share in ("-1", "nan", "2%"):
        with pytest.raises(SystemExit, match="2"):
            compare.main([str(good), str(good), "--tolerance", share])
        assert "--tolerance: expected a share such as 0.02" in capsys.readouterr().err


def test_plots(tmp_path):
    ratios = {"copy": 0.5, "AdamW fused": 1.0, "rose bracket": 1.1}
    parts = [
        _frame(ratios, work=f"flat-{n}Mi", elements=n << 20, full_size=n >= 64, ns_per_element=1.0,
               ms_p20=1.0, ms_p80=1.0, machine="a machine", isa="AVX", torch="2")
        for n in (1, 64)
    ]  # fmt: skip
    plot(pd.concat(parts), tmp_path / "bars.png")
    assert not report.plot_scaling(pd.concat(parts), tmp_path / "lines.png")
    parts.append(parts[0].assign(work="flat-4Mi", elements=4 << 20))
    assert report.plot_scaling(pd.concat(parts), tmp_path / "lines.png")
    # Not of three sizes if one of them was beside somebody.
    parts[-1]["beside"] = 1
    assert not report.plot_scaling(pd.concat(parts), tmp_path / "lines.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bars.png", "lines.png"]


# ------------------------------------------------------------------------------------------------ GPUs


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert run.main(["--device", "cuda"]) == 2
    assert "finds no GPU" in capsys.readouterr().err


class _Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        assert self.at

    def elapsed_time(self, end: _Event) -> float:
        return (end.at - self.at) * 1e3


class _Graph:
    """Remembers nothing: replays are counted."""

    replays = 0

    def replay(self) -> None:
        self.replays += 1


class _Cuda:
    """What benchmarks/device.py uses of torch.cuda, on the CPU."""

    Event, CUDAGraph = _Event, _Graph

    def __init__(self) -> None:
        self.slept: list[int] = []

    def _sleep(self, cycles: int) -> None:
        self.slept.append(cycles)
        time.sleep(cycles / 2e9)

    def get_device_properties(self, place) -> SimpleNamespace:
        return SimpleNamespace(
            name="Model", total_memory=1 << 30, multi_processor_count=2, L2_cache_size=1 << 10,
            major=9, minor=0,
        )  # fmt: skip

    def is_available(self) -> bool:
        return True

    def mem_get_info(self) -> tuple[int, int]:
        return 8 << 30, 16 << 30

    def max_memory_allocated(self) -> int:
        return 5

    def memory_allocated(self) -> int:
        return 3

    def memory_reserved(self) -> int:
        return 7

    def Stream(self) -> SimpleNamespace:
        return SimpleNamespace(wait_stream=lambda other: None)

    current_stream = Stream

    @contextmanager
    def stream(self, stream):
        yield

    graph = stream

    def synchronize(self) -> None: ...
    def reset_peak_memory_stats(self) -> None: ...
    def empty_cache(self) -> None: ...


@pytest.fixture
def fake(monkeypatch) -> _Cuda:
    import torch._dynamo  # which optimizers do, and which needs more of torch.cuda

    fake = _Cuda()
    for name in dir(fake):
        if not name.startswith("__") and name != "slept":
            assert hasattr(torch.cuda, name), name
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr(run, "_LONGEST_HEAD_START", 1e-3)  # that a device would sleep, beside its host
    return fake


def test_the_cuda_device(fake):
    assert Cuda.why_not() is None
    cuda = Cuda("cpu")
    clock = cuda.clock()
    for _ in range(2):
        with clock:
            time.sleep(0.01)
    assert clock.seconds == pytest.approx(clock.host_seconds, rel=0.1)
    assert clock.seconds >= 0.02
    fake.slept.clear()
    cuda.cool()
    assert fake.slept == []
    cuda.cool(0.01)
    assert fake.slept[0] == pytest.approx(0.01 * 2e9, rel=0.5)  # that the clock's rate was measured
    assert cuda.free_bytes() == (8 << 30) + 4
    calls: list[int] = []
    assert cuda.temporaries(lambda: calls.append(1)) == 2
    cuda.graph(lambda: calls.append(2))()
    assert calls == [1, 2, 2]  # to warm up, and to record
    assert cuda.describe()["capability"] == "9.0"


class Rehearsal(Cuda):
    """As a GPU, on the CPU, with two backends; graphs call what they recorded."""

    backends = ("cpu", "reference")
    chunk = 512

    def graph(self, call):
        super().graph(call)
        return call


@pytest.fixture
def capturable(monkeypatch):
    """CPUs refuse it, rightly."""

    def without_capturable(make):
        return lambda *args, capturable=False, **how: make(*args, **how)

    monkeypatch.setattr(ours, "RoseFusedAdamW", without_capturable(RoseFusedAdamW))
    monkeypatch.setattr(torch.optim, "AdamW", without_capturable(torch.optim.AdamW))


def test_a_run_on_a_gpu_rehearsed(tmp_path, monkeypatch, fake, capturable, recorded):
    _replace_work(monkeypatch, "roberta", Work("list", SHAPES))
    status, frame = _main(
        tmp_path, "--works", "roberta", "--repeats", "2", "--inputs", "2", where=Rehearsal("cpu")
    )
    assert status == 0
    assert (tmp_path / "cuda.png").exists()
    assert set(frame["device"]) == {"cuda"}
    assert "gpu" in frame
    timed = frame[frame["ms_p50"].notna()]
    assert (timed["rounds"] == 2).all()
    assert (timed["host_ms"] > 0).all()
    names = set(timed["contender"])
    for backend in Rehearsal.backends:
        assert {f"rose exact [{backend}]", f"rose ensemble, bracket [{backend}, graph]"} <= names
        assert f"rose select [{backend}]" not in names  # of lists by default
    assert {"AdamW fused, graph", "AdamW foreach, graph", "AdamW fused, clip", "eager ROSE"} <= names
    skipped = frame[frame["skipped"].notna()].set_index("contender")["skipped"]
    assert "not installed" in skipped["apex FusedAdam"].iloc[0]
    assert (timed["peak_bytes"].dropna() == 2).all()


def test_the_preset_rehearsed(tmp_path, monkeypatch, fake, capturable, capsys):
    monkeypatch.setattr(preset, "FEWEST", 1)
    status, frame = _main(
        tmp_path, "--preset", "gpu", "--sizes", "16Ki", "--repeats", "2", where=Rehearsal("cpu")
    )
    assert status == 0
    assert {path.name for path in tmp_path.iterdir()} == {"model.csv", "model.png"}
    assert list(frame["work"].unique()) == [
        "flat-16Ki", "flat-16Ki-bf16", "roberta-base-cut", "roberta-base-cut-bf16", "llama-1b-cut",
    ]  # fmt: skip
    assert frame["ms_p50"].notna().all(), frame[frame["ms_p50"].isna()][["contender", "skipped"]]
    for case in preset.cases([1 << 14]):
        names = frame.loc[frame["work"] == case.work.name, "contender"]
        assert set(names) == set(case.contenders)  # everyone that is asked for exists
        assert (frame.loc[names.index, "of_copy"].notna() | names.isin([*EAGERS])).all()
    assert (frame["host_ms"] > 0).all()
    out = capsys.readouterr().out
    assert "reading half of L2" in out
    assert "host's time of a step" in out
    assert "roberta-base-cut-bf16 to roberta-base-cut, gaussian: bfloat16 parameters" in out


EAGERS = "eager ROSE", "kthvalue"


def test_the_preset_goes_on_without_those_that_fail(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preset, "FEWEST", 1)
    monkeypatch.setattr(RoseFusedAdamW, "step", _break_update(RoseFusedAdamW.step))
    monkeypatch.setattr(preset, "cases", lambda sizes: [
        preset.Case(work.flat(2000), ("AdamW fused", "rose bracket"), 0.0),
        preset.Case(Work("no such dtype", SHAPES, torch.int8), ("AdamW fused",), 0.5),
    ])  # fmt: skip
    status, frame = _main(tmp_path, "--preset", "gpu", "--name", "a")
    assert status == 1
    frame = frame.set_index("contender")
    assert frame.at["AdamW fused", "rounds"] == 1  # there is no time for more
    assert "PARITY FAILED" in frame.at["rose bracket", "skipped"]
    assert "no such dtype: " in capsys.readouterr().err
    monkeypatch.setattr(preset, "SECONDS", -1)
    assert run.main(["--preset", "gpu", "--output", str(tmp_path)], Small()) == 0
    assert "flat-2000: not run, -1 s are over" in capsys.readouterr().out


@pytest.mark.gpu
def test_a_run_on_a_gpu(tmp_path):
    assert run.main(
        ["--device", "cuda", "--works", "flat", "--sizes", "1Mi", "--data", "gaussian", "ties",
         "--repeats", "3", "--output", str(tmp_path)]
    ) == 0  # fmt: skip
    frame = pd.read_csv(tmp_path / "cuda.csv")
    assert frame["ms_p50"].notna().any()
    assert (tmp_path / "cuda.png").exists()
