"""`benchmarks/paper`: results that survive a stop, and belong to one task's data."""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked import ROOT, context

sys.path.append(str(ROOT))
for module in ("transformers", "tqdm", "psutil", "cpuinfo"):
    pytest.importorskip(module, reason="needs the paper extra")

from benchmarks.paper import analyses, probing, runner, upper  # noqa: E402
from benchmarks.paper.analyses import Place  # noqa: E402
from benchmarks.paper.results import CURVES, RUNS, Results, append  # noqa: E402
from benchmarks.paper.runs import Run  # noqa: E402
from benchmarks.paper.train import Evaluation, Trained, score  # noqa: E402
from rose_ops.finetune import UserError  # noqa: E402
from rose_ops.finetune.data import Examples, Task, digest, load_task  # noqa: E402

SHARED_DATA = Path(os.environ.get("ROSE_DATA_DIR", ROOT.parent / "shared" / "data"))

MACHINE = {"torch": "1", "used_precision": "float32"}


def a_result(run: Run) -> Trained:
    scores = {"clean": score(torch.eye(2), torch.tensor([0, 1]))}
    return Trained(None, None, [Evaluation(2, scores), Evaluation(4, scores)], [{"ce": 0.5}], 1.0)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_appended_once(tmp_path):
    results = Results(tmp_path)
    runs = [Run("adamw", "sst2", seed=seed) for seed in (0, 1)]
    for run in (*runs, runs[0]):
        results.add(run, a_result(run), 2.0, MACHINE)
    assert [row["run"] for row in rows(results.runs)] == [run.id for run in runs]
    assert [(row["run"], row["step"]) for row in rows(results.curves)] == [
        (run.id, step) for run in runs for step in ("2", "4")
    ]
    assert tuple(rows(results.runs)[0]) == RUNS
    assert tuple(rows(results.curves)[0]) == CURVES
    assert rows(results.runs)[0]["clean_accuracy"] == "1.0"
    assert rows(results.runs)[0]["train_loss"] == "0.5"
    assert results.finished() == {run.id for run in runs}


def test_what_a_stop_left_is_taken_away(tmp_path):
    """A row that was cut off, and curves of a run that is not in runs.csv."""
    results = Results(tmp_path)
    first, second = (Run("adamw", "sst2", seed=seed) for seed in (0, 1))
    for run in (first, second):
        results.add(run, a_result(run), 2.0, MACHINE)
    text = results.runs.read_text()
    results.runs.write_text(text[:-20])
    assert results.finished() == {first.id}
    assert results.drop_orphans() == 2
    assert {row["run"] for row in rows(results.curves)} == {first.id}
    assert results.drop_orphans() == 0
    results.add(second, a_result(second), 2.0, MACHINE)
    assert results.runs.read_text() == text
    assert len(rows(results.curves)) == 4


def test_other_columns_are_refused(tmp_path):
    results = Results(tmp_path)
    results.runs.write_text("run,method\nabc,adamw\n")
    before = results.runs.read_text()
    run = Run("adamw", "sst2")
    with pytest.raises(UserError, match=r"runs\.csv has other columns \(run,method"):
        results.add(run, a_result(run), 2.0, MACHINE)
    assert results.runs.read_text() == before


