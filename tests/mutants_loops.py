"""Mutants of the CPU's loops and operators, for test_mutants.py: (file, text, replacement, tests that
fail)."""

RUNS, RANK, STEP = "csrc/cpu/runs.cpp", "csrc/cpu/rank.inl", "csrc/cpu/step.inl"
NUMBERS, LANES, UPDATE = "csrc/cpu/numbers.inl", "csrc/cpu/lanes.h", "csrc/cpu/update.cpp"
OPS, PLAN = "csrc/cpu/ops_cpu.cpp", "csrc/update_plan.cpp"
ELEMENT = "csrc/include/rose/element.h"

PASS, TIES, PARITY = "tests/test_one_pass.py", "tests/test_one_pass_ties.py", "tests/test_parity.py"
USE = f"{PASS}::test_as_in_use"
DRIFT = f"{PASS}::test_drifting_scales"
PLAIN = f"{PASS}::test_half_of_the_elements_in_front_are_not_ranked"
GROUPS = f"{PASS}::test_groups_with_other_alphas_among_small_tensors"
ROUNDING = f"{PASS}::test_rounding_of_what_is_done_again"
ENSEMBLE = f"{PASS}::test_an_ensemble_s_first_masks"
EVIDENCE = f"{PASS}::test_elements_without_evidence_or_a_value"
MISSES = f"{PASS}::test_misses_of_either_threshold"
CLOSE = f"{PASS}::test_bracket_ends_among_close_risks"
FEW_UNITS = f"{PASS}::test_moments_of_few_units"
COLLAPSE = f"{TIES}::test_collapse"
MIXTURE = f"{PARITY}::test_update_of_any_mixture"
OF_MIXTURE = f"{PARITY}::test_selection_of_any_mixture"
BOUNDARY = f"{PARITY}::test_update_at_every_boundary"
STOCHASTIC = f"{PARITY}::test_stochastic_rounding_bit_for_bit"
NARROWING = f"{PARITY}::test_narrowing_is_that_of_torch"
TWO_FACTORS = f"{PARITY}::test_gradients_are_multiplied_by_two_factors"
OF_TENSORS = f"{PARITY}::test_selection_of_tensors"
SAMPLED = f"{PARITY}::test_first_order_where_a_sample_is_taken"
APPROX_FEW = "tests/test_approx.py::test_few_elements_need_no_sample"
FOUND_INF = "tests/test_bracket.py::test_found_inf_changes_nothing"

