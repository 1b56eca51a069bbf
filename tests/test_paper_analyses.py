"""The measurements of trained models, from the command to the rows: a tiny model, no network."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import ROOT, command
from hypothesis import given
from hypothesis import strategies as st
from tiny_tasks import NEGATIVE, POSITIVE, save_tiny_study, write_tsv
from torch.nn import functional as F

sys.path.append(str(ROOT))
for module in ("jinja2", "matplotlib", "pandas", "scipy", "transformers", "tqdm", "psutil", "cpuinfo"):
    pytest.importorskip(module, reason="needs the paper extra")

from benchmarks.paper import geometry, probing, upper  # noqa: E402
from benchmarks.paper.runs import Run  # noqa: E402
from rose_ops.finetune import UserError  # noqa: E402
from rose_ops.finetune.classifier import load_model  # noqa: E402
from rose_ops.finetune.data import Examples, load_task  # noqa: E402
from rose_ops.finetune.recipes import Method  # noqa: E402
from rose_ops.finetune.runtime import Runtime  # noqa: E402
from rose_ops.finetune.train import train  # noqa: E402

RUNTIME = Runtime(torch.device("cpu"), "float32")
QUICK = ("steps=4", "eval_every=2", "perturbed=5", "batch_size=8", "max_length=16", "precision=float32")
COMMANDS = {
    "surfaces": ("--points", "3", "--examples", "7", "--methods", "initial", "rose-second"),
    "interpolate": ("--points", "3", "--examples", "7"),
    "probe": (
        *("--pair", "pair", "--methods", "adamw", "--seeds", "0", "1"),
        *("--inoculate", "0", "0.25", "--examples", "6"),
    ),
    "dropout": (
        *("--at", "2", "4", "6", "--examples", "20", "--methods", "rose-first"),
        *("--device", "auto"),
    ),
    "upper": ("--grid", "0.5", "--look", "3", "--examples", "4", "--seeds", "0"),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a model and tasks."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_study(folder)
    header = ("sentence", "linguistic_label", "surface_label")
    for part, n in (("train", 32), ("inoculating", 8), ("test", 10)):
        content = [((POSITIVE, NEGATIVE)[i % 2][i % 3], i % 2, 1 - i % 2) for i in range(n)]
        write_tsv(folder / "msgs" / f"pair.{part}.tsv", header, content)
    return folder


def call(
    tiny: Path, results: Path, *commands: tuple[str, ...]
) -> list[subprocess.CompletedProcess[str]]:
    """What each command ends with."""
    common = [
        *("--data-dir", str(tiny), "--models", str(tiny / "model"), "--results", str(results)),
        *("--threads", "1", "--set", *QUICK),
    ]
    return [command("benchmarks.paper", *one, *common) for one in commands]


@pytest.fixture(scope="module")
def results(tiny, tmp_path_factory):
    """The results folder after every command."""
    folder = tmp_path_factory.mktemp("results")
    for done in call(tiny, folder, *((name, *more) for name, more in COMMANDS.items())):
        assert done.returncode == 0, done.stderr
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def entries(results: Path, command: str) -> list[dict[str, str]]:
    return [x for x in rows(results / "analyses.csv") if x["command"] == command]


def test_every_number_belongs_to_an_entry(results):
    known = {x["analysis"]: x["command"] for x in rows(results / "analyses.csv")}
    for name in ("surfaces", "interpolation", "probing", "dropout", "risks", "uppers"):
        numbers = rows(results / f"{name}.csv")
        assert numbers
        assert {known[x["analysis"]] for x in numbers} == {name}
    assert all(x["revision"] and x["torch"] == torch.__version__ for x in entries(results, "uppers"))


def test_surfaces_are_of_each_model(results):
    numbers, known = rows(results / "surfaces.csv"), entries(results, "surfaces")
    assert [(x["method"], x["steps"]) for x in known] == [("initial", "0"), ("rose-second", "4")]
    for entry in known:
        grid = [x for x in numbers if x["analysis"] == entry["analysis"]]
        assert len({(x["alpha"], x["beta"]) for x in grid}) == len(grid) == 9
    middles = [x["loss"] for x in numbers if (x["alpha"], x["beta"]) == ("0", "0")]
    assert len(set(middles)) == 2


def test_interpolation_has_both_models_on_its_line(results):
    (entry,) = entries(results, "interpolation")
    assert entry["method"] == "rose-ensemble"
    assert json.loads(entry["options"])["second"] == "adamw"
    alphas = [float(x["alpha"]) for x in rows(results / "interpolation.csv")]
    assert alphas == [-0.5, 0, 0.5, 1, 1.5]


def test_probing_and_dropout(results):
    numbers = rows(results / "probing.csv")
    assert [(x["inoculated"], x["n"]) for x in numbers] == [("0", "6"), ("0.25", "6")] * 2
    assert {x["seed"] for x in entries(results, "probing")} == {"0", "1"}
    assert all(x["task"] == "msgs:pair" for x in entries(results, "probing"))
    numbers = rows(results / "dropout.csv")
    assert [(x["step"], x["n"]) for x in numbers] == [("2", "20"), ("4", "20")]


def test_other_data_are_refused(tiny, results, tmp_path):
    assert json.loads((results / "data.json").read_text()).keys() == {"sst2", "msgs:pair"}
    (tmp_path / "data.json").write_text(json.dumps({"sst2": "other", "msgs:pair": "other"}))
    commands = {"dropout": "sst2", "probe": "msgs:pair"}
    outcomes = call(tiny, tmp_path, *((name, *COMMANDS[name]) for name in commands))
    for done, task in zip(outcomes, commands.values(), strict=True):
        assert done.returncode == 1
        assert f"are of other data of {task} than these" in done.stderr
    assert not (tmp_path / "analyses.csv").exists()


def test_what_is_there_is_left_out(tiny, results):
    before = (results / "analyses.csv").read_text()
    (done,) = call(tiny, results, ("surfaces", *COMMANDS["surfaces"]))
    assert done.returncode == 0, done.stderr
    assert "rose-second, sst2, seed 0 is there already" in done.stdout
    assert (results / "analyses.csv").read_text() == before


def test_the_report_takes_what_the_commands_wrote(tiny, results):
    some = ("--tasks", "sst2", "--methods", "adamw", "rose-second", "--granularities", "element")
    (done,) = call(tiny, results, ("run", "--seeds", "0", *some))
    assert done.returncode == 0, done.stderr
    written = command("benchmarks.paper", "report", "--results", str(results))
    assert written.returncode == 0, written.stderr
    html = (results / "report.html").read_text()
    assert "Not measured" not in html
    assert html.count("<img") == 4


ERRORS = {
    ("surfaces", "--methods", "rose-third"): "unknown method 'rose-third'; choose from initial, adamw",
    ("surfaces", "--tasks", "rte", "--methods", "adamw"): "has no folder 'rte'",
    ("interpolate", "--methods", "adamw"): "expected two, the one at 0 and the one at 1",
    ("dropout", "--at", "200", "--methods", "rose-first"): "rose-first has 4 steps, --at 200",
    ("dropout", "--methods", "initial"): "initial has 0 steps",
    ("probe", "--pair", "nothing"): "nothing.train.tsv does not exist",
    ("probe", "--pair", "pair", "--inoculate", "0.5"): "--inoculate 0.5: expected a share",
    ("upper", "--methods", "adamw"): "adamw has none to look at",
    ("upper", "--look", "5"): "--look 5: expected at most the 4 steps of a training",
}


def test_errors_say_what_to_do(tiny, tmp_path):
    outcomes = call(tiny, tmp_path, *ERRORS)
    for done, (asked, message) in zip(outcomes, ERRORS.items(), strict=True):
        assert done.returncode == 1, asked
        assert done.stderr.splitlines()[-1].startswith("error: "), asked
        assert message in done.stderr, asked
    assert not (tmp_path / "analyses.csv").exists()


# ------------------------------------------------------------------------------------------- parts


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1))
def test_matthews_correlation_is_that_of_the_confusion_matrix(pairs):
    predicted, labels = np.array(pairs, dtype=int).T
    both, neither = (predicted & labels).sum(), ((1 - predicted) & (1 - labels)).sum()
    wrong, missed = (predicted & (1 - labels)).sum(), ((1 - predicted) & labels).sum()
    root = float((both + wrong) * (both + missed) * (neither + wrong) * (neither + missed)) ** 0.5
    expected = (both * neither - wrong * missed) / root if root else 0
    assert probing.matthews(predicted, labels) == pytest.approx(expected)


def test_inoculation_replaces_a_share():
    training = Examples([(f"t{i}",) for i in range(20)], [0] * 20)
    extra = Examples([(f"x{i}",) for i in range(6)], [1] * 6)
    mixed = probing.inoculated(training, extra, 0.25, seed=3)
    assert len(mixed) == len(set(mixed.texts)) == 20
    assert mixed.labels == [0] * 15 + [1] * 5
    assert all(
        (text[0][0] == "x") == label for text, label in zip(mixed.texts, mixed.labels, strict=True)
    )
    assert mixed == probing.inoculated(training, extra, 0.25, seed=3)
    assert mixed != probing.inoculated(training, extra, 0.25, seed=4)
    assert set(probing.inoculated(training, extra, 0, seed=0).texts) == set(training.texts)
    with pytest.raises(UserError, match="there are 6"):
        probing.inoculated(training, extra, 0.5, seed=0)


def test_inconsistent_predictions_leave_training_as_it_was(tiny):
    task = load_task("sst2", tiny)
    model, encoder = load_model(str(tiny / "model"), task, 16, 0, RUNTIME)
    data = encoder(task.train)
    dropouts = [x for x in model.modules() if isinstance(x, torch.nn.Dropout)]
    for dropout in dropouts:
        dropout.p = 0.5
    with torch.no_grad():
        model.classifier.weight.mul_(100)  # predictions that differ from each other, however small
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    share = probing.inconsistent(model, data, RUNTIME)
    assert torch.equal(torch.rand(3), expected)
    assert not model.training
    assert 0 < share < 1
    for dropout in dropouts:
        dropout.p = 0.0
    assert probing.inconsistent(model, data, RUNTIME) == 0


def test_losses_are_means_over_the_examples(tiny):
    task = load_task("sst2", tiny)
    model, encoder = load_model(str(tiny / "model"), task, 16, 0, RUNTIME)
    model.eval()
    rows = [encoder(task.test[i : i + 1]).batch([0]) for i in range(len(task.test))]
    with torch.no_grad():
        logits = torch.cat([model(**inputs).logits for inputs, _ in rows])
    labels = torch.cat([label for _, label in rows])
    loss, accuracy = geometry.mean_loss(model, encoder(task.test), RUNTIME)
    assert loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(1) == labels).float().mean().item())


# --------------------------------------------------------------------------------- rules for upper


def test_rules_by_hand():
    risks = np.array([0.1, 0.2, 0.3, 0.9, 1.0, 2.0, 3.0, 4.0])
    assert upper.below_one(risks) == 0.5
    assert upper.below_mean(risks) == 5 / 8  # of 11.5 / 8
    flat = np.sort(np.concatenate([np.linspace(0, 1, 800), np.linspace(1, 50, 200)]))
    assert upper.elbow(flat) == pytest.approx(0.8, abs=0.01)
    assert upper.elbow(np.ones(10)) == 1.0


def test_a_few_huge_risks_move_no_rule():
    generator = random.Random(5)
    risks = np.sort([generator.random() for _ in range(1000)])
    huge = risks.copy()
    huge[-9:] = 1e30
    for name, rule in upper.RULES.items():
        assert rule(huge) == pytest.approx(rule(risks), abs=0.011), name


def test_uppers_are_rounded_to_steps_that_can_be_used():
    assert [upper.rounded(x) for x in (0.0, 0.01, 0.62, 0.63, 0.999)] == [0.05, 0.05, 0.6, 0.65, 1.0]


@pytest.mark.parametrize("granularity", ["element", "tensor"])
def test_observed_risks_are_those_that_are_ranked(tiny, granularity):
    """By the threshold that second-order ROSE reports: the largest risk that it keeps."""
    task = load_task("sst2", tiny)
    run = Run("rose-second", "sst2", granularity=granularity, steps=3, batch_size=8, lr=1e-3)
    observed = []

    def one(method, settings):
        model, encoder = load_model(str(tiny / "model"), task, 16, 0, RUNTIME)
        return train(model, encoder(task.train), method, settings, RUNTIME, seed=0)

    observe = Method(
        "second", recipe=upper.Observed, options={"observe": lambda step, x: observed.append((step, x))}
    )
    one(observe, run.settings())
    assert [step for step, _ in observed] == [1, 2]  # none have moments before the first
    # One step of AdamW, and the first ranking: parameters and moments are still the same.
    history = one(Method("second"), run.settings())
    kept, threshold = (history[1]["masks"]["second"][x] for x in ("kept", "threshold"))
    risks = observed[0][1]
    assert np.all(np.diff(risks) >= 0)
    below = np.searchsorted(risks, threshold * (1 + 1e-4), side="right") / len(risks)
    assert below == pytest.approx(kept, abs=2e-3)