def test_what_a_disk_does_not_take_is_said_and_taken_back(tmp_path):
    """As a disk that fills up does: a part of the rows, and then an error."""
    path = tmp_path / "some.csv"
    append(path, ["a"], [{"a": i} for i in range(9)])
    before = path.read_text()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, limits[1]))
    try:
        with pytest.raises(UserError, match=r"some\.csv could not be written .*as it was before"):
            append(path, ["a"], [{"a": "x" * 9} for i in range(99)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == before


def test_a_write_that_takes_a_part_goes_on(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, content: write(file, content[:7]))
    append(tmp_path / "some.csv", ["a"], [{"a": i} for i in range(99)])
    assert [row["a"] for row in rows(tmp_path / "some.csv")] == [str(i) for i in range(99)]


def place_in(folder: Path) -> Place:
    return Place(argparse.Namespace(device="cpu"), Results(folder))


def a_surface(folder: Path) -> None:
    options = {"points": 1}
    with place_in(folder).recording(
        "surfaces", Run("adamw", "sst2"), options, ("alpha", "loss")
    ) as measured:
        measured.append({"alpha": 0.5, "loss": 1.0})


def test_a_measurement_that_two_processes_made_is_there_once(tmp_path):
    """Both had looked whether it is there before either had finished."""
    for _ in range(2):
        a_surface(tmp_path)
    assert len(rows(tmp_path / "surfaces.csv")) == len(rows(tmp_path / "analyses.csv")) == 1


def test_numbers_of_a_measurement_that_was_stopped_are_replaced(tmp_path):
    a_surface(tmp_path)
    (number,) = rows(tmp_path / "surfaces.csv")
    append(tmp_path / "surfaces.csv", number, [{**number, "analysis": "other"}])
    (tmp_path / "analyses.csv").unlink()  # so that it was not finished
    a_surface(tmp_path)
    assert [row["analysis"] for row in rows(tmp_path / "surfaces.csv")] == ["other", number["analysis"]]


def test_uppers_are_those_that_rules_said_after_this_look(tmp_path):
    place = place_in(tmp_path)
    run = Run("rose-second", "sst2", upper=1.0)
    for look, value in ((2, 0.3), (9, 0.8)):
        with place.recording(upper.RISKS, run, {"look": look}, upper.RISK_COLUMNS) as said:
            said.append({"step": look, "rule": "elbow", "upper": value, "ranked": 5})
    assert [upper._rules_of(place, run, {"look": look}) for look in (2, 9)] == [[0.3], [0.8]]


def test_the_machine_of_a_measurement_is_known_before_it(tmp_path, monkeypatch):
    """So that one that cannot be described costs no training."""
    monkeypatch.setattr(analyses, "machine", lambda device: {}[device.type])
    with pytest.raises(KeyError, match="cpu"):
        place_in(tmp_path).recording("surfaces", Run("adamw", "sst2"), {}, ("alpha",)).__enter__()


def add_many(folder: Path, start: int) -> None:
    results = Results(folder)
    for seed in range(start, start + 20):
        run = Run("adamw", "sst2", seed=seed)
        results.add(run, a_result(run), 2.0, MACHINE)


def test_several_processes_share_a_folder(tmp_path):
    # Not forked from this one: what is forked after threads were at work may wait for them for ever.
    workers = [context().Process(target=add_many, args=(tmp_path, 10 * i)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    results = Results(tmp_path)
    assert sorted(int(row["seed"]) for row in rows(results.runs)) == list(range(40))
    assert len(rows(results.curves)) == 80


def test_results_are_of_one_set_of_data(tmp_path):
    def some(*labels: int) -> Examples:
        return Examples([(f"sentence {i}",) for i in range(len(labels))], list(labels))

    results = Results(tmp_path)
    task = Task("sst2", ("no", "yes"), some(0, 1), some(1), some(1, 0), {"adv_sst2": some(1)})
    for _ in range(2):  # noted, and found to be the same
        results.check_data("sst2", task)
    assert json.loads(results.data.read_text()) == {"sst2": digest(task)}
    others = {
        "train": replace(task, train=some(0)),
        "test": replace(task, test=some(1, 1)),
        "adversarial": replace(task, adversarial={}),
    }
    for what, other in others.items():
        with pytest.raises(UserError, match=r"other data of sst2 than these.*choose another --results"):
            Results(tmp_path).check_data("sst2", other)
        results.check_data(what, other)  # of another name it is the first
    assert len(json.loads(results.data.read_text())) == 4


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"no data in {SHARED_DATA} (ROSE_DATA_DIR)")
def test_committed_rows_are_of_the_shared_data():
    known = json.loads((runner.RESULTS / "data.json").read_text())
    assert {row["task"] for row in rows(runner.RESULTS / "runs.csv")} <= known.keys()
    msgs = (probing.read_msgs(SHARED_DATA, probing.PAIR, x) for x in probing.PARTS)
    tasks = {f"msgs:{probing.PAIR}": probing.task_of_msgs(*msgs)}
    tasks |= {name: load_task(name, SHARED_DATA) for name in ("sst2", "rte", "qnli")}
    assert known == {name: digest(task) for name, task in tasks.items()}


def test_a_run_is_claimed_by_one(tmp_path):
    one, other = Results(tmp_path), Results(tmp_path)
    run = Run("adamw", "sst2")
    with one.claim(run) as mine, other.claim(run) as theirs:
        assert (mine, theirs) == (True, False)
    with other.claim(run) as theirs:
        assert theirs
