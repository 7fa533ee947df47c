"""Whole runs: they learn, they fail when the advantage lies, they repeat, resume exactly and survive Ctrl-C."""

import dataclasses
import json

import pytest
import torch

from rl.configs.run import RunnerConfig
from rl.models.actor import GreedyPolicy, SampledPolicy
from rl.models.vla_network import make_actor
from rl.recipes import RECIPES, smoke
from rl.rollout.calibration import calibrate_std
from rl.rollout.step_collector import play
from rl.runner import Runner
from tests.rl.toy import CHUNK, SPEC, PointReach, ToyVLA, config, evaluate, learning_config
from vla.core.checkpoint import load_checkpoint, save_checkpoint
from vla.core.config import decode, encode
from vla.runtime.distributed import Team


def start(cloned, out, settings, **callbacks) -> Runner:
    model = ToyVLA()
    model.load_state_dict(cloned)
    return Runner(model, PointReach(settings.num_envs), settings, out, **callbacks)


def state_of(runner: Runner) -> dict[str, torch.Tensor]:
    state = runner.learner.tensors()
    for name in ("policy_optimiser", "critic_optimiser"):
        for i, entry in getattr(runner.learner, name).state_dict()["state"].items():
            state |= {f"{name}.{i}.{key}": value for key, value in entry.items()}
    state |= {"noise": runner.collector.generator.get_state(), "order": runner.learner.generator.get_state()}
    return {name: tensor.clone() for name, tensor in state.items()}


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def test_it_learns(cloned, tmp_path):
    runner = start(cloned, tmp_path, learning_config(), evaluate=evaluate)
    result = runner.run()
    (_, before, n), *_, (_, after, _) = result.evaluations
    assert 0.4 <= before / n <= 0.6 and after / n >= 0.95
    assert result.stopped_by == "target" and result.updates < 40
    # `best` holds what the model holds, and it really plays that well on scenes neither trained nor selected on
    best = ToyVLA(seed=9)
    best.load(tmp_path / "best")
    policy = GreedyPolicy(make_actor(best, SPEC.names), SPEC, CHUNK)
    assert play(policy, PointReach(200), range(6_000_000, 6_000_200)) >= 180
    assert all(torch.equal(a, b) for a, b in zip(best.parameters(), runner.model.parameters(), strict=True))


def test_a_seed_fixes_the_run(cloned, tmp_path):
    runs = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.manual_seed(hash(name) % 1000)  # what happened before in this process must not matter
        runner = start(cloned, tmp_path / name, config(max_updates=3, seed=seed))
        runner.run()
        runs.append((state_of(runner), set(runner.env.seeds_seen)))
    assert differing(runs[0][0], runs[1][0]) == []
    assert differing(runs[0][0], runs[2][0])
    assert runs[0][1] == runs[1][1] and not runs[0][1] & runs[2][1]