MUTANTS = {
    # ---------------------------------------------------------------------------------- the collapse
    "collapsed, both counts": (
        RANK, "notes.at_pivot[t] += count(pivot)", "notes.at_pivot[0] += count(pivot)", COLLAPSE,
    ),
    "a pivot is logged": (RANK, "except(ranged, pivot)", "ranged", COLLAPSE),
    # ---------------------------------------------------------------------------------------- the log
    "places in the log of a capture": (RANK, "run.place + (uint32_t)at.i", "run.place", USE),
    "places in the log of an update": (STEP, "run.place + (uint32_t)at.i", "run.place", USE),
    "old values, the gradient": (STEP, "inside, x.g);", "inside, x.m);", USE),
    "old values, the order": (STEP, "inside, x.p);", "inside, x.v);", USE),
    "how logged elements were treated": (
        RANK, "choose(is_selected, key | words<kInactiveKey>(), key)", "key", USE,
    ),
    # ----------------------------------------------------------------------------- what is done again
    "done again, by two thresholds": (
        RANK, "all_words((uint32_t)bounds.low)));", "all_words(~0u)));", f"{USE} {DRIFT}",
    ),
    "done again, its first mask": (UPDATE, ">> (element % 8) & 1", ">> (element % 4) & 1", ENSEMBLE),
    "done again, counted twice": (
        UPDATE, "return (weight != 0) - (has_first || !selected);", "return selected ? 1 : -1;",
        ENSEMBLE,
    ),
    "done again, its weight": (
        UPDATE, "(selected ? plan_.weights.second : 0)", "(selected ? 3 : 0)", ENSEMBLE,
    ),
    "done again, its weights": (UPDATE, "adamw_element<true>(", "adamw_element<false>(", ENSEMBLE),
    "done again, its rounding": (UPDATE, "k == 2 || (k == 0 &&", "k == 2 && (k == 0 ||", ROUNDING),
    "done again, its random bits": (
        UPDATE, "static_cast<uint64_t>(plan_.offsets[index] + element)",
        "static_cast<uint64_t>(element)", ROUNDING,
    ),
    "done again, random bits of parameters": (UPDATE, "k == 0 ? Rounded::kParameter : ", "", ROUNDING),
    "done again, where it is": (RUNS, "{ element = offset; }", "{}", f"{ENSEMBLE} {ROUNDING}"),
    "done again, its bit of a mask": (OPS, "(1 << element % 8)", "(1 << element % 4)", USE),
    # --------------------------------------------------------------------------------- what is counted
    "inactive, their count": (RANK, "notes.inactive += inactive;", "", EVIDENCE),
    "inactive, and updated": (RANK, "selected += count(zeros);", "", EVIDENCE),
    "not finite, their count": (RANK, "notes.nonfinite += count(answers.bad);", "", EVIDENCE),
    "not finite, in the counts of an update": (
        STEP, "+= nonfinite + (notes.nonfinite - out.nonfinite);", "+= nonfinite;", EVIDENCE,
    ),
    "not finite, under a mask": (STEP, "nonfinite += count(answers.bad);", "", MIXTURE),
    "updated, inside of the bracket": (RANK, "selected += count(is_selected);", "", USE),
    "updated, below the bracket": (RANK, "if (!two) selected += below[0];", "", USE),
    "updated, by either mask": (
        STEP, "count(either(first, answers.selected))", "count(answers.selected)", ENSEMBLE,
    ),
    "below brackets, by keys": (RANK, "notes.below[t] += count", "notes.below[0] += count", FEW_UNITS),
    "below the lower bracket": (RANK, "notes.below[1] += below[1];", "", USE),
    "below the lower bracket, by lanes that are open": (
        RANK, "count(both(lower.below, sure))", "count(lower.below)", EVIDENCE,
    ),
    # ------------------------------------------------------------------------------ fences
    "fences without a lower margin": (RANK, "(1 - 8 * u) - 2 * u, y", "(1 + 8 * u) + 2 * u, y", CLOSE),
    "fences without an upper margin": (RANK, "(1 + 8 * u) + 2 * u;", "(1 - 8 * u) - 2 * u;", CLOSE),
    "small moments by fences": (RANK, "kSmall = 0x1p-100f", "kSmall = 0x1p-149f", FEW_UNITS),
    "above, with a small moment": (
        RANK, "less(mul(small, fence.above), s)", "less(all_lanes(0.0f), s)", FEW_UNITS,
    ),
    "inactive with a gradient that is not finite": (
        RANK, "both(at_most(b, all_lanes(0.0f)), less(s, all_lanes(bits_float(kInfinityBits))))",
        "at_most(b, all_lanes(0.0f))", EVIDENCE,
    ),
    "first order, zeros": (RANK, "risk.rank_inactive ? -1.0f : 0.0f", "-1.0f", EVIDENCE),
    "first order, the end of a bracket": (
        RANK, "less(fit, a, all_lanes(fence.below))", "at_most(fit, a, all_lanes(fence.below))", MISSES,
    ),
    "inactive elements that are ranked": (RANK, "if (!risk.rank_inactive) {", "{", EVIDENCE),
    "two thresholds, by fences": (RANK, "{both(under, lower.above),", "{under,", USE),
    "two thresholds, by keys": (
        RANK, "if (two) is_selected = except", "if (false) is_selected = except", FEW_UNITS,
    ),
    # ------------------------------------------------------------------------------------- runs, masks
    "the last elements of a run": (NUMBERS, "if (!(writes >> k & 1)) continue;", "continue;", BOUNDARY),
    "lanes behind a run": (NUMBERS, "body(at, left);", "body(at, kLanes);", OF_MIXTURE),
    "bits of a mask that is read": (
        LANES, "(&bits, bytes + i / 8,", "(&bits, bytes + i / 16,", MIXTURE,
    ),
    "bits of a mask that is written": (LANES, "(bytes + i / 8, &bits,", "(bytes + i / 16, &bits,", USE),
    "bits of a later run": (OPS, "bits_[index] + start / 8,", "bits_[index],", USE),
    "masks, all": (UPDATE, "mask.kind == MaskKind::kAll || (", "(", MIXTURE),
    "masks of whole tensors": (
        UPDATE, "MaskKind::kWhole && *mask.data != 0)", "MaskKind::kWhole)", MIXTURE,
    ),
    "masks of a later run": (
        UPDATE, "step.second.bits += start / 8;", "", f"{BOUNDARY} {MIXTURE} {PASS}",
    ),
    "first masks alone": (UPDATE, "second.kind == MaskKind::kNone ? first : second", "second", MIXTURE),
    "weights of an ensemble": (
        STEP, "weight = choose(first, all_lanes(u.m[1])", "weight = choose(first, all_lanes(u.m[2])",
        f"{MIXTURE} {PARITY}::test_error_of_theta_in_an_ensemble",
    ),
    "step sizes of an ensemble": (
        STEP, "all_lanes(table[1]), all_lanes(table[2])", "all_lanes(table[2]), all_lanes(table[1])",
        f"{MIXTURE} {PARITY}::test_error_of_theta_in_an_ensemble",
    ),
    "no mask is none": (STEP, "mask.all ? 0xFFFFu : 0", "0xFFFFu", MIXTURE),
    "decay alone, with a mask": (UPDATE, "none(step.first) && none(step.second)", "true", MIXTURE),
    "decay alone, of views": (UPDATE, "write_back(segment, start, run, 3)", "void()", MIXTURE),
    "decay alone, its gradient": (
        STEP, "second_moment(load(v, at, 3), load(m, at, 2), u)", "mul(u.beta2, load(v, at, 3))",
        MIXTURE,
    ),
    "views, the row": (RUNS, "segment.sizes[inner] - column)", "segment.sizes[inner])", GROUPS),
    "views, copied back": (RUNS, "to[offset + i * stride] =", "to[offset + i] =", GROUPS),
    # --------------------------------------------------------------------------- factors of gradients
    "clipping of plain groups": (
        UPDATE, "? factors_.clip : factors_.plain_clip;", "? factors_.clip : factors_.clip;", PLAIN,
    ),
    "unscaling by the update": (
        UPDATE, "(plan_.groups[index].sign) * factors_.inv_scale", "(plan_.groups[index].sign)", PLAIN,
    ),
    "scale and clip in one product": (
        NUMBERS, "mul(mul(g, run.factors[0]), run.factors[1])",
        "mul(g, run.factors[0] * run.factors[1])", TWO_FACTORS,
    ),
    # ----------------------------------------------------------------------------------- random bits
    "random bits of the second tensor": (
        UPDATE, "static_cast<uint64_t>(plan_.offsets[index] + start)", "static_cast<uint64_t>(start)",
        STOCHASTIC,
    ),
    "random bits of the second tensor's step": (
        UPDATE, "step_word(step)", "step_word(*steps_[0])", f"{PASS}::test_random_bits_of_every_tensor",
    ),
    "random bits of parameters": (NUMBERS, "first_ | (uint32_t)what", "first_", STOCHASTIC),
    "random bits from an odd index on": (
        NUMBERS, "turn_ * kLanes + splits_", "turn_ * kLanes", STOCHASTIC,
    ),
    "random bits where the index carries": (
        NUMBERS, "all_words(step.random_keys[1])", "all_words(step.random_keys[0])",
        f"{STOCHASTIC} {ROUNDING}",
    ),
    "ties of bfloat16": (NUMBERS, "(right<16>(u) & words<1>())", "words<1>()", NARROWING),
    "half, its denormals": (NUMBERS, "words<0x387FFFFF>", "words<0x397FFFFF>", NARROWING),
    "steps of the second tensor": (
        UPDATE, "next_step(*plan_.steps[i])", "next_step(*plan_.steps[0])", GROUPS,
    ),
    "learning rates of groups": (UPDATE, "plan_.lr[plan_.groups.row(i)]", "plan_.lr[0]", GROUPS),
    # ----------------------------------------------------------------------------------------- approx
    "approx, the fewest elements of an update": (
        OPS, "elements() >= kFewestOfApprox", "elements() > kFewestOfApprox", APPROX_FEW,
    ),
    # -------------------------------------------------------------------------------------- two passes
    "digits of a prefix": (RANK, "- prefix * (uint32_t)bins;", "- 0;", SAMPLED),
    "an infinity that was found": (
        OPS, "if (is_set(found_inf)) return record_of(Selection(), {0, 0});\n", "",
        f"{FOUND_INF} {PARITY}::test_nothing_moves_when_an_infinity_was_found",
    ),
    "record of thresholds that are known": (
        OPS, "selection_of(*record) : Selection();", "Selection() : Selection();", MIXTURE,
    ),
    "masks of plain tensors": (
        PLAN, "if (groups[i].selective != 0) masks[i]", "masks[i]", MIXTURE,
    ),
    "weights of a mask that is alone": (
        ELEMENT, "kWeightsOfOne = {3, 3}", "kWeightsOfOne = {3, 2}", USE,
    ),
    "groups of what is ranked": (OPS, "groups.row(i)", "0", GROUPS),
    "quantile of tensors": (OPS, "threshold(lower) - 1;", "threshold(lower);", OF_TENSORS),
    "norms of tensors that are clipped": (
        OPS, "mul(norm_of(squares[i]), factor)", "norm_of(squares[i])", OF_TENSORS,
    ),
    "sums of squares, unscaled": (
        OPS, "std::min(kTile, n - done), factor)", "std::min(kTile, n - done), 1.0f)",
        f"{PARITY}::test_tensor_norms",
    ),
    "sums of squares of a tensor's tiles": (
        OPS, "(segment.n + kTile - 1) / kTile, 0.0)", "segment.n / kTile, 0.0)",
        f"{PARITY}::test_tensor_norms",
    ),
}  # fmt: skip
