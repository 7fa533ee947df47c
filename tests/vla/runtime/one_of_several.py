"""One process of a team, started by test_parallel.py (and able to be started by torchrun): trains the toy policy.

python one_of_several.py OUT {full,frozen,sharded}...
"""

import os
import signal
import sys
import types
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def config(mode):
    """Without dropout, which draws differently when a batch is spread."""
    from tests.vla.training.test_train import CONFIG
    from vla.model.config import BridgeConfig

    model = replace(CONFIG.model, bridge=BridgeConfig(width=32), freeze_backbone=mode == "frozen")
    cfg = replace(CONFIG, model=model, steps=4, batch_size=16, log_every=1, save_every=2, warmup_steps=0, ema_decay=0.5)
    return replace(cfg, accumulate=2 if mode == "full" else 1, shard=mode == "sharded")


def policy(cfg):
    from tests.vla.training.test_train import demos, fresh

    data = demos(episodes=5, length=6)
    vla = fresh(cfg, data)
    vla.backbone.dropout.p = 0.0
    return vla, data


def main(out, *modes):
    from vla.training.train import train

    for mode in modes:
        cfg = config(mode)
        vla, data = policy(cfg)
        if mode != "sharded":
            train(cfg, vla, data, Path(out) / mode)
            continue
        # Interrupted in one process at step 3, resumed by both from what they saved together.
        stop = lambda progress: os.kill(os.getpid(), signal.SIGINT) if progress.done == 3 else None  # noqa: E731
        assert train(cfg, vla, data, Path(out) / mode, on_step=stop).step == 3
        vla, data = policy(cfg)
        assert train(cfg, vla, data, Path(out) / mode, resume=True).step == cfg.steps


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    package = types.ModuleType("tests")  # some installed package may be called so as well
    package.__path__ = [str(ROOT / "tests")]
    sys.modules["tests"] = package
    main(*sys.argv[1:])
