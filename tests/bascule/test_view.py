"""`vla view`: a picture of every task and a film of its expert; `vla list suites`."""

import av
import numpy as np
from PIL import Image

from bascule import main as cli
from envs.registry import load_suite
from vla.core.types import ActionSpec, PolicySpec
from vla.runtime.video import FilmWriter


def frames(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_every_task_is_drawn_and_filmed(tmp_path, capsys):
    out = tmp_path / "shown"
    arguments = ["view", "tabletop-mixed", "--out", str(out), "--image-size", "56", "--workers", "1"]
    assert cli.main(arguments) == 0
    tasks = load_suite("tabletop-mixed").tasks
    assert sorted(path.name for path in out.iterdir()) == sorted([*(f"{task}.mp4" for task in tasks), "scenes.png"])
    assert "failed" not in capsys.readouterr().err
    sheet = np.asarray(Image.open(out / "scenes.png"))
    assert sheet.shape[1] == 4 * (2 * 56 + 8) + 8 and (sheet != 255).any(axis=(0, 2)).mean() > 0.8
    for task in tasks:
        film = frames(out / f"{task}.mp4")
        assert film[0].shape == (56, 112, 3) and 8 < len(film) <= load_suite("tabletop-mixed").horizon + 1
        assert np.abs(film[-1].astype(int) - film[0]).mean() > 1  # something happened


def test_an_animation_is_a_webp_and_says_so(tmp_path, capsys):
    for name in ("shown.gif", "shown.mp4", "shown"):
        assert cli.main(["view", "tabletop-pick", "--animation", str(tmp_path / name)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{name} must end in .webp" in line and not list(tmp_path.iterdir())


def test_a_perturbed_suite_looks_different(tmp_path):
    for name, more in (("plain", []), ("dark", ["--perturb", "light=1", "texture=1"])):
        arguments = ["view", "tabletop-pick", "--out", str(tmp_path / name), "--scenes", "2", "--no-films", *more]
        assert cli.main([*arguments, "--image-size", "56", "--workers", "1"]) == 0
    plain, dark = (np.asarray(Image.open(tmp_path / name / "scenes.png")).astype(int) for name in ("plain", "dark"))
    assert plain.shape == dark.shape and np.abs(plain - dark).mean() > 3
    assert [path.name for path in (tmp_path / "dark").iterdir()] == ["scenes.png"]


def test_an_animation_shows_several_scenes_until_they_are_over(tmp_path):
    out = tmp_path / "few.webp"
    arguments = ["view", "tabletop-pick", "--animation", str(out), "--scenes", "2", "--image-size", "56"]
    assert cli.main([*arguments, "--workers", "1"]) == 0
    assert list(tmp_path.iterdir()) == [out]
    with Image.open(out) as film:
        frames = []
        for k in range(film.n_frames):
            film.seek(k)
            frames.append(np.asarray(film.convert("RGB")).astype(int))
    assert 6 < len(frames) < load_suite("tabletop-pick").horizon // 2 + 3
    border = frames[-1][10, 8 + 30], frames[-1][10, 8 + 30 + 56 + 16]
    for colour in border:  # both ended with success, which is green
        assert colour[1] > colour[0] + 50 and colour[1] > colour[2] + 40
    assert (frames[0][10, 8 + 30] > 240).all()


def test_a_policy_that_there_is_not_is_refused_before_anything_is_drawn(tmp_path, capsys):
    assert cli.main(["view", "tabletop-pick", "--policy", str(tmp_path / "no"), "--out", str(tmp_path / "o")]) == 2
    assert "checkpoint" in capsys.readouterr().err and not (tmp_path / "o").exists()


class Still:
    """A policy whose components lie in another order, and which looks at depth."""

    def __init__(self):
        self.spec = PolicySpec(ActionSpec(("gripper", "dz", "dy", "dx"), (-1.0,) * 4, (1.0,) * 4, 20.0), 4, depth=True)
        self.seen = []

    def reset(self, env_ids=None): ...

    def act(self, obs, *, prefix=None):
        self.seen.append(obs)
        return np.tile(np.float32([1, 1, 0, 0]), (obs.batch_size, 4, 1))  # up, with an open hand


def test_a_policy_is_filmed_by_the_names_of_its_components_and_sees_what_it_reads(tmp_path, monkeypatch, capsys):
    policy = Still()
    monkeypatch.setattr("bascule.commands.look.resolve_policy", lambda *_: policy)
    monkeypatch.setattr("policies.load.checkpoint", lambda *_: tmp_path)
    common = ["view", "tabletop-pick", "--policy", "p", "--image-size", "40", "--workers", "1", "--scenes", "1"]
    for more in (["--out", str(tmp_path / "shown")], ["--animation", str(tmp_path / "a.webp")]):
        policy.seen.clear()
        assert cli.main([*common, *more]) == 0
        first, last = policy.seen[0], policy.seen[-1]
        assert first.depth is not None and first.intrinsics is not None
        assert last.proprio[0, 2] > first.proprio[0, 2] + 0.05 and abs(last.proprio[0, 0] - first.proprio[0, 0]) < 0.05
    assert "gripper" in capsys.readouterr().err  # told of the order


def test_a_film_is_what_was_added(tmp_path):
    rng = np.random.default_rng(0)
    pictures = [np.kron(rng.integers(0, 255, (4, 5, 3)), np.ones((8, 8, 1))).astype(np.uint8) for _ in range(6)]
    film = FilmWriter(tmp_path / "a" / "film.mp4", 20.0)
    for picture in pictures:
        film.add(picture[:-1])  # an odd number of rows
    assert not (tmp_path / "a").exists()
    found = frames(film.close())
    assert len(found) == 6 and found[0].shape == (30, 40, 3)
    errors = np.array([[np.abs(a.astype(int) - b[:30]).mean() for b in pictures] for a in found])
    assert (errors.argmin(1) == np.arange(6)).all() and np.diag(errors).max() < 25


def test_suites_are_listed_with_horizon_and_backend(capsys):
    assert cli.main(["list", "suites"]) == 0
    text = capsys.readouterr().out
    assert "cpu, warp" in text and "cpu (robosuite)" in text and "cpu (metaworld)" in text
    assert "horizon" in text and "(16)" in text  # long lists of tasks are cut
