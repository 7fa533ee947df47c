"""A policy at work that is asked what it does, beside what its hand really takes; and how long its decisions take."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from envs.backends.cpu_worlds import TabletopWorlds
from envs.evaluation.evaluate import evaluate
from envs.grounding.episode_questions import Moment
from envs.registry import load_suite
from envs.sim.base_worlds import ChunkOutcome
from envs.sim.render_options import RenderOptions, pictures_for
from vla.core.types import ActionChunk, Observation
from vla.language.talking import ACCOUNT, ask
from vla.processing.text import plain_text

if TYPE_CHECKING:
    from bascule.experiments.talk.config import TalkExperimentConfig
    from vla.model.model import VLA
    from vla.model.policy import VLAPolicy

WHICH = "which object"
_TIMED = 200


class WatchedWorlds(TabletopWorlds):
    """Environments that note which object the hand takes first, by the seed of the episode."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.touched: dict[int, str] = {}

    def run_chunk(self, chunk: ActionChunk) -> ChunkOutcome:
        """See `BaseWorlds.run_chunk`."""
        outcome = super().run_chunk(chunk)
        for i, episode in enumerate(self.episodes):
            if episode is not None and (moment := Moment(self, i, episode)).held >= 0:
                self.touched.setdefault(episode.seed, moment.names[moment.held])
        return outcome


class Asked:
    """A policy that is asked at every decision, after it has acted."""

    def __init__(self, policy: VLAPolicy, worlds: WatchedWorlds) -> None:
        self.policy, self.worlds, self.spec = policy, worlds, policy.spec
        self.named: dict[int, str] = {}
        """By seed, the object that the policy names at its first decision, told what the scene's instruction says."""
        self.named_as_told: dict[int, str] = {}
        """The same, told what it acts on."""
        self.right, self.asked = 0, 0
        """Answers about its own doings that were true."""

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """See `vla.core.types.Policy.reset`."""
        self.policy.reset(env_ids)

    def act(self, obs: Observation) -> ActionChunk:
        """See `vla.core.types.Policy.act`."""
        chunk = self.policy.act(obs)
        if not self.spec.talks:
            return chunk
        episodes = self.worlds.episodes
        live = [i for i in range(obs.batch_size) if obs.live is None or obs.live[i]]
        fresh = [i for i in live if episodes[i].seed not in self.named]
        if fresh:
            told = obs.select(fresh)
            own = replace(told, instruction=[episodes[i].instruction for i in fresh])
            for names, seen in ((self.named, own), (self.named_as_told, told)):
                for i, said in zip(fresh, ask(self.policy, seen, [WHICH] * len(fresh)), strict=True):
                    names[episodes[i].seed] = plain_text(said.text, "signs")
        self._question(obs, [i for i in live if obs.instruction[i] == episodes[i].instruction])
        return chunk

    def _question(self, obs: Observation, worlds: list[int]) -> None:
        """One question of any kind to each of these environments, about the state that its own actions led to."""
        asked = []
        for i in worlds:
            episode = self.worlds.episodes[i]
            rng = np.random.default_rng([episode.seed, int(self.worlds.elapsed[i])])
            moment = Moment(self.worlds, i, episode)
            asked.append(rng.choice(np.array(moment.ask(rng, strays=True), dtype=object)))
        if not worlds:
            return
        said = ask(self.policy, obs.select(worlds), [one.question for one in asked])
        self.asked += len(asked)
        self.right += sum(plain_text(a.text, "signs") == b.answer for a, b in zip(said, asked, strict=True))


def play(vla: VLA, config: TalkExperimentConfig) -> dict[str, list[int]]:
    """Success, and for a policy that talks: whether what it says of its own doings is true, and whether the object that
    it names is the one it takes; with the instructions of acting and of talking exchanged, too (a control)."""
    from vla.model.policy import VLAPolicy

    policy, suite, counts = VLAPolicy(vla), load_suite(config.suite), {}
    seeds = range(suite.eval_seed0, suite.eval_seed0 + config.episodes)
    for swapped in (False, True) if policy.spec.talks else (False,):
        render = RenderOptions(pictures_for(policy))
        worlds = WatchedWorlds(suite, min(config.num_envs, len(seeds)), render=render)
        asked = Asked(policy, worlds)
        played = seeds[: len(seeds) // 2] if swapped else seeds
        report = evaluate(asked, worlds, played, suite=config.suite, swap_instruction=swapped)
        worlds.close()
        touched = worlds.touched
        if not swapped:
            counts["success"] = [report.successes, report.episodes]
        if policy.spec.talks:
            agree = {
                name: [sum(names[seed] == thing for seed, thing in touched.items()), len(touched)]
                for name, names in (("own", asked.named), ("told", asked.named_as_told))
            }
            if swapped:
                counts["object named is object taken, acting told another object"] = agree["own"]
                counts["object named is object taken, both told another object"] = agree["told"]
            else:
                counts["object named is object taken"] = agree["own"]
                counts["answers right, at work"] = [asked.right, asked.asked]
    return counts


def timed(vla: VLA, suite_name: str) -> dict[str, float]:
    """Milliseconds that a decision takes, p50 and p99, in one run: alone, followed by an account of what it does, and
    over a server, with and without another client that asks all the time."""
    from policies.serving.client import PolicyClient
    from policies.serving.server import PolicyServer, serve_in_thread
    from vla.model.policy import VLAPolicy

    policy, suite = VLAPolicy(vla), load_suite(suite_name)
    worlds = TabletopWorlds(suite, 1, render=RenderOptions(pictures_for(policy)))
    obs = worlds.reset(seeds=[suite.eval_seed0])
    took: dict[str, list[float]] = {"alone": [], "talking": [], "answer": []}
    for k in range(2 * _TIMED):
        began = time.perf_counter()
        policy.act(obs)
        acted = time.perf_counter()
        took["talking" if k % 2 else "alone"].append(acted - began)
        if k % 2:
            ask(policy, obs, [ACCOUNT])
            took["answer"].append(time.perf_counter() - acted)
    figures = {f"{name} ms p50": _ms(times, 50) for name, times in took.items()}
    figures |= {f"{name} ms p99": _ms(times, 99) for name, times in took.items()}
    with serve_in_thread(PolicyServer(policy, port=0)) as server, PolicyClient(server.uri) as acts:
        for name in ("served", "served, another client asks"):
            stop = threading.Event()
            asker = threading.Thread(target=_keep_asking, args=(server.uri, obs, stop))
            if name != "served":
                asker.start()
            acts.act(obs)
            acts.latencies_ms.clear()
            for _ in range(_TIMED):
                acts.act(obs)
                time.sleep(0.02)  # as between two decisions: the other client gets its turn
            stop.set()
            figures[f"{name} ms p50"] = round(float(np.percentile(acts.latencies_ms, 50)), 2)
            figures[f"{name} ms p99"] = round(float(np.percentile(acts.latencies_ms, 99)), 2)
            if name != "served":
                asker.join()
    worlds.close()
    return figures


def _keep_asking(uri: str, obs: Observation, stop: threading.Event) -> None:
    from policies.serving.client import PolicyClient

    with PolicyClient(uri) as client:
        while not stop.is_set():
            client.answer(obs, [ACCOUNT])


def _ms(seconds: list[float], quantile: float) -> float:
    return round(1e3 * float(np.percentile(seconds, quantile)), 2)
