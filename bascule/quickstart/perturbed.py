"""The quickstart's last measurement with a recipe that randomises: the refined policy in perturbed environments."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bascule.quickstart.stages import Result
from vla.runtime import console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bascule.quickstart.config import QuickstartConfig

PREFIX = "perturbed: "


def judge_perturbed(config: QuickstartConfig, out: Path, cells: Sequence[str], seeds: Sequence[int]) -> Result:
    """Success in the scenes of `seeds` under each of the perturbations `cells` ("texture=0.5"), as controls."""
    from envs import make_vec
    from envs.evaluation.evaluate import Count, evaluate
    from envs.perturb.perturbation import parse
    from envs.sim.render_options import pictures_for
    from vla.model.model import VLA
    from vla.model.policy import VLAPolicy

    policy = VLAPolicy(VLA.load(out / "rl" / "best"))
    found: dict[str, dict[str, Any]] = {}
    with console.progress("perturbed environments", len(cells)) as update:
        for number, cell in enumerate(cells):
            envs = make_vec(
                config.suite, min(48, len(seeds)), num_workers=config.workers, image_size=pictures_for(policy),
                perturb=parse([cell]),
            )  # fmt: skip
            try:
                report = evaluate(policy, envs, seeds, suite=config.suite)
            finally:
                envs.close()
            counts = Count(report.successes, report.episodes).to_dict()
            found[PREFIX + cell] = counts | {"wrong_object": report.wrong_object}
            update(number + 1, note=f"{cell}: {console.format_rate(counts)}")
    return Result({}, {"controls": found})
