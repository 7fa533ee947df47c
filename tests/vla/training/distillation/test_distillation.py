"""Learning from a teacher: its decoder makes its own actions of its latents, alignment is the equation's, and a run is
resumed bit for bit, in either phase."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from bascule.teachers import check_same_suite, refuse_other_suite
from envs.registry import scenes_digest
from tests.vla.toy_backbone import SPEC, load_toy, toy_backbone, toy_observation, toy_stats, toy_vla
from tests.vla.training.test_train import CONFIG, Killed, assert_bit_equal, demos, interrupt_at, kill, weights
from vla.core.config import save_json
from vla.core.paths import SIM_CONFIGS
from vla.model.advantage import add_advantage
from vla.model.config import (
    AdvantageConfig,
    BridgeConfig,
    DistilledConfig,
    MemoryConfig,
    ModulatorConfig,
    VLAConfig,
    XYZConfig,
)
from vla.model.heads.distilled import DistilledHead
from vla.model.model import VLA
from vla.training.distillation.own_policy import PolicyTeacher
from vla.training.distillation.student import LATENTS, student_config, take_decoder, teacher_latents
from vla.training.train import METRICS, build_vla, train
from vla.training.train_config import DistillationConfig, LanguageConfig

ALIGN = 6


def teacher_vla(head="l1", refined=False, chunk_size=4):
    """An untrained policy whose outputs are not near zero, with other statistics than the demonstrations'."""
    vla = toy_vla(seed=5, head=head, chunk_size=chunk_size, bridge=BridgeConfig(width=48))
    if refined:
        vla.add_refiner(24, seed=1)
        torch.nn.init.normal_(vla.refiner.net[-1].weight, std=0.3)
        torch.nn.init.normal_(vla.refiner.net[-1].bias, std=0.3)
    if hasattr(vla.head, "out"):
        with torch.no_grad():
            vla.head.out.weight.mul_(5.0)
    return vla.eval()


class Counted(PolicyTeacher):
    """Counts how often it is asked."""

    asked = 0

    def latents(self, *args):
        Counted.asked += 1
        return super().latents(*args)


def student(teacher, cfg=CONFIG, align_steps=ALIGN, data=None):
    data = data or demos()
    cfg = student_config(cfg, teacher, data, DistillationConfig("somewhere", align_steps))
    vla = build_vla(cfg, data, action_spec=SPEC, backbone=toy_backbone(point_dim=6))
    take_decoder(vla, teacher)
    return cfg, vla


@pytest.mark.parametrize(
    ("head", "refined"),
    [("l1", False), ("linear", False), ("flow", False), ("bins", False), ("frequencies", False), ("l1", True),
     ("linear", True)],
)  # fmt: skip
def test_the_decoder_makes_the_teachers_actions_of_its_latents(head, refined):
    data, vla = demos(), teacher_vla(head, refined)
    teacher = PolicyTeacher(vla)
    _, learner = student(teacher)
    latents = teacher_latents(teacher, data, batch_size=5)
    with torch.no_grad():
        told = learner.processor.unnormalise_action(learner.head.decode(latents))
        inp = vla.processor.prepare(data.observation(slice(None)))
        own = vla.processor.unnormalise_action(vla.act(vla.encode(inp), inp.proprio_BP))
    assert own.std() > 1e-3
    torch.testing.assert_close(told, own, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reads", ["step", "chunk"])
def test_alignment_is_the_mean_square_distance_within_the_episode(reads):
    head = DistilledHead(DistilledConfig(5, reads), width=8, action_dim=3, chunk_size=4)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 8, generator=generator)
    teacher = torch.randn((3, 4, 5) if reads == "step" else (3, 5), generator=generator) * 7 + 2
    head.latent_mean.copy_(torch.arange(5.0))
    head.latent_std.copy_(torch.tensor([1.0, 2.0, 4.0, 0.5, 3.0]))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).float()
    mapped, total, count = head.mapped(x), 0.0, 0
    for b in range(3):
        for c in range(4):
            if mask[b, c]:
                for d in range(5):
                    one = mapped[b, c, d] if reads == "step" else mapped[b, d]
                    goal = teacher[b, c, d] if reads == "step" else teacher[b, d]
                    total += (one - (goal - head.latent_mean[d]) / head.latent_std[d]) ** 2
                    count += 1
    torch.testing.assert_close(head.alignment(mapped, head.standardise(teacher), mask), total / count)


def test_the_loss_of_tuning_is_that_of_the_head_in_the_teachers_units():
    teacher = PolicyTeacher(teacher_vla("bins"))
    _, learner = student(teacher)
    x, mask = torch.randn(2, 4, 32), torch.ones(2, 4)
    target = learner.head(x).detach()
    near = learner.head.loss(x, target, mask)
    assert near < learner.head.loss(x, target + 0.5, mask), "the target was not brought into the teacher's units"


