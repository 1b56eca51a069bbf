"""Checkpoints of FSDP2: saved by some number of processes and resumed by another, bit for bit as a run
that was never stopped, and never in more than one process."""

from __future__ import annotations

import itertools
import multiprocessing
from typing import Any

import pytest
import torch
from forked import Ranks
from training import assert_same
from training import one_thread as one_thread

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or "forkserver" not in multiprocessing.get_all_start_methods(),
    reason="this PyTorch has no torch.distributed, or this system no fork",
)
if torch.distributed.is_available():
    from reshard_ranks import RANKS, SECONDS, Run, serve


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Started once."""
    ranks = Ranks(serve, RANKS, tmp_path_factory.mktemp("ranks"), 2 * SECONDS)
    yield ranks
    ranks.stop()


@pytest.fixture
def run(processes, tmp_path):
    """run(function, size, ...) gives what it returned on each of the ranks."""
    numbers = itertools.count()

    def call(function: str, size: int, **arguments: Any) -> list[Any]:
        store = str(tmp_path / f"store{next(numbers)}")
        return processes.run((function, size, store, arguments), size)

    return call


# Processes, and whether they share the parameters by FSDP2.
JOURNEY = [(2, True), (3, True), (1, True), (1, False), (2, True)]
STEPS = 2  # between two checkpoints
BFLOAT16 = {"dtype": torch.bfloat16, "state_dtype": torch.bfloat16, "param_rounding": "stochastic"}


def assert_unstopped(run, folder, way: str, journey: Any = JOURNEY, **options: Any) -> None:
    """Every process has, after each part of the journey, what a run in one process has that was never
    stopped."""
    masks = options.get("masks", False)
    alone = Run(1, False, **{k: v for k, v in options.items() if k != "masks"})
    source = None
    for part, (size, sharded) in enumerate(journey):
        begin, end = STEPS * part, STEPS * (part + 1)
        expected = {"loaded": alone.whole() if source else {}}
        alone.train(begin, end, captured=masks and source is not None)
        expected["trained"] = alone.whole()
        if masks:
            alone.capture(end)
        saved = str(folder / f"after {end}")
        for found in run(
            "leg", size, sharded=sharded, steps=(begin, end), way=way, folder=saved, source=source,
            seed=part + 1, **options,
        ):  # fmt: skip
            assert_same(found, expected, f"part {part}")
        source = saved


each_way = pytest.mark.parametrize("way", ["by name", "flattened", "by number", "full"])


@pytest.mark.thin(2)
@each_way
@pytest.mark.parametrize("order", ["second", "ensemble"])
def test_another_number_of_processes(run, tmp_path, way, order):
    assert_unstopped(run, tmp_path, way, order=order, lower=0.1)


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    ("way", "options"),
    [
        pytest.param("by name", BFLOAT16, id="stochastic rounding"),
        pytest.param("full", BFLOAT16, id="stochastic rounding, whole"),
        pytest.param("by number", {"kind": "columns"}, id="columns"),
        pytest.param("by name", {"granularity": "tensor", "order": "first"}, id="whole tensors"),
        pytest.param("flattened", {"selection_warmup_steps": 5}, id="warm-up in the third part"),
        pytest.param("by name", {"kind": "large", "selection": "approx"}, id="draws"),
    ],
)
def test_what_depends_on_the_step_goes_on(run, tmp_path, way, options):
    """Bits of rounding, the warm-up, and which sample is drawn."""
    assert_unstopped(run, tmp_path, way, **options)


TENSORS = {"order": "ensemble", "granularity": "tensor"}


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("by number", {"order": "first"}),
        ("by number", TENSORS),
        ("full", {"order": "first"}),
        ("full", {"order": "ensemble", "kind": "columns"}),
    ],
    ids=str,
)
def test_masks_of_the_step_to_come(run, tmp_path, way, options):
    """They are resharded like moments, but that torch.distributed.checkpoint wants to load what it has
    saved: packed masks, or bools."""
    journey = JOURNEY if way == "full" else [part for part in JOURNEY if part[1]]
    assert_unstopped(run, tmp_path, way, journey, masks=True, **options)


def test_masks_that_are_used_again(run, tmp_path):
    """Each for three steps, and checkpoints after two."""
    assert_unstopped(run, tmp_path, "full", order="ensemble", first_order_every=3)


@pytest.mark.parametrize("way", ["by name", "flattened", "full"])
def test_to_adamw_and_back(run, tmp_path, way):
    """With upper=1 both train the same, and what comes back from AdamW is selective as it was."""
    source, ours = None, []
    for part, (size, plain) in enumerate([(2, False), (3, True), (1, False), (2, True)]):
        saved = str(tmp_path / str(part))
        found = run(
            "leg", size, sharded=True, steps=(2 * part, 2 * part + 2), way=way, folder=saved,
            source=source, seed=part, plain=plain, **({} if plain else {"upper": 1}),
        )  # fmt: skip
        for each in found:
            assert_same(each, found[0], f"part {part}")
        if part:
            assert_same(found[0]["loaded"], ours[-1]["trained"], f"part {part}")
        ours.append(found[0])
        source = saved
    alone = Run(0, False, plain=True)
    alone.train(0, 8)
    for name, value in alone.whole().items():
        torch.testing.assert_close(ours[-1]["trained"][name], value)


@pytest.mark.parametrize("order", ["second", "first"])
@pytest.mark.parametrize("kind", ["odd", "columns"])
def test_a_state_of_one_process_is_loaded_by_several(run, tmp_path, order, kind):
    """Each takes its part, of moments and masks, of a file that is no distributed checkpoint."""
    alone = Run(1, False, kind, order=order)
    alone.train(0, 2)
    alone.capture(2)
    path = str(tmp_path / "whole.pt")
    torch.save({"model": alone.model.state_dict(), "optimizer": alone.optimizer.state_dict()}, path)
    loaded = alone.whole()
    alone.train(2, 4, captured=True)
    for found in run("from_one_process", 3, path=path, kind=kind, steps=(2, 4), order=order):
        assert_same(found, {"loaded": loaded, "trained": alone.whole()}, "of one process")


def test_files_of_each_rank(run, tmp_path):
    """Moments and masks that are DTensors: ``torch.load(weights_only=True)`` and safetensors have them
    back as they were."""
    alone = Run(1, False, order="ensemble")
    alone.train(0, 2)
    alone.capture(2)
    alone.train(2, 4, captured=True)
    for found in run("files_of_each_rank", 3, folder=str(tmp_path)):
        for way in ("torch", "safetensors"):
            assert_same(found[way], alone.whole(), way)


def test_other_placements_are_refused(run):
    """As are masks of another shape; with nothing loaded."""
    for found in run("other_placements", 2):
        assert "'exp_avg': it is placed as (Replicate(),)" in found["exp_avg"]
        assert "redistribute it; nothing was loaded" in found["exp_avg"]
        assert "'first_mask' it is placed as (Replicate(),)" in found["first_mask"]
        assert "'first_mask' is not a mask of this parameter; nothing" in found["another shape"]
        assert "'first_mask' is not a mask of this parameter; nothing" in found["packed, too short"]
        assert found["unchanged"]
