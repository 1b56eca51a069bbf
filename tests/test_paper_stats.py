"""Statistics of the study, on made-up rows whose answers are known."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from benchmarks.paper import matched, stats

SETTING = {"preset": "small", "model": "tiny", "granularity": "element", "task": "sst2"}


def runs_of(method, clean, adv, **setting):
    """Rows of runs of seeds 0, 1, ..."""
    return pd.DataFrame(
        {
            **SETTING,
            **setting,
            "method": method,
            "seed": seed,
            "clean_accuracy": x,
            "adversarial_accuracy": y,
        }
        for seed, (x, y) in enumerate(zip(clean, adv, strict=True))
    )


def curve_of(points, method="adamw", seed=0):
    """Rows of one run's evaluations, at steps 0, 10, ..."""
    return pd.DataFrame(
        {
            **SETTING,
            "method": method,
            "seed": seed,
            "step": 10 * i,
            "clean_accuracy": x,
            "adversarial_accuracy": y,
        }
        for i, (x, y) in enumerate(points)
    )


# ------------------------------------------------------------------------------------------ t-tests


def test_a_paired_test_is_that_of_the_textbook():
    first, second = pd.Series([0.5, 0.6, 0.8]), pd.Series([0.4, 0.3, 0.6])
    # Differences 0.1, 0.3, 0.2: mean 0.2, sd 0.1, t = 0.2 / (0.1 / sqrt(3)) with 2 degrees of freedom,
    # for which P(T > t) = 1/2 - t / (2 sqrt(2 + t^2)).
    t = 2 * math.sqrt(3)
    result = stats.compare(first, second)
    assert result.kind == "paired"
    assert result.n == 3
    assert result.difference == pytest.approx(0.2)
    assert result.p == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)))
    reach = scipy_stats.t.ppf(0.975, 2) * 0.1 / math.sqrt(3)
    assert (result.low, result.high) == pytest.approx((0.2 - reach, 0.2 + reach))
    assert stats.compare(second, first).p == pytest.approx(1 - result.p)


def test_pairs_are_of_the_seeds_that_both_have(generator):
    seed = int(generator.initial_seed()) % 2**32
    random = np.random.default_rng(seed)
    first = pd.Series(random.normal(size=4), index=[3, 0, 1, 7])
    second = pd.Series(random.normal(size=4), index=[0, 1, 3, 8])
    result = stats.compare(first, second)
    expected = scipy_stats.ttest_rel(first[[0, 1, 3]], second[[0, 1, 3]], alternative="greater")
    assert (result.kind, result.n) == ("paired", 3)
    assert result.p == pytest.approx(expected.pvalue)
    assert result.difference == pytest.approx((first[[0, 1, 3]] - second[[0, 1, 3]]).mean())


def test_without_common_seeds_the_test_is_welchs():
    first, second = pd.Series([0.9, 0.7, 0.8], [0, 1, 2]), pd.Series([0.5, 0.1], [3, 4])
    result = stats.compare(first, second)
    # sd^2 / n: 0.01 / 3 and 0.08 / 2
    t = 0.5 / math.sqrt(0.01 / 3 + 0.04)
    freedom = (0.01 / 3 + 0.04) ** 2 / ((0.01 / 3) ** 2 / 2 + 0.04**2)
    assert result.kind == "welch"
    assert result.n == 2
    assert result.p == pytest.approx(scipy_stats.t.sf(t, freedom))


@pytest.mark.parametrize("swapped", [False, True])
def test_one_common_seed_is_one_pair(swapped):
    """What the other seeds differ by is not a difference between methods."""
    many, few = pd.Series([0.9, 0.1, 0.2], [0, 1, 2]), pd.Series([0.7, 0.8], [0, 5])
    result = stats.compare(*((few, many) if swapped else (many, few)))
    assert (result.kind, result.n) == ("fewer than two seeds", 1)
    assert result.difference == pytest.approx(-0.2 if swapped else 0.2)
    assert all(math.isnan(x) for x in (result.low, result.high, result.p))


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        pytest.param([0.5], [0.4], "fewer than two seeds", id="one seed"),
        pytest.param([], [0.4, 0.3], "fewer than two seeds", id="none"),
        pytest.param([0.5, np.nan], [0.4, 0.3], "fewer than two seeds", id="one missing"),
        pytest.param([0.5, 0.6], [0.5, 0.6], "the differences do not vary", id="ties"),
        # 0.3 - 0.1 and 0.4 - 0.2 differ in the last bit
        pytest.param([0.3, 0.4], [0.1, 0.2], "the differences do not vary", id="equal gains"),
    ],
)  # fmt: skip
def test_where_there_is_no_test_it_says_why(first, second, why):
    result = stats.compare(pd.Series(first, dtype=float), pd.Series(second, dtype=float))
    assert result.kind == why
    assert math.isnan(result.p)


