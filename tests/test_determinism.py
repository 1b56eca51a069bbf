"""The same bits from any number of threads, from run to run, from flat and scattered layouts, with
and without flushed denormals, and from every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support import (
    BF16,
    FLOAT,
    HALF,
    KINDS,
    LAYOUTS,
    ONE,
    PLAIN,
    ROSE,
    Problem,
    assert_same_bits,
    bits,
    digest,
    hyper_table,
    place,
    tensor_norms,
    values,
)

from rose_ops import RoseFusedAdamW, reference
from rose_ops.definitions import Mode

# ------------------------------------------------------------------------------ trajectories

STEPS = 30
TOTAL = 140_003  # enough to be shared among 5 threads, and for the sampled window
ORDERS = pytest.mark.parametrize("order", ["first", "second", "ensemble"])


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def flushed_denormals(wanted: bool):
    """The calling thread flushes denormals if that is wanted; afterwards it does not, as before."""
    if wanted and not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def base_data(total: int, generator) -> dict[str, torch.Tensor]:
    """Parameters and gradients, one part ordinary, one of denormals, ties, zeros and some NaN."""
    ordinary = ("normal", "normal", "normal", "ties", "zero")
    odd = ("denormal", "smallest", "underflow", "zero", "ties", "wide")

    def mixed(scale: float) -> torch.Tensor:
        half = total // 2
        x = torch.cat(
            [values(half, ordinary, FLOAT, generator) * scale,
             values(total - half, odd, FLOAT, generator)]
        )  # fmt: skip
        x[torch.randint(0, total, (5,), generator=generator)] = torch.nan
        return x

    return {"p": mixed(1.0).nan_to_num(0.5), "g": mixed(1e-2), "kl": mixed(1e-3)}


def cut(x: torch.Tensor, sizes: list[int] | None, odd: bool) -> list[torch.Tensor]:
    """Into pieces of these sizes; ``odd``: at odd offsets of larger buffers, some with a stride."""
    pieces = [x] if sizes is None else list(x.split(sizes))
    if not odd:
        return [piece.clone() for piece in pieces]
    layouts = ("offset", "contiguous", "strided")
    return [place(piece, layouts[i % 3], offset=i % 2) for i, piece in enumerate(pieces)]


def trajectory(
    data, order: str, *, sizes=None, odd=False, flush=False, backend="cpu", steps=STEPS,
    param=FLOAT, state=None, granularity="element", theta=True,
) -> list[str]:  # fmt: skip
    """A digest of masks and records after every step, of parameters and moments after every tenth.

    Gradients do not depend on the parameters, so what differs here is the optimizer's doing.
    """
    params = [torch.nn.Parameter(piece) for piece in cut(data["p"].to(param), sizes, odd)]
    optimizer = RoseFusedAdamW(
        params, lr=1e-2, order=order, upper=(0.7, 0.6), lower=(0.0, 0.1), gamma=0.3, seed=3,
        backend=backend, state_dtype=state, granularity=granularity,
    )  # fmt: skip
    found = []
    for step in range(1, steps + 1):
        # Every element sees other gradients at every step, and its own again now and then.
        sources = {
            "first": data["kl"].roll(311 * (step % 11)),
            "second": data["g"].roll(977 * (step % 7)) * 2.0 ** (step % 3),
        }
        shown: list[torch.Tensor] = []
        for kind in optimizer.settings.kinds:
            give(params, cut(sources[kind].to(param), sizes, odd))
            with flushed_denormals(flush):
                optimizer.capture(kind, clear=False)
            masks = [optimizer.state[p][f"{kind}_mask"] for p in params]
            pairs = zip(masks, params, strict=True)
            shown.append(torch.cat([reference.unpack(m, p.numel()) for m, p in pairs]))
        give(params, cut(sources["second"].to(param), sizes, odd))
        with flushed_denormals(flush):
            optimizer.step()
        if step % 10 == 0:
            for key in ("exp_avg", "exp_avg_sq"):
                shown += [torch.cat([optimizer.state[p][key].reshape(-1) for p in params])]
            shown += [torch.cat([p.detach().reshape(-1) for p in params])] if theta else []
        for record in optimizer.selection.values():
            shown.append(torch.stack([x.double() for x in record]))
        found.append(digest(shown))
    return found


def give(params, grads) -> None:
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad


def assert_same_trajectory(actual: list[str], expected: list[str]) -> None:
    differ = [t + 1 for t, (a, e) in enumerate(zip(actual, expected, strict=True)) if a != e]
    assert not differ, f"first differs after step {differ[0]}"
    assert len(set(expected)) > 5  # gradients repeat, but nothing stood still


def scattered(total: int, generator) -> list[int]:
    """Sizes that add up to total: large and tiny ones, empty ones among them."""
    sizes = [0, 1, 31, 1025, 0, 70_001, 2, 1023, 64]
    while sum(sizes) < total:
        sizes.append(int(torch.randint(0, 20_000, (), generator=generator)))
    sizes[-1] -= sum(sizes) - total
    return sizes


@pytest.fixture(scope="module")
def data():
    return base_data(TOTAL, torch.Generator().manual_seed(torch.seed()))


@pytest.fixture(scope="module", params=["first", "second", "ensemble"])
def order_and_trajectory(request, data):
    """An order, and its trajectory from one thread on one flat tensor."""
    with threads(1):
        return request.param, trajectory(data, request.param)


@pytest.mark.thin(3)
@pytest.mark.parametrize("count", [1, 2, 3, 7], ids=lambda n: f"threads{n}")
def test_threads_and_runs(data, order_and_trajectory, count):
    order, expected = order_and_trajectory
    with threads(count):
        assert_same_trajectory(trajectory(data, order), expected)


@pytest.mark.thin(2)
@pytest.mark.parametrize("odd", [False, True], ids=["contiguous", "views"])
def test_flat_and_scattered(data, order_and_trajectory, generator, odd):
    """One tensor, and the same cut into many, in views with odd offsets and strides, too."""
    order, expected = order_and_trajectory
    sizes = scattered(TOTAL, generator)
    assert_same_trajectory(trajectory(data, order, sizes=sizes, odd=odd), expected)


@pytest.mark.thin(2)
@ORDERS
def test_flat_and_scattered_in_bfloat16(data, generator, order):
    """Second moments are rounded by random bits, which are those of the element's index."""
    options = {"param": BF16, "state": BF16}
    expected = trajectory(data, order, **options)
    sizes = scattered(TOTAL, generator)
    assert_same_trajectory(trajectory(data, order, sizes=sizes, odd=True, **options), expected)


