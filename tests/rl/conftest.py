"""Where each check that an RL library should ship is, by the name it is known under, and two policies for them all.

 1 ratio_first_epoch         algorithms/test_ppo.py::test_ratio_is_1_before_the_first_step_whatever_the_batch_size
                             models/test_what_trains.py::test_ratio_first_epoch_with_a_backbone_in_bfloat16
 2 gae_reference             algorithms/test_advantages.py::test_gae_is_its_definition
                             external/test_sb3.py::test_gae_is_sb3s
 3 lambda_limits             algorithms/test_advantages.py::test_lambda_0_is_the_td_error_and_1_the_discounted_return
 4 timeout_bootstrap         algorithms/test_ppo.py::test_values_see_through_time_limits_but_not_through_endings
 5 terminated!=truncated
            algorithms/test_advantages.py::test_an_end_cuts_the_recursion_and_only_termination_cuts_the_bootstrap
     inside a chunk          ../envs/backends/test_chunk_smdp.py::test_a_chunk_is_its_single_steps
     final_obs, not reset's
            algorithms/test_ppo.py::test_a_finished_episode_keeps_its_final_state_and_the_world_gets_a_fresh_seed
     NEXT_STEP               ../envs/test_gym_env.py::test_the_vector_view_plays_what_single_worlds_play
     SAME_STEP               external/test_sb3.py::test_the_horizon_is_a_time_limit_and_success_is_not
 6 chunk_smdp                ../envs/backends/test_chunk_smdp.py::test_a_chunk_is_its_single_steps
 7 mask                      algorithms/test_ppo.py::test_what_was_not_executed_changes_nothing
                       models/test_distribution.py::test_mask_what_was_not_executed_changes_neither_density_nor_gradient
 8 logprob_analytic          models/test_actor.py::test_log_prob_is_the_masked_sum_of_torch_normals
                             models/test_distribution.py::test_logprob_analytic_correlated_noise_is_the_dense_normal
 9 clip_grad_zero            algorithms/test_ppo.py::test_gradient_is_zero_exactly_where_the_clip_says
     dual clip               algorithms/test_grpo.py::test_clip_higher_and_dual_clip
10 advantage_norm            test_parallel.py::test_advantage_norm_is_global
11 grpo: maths               algorithms/test_grpo.py::test_grpo_group_math
     zero variance           algorithms/test_grpo.py::test_grpo_zero_variance_groups_give_exactly_zero
     bounds inclusive        algorithms/test_grpo.py::test_grpo_filter_bounds_are_inclusive
     one initial state       algorithms/test_grpo.py::test_grpo_groups_share_the_exact_initial_state
12 rloo                      algorithms/test_grpo.py::test_rloo_is_unbiased_on_a_bandit
13 critic_warmup_freezes_policy algorithms/test_ppo.py::test_critic_warm_up_leaves_the_policy_bit_equal
14 frozen_vlm                models/test_what_trains.py::test_frozen_vlm_and_greedy_is_the_imitation_at_first
15 seed_determinism          test_runner.py::test_a_seed_fixes_the_run
     ranks differ            test_parallel.py::test_ddp_equiv_gradients_are_those_of_one_process_with_twice_the_worlds
16 resume_exact              test_runner.py::test_resume_is_bit_exact
     in a new process        test_parallel.py::test_resume_exact_of_what_another_process_began
17 nan_guards                algorithms/test_ppo.py::test_nan_is_named_and_reaches_no_parameter
     simulation diverges     test_guards.py::test_rollouts_go_on_after_a_divergence
                    ../envs/backends/test_divergence.py::test_workers_report_it_and_an_evaluation_counts_it_as_a_failure
                             ../envs/backends/test_warp_env.py::test_a_world_without_a_finite_state_is_reset_and_counted
18 buffer                    algorithms/test_ppo.py::test_buffer_gives_each_transition_once_an_epoch_in_even_parts
     overflow                algorithms/test_ppo.py::test_buffer_rows_belong_together_and_overflow_is_an_error
19 checkpoint_compat         test_runner.py::test_checkpoint_compat_a_run_of_an_older_version_goes_on
20 learning: PPO             algorithms/test_learning.py::test_ppo_learns
     GRPO                    algorithms/test_learning.py::test_grpo_learns
     bandit                  algorithms/test_learning.py::test_a_bandit_of_chunks_is_solved_and_by_a_flipped_sign_is_not
     does no harm            algorithms/test_learning.py::test_ppo_does_not_degrade_a_policy_that_is_good_already
     sign flip               algorithms/test_learning.py::test_a_sign_flipped_advantage_unlearns
21 parity: one update        external/test_parity.py::test_one_update_is_sb3s
     returns (slow)          external/test_parity.py::test_returns_agree_on_two_tasks_over_three_seeds
22 cpu_vs_warp               ../envs/backends/test_warp_env.py::test_the_same_actions_move_both_backends_alike
     success                 ../envs/backends/test_warp_env.py::test_the_expert_solves_every_suite_here_too
23 ddp_equiv                 test_parallel.py::test_ddp_equiv_gradients_are_those_of_one_process_with_twice_the_worlds
24 sft->rl load              models/test_what_trains.py::test_frozen_vlm_and_greedy_is_the_imitation_at_first
                             models/test_vla.py::test_refining_a_vla
25 reward_model       rewards/test_process_reward.py::test_reward_model_is_calibrated_to_one_false_positive_in_a_hundred
     frozen                  rewards/test_process_reward.py::test_a_shaped_run_reports_its_model_and_resumes_exactly
"""

import pytest
import torch

from tests.rl.toy import imitate


@pytest.fixture(scope="session")
def cloned() -> dict[str, torch.Tensor]:
    """Half of its episodes succeed."""
    return imitate(0).state_dict()


@pytest.fixture(scope="session")
def precise() -> dict[str, torch.Tensor]:
    """Nearly all of its episodes succeed."""
    return imitate(0, offset=0.0).state_dict()
