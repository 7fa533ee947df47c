"""Every range of scene seeds and every random stream of `envs`: which number means what, in one place.

A scene is a pure function of its seed, so scenes that must not be shared have seeds in disjoint ranges. All integers
here are frozen: another one is another set of scenes. Imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Mapping

# ---------------------------------------------------------------------- scene seeds
TRAIN_SEED_LIMIT = 1_000_000
"""Demonstrations and RL train on scenes [0, TRAIN_SEED_LIMIT)."""
RL_TRAIN_SEEDS = (500_000, TRAIN_SEED_LIMIT)
"""The half in which recipes and quickstart practise, away from the demonstrations of the first `DEMO_BLOCK`s."""
DEMO_BLOCK = 20_000
"""Scenes that the demonstrations of one run's seed s may use: s * DEMO_BLOCK and on."""
VALIDATION_SEED0 = 3_000_000
"""RL chooses its best checkpoint on scenes from here on: neither training scenes nor those of the evaluation."""
RETENTION_SEED0 = 3_010_000
"""Tasks that must not be forgotten are evaluated before and after RL on scenes from here on."""
FIRST_EVALUATION_SEED = 5_000_000
"""Reported success rates are of scenes from here on: `eval_seed0` of every suite, LeRobot's `first_seed`."""

SCENE_RANGES: Mapping[str, range] = {
    "training": range(TRAIN_SEED_LIMIT),
    "validation": range(VALIDATION_SEED0, RETENTION_SEED0),
    "retention": range(RETENTION_SEED0, FIRST_EVALUATION_SEED),
    "evaluation": range(FIRST_EVALUATION_SEED, 2**53),
}
"""Disjoint; a scene serves one purpose."""


def chosen_by(seeds: range) -> str:
    """The line to say where scenes that are played for a result have another purpose; "" for evaluation scenes."""
    for purpose, scenes in SCENE_RANGES.items():
        shared = range(max(seeds.start, scenes.start), min(seeds.stop, scenes.stop))
        if purpose != "evaluation" and len(shared):
            return (
                f"warning: scenes {shared[0]:,} to {shared[-1]:,} are for {purpose}: a policy may have learnt from "
                f"them or been chosen by them; those for evaluation begin at {FIRST_EVALUATION_SEED:,}"
            )
    return ""


GROUNDING_SEED = 900_000
"""Seed of the quickstart's grounding set. Its scenes are drawn from `Stream.GROUNDING`, not from scene seeds."""


# ---------------------------------------------------------------------- random streams
class Stream:
    """Second integer of `numpy.random.default_rng([seed, stream])`: independent draws from one seed."""

    PICK_PLACE_SCENE = 17
    """Layout, colours and target of the pick and place suites."""
    WORDS = 29
    """Phrasing of the instruction."""
    ARM_START = 31
    """Noise on the arm's first pose."""
    EXECUTION_NOISE = 41
    """Noise on demonstrated actions."""
    GOAL_SCENE = 53
    """Layout, colours and goals of the suites with fixtures."""
    EXCHANGE = 63
    """In whose place each thing of a LIBERO scene stands."""
    SO101_SCENE = 67
    """Layout, colours and first pose of the SO-101 suites."""
    GROUNDING = 53
    """Third integer, after seed and number of a grounding scene."""
    TALK = 59
    """Moments of episodes that are asked about, and the questions."""
    RESET_CHECK = 61
    """Seeds and tasks of `envs.evaluation.reset_checks`."""
    HOLD_TIMES = 67
    """Control steps that each goal of a suite with fixtures must hold."""
    FLASHES = 69
    """When lamps light up for a moment."""
    LATENCY = 71
    """Latency of an episode."""
    INSIDE = 73
    """Where in a fixture an object lies at the start."""
    PERTURB_SEVERITY = 97
    """Severity of a perturbation that is a range; followed by the axis."""
    PERTURB = 101
    """Draws of a perturbation; followed by the axis and more."""
