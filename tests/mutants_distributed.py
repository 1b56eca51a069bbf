"""Mutants of rankings over several processes, for test_mutants.py: (file, text, replacement, tests that
fail)."""

DISTRIBUTED, SHARDS, ENGINE = "rose_ops/distributed.py", "rose_ops/shards.py", "rose_ops/engine.py"
OPTIM, BATCH, PORTABLE = "rose_ops/optim.py", "rose_ops/batch.py", "rose_ops/portable.py"
MEETING, RANKS = "rose_ops/meeting.py", "rose_ops/ranks.py"
TESTS = "tests/test_distributed.py"
ONE_PASS = f"{TESTS}::test_one_pass_is_that_of_one_process"
TIES = f"{TESTS}::test_a_threshold_that_most_elements_share"
ELSEWHERE = f"{TESTS}::test_a_threshold_that_is_elsewhere"
LOST = f"{TESTS}::test_a_rank_that_is_lost_on_the_way"
PASS_CPP, OPS = "csrc/cpu/pass.cpp", "csrc/cpu/ops_cpu.cpp"
THRESHOLDS, RANKS_H = "csrc/cpu/thresholds.cpp", "csrc/cpu/ranks.h"
MASKS, WHOLE = f"{TESTS}::test_masks_are_those_of_one_process", f"{TESTS}::test_whole_tensors"
SAMPLE, PARTS = f"{TESTS}::test_a_sample_is_that_of_one_process", f"{TESTS}::test_no_sample_of_parts"
ROUNDING = f"{TESTS}::test_rounding_is_that_of_one_process"
PLACES = f"{TESTS}::test_ranks_at_different_places"
MADE = f"{TESTS}::test_ranks_that_were_made_differently"
REFUSED = f"{TESTS}::test_what_is_not_clear_is_refused"
COUNTS = "tests/test_parity.py::test_counts_of_keys_of_any_mixture"