@pytest.mark.thin(2)
@pytest.mark.parametrize("count", [1, 2], ids=lambda n: f"threads{n}")
def test_flushed_denormals(data, order_and_trajectory, count):
    """In the calling thread, whose share of the work must not differ from the others'."""
    order, expected = order_and_trajectory
    with threads(count):
        assert_same_trajectory(trajectory(data, order, flush=True), expected)


@ORDERS
def test_trajectory_of_the_reference(generator, order):
    """Masks, moments and records are those of the reference for 30 steps: any difference in the
    rounding of a moment shows in a later mask."""
    data = base_data(6007, generator)
    options = {"sizes": [0, 1, 31, 1025, 0, 4950], "theta": False}
    expected = trajectory(data, order, backend="reference", **options)
    assert_same_trajectory(trajectory(data, order, odd=True, **options), expected)


@ORDERS
def test_reference_with_flushed_denormals(generator, order):
    """The reference is a backend that users can ask for, so the promise is its, too."""
    data = base_data(2003, generator)
    expected = trajectory(data, order, backend="reference", steps=10)
    flushed = trajectory(data, order, backend="reference", steps=10, flush=True)
    assert_same_trajectory(flushed, expected)


@ORDERS
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_flushed_denormals_at_tensor_granularity(generator, order, backend):
    """Norms that are denormal, and quotients of such norms."""
    sizes = [13] * 60
    data = {key: values(780, ("smallest", "denormal", "zero"), FLOAT, generator) for key in "pg"}
    data["kl"] = data["g"].flip(0)
    options = {"sizes": sizes, "granularity": "tensor", "backend": backend, "steps": 10}
    expected = trajectory(data, order, **options)
    assert_same_trajectory(trajectory(data, order, flush=True, **options), expected)


