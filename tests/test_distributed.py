"""One ranking over several processes is that of one process, bit for bit: real processes over gloo."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from distributed_ranks import SHAPES, STAGES, scale, serve, stagger, train, train_in_one_pass
from forked import Ranks
from torch import nn

from rose_ops import RoseFusedAdamW

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"
)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """run(name, size, ...): what a function of ``distributed_ranks`` returns on each rank."""
    folder, groups = tmp_path_factory.mktemp("ranks"), {}

    def run(name, size, *, lost=(), **arguments):
        if size not in groups:
            groups[size] = Ranks(serve, size, folder)
        return groups[size].run((name, arguments), lost=lost)

    yield run
    for group in groups.values():
        group.stop()


@pytest.fixture
def seed(generator):
    return int(torch.randint(2**31, (), generator=generator))


def bits(tensor):
    return tensor.contiguous().view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


def assert_as_one(results, one, layout):
    """Every rank has what one process has."""
    for rank, result in enumerate(results):
        assert repr(result["selection"]) == repr(one["selection"]), rank  # of NaN, too
        assert result.get("norm") == one["norm"]
    for key, wholes in one["tensors"].items():
        if layout == "cut":
            for i, whole in zip(one["mine"], wholes, strict=True):
                parts = [r["tensors"][key][r["mine"].index(i)] for r in results if i in r["mine"]]
                parts = parts or [whole.reshape(-1)[:0]]
                assert torch.equal(bits(torch.cat(parts)), bits(whole.reshape(-1))), (key, i)
            continue
        for rank, result in enumerate(results):
            for i, found in zip(result["mine"], result["tensors"][key], strict=True):
                whole = wholes[one["mine"].index(i)]
                assert torch.equal(bits(found), bits(whole)), (key, i, rank)


LAYOUTS = [
    *itertools.product(("rows", "cut", "dealt", "beside"), (2, 3, 4)),
    *itertools.product(("columns", "copies"), (3,)),
    *itertools.product(("hybrid", "grid", "nested", "meshes"), (4,)),
]
OPTIONS = {
    "second": {},
    "lower": {"selection": "exact", "lower": 0.2},
    "first": {"order": "first", "upper": 0.3},
    "ensemble": {"order": "ensemble", "upper": (0.7, 0.4)},
    "clipped": {"max_grad_norm": 0.5, "hostile": False},
    "literal": {"inactive": "rank"},
    "plain": {"plain": (1, 4), "without": (0, 5)},
}


# Layouts of several sizes meet the options in turns.
CASES = [
    pytest.param(layout, size, options, id=f"{layout}-{size}-{name}")
    for i, (layout, size) in enumerate(LAYOUTS)
    for j, (name, options) in enumerate(OPTIONS.items())
    if i >= 12 or (i + j) % 2 == 0
]


@pytest.mark.thin(3)
@pytest.mark.parametrize(("layout", "size", "options"), CASES)
def test_masks_are_those_of_one_process(processes, seed, layout, size, options):
    arguments = {"layout": layout, "data_seed": seed, **options}
    results = processes("train", size, **arguments)
    assert_as_one(results, train(0, 1, **{**arguments, "layout": "whole"}), layout)


def test_few_elements(processes, seed):
    """Fewer than one is kept; and of one alone."""
    for shapes, upper in ((((1,),), 0.6), (((2, 1),), 0.4), (((3,), ()), 0.5)):
        arguments = {"data_seed": seed, "shapes": shapes, "upper": upper, "hostile": False}
        results = processes("train", 2, layout="rows", **arguments)
        assert_as_one(results, train(0, 1, layout="whole", **arguments), "rows")


def test_norms_of_scaled_gradients(processes, seed):
    arguments = {"data_seed": seed, "granularity": "tensor", "overflow_on": 3}
    results = processes("scale", 3, layout="rows", **arguments)
    assert_as_one(results, scale(0, 1, layout="whole", **arguments), "rows")


# Norms are of the whole, whose order of summation is another: with a NaN (hostile) they are the same.
WHOLE = ({"hostile": False}, {"hostile": False, "max_grad_norm": 0.3}, {})
WHOLE_CASES = [
    pytest.param(layout, size, {"order": order, **WHOLE[(i + j) % 3]}, id=f"{layout}-{size}-{order}")
    for i, (layout, size) in enumerate(x for x in LAYOUTS if x[0] not in ("cut", "dealt") and x[1] > 2)
    for j, order in enumerate(("first", "second", "ensemble"))
]


@pytest.mark.thin(2)
@pytest.mark.parametrize(("layout", "size", "options"), WHOLE_CASES)
def test_whole_tensors(processes, seed, layout, size, options):
    arguments = {"layout": layout, "data_seed": seed, "granularity": "tensor", **options}
    results = processes("train", size, **arguments)
    assert_as_one(results, train(0, 1, **{**arguments, "layout": "whole"}), layout)


@pytest.mark.parametrize(("layout", "size"), [("rows", 2), ("rows", 3), ("hybrid", 4), ("nested", 4)])
def test_rounding_is_that_of_one_process(processes, seed, layout, size):
    """Parameters that are cut into consecutive elements: keyed on their places in the whole."""
    arguments = {
        "layout": layout, "data_seed": seed, "dtype": torch.bfloat16, "state_dtype": torch.bfloat16,
        "param_rounding": "stochastic",
    }  # fmt: skip
    results = processes("train", size, **arguments)
    assert_as_one(results, train(0, 1, **{**arguments, "layout": "whole"}), layout)


@pytest.mark.parametrize("layout", ["columns", "grid", "meshes"])
def test_copies_are_rounded_alike(processes, seed, layout):
    """Where the bits are others, copies have the same, and masks are those of the values there are."""
    arguments = {"layout": layout, "data_seed": seed, "state_dtype": torch.bfloat16}
    results = processes("train", 4, **arguments)
    assert_as_one(results[1:], results[0], layout)
    one = train(0, 1, **{**arguments, "layout": "whole"})
    for found, expected in zip(
        results[0]["tensors"]["exp_avg_sq"], one["tensors"]["exp_avg_sq"], strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=2**-5, atol=1e-30, equal_nan=True)


LARGE = ((1100, 1000), (37, 33))


@pytest.mark.thin(3)
@pytest.mark.parametrize(
    ("layout", "size"), [("rows", 2), ("rows", 3), ("grid", 4), ("nested", 4), ("meshes", 4)]
)
@pytest.mark.parametrize("order", ["second", "ensemble"])
def test_a_sample_is_that_of_one_process(processes, seed, layout, size, order):
    arguments = {
        "layout": layout, "data_seed": seed, "shapes": LARGE, "selection": "approx", "order": order,
        "lower": 0.1, "steps": 2,
    }  # fmt: skip
    results = processes("train", size, **arguments)
    one = train(0, 1, **{**arguments, "layout": "whole"})
    for result in [one, *results]:
        result["counts"] = result.pop("selection")
        result["selection"] = {kind: found[0] for kind, found in result["counts"].items()}
    assert_as_one(results, one, layout)
    for result in results:  # of the sample
        for kind, (_, kept, ranked, inactive, nonfinite, _) in result["counts"].items():
            of_all = one["counts"][kind]
            assert abs(kept / ranked - of_all[1] / of_all[2]) < 0.01
            assert 16 * 2**13 * 0.98 < ranked + inactive + nonfinite <= 16 * 2**14


@pytest.mark.parametrize("layout", ["cut", "dealt"])
def test_no_sample_of_parts(processes, seed, layout):
    """Where it is not known what is where in the whole, all is counted, as by "exact"."""
    arguments = {"data_seed": seed, "shapes": ((700, 1000), (600, 1000)), "steps": 2}
    results = processes("train", 2, layout=layout, selection="approx", **arguments)
    assert_as_one(results, train(0, 1, layout="whole", selection="exact", **arguments), layout)


# ------------------------------------------------------------------------------------- in one pass

WIDE = ((400, 500), (37, 33), (200, 100))


WIDE_OPTIONS = {
    "second": {},
    "lower": {"lower": 0.2},
    "exact": {"selection": "exact", "lower": 0.2},
    "first": {"order": "first", "upper": 0.3},
    "ensemble": {"order": "ensemble", "upper": (0.7, 0.4), "hostile": False},
    "clipped": {"max_grad_norm": 0.5, "hostile": False},
    "plain": {"plain": (1,), "without": (0,)},
    "bf16": {"dtype": torch.bfloat16, "hostile": False},
}
WIDE_LAYOUTS = (("rows", 2), ("cut", 3), ("dealt", 2), ("beside", 3), ("hybrid", 4), ("meshes", 4))
WIDE_CASES = [
    pytest.param(layout, size, options, id=f"{layout}-{size}-{name}")
    for i, (layout, size) in enumerate(WIDE_LAYOUTS)
    for j, (name, options) in enumerate(WIDE_OPTIONS.items())
    if (i + j) % 2 == 0
]


@pytest.mark.thin(2)
@pytest.mark.parametrize(("layout", "size", "options"), WIDE_CASES)
def test_one_pass_is_that_of_one_process(processes, seed, layout, size, options):
    """Sums between the sample, the pass and its log: brackets, also around what other ranks count."""
    arguments = {"layout": layout, "data_seed": seed, "shapes": WIDE, **options}
    results = processes("train_in_one_pass", size, **arguments)
    assert_as_one(results, train(0, 1, steps=4, **{**arguments, "layout": "whole"}), layout)
    if options.get("selection") == "exact":  # its passes are not reported
        return
    taken = [[report[0] for report in result["reports"]] for result in results]
    assert taken == taken[:1] * size
    assert sum(taken[0]) >= 1  # in a small sample the window may miss a bracket
    logged, redone = ([report[k] for r in results for report in r["reports"]] for k in (2, 3))
    assert sum(logged) > 0
    assert sum(redone) > 0


def test_a_threshold_that_is_elsewhere(processes, seed):
    """More than an octave away from that of the step before: elements are counted, as by "exact"."""
    arguments = {"data_seed": seed, "shapes": WIDE, "steps": 5, "jump": 3, "hostile": False}
    results = processes("train_in_one_pass", 2, layout="rows", **arguments)
    assert_as_one(results, train_in_one_pass(0, 1, layout="whole", **arguments), "rows")
    assert [report[0] for report in results[0]["reports"]][2:4] == [1, 0]


def test_a_threshold_that_most_elements_share(processes, seed):
    """More of them than the logs may hold: it is known to be that of the step before, and counted."""
    arguments = {"data_seed": seed, "shapes": ((1200, 2000),), "hostile": "tied", "order": "first"}
    results = processes("train_in_one_pass", 2, layout="rows", **arguments)
    one = train(0, 1, layout="whole", steps=4, **arguments)
    assert_as_one(results, one, "rows")
    assert [report[:5:4] for report in results[0]["reports"]] == [[0, 0], *[[1, 1]] * 3]


@pytest.mark.parametrize("selection", ["bracket", "exact"])
def test_a_bracket_of_one_key(processes, seed, selection):
    """The last bin of a window that ends at the largest key: it is no collapsed bracket."""
    arguments = {
        "data_seed": seed, "shapes": ((1200, 1000),), "hostile": "largest", "order": "first",
        "selection": selection,
    }  # fmt: skip
    results = processes("train_in_one_pass", 2, layout="rows", **arguments)
    assert_as_one(results, train(0, 1, layout="whole", steps=4, **arguments), "rows")


def test_a_rank_that_knows_no_threshold(processes, seed):
    arguments = {"data_seed": seed, "shapes": WIDE, "upper": 0.3, "order": "first"}
    results = processes("train_in_one_pass", 3, layout="rows", forgets=2, **arguments)
    assert_as_one(results, train(0, 1, layout="whole", steps=4, **arguments), "rows")
    assert [report[0] for report in results[0]["reports"]] == [0, 1, 1, 0]


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_rank_that_is_lost_on_the_way(processes, seed, at):
    """Before the pass nothing is changed; after it, the step is a whole one, by an estimate."""
    arguments = {"data_seed": seed, "shapes": ((500, 500),), "hostile": False, "at": at}
    for result in processes("lost_on_the_way", 2, layout="cut", **arguments):
        p, step, m, v = result["before"]
        new_p, new_step, new_m, new_v = result["after"]
        assert result["is_let_go"]
        if at == 0:
            for old, new in zip(result["before"], result["after"], strict=True):
                assert torch.equal(old, new)
            continue
        assert new_step == step + 1
        assert result["steps"] == 3
        assert result["versions"] == 1
        selected = new_m != m
        risk = (0.1 * result["grad"].abs() / m.abs() - 1).abs()
        assert risk[selected].max() <= risk[~selected].min() * (1 + 1e-5)
        again = nn.Parameter(p.clone())
        optimizer = RoseFusedAdamW([again], lr=1e-2)
        optimizer.state[again] = {"step": step, "exp_avg": m, "exp_avg_sq": v}
        optimizer.set_masks({again: selected}, kind="second")
        again.grad = result["grad"]
        optimizer.step()
        for found, expected in ((new_p, again.detach()), (new_m, m), (new_v, v)):
            assert torch.equal(found, expected)


# ----------------------------------------------------------------------------------------- sums


@pytest.mark.parametrize(
    ("options", "most", "nbytes"),
    [
        ({"selection": "bracket"}, 3, 110_000),
        ({"selection": "bracket", "lower": 0.1}, 3, 220_000),
        ({"selection": "exact", "lower": 0.1}, 3, 220_000),
        ({"selection": "approx"}, 1, 4_200_000),
        ({"granularity": "tensor"}, 1, 100),
        ({"selection": "bracket", "max_grad_norm": 1.0}, 4, 110_000),
        ({"order": "ensemble"}, 6, 220_000),
        ({"upper": 1.0}, 0, 0),
    ],
    ids=str,
)
def test_sums_of_a_step(processes, options, most, nbytes):
    """How many, and that their bytes do not grow with the number of elements."""
    sizes = (1 << 20, 1 << 21)
    few, many = (processes("count", 2, layout="rows", data_seed=1, n=n, **options) for n in sizes)
    assert few[0] == few[1]
    assert many[0] == many[1]
    assert len(few[0]) == len(many[0]) == most
    assert sum(many[0]) <= nbytes
    if options.get("selection") != "approx":
        assert few == many


@pytest.mark.parametrize("steps", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_masks_stay_equal_whoever_is_late(processes, seed, steps):
    """So many steps of 4 processes that wait at random."""
    shapes = ((9, 16), (30,), (5, 5))
    arguments = {"data_seed": seed, "steps": steps, "shapes": shapes, "hostile": False}
    results = processes("stagger", 4, layout="rows", **arguments)
    one = stagger(0, 1, layout="whole", **arguments)
    assert results == [one] * 4
    assert len(set(one)) == steps


def test_an_overflow_that_one_rank_has_seen(processes, seed):
    arguments = {"data_seed": seed, "overflow_on": 0}
    results = processes("scale", 3, layout="rows", **{**arguments, "overflow_on": 2})
    assert_as_one(results, scale(0, 1, layout="whole", **arguments), "rows")


@pytest.mark.parametrize("order", ["second", "ensemble"])
def test_a_rank_without_gradients(processes, seed, order):
    """The others rank what there is, and it takes part."""
    results = processes("nothing_here", 3, layout="dealt", data_seed=seed, order=order)
    fewer = [i for i in range(len(SHAPES)) if i % 3 != 2]
    one = train(0, 1, layout="whole", data_seed=seed, order=order, hostile=False, kept=fewer)
    assert_as_one(results, one, "dealt")


@pytest.mark.parametrize("limit", [False, True])
def test_own_masks_on_a_rank_without_gradients(processes, limit):
    assert processes("own_masks", 2, limit=limit) == [3, 3]


# --------------------------------------------------------------------------------------- engines


@pytest.mark.parametrize("order", ["first", "second", "ensemble"])
@pytest.mark.parametrize("kind", ["fsdp2", "fsdp2-late", "zero", "fsdp1-flat", "fsdp1-original"])
def test_engines_train_what_replicas_train(processes, seed, kind, order):
    """By rose_backward, which runs several backwards of one forward. Engines may add gradients up in
    another order: then masks differ in elements whose risk is within rounding of the threshold."""
    if kind.startswith("fsdp1") and order != "second":
        with pytest.raises(AssertionError, match=r"FSDP1 .* frees and reduces its shards"):
            processes("engine", 2, kind=kind, data_seed=seed, order=order)
        return
    results = processes("engine", 2, kind=kind, data_seed=seed, order=order)
    for result in results:
        assert result["selection"] == results[0]["selection"]
        assert result["selection"][1:] == result["of_twin"][1:]
        wrong = (result["found"] - result["expected"]).abs() > 1e-6
        assert wrong.sum() <= 2


def test_fsdp2_under_a_grad_scaler(processes):
    assert processes("scaler", 3) == [(4.0, 1, 3)] * 3


# ---------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("of_rank", "said"),
    [
        ({"upper": 0.3}, "upper"),
        ({"order": "first"}, "order"),
        ({"seed": 5}, "seed"),
        ({"backend": "reference"}, "backend is 'reference' on rank 2 and 'cpu' on rank 0"),
        ({"lr": 0.5}, "lr is .0.5, 0.5. on rank 2"),
        ({"upper": 1.0}, "upper"),
        ({"max_grad_norm": 1.0}, "max_grad_norm"),
        ({"plain": (1,)}, "groups|parameters"),
        ({"shapes": SHAPES[:-1]}, "parameters"),
        ({"dtype": torch.bfloat16}, "parameters"),
    ],
    ids=str,
)
def test_ranks_that_were_made_differently(processes, seed, of_rank, said):
    results = processes(
        "made_differently", 3, layout="rows", data_seed=seed, of_rank=of_rank, hostile=False
    )
    for text in results:
        assert "were not made alike" in text
        assert re.search(said, text), text
        assert "on rank 2" in text


@pytest.mark.parametrize(
    ("layout", "what"),
    [
        *itertools.product(("rows", "cut"), ("steps", "order", "captures", "optimizers")),
        ("rows", "hyperparameters"),
    ],
)
def test_ranks_at_different_places(processes, seed, what, layout):
    order = {"order": "ensemble"} if what in ("order", "captures") else {}
    results = processes("at_another_place", 3, layout=layout, data_seed=seed, what=what, **order)
    for text in results:
        assert "not at the same place" in text


@pytest.mark.parametrize("selection", ["bracket", "approx"])
def test_stages(processes, seed, selection):
    """Each pair of ranks has DTensors of its own, of other shapes: one ranking over both stages."""
    arguments = {"data_seed": seed, "selection": selection, "max_grad_norm": 2.0}
    results = processes("stages", 4, **arguments)
    one = train(
        0, 1, layout="whole", shapes=[shape for stage in STAGES for shape in stage], hostile=False,
        **{**arguments, "selection": "exact"},
    )  # fmt: skip
    for rank, result in enumerate(results):
        result["mine"] = [i + (len(STAGES[0]) if rank >= 2 else 0) for i in result["mine"]]
    assert_as_one(results, one, "stages")


def test_parts_of_which_one_is_not_ranked(processes, seed):
    """What is frozen, plain or has no gradient is in no ranking; first parameters without memory."""
    results = processes("oddities", 2, data_seed=seed)
    assert results[0] == results[1]
    assert results[0] == [16, 9]


def test_a_state_that_one_rank_has_not(processes, seed):
    """A rank whose parameters were frozen resumes with the others."""
    assert processes("resumed", 2, data_seed=seed) == [4, 4]


def test_a_learning_rate_of_0_and_no_mask(processes, seed):
    """One rank has gradients, the other zeros: both are refused."""
    results = processes("without_mask", 2, data_seed=seed)
    assert all("needs a first-order mask" in text for text in results)


def test_replicas_are_no_parts(processes):
    assert all("as replicas have" in text for text in processes("replicas", 2))


@pytest.mark.parametrize("how", ["exits", "hangs"])
def test_a_rank_that_does_not_come(tmp_path, seed, how):
    group = Ranks(serve, 3, tmp_path)
    lost = (2,) if how == "exits" else ()
    results = group.run(("dies", {"layout": "rows", "data_seed": seed, "how": how}), lost=lost)
    group.stop()
    for text, seconds in results[:2]:
        assert text != "no error"
        assert seconds < 7


def test_what_is_not_clear_is_refused(processes):
    assert processes("refused", 3) == [None] * 3