def test_first_the_latents_are_learnt_and_the_decoder_waits(tmp_path):
    teacher = PolicyTeacher(teacher_vla())
    cfg, vla = student(teacher, replace(CONFIG, weight_decay=0.5, steps=80, log_every=5, lr=3e-3), align_steps=70)
    before = weights(vla)
    aligned = {}

    def keep(progress):
        if progress.stage == "train" and progress.done == 70:
            aligned.update(weights(vla))

    train(cfg, vla, demos(), tmp_path, on_step=keep, teacher=lambda: teacher)
    after = weights(vla)
    decoder = [name for name in before if name.startswith("head.decoder.")]
    assert decoder and all(torch.equal(before[name], aligned[name]) for name in decoder), "not even by weight decay"
    assert any(not torch.equal(aligned[name], after[name]) for name in decoder), "tuned like the rest"
    assert not torch.equal(before["head.mapper.0.weight"], aligned["head.mapper.0.weight"])
    assert not torch.equal(before["bridge.position"], aligned["bridge.position"])
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("backbone."))
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines if "align_loss" in line] == list(range(5, 71, 5))
    first, last = (lines[i]["align_loss"] for i in (0, 13))
    assert 0.5 < first < 2 and last < 0.6 * first, "standardised latents start near a distance of 1"
    assert all("loss" in line for line in lines)


@pytest.mark.parametrize("killed_at", [3, 5, 10])
def test_a_run_is_resumed_bit_for_bit_and_asks_its_teacher_once(tmp_path, killed_at):
    teacher, data = Counted(teacher_vla()), demos()
    cfg, straight = student(teacher, replace(CONFIG, query_noise=0.5, ema_decay=0.5))
    train(cfg, straight, data, tmp_path / "a", teacher=lambda: teacher)
    assert not (tmp_path / "a" / LATENTS).exists(), "nobody needs them any more"

    _, broken = student(teacher)
    with pytest.raises(Killed):
        train(cfg, broken, data, tmp_path / "b", on_step=interrupt_at(killed_at, kill), teacher=lambda: teacher)
    resumed = build_vla(cfg, data, action_spec=SPEC, backbone=toy_backbone(point_dim=6))
    begun = killed_at >= CONFIG.save_every
    if not begun:  # from before the first checkpoint, it begins anew
        take_decoder(resumed, teacher)
    Counted.asked = 0
    train(cfg, resumed, data, tmp_path / "b", resume=True, teacher=lambda: teacher)
    assert (Counted.asked == 0) == begun
    assert_bit_equal(weights(resumed), weights(straight))
    assert_bit_equal(weights(VLA.load(tmp_path / "b", load_backbone=load_toy)), weights(straight))


def test_parts_of_a_batch_align_as_the_whole(tmp_path):
    teacher, after = PolicyTeacher(teacher_vla()), []
    smooth = replace(CONFIG, model=replace(CONFIG.model, bridge=BridgeConfig(width=32)), steps=2)  # without dropout
    for parts in (1, 2):
        cfg, vla = student(teacher, replace(smooth, accumulate=parts), align_steps=1)
        train(cfg, vla, demos(), tmp_path / str(parts), teacher=lambda: teacher)
        after.append(weights(vla)["head.mapper.0.weight"])
    torch.testing.assert_close(*after, rtol=1e-4, atol=1e-6)


def test_a_backbone_that_learns_moves_towards_the_teacher_too(tmp_path):
    teacher = PolicyTeacher(teacher_vla())
    live = replace(CONFIG, model=replace(CONFIG.model, freeze_backbone=False), steps=3)
    cfg, vla = student(teacher, live, align_steps=2)
    queries = vla.backbone.queries.detach().clone()

    def moved(progress):
        if progress.stage == "train" and progress.done == 2:
            assert not torch.equal(vla.backbone.queries, queries)

    train(cfg, vla, demos(), tmp_path, on_step=moved, teacher=lambda: teacher)


def test_the_checkpoint_needs_no_teacher(tmp_path):
    teacher = PolicyTeacher(teacher_vla(refined=True))
    cfg, vla = student(teacher, replace(CONFIG, steps=2), align_steps=1)
    train(cfg, vla, demos(), tmp_path, teacher=lambda: teacher)
    loaded = VLA.load(tmp_path, load_backbone=load_toy)
    inp = loaded.processor.prepare(toy_observation())
    np.testing.assert_array_equal(loaded.predict(inp), vla.predict(inp))
    assert loaded.config.distilled == DistilledConfig(48 + 24, "step")


