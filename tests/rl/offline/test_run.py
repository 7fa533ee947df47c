"""A run without resets, with a real policy and real environments, but hardly any learning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from envs import make_vec
from envs.backends.cpu_vec_env import MujocoVecEnv
from envs.demos.record import record
from rl.configs.offline import AgentConfig, ClassifierConfig, ResetFreeConfig
from rl.offline.logs import Logs
from rl.offline.run import Outcome
from rl.offline.session import learn_without_resets
from vla.backbones.hub import load as load_backbone
from vla.core.checkpoint import load_checkpoint
from vla.core.config import load_json
from vla.data.lerobot_dataset import DemoSet, load_dataset
from vla.model.config import AdvantageConfig, MemoryConfig
from vla.model.model import VLA
from vla.training.recipes import RECIPES
from vla.training.train import build_vla

CONFIG = ResetFreeConfig(
    num_envs=2, horizon=8, reset_every=2, logged_episodes=4, offline_steps=2, decisions=32, window=8,
    updates_per_decision=0.5, reward="simulator",
    agent=AgentConfig(batch_size=8, critic_width=16, refiner_width=16, samples=2),
    classifier=ClassifierConfig(width=8, steps=20),
)  # fmt: skip


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> DemoSet:
    tasks = ("into-tray", "out-of-tray")
    return load_dataset(record("tabletop-tray", 4, tmp_path_factory.mktemp("d") / "d", num_workers=1, tasks=tasks))


@pytest.fixture(scope="module")
def worlds() -> Iterator[MujocoVecEnv]:
    env = make_vec("tabletop-tray", 2, num_workers=1)
    yield env
    env.close()


def run(
    worlds: MujocoVecEnv, demos: DemoSet, out: Path, config: ResetFreeConfig = CONFIG, *, kill_at: int = 10**9,
    resume: bool = False,
) -> tuple[Outcome, VLA]:  # fmt: skip
    vla = build_vla(RECIPES["smoke"](), demos, backbone=load_backbone("small")).eval()

    def window(row: dict) -> None:
        if row["decisions"] >= kill_at:
            raise Killed

    outcome = learn_without_resets(
        vla,
        worlds,
        demos,
        config,
        out,
        evaluate=lambda: {"into-tray": [0, 1]},
        logs_at=out.parent / "logs",
        resume=resume,
        on_window=window,
    )
    return outcome, vla


def test_a_killed_run_goes_on_bit_exactly(worlds: MujocoVecEnv, demos: DemoSet, tmp_path: Path) -> None:
    whole, first = run(worlds, demos, tmp_path / "whole")
    with pytest.raises(Killed):
        run(worlds, demos, tmp_path / "cut", kill_at=24)
    assert (tmp_path / "cut" / "last" / "config.json").is_file() and not (tmp_path / "cut" / "policy").exists()
    with pytest.raises(ValueError, match="resume"):
        run(worlds, demos, tmp_path / "cut")
    with pytest.raises(ValueError, match="was made with agent.penalty=0.1"):
        other = replace(CONFIG, agent=replace(CONFIG.agent, penalty=0.2))
        run(worlds, demos, tmp_path / "cut", other, resume=True)
    again, second = run(worlds, demos, tmp_path / "cut", resume=True)
    assert vars(whole) == vars(again)
    assert first.refiner is not None and second.refiner is not None
    for (name, a), b in zip(first.refiner.state_dict().items(), second.refiner.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert whole.decisions == 32 and [e["when"] for e in whole.evaluations] == ["start", "switch", "end"]
    # two decisions an episode, two environments, a real reset of both after four episodes
    assert whole.resets == {"scheduled": 8, "out_of_reach": 0, "broken": 0, "continued": 16}
    assert VLA.load(tmp_path / "whole" / "policy").config.refiner_width == 16


def test_logging_that_was_killed_goes_on_with_the_episodes_it_has(
    worlds: MujocoVecEnv, demos: DemoSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, logged_episodes=12, decisions=2)
    run(worlds, demos, tmp_path / "whole" / "run", config)
    save = Logs.save

    def saved_once(self: Logs, folder: Path, config: ResetFreeConfig) -> None:
        save(self, folder, config)
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Logs, "save", saved_once)
        run(worlds, demos, tmp_path / "cut" / "run", config)
    begun = load_checkpoint(tmp_path / "cut" / "logs").trainer_state
    assert begun["episodes"] == 4  # of 12: before the first scheduled reset
    run(worlds, demos, tmp_path / "cut" / "run", config)
    whole, cut = (load_checkpoint(tmp_path / name / "logs") for name in ("whole", "cut"))
    assert whole.tensors.keys() == cut.tensors.keys() and whole.trainer_state["episodes"] == 12
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor, cut.tensors[name]), name
    assert whole.trainer_state["resets"] == cut.trainer_state["resets"]


def test_episodes_of_another_policy_or_beside_other_demonstrations_are_not_taken(
    worlds: MujocoVecEnv, demos: DemoSet, tmp_path: Path
) -> None:
    short = replace(CONFIG, decisions=8)
    run(worlds, demos, tmp_path / "a", short)
    other = replace(demos, action=demos.action.clip(-0.5, 0.5))
    with pytest.raises(ValueError, match="were logged with another recording: give what"):
        run(worlds, other, tmp_path / "b", short)
    vla = build_vla(replace(RECIPES["smoke"](), seed=5), demos, backbone=load_backbone("small"))
    with pytest.raises(ValueError, match="were logged with another policy: give what"):
        learn_without_resets(vla, worlds, demos, short, tmp_path / "b", evaluate=dict, logs_at=tmp_path / "logs")


def test_a_classifier_rewards_and_is_kept(worlds: MujocoVecEnv, demos: DemoSet, tmp_path: Path) -> None:
    config = replace(CONFIG, reward="classifier", decisions=8)
    outcome, _ = run(worlds, demos, tmp_path / "c", config)
    report = load_json(tmp_path / "c" / "classifier.json")
    assert report["frames"]["negatives"] > 0
    assert load_json(tmp_path / "c" / "classifier" / "config.json")["backbone"] == "small"
    assert outcome.windows[-1]["decisions"] == 8


def test_policies_that_no_agent_can_be_made_of_are_refused(
    worlds: MujocoVecEnv, demos: DemoSet, tmp_path: Path
) -> None:
    vla = build_vla(RECIPES["smoke"](), demos, backbone=load_backbone("small"))
    other = replace(demos, action_names=("dx", "dy", "dz", "jaw"))
    with pytest.raises(ValueError, match="on dx, dy, dz, jaw: not the same components"):
        learn_without_resets(vla, worlds, other, CONFIG, tmp_path, evaluate=dict)
    vla.add_refiner(8, seed=0)
    with pytest.raises(ValueError, match="refined by RL already"):
        learn_without_resets(vla, worlds, demos, CONFIG, tmp_path, evaluate=dict)
    vla.refiner, vla.config = None, replace(vla.config, memory=MemoryConfig())
    with pytest.raises(ValueError, match="a policy that remembers"):
        learn_without_resets(vla, worlds, demos, CONFIG, tmp_path, evaluate=dict)
    vla.config = replace(vla.config, memory=None, advantage=AdvantageConfig(guidance=2.0))
    with pytest.raises(ValueError, match="this policy is guided"):
        learn_without_resets(vla, worlds, demos, CONFIG, tmp_path, evaluate=dict)
