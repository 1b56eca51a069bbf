"""`rose_backward` under DistributedDataParallel: two processes over gloo."""

import itertools

import pytest
import torch
from ddp_ranks import RANKS, serve
from forked import Ranks
from training import assert_same


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Started once."""
    ranks = Ranks(serve, RANKS, tmp_path_factory.mktemp("ddp"))
    yield ranks
    ranks.stop()


@pytest.fixture
def run(processes, generator):
    """run(function, ...) gives what it returned on each rank."""
    seed = int(torch.randint(2**31, (), generator=generator))
    return lambda function, **arguments: processes.run((function, {"seed": seed, **arguments}))


def assert_alike(one, other):
    assert_same(other, one, "the other rank")


def assert_as_alone(notes):
    """Masks and parameters are those of one process with the whole batch, but for few elements whose
    risk is within rounding of the threshold."""
    assert notes["alone"] == [0] * len(notes["alone"])
    assert notes["near"]
    assert max(notes["near"]) < 0.02


each_order = pytest.mark.parametrize(
    ("order", "r_drop"), list(itertools.product(("first", "second", "ensemble"), (0.0, 2.0))), ids=str
)
each_captured = pytest.mark.parametrize(
    ("order", "r_drop"), [("first", 0.0), ("second", 2.0), ("ensemble", 2.0)], ids=str
)


@each_order
def test_replicas_stay_alike_and_are_as_one_process(run, order, r_drop):
    one, other = run(
        "train", order=order, r_drop=r_drop, twin=True, ddp={"find_unused_parameters": True}
    )
    assert_alike(one["steps"], other["steps"])
    assert_as_alone(one)
    assert one["flags"] == (True, True)
    captured = {"first": ["first"], "second": ["second"], "ensemble": ["first", "second"]}[order]
    if r_drop == 0 and "second" in captured:
        captured.remove("second")
    assert list(one["steps"][-1]["masks"]) == captured


UNUSED = {"find_unused_parameters": True}


@pytest.mark.parametrize("r_drop", [0.0, 2.0])
def test_masks_that_are_used_again(run, r_drop):
    one, other = run("train", order="ensemble", r_drop=r_drop, twin=True, ddp=UNUSED, every=3)
    assert_alike(one["steps"], other["steps"])
    assert_as_alone(one)
    assert ["first" in step["masks"] for step in one["steps"]] == [True, False, False, True]


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"ddp": {}}, id="plain"),
        pytest.param({"ddp": {"gradient_as_bucket_view": True}}, id="gradient as bucket view"),
        pytest.param({"ddp": {"broadcast_buffers": False}}, id="no broadcast of buffers"),
        pytest.param({"ddp": {"bucket_cap_mb": 1e-3}}, id="small buckets"),
        pytest.param({"ddp": {}, "compiled": True}, id="compiled"),
        pytest.param({"ddp": {}, "scaled": True}, id="scaled"),
        pytest.param({"ddp": {}, "max_grad_norm": 0.1}, id="clipped"),
        pytest.param({"ddp": {}, "max_grad_norm": 0.1, "scaled": True}, id="scaled and clipped"),
    ],
)
def test_ways_to_wrap(run, options):
    one, other = run("train", order="ensemble", r_drop=2.0, twin=True, **options)
    assert_alike(one["steps"], other["steps"])
    assert_as_alone(one)
    for step in one["steps"]:
        assert (step["norm"] is None) == ("max_grad_norm" not in options)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"ddp": {}}, id="plain"),
        pytest.param({"ddp": {"gradient_as_bucket_view": True}}, id="gradient as bucket view"),
        pytest.param({"ddp": {}, "scaled": True, "max_grad_norm": 0.1}, id="scaled and clipped"),
    ],
)
def test_micro_batches_are_one_batch(run, options):
    """Those of all ranks together."""
    one, other = run("train", order="ensemble", r_drop=2.0, twin=True, micro=(3, 1, 12), **options)
    assert_alike(one["steps"], other["steps"])
    assert_as_alone(one)


def test_two_dtypes(run):
    options = {"ddp": {"bucket_cap_mb": 2e-3}, "model": {"dtype": torch.bfloat16}}
    one, other = run("train", order="ensemble", r_drop=2.0, **options)
    assert_alike(one["steps"], other["steps"])


@each_captured
def test_a_parameter_that_one_rank_does_not_use(run, order, r_drop):
    """It hangs neither, nor differs; one that no rank uses has no gradient."""
    one, other = run("train", order=order, r_drop=r_drop, unused=True, ddp={})
    assert_alike(one["steps"], other["steps"])
    for step in one["steps"]:
        gradients = step["gradients"]
        assert [i for i, g in enumerate(gradients) if g is None] == [0], "parameters without a gradient"
        assert all(g.any() for g in gradients[1:])


@pytest.mark.parametrize("order", ["first", "ensemble"])
def test_buffers_are_as_plain_ddp_has_them(run, order):
    results = run("buffers", order=order)
    for found in results:
        for ours, plain, syncs in found:
            assert_alike(ours, plain)
            assert syncs


@each_captured
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("hook", "communication hook"),
        ("builtin hook", "communication hook"),
        ("join", "as many batches on every rank"),
        ("static graph", "static_graph=False"),
        ("no_sync", r"no_sync\(\).*two phases"),
    ],
    ids=lambda x: x if x.isalpha() else "",
)
def test_refusals(run, how, message, order, r_drop):
    for text in run("refused", how=how, order=order, r_drop=r_drop):
        assert pytest.raises(ValueError, match=message).matches(ValueError(text)), text


def test_clipping_what_is_not_averaged_is_refused(run):
    for text in run("refused", how="no_sync", order="second", r_drop=0.0, max_grad_norm=1.0):
        assert "last micro-batch only" in text


def test_no_sync_accumulates_where_masks_come_from_the_step(run):
    (one, expected), (other, _) = run("accumulation")
    assert_alike(one, other)
    torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-6)


def test_ignored_parameters_are_left_alone(run):
    (averaged, ignored), (same, other) = run("ignored")
    assert torch.equal(averaged, same)
    assert not torch.equal(ignored, other)


@pytest.mark.parametrize("order", ["second", "first", "ensemble"])
def test_every_rank_sees_an_overflow(run, order):
    assert run("overflow", order=order) == [(True, 4.0)] * RANKS


@pytest.mark.parametrize("order", ["second", "ensemble"])
def test_a_step_inside_the_forward_of_ddp(run, order):
    one, other = run("inside_forward", order=order, sync=True)
    assert_alike(one, other)
    assert sum(g is not None for g in one) == 6
    one, other = run("inside_forward", order=order, sync=False)
    if order == "second":
        assert any((a != b).any() for a, b in zip(one[1:7], other[1:7], strict=True)), "no_sync()"
    else:
        assert "two phases" in one


def test_accumulation_in_two_phases(run):
    assert_alike(*run("two_phases"))
