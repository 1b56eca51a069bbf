"""Mutants of the CPU's one pass, for test_mutants.py: (file, text, replacement, tests that fail)."""

THRESHOLDS, THRESHOLDS_H = "csrc/cpu/thresholds.cpp", "csrc/cpu/thresholds.h"
STATISTICS = "csrc/include/rose/threshold.h"
PASS_CPP, KNOWN = "csrc/cpu/pass.cpp", "csrc/cpu/given.cpp"
LOGS, SAMPLE, SAMPLE_H = "csrc/cpu/logs.h", "csrc/cpu/sample.cpp", "csrc/cpu/sample.h"
SELECT = "csrc/cpu/select.cpp"

PASS, TIES = "tests/test_one_pass.py", "tests/test_one_pass_ties.py"
BOUND = "tests/test_failure_bound.py"
PARITY = "tests/test_parity.py"
WIDTHS = f"{BOUND}::test_half_widths_are_those_of_the_derivation"
RATE = f"{BOUND}::test_misses_are_as_many_as_the_derivation_says"
USE = f"{PASS}::test_as_in_use"
SHRINK = f"{PASS}::test_brackets_shrink_as_elements_are_counted"
DRIFT = f"{PASS}::test_drifting_scales"
MIDDLE = f"{PASS}::test_a_step_in_the_middle"
PLAIN = f"{PASS}::test_half_of_the_elements_in_front_are_not_ranked"
GROUPS = f"{PASS}::test_groups_with_other_alphas_among_small_tensors"
ENSEMBLE = f"{PASS}::test_an_ensemble_s_first_masks"
EVIDENCE = f"{PASS}::test_elements_without_evidence_or_a_value"
THREADS = f"{PASS}::test_the_same_from_any_number_of_threads"
MISSES = f"{PASS}::test_misses_of_either_threshold"
ALONE = f"{PASS}::test_misses_of_one_threshold_alone"
DRAWS = f"{PASS}::test_draws_are_different"
CLOSE = f"{PASS}::test_bracket_ends_among_close_risks"
COLLAPSE = f"{TIES}::test_collapse"
NO_COLLAPSE = f"{TIES}::test_no_collapse_where_the_class_might_end_before_the_threshold"
MISSED_TIES = f"{TIES}::test_a_class_that_is_missed"
COUNTED = f"{TIES}::test_a_class_that_a_selection_counts"
TWO_CLASSES = f"{TIES}::test_two_classes_that_a_selection_counts"
BLOCKS = f"{TIES}::test_a_log_of_several_blocks"
ONE_VALUE = f"{TIES}::test_everything_is_one_value"
SAMPLED = f"{PARITY}::test_first_order_where_a_sample_is_taken"
APPROX = "tests/test_approx.py::test_selection"
APPROX_LINES = "tests/test_approx.py::test_the_most_lines_of_a_few_million_elements"
APPROX_UPDATE = "tests/test_approx.py::test_update"
APPROX_FEW = "tests/test_approx.py::test_few_elements_need_no_sample"
APPROX_PLAIN = "tests/test_approx.py::test_tensors_that_are_not_ranked_do_not_count"
OTHER_KINDS = "tests/test_approx.py::test_tensors_of_other_dtypes_or_alphas_next_to_each_other"