def test_a_seed_that_comes_twice_is_refused():
    with pytest.raises(ValueError, match="seed 1 comes twice"):
        stats.compare(pd.Series([0.1, 0.2], [1, 1]), pd.Series([0.1, 0.2], [0, 1]))


def test_methods_are_compared_within_their_settings():
    runs = pd.concat(
        [
            runs_of("adamw", [0.9, 0.9], [0.1, 0.2]),
            runs_of("first", [0.9, 0.9], [0.3, 0.5]),
            runs_of("first", [0.9, 0.9], [0.7, 0.9], task="rte"),
            runs_of("second", [0.9, 0.9], [0.2, 0.1], granularity="tensor"),
        ]
    )
    table = stats.compare_methods(runs, ["first", "second"], ["adamw", "first"], "adversarial_accuracy")
    assert table[["task", "method", "baseline"]].to_numpy().tolist() == [["sst2", "first", "adamw"]]
    assert table.loc[0, "difference"] == pytest.approx(0.25)
    assert table.loc[0, "q"] == table.loc[0, "p"]


def test_adjusted_p_values_are_those_of_benjamini_and_hochberg():
    runs = pd.concat(
        [
            runs_of("adamw", [0] * 3, [0.1, 0.2, 0.3]),
            runs_of("rdrop", [0] * 3, [0.1, 0.25, 0.2]),
            runs_of("first", [0] * 3, [0.3, 0.5, 0.4]),
            runs_of("second", [0] * 3, [0.1, 0.2, 0.3]),  # no test against AdamW: ties
        ]
    )
    table = stats.compare_methods(runs, ["first", "second"], ["adamw", "rdrop"], "adversarial_accuracy")
    assert len(table) == 4
    tested = table.dropna(subset="p").sort_values("p")
    assert len(tested) == 3
    adjusted = [p * 3 / rank for rank, p in enumerate(tested["p"], start=1)]
    expected = [min(adjusted[i:]) for i in range(3)]
    assert tested["q"].tolist() == pytest.approx(expected)
    assert table.loc[table["p"].isna(), "q"].isna().all()


def test_nothing_to_compare():
    runs = pd.DataFrame(columns=[*stats.SETTING, "method", "seed", "adversarial_accuracy"])
    table = stats.compare_methods(runs, ["first"], ["adamw"], "adversarial_accuracy")
    assert table.empty
    assert "q" in table


# ---------------------------------------------------------------------------------------- averages


def test_means_over_seeds():
    runs = pd.concat([runs_of("b", [0.5, 0.7], [0.1, np.nan]), runs_of("a", [0.4], [0.3])])
    table = stats.over_seeds(runs, ["clean_accuracy", "adversarial_accuracy"], ["method"])
    assert table.index.tolist() == ["b", "a"]
    assert table.loc["b", "clean_accuracy"].tolist() == pytest.approx([0.6, math.sqrt(0.02), 2])
    assert table.loc["b", ("adversarial_accuracy", "n")] == 1
    assert math.isnan(table.loc["a", ("clean_accuracy", "sd")])


def test_macro_averages_are_the_papers():
    """The last columns of Table 1 follow from its others: ROSE-Ensemble, RoBERTa-base."""
    clean = {"sst2": 94.09, "rte": 78.63, "qnli": 92.64, "qqp": 90.39}
    adv = {"sst2": 39.36, "rte": 38.02, "qnli": 39.59, "qqp": 47.44}
    runs = pd.concat(runs_of("ensemble", [clean[t]] * 2, [adv[t]] * 2, task=t) for t in clean)
    partial = runs[runs["task"] != "qqp"].assign(method="partial")
    table = stats.macro_average(pd.concat([runs, partial]))
    assert table.loc["ensemble"].tolist() == pytest.approx([65.02, 47.84], abs=0.006)
    assert table.loc["partial"].isna().all()


def test_a_task_without_adversarial_scores_leaves_the_average_out():
    runs = pd.concat([runs_of("a", [0.9], [0.1]), runs_of("a", [0.9], [np.nan], task="qqp")])
    assert stats.macro_average(runs).loc["a"].isna().all()


# --------------------------------------------------------------------------- matched clean accuracy


