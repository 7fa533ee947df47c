"""Commands that put a policy to work."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from vla.commands.base import Command, load_policy


@dataclass(frozen=True)
class Serve(Command):
    """Serve a checkpoint to robot controllers over a websocket (openpi's protocol)."""

    policy: Positional[Path]
    """A checkpoint folder."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes any free port."""
    api_key: str | None = None
    """What clients must send. Needed to listen to other machines. Default: $BASCULE_API_KEY."""

    def run(self) -> None:
        from vla.catalogue import checkpoint

        folder = checkpoint(self.policy)
        from policies.server import PolicyServer

        policy = load_policy(folder)
        server = PolicyServer(
            policy,
            action_spec=policy.action_spec,
            cameras=policy.cameras,
            host=self.host,
            port=self.port,
            # A key given as a flag can be read by every user of the machine; one in the environment cannot.
            api_key=self.api_key or os.environ.get("BASCULE_API_KEY"),
            proprio_dim=policy.processor.config.proprio_dim,
            metadata={"policy": folder.name},
        )
        # On stdout and flushed: programs that start a server wait for this line.
        server.run(on_ready=lambda: print(f"serving {folder} at {server.uri} (Ctrl-C ends)", flush=True))

    def kept(self) -> str:
        return "the server has stopped"


@dataclass(frozen=True)
class LeRobot(Command):
    """Turn a checkpoint into one that LeRobot's tools load (--policy.path), or one of theirs into ours."""

    checkpoint: Positional[Path]
    """A folder of ours, or LeRobot's `pretrained_model` folder of a bascule policy."""
    out: Positional[Path]
    """Where the other one goes: a folder that is not there yet, or empty."""

    def run(self) -> None:
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise ValueError(f"{self.out} is not empty: choose another folder")
        from policies.lerobot.exchange import from_lerobot, is_lerobot, to_lerobot

        if is_lerobot(self.checkpoint):
            print(f"{from_lerobot(self.checkpoint, self.out)}: a checkpoint of ours, for vla eval, serve, rl")
        else:
            print(f"{to_lerobot(self.checkpoint, self.out)}: for LeRobot's tools, --policy.path={self.out}")
