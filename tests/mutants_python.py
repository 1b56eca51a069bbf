"""Mutants of the optimizer's Python code, for test_mutants.py: (file, text, replacement, tests that
fail)."""

OPTIM, BATCH, CHECKPOINT = "rose_ops/optim.py", "rose_ops/batch.py", "rose_ops/checkpoint.py"
SETTINGS, FLAT, LOSSES = "rose_ops/settings.py", "rose_ops/flat.py", "rose_ops/losses.py"
WRAPPERS, MEMORY, LAYOUT = "rose_ops/wrappers.py", "rose_ops/memory.py", "rose_ops/layout.py"
CHECKS, RESULTS, SHARDS = "rose_ops/checks.py", "rose_ops/results.py", "rose_ops/shards.py"
ACCUMULATE, DIVERGENCE = "rose_ops/accumulate.py", "rose_ops/divergence.py"
TRAINER = "rose_ops/integrations/transformers.py"
OPERANDS = "rose_ops/operands.py"
ENGINE, GROUPS, CAPTURES = "rose_ops/engine.py", "rose_ops/groups.py", "rose_ops/captures.py"
MASKS, OF_MASKS = "rose_ops/masks.py", "tests/test_masks.py"

CORNERS, KEPT = "tests/test_optimizer_corners.py", "tests/test_optimizer_kept.py"
OF_OPTIMIZER = "tests/test_optimizer.py"
OF_FLAT, OF_STATE, OF_LOSSES = "tests/test_flat.py", "tests/test_state.py", "tests/test_losses.py"
OF_CLIPPING, OF_GIVEN, OF_DDP = "tests/test_clipping.py", "tests/test_given.py", "tests/test_ddp.py"
OF_CHECKPOINTS, OF_SHARDED = "tests/test_checkpoints.py", "tests/test_sharded.py"
OF_REUSE, OF_RESHARD = "tests/test_reuse.py", "tests/test_reshard.py"
OF_ORDER = "tests/test_memory_order.py"
REUSED, MASKS_OF_PARTS = (
    f"{OF_REUSE}::test_a_mask_of_several_steps",
    f"{OF_RESHARD}::test_masks_of_the_step_to_come",
)
OF_LEAKS, OF_ERRORS = "tests/test_leaks.py", "tests/test_errors.py"
MICRO, OF_TRAINER = "tests/test_accumulate.py::test_micro_batches", "tests/test_trainer.py"
WARM_UP = f"{OF_OPTIMIZER}::test_warm_up_is_adamw_and_ignores_captures"
OPTION = f"{KEPT}::test_an_option_that_changes_is_that_of_a_new_optimizer"
DRAWS = f"{CORNERS}::test_every_step_has_a_draw_of_its_own"
CHANGES = f"{OF_OPTIMIZER}::test_a_change_between_steps_is_seen"
SHARED = f"{OF_GIVEN}::test_two_parameters_that_came_to_be_in_one_place_after_some_steps"
ORDER = f"{CORNERS}::test_elements_are_counted_in_memory_order"
LAYOUTS = f"{OF_OPTIMIZER}::test_the_layout_of_parameters_and_gradients_changes_nothing"
TENSORS = f"{CORNERS}::test_whole_tensors_behind_plain_ones_by_scaled_and_clipped_norms"
CLIPPED_MASKS = f"{OF_LOSSES}::test_masks_are_of_clipped_gradients"

