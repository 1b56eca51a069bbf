"""What of the rows is compared and averaged, and the summary that is made of it."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))
for module in ("jinja2", "matplotlib", "pandas", "scipy", "tqdm", "psutil", "cpuinfo"):
    pytest.importorskip(module, reason="needs the paper extra")

from made_up_study import finished, save_analysis, save_study, save_upper, study, text_of, write  # noqa: E402

from benchmarks.paper import figures, probing, report, rows, summary, tables, upper  # noqa: E402
from benchmarks.paper.analyses import ANALYSES  # noqa: E402
from benchmarks.paper.runner import RESULTS  # noqa: E402
from benchmarks.paper.runs import small  # noqa: E402
from rose_ops.finetune.presets import candidates  # noqa: E402

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


def test_methods_of_other_steps_are_not_compared():
    """Of a method with most seeds at 600 steps, those with the steps of the others."""
    runs = [small(x, "sst2", "minilm", "tensor", i) for x in ("adamw", "random-mask") for i in range(3)]
    mine = [small("rose-second", "sst2", "minilm", "tensor", i) for i in range(4)]
    longer = [replace(run, steps=600, lr=3e-5) for run in mine]
    found = frame([(run, 0.8, 0.3) for run in (*runs, *longer, mine[0], replace(mine[1], lr=1e-5))])
    main = rows.main_settings(found)
    assert set(main["steps"]) == {150}
    assert main["method"].value_counts().to_dict() == {"adamw": 3, "random-mask": 3, "rose-second": 1}
    assert main.loc[main["method"] == "rose-second", "lr"].tolist() == [mine[0].lr]
    # What belongs to a method may differ between methods, and tasks from each other.
    other = [(replace(run, task="rte", batch_size=16, lr=1e-3), 0.8, 0.3) for run in mine]
    assert len(rows.main_settings(frame([*((run, 0.8, 0.3) for run in runs), *other]))) == 10


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


def chosen_in(folder: Path) -> pd.DataFrame:
    known = rows.read(folder / "analyses.csv", ANALYSES)
    risks, trials = (
        rows.read(folder / f"{name}.csv", ["analysis"]).merge(
            known[known["command"] == name].drop(columns=dropped), on="analysis"
        )
        for name, dropped in ((upper.RISKS, ["upper"]), (upper.TRIALS, []))
    )
    return upper.choices(risks, trials)


def test_choices_of_upper(tmp_path):
    run = small("rose-second", "sst2", "minilm", "element", 3)
    save_upper(tmp_path, run)
    chosen = chosen_in(tmp_path).set_index("source")
    # The elbow's 0.3 was not trained, and so has no row.
    assert list(chosen.index) == ["below one", "search", "always 0.6", "AdamW"]
    assert chosen["upper"].tolist() == [0.6, 1.0, 0.6, 1.0]
    assert chosen["trainings"].tolist() == [1 + 75 / run.steps, 2, 1, 1]
    assert chosen.loc["below one", "said"] == pytest.approx(0.62)
    assert chosen.loc["search", "validation"] == pytest.approx((0.8 + 0.55) / 2)


def merged(tmp_path: Path, name: str) -> None:
    """Put what is in a folder of `tmp_path` to what is in `tmp_path`, with ids of its own."""
    for path in (tmp_path / name).iterdir():
        (tmp_path / path.name).touch()
        content = list(csv.DictReader((tmp_path / path.name).open()))
        more = [{**x, "analysis": name + x["analysis"]} for x in csv.DictReader(path.open())]
        write(tmp_path / path.name, more[0], content + more)


def test_choices_of_several_settings_are_not_averaged(tmp_path):
    run = small("rose-second", "sst2", "minilm", "element", 3)
    save_upper(tmp_path, run)
    expected = chosen_in(tmp_path)[["source", "said", "upper", "clean"]]
    others = {"preset": "x", "steps": 20, "lr": 1e-3}
    for name, value in others.items():
        save_upper(tmp_path / name, replace(run, **{name: value}), better=0.1)
        merged(tmp_path, name)
    chosen = chosen_in(tmp_path)
    assert len(chosen) == 4 * len(expected)
    for _, group in chosen.groupby(["preset", "steps", "lr"]):
        better = 0.0 if (group["lr"] == run.lr).all() and (group["steps"] == 150).all() else 0.1
        better = 0.1 if (group["preset"] == "x").all() else better
        found = group[["source", "said", "upper", "clean"]].reset_index(drop=True)
        pd.testing.assert_frame_equal(found, expected.assign(clean=expected["clean"] + better))
    text = text_of(report.render(tmp_path))
    assert "minilm, element, sst2, preset small, steps 20, lr 0.0001. Said" in text
    # A rule with another look is another source.
    (tmp_path / "again").mkdir()
    entries = [x for x in csv.DictReader((tmp_path / "analyses.csv").open()) if x["command"] == "risks"]
    numbers = list(csv.DictReader((tmp_path / "risks.csv").open()))
    mine = [x for x in numbers if x["analysis"] == entries[0]["analysis"]][:1]
    write(tmp_path / "again" / "analyses.csv", ANALYSES, [{**entries[0], "options": '{"look": 9}'}])
    write(tmp_path / "again" / "risks.csv", mine[0], [{**mine[0], "step": 9, "upper": 1.0}])
    merged(tmp_path, "again")
    again = chosen_in(tmp_path)
    assert again.loc[again["source"] == "below one, 9 steps", "said"].tolist() == [1.0]
    assert again.loc[again["source"] == "below one, 75 steps", "said"].tolist() == [0.62]


def test_measurements_with_several_settings_are_not_averaged(tmp_path):
    run = small("rose-first", "sst2", "minilm", "element", 0)
    runs = [(run, {"examples": 5}), (replace(run, steps=20), {"examples": 5}), (run, {"examples": 9})]
    values = (0.125, 0.25, 0.5)
    save_analysis(
        tmp_path, probing.DROPOUT, probing.DROPOUT_COLUMNS,
        [
            (*one, [{"step": 7, "inconsistent": x, "n": 5}])
            for one, x in zip(runs, values, strict=True)
        ],
    )  # fmt: skip
    save_analysis(
        tmp_path, probing.PROBING, probing.PROBING_COLUMNS,
        [
            (*one, [{"inoculated": 0, "matthews": x, "training_accuracy": x, "n": 5}])
            for one, x in zip(runs, values, strict=True)
        ],
    )  # fmt: skip
    html = report.render(tmp_path)
    text = text_of(html)
    for steps, examples, value in ((150, 5, 0.125), (20, 5, 0.25), (150, 9, 0.5)):
        settings = f'{steps} | {{"examples": {examples}}}'
        assert f"minilm | sst2 | element | rose-first | {settings} | {100 * value:.1f}\n" in text
        assert f"rose-first | 0 | {settings} | {value:.3f} | {100 * value:.1f} | 1\n" in text
        assert f'minilm, sst2, steps {steps}, options {{"examples": {examples}}}' in text
    assert html.count("<img") == 3


def test_a_sweep_over_steps_is_not_averaged():
    run = small("adamw", "sst2", "minilm", "element", 0)
    found = [(replace(run, steps=x, preset="sweep"), 0.8, x / 100) for x in (20, 40)]
    table = tables.sweep(frame(found), [*rows.SETTINGS, "used_precision"])
    assert table.header[7:] == ["steps", "GLUE", "AdvGLUE", "seeds"]
    assert [[x.text for x in row[7:]] for row in table.rows] == [
        ["40", "80.0", "40.0", "1"], ["20", "80.0", "20.0", "1"],
    ]  # fmt: skip


def test_a_line_between_models_is_of_one_measurement(monkeypatch):
    """Of two with other steps and the same seed, there are two."""
    lines = []
    pyplot = figures._pyplot()
    monkeypatch.setattr(figures, "_png", lambda figure: lines.extend(figure.axes[0].get_lines()))
    names = dict.fromkeys(("model", "granularity", "task", "first", "second"), "x")
    points = [
        {**names, "analysis": str(steps), "seed": 0, "alpha": alpha, "loss": steps, "accuracy": 0.5}
        for steps in (20, 40)
        for alpha in (0, 0.5, 1)
    ]
    figures.interpolations(pd.DataFrame(points))
    pyplot.close("all")
    assert [x.get_ydata().tolist() for x in lines[:2]] == [[20] * 3, [40] * 3]


# ------------------------------------------------------------------------------------------- summary


def test_a_summary_of_what_has_enough_seeds(tmp_path):
    found = study(("adamw", "random-mask", "rose-second"), tasks=("sst2",))
    save_study(tmp_path, [*found, *study(("r-drop",), tasks=("sst2",), seeds=(0,))])
    ((title, table),) = summary.tables(tmp_path, fewest=2)
    assert title == "sst2, minilm, by element, small settings, 150 steps"
    assert [tuple(row) for row in table.itertuples(index=False)] == [
        ("adamw", 3, "80.2 ± 0.2", "31.0 ± 1.0", "", "", ""),
        ("rose-second", 3, "80.2 ± 0.2", "35.0 ± 1.0", "+4.0", "+1.0 (-1.5 to +3.5)", "+4.0"),
        (
            *("random-mask, 30%", 3, "80.2 ± 0.2", "34.0 ± 2.0", "+3.0 (+0.5 to +5.5)", ""),
            "+3.0 (+0.5 to +5.5)",
        ),
    ]
    (_, alone) = next(summary.tables(tmp_path, fewest=1))
    assert alone["method"].tolist() == ["adamw", "r-drop", "rose-second", "random-mask, 30%"]
    assert not list(summary.tables(tmp_path, fewest=4))


def test_random_masks_are_of_the_size_of_what_is_compared_with_them(tmp_path):
    """Where none was run, there is no difference; one that differs in more is none."""
    methods = ("adamw", "random-mask", "rose-second", "rose-first", "inverted-mask")
    found = study(methods, tasks=("sst2",))
    uppers = {run.method: run.upper for run, *_ in found}
    sizes = {"rose-first": uppers["rose-first"], "inverted-mask": 1 - uppers["inverted-mask"]}
    assert len({*sizes.values(), uppers["random-mask"]}) == 3
    others = [
        (replace(run, upper=round(kept, 9), **more), clean, robust - gain)
        for kept, gain, more in (
            (sizes["rose-first"], 0.02, {}),
            (sizes["inverted-mask"], 0.04, {}),
            (0.9, 0.0, {}),
            (0.8, 0.0, {"lr": 1e-3}),
        )
        for run, clean, robust in found
        if run.method == "random-mask"
    ]
    save_study(tmp_path, [*found, *others])
    ((_, table),) = summary.tables(tmp_path, fewest=3)
    masks = [x for x in table["method"] if x.startswith("random-mask, ")]
    kept = sorted({uppers["random-mask"], 0.9, *sizes.values()})
    assert masks == [f"random-mask, {x:.0%}" for x in kept]
    runs = {m: [r for run, _, r in found if run.method == m] for m in methods}
    over = table.set_index("method")["over a random mask of its size"]
    for method, gain in (("rose-second", 0.0), ("rose-first", 0.02), ("inverted-mask", 0.04)):
        mean = sum(x - y + gain for x, y in zip(runs[method], runs["random-mask"], strict=True)) / 3
        assert over[method].startswith(f"{100 * mean:+.1f}"), method
    assert over["adamw"] == over[masks[0]] == ""


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


def test_a_summary_says_how_many_runs_are_there_at_once(tmp_path):
    """AdamW has 60% at its first evaluation: less accurate runs are compared with that one."""
    early = [
        (run, 0.55, robust) if run.method == "rose-second" and run.seed else (run, clean, robust)
        for run, clean, robust in study(("adamw", "rose-second"), tasks=("sst2",))
    ]
    save_study(tmp_path, early)
    ((_, table),) = summary.tables(tmp_path, fewest=3)
    gain = table.set_index("method").loc["rose-second", summary.COLUMNS[-1]]
    assert gain.endswith(" [3 of 3 runs, 2 at once]"), gain


def test_the_page_says_how_far_trainings_got():
    """Clean accuracies of AdamW along the way, and how many presets a search competes with."""
    text = " ".join((ROOT / "docs" / "paper.md").read_text().split())
    runs = rows.read_runs(RESULTS)
    curves = rows.read_curves(RESULTS, runs[(runs["model"] == "minilm") & (runs["method"] == "adamw")])
    means = 100 * curves.groupby(["task", "step"])["clean_accuracy"].mean()
    said = {
        "SST-2 the curves have flattened by then (AdamW: {}, {} and {}%": ("sst2", (100, 125, 150)),
        "QNLI they have not ({}, {} and {}%": ("qnli", (50, 100, 150)),
    }
    for sentence, (task, steps) in said.items():
        assert sentence.format(*(f"{means[task, step]:.1f}" for step in steps)) in text
    counts = (len(candidates(order, "sst2")) for order in ("first", "second", "ensemble"))
    sentence = "there are {} for the first order, {} for the second and {} for the ensemble"
    assert sentence.format(*counts) in text


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