def test_what_cannot_teach_is_refused_in_one_line(tmp_path):
    data, good = demos(), PolicyTeacher(teacher_vla())
    with pytest.raises(ValueError, match="give --chunk-size 8"):
        student(PolicyTeacher(teacher_vla(chunk_size=8)))
    with pytest.raises(ValueError, match="dx, dy, dz, gripper, the demonstrations' a, b, c, d"):
        student(good, data=replace(data, action_names=tuple("abcd")))
    with pytest.raises(ValueError, match="beside head 'flow'"):
        PolicyTeacher(teacher_vla("flow", refined=True))
    cfg, taught = student(good)
    pooled = teacher_vla()
    pooled.add_modulators(ModulatorConfig(count=2), seed=0)
    with pytest.raises(ValueError, match="with modulators cannot be the teacher"):
        PolicyTeacher(pooled)
    with pytest.raises(ValueError, match="that remembers cannot be the teacher"):
        PolicyTeacher(toy_vla(memory=MemoryConfig()))
    guided = toy_vla()
    add_advantage(guided, AdvantageConfig(guidance=3.0), seed=0)
    with pytest.raises(ValueError, match="guided 3 times as far"):
        PolicyTeacher(guided)
    with pytest.raises(ValueError, match="was itself taught"):
        PolicyTeacher(taught)
    with pytest.raises(ValueError, match="align_steps must be at least 0 and less than the run's 12 steps, got 12"):
        train(student(good, align_steps=12)[0], taught, data, tmp_path, teacher=lambda: good)
    with pytest.raises(ValueError, match="needs its --teacher"):
        train(cfg, taught, data, tmp_path)
    model = replace(cfg.model, freeze_backbone=False)
    assert "leave out --language" in replace(cfg, model=model, language=LanguageConfig()).problem()
    broken = PolicyTeacher(teacher_vla())
    broken.vla.bridge.position.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="latents are not finite"):
        teacher_latents(broken, data)


def test_an_impossible_shape_is_named():
    with pytest.raises(ValueError, match="at least 1 wide"):
        VLA.build(
            VLAConfig(backbone="toy", distilled=DistilledConfig(0, "step")), stats=toy_stats(), action_spec=SPEC,
            cameras=("front", "wrist"), image_size=16, backbone=toy_backbone(),
        )  # fmt: skip


def test_a_privileged_teacher_teaches_its_own_suite_only(tmp_path):
    run, recorded = tmp_path / "run", tmp_path / "demos"
    check_same_suite(run, recorded)  # neither says anything
    save_json(run / "last" / "config.json", {"suite": "tabletop-pick"})
    save_json(recorded / "meta" / "bascule.json", {"suite": "tabletop-pick"})
    check_same_suite(run, recorded)
    save_json(recorded / "meta" / "bascule.json", {"suite": "tabletop-place"})
    with pytest.raises(ValueError, match="learnt tabletop-pick, the demonstrations are of tabletop-place"):
        check_same_suite(run, recorded)


@pytest.mark.parametrize(
    ("shown", "tasks", "suite", "fits"),
    [
        ("tabletop-pick", None, "tabletop-pick", True),
        ("tabletop-place", None, "tabletop-pick", False),  # whose state has as many numbers
        ("tabletop-place", None, "tabletop-mixed", True),
        ("tabletop-mixed", None, "tabletop-pick", False),
        ("tabletop-mixed", "pick", "tabletop-pick", True),
        ("gone/own.toml", None, "tabletop-pick", True),  # nothing tells
    ],
)
def test_a_run_takes_demonstrations_of_its_own_tasks_only(tmp_path, shown, tasks, suite, fits):
    save_json(tmp_path / "meta" / "bascule.json", {"suite": shown, "tasks": tasks})
    if fits:
        return refuse_other_suite(tmp_path, suite)
    with pytest.raises(ValueError, match=f"holds demonstrations of {shown}, the run is in {suite}"):
        refuse_other_suite(tmp_path, suite)


def test_demonstrations_of_scenes_that_a_suite_file_described_before_are_told(tmp_path, capsys):
    suite, data = tmp_path / "tabletop-pick.toml", tmp_path / "demos"
    text = (SIM_CONFIGS / "suites" / "tabletop-pick.toml").read_text()
    suite.write_text(text)
    save_json(data / "meta" / "bascule.json", {"suite": str(suite), "scenes": scenes_digest(str(suite))})
    refuse_other_suite(data, str(suite))
    assert not capsys.readouterr().err
    suite.write_text(text.replace("objects_per_episode = 3", "objects_per_episode = 2"))
    refuse_other_suite(data, str(suite))
    assert "recorded in other scenes than" in capsys.readouterr().err
    refuse_other_suite(data, "tabletop-pick")
    assert "recorded in other scenes than tabletop-pick" in capsys.readouterr().err


def test_a_teacher_that_reads_depth_asks_for_a_student_that_does():
    seeing = PolicyTeacher(teacher_vla())
    seeing.vla.config = replace(seeing.vla.config, xyz=XYZConfig())
    with pytest.raises(ValueError, match="the teacher reads depth, and the student does not: .*--xyz"):
        seeing.latents(demos(), slice(0, 2))
