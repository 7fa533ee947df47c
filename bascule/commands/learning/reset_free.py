"""`vla rl reset-free`: a task and its undo practised without resets, after learning from logs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bascule.commands.base import Command, check_numbers, given, stays
from rl.configs.offline import AgentConfig, ResetFreeConfig
from vla.core.checkpoint import CONFIG
from vla.runtime.locks import refuse_used

_RUN, _AGENT = ResetFreeConfig(), AgentConfig()


@dataclass(frozen=True)
class ResetFree(Command):
    """Practise a task and its undo without resets, rewarded by a success classifier that is learnt from logs."""

    init: Path
    """Checkpoint of imitation to start from."""
    demos: Path
    """Folder of the demonstrations that it learnt from: the agent and the classifier learn from them, too."""
    embodiment: str | None = None
    """The robot to practise with, for a checkpoint trained for several; the result is a policy for this robot only."""
    suite: str = _RUN.suite
    """The suite to practise in."""
    forward: str = _RUN.pair[0]
    """The task, one of the suite's."""
    undo: str = _RUN.pair[1]
    """The task that undoes it; the two take turns."""
    out: Path = Path("runs/reset-free")
    """The folder of the run: OUT/policy is the policy, OUT/classifier says when a task is done."""
    algorithm: str = _AGENT.algorithm
    """cal-ql: conservative values, pushed down no further than what the data returned; cql: the same without that
    bound; awac: imitation weighted by advantages; rlpd: neither, half of every batch logged data;
    filtered: imitation of what was rewarded in the end."""
    reward: str = _RUN.reward
    """classifier: learnt from the logs; simulator: the simulator's word; shuffled: a classifier learnt from shuffled
    labels, a control that must fail."""
    decisions: int = _RUN.decisions
    """Chunks executed while practising, over all environments."""
    logged_episodes: int = _RUN.logged_episodes
    """Episodes of the initial policy that are logged with their outcomes before anything is learnt."""
    offline_steps: int = _RUN.offline_steps
    """Critic updates on demonstrations and logs before practising."""
    reset_every: int = _RUN.reset_every
    """Episodes of an environment between real resets, which are counted."""
    num_envs: int = _RUN.num_envs
    """Environments that play at the same time."""
    workers: int = 1
    """Processes that simulate."""
    episodes: int = 50
    """Scenes on which true success in each of the two tasks is measured: at the start, at the switch to online learning
    and at the end. They are for validation; `vla eval` reports on others."""
    seed: int = 0
    """Seed of scenes, exploration and fresh weights."""
    resume: bool = False
    """Continue the run in OUT bit-exactly from its last scheduled reset; start it if there is none yet."""

    def run(self) -> None:
        """Practise, write OUT/policy and print how success went. ValueError for invalid arguments."""
        config = self._config()
        refuse_used(self.out / "last" / CONFIG, self.out, "a run", resume=self.resume)
        from bascule.catalogue import trained
        from envs.registry import load_suite
        from policies.load import chosen_embodiment

        init = trained(self.init)
        member = chosen_embodiment(init, self.embodiment)
        suite = load_suite(self.suite)
        for task in config.pair:
            if task not in suite.tasks:
                raise ValueError(f"suite {self.suite!r} has no task {task!r}; it has: {', '.join(suite.tasks)}")
        if not (self.demos / "meta" / "info.json").is_file():
            raise ValueError(f"--demos {self.demos} is not a folder of demonstrations: it has no meta/info.json")
        import torch

        from envs import make_vec
        from envs.seeds import VALIDATION_SEED0
        from envs.sim.render_options import drawn_for
        from rl.offline.session import learn_without_resets, true_success
        from vla.core.config import save_json
        from vla.data.lerobot_dataset import load_dataset
        from vla.model.model import VLA
        from vla.model.policy import VLAPolicy
        from vla.runtime.console import progress, say

        vla = VLA.load(init, member=member)
        vla.members = {}  # the weights they share are refined for one of them
        torch.set_num_threads(1)  # small tensors: a second thread costs more than it saves
        drawn = drawn_for(VLAPolicy(vla))
        worlds = make_vec(self.suite, self.num_envs, num_workers=self.workers, **drawn)
        try:
            referee = make_vec(self.suite, self.num_envs, num_workers=self.workers, **drawn)
            try:
                scenes = range(VALIDATION_SEED0, VALIDATION_SEED0 + self.episodes)
                with progress("reset-free", config.decisions, unit="decisions") as update:
                    outcome = learn_without_resets(
                        vla, worlds, load_dataset(self.demos), config, self.out, resume=self.resume,
                        evaluate=true_success(vla, referee, config.pair, scenes),
                        on_window=lambda row: update(row["decisions"], _told(row)),
                    )  # fmt: skip
            finally:
                referee.close()
        finally:
            worlds.close()
        save_json(self.out / "outcome.json", vars(outcome))
        self._report(outcome)
        resets = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in outcome.resets.items())
        say(f"episodes began with a reset or without: {resets}")
        say(f"policy in {self.out / 'policy'}")

    def _config(self) -> ResetFreeConfig:
        """The run. ValueError for numbers and names that make none."""
        check_numbers(
            self, decisions=(1, 10**9), logged_episodes=(1, 10**6), offline_steps=(0, 10**9), num_envs=(1, 100_000),
            reset_every=(1, 10**6), workers=(1, 1024), episodes=(1, 10**6), seed=(0, 2**31),
        )  # fmt: skip
        config = replace(
            _RUN, pair=(self.forward, self.undo), agent=replace(_AGENT, algorithm=self.algorithm),
            **given(
                suite=self.suite, reward=self.reward, decisions=self.decisions, offline_steps=self.offline_steps,
                logged_episodes=self.logged_episodes, num_envs=self.num_envs, reset_every=self.reset_every,
                seed=self.seed,
            ),
        )  # fmt: skip
        if problem := config.problem():
            raise ValueError(problem)
        return config

    def _report(self, outcome: Any) -> None:
        from envs.evaluation.evaluate import Count
        from vla.runtime.console import format_rate, stdout, table

        rows = [
            (row["when"], row["decisions"], *(format_rate(Count(*count).to_dict()) for count in row["tasks"].values()))
            for row in outcome.evaluations
        ]
        stdout().print(table("true success", ("", "decisions", self.forward, self.undo), rows))

    def kept(self) -> str:
        """The last checkpoint is kept after Ctrl-C."""
        told = f"the last checkpoint stays in {self.out}; add --resume to continue"
        return stays(self.out / "last" / CONFIG, told)


def _told(row: dict[str, Any]) -> str:
    return f"{row.get('successes', 0)} of {row.get('episodes', 0)} done"
