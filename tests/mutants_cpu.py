"""Mutants of the CPU's C++ code, for test_mutants.py: (file, text, replacement, tests that fail)."""

BRACKET, UPDATE, OPS = "csrc/cpu/bracket.cpp", "csrc/cpu/update.cpp", "csrc/cpu/ops_cpu.cpp"
LOOPS, TILES, ELEMENT = "csrc/cpu/tile.inl", "csrc/cpu/tiles.cpp", "csrc/include/rose/element.h"
SELECT, UPDATE_H = "csrc/cpu/select.cpp", "csrc/cpu/update.h"

PASS, TIES, BOUND = (
    "tests/test_one_pass.py",
    "tests/test_one_pass_ties.py",
    "tests/test_failure_bound.py",
)
WIDTHS = f"{BOUND}::test_half_widths_are_those_of_the_derivation"
RATE = f"{BOUND}::test_misses_are_as_many_as_the_derivation_says"
USE = f"{PASS}::test_as_in_use"
DRIFT = f"{PASS}::test_drifting_scales"
PLAIN = f"{PASS}::test_half_of_the_elements_in_front_are_not_ranked"
GROUPS = f"{PASS}::test_groups_with_other_alphas_among_small_tensors"
ROUNDING = f"{PASS}::test_rounding_of_what_is_done_again"
ENSEMBLE = f"{PASS}::test_an_ensemble_s_first_masks"
EVIDENCE = f"{PASS}::test_elements_without_evidence_or_a_value"
MISSES = f"{PASS}::test_misses_of_either_threshold"
LOWER = f"{PASS}::test_misses_of_one_threshold_alone"
CLOSE = f"{PASS}::test_bracket_ends_among_close_risks"
COLLAPSE = f"{TIES}::test_collapse"
MISSED_TIES = f"{TIES}::test_a_class_that_is_missed"
PARITY = "tests/test_parity.py"