MUTANTS = {
    # -------------------------------------------------------------------------------------- optim.py
    "warm-up, its last step": (
        OPTIM, "self._steps_done >= settings", "self._steps_done > settings", WARM_UP,
    ),
    "warm-up after unfreezing": (
        OPTIM, "has_state = bool(batch.states) or any(map(is_complete, self.state.values()))",
        "has_state = bool(batch.states)",
        f"{CORNERS}::test_unfreezing_does_not_begin_the_warm_up_anew",
    ),
    "warm-up after the state was cleared": (
        OPTIM, "            self._steps_done = 0\n            self._captures.kinds.clear()",
        "            self._captures.kinds.clear()",
        f"{CORNERS}::test_clearing_the_state_begins_the_warm_up_anew",
    ),
    "warm-up of selective groups": (
        GROUPS, 'float(is_selective(group) and selecting)', 'float(is_selective(group))', WARM_UP,
    ),
    "steps that are counted": (OPTIM, "        self._steps_done += 1\n", "", WARM_UP),
    "maximize": (
        GROUPS, '-1.0 if group["maximize"] else 1.0', '1.0 if group["maximize"] else 1.0',
        f"{OF_OPTIMIZER}::test_maximize_is_the_step_on_the_negated_gradient",
    ),
    "learning rates that change": (
        GROUPS, "if self._lrs is None or self._lrs[0] != lrs:", "if self._lrs is None:", OPTION,
    ),
    "hyperparameters that change": (
        GROUPS, "if self._hyper is None or self._hyper[0] != values:", "if self._hyper is None:",
        OPTION,
    ),
    "factors of clipping": (
        ENGINE, "Scaling(inv_scale, factors[1:], sums)", "Scaling(inv_scale, factors[:2], sums)",
        f"{OF_CLIPPING}::test_as_clipping_before_the_step {CLIPPED_MASKS}",
    ),
    "norms of the tensors that are ranked": (
        ENGINE, "if sums is None or len(sums) != len(grads):", "if sums is None:", TENSORS,
    ),
    "norms of moments": (
        ENGINE, "sums_of_squares(exp_avgs, None)", "sums_of_squares(exp_avgs, scaling.inv_scale)",
        TENSORS,
    ),
    "masks that were used": (
        CAPTURES, "            self.drop(kind, states)\n", "            pass\n",
        f"{OF_OPTIMIZER}::test_a_mask_serves_one_step",
    ),
    "masks of an earlier capture": (
        OPTIM, "self._captures.drop(kind, self.state.values())  # a second capture replaces",
        "pass  # a second capture replaces",
        f"{CORNERS}::test_a_second_capture_drops_masks_of_the_first",
    ),
    "masks of a pickle": (
        CAPTURES, "for state in states.values() if key in state}", "for state in () if key in state}",
        f"{OF_STATE}::test_a_captured_mask_travels",
    ),
    "steps of a checkpoint": (
        CHECKPOINT, 'state.get("_steps_done", steps_of(self.state))', 'state.get("_steps_done", 0)',
        f"{CORNERS}::test_a_loaded_optimizer_is_past_its_warm_up "
        f"{OF_STATE}::test_a_resume_is_as_if_training_had_not_stopped",
    ),
    "draws of steps": (
        ENGINE, "[] if ranking is None else ranking.numbers(",
        "[] if ranking is None else ranking._replace(draw=0).numbers(", DRAWS,
    ),
    "draws of captures": (
        ENGINE, "        record, ranking.numbers(",
        "        record, ranking._replace(draw=0).numbers(", DRAWS,
    ),
    "draws of seeds": (
        OPTIM, "(self.settings.seed * 0x9E3779B1 + self._steps_done)", "self._steps_done", DRAWS,
    ),
    "mode of a ranking": (
        OPERANDS, "else Mode[self.selection.upper()])", "else Mode.BRACKET)", DRAWS,
    ),
    "gradients of a step, used again": (
        OPTIM, "        self._captures.refuse_used(kind, batch)\n", "",
        f"{OF_LEAKS}::test_gradients_of_the_latest_step_are_noticed",
    ),
    "norms that are not finite": (
        OPTIM, "and not norm.is_meta and not norm.isfinite():", "and False:",
        f"{OF_CLIPPING}::test_error_if_nonfinite",
    ),
    "options that a schedule writes": (
        GROUPS, "        if found != self._options:\n", "        if not self._options:\n",
        f"{OF_CHECKPOINTS}::test_what_is_written_into_a_group_is_refused_at_the_next_step",
    ),
    "threshold of a record": (
        RESULTS, "to(torch.int32).view(torch.float32)", "to(torch.float32)",
        f"{CORNERS}::test_the_threshold_is_a_risk",
    ),
    "versions of parameters": (
        OPTIM, "        torch.autograd.graph.increment_version(batch.members)\n        self",
        "        self",
        f"{OF_FLAT}::test_backward_through_an_old_graph_is_refused",
    ),
    "a step that makes state": (
        OPTIM, 'if not begins or any(float(group["lr"]) != 0 for group in self.param_groups):',
        "if not begins:",
        f"{CORNERS}::test_zeros_at_a_learning_rate_make_no_state",
    ),
    "overflow": (
        OPTIM, "if not recording and found_inf.item() != 0:", "if False:",
        f"{OF_OPTIMIZER}::test_an_overflow_changes_nothing_and_drops_the_mask",
    ),
    "scale that a failed step leaves": (
        OPTIM, "                self.__dict__.pop(name, None)\n", "                pass\n",
        f"{OF_OPTIMIZER}::test_a_step_that_failed_under_grad_scaler_leaves_no_scale_behind",
    ),
    "decay of biases": (
        GROUPS, "weight_decay if decays else 0.0", "weight_decay",
        f"{OF_OPTIMIZER}::test_rose_param_groups",
    ),
    "clipping to the norm of selective parameters": (
        OPTIM, "self._clip(batch, _reciprocal(", "self._clip(self._selective(batch), _reciprocal(",
        f"{OF_CLIPPING}::test_plain_groups_are_clipped_as_by_pytorch "
        f"{OF_CLIPPING}::test_as_the_reference",
    ),
    "masks of one's own that stay": (
        CAPTURES, "own in self.own.items() if own.keep}", "own in self.own.items()}",
        f"{OF_MASKS}::test_a_mask_is_for_one_step_or_until_it_is_taken_away",
    ),
    "masks of one's own with nothing to rank": (
        OPTIM, "selects = bool(self._captures.own) or not settings.is_adamw",
        "selects = not settings.is_adamw",
        f"{OF_MASKS}::test_parameters_without_a_mask_are_updated_and_those_without_upper_too",
    ),
    "masks of one's own in place of a limit": (
        OPTIM, "limit = self._captures.limits.get(kind)", "limit = None",
        f"{OF_MASKS}::test_a_limit_ranks_what_is_in_it_and_leaves_the_rest",
    ),
    # -------------------------------------------------------------------------------------- masks.py
    "memory order of masks": (
        MASKS, "(ordered,) = memory_order(part, (part_of(mask, p),))", "ordered = mask",
        f"{OF_MASKS}::test_a_given_mask_says_what_is_updated",
    ),
    "memory order of masks, later": (
        MASKS, "if stride != local(p).stride():", "if False:", f"{OF_ORDER}::test_masks_of_ones_own",
    ),
    "memory order of captured masks": (
        CAPTURES, "if any(strides != self._strides[kind] for kind in self.kinds):", "if False:",
        f"{OF_ORDER}::test_a_captured_mask",
    ),
    "memory order of captured masks, from when": (
        CAPTURES, "strides[p] = now\n", "pass\n", f"{OF_ORDER}::test_a_captured_mask",
    ),
    "memory order of captured masks in a checkpoint": (
        CHECKPOINT, "        self._captures.put_in_order(self.state)\n        own =", "        own =",
        f"{OF_ORDER}::test_a_captured_mask",
    ),
    "memory order of captured masks in a pickle": (
        CHECKPOINT, "        self._captures.put_in_order(self.state)\n        return {",
        "        return {",
        f"{OF_ORDER}::test_a_captured_mask",
    ),
    "masks of a step that overflowed": (
        OPTIM, "keeps_own=not steps", "keeps_own=False",
        f"{OF_MASKS}::test_a_step_that_overflowed_uses_up_no_masks",
    ),
    "masks of what is no longer selective": (
        MASKS, 'groups = [{**group, "selective": True} for group in groups]', "groups = [*groups]",
        f"{OF_MASKS}::test_masks_of_what_is_no_longer_selective",
    ),
    "masks of what is no longer there": (
        MASKS, "in one.masks.items() if id(p) in numbers}", "in one.masks.items()}",
        f"{OF_MASKS}::test_masks_of_a_parameter_that_is_no_longer_there",
    ),
    "captured masks of another order": (
        CHECKPOINT, "if kind in self._settings.kinds:\n                kept",
        "if True:\n                kept",
        f"{OF_STATE}::test_masks_of_another_order_are_left_out",
    ),
    "captured masks from AdamW": (
        CHECKPOINT, "if is_cast_mask(mask, p):", "if False:",
        f"{OF_STATE}::test_captured_masks_do_not_come_back_from_adamw",
    ),
    "steps that were taken": (
        CHECKPOINT, "self._steps_done = loader.steps\n", "pass\n",
        f"{OF_STATE}::test_steps_that_no_parameter_took_all_of_count_after_a_resume",
    ),
    "masks that are copies": (
        MASKS, "mask.detach().clone() for p, mask", "mask for p, mask",
        f"{OF_MASKS}::test_masks_are_copies_and_replace_each_other",
    ),
    # -------------------------------------------------------------------------------------- batch.py
    "places of parameters that have a gradient": (
        BATCH, "list(compress(accumulate(numels, initial=self.begin), present))",
        "list(accumulate(numels, initial=self.begin))[: sum(present)]",
        f"{OF_OPTIMIZER}::test_rounding_depends_on_the_place_in_the_optimizer_alone",
    ),
    "groups of parameters that have a gradient": (
        BATCH, "Layout(list(compress(rows, present)),", "Layout(rows[: sum(present)],",
        f"{KEPT}::test_groups_of_parameters_without_gradients",
    ),
    "memory order of gradients": (
        BATCH, "memory_order(self.parts[i], (tensors[i],))", "memory_order(tensors[i], (tensors[i],))",
        LAYOUTS,
    ),
    "memory order of a part": (
        BATCH, "return Batch(self.layout.subset(keep), params, parts, views, grads, states, scattered)",
        "return Batch(self.layout.subset(keep), params, parts, views, grads, states, self.scattered)",
        f"{KEPT}::test_scattered_parameters_behind_plain_ones",
    ),
    "memory order of moments": (
        BATCH, "return self.ordered(values) if key in MOMENTS else values", "return values", LAYOUTS,
    ),
    "gradients that are known": (
        BATCH, "            and present == seen.present\n", "",
        f"{KEPT}::test_gradients_of_empty_parameters_that_alternate",
    ),
    "states that are known": (
        BATCH, "            and list(map(id, all_states)) == seen.states\n", "",
        f"{KEPT}::test_states_in_another_order",
    ),
    "parameters that are known": (
        BATCH, "            and list(map(id, every)) == seen.params\n", "",
        f"{KEPT}::test_another_parameter_in_the_same_place",
    ),
    "groups that are known": (
        BATCH, "            and lengths == seen.groups\n", "", CHANGES,
    ),
    "sizes that are known": (
        BATCH, "            and numels == seen.numels\n", "",
        f"{KEPT}::test_a_size_that_changes",
    ),
    "places that are known": (
        BATCH, "_places(params, seen.layout.shards is not None) == seen.places", "True", SHARED,
    ),
    "places that share nothing": (
        BATCH, "if not places <= self._apart:", "if not self._apart:", SHARED,
    ),
    "states that lost a part": (
        BATCH, "            if all(map(is_complete, mine)):\n", "            if True:\n", CHANGES,
    ),
    "parameters that were given": (
        BATCH, "any(id(p) not in known for p in every)", "True",
        f"{KEPT}::test_fewer_parameters_are_a_part_only_if_others_are_among_them",
    ),
    "a part that is known": (
        BATCH, "if self._subset is None or self._subset[0] != keep:", "if self._subset is None:",
        f"{KEPT}::test_selective_may_change",
    ),
    # ------------------------------------------------------------------------------------- checks.py
    "one process has all": (
        CHECKS, "        and dist.get_world_size() > 1\n", "", OF_SHARDED,
    ),
    "rankings that may be local": (
        CHECKS, "        and not settings.local_ranking\n", "", OF_SHARDED,
    ),
    "marks of what splits parameters": (
        CHECKS, "        and not p.__dict__  # no marks\n", "",
        f"{KEPT}::test_a_mark_of_what_splits_a_parameter_after_some_steps",
    ),
    "parameters once in a group": (
        CHECKS, "if len(set(params)) < len(params):", "if False:", f"{OF_ERRORS}::test_parameters",
    ),
    "what is not trained may be anything": (
        CHECKS, "if p.requires_grad and not is_lazy(p)]", "if not is_lazy(p)]",
        f"{OF_GIVEN}::test_what_is_frozen_may_be_anything",
    ),
    "states of which a part is missing": (
        CHECKS, "if len(missing) < len(STATE):", "if False:", f"{KEPT}::test_a_state_that_lost_a_part",
    ),
    "moments of another shape": (
        CHECKS, "if moment.shape != p.shape or moment", "if moment",
        f"{OF_ERRORS}::test_a_parameter_that_changed_after_a_step",
    ),
    # --------------------------------------------------------------------------------- checkpoint.py
    "selective in a state dict of AdamW": (
        CHECKPOINT, '"selective": ours is not None or is_selective(here)', '"selective": True',
        f"{OF_STATE}::test_adamw_s_state_dict_leaves_selective_as_it_is",
    ),
    "saved masks": (
        SHARDS, "return mask.clone()", "return mask",
        f"{OF_CHECKPOINTS}::test_a_saved_mask_is_a_copy",
    ),
    "loaded masks": (
        SHARDS, "return mask.to(param.device, copy=True)", "return mask",
        f"{CORNERS}::test_a_loaded_mask_is_a_copy",
    ),
    "loaded moments": (
        CHECKPOINT, "Kept(spread_like(place.copy_(part_of(values[moment], p)), p))",
        "Kept(values[moment])",
        f"{OF_STATE}::test_training_moves_from_adamw_to_rose",
    ),
    "dtype of loaded moments": (
        CHECKPOINT, "self._settings.moment_dtype)", "torch.float32)",
        f"{OF_STATE}::test_state_dtype_of_the_optimizer_counts_not_that_of_the_state_dict",
    ),
    "differences of settings": (
        CHECKPOINT, "if here.get(name) != there.get(name)", "if here.get(name) == there.get(name)",
        f"{OF_CHECKPOINTS}::test_a_checkpoint_of_other_settings_is_said",
    ),
    "steps below 0": (
        CHECKPOINT, "not is_number(step) or step < 0", "not is_number(step)",
        f"{OF_STATE}::test_a_corrupted_state_dict_is_refused_and_changes_nothing",
    ),
    # ----------------------------------------------------------------------------------- settings.py
    "which of a pair": (
        SETTINGS, 'value[kind == "second"]', 'value[kind == "first"]',
        f"{OF_OPTIMIZER}::test_of_a_pair_only_what_the_order_uses_counts",
    ),
    "fractions, rounded down": (
        SETTINGS, "return round(Fraction(", "return int(Fraction(",
        f"{OF_GIVEN}::test_fractions_are_rounded_from_their_exact_value",
    ),
    "masks that the order has no use for": (
        SETTINGS, "(FRACTION_UNIT, 0) for kind in self.kinds)",
        '(FRACTION_UNIT, 0) for kind in ("first", "second"))',
        f"{OF_OPTIMIZER}::test_of_a_pair_only_what_the_order_uses_counts",
    ),
    "betas of 1": (
        GROUPS, "not 0 <= beta < 1:", "not 0 <= beta <= 1:", f"{OF_ERRORS}::test_arguments",
    ),
    "a norm is of all parameters": (
        SETTINGS, "return not self.is_adamw or self.max_grad_norm is not None",
        "return not self.is_adamw", OF_SHARDED,
    ),
    # --------------------------------------------------------------------------------------- flat.py
    "moments of a second flat group": (
        FLAT, "vector.storage_offset() + begin)", "begin)",
        f"{CORNERS}::test_moments_of_a_second_flat_group",
    ),
    "gradients that have a graph": (
        FLAT, "grad is not None and not grad.requires_grad and", "grad is not None and",
        f"{OF_FLAT}::test_double_backward",
    ),
    "copies of members": (
        FLAT, "copy.deepcopy(self.members, memo)", "copy.deepcopy(self.members)",
        f"{OF_FLAT}::test_copies_of_model_and_optimizer",
    ),
    "frozen members": (
        FLAT, "if p.requires_grad and p.numel():", "if p.numel():",
        f"{OF_FLAT}::test_frozen_parameters_are_left_out",
    ),
    "gradients that were moved": (
        FLAT, "            self.members[i].grad = view\n", "",
        f"{OF_FLAT}::test_gradients_put_there_by_hand "
        f"{OF_FLAT}::test_backward_moves_gradients_before_anyone_asks",
    ),
    # ------------------------------------------------------------------ accumulate.py, integrations/
    "weights of micro-batches": (
        ACCUMULATE, "weight = size / sum(sizes)", "weight = 1 / len(sizes)", f"{MICRO}_are_one_batch",
    ),
    "kl kept apart": (
        ACCUMULATE, "m.grad = grad\n        self._kl = []", "m.grad = None\n        self._kl = []",
        f"{MICRO}_are_one_batch",
    ),
    "kl in the update": (
        ACCUMULATE, "m.grad.add_(kl, alpha=self.r_drop)", "m.grad.add_(kl)", f"{MICRO}_are_one_batch",
    ),
    "gradients that are put back": (
        ACCUMULATE, "grad.copy_(values)", "pass", "tests/test_accumulate.py::test_flat_parameters",
    ),
    "average of the kl's gradients": (
        ACCUMULATE, "                    self._replicas.average_()\n", "",
        "tests/test_ddp.py::test_micro_batches_are_one_batch",
    ),
    "gradients after an error": (
        ACCUMULATE, "p.grad = None  # there was none", "pass  # there was none",
        "tests/test_accumulate.py::test_an_error_on_the_way_leaves_no_gradients",
    ),
    "scale of captured gradients": (
        ACCUMULATE, "scale = self._rose, self._precision.scale_on(self._members[0].device)",
        "scale = self._rose, None",
        "tests/test_accumulate.py::test_scaled_losses",
    ),
    "kl of tokens, its gradient": (
        DIVERGENCE, "by_q = -prob_q * ratio - (prob_p - prob_q)", "by_q = -prob_q * ratio",
        f"{OF_TRAINER}::test_kl_of_tokens_in_parts",
    ),
    "rows of a subclass": (
        TRAINER, "for x in type(model).__mro__}", "for x in (type(model),)}",
        f"{OF_TRAINER}::test_a_subclass_has_the_rows_of_its_model",
    ),
    "kl of several labels": (
        TRAINER, "num_items = num_items / labels.shape[1]", "pass",
        f"{OF_TRAINER}::test_several_labels_of_one_example",
    ),
    "limit at the end of an accumulation": (
        ACCUMULATE, "check_limit(max_grad_norm, self._rose",
        "(lambda *_: None)(max_grad_norm, self._rose",
        "tests/test_accumulate.py::test_a_limit_that_is_none_is_refused_at_the_end",
    ),
    "rows of next tokens": (
        TRAINER, "counts[:, 1:], torch.zeros_like(counts[:, :1])",
        "torch.zeros_like(counts[:, :1]), counts[:, 1:]", f"{OF_TRAINER}::test_rows_of_next_tokens",
    ),
    "clipping by the Trainer, too": (
        TRAINER, "return None  # the step clips", "pass  # the step clips",
        f"{OF_TRAINER}::test_as_a_plain_loop",
    ),
    "kl by items": (
        TRAINER, "if num_items is None else num_items)", ")", f"{OF_TRAINER}::test_as_a_plain_loop",
    ),
    "masks of the last micro-batch": (
        TRAINER, "            step.finish()\n            self._step = None\n",
        "            step.finish()\n        self._step = None\n", f"{OF_TRAINER}::test_as_a_plain_loop",
    ),
    "passes between two masks": (
        TRAINER, "rose is not None and rose.needs_first_mask)", "rose is not None)",
        f"{OF_TRAINER}::test_first_order_masks_that_are_used_again",
    ),
    "what an error leaves": (
        TRAINER, "            self._step = None\n            raise", "            raise",
        f"{OF_TRAINER}::test_an_error_leaves_nothing_for_the_next_run",
    ),
    # ----------------------------------------------------------------------- masks that are used again
    "a mask's last step": (
        CAPTURES, "({\"first\"} if keeps_first else set())", "{\"first\"}",
        f"{OF_REUSE}::test_a_mask_is_not_used_longer",
    ),
    "a second-order mask is used once": (
        CAPTURES, "self.kinds - ({\"first\"} if keeps_first else set())",
        "set() if keeps_first else set(self.kinds)",
        f"{OF_REUSE}::test_a_second_order_mask_is_used_once",
    ),
    "masks from the end of the warm-up on": (
        OPTIM, "(self._steps_done - settings.selection_warmup_steps) % settings.first",
        "self._steps_done % settings.first", REUSED,
    ),
    "a mask that was lost": (
        OPTIM, "there = \"first\" in self._captures.kinds and self._reuses_first",
        "there = self._reuses_first", f"{OF_REUSE}::test_a_mask_that_was_lost_is_made_anew",
    ),
    "a mask of one's own": (
        OPTIM, " and not self._captures.is_own(\"first\")", "",
        f"{OF_REUSE}::test_masks_of_ones_own",
    ),
    "needed where a mask is due": (
        OPTIM, "there = \"first\" in self._captures.kinds and self._reuses_first",
        "there = \"first\" in self._captures.kinds",
        f"{OF_REUSE}::test_two_captures_before_a_step",
    ),
    "no second pass": (
        LOSSES, "return rose.needs_first_mask, ", "return \"first\" in rose.settings.kinds, ",
        f"{OF_REUSE}::test_no_second_pass_where_one_does",
    ),
    "no second pass over micro-batches": (
        ACCUMULATE, "return self._first or self.r_drop > 0.0", "return True",
        f"{OF_REUSE}::test_no_second_pass_where_one_does",
    ),
    "micro-batches between two masks": (
        LOSSES, "second or (rose and \"first\" in rose.settings.kinds):\n", "first or second:\n",
        f"{OF_REUSE}::test_micro_batches_one_at_a_time_are_refused_in_every_step",
    ),
    "settings that came later": (
        CHECKPOINT, "{**ADDED, **ours", "{**ours",
        f"{OF_REUSE}::test_another_number_in_a_checkpoint_is_said",
    ),
    # ------------------------------------------------------------------------ masks of parts, shards.py
    "a saved mask of a part": (
        SHARDS, "if is_plain or mask.is_meta or mask.dtype == torch.bool:", "if True:", MASKS_OF_PARTS,
    ),
    "a loaded mask of a part": (
        SHARDS, "memory_order(local(param), (part_of(mask, param),))",
        "memory_order(local(param), (local(mask),))",
        f"{OF_RESHARD}::test_a_state_of_one_process_is_loaded_by_several",
    ),
    "the whole mask of a parameter": (
        SHARDS, 'return loaded_mask(_unpacked(mask, torch.empty(param.shape, device="meta")), param)',
        "return mask",
        f"{OF_RESHARD}::test_a_state_of_one_process_is_loaded_by_several",
    ),
    "the size of a mask": (
        SHARDS, "(torch.uint8, (param.numel() + 7) // 8)", "(torch.uint8, mask.numel())",
        f"{OF_RESHARD}::test_other_placements_are_refused",
    ),
    # ------------------------------------------------------------------------------------- losses.py
    "R-Drop with masks of one's own": (
        LOSSES, ' and not rose._captures.is_own("second")', "",
        f"{OF_LOSSES}::test_r_drop_with_masks_of_ones_own",
    ),
    "passes where nothing is selected": (
        OPTIM, "return needed and ranks_something and self._is_selecting() and not there",
        "return needed and not there", f"{OF_REUSE}::test_one_pass_where_nothing_is_selected",
    ),
    "passes where no group is selective": (
        OPTIM, "return needed and ranks_something and ", "return needed and ",
        f"{OF_REUSE}::test_one_pass_where_nothing_is_selected",
    ),
    "backwards of R-Drop where nothing is selected": (
        LOSSES, " and r_drop > 0.0 and rose._is_selecting()", " and r_drop > 0.0",
        f"{OF_REUSE}::test_r_drop_takes_one_backward_where_nothing_is_selected",
    ),
    "a mask that somebody cleared": (
        OPTIM, 'there = any(MASKS["first"] in state for state in self.state.values())', "pass",
        f"{OF_REUSE}::test_a_mask_that_somebody_cleared_is_needed_again",
    ),
    "steps of a state that somebody filled": (
        OPTIM, "            self._steps_done, self._had_state = max(", "            _ = max(",
        f"{OF_REUSE}::test_steps_of_a_state_that_somebody_else_filled",
    ),
    "masks of a step of no gradients": (
        OPTIM, "        steps = False\n", "        steps = True\n",
        f"{OF_MASKS}::test_a_step_of_no_gradients_uses_up_no_masks",
    ),
    "logits behind a loss": (
        LOSSES, "output[1 if has_loss else 0]", "output[0]",
        f"{OF_TRAINER}::test_models_that_return_tuples",
    ),
    "rows that are not shifted": (
        TRAINER, " and names.isdisjoint(_UNSHIFTED)", "",
        f"{OF_TRAINER}::test_the_kl_is_of_the_rows_that_the_loss_is_of",
    ),
    "a choice of nothing": (
        TRAINER, "if not any(selective for _, selective in groups):", "if False:",
        f"{OF_TRAINER}::test_a_choice_of_nothing_is_refused",
    ),
    "leftovers of parameters that only the optimizer has": (
        LOSSES, "dict.fromkeys([*model.parameters(), *own])", "dict.fromkeys(model.parameters())",
        f"{CORNERS}::test_leftovers_of_parameters_that_only_the_optimizer_has",
    ),
    "leftovers of parameters of another optimizer": (
        LOSSES, "for p in parameters:  # those", "for p in own:  # those",
        f"{OF_LOSSES}::test_parameters_of_another_optimizer_get_no_kl_gradient",
    ),
    "losses that are accumulated": (
        WRAPPERS, "            loss = loss / self.accumulation\n", "            pass\n",
        f"{OF_LOSSES}::test_accelerate_divides_for_accumulation_and_clips_at_the_end",
    ),
    "norm of scaled gradients": (
        LOSSES, "        norm = norm / scale\n", "        pass\n",
        f"{CORNERS}::test_the_norm_to_clip_to_is_of_unscaled_gradients",
    ),
    "weight of the kl": (
        LOSSES, "backward(kl * r_drop)", "backward(kl)",
        f"{OF_LOSSES}::test_masks_come_from_their_losses_and_the_update_from_the_aggregate",
    ),
    "norm of a captured mask": (
        LOSSES, "grad_scale=scale, max_grad_norm=max_grad_norm)", "grad_scale=scale)", CLIPPED_MASKS,
    ),
    "scale of a first-order mask": (
        LOSSES, 'rose.capture("first", grad_scale=scale)', 'rose.capture("first")',
        f"{CORNERS}::test_a_first_order_mask_of_scaled_gradients",
    ),
    "dropout of a model in eval mode": (
        LOSSES, "m.training and m.p > 0", "m.p > 0",
        f"{OF_LOSSES}::test_two_passes_without_dropout_are_refused",
    ),
    # ----------------------------------------------------------------------------------- wrappers.py
    "averages over processes": (
        WRAPPERS, "        flat.div_(size)  # before", "        # before", OF_DDP,
    ),
    "gradients of other processes": (
        WRAPPERS, "            p.grad = torch.zeros_like(p)\n",
        "            p.grad = torch.ones_like(p)\n",
        f"{CORNERS}::test_a_gradient_that_only_another_process_has",
    ),
    "the scaler that both have": (
        WRAPPERS, "or theirs is found.scaler:", "or False:",
        f"{OF_LOSSES}::test_the_scaler_of_a_wrapper_is_used",
    ),
    "optimizers inside of optimizers": (
        WRAPPERS, "for y in layers(x)[1:])", "for y in ())", f"{OF_LOSSES}::test_unwrap",
    ),
    # -------------------------------------------------------------------------- memory.py, layout.py
    "moments in one buffer": (
        MEMORY, "buffer.as_strided(*window, offset))", "buffer.as_strided(*window, 0))",
        f"{CORNERS}::test_moments_in_one_buffer",
    ),
    "moments from a cache line on": (
        MEMORY, "-(-t.numel() // line) * line for", "t.numel() for",
        f"{CORNERS}::test_moments_in_one_buffer",
    ),
    "memory order of buffers": (
        MEMORY,
        "return tensor.stride() if tensor.is_contiguous() else torch.empty_like(tensor).stride()",
        "return torch.empty(tensor.shape).stride()", f"{CORNERS}::test_moments_in_one_buffer",
    ),
    "neighbours in memory": (
        LAYOUT, "if begin >= end:", "if begin > end:",
        f"{OF_GIVEN}::test_neighbours_in_one_buffer {CORNERS}::test_neighbours_of_two_dtypes",
    ),
    "interleaved neighbours": (
        LAYOUT, "if places.any():", "if i != cluster[0]:", f"{OF_GIVEN}::test_neighbours_in_one_buffer",
    ),
    "expanded dimensions of size 1": (
        LAYOUT, "s == 0 and n > 1 for", "s == 0 for",
        f"{CORNERS}::test_a_dimension_of_size_1_may_have_any_stride",
    ),
    "memory order of dimensions": (
        LAYOUT, "key=lambda d: -strides[d]", "key=lambda d: strides[d]", ORDER,
    ),
    "bytes of a mask": (
        LAYOUT, "sizes = [(n + 7) // 8 for n in numels]", "sizes = [n // 8 for n in numels]",
        f"{OF_OPTIMIZER}::test_a_mask_takes_one_bit_per_element",
    ),
}  # fmt: skip
