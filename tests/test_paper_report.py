"""The study's report: made-up rows whose tables are known, and results folders in every state."""

from __future__ import annotations

import itertools
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))
for module in ("jinja2", "matplotlib", "pandas", "scipy", "tqdm", "psutil", "cpuinfo"):
    pytest.importorskip(module, reason="needs the paper extra")

from made_up_study import save_analysis, save_study, save_upper, study, text_of, write  # noqa: E402

from benchmarks.paper import landscape, probing, report, rows  # noqa: E402
from benchmarks.paper.methods import METHODS  # noqa: E402
from benchmarks.paper.runner import RESULTS  # noqa: E402
from benchmarks.paper.runs import small  # noqa: E402
from rose_ops.finetune import UserError  # noqa: E402


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
    """In the committed rows: of second order's size, and on SST-2 also of that of the others."""
    runs = rows.read_runs(RESULTS)
    runs = runs[(runs["task"] == "sst2") & (runs["model"] == "minilm")]
    uppers = runs.groupby("method")["upper"].unique().map(list)
    controls = ("random-mask", "fixed-random-mask", "inverted-mask")
    assert [uppers[x] for x in ("rose-second", *controls[1:])] == [[0.3]] * 3
    assert (uppers["rose-first"], uppers["rose-ensemble"]) == ([0.6], [0.4])
    assert sorted(uppers["random-mask"]) == [0.3, 0.4, 0.6, 0.7]
    text = " ".join((ROOT / "docs" / "paper.md").read_text().split())
    assert "A mask of second order's size" in text