def test_resume_is_bit_exact(cloned, tmp_path):
    shape = {"calibrate_scales": (1.0, 0.5), "calibrate_episodes": 16, "ppo": {"average_decay": 0.5}}
    whole = start(cloned, tmp_path / "whole", config(max_updates=8, **shape), evaluate=evaluate)
    expected = whole.run()
    start(cloned, tmp_path / "parts", config(max_updates=4, **shape), evaluate=evaluate).run()
    torch.manual_seed(77)
    second = start(ToyVLA(seed=5).state_dict() | {k: v for k, v in cloned.items() if "backbone" in k},
                   tmp_path / "parts", config(max_updates=8, **shape), evaluate=evaluate)  # fmt: skip
    result = second.run(resume=True)
    assert differing(state_of(whole), state_of(second)) == []
    assert (result.evaluations, result.env_steps, result.std_scale) == (
        expected.evaluations,
        expected.env_steps,
        expected.std_scale,
    )
    rows = [json.loads(line) for line in (tmp_path / "parts/metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == list(range(1, 9))
    for row in rows:  # where the time of a rollout went
        assert min(row["seconds_policy"], row["seconds_worlds"]) > 0
        assert row["seconds_policy"] + row["seconds_worlds"] <= row["seconds_collect"]


def test_a_resumed_run_gets_the_threads_it_began_with(cloned, tmp_path):
    used = []
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        start(cloned, tmp_path / "run", config(max_updates=1)).run()
        torch.set_num_threads(1)
        watched = start(cloned, tmp_path / "run", config(max_updates=2))
        watched.on_update = lambda row: used.append(torch.get_num_threads())
        watched.run(resume=True)
        assert used == [3] and torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_what_is_judged_and_kept_is_the_mean_of_the_parameters(cloned, tmp_path):
    judged, acting = [], []

    def rising(policy):
        judged.append({name: p.detach().clone() for name, p in policy.actor.named_policy_parameters()})
        return len(judged), 100

    def note(row):
        acting.append({name: p.detach().clone() for name, p in runner.actor.named_policy_parameters()})

    settings = config(max_updates=5, eval_every=1, ppo={"critic_warmup": 0, "average_decay": 0.75})
    runner = start(cloned, tmp_path, settings, evaluate=rising, on_update=note)
    runner.run()
    mean = dict(judged[0])
    assert len(judged) == 6 and len(acting) == 5
    for seen, last in zip(judged[1:], acting, strict=True):
        mean = {name: 0.75 * mean[name] + 0.25 * last[name] for name in mean}
        assert all(torch.allclose(seen[name], mean[name], atol=1e-7) for name in mean)
        assert not any(torch.equal(seen[name], last[name]) for name in mean if name != "log_std")
    kept = dict(runner.actor.named_policy_parameters())
    assert all(torch.equal(kept[name], judged[-1][name]) for name in mean)


def test_ctrl_c_leaves_a_checkpoint_that_continues_as_if_nothing_had_happened(cloned, tmp_path):
    whole = start(cloned, tmp_path / "whole", config(max_updates=6))
    whole.run()

    def interrupt(row):
        if row["update"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(cloned, tmp_path / "cut", config(max_updates=6), on_update=interrupt).run()
    with (tmp_path / "cut/metrics.jsonl").open("a") as file:
        file.write('{"update": 4, "torn')
    second = start(cloned, tmp_path / "cut", config(max_updates=6))
    second.run(resume=True)
    assert differing(state_of(whole), state_of(second)) == []
    rows = [json.loads(line)["update"] for line in (tmp_path / "cut/metrics.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 3, 4, 5, 6]


def test_runs_are_not_overwritten_nor_resumed_as_something_else(cloned, tmp_path):
    start(cloned, tmp_path, config(max_updates=1)).run(resume=True)  # nothing there to resume: it begins
    with pytest.raises(ValueError, match="already holds a run"):
        start(cloned, tmp_path, config(max_updates=1)).run()
    with pytest.raises(ValueError, match="seed=0, now it is 1"):
        start(cloned, tmp_path, config(max_updates=2, seed=1)).run(resume=True)
    with pytest.raises(ValueError, match=r"was made with ppo\.epochs=\d+, now it is 9: resume"):
        start(cloned, tmp_path, config(max_updates=2, ppo={"epochs": 9})).run(resume=True)
    other = {name: value + (value.is_floating_point() and 1) for name, value in cloned.items()}
    with pytest.raises(ValueError, match=r"was begun from another policy: resume it with the one .* \(--init\)"):
        start(other, tmp_path, config(max_updates=2)).run(resume=True)
    text = (
        'description = "plates"\nscene = "counter"\ntasks = ["plate"]\nobjects_per_episode = {}\n'
        "plates_per_episode = 1\nhorizon = {}\neval_seed0 = 5_000_000\n"
    )
    (tmp_path / "k.toml").write_text(text.format(2, 40))
    scenes = config(max_updates=1, suite=str(tmp_path / "k.toml"))
    start(cloned, tmp_path / "k", scenes).run()
    (tmp_path / "k.toml").write_text(text.format(2, 50) + "# a remark\n")
    start(cloned, tmp_path / "k", scenes).run(resume=True)
    (tmp_path / "k.toml").write_text(text.format(3, 40))
    with pytest.raises(ValueError, match="begun in other scenes than its suite file describes now"):
        start(cloned, tmp_path / "k", scenes).run(resume=True)
    windy = {"--late-steps": "2", "weather": "wind"}
    start(cloned, tmp_path / "w", config(max_updates=1), conditions=windy).run()
    start(cloned, tmp_path / "w", config(max_updates=1), conditions=windy).run(resume=True)
    with pytest.raises(ValueError, match="begun with weather wind, now it is rain: resume it as it was begun"):
        start(cloned, tmp_path / "w", config(max_updates=1), conditions=windy | {"weather": "rain"}).run(resume=True)
    longer = start(cloned, tmp_path / "w", config(max_updates=1), conditions=windy)
    longer._conditions["episodes of control steps"] = "99"  # as of a suite file that was edited
    with pytest.raises(ValueError, match="begun with episodes of control steps .*, now it is 99"):
        longer.run(resume=True)
    start(cloned, tmp_path, config(max_updates=1), conditions=windy).run(resume=True)  # it does not say its own
    with pytest.raises(ValueError, match="16 worlds"):
        Runner(ToyVLA(), PointReach(16), config(num_envs=8), tmp_path)


def test_it_stops_when_nothing_improves(cloned, tmp_path):
    answers = iter([(5, 10), (6, 10), (5, 10), (4, 10), (9, 10)])
    settings = config(max_updates=50, eval_every=1, patience=2)
    result = start(cloned, tmp_path, settings, evaluate=lambda policy: next(answers)).run()
    assert (result.stopped_by, result.updates, result.best_update) == ("patience", 3, 1)


def test_checkpoint_compat_a_run_of_an_older_version_goes_on(cloned, tmp_path):
    """Version 1 wrote the learner's state under another name, and none of the fields that came later."""
    start(cloned, tmp_path / "whole", config(max_updates=4)).run()
    start(cloned, tmp_path / "old", config(max_updates=2)).run()
    saved = load_checkpoint(tmp_path / "old/last")
    later = {"method", "curriculum", "shaping", "trackers", "patience"}
    old = {name: value for name, value in saved.config.items() if name not in later}
    old["ppo"] = {k: v for k, v in old["ppo"].items() if k != "clip_high"}
    old["actor"] = {k: v for k, v in old["actor"].items() if k in ("motion_std", "gripper_std", "std_min", "std_max")}
    # options of versions in between, which did nothing at these values
    old["ppo"] |= {"kl_target": None, "scale_returns": False, "bc_coef": 0.0, "lr_final": 0.1, "discount_per": "chunk"}
    old["actor"] |= {"state_std": False, "lora": {"rank": 8}, "trains": "bridge"}
    old["critic"] |= {"reads": "privileged"}
    state = {name: value for name, value in saved.trainer_state.items() if name not in ("learner", "processes")}
    state["ppo"] = saved.trainer_state["learner"]
    save_checkpoint(tmp_path / "old/last", config=old, tensors=saved.tensors, stats={}, trainer_state=state)
    again = start(cloned, tmp_path / "old", config(max_updates=4))
    again.run(resume=True)
    whole = start(cloned, tmp_path / "whole", config(max_updates=4))
    whole.run(resume=True)
    assert differing(state_of(whole), state_of(again)) == []
    old["actor"] |= {"state_std": True}
    save_checkpoint(tmp_path / "old/last", config=old, tensors=saved.tensors, stats={}, trainer_state=state)
    with pytest.raises(ValueError, match="state_std=True, an option that this version does not have"):
        start(cloned, tmp_path / "old", config(max_updates=4)).run(resume=True)


def test_calibration_takes_the_largest_noise_that_keeps_success(precise, tmp_path):
    settings = config(num_envs=64, calibrate_scales=(0.1, 1.0, 20.0), calibrate_episodes=128)
    settings = dataclasses.replace(settings, actor=dataclasses.replace(settings.actor, std_min=0.01, std_max=10.0))
    runner = start(precise, tmp_path, settings)
    seeds, env = range(4096, 4096 + 64), PointReach(64)

    def sampled(scale: float) -> int:
        noise = torch.Generator().manual_seed(1)
        return play(SampledPolicy(runner.actor, SPEC, CHUNK, generator=noise, std_scale=scale), env, seeds)

    greedy = play(runner.greedy_policy(), env, seeds)
    assert sampled(1.0) > 0.9 * greedy and sampled(20.0) < 0.5 * greedy
    assert calibrate_std(runner.collector, settings, Team()) == 1.0
    assert float(runner.actor.log_std[0].detach().exp()) == pytest.approx(0.2)
    assert max(runner.env.seeds_seen) < 1_000_000

    hopeless = dataclasses.replace(settings, calibrate_scales=(20.0, 15.0))
    runner = start(precise, tmp_path, hopeless)
    assert calibrate_std(runner.collector, hopeless, Team()) == 15.0
    assert float(runner.actor.log_std[0].detach().exp()) == pytest.approx(3.0)


def test_budgets_stop_the_run(cloned, tmp_path):
    by_steps = start(cloned, tmp_path / "steps", config(max_env_steps=400)).run()
    assert by_steps.stopped_by == "env_steps" and 400 <= by_steps.env_steps < 800
    by_clock = start(cloned, tmp_path / "clock", config(max_seconds=0.0)).run()
    assert by_clock.stopped_by == "seconds" and by_clock.updates == 0


def test_only_part_of_a_chunk_may_be_executed(cloned, tmp_path):
    runner = start(cloned, tmp_path, config(max_updates=2, n_action_steps=2))
    runner.run()
    executed = runner.buffer.flat("executed")
    assert executed[:, :2].any() and not executed[:, 2:].any()


def test_recipes_are_runnable(cloned, tmp_path):
    assert {"tabletop-pick", "tabletop-pick-grpo", "tabletop-pick-filtered", "smoke"} <= set(RECIPES)
    for name, make in RECIPES.items():
        made = make()
        learner = made.method or made.ppo
        assert learner.problem() is None and (made.curriculum is None or made.curriculum.problem() is None), name
        assert decode(RunnerConfig, encode(made)) == made, name
    recipe = RECIPES["tabletop-pick"]()
    assert (recipe.num_envs, recipe.ppo.clip, recipe.ppo.gamma) == (48, 0.2, 0.985)
    rows = []
    result = start(cloned, tmp_path, smoke(), evaluate=evaluate, on_update=rows.append).run()
    assert result.updates == 4 and "policy_steps" in rows[2] and "policy_steps" not in rows[1]
    assert "eval_success_rate" in rows[1] and "eval_success_rate" not in rows[0]