MUTANTS = {
    # ----------------------------------------------------------------------------------- the margin
    "margin, half of r": (STATISTICS, "deviation = r / 2 +", "deviation = r +", WIDTHS),
    "margin, less than half of r": (STATISTICS, "deviation = r / 2 +", "deviation = r / 5 +", WIDTHS),
    "margin, a quarter of the square": (STATISTICS, "r * r / 4 +", "r * r +", WIDTHS),
    "margin, of the range": (STATISTICS, "2.0 / 3.0 * kLine", "8.0 / 3.0 * kLine", WIDTHS),
    "margin, of the variance": (STATISTICS, "return sqrt(2 * l) * dev", "return sqrt(l) * dev", WIDTHS),
    "margin, r of a line": (STATISTICS, "r = kLine * sqrt", "r = 2 * sqrt", WIDTHS),
    "margin, too wide": (THRESHOLDS, "return width_ * weight_", "return 1.5 * width_ * weight_", RATE),
    "margin, too narrow": (
        THRESHOLDS, "return width_ * weight_", "return 0.7 * width_ * weight_", RATE,
    ),
    "margin, lines with few that are ranked": (STATISTICS, "- 2 * q * cr", "- q * cr", WIDTHS),
    "margin, the chance of failure": (
        PASS_CPP, "? kLogOfFailureIfCounted : kLogOfFailure;",
        "? kLogOfFailure : kLogOfFailureIfCounted;", WIDTHS,
    ),
    "margin, counts in the place of differences": (
        SAMPLE_H, "of_line.upto_middle - (alone ? 0 : earlier[t].upto_middle)", "of_line.upto_middle",
        WIDTHS,
    ),
    "margin, the line before": (SAMPLE_H, "earlier[t] = of_line;", "", WIDTHS),
    "margin, products of differences": (SAMPLE_H, "cr += c * r;", "cr += r * r;", WIDTHS),
    "margin, variance of some threads": (SAMPLE, "to.cc += from.cc;", "to.cc = from.cc;", THREADS),
    "sample of some threads": (SAMPLE, "to.below += from.below;", "to.below = from.below;", THREADS),
    "bracket without a lower margin": (
        THRESHOLDS, "first < 0 && !is_surely_before(d, t)", "first < 0 && d >= -1", USE,
    ),
    "bracket without an upper margin": (
        THRESHOLDS, "if (is_surely_behind(d, t)) last", "if (d > 0) last", USE,
    ),
    "the guess, its margin": (THRESHOLDS, "middle < 0 && d >= 0", "middle < 0 && d >= -t", USE),
    "the guess": (THRESHOLDS, "middle < 0 ? high : end_of(middle)", "high", USE),
    "the guess of the lower threshold": (
        PASS_CPP, "stage.bounds.low = thresholds_[1].estimate();", "", USE,
    ),
    # ------------------------------------------------------------------------------------ the phases
    "margin of what has passed": (
        THRESHOLDS, "rr = 0;\n  for (int j = phase;", "rr = 0;\n  for (int j = 0;",
        SHRINK,
    ),
    "phase of tensors that are not ranked": (
        PASS_CPP, "segments_[ranked_.chosen[index]].first_tile +", "segments_[index].first_tile +",
        PLAIN,
    ),
    "phase of a line": (
        PASS_CPP, "phase_of(tile / chunks_.size)", "phase_of(tile / chunks_.size / 2)",
        f"{MIDDLE} {DRIFT}",
    ),
    "sample of phases that have passed": (THRESHOLDS, "--to_come_[", "to_come_[", MIDDLE),
    "sample of the phase before": (
        THRESHOLDS, "sample_[static_cast<size_t>(phase - 1)]", "sample_[static_cast<size_t>(phase)]",
        f"{MIDDLE} {DRIFT} {RATE}",
    ),
    "sample below the window of phases that have passed": (
        THRESHOLDS, "(ranked);\n  for (int j = phase;", "(ranked);\n  for (int j = 0;", USE,
    ),
    "elements that are ranked, of one phase": (
        PASS_CPP, "ranked_elements_ += tallies", "ranked_elements_ = tallies", USE,
    ),
    "counts of the lower threshold": (
        PASS_CPP, "count(phase, tallies->of[t]);", "count(phase, tallies->of[0]);", USE,
    ),
    "counts below the bracket": (THRESHOLDS, "below_ += tally", "below_ = tally", USE),
    "counts in bins": (THRESHOLDS, "bins_[b] += tally", "bins_[b] = tally", USE),
    "no bracket is tightened": (PASS_CPP, "publish(phase + 1);", "", SHRINK),
    "the elements that were counted": (
        PASS_CPP, "tighten(phase + 1, ranked_elements_)", "tighten(phase + 1, segments_.elements())",
        f"{MIDDLE} {DRIFT}",
    ),
    # ------------------------------------------------------------------------------------ the window
    "window that begins inside of the bracket": (
        THRESHOLDS, "if (phase == 0 && low_ > 0 && !is_surely_before(d, t)) return false;", "", WIDTHS,
    ),
    "window that ends inside of the bracket": (
        THRESHOLDS, "if (phase == 0 && high_ < kMaxKey) return false;", "", WIDTHS,
    ),
    "window of few errors": (STATISTICS, "return errors * sqrt", "return 0.1 * errors * sqrt", USE),
    "last bin of a window": (
        THRESHOLDS, "last_bin_ = (high - low) >> shift_;", "last_bin_ = ((high - low) >> shift_) - 1;",
        f"{ONE_VALUE} {COLLAPSE} {WIDTHS} {PASS}::test_values_of_every_size",
    ),
    "end of a bin": (THRESHOLDS_H, "<< shift_) - 1, high_)", "<< shift_) - 2, high_)", CLOSE),
    # ---------------------------------------------------------------------------------- the collapse
    "no collapse": (PASS_CPP, "|| threshold.collapse()) return", ") return", COLLAPSE),
    "collapse without its lower margin": (
        STATISTICS, "is_surely_before(below, half_width) &&", "is_surely_before(below, 0) &&",
        NO_COLLAPSE,
    ),
    "collapse without its upper margin": (
        STATISTICS, "&& is_surely_behind(upto, half_width)", "&& is_surely_behind(upto, 0)",
        NO_COLLAPSE,
    ),
    "collapsed, a miss below": (THRESHOLDS, "k <= before || k > upto}", "k > upto}", MISSED_TIES),
    "collapsed, a miss above": (THRESHOLDS, "k <= before || k > upto}", "k <= before}", MISSED_TIES),
    "collapsed, the count": (THRESHOLDS, "upto = before + bins_[", "upto = bins_[", COLLAPSE),
    "collapsed, and tightened": (THRESHOLDS, "if (!fixed_) narrow", "narrow", COLLAPSE),
    "collapsed, counts of a phase": (
        PASS_CPP, "(notes.at_pivot[t]);", "(notes.at_pivot[0]);", COLLAPSE,
    ),
    "counted, and logged by another bracket": (
        PASS_CPP, "<= span && key != pivot", "<= span", TWO_CLASSES,
    ),
    "counted, what is above it in a bin": (THRESHOLDS, "at -= at_pivot;", "", COUNTED),
    "counted, at or below what is above it": (THRESHOLDS, "before += at_pivot;", "", COUNTED),
    "counted, its first": (THRESHOLDS, "at >= under && at <", "at > under && at <", COUNTED),
    "counted, its last": (THRESHOLDS, "at < under + at_pivot)", "at <= under + at_pivot)", COUNTED),
    "counted, at or below it": (THRESHOLDS, "+ under + at_pivot, false", "+ under, false", COUNTED),
    # ------------------------------------------------------------------------- the misses and the key
    "misses of the lower threshold": (
        PASS_CPP, "found[0].missed || found[1].missed", "found[0].missed", ALONE,
    ),
    "misses of the upper threshold": (
        PASS_CPP, "found[0].missed || found[1].missed", "found[1].missed", ALONE,
    ),
    "miss below, the threshold": (
        THRESHOLDS, ".low} - 1, before, true}", ".low}, before, true}", MISSES,
    ),
    "miss below, not reported": (THRESHOLDS, "- 1, before, true}", "- 1, before, false}", MISSES),
    "miss above, not reported": (THRESHOLDS, "high, before, true}", "high, before, false}", MISSES),
    "miss above, the threshold": (
        THRESHOLDS, "high, before, true}", "high + 1, before, true}", MISSES,
    ),
    "logged below the bracket": (
        THRESHOLDS, "b < first_bin_; ++b) before +=", "b < 0; ++b) before +=", USE,
    ),
    "equals of a threshold": (THRESHOLDS, "x <= key;", "x < key;", USE),
    "rank inside of a bin": (THRESHOLDS, "high - low, k - before - 1,", "high - low, k - before,", USE),
    "kept between two thresholds": (
        PASS_CPP, "found[0].at_or_below - found[1].at_or_below", "found[0].at_or_below", USE,
    ),
    # ---------------------------------------------------------------------------------------- the log
    "entries of a piece": (LOGS, "block.logged, notes.logged});", "0, notes.logged});", USE),
    "first tile of a piece": (LOGS, "push_back({first_tile,", "push_back({0,", USE),
    "keys that were counted": (LOGS, "recent_.clear();", "", USE),
    "signs of keys that are counted": (LOGS, "fn(*key & ~kInactiveKey)", "fn(*key)", USE),
    "pieces of an earlier pass": (LOGS, "block->pieces.clear();", "", USE),
    "entries of an earlier pass": (LOGS, "    block->logged = 0;", "", USE),
    "the last entries of a full block": (
        LOGS, "close(notes, first_tile);\n    blocks_", "blocks_", BLOCKS,
    ),
    "room in a block": (
        LOGS, "logged <= LogBlock::kEntries", "logged <= 2 * LogBlock::kEntries", BLOCKS,
    ),
    "keys of a full block": (
        LOGS, "recent_.push_back(", "if (recent_.empty()) recent_.push_back(", BLOCKS,
    ),
    # ----------------------------------------------------------------------------- what is done again
    "done again, its tensor": (
        PASS_CPP, ".first_tile <= tile) ++index;", ".first_tile < tile) ++index;",
        f"{GROUPS} {ENSEMBLE}",
    ),
    "done again, its place in a tile": (PASS_CPP, "* kTile + place % kTile}", "* kTile}", USE),
    "done again, its old values": (PASS_CPP, "block.old[2][entry]", "block.old[1][entry]", USE),
    "done again, its side": (
        PASS_CPP, "keys[entry] >= kInactiveKey", "keys[entry] < kInactiveKey", USE,
    ),
    "done again, its count": (PASS_CPP, "counts_.updated += updated;", "", USE),
    "done again, the last of a piece": (
        PASS_CPP, "part.piece.end - begin));", "part.piece.end - begin - 1));", f"{USE} {DRIFT}",
    ),
    # --------------------------------------------------------------------------------- what is counted
    "elements of tensors that are not ranked": (
        PASS_CPP, "if (is_ranked_[index]) elements += n;", "elements += n;", PLAIN,
    ),
    "elements that are not finite": (
        PASS_CPP, "elements - notes.inactive - notes.nonfinite;", "elements - notes.inactive;",
        EVIDENCE,
    ),
    "elements that are inactive": (
        PASS_CPP, "elements - notes.inactive - notes.nonfinite;", "elements - notes.nonfinite;",
        EVIDENCE,
    ),
    # ------------------------------------------------------------------------------------- the sample
    "the same draw in every step": (
        SAMPLE, "random_key(draw, kSampleKey)", "random_key(0, kSampleKey)", DRAWS,
    ),
    "the first half of every stratum": (
        STATISTICS, "(uint64_t)size >> 32)", "(uint64_t)size >> 33)", APPROX,
    ),
    "the last stratum": (STATISTICS, "(lines + least - 1) / least", "lines / least", APPROX),
    "lines of other alphas": (
        SAMPLE, "i > 0 && source.alpha[i] == source.alpha[i - 1]", "i > 0", OTHER_KINDS,
    ),
    "lines of other dtypes": (
        SAMPLE, "alike = alike && operand.dtype == segments[i - 1].operands[k].dtype;", "", OTHER_KINDS,
    ),
    "batches of lines": (
        SAMPLE, "if (batch.size > 0 && source.kind", "if (false && source.kind", OTHER_KINDS,
    ),
    "lines of views": (SAMPLE, "{own[0], own[1], at.n}", "{own[0], own[0], at.n}", APPROX),
    # ----------------------------------------------------------------------------------------- approx
    "approx, its lines": (STATISTICS, "? lines / 8 : 1 << 14;", "? lines / 8 : 1 << 13;", APPROX_LINES),
    "approx, its rank": (
        SELECT, "k = rank_of(units, sample[0].ranked)", "k = 1 + rank_of(units, sample[0].ranked)",
        APPROX,
    ),
    "approx, keys below the window": (
        THRESHOLDS, "k -= phase.below;", "k -= phase.below > 0 ? phase.below - 1 : 0;", APPROX,
    ),
    "approx, the fewest elements of a selection": (
        SELECT, "elements() >= kFewestOfApprox", "elements() > kFewestOfApprox", APPROX_FEW,
    ),
    "given thresholds, what is ranked": (
        KNOWN, "if (is_ranked[index]) own_elements", "own_elements", APPROX_PLAIN,
    ),
    "given thresholds, what is kept": (KNOWN, "(stage.count == 2 ? upto(1) : 0)", "0", APPROX),
    "given thresholds, their equals": (
        KNOWN, "+ total.at_pivot[t]; };", "; };", f"{APPROX} {APPROX_UPDATE}",
    ),
    "given thresholds, inactive": (KNOWN, "selection.inactive = total.inactive;", "", APPROX),
    "given thresholds, the lower one": (
        KNOWN, "selection.low >= 0 ? 2 : 1", "1", f"{APPROX} {APPROX_UPDATE}",
    ),
    # -------------------------------------------------------------------------------------- two passes
    "rank of a digit": (SELECT, "bins[digit] < k)", "bins[digit] <= k)", SAMPLED),
    "counts of a radix": (SELECT, "found.at_or_below += bins[digit];\n      return", "return", SAMPLED),
}  # fmt: skip
