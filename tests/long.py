"""Long proofs among other tests: those that `make prove` runs and `make test`, which is to stay short, does not.

Each has a shorter neighbour that `make test` runs: another model, another plan, or the same in parts.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

LONG = (
    "test_capture.py::test_a_rank_with_one_sample_still_has_a_dim_of_samples",
    "test_capture.py::test_fingerprints_tell_models_apart",
    "test_cli.py::test_plans_that_do_not_fit?hopeless*",
    "test_engine.py::test_a_rank_is_fed_its_share_of_each_batch",
    "test_engine.py::test_batch_norm_and_its_buffers_are_those_of_the_whole_batch?*ZeRO-1?",
    "test_engine.py::test_batch_norm_and_its_buffers_are_those_of_the_whole_batch?data 2 (3, 1)?",
    "test_engine.py::test_bf16_computes_in_bf16_and_keeps_fp32?*ZeRO-1?",
    "test_engine.py::test_bf16_computes_in_bf16_and_keeps_fp32?one rank?",
    "test_engine.py::test_dropout_does_not_depend_on_the_plan?one rank?",
    "test_engine.py::test_dropout_does_not_depend_on_the_plan?tensor 2_0?",
    "test_engine.py::test_frozen_and_unused_parameters_stay_as_they_were?*ZeRO-[12]?",
    "test_engine.py::test_frozen_and_unused_parameters_stay_as_they_were?data 2?",
    "test_engine.py::test_masks_per_rank_are_a_choice_and_agree_where_ranks_hold_the_same?data 2?",
    "test_engine.py::test_plans_one_after_another_leave_no_threads",
    "test_engine.py::test_the_norm_that_is_clipped_is_the_whole_gradient_s?*ZeRO-1?",
    "test_engine.py::test_the_norm_that_is_clipped_is_the_whole_gradient_s?tensor 2_0?",
    "test_engine.py::test_the_scheduler_steps_once_per_update?*ZeRO-3?",
    "test_engine.py::test_tied_weights_stay_one?*gpipe?",
    "test_engine.py::test_tied_weights_stay_one?data*",
    "test_evaluate.py::*?images-one?",
    "test_evaluate.py::*?images-zero 3?",
    "test_evaluate.py::*?tokens-data?",
    "test_evaluate.py::*?tokens-one?",
    "test_evaluate.py::*?tokens-zero 3?",
    "test_examples.py::test_a_loop_of_ones_own_gives_the_same_losses_on_one_rank_and_on_two",
    "test_generate.py::test_the_same_seed_draws_the_same_tokens_by_data_and_by_tensor",
    "test_joined.py::test_joined_under_torchrun",
    "test_module_engine.py::*?nll-data?",
    "test_module_engine.py::*?weighted-data?",
    "test_orders.py::test_ranks_sort_what_they_have?added-tensor 2?",
    "test_orders.py::test_ranks_sort_what_they_have?inverse-data 2 * expert 2?",
    "test_overlap.py::test_buckets_are_sent_during_the_last_backward?1?",
    "test_overlap.py::test_buckets_of_any_size_compute_what_one_device_does?1088-??",
    "test_planner.py::test_a_folded_graph_is_priced_as_the_whole?llama?",
    "test_planner_predict.py::test_activations_are_what_is_there_at_the_fullest_moment?*-resnet?",
    "test_planner_predict.py::test_activations_are_what_is_there_at_the_fullest_moment?2-gpt2?",
    "test_planner_predict.py::test_predict_has_a_plan_chosen",
    "test_precision.py::test_predict_can_be_asked_how_far_int8_is_from_fp32",
    "test_precision.py::test_weights_take_half_in_bf16_and_a_quarter_in_int8",
    "test_predict.py::test_four_ranks_give_what_one_device_gives?qkv_attention?",
    "test_predict.py::test_other_dims_are_split",
    "test_predict_command.py::test_a_killed_command_goes_on",
    "test_predict_run.py::test_a_model_that_does_not_capture_is_split_by_data_alone",
    "test_predict_run.py::test_a_stream_is_read_to_its_end?0?",
    "test_predict_run.py::test_an_output_without_a_tensor_is_an_error",
    "test_predict_run.py::test_mistakes_are_told_before_anything_is_computed",
    "test_predict_run.py::test_plans_for_training_predict_as_well?pipeline?",
    "test_predict_run.py::test_the_models_own_structure_comes_back?tensor?",
    "test_recompute.py::test_recompute_computes_what_one_device_does?llama-sequence?",
    "test_recompute.py::test_recompute_computes_what_one_device_does?llama-zero 3?",
    "test_recompute.py::test_recompute_keeps_only_what_blocks_are_given",
    "test_schedules.py::test_schedules_compute_what_one_device_does?skip_regressor-1f1b-2-1?",
    "test_schedules.py::test_schedules_compute_what_one_device_does?skip_regressor-gpipe-4-2?",
    "test_schedules.py::test_schedules_compute_what_one_device_does?t5-[gi1]*",
    "test_schedules.py::test_schedules_compute_what_one_device_does?t5-zero-bubble-4-1?",
    "test_serve_generate.py::test_tokens_are_those_of_one_device?tensor?",
    "test_shared_memory.py::test_every_collective_returns_what_gloo_returns?torch.float32-??",
    "test_shared_memory.py::test_every_collective_returns_what_gloo_returns?torch.int64-??",
    "test_train.py::test_torchrun_ranks_are_joined",
    "test_unfold.py::test_the_graph_of_a_few_layers_is_that_of_the_whole?in pairs?",
    "test_unfold.py::test_the_graph_of_a_few_layers_is_that_of_the_whole?one other?",
    "test_unfold.py::test_the_graph_of_a_few_layers_is_that_of_the_whole?statistics?",
    "test_verify.py::test_a_run_that_differs_between_ranks_does_not_pass",
    "test_verify.py::test_every_strategy_computes_what_one_device_computes?gpt2_dropout?",
    "test_verify.py::test_every_strategy_computes_what_one_device_computes?lstm_tagger?",
    "test_verify.py::test_every_strategy_computes_what_one_device_computes?resnet?",
    "test_verify.py::test_float32_takes_steps_of_plain_sgd",
    "test_verify.py::test_hybrids_compute_what_one_device_computes?tied_lm-8-3?",
    "test_verify.py::test_more_plans_get_rows_of_their_own",
    "test_weights_on_ranks.py::test_a_rank_reads_the_bytes_that_it_stores?qkv_attention?",
)
"""Patterns of their names; `?` stands for a bracket."""


def is_long(name: str) -> bool:
    """Whether a test is one of them, by its node id."""
    return any(fnmatchcase(name.removeprefix("tests/"), pattern) for pattern in LONG)
