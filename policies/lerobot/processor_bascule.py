"""LeRobot's pipelines around a Bascule policy: its stock steps, and none of our own that a tool would have to find.

Words, pixels, state and actions are translated inside the policy by `vla.processing.processor`, as in training. What
LeRobot insists on finding by name in a saved pipeline (rename, device, normaliser) is there and passes values through.
"""

from __future__ import annotations

from typing import Any

from lerobot.processor import make_default_policy_processor_steps, make_policy_processor_pipelines

from policies.lerobot.configuration_bascule import BasculeConfig


def make_bascule_pre_post_processors(
    config: BasculeConfig, dataset_stats: dict[str, dict[str, Any]] | None = None
) -> tuple[Any, Any]:
    """(pre, post) pipelines. `dataset_stats` only ride along: nothing here scales by them."""
    steps = make_default_policy_processor_steps(config, dataset_stats)
    return make_policy_processor_pipelines(
        input_steps=[steps.rename_observations, steps.add_batch_dim, steps.to_device, steps.normalize],
        output_steps=[steps.unnormalize, steps.to_cpu],
    )
