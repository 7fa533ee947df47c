"""Two processes with half of the worlds each are one process with all of them, and decide everything alike."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rl.algorithms.advantages import normalise
from rl.models.running_norm import moments
from rl.storage.rollout_buffer import RolloutBuffer
from tests.rl.one_of_several import DECISIONS, WORLDS, after, learner_on, whole_run
from tests.rl.toy import ToyVLA
from tests.vla.runtime.test_parallel import free_port
from vla.core.checkpoint import load_tensors, save_tensors
from vla.runtime.distributed import Team

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def together(tmp_path_factory, cloned):
    out, port = tmp_path_factory.mktemp("team"), free_port()
    save_tensors(out / "cloned.safetensors", cloned, {})

    def start(rank):
        env = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        command = [sys.executable, str(HERE / "one_of_several.py"), str(out)]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    processes = [start(rank) for rank in range(2)]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return out


def read(together, name):
    return [load_tensors(together / f"{name}-{rank}.safetensors") for rank in range(2)]


def test_ddp_equiv_gradients_are_those_of_one_process_with_twice_the_worlds(together, cloned):
    first, second = read(together, "start")
    assert all(torch.equal(first[name], second[name]) for name in first), "broadcast at the start"
    model = ToyVLA()
    model.load_state_dict(cloned)
    learner, _ = learner_on(2 * WORLDS, Team(), model)
    learner.load_tensors(first)
    buffer = RolloutBuffer(DECISIONS, 2 * WORLDS)
    rows = read(together, "rows")
    starts = [{tuple(state.tolist()) for state in part["state"][:WORLDS]} for part in rows]
    assert len(starts[0] | starts[1]) == 2 * WORLDS, "other scenes in every process"

    def joined(name):
        parts = [part[name].view(DECISIONS, WORLDS, *part[name].shape[1:]) for part in rows]
        return torch.cat(parts, 1).flatten(0, 1)

    names = [name for name in rows[0] if not name.startswith("features.")]
    buffer._rows = {name: joined(name) for name in names}
    raw = joined("features.raw_BLND")
    features = learner.actor.model.encode(learner.actor.model.processor.prepare(_any_observation()))
    buffer._inputs = features.empty_like(len(raw), dtype=torch.float16)
    buffer._inputs.raw_BLND.copy_(raw)
    buffer._inputs.queries_BLQD.copy_(joined("features.queries_BLQD"))
    buffer.filled = DECISIONS
    learner.update(buffer)
    alone, (ours, theirs) = after(learner), read(together, "after")
    for name, expected in alone.items():
        assert torch.equal(ours[name], theirs[name]), f"{name} differs between the processes"
        torch.testing.assert_close(ours[name], expected, rtol=2e-3, atol=2e-6, msg=name)
    assert max(float(t.abs().max()) for name, t in alone.items() if name.startswith("grad.")) > 1e-3


def _any_observation():
    from tests.rl.toy import PointReach

    return PointReach(1).reset(seeds=[0])


@pytest.mark.parametrize("method", ["ppo", "grpo", "filtered", "guided"])
def test_processes_stay_equal_through_runs_and_resumes(together, method):
    first, second = read(together, method)
    assert all(torch.equal(first[name], second[name]) for name in first)
    rows = [json.loads(line) for line in (together / method / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == [1, 2, 3, 4]
    assert (together / method / "best" / "model.safetensors").is_file()
    if method == "ppo":  # every world takes part in every decision: all steps are counted, of both processes
        assert rows[-1]["env_steps"] > 4 * 4 * WORLDS * 1.2


def test_resume_exact_of_what_another_process_began(together, tmp_path, cloned):
    save_tensors(tmp_path / "cloned.safetensors", cloned, {})
    shutil.copytree(together / "elsewhere", tmp_path / "elsewhere")
    whole, _ = whole_run(tmp_path, "ppo", Team(), max_updates=4)
    parts, _ = whole_run(tmp_path, "ppo", Team(), max_updates=4, resume=True, folder="elsewhere")
    for name, tensor in whole.learner.tensors().items():
        assert torch.equal(tensor, parts.learner.tensors()[name]), name
    ours, theirs = (runner.collector.state() for runner in (whole, parts))
    assert torch.equal(ours.pop("generator"), theirs.pop("generator")) and ours == theirs


def test_advantage_norm_is_global(monkeypatch):
    """Halves that know each other's sums are normalised as the whole is."""
    whole = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)) * 3 + 2
    halves = whole[:, :4], whole[:, 4:]

    class Half(Team):
        size = 2

        def __init__(self, other):
            self.other, self.calls = other, 0

        def total(self, *values):
            self.calls += 1
            x = self.other.double().reshape(-1, 1)
            theirs = (len(x), float(x.sum())) if self.calls == 1 else (float((x - whole.mean()).square().sum()),)
            return [a + b for a, b in zip(values, theirs, strict=True)]

    ours = [normalise(halves[i], Half(halves[1 - i])) for i in range(2)]
    assert torch.allclose(torch.cat(ours, 1), normalise(whole), atol=1e-5)
    count, mean, variance = moments(halves[0].reshape(-1, 1), Half(halves[1]))
    assert (count, float(mean), float(variance)) == pytest.approx(
        (60, float(whole.mean()), float(whole.var(unbiased=False))), rel=1e-5
    )