MUTANTS = {
    # ------------------------------------------------------------------------------- who counts what
    "copies along a mesh": (SHARDS, "not any(copies), start)", "True, start)", MASKS),
    "copies on the rest of a mesh": (
        RANKS, "return Shard.of(param).is_first and bool((mesh == self._first).any())",
        "return Shard.of(param).is_first", MASKS,
    ),
    "plain tensors beside DTensors": (
        RANKS, "return dist.get_rank() == self._first", "return True", MASKS,
    ),
    "a rank without gradients": (
        OPTIM, "        if batch.params or ranks is not None:\n            with",
        "        if batch.params:\n            with",
        f"{TESTS}::test_a_rank_without_gradients",
    ),
    "its number of steps": (
        OPTIM, "if self._had_state and not has_state:", "if not has_state:",
        f"{TESTS}::test_a_rank_without_gradients",
    ),
    # ------------------------------------------------------------------------------------ thresholds
    "the first digit": (
        DISTRIBUTED, "before = upto[digit] - leading[digit]",
        "before = upto[digit]", MASKS,
    ),
    "the rank within a digit": (DISTRIBUTED, "(k - before)[:, None]", "k[:, None]", MASKS),
    "a rank of none": (
        DISTRIBUTED, "found = torch.where(k > 0, digit * LOW_DIGITS + low[:, 0], -1)",
        "found = digit * LOW_DIGITS + low[:, 0]", f"{TESTS}::test_few_elements",
    ),
    "kept between two bounds": (
        DISTRIBUTED, "(at_or_below[0] - below).clamp(min=0)", "at_or_below[0]", MASKS,
    ),
    "classes": (
        DISTRIBUTED, "_record(found, at_or_below, ranked, *classes)",
        "_record(found, at_or_below, ranked, *classes.flip(0))", MASKS,
    ),
    "keys that are counted": (
        PORTABLE, "key & (LOW_DIGITS - 1), LOW_DIGITS)",
        "key & (LOW_DIGITS - 2), LOW_DIGITS)", COUNTS,
    ),
    # ------------------------------------------------------------------------------------ in one pass
    "thresholds that differ": (
        RANKS_H, "return ranks() * numbers_[2] == numbers_[1] * numbers_[1] &&", "return true ||",
        f"{TESTS}::test_a_rank_that_knows_no_threshold",
    ),
    "what others count": (
        PASS_CPP, "is_aside = others_count_ && !is_ranked_[index]", "is_aside = false", ONE_PASS,
    ),
    "what others count, in the sample": (
        OPS, "      chosen.erase(chosen.begin() + static_cast<int64_t>(*other));\n", "", ONE_PASS,
    ),
    "what others count, again": (PASS_CPP, "{&blocks_, &blocks_aside_}", "{&blocks_}", ONE_PASS),
    "counts of the pass": (
        PASS_CPP, "if (ranked_.shared) share_counts(*ranked_.shared);", "", ONE_PASS,
    ),
    "counts of keys": (
        PASS_CPP, "for (int64_t& count : of_threshold) visit(count);", "", ONE_PASS,
    ),
    "a bracket that is tightened": (PASS_CPP, "if (ranked_.shared) threshold.fix();", "", ONE_PASS),
    "no collapse onto a threshold": (
        PASS_CPP, "|| threshold.collapse_onto_middle()", "", TIES,
    ),
    "a bracket of one key": (
        "csrc/cpu/thresholds.h", "fixed_ && bracket_.pivot >= 0 &&", "fixed_ &&",
        f"{TESTS}::test_a_bracket_of_one_key",
    ),
    "elements of a key": (
        THRESHOLDS, "while (upto <= place.at)", "while (upto < place.at)", ONE_PASS,
    ),
    "where it did nothing": (
        ENGINE, "if record is None or record[Field.MISSES] < 0:", "if record is None:", ELSEWHERE,
    ),
    "an error of others": (RANKS, "raise failure from failure.__cause__", "raise", LOST),
    "an error that is not passed on": (RANKS, "ranks._failure is None\n", "True\n", LOST),
    # --------------------------------------------------------------------------------------- samples
    "places of a sample": (
        SHARDS, "inside = inside * size + at",
        "inside = inside * whole + at", SAMPLE,
    ),
    "a sample's lines of other ranks": (
        SHARDS, "here &= (at >= 0) & (at < size)",
        "here &= at < size", SAMPLE,
    ),
    "a sample's key of 0": (
        DISTRIBUTED, "found < INACTIVE_KEY, found + 1, unranked)",
        "found < INACTIVE_KEY, found, unranked)", SAMPLE,
    ),
    "a sample of parts": (
        DISTRIBUTED, 'ranking.selection == "approx" and ranks.is_uniform and',
        'ranking.selection == "approx" and', PARTS,
    ),
    # ------------------------------------------------------------------------------- norms, rounding
    "norms of copies": (
        ENGINE, "            if not ranks.counts(p):\n", "            if False:\n", WHOLE,
    ),
    "norms of moments are not scaled": (
        ENGINE, "                inv_scale = None\n",
        "", f"{TESTS}::test_norms_of_scaled_gradients",
    ),
    "a norm over all": (
        ENGINE, "if self.ranks is None or max_norm is None:", "if True:", MASKS,
    ),
    "random bits of shards": (
        BATCH, "offset + shard.start for", "offset for", ROUNDING,
    ),
    # ---------------------------------------------------------------------------------------- faults
    "places that differ": (
        RANKS, "if (self.size * two - one * one) % 2**32:",
        "if False:", PLACES,
    ),
    "steps in the place": (MEETING, "place = [what, steps,", "place = [what,", PLACES),
    "hyperparameters in the place": (
        MEETING, "place += [hyper.tolist(), ", "place += [", PLACES,
    ),
    "captures in the place": (MEETING, "sorted(captures.kinds), own]", "own]", PLACES),
    "optimizers in the place": (RANKS, "repr((self._number, *place))", "repr(place)", PLACES),
    "stages": (
        RANKS, "is_uniform = members == set(dist.get_process_group_ranks(group))",
        "is_uniform = bool(spread)", f"{TESTS}::test_stages",
    ),
    "steps of others": (
        OPTIM, "self._steps_done = max(self._steps_done, ranks.steps)", "pass",
        f"{TESTS}::test_a_state_that_one_rank_has_not",
    ),
    "gradients of others": (
        OPTIM, "        if ranks is not None:\n            some =",
        "        if False:\n            some =",
        f"{TESTS}::test_a_learning_rate_of_0_and_no_mask",
    ),
    "settings that differ": (RANKS, "        if differences:\n", "        if False:\n", MADE),
    "an overflow elsewhere": (
        MEETING, "return ranks.any(local(found_inf))", "return local(found_inf)",
        f"{TESTS}::test_an_overflow_that_one_rank_has_seen",
    ),
    "a mesh of fewer ranks": (
        RANKS, "if len(members) < dist.get_world_size():", "if False:", REFUSED,
    ),
    "sums that are not taken": (
        SHARDS, "if any(placement.is_partial()",
        "if all(placement.is_shard()", REFUSED,
    ),
}  # fmt: skip
