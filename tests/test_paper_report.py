"""The study's report: made-up rows whose tables are known, and results folders in every state."""

from __future__ import annotations

import csv
import itertools
import json
import re
import sys
from dataclasses import asdict, replace
from html import unescape
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))
for module in ("jinja2", "matplotlib", "pandas", "scipy", "tqdm", "psutil", "cpuinfo"):
    pytest.importorskip(module, reason="needs the paper extra")

from benchmarks.paper import landscape, probing, report, rows, summary, tables, upper  # noqa: E402
from benchmarks.paper.analyses import ANALYSES  # noqa: E402
from benchmarks.paper.methods import METHODS  # noqa: E402
from benchmarks.paper.results import CURVES, RUNS  # noqa: E402
from benchmarks.paper.runner import RESULTS  # noqa: E402
from benchmarks.paper.runs import Run, small  # noqa: E402
from rose_ops.finetune import UserError  # noqa: E402

MACHINE = {
    "machine": "a made-up machine", "threads": 1, "torch": "2.13.0", "used_precision": "float32",
    "date": "2026-01-02T03:04:05+00:00", "revision": "abc123", "seconds": 36.0,
}  # fmt: skip


def write(path: Path, columns, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(content)


def finished(run: Run, clean: float, adversarial: float) -> dict[str, object]:
    scores = {"clean_accuracy": clean, "adversarial_accuracy": adversarial}
    for split in ("clean", "adversarial"):
        scores |= {f"{split}_cross_entropy": 0.5, f"{split}_calibration_error": 0.1}
    return {"run": run.id, **asdict(run), **scores, **MACHINE}


def curve(run: Run, points) -> list[dict[str, object]]:
    return [
        {"run": run.id, **asdict(run), "step": 25 * i, "split": split, "n": 100, "accuracy": accuracy}
        for i, pair in enumerate(points, start=1)
        for split, accuracy in zip(("clean", "adversarial"), pair, strict=True)
    ]


def study(methods, tasks=("sst2", "rte"), seeds=(0, 1, 2), model="minilm"):
    """Runs with accuracies of their own: better methods come later."""
    found = []
    for (i, method), task, seed in itertools.product(enumerate(methods), tasks, seeds):
        run = small(method, task, model, "element", seed)
        found.append((run, 0.8 + 0.002 * seed, 0.3 + 0.02 * i + 0.01 * seed * (1 + i % 2)))
    return found


def save_study(folder: Path, found) -> None:
    write(folder / "runs.csv", RUNS, [finished(*one) for one in found])
    curves = [
        x
        for run, clean, adversarial in found
        for x in curve(run, [(0.6, 0.5), (clean, adversarial), (clean, adversarial)])
    ]
    write(folder / "curves.csv", CURVES, curves)


def save_analysis(folder: Path, command: str, columns, entries) -> None:
    """`entries`: (run, options, rows); numbers are appended as those of the commands are."""
    numbers, known = [], []
    if (folder / "analyses.csv").exists():
        known = list(csv.DictReader((folder / "analyses.csv").open()))
    for i, (run, options, of_run) in enumerate(entries):
        # Ids that a reader could take for numbers.
        analysis = f"{len(known):04d}12e{i:02d}"
        numbers += [{"analysis": analysis, **row} for row in of_run]
        entry = {
            "analysis": analysis,
            "command": command,
            "run": run.id,
            "options": json.dumps(options),
        }
        known.append({**asdict(run), **MACHINE, **entry})
    write(folder / f"{command}.csv", ("analysis", *columns), numbers)
    write(folder / "analyses.csv", ANALYSES, known)


def text_of(html: str) -> str:
    html = re.sub(r"<style>.*?</style>|data:image[^\"]*", "", html, flags=re.DOTALL)
    html = html.replace("</td><td>", " | ").replace("</th><th>", " | ")
    return unescape(re.sub(r"<[^>]+>", "", html))


def assert_self_contained(html: str) -> None:
    assert not re.search(r"<(script|link|iframe)\b", html)
    assert not re.search(r"(src|href)=\"(?!data:|#)", html)
    assert "url(" not in html


# --------------------------------------------------------------------------------- a whole report


def test_nothing_is_there(tmp_path):
    html = report.render(tmp_path / "nowhere")
    assert_self_contained(html)
    text = text_of(html)
    assert "No run has finished: python -m benchmarks.paper run" in text
    assert "No ensemble was run with two γ" in text
    for command in ("dropout", "surfaces", "probe", "interpolate", "upper"):
        assert f"Not measured: python -m benchmarks.paper {command}" in text
    assert "<img" not in html


def test_a_study_that_was_stopped(tmp_path):
    whole = study(["adamw", "random-mask", "rose-second"])
    found = [x for x in whole if not (x[0].method == "rose-second" and x[0].seed > 0)]
    save_study(tmp_path, found)
    for name in ("runs.csv", "curves.csv"):
        with (tmp_path / name).open("a") as file:
            file.write("0123456789ab,adamw,ss")  # a row that is being written
    html = report.render(tmp_path)
    assert_self_contained(html)
    text = text_of(html)
    assert "Fewer than 3 seeds, the number is in brackets: r-drop on sst2 (0)" in text
    assert "rose-second on sst2 (1), rose-second on rte (1)" in text
    assert "adamw on" not in text
    assert "random masks of second order's size" in text
    assert "\nrose-second | 80.0 | 34.0 | 80.0 | 34.0 | 57.0 | 46.0 | 1\n" in text
    # 30, 31 and 32 percent
    assert "\nadamw | 80.2 ± 0.2 | 31.0 ± 1.0 | 80.2 ± 0.2 | 31.0 ± 1.0 | 55.6 | 49.2 | 3\n" in text
    assert "sst2 | rose-second | adamw | +4.0 | – | – | – | fewer than two seeds | 1" in text
    assert "14 runs, 0.1 hours in all." in text
    assert "a made-up machine, 1 threads; float32; torch 2.13.0; commit abc123; 2026-01-02" in text
    assert html.count("<img") == 1  # curves
    assert "Table 2" not in text


def test_all_is_there(tmp_path):
    found = study(METHODS)
    gammas = [
        (replace(run, gamma=gamma, preset="sweep"), clean, adversarial + gamma / 10)
        for run, clean, adversarial in found
        if run.method == "rose-ensemble"
        for gamma in (0.1, 0.9)
    ]
    save_study(tmp_path, [*found, *gammas])
    run = small("rose-second", "sst2", "minilm", "element", 0)
    other = replace(run, method="adamw", granularity="none")
    grid = [{"alpha": a, "beta": b, "loss": a + b, "accuracy": 0.5} for a in (0, 1) for b in (0, 1)]
    save_analysis(
        tmp_path, landscape.SURFACES, landscape.SURFACE_COLUMNS,
        [(x, {"split": "clean"}, grid) for x in (run, other)],
    )  # fmt: skip
    line = [{"alpha": a, "loss": 1 - a, "accuracy": a} for a in (0, 0.5, 1)]
    save_analysis(
        tmp_path, landscape.INTERPOLATION, landscape.LINE_COLUMNS,
        [(run, {"split": "clean", "second": "adamw", "second_run": "1"}, line)],
    )  # fmt: skip
    probed = [
        (
            replace(x, seed=seed, task="msgs:pair"),
            {"inoculated": share},
            [{"inoculated": share, "matthews": seed / 2 - 1, "training_accuracy": 0.9, "n": 100}],
        )
        for x, seed, share in itertools.product((run, other), (0, 1), (0.0, 0.01))
    ]
    save_analysis(tmp_path, probing.PROBING, probing.PROBING_COLUMNS, probed)
    disagree = [{"step": 200, "inconsistent": 0.125, "n": 100}]
    save_analysis(tmp_path, probing.DROPOUT, probing.DROPOUT_COLUMNS, [(run, {"at": [200]}, disagree)])
    save_upper(tmp_path, run)

    html = report.render(tmp_path)
    assert_self_contained(html)
    text = text_of(html)
    assert "Not measured" not in text
    assert "(not there)" not in text
    assert "Fewer than" not in text
    assert "12 of these runs are with other settings" in " ".join(text.split())
    assert html.count("<img") == 4  # curves, surfaces, probing, interpolation
    assert "minilm, element | 0.9 | " in text
    # The best first: with 0.9 it has nine points more on AdvGLUE, with 0.1 one.
    swept = re.findall(r"minilm \| element \| sst2 \| rose-ensemble \| 0.0001 \| 0.4 \| (.*)", text)
    assert [row.split(" | ")[0] for row in swept] == ["0.9", "0.1"]
    assert "minilm | sst2 | element | rose-second | 12.5\n" in text
    assert "minilm | msgs:pair | element | rose-second | 0.01 | -0.750 ± 0.354 | 90.0 ± 0.0 | 2" in text
    assert "Measured with inoculated 0.0, 0.01." in text
    assert "below one | 0.62 | 0.60 | 1.50 |" in text


def test_surfaces_of_two_settings(tmp_path):
    """Those of the first are drawn."""

    def drawn(*losses: float) -> list[str]:
        runs = [
            replace(small("adamw", "sst2", "minilm", "element", 0), steps=150 + i)
            for i in range(len(losses))
        ]
        grids = [
            [{"alpha": a, "beta": b, "loss": loss + a, "accuracy": 0.5} for a in (0, 1) for b in (0, 1)]
            for loss in losses
        ]
        found = [(run, {"split": "clean"}, grid) for run, grid in zip(runs, grids, strict=True)]
        save_analysis(tmp_path, landscape.SURFACES, landscape.SURFACE_COLUMNS, found)
        html = report.render(tmp_path)
        (tmp_path / "analyses.csv").unlink()
        return re.findall(r"data:image[^\"]*", html)

    assert len(drawn(1.0)) == 1
    assert drawn(1.0, 5.0) == drawn(1.0) != drawn(5.0)


def test_a_folder_of_another_version_is_refused(tmp_path):
    write(tmp_path / "runs.csv", ["run", "method"], [{"run": "1", "method": "adamw"}])
    with pytest.raises(UserError, match=r"runs.csv lacks the columns task, model.*another --results"):
        report.render(tmp_path)


def test_text_is_escaped(tmp_path):
    run = small("adamw", "sst2", "minilm", "element", 0)
    save_study(tmp_path, [(replace(run, model="<b>model & co</b>"), 0.8, 0.3)])
    html = report.render(tmp_path)
    assert "<b>" not in html
    assert "&lt;b&gt;model &amp; co" in html


def test_random_masks_are_said_to_be_as_small_as_they_are():
    """In the committed rows and in what is said of them: of second order's size, no other method's."""
    runs = rows.read_runs(RESULTS)
    runs = runs[(runs["task"] == "sst2") & (runs["model"] == "minilm")]
    uppers = runs.groupby("method")["upper"].unique().map(list)
    controls = ("random-mask", "fixed-random-mask", "inverted-mask")
    assert [uppers[x] for x in ("rose-second", *controls)] == [[0.3]] * 4
    assert (uppers["rose-first"], uppers["rose-ensemble"]) == ([0.6], [0.4])
    for page in ("README.md", "docs/paper.md"):
        text = " ".join((ROOT / page).read_text().split())
        assert "of second order's size" in text, page
        assert "mask of the same size" not in text, page


# ------------------------------------------------------------------------------- rows, and choices


def frame(found) -> pd.DataFrame:
    return pd.DataFrame([finished(*one) for one in found])


def test_methods_without_masks_are_compared_at_both_granularities():
    adamw = small("adamw", "sst2", "minilm", "element", 0)
    masks = [small("rose-second", "sst2", "minilm", g, 0) for g in ("element", "tensor")]
    groups = dict(rows.comparisons(frame([(x, 0.8, 0.3) for x in (adamw, *masks)])))
    assert [name[2] for name in groups] == ["element", "tensor"]
    for (_, _, granularity), group in groups.items():
        assert group["method"].tolist() == ["adamw", "rose-second"]
        assert set(group["granularity"]) == {granularity}
    ((name, _),) = rows.comparisons(frame([(adamw, 0.8, 0.3)]))
    assert name == ("small", "minilm", "none")


def test_the_settings_with_most_seeds_are_compared():
    run = small("adamw", "sst2", "minilm", "element", 0)
    many = [(replace(run, lr=2e-4, seed=seed), 0.8, 0.3) for seed in (0, 1)]
    swept = [(replace(run, lr=3e-4, seed=seed, preset="sweep"), 0.8, 0.3) for seed in range(4)]
    main = rows.main_settings(frame([(run, 0.9, 0.3), *many, *swept]))
    assert main["lr"].tolist() == [2e-4, 2e-4]
    # Of as many, the first.
    main = rows.main_settings(frame([(run, 0.9, 0.3), many[0]]))
    assert main["lr"].tolist() == [run.lr]
    assert rows.main_settings(frame(swept)).empty


def test_runs_in_two_precisions_are_not_pooled():
    runs = frame([(small("rose-ensemble", "sst2", "minilm", "tensor", x), 0.8, 0.3) for x in range(3)])
    runs["used_precision"] = ["bfloat16", "float32", "float32"]
    assert rows.main_settings(runs)["seed"].tolist() == [1, 2]
    runs = pd.concat([runs, runs.assign(gamma=0.9)])
    assert set(rows.of_gammas(runs)["used_precision"]) == {"bfloat16"}  # of as many, the first


def test_gammas_are_of_runs_that_differ_in_nothing_else():
    run = small("rose-ensemble", "sst2", "minilm", "tensor", 0)
    other = replace(run, lr=9e-5, gamma=0.3)
    found = [run, replace(run, gamma=0.1, preset="sweep"), replace(run, preset="sweep"), other]
    kept = rows.of_gammas(frame([(x, 0.8, 0.3) for x in found]))
    assert sorted(kept["gamma"]) == [0.1, 0.5]
    assert rows.of_gammas(frame([(x, 0.8, 0.3) for x in (run, other)])).empty


def test_bold_is_better_than_every_baseline():
    methods = ["adamw", "r-drop", "rose-first"]
    ((_, runs),) = rows.comparisons(frame(study(methods, tasks=["sst2"])))
    runs.loc[runs["method"] == "rose-first", "adversarial_accuracy"] = [0.5, 0.52, 0.51]
    table = tables.accuracies(runs, methods, methods[:2], methods[2:])
    assert [cell.bold for cell in table.rows[2]] == [False, False, True, False, False, False]
    # Higher than one of two baselines is not enough.
    runs.loc[runs["method"] == "r-drop", "adversarial_accuracy"] = [0.49, 0.53, 0.51]
    table = tables.accuracies(runs, methods, methods[:2], methods[2:])
    assert not any(cell.bold for row in table.rows for cell in row)


# ---------------------------------------------------------------------------------- rules for upper


def save_upper(folder: Path, run: Run) -> None:
    """Two steps of a look, and trainings with 0.6 and 1."""
    said = [
        {"step": step, "rule": rule, "upper": value + 0.02 * (step - 75), "ranked": 100}
        for step in (74, 75)
        for rule, value in (("below one", 0.63), ("elbow", 0.33))
    ]
    save_analysis(folder, upper.RISKS, upper.RISK_COLUMNS, [(replace(run, upper=1.0), {}, said)])
    trials = []
    for value, accuracy in ((0.6, 0.7), (1.0, 0.8)):
        scores = {"validation": accuracy, "validation-characters": 0.5, "validation-words": 0.6}
        scores |= {"clean": accuracy, "adversarial": 0.4, "characters": 0.5, "words": 0.5}
        measured = [{"split": x, "accuracy": y, "n": 10} for x, y in scores.items()]
        trials.append((replace(run, upper=value), {"examples": 10}, measured))
    save_analysis(folder, upper.TRIALS, upper.TRIAL_COLUMNS, trials)


def test_choices_of_upper(tmp_path):
    run = small("rose-second", "sst2", "minilm", "element", 3)
    save_upper(tmp_path, run)
    known = rows.read(tmp_path / "analyses.csv", ANALYSES)
    risks, trials = (
        rows.read(tmp_path / f"{name}.csv", ["analysis"]).merge(
            known[known["command"] == name].drop(columns=dropped), on="analysis"
        )
        for name, dropped in ((upper.RISKS, ["upper"]), (upper.TRIALS, []))
    )
    chosen = upper.choices(risks, trials).set_index("source")
    # The elbow's 0.3 was not trained, and so has no row.
    assert list(chosen.index) == ["below one", "search", "always 0.6", "AdamW"]
    assert chosen["upper"].tolist() == [0.6, 1.0, 0.6, 1.0]
    assert chosen["trainings"].tolist() == [1 + 75 / run.steps, 2, 1, 1]
    assert chosen.loc["below one", "said"] == pytest.approx(0.62)
    assert chosen.loc["search", "validation"] == pytest.approx((0.8 + 0.55) / 2)


# ------------------------------------------------------------------------------------------- summary


def test_a_summary_of_what_has_enough_seeds(tmp_path):
    found = study(("adamw", "random-mask", "rose-second"), tasks=("sst2",))
    save_study(tmp_path, [*found, *study(("r-drop",), tasks=("sst2",), seeds=(0,))])
    ((title, table),) = summary.tables(tmp_path, fewest=2)
    assert title == "sst2, minilm, by element, small settings, 150 steps"
    assert [tuple(row) for row in table.itertuples(index=False)] == [
        ("adamw", 3, "80.2 ± 0.2", "31.0 ± 1.0", "", "-3.0 (-5.5 to -0.5)", ""),
        ("rose-second", 3, "80.2 ± 0.2", "35.0 ± 1.0", "+4.0", "+1.0 (-1.5 to +3.5)", "+4.0"),
        (
            *("random-mask", 3, "80.2 ± 0.2", "34.0 ± 2.0", "+3.0 (+0.5 to +5.5)", ""),
            "+3.0 (+0.5 to +5.5)",
        ),
    ]
    (_, alone) = next(summary.tables(tmp_path, fewest=1))
    assert alone["method"].tolist() == ["adamw", "r-drop", "rose-second", "random-mask"]
    assert not list(summary.tables(tmp_path, fewest=4))


def test_a_summary_says_of_how_many_runs_a_gain_is(tmp_path):
    """A run that is more accurate than the baseline ever was has nothing to be compared with."""
    above = [
        (run, 0.9, robust) if (run.method, run.seed) == ("rose-second", 0) else (run, clean, robust)
        for run, clean, robust in study(("adamw", "rose-second"), tasks=("sst2",))
    ]
    save_study(tmp_path, above)
    ((_, table),) = summary.tables(tmp_path, fewest=3)
    gain = table.set_index("method").loc["rose-second", summary.COLUMNS[-1]]
    assert gain.startswith("+3.5"), gain
    assert gain.endswith(" [2 of 3 runs]"), gain


def test_the_readme_says_what_the_rows_say():
    """Every row of its tables of methods is one of the summary of the rows that are committed."""
    text = (ROOT / "README.md").read_text().split("## Is it more robust?")[1].split("\n## ")[0]
    said = [
        [x.strip() for x in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|") and "±" in line
    ]
    rows_of = {
        tuple(map(str, row))
        for _, table in summary.tables(RESULTS, fewest=3)
        for row in table.itertuples(index=False)
    }
    assert said
    header = next(line for line in text.splitlines() if line.startswith("| method"))
    assert tuple(x.strip() for x in header.strip("|").split("|")) == summary.COLUMNS
    for row in said:
        assert tuple(row) in rows_of, row