@pytest.mark.parametrize(
    ("clean", "expected"),
    [
        pytest.param(0.7, (0.35, 15, "between"), id="between"),
        pytest.param(0.8, (0.3, 20, "between"), id="at an evaluation"),
        pytest.param(0.5, (0.5, 0, "at once"), id="at the first evaluation"),
        pytest.param(0.3, (0.5, 0, "at once"), id="above it from the start"),
        pytest.param(0.85, (0.15, 30 + 20 / 3, "between"), id="after a fall, the first time"),
        pytest.param(0.91, (math.nan, math.nan, "never"), id="never"),
    ],
)
def test_reading_a_curve_that_is_not_monotone(clean, expected):
    points = [(0.5, 0.5), (0.6, 0.4), (0.8, 0.3), (0.75, 0.2), (0.9, 0.125), (0.7, 0.9), (0.9, 0.9)]
    curve = curve_of(points).sample(frac=1, random_state=0)
    robust, step, how = matched.read_at(curve, clean)
    assert (robust, step) == pytest.approx(expected[:2], nan_ok=True)
    assert how == expected[2]


def test_a_plateau_is_read_where_it_begins():
    reading = matched.read_at(curve_of([(0.5, 0.5), (0.7, 0.4), (0.7, 0.1), (0.7, 0.0)]), 0.7)
    assert reading == (pytest.approx(0.4), 10, "between")


def test_pairs_and_their_summary():
    runs = pd.concat(
        [runs_of("second", [0.7, 0.8, 0.95, 0.7], [0.4, 0.5, 0.6, 0.2]), runs_of("adamw", [0.9], [0.1])]
    )
    curves = pd.concat(
        [
            *(curve_of([(0.6, 0.4), (0.8, 0.2), (0.9, 0.1)], seed=seed) for seed in range(3)),
            curve_of([(0.9, 0.9)], seed=0, method="second"),
        ]
    )
    pairs = matched.matched(runs, curves, ["second", "adamw"], ["adamw"])
    # Seed 3 has no curve of AdamW; AdamW is not compared with itself.
    assert pairs["seed"].tolist() == [0, 1, 2]
    assert pairs["how"].tolist() == ["between", "between", "never"]
    assert pairs["baseline_robust"].tolist() == pytest.approx([0.3, 0.2, math.nan], nan_ok=True)
    (row,) = matched.summarise(pairs).to_dict("records")
    assert (row["runs"], row["never"], row["at_once"], row["n"]) == (3, 1, 0, 2)
    assert row["difference"] == pytest.approx((0.1 + 0.3) / 2)
    assert row["p"] == pytest.approx(
        scipy_stats.ttest_1samp([0.1, 0.3], 0, alternative="greater").pvalue
    )


def test_the_same_training_at_another_pace_gains_nothing():
    """Two runs along one curve, one stopped early: the gain that end points show is not there."""
    path = [(0.5 + 0.04 * i, 0.6 - 0.03 * i) for i in range(11)]
    slow = runs_of("slow", *zip(*path[5:7], strict=True))
    fast = runs_of("adamw", *zip(*path[9:], strict=True))
    curves = pd.concat(curve_of(path, seed=seed) for seed in range(2))
    ends = stats.compare_methods(pd.concat([slow, fast]), ["slow"], ["adamw"], "adversarial_accuracy")
    assert ends.loc[0, "difference"] == pytest.approx(0.12)
    gains = matched.summarise(matched.matched(slow, curves, ["slow"], ["adamw"]))
    assert gains.loc[0, "difference"] == pytest.approx(0, abs=1e-12)


def test_curves_over_seeds():
    curves = pd.concat(
        [curve_of([(0.5, 0.4), (0.7, 0.2)], seed=0), curve_of([(0.6, 0.5), (0.9, 0.2)], seed=1)]
    )
    table = matched.curve_over_seeds(curves, [0.4, 0.6, 0.7, 0.8, 1.0])
    assert table["clean"].tolist() == [0.6, 0.7, 0.8]
    assert table["n"].tolist() == [1, 2, 1]
    assert table["mean"].tolist() == pytest.approx([0.3, (0.2 + 0.4) / 2, 0.3])


def test_nothing_matched():
    runs = runs_of("second", [0.5], [0.5])
    empty = pd.DataFrame(columns=[*matched.RUN, "step", "clean_accuracy", "adversarial_accuracy"])
    pairs = matched.matched(runs, empty, ["second"], ["adamw"])
    assert pairs.empty
    assert matched.summarise(pairs).empty


@pytest.mark.parametrize("sign", [1, -1])
def test_the_interval_is_two_sided_whatever_the_direction(sign):
    result = stats.compare(sign * pd.Series([0.1, 0.2, 0.3]), sign * pd.Series([0.5, 0.1, 0.2]))
    assert result.low < result.difference < result.high
    assert result.difference - result.low == pytest.approx(result.high - result.difference)