MUTANTS = {
    # ----------------------------------------------------------------------------------- the margin
    "margin, of the variance": (
        BRACKET, "std::sqrt(2 * l * std::max(u, 0.0))", "std::sqrt(l * std::max(u, 0.0))", WIDTHS,
    ),
    "margin, of the range": (BRACKET, "8.0 / 3.0 * kLine * l", "2.0 / 3.0 * kLine * l", WIDTHS),
    "margin, too wide": (
        BRACKET, "return width_ * weight_ * (std", "return 1.5 * width_ * weight_ * (std", RATE,
    ),
    "margin, too narrow": (
        BRACKET, "return width_ * weight_ * (std", "return 0.7 * width_ * weight_ * (std", RATE,
    ),
    "margin of what has passed": (
        BRACKET, "for (int64_t j = phase; j < kPhases; ++j) {\n      const PhaseSample& s",
        "for (int64_t j = 0; j < kPhases; ++j) {\n      const PhaseSample& s",
        f"{PASS}::test_brackets_shrink_as_elements_are_counted",
    ),
    "margin, lines with few that are ranked": (
        BRACKET, "2 * q * static_cast<double>(s.cr)", "q * static_cast<double>(s.cr)", WIDTHS,
    ),
    "margin, counts in the place of differences": (
        BRACKET, "dc = c[t] - (alone ? 0 : earlier_c[t])", "dc = c[t]", WIDTHS,
    ),
    "margin, variance of some threads": (BRACKET, "to.cc += from.cc;", "to.cc = from.cc;", WIDTHS),
    "bracket without a lower margin": (
        BRACKET, "if (first < 0 && d >= -1 - t)", "if (first < 0 && d >= -1)", USE,
    ),
    "bracket without an upper margin": (BRACKET, "if (d > t) last = b;", "if (d > 0) last = b;", USE),
    # ----------------------------------------------------------------------------------- the sample
    "the same draw in every step": (
        BRACKET, "random_key(draw, 0x5A3Bu)", "random_key(0, 0x5A3Bu)",
        f"{PASS}::test_draws_are_different",
    ),
    "the first line of every stratum": (
        BRACKET, "static_cast<int64_t>(random * static_cast<uint64_t>(stratum_) >> 32)",
        "static_cast<int64_t>(random * static_cast<uint64_t>(stratum_) >> 63)",
        f"{PASS}::test_draws_are_different",
    ),
    "groups inside of one batch of lines": (
        BRACKET,
        "if (batch.size > 0 && source_.alpha[index] != source_.alpha[batch.places[0].index]) break;",
        "", GROUPS,
    ),
    "tensors of one batch of lines": (
        BRACKET, "copy(batch.places[i], 0, g + i * kLine);", "copy(batch.places[0], 0, g + i * kLine);",
        f"{USE} {WIDTHS}",
    ),
    "scattered tensors in one batch of lines": (
        BRACKET, "if (from != to) std::memcpy(to,",
        "if (from != to || source_.segments.size() > 9) std::memcpy(to + 1,", f"{GROUPS} {WIDTHS}",
    ),
    "lines that are left out": (
        BRACKET, "std::min(2 * end, lines_.count()), 1,",
        "std::min(2 * end, lines_.count() * 7 / 8), 1,", DRIFT,
    ),
    # ------------------------------------------------------------------------------------ the phases
    "phase of tensors that are not ranked": (
        BRACKET, "segments_[chosen_[place.index]].first_tile + place.start",
        "segments_[place.index].first_tile + place.start", PLAIN,
    ),
    "phase of a line": (
        BRACKET, "while (phase + 1 < kPhases && phase_start(phase + 1) <= tile) ++phase;",
        "while (phase + 2 < kPhases && phase_start(phase + 2) <= tile) ++phase;",
        f"{DRIFT} {PASS}::test_a_step_in_the_middle",
    ),
    "sample of phases that have passed": (BRACKET, "target.to_come[b] -= over.bins[b];", "", USE),
    "sample below the window of phases that have passed": (
        BRACKET, "for (int64_t j = phase; j < kPhases; ++j) {\n      below +=",
        "for (int64_t j = 0; j < kPhases; ++j) {\n      below +=", USE,
    ),
    "a phase's logs": (
        BRACKET, "d += static_cast<double>(target.logged[static_cast<size_t>(b)]) +\n           ",
        "d += ", USE,
    ),
    "no bracket is tightened": (
        BRACKET, "plan_.tighten(target, ranked_, phase);", "",
        f"{PASS}::test_brackets_shrink_as_elements_are_counted",
    ),
    "tightened by the next phase": (
        BRACKET, "plan_.tighten(target, ranked_, phase);", "plan_.tighten(target, ranked_, phase + 1);",
        f"{USE} {RATE} {DRIFT}",
    ),
    # ------------------------------------------------------------------------------------ the window
    "window that begins inside of the bracket": (
        BRACKET, "if (phase == 0 && target.low > 0 && d >= -1 - t) return false;", "", WIDTHS,
    ),
    "window that ends inside of the bracket": (
        BRACKET, "if (phase == 0 && target.high < kMaxKey) return false;", "", WIDTHS,
    ),
    "last bin of a window": (
        BRACKET, "last_bin = (high - low) >> shift;", "last_bin = ((high - low) >> shift) - 1;",
        f"{WIDTHS} {TIES}::test_everything_is_one_value {COLLAPSE} "
        f"{PASS}::test_values_of_every_size {DRIFT}",
    ),
    "end of a bin": (BRACKET, "+ 1) << shift) - 1, high));", "+ 1) << shift) - 2, high));", CLOSE),
    # ---------------------------------------------------------------------------------- the collapse
    "no collapse": (
        BRACKET, "if (inside > capacity && !plan_.collapse(target, ranked_))", "if (inside > capacity)",
        COLLAPSE,
    ),
    "collapse without its margin": (
        BRACKET, "if (below < -1 - t && d + weight_ * static_cast<double>(end) > t) {",
        "if (below < -1 && d + weight_ * static_cast<double>(end) > 0) {",
        f"{TIES}::test_no_collapse_where_the_class_might_end_before_the_threshold",
    ),
    "collapse without its lower margin": (
        BRACKET, "if (below < -1 - t && d +", "if (below < -1 && d +",
        f"{TIES}::test_no_collapse_where_the_class_might_end_before_the_threshold",
    ),
    "collapse without its upper margin": (
        BRACKET, "static_cast<double>(end) > t) {", "static_cast<double>(end) > 0) {",
        f"{TIES}::test_no_collapse_where_the_class_might_end_before_the_threshold",
    ),
    "collapsed, a miss below": (BRACKET, "k <= target.below || k > upto}", "k > upto}", MISSED_TIES),
    "collapsed, a miss above": (
        BRACKET, "k <= target.below || k > upto}", "k <= target.below}", MISSED_TIES,
    ),
    "collapsed, the count": (
        BRACKET, "const int64_t upto = target.below + target.at_pivot;",
        "const int64_t upto = target.at_pivot;", COLLAPSE,
    ),
    "collapsed, both counts": (BRACKET, "note.at_pivot[t];", "note.at_pivot[0];", COLLAPSE),
    # ------------------------------------------------------------------------------------- the misses
    "misses of the lower threshold": (BRACKET, "high.missed || low.missed", "high.missed", LOWER),
    "misses of the upper threshold": (BRACKET, "high.missed || low.missed", "low.missed", LOWER),
    "miss below, the threshold": (
        BRACKET, "{int64_t{target.bracket.low} - 1, before, true}",
        "{int64_t{target.bracket.low}, before, true}", MISSES,
    ),
    "miss below, not reported": (BRACKET, "- 1, before, true}", "- 1, before, false}", MISSES),
    "miss above, not reported": (
        BRACKET, "{target.bracket.high, before, true}", "{target.bracket.high, before, false}", MISSES,
    ),
    "miss above, the threshold": (
        BRACKET, "{target.bracket.high, before, true}", "{target.bracket.high + 1, before, true}",
        MISSES,
    ),
    "logged below the bracket": (
        BRACKET,
        "for (int b = 0; b < target.first_bin; ++b) before += target.logged[static_cast<size_t>(b)];",
        "", USE,
    ),
    "counts of the lower threshold": (
        BRACKET, "target.below += note.below[t];", "target.below += note.below[0];", USE,
    ),
    "equals of a threshold": (BRACKET, "return x <= key; }),", "return x < key; }),", USE),
    # ----------------------------------------------------------------------------- what is done again
    "nothing is done again": (
        BRACKET, "updated += redo(log,", "if (begin < 0) updated += redo(log,", USE,
    ),
    "what is done again, the last of a log": (
        BRACKET, "log.logged * end / kShares, bounds",
        "std::max<int64_t>(0, log.logged * end / kShares - 1), bounds", USE,
    ),
    "what is done again, its count": (BRACKET, "counts_.updated += updated;", "", USE),
    "what is done again, its side": (BRACKET, "nullptr, !was);", "nullptr, was);", USE),
    "what is done again, its tensor": (
        BRACKET, "segments_[index + 1].first_tile * kTile <= place)\n",
        "segments_[index + 1].first_tile * kTile < place)\n", f"{GROUPS} {ENSEMBLE}",
    ),
    "what is done again, its first mask": (
        UPDATE, "rest += (masks.first_bits[element / 8] >> (element % 8) & 1)",
        "rest += (masks.first_bits[element / 8] >> (element % 4) & 1)", ENSEMBLE,
    ),
    "what is done again, counted twice": (
        UPDATE, "return (kind != 0) - (rest + (selected ? 0 : masks.second_weight) != 0);",
        "return selected ? 1 : -1;", ENSEMBLE,
    ),
    "what is done again, its rounding": (
        UPDATE, "store_operand(index, kWritten[k], element, 1, &values[k]);",
        "store(segment, segment.operands[kWritten[k]], element, 1, &values[k]);", ROUNDING,
    ),
    "what is done again, its weights": (
        UPDATE, "adamw_element<true>(p, m, v, g, kind,", "adamw_element<false>(p, m, v, g, kind,",
        ENSEMBLE,
    ),
    "what is done again, its gradient": (
        LOOPS, "log.old[to][3] = x.g[i];", "log.old[to][3] = x.m[i];", USE,
    ),
    "what is done again, its bit": (
        OPS, "static_cast<uint8_t>(1 << element % 8)", "static_cast<uint8_t>(1 << element % 4)", USE,
    ),
    "places of elements in parts of a tile": (
        UPDATE, "if (log) log->place = place + done;", "", f"{GROUPS} {ROUNDING}",
    ),
    "room for old values": (
        BRACKET, "(updates && wanted > old.size())", "false",
        "tests/test_bracket.py::test_an_update_with_what_a_capture_left",
    ),
    # --------------------------------------------------------------------------------- what is ranked
    "elements of tensors that are not ranked": (
        BRACKET, "if (is_ranked_[index]) state.elements += n;", "state.elements += n;", PLAIN,
    ),
    "elements that are not finite": (
        BRACKET, "- note.inactive - note.nonfinite;", "- note.inactive;", EVIDENCE,
    ),
    "elements that are inactive": (
        BRACKET, "- note.inactive - note.nonfinite;", "- note.nonfinite;", EVIDENCE,
    ),
    "groups of what is ranked": (
        OPS, "updater.groups().row(chosen[i])", "updater.groups().row(i)", GROUPS,
    ),
    "inactive with a gradient that is not finite": (
        LOOPS, "return both(at_most(magnitude(m), zero), less(magnitude(g), infinity));",
        "return at_most(magnitude(m), zero);", EVIDENCE,
    ),
    "sides without a lower margin": (LOOPS, "* (1 - 8 * u) - 2 * u;", "* (1 + 8 * u) + 2 * u;", CLOSE),
    "sides without an upper margin": (LOOPS, "* (1 + 8 * u) + 2 * u;", "* (1 - 8 * u) - 2 * u;", CLOSE),
    "small moments by sides": (
        LOOPS, "kSmallMoment = 0x1p-100f", "kSmallMoment = 0x1p-149f",
        f"{PASS}::test_moments_of_few_units",
    ),
    # --------------------------------------------------------------------------- factors of gradients
    "clipping of plain groups": (
        UPDATE_H, "? factors_.clip : factors_.plain_clip;", "? factors_.clip : factors_.clip;", PLAIN,
    ),
    "clipping of selective groups": (
        UPDATE, "masks.factors[1] = clip;", "masks.factors[1] = 1.0f;", PLAIN,
    ),
    "unscaling by the update": (
        UPDATE_H, "(groups_[i].sign) * factors_.inv_scale;", "(groups_[i].sign);", PLAIN,
    ),
    "scale and clip in one product": (
        LOOPS, "dst[i] = mul(mul(src[i], first), second);", "dst[i] = mul(src[i], mul(first, second));",
        f"{PARITY}::test_gradients_are_multiplied_by_two_factors {PLAIN}",
    ),
    "clipping of plain groups that are not scaled": (
        UPDATE,
        "    if (factor != 1.0f || clip != 1.0f) {\n      kernels.scale(g, factor, clip, n, "
        "buffers[4]);",
        "    if (factor != 1.0f) {\n      kernels.scale(g, factor, clip, n, buffers[4]);",
        f"{PARITY}::test_gradients_are_multiplied_by_two_factors "
        f"tests/test_clipping.py::test_plain_groups_are_clipped_as_by_pytorch",
    ),
    # ----------------------------------------------------------------------------------- random bits
    "random bits of the second tensor": (
        UPDATE, "random_keys_[index], offsets_[index] + start,", "random_keys_[index], start,",
        f"{PARITY}::test_stochastic_rounding_bit_for_bit",
    ),
    "random bits of the second tensor's step": (
        UPDATE, "random_key(settings_.seed, step_word(step));",
        "random_key(settings_.seed, step_word(*steps_[0]));",
        f"{PASS}::test_random_bits_of_every_tensor",
    ),
    "random bits of parameters": (
        UPDATE, "k == 0 ? Rounded::kParameter : Rounded::kSecondMoment", "Rounded::kSecondMoment",
        f"{PARITY}::test_stochastic_rounding_bit_for_bit",
    ),
    "random bits from an odd index on": (
        LOOPS, "(const Half*)words + (low & 1);", "(const Half*)words;",
        f"{PARITY}::test_stochastic_rounding_bit_for_bit",
    ),
    "random bits where the index carries": (
        TILES, "(uint64_t{1} << 32) - (first & 0xFFFFFFFFu)",
        "(uint64_t{1} << 33) - (first & 0xFFFFFFFFu)",
        f"{PARITY}::test_stochastic_rounding_bit_for_bit",
    ),
    "random bits of a run": (
        TILES, "static_cast<uint64_t>(index + at + done)", "static_cast<uint64_t>(index + done)",
        f"{PARITY}::test_stochastic_rounding_bit_for_bit",
    ),
    "steps of the second tensor": (
        UPDATE, "= next_step(*steps_[i]);", "= next_step(*steps_[0]);", GROUPS,
    ),
    "learning rates of groups": (UPDATE, "lr_[groups_.row(i)]", "lr_[0]", GROUPS),
    # -------------------------------------------------------------------------------------- two passes
    "capture in two passes": (
        OPS, "capturer.all(selection->bounds());", "",
        "tests/test_bracket.py::test_as_select_and_capture",
    ),
    "counts of two passes": (
        OPS, "counts = update_all(updater, selection->bounds());",
        "update_all(updater, selection->bounds());", "tests/test_bracket.py::test_small",
    ),
    "quantile of tensors": (
        OPS, "threshold(lower) - 1;", "threshold(lower);", f"{PARITY}::test_selection_of_tensors",
    ),
    "norms of tensors that are clipped": (
        OPS, "mul(norm_of(squares[i]), factor)", "norm_of(squares[i])",
        f"{PARITY}::test_selection_of_tensors tests/test_clipping.py::test_as_the_reference",
    ),
    "sums of squares, unscaled": (
        OPS, "factor, 1.0f, n, values + kTile);", "1.0f, 1.0f, n, values + kTile);",
        f"{PARITY}::test_tensor_norms",
    ),
    "rank of a bin": (
        SELECT, "while (before + bins[bin] < k)", "while (before + bins[bin] <= k)",
        f"{PARITY}::test_every_rank_at_every_boundary",
    ),
}  # fmt: skip