# ------------------------------------------------------------------------------ one operator


def flushes() -> bool:
    tiny = torch.tensor([2.0**-130]).view(torch.int32)
    return bool((tiny.view(FLOAT) * 0.5).view(torch.int32) == 0)


def test_the_floating_point_mode_of_the_caller_is_restored(any_ops):
    """After success and after an error, flushing or not."""
    problem = Problem.of([torch.ones(5)])
    for wanted in (True, False):
        with flushed_denormals(wanted):
            record = problem.select(any_ops, ONE)
            problem.capture(any_ops, record)
            problem.update(any_ops, selection=record)
            tensor_norms(any_ops, problem.grads, None)
            assert flushes() == wanted
            with pytest.raises((RuntimeError, IndexError, ValueError)):
                problem.rank(any_ops, [], record, problem.ranking(Mode.GIVEN), first=True)
            assert flushes() == wanted


@pytest.mark.parametrize("kind", ["denormal", "smallest", "underflow"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
def test_flushed_denormals_change_no_mask(any_ops, generator, kind, first):
    """A denormal gradient or moment counts as the number it is, in ranking and update."""
    n = 40_001
    g, m = (values(n, (kind, "normal", "zero"), FLOAT, generator) for _ in range(2))
    v = values(n, (kind, "zero"), FLOAT, generator).abs()

    def run(flush: bool):
        problem = Problem.of([g], [m.clone()], exp_avg_sqs=[v.clone()], inv_scale=torch.tensor(0.125))
        with flushed_denormals(flush):
            record = problem.select(any_ops, 300_000_000, first=first)
            mask = problem.capture(any_ops, record, first=first)
            problem.update(any_ops, mask)
        return [record, *mask, *problem.written]

    for actual, expected in zip(run(True), run(False), strict=True):
        assert_same_bits(actual, expected)


def test_norms_do_not_depend_on_threads_or_runs(ops, generator):
    tensors = [torch.randn(n, generator=generator) for n in (1, 1_000_003, 40_000, 65_537)]
    with threads(1):
        expected = tensor_norms(ops, tensors, None)
    for count in (1, 2, 3, 7):
        with threads(count):
            assert_same_bits(tensor_norms(ops, tensors, None), expected)


# ------------------------------------------------------------------------- instruction sets

CAPABILITIES = {"default": "DEFAULT", "avx2": "AVX2", "avx512": "AVX512"}


def battery(generator) -> list[dict]:
    """Arguments that reach every loop of the kernels: dtypes, layouts, kinds of data, lengths."""
    cases = []
    lengths = (1, 7, 33, 63, 143, 1023, 1025, 2 * 1024 + 17)
    for dtype in (FLOAT, BF16, HALF):
        for i, mix in enumerate([KINDS, ("normal", "zero"), ("ties",), ("denormal", "underflow")]):
            state = (FLOAT, BF16)[i % 2]
            pieces: dict[str, list[torch.Tensor]] = {"p": [], "g": [], "m": [], "v": []}
            for j, n in enumerate(lengths):
                for k, (key, kind) in enumerate(
                    (("p", dtype), ("g", dtype), ("m", state), ("v", state))
                ):
                    data = values(n, mix, kind, generator)
                    layout = LAYOUTS[(i + j * k) % 3]
                    pieces[key].append(place(data.abs() if key == "v" else data, layout, j % 2))
            cases.append(pieces)
    big = {key: [torch.randn(400_003, generator=generator)] for key in "pgm"}
    big["v"] = [torch.rand(400_003, generator=generator)]
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    converted = {key: [patterns.view(BF16).clone(), patterns.view(HALF).clone()] for key in "pg"}
    converted["m"] = converted["v"] = [torch.ones(1 << 16), torch.ones(1 << 16)]
    return [*cases, big, converted]


def run_battery(cases: list[dict]) -> str:
    """A digest of all that the operators make of it. For a subprocess, too."""
    ops, found = torch.ops.rose_ops, []
    for case in cases:
        for inactive in (False, True):
            count = len(case["p"])

            def problem(case=case, inactive=inactive, count=count) -> Problem:
                # expanded or strided inputs stay as they are; what is written is copied
                return Problem.of(
                    case["g"], [t.clone() for t in case["m"]],
                    params=[t.clone() for t in case["p"]],
                    exp_avg_sqs=[t.clone() for t in case["v"]],
                    hyper=hyper_table(ROSE, (0.5, 0.9, 1e-6, 0.1, -1.0, 1.0)),
                    group=torch.arange(count) % 2, gamma=0.3, rank_inactive=inactive, seed=11,
                    lr=torch.tensor([1e-2, 0.1]), inv_scale=torch.tensor(1 / 3),
                )  # fmt: skip

            masks = {}
            for first in (True, False):
                for approx in (True, False):
                    record = problem().select(ops, 600_000_000, 50_000_000, first=first, approx=approx)
                    masks[first] = problem().capture(ops, record, first=first)
                    found += [record, *masks[first]]
            for chosen in ((masks[True],), ((), masks[False]), (masks[True], masks[False])):
                updated = problem()
                found.append(updated.update(ops, *chosen))
                found += updated.written
            updated = problem()
            updated.update(ops, masks[True], selection=record)
            found += updated.written
            updated = problem()
            updated.hyper = hyper_table(PLAIN, PLAIN)
            updated.update(ops)
            found += updated.written
            found.append(tensor_norms(ops, case["g"], None))
    return digest(found)


@pytest.fixture(scope="module")
def battery_and_digest(tmp_path_factory):
    """Saved, since random numbers of torch may depend on the instruction set themselves."""
    path = tmp_path_factory.mktemp("battery") / "cases.pt"
    cases = battery(torch.Generator().manual_seed(torch.seed()))
    torch.save(cases, path)
    return path, run_battery(cases)


@pytest.mark.thin(3)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_instruction_sets_agree(battery_and_digest, capability):
    """ATEN_CPU_CAPABILITY caps what PyTorch and these kernels use."""
    order = list(CAPABILITIES.values())
    if order.index(torch.backends.cpu.get_cpu_capability()) < order.index(CAPABILITIES[capability]):
        pytest.skip(f"this CPU (or ATEN_CPU_CAPABILITY) stops short of {capability}")
    cases, expected = battery_and_digest
    root = Path(__file__).parents[1]
    script = (
        "import sys, torch\n"
        "import rose_ops, test_determinism as t\n"
        f"assert torch.backends.cpu.get_cpu_capability() == {CAPABILITIES[capability]!r}\n"
        "print(t.run_battery(torch.load(sys.argv[1])))"
    )
    path = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", script, str(cases)],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == expected


def test_a_digest_sees_every_bit():
    """The comparison above would notice one bit in one element, and the sign of a zero."""
    x = torch.randn(1000)
    y = x.clone()
    y.view(torch.int32)[999] ^= 1
    assert digest([x]) != digest([y])
    assert digest([torch.zeros(3)]) != digest([torch.tensor([0.0, -0.0, 0.0])])
    assert bits(x).equal(bits(x.clone()))
