"""Two processes with half the batch each are one process with the whole, in gradients, losses and checkpoints."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.vla.runtime.one_of_several import config, policy
from tests.vla.toy_backbone import load_toy
from tests.vla.training.test_train import metrics, weights
from vla.model.model import VLA
from vla.runtime.distributed import assemble, launched
from vla.training.train import train

HERE = Path(__file__).parent


def start(rank, size, port, out, *modes):
    env = os.environ | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    command = [sys.executable, str(HERE / "one_of_several.py"), str(out), *modes]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    out, port = tmp_path_factory.mktemp("team"), free_port()
    team = [start(rank, 2, port, out, "full", "frozen", "sharded") for rank in range(2)]
    try:
        said = [process.communicate(timeout=600)[0] for process in team]  # about 12 s on an idle machine
    finally:
        for process in team:
            process.kill()
    assert [process.returncode for process in team] == [0, 0], "\n".join(said)
    return out


@pytest.mark.parametrize("mode", ["full", "frozen", "sharded"])
def test_two_processes_are_one_with_the_whole_batch(together, tmp_path, mode):
    cfg = config("full" if mode == "sharded" else mode)
    vla, data = policy(cfg)
    train(cfg, vla, data, tmp_path)
    for ours, theirs in zip(metrics(tmp_path), metrics(together / mode), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    saved = VLA.load(together / mode, load_backbone=load_toy)
    for name, value in weights(vla).items():
        torch.testing.assert_close(weights(saved)[name], value, rtol=1e-3, atol=2e-5, msg=name)


def test_alone_nothing_is_wrapped():
    assert launched() == (0, 1)
    team, module = assemble(shard=True), torch.nn.Linear(1, 1)
    assert team.wrap(module) is module and team.total(2.0) == [2.0] and not team.any(False)
    assert torch.equal(team.share(torch.arange(5)), torch.arange(5))
