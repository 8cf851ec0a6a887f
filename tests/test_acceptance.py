"""Facts that a DeepSeek-V3 and its training must show on a CPU, claim by claim, and the tests that hold each."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent

FACTS: dict[int, dict[str, tuple[str, ...]]] = {
    1: {
        "main model 671,026,404,352, routing bias 14,848": (
            "deepseek_v3/test_config.py::test_671b_has_the_released_number_of_parameters",
        ),
        "MTP layer 11,610,068,224 of its own": (
            "deepseek_v3/test_mtp.py::test_the_released_layer_has_11_610_068_224_parameters_of_its_own",
        ),
        "scales 41,540,496; with the copies of embedding and head 684,531,386,000": (
            "deepseek_v3/test_convert.py::test_every_element_of_the_released_checkpoint_is_expected",
        ),
        "37,552,282,624 of them for a token": ("runtime/test_planning.py::test_671b_is_the_papers",),
    },
    2: {
        "logits, gradients and experts of transformers under a random bias; q_lora, YaRN, groups, dense prefix": (
            "deepseek_v3/test_model.py::test_logits_gradients_and_experts_are_those_of_transformers",
        ),
        "left padding": (
            "deepseek_v3/test_model.py::test_padding_changes_nothing",
            "deepseek_v3/test_model.py::test_left_padded_generation_is_that_of_transformers_and_of_each_prompt_alone",
        ),
        "those of the paper's equations, one token, head and expert at a time": (
            "deepseek_v3/test_paper.py::test_logits_experts_and_gradients_are_those_of_the_equations",
        ),
        "at the end of contexts of 4K, 32K and 128K": (
            "deepseek_v3/test_paper.py::test_late_positions_are_those_of_transformers",
            "deepseek_v3/test_paper.py::test_late_positions_are_those_of_the_equations",
        ),
    },
    3: {
        "interleaved rotation is that of halves after permuting weights, and not before": (
            "deepseek_v3/test_rope.py::test_half_rope_is_interleaved_rope_after_permuting_weights_and_not_before",
        ),
    },
    4: {
        "YaRN's ramp goes from pair 10 to 23": ("deepseek_v3/test_config.py::test_yarn_of_v3_ramps_from_10_to_23",),
        "softmax scale 0.1352338": ("deepseek_v3/test_config.py::test_softmax_scale_of_v3",),
    },
    5: {
        "absorbed attention is naive attention": (
            "deepseek_v3/test_attention.py::test_absorbed_attention_is_naive_attention",
        ),
        "greedy decoding over the cache is the full forward, token by token": (
            "deepseek_v3/test_model.py::test_greedy_generation_is_that_of_a_full_forward_and_of_transformers",
        ),
        "576 values a token and layer": (
            "deepseek_v3/test_attention.py::test_the_cache_holds_576_values_per_token_and_layer",
        ),
    },
    6: {
        "under a negative bias experts stay within the kept groups and gates add up to 2.5": (
            "deepseek_v3/test_moe.py::test_a_negative_bias_lets_no_expert_in_from_a_lost_group",
        ),
        "gates know nothing of the bias": ("deepseek_v3/test_moe.py::test_gates_are_unbiased_scores_of_the_chosen",),
    },
    7: {
        "2,000 updates of a skewed router bring the largest load below 1.25 of the mean": (
            "sft/test_balance.py::test_2000_updates_even_out_a_skewed_router_to_the_noise_of_sampling",
        ),
        "without speed the bias stays": (
            "sft/test_balance.py::test_nothing_moves_without_speed_or_for_passes_that_dont_count_and_loads_start_afresh",
        ),
        "the bias has no gradient": ("deepseek_v3/test_moe.py::test_the_bias_gets_no_gradient_and_the_router_does",),
        "each update is the paper's": (
            "deepseek_v3/test_paper.py::test_balance_loss_and_bias_are_those_of_the_equations",
        ),
    },
    8: {
        "α at an even load, αN/K collapsed onto K experts": (
            "sft/test_balance.py::test_an_even_load_is_1_a_sequence_and_layer_and_a_collapsed_one_more",
        ),
        "the loss and its gradient are the equations'": (
            "deepseek_v3/test_paper.py::test_balance_loss_and_bias_are_those_of_the_equations",
        ),
    },
    9: {
        "MTP at i sees token i + 1 and none from i + 2 on": (
            "deepseek_v3/test_mtp.py"
            "::test_what_is_said_of_token_i_plus_2_hangs_on_all_tokens_up_to_i_plus_1_and_on_no_other",
        ),
        "the other order of concatenation is not the same": (
            "deepseek_v3/test_mtp.py::test_embedding_and_state_stand_in_the_order_of_the_released_weights",
        ),
        "leaving the layer behind changes no bit of the main logits": (
            "deepseek_v3/test_mtp.py"
            "::test_the_main_model_is_the_same_bits_with_it_without_it_and_after_leaving_it_behind",
        ),
        "logits and gradients are the equations'": (
            "deepseek_v3/test_paper.py::test_the_mtp_layer_and_its_gradients_are_those_of_the_equations",
        ),
    },
    10: {
        "saved and loaded, by transformers too, weights are the same bits": (
            "deepseek_v3/test_checkpoint.py::test_transformers_loads_what_we_save_and_we_load_what_it_saves",
        ),
        "codes, scales and the MTP layer come back bit for bit": (
            "deepseek_v3/test_convert.py::test_weights_of_bf16_quantised_once_round_trip_bit_for_bit",
            "deepseek_v3/test_convert.py::test_transformers_reads_both_precisions_and_both_readers_agree",
            "deepseek_v3/test_convert.py::test_the_official_layout_and_back_changes_no_bit",
        ),
        "a missing scale is an error": (
            "deepseek_v3/test_convert_faults.py::test_what_is_wrong_is_named_with_file_and_remedy",
        ),
    },
    11: {
        "E4M3 on all values and ties": (
            "deepseek_v3/fp8/test_reference.py::test_all_256_codes_are_torchs",
            "deepseek_v3/fp8/test_reference.py::test_every_representable_value_keeps_its_code",
            "deepseek_v3/fp8/test_reference.py::test_ties_go_to_even_and_neighbours_to_the_nearest",
        ),
        "a block of zeros": ("deepseek_v3/fp8/test_reference.py::test_zeros_stay_zeros",),
        "nothing beyond 448": ("deepseek_v3/fp8/test_reference.py::test_nothing_lies_beyond_448",),
        "ragged shapes, 576 among them": (
            "deepseek_v3/fp8/test_reference.py::test_a_scale_is_its_blocks_amax_over_448",
            "deepseek_v3/fp8/test_reference.py::test_a_weights_scale_is_its_squares",
        ),
    },
    12: {
        "quantising what was dequantised changes nothing": (
            "deepseek_v3/fp8/test_reference.py::test_quantising_what_was_dequantised_changes_nothing",
        ),
        "UE8M0 scales are powers of two and |q| at most 448": (
            "deepseek_v3/fp8/test_reference.py::test_power_of_two_scales_are_the_next_power",
        ),
    },
    13: {
        "errors against float64": ("deepseek_v3/fp8/test_reference.py::test_errors_are_those_of_eight_bits",),
        "kernels in the interpreter are the reference": (
            "deepseek_v3/fp8/test_kernels.py::test_kernels_compute_the_reference",
        ),
    },
    14: {
        "packed samples are separate ones: logits, loss, gradients": (
            "deepseek_v3/test_model.py::test_packed_samples_are_those_computed_apart",
            "sft/test_invariance.py::test_packed_equals_separate_and_transformers_own_loss",
        ),
        "positions restart": ("runtime/test_packed.py::test_pack_lays_samples_end_to_end",),
        "prompts carry no loss": (
            "sft/test_invariance.py::test_targets_are_the_trained_tokens_and_never_an_examples_first",
        ),
    },
    15: {
        "advantages under shift and scale": (
            "rl/test_advantage.py::test_adding_to_all_rewards_of_a_group_changes_nothing",
            "rl/test_advantage.py::test_scaling_all_rewards_of_a_group_changes_nothing_but_what_eps_does",
        ),
        "a constant group has no gradient without KL": (
            "rl/test_update.py::test_a_group_that_teaches_nothing_has_no_gradient",
        ),
        "at ratio 1 the loss is β · mean k3 and the gradient is not zero": (
            "rl/test_loss.py::test_at_ratio_1_the_loss_is_beta_times_k3_while_the_gradient_is_not_zero",
        ),
        "ε = 10": ("rl/test_loss.py::test_epsilon_10_caps_only_good_answers_above_ratio_11",),
        "∂k3": ("rl/test_loss.py::test_direct_differentiates_the_estimator_as_published",),
        "aggregation by hand": ("rl/test_loss.py::test_shares_by_hand_where_the_ratio_is_one",),
        "the mean of k3 is the KL": (
            "rl/test_loss.py::test_the_mean_of_k1_and_of_k3_under_the_policy_is_the_exact_kl",
        ),
    },
    16: {
        "8,192 completions are 16 updates on 512, the reference stays for 400": (
            "recipes/test_configs.py::test_r1_zero_is_the_papers_arithmetic",
        ),
        "and a run does as it is configured": (
            "rl/test_schedule.py"
            "::test_each_update_has_its_share_of_the_rollout_and_the_reference_is_replaced_every_so_many_rollouts",
        ),
    },
    17: {
        "from the first rate to the last": (
            "sft/test_optimizer.py::test_the_cosine_starts_at_the_peak_and_ends_where_it_should",
        ),
        "5e-6 to 1e-6": ("recipes/test_configs.py::test_sft_defaults_are_v3s",),
        "5e-5 to 5e-6, and a tenth": ("recipes/test_configs.py::test_r1s_schedules_are_the_papers",),
    },
    18: {
        "tags nested, twice, missing": ("rewards/test_tag_format.py::test_golden_cases",),
        "the last box": ("rewards/maths/test_grade.py::test_only_the_last_box_after_the_thinking_is_graded",),
        "equal fractions": ("rewards/maths/test_grade.py::test_same_answers_written_differently_are_equal_both_ways",),
        "a program that never ends": ("rewards/test_code_tests.py::test_the_reason_says_what_happened",),
    },
    19: {
        "rejection sampling: the same by seed, however often it is killed": (
            "distill/test_kill.py::test_killed_at_every_failpoint_in_turn_it_ends_as_if_nothing_had_happened",
        ),
        "only right answers are kept": (
            "distill/test_choose.py::test_wrong_unknown_and_unreadable_ones_are_never_kept",
            "distill/test_generate.py::test_every_answer_is_there_and_has_a_fate",
        ),
        "a report": ("distill/test_shards.py::test_the_yield_is_counted_by_domain_and_kind",),
    },
    20: {
        "GRPO lifts held-out accuracy above that of SFT on three seeds": (
            "recipes/test_grpo.py::test_thirty_points_on_every_seed_and_the_run_shows_why",
        ),
    },
}
NIGHTLY = {20}
"""Facts that take longer than a default run may."""
OPT_IN = ("slow", "nightly", "gpu", "browser")


def marks_by_test(path: Path) -> dict[str, set[str]]:
    """Name of each test of a file -> what has to be asked for to run it, by its own marks or the file's."""
    tree = ast.parse(path.read_text())

    def marks(node: ast.AST) -> set[str]:
        return {mark for mark in OPT_IN if f"mark.{mark}" in ast.unparse(node)}

    everywhere: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            everywhere |= marks(node.value)
    functions = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"))
    return {f.name: everywhere.union(*map(marks, f.decorator_list)) for f in functions}


def test_all_twenty_facts_are_here() -> None:
    assert sorted(FACTS) == list(range(1, 21))


@pytest.mark.parametrize("number", FACTS)
def test_a_fact_is_held_by_tests_that_exist_and_run_by_default(number: int) -> None:
    for claim, tests in FACTS[number].items():
        for test in tests:
            path, _, name = test.partition("::")
            found = marks_by_test(TESTS / path)
            assert name in found, f"fact {number}, {claim}: {test} is gone; name the test that holds it now"
            assert not found[name] or number in NIGHTLY, f"fact {number}: {test} runs only with -m {found[name]}"
