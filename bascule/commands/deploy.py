"""Commands that deploy a policy: `vla serve`, and the conversion to and from LeRobot's format."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from bascule.commands.base import Command, check_numbers, refuse_idle
from vla.core.config import unknown


@dataclass(frozen=True)
class Serve(Command):
    """Serve checkpoints or exported policies to robot controllers over a websocket (openpi's protocol)."""

    policies: Annotated[Positional[tuple[str, ...]], arg(metavar="FOLDER")]
    """Folders of `vla train`, `vla rl` or `vla export`, each as FOLDER or NAME=FOLDER. Clients select a policy by NAME,
    at the end of the address or as the key "policy" of an observation; the first is the default."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every interface. An address that other machines can reach needs an API key."""
    port: int = 8000
    """0 takes any free port."""
    api_key: str | None = None
    """API key that clients must send. Required when other machines can connect. Default: $BASCULE_API_KEY."""
    layout: str = "native"
    """Names of cameras, state and prompt in clients' observations: native, libero, droid, aloha, or a .toml file."""
    tls_cert: Path | None = None
    """TLS certificate (PEM file); clients then connect to wss://."""
    tls_key: Path | None = None
    """Private key (PEM file), if it is not in the certificate's file."""
    n_action_steps: int | None = None
    """Actions of each chunk that are sent to a client. Default: each policy's own. `vla control` requests whole chunks
    regardless; stock openpi clients cannot."""
    embodiment: tuple[str, ...] = ()
    """The robot to control, for policies trained for several: NAME for all policies, or POLICY=NAME for each."""
    cameras: tuple[str, ...] = ()
    """Cameras that clients call otherwise: POLICY=CLIENT each, the policy's name and the clients', e.g. front=cam_high;
    or wrist=none, which they lack and the policies see black. Clients are told the new names."""
    max_batch: int = 16
    """Maximum number of observations in one forward pass."""
    max_clients: int = 64
    """Maximum number of connected clients; further connections are refused."""
    reload_s: float | None = 2.0
    """Interval in seconds at which the folders are checked for newer checkpoints. SIGHUP checks at once."""

    def run(self) -> None:
        """Load the policies and serve them until Ctrl-C or SIGTERM. ValueError for wrong arguments or folders."""
        check_numbers(
            self, port=(0, 65_535), n_action_steps=(1, 10_000), max_batch=(1, 4096), max_clients=(1, 65_536),
            reload_s=(0.01, 1e9),
        )  # fmt: skip
        from policies.load import checkpoint
        from policies.serving.policy_slot import by_name

        if not self.policies:
            raise ValueError("name at least one checkpoint folder to serve")
        if self.tls_key is not None and self.tls_cert is None:
            raise ValueError("--tls-key goes with --tls-cert")
        folders = {name: checkpoint(path) for name, path in by_name(self.policies).items()}
        import logging
        from functools import partial

        from policies.load import chosen_embodiment, load_policy, of_single_observations
        from policies.serving.layouts import find_layout
        from policies.serving.network import tls_context
        from policies.serving.policy_slot import PolicySlot
        from policies.serving.server import Limits, PolicyServer, check_access
        from vla.core.checkpoint import in_lerobot_format, read_config
        from vla.processing.cameras.camera_map import CameraMap

        # A key given as a flag can be read by every user of the machine; one in the environment cannot.
        api_key = self.api_key or os.environ.get("BASCULE_API_KEY")
        check_access(self.host, api_key)
        for folder in folders.values() if self.n_action_steps is not None else ():
            if in_lerobot_format(folder):  # it is asked when it is loaded
                continue
            chunk = (read_config(folder).get("model") or {}).get("chunk_size", self.n_action_steps)
            if self.n_action_steps > chunk:
                raise ValueError(f"n_action_steps must be in 1..{chunk} (the chunk size), got {self.n_action_steps}")
        logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
        logging.getLogger("websockets").setLevel(logging.WARNING)  # it reports every connection
        layout, cameras = find_layout(self.layout), CameraMap.parse(self.cameras)
        wanted = by_policy(self.embodiment, folders)
        members = {name: chosen_embodiment(folder, wanted[name]) for name, folder in folders.items()}
        tls = None
        if self.tls_cert is not None:
            tls = tls_context(str(self.tls_cert), None if self.tls_key is None else str(self.tls_key))

        def load(folder: Path, embodiment: str | None) -> Any:
            return of_single_observations(load_policy(folder, embodiment, cameras), "what clients send")

        server = PolicyServer(
            {
                name: PolicySlot.of_folder(
                    folder,
                    load=partial(load, embodiment=members[name]),
                    layout=layout,
                    n_action_steps=self.n_action_steps,
                )
                for name, folder in folders.items()
            },
            host=self.host,
            port=self.port,
            api_key=api_key,
            tls=tls,
            limits=Limits(clients=self.max_clients),
            max_batch=self.max_batch,
            reload_s=self.reload_s,
        )
        what = ", ".join(str(folder) for folder in folders.values())
        # On stdout and flushed: programs that start a server wait for this line.
        server.run(on_ready=lambda: print(f"serving {what} at {server.uri} (Ctrl-C ends)", flush=True))

    def kept(self) -> str:
        """The server leaves nothing behind."""
        return "the server has stopped"


@dataclass(frozen=True)
class LeRobot(Command):
    """Convert a checkpoint to LeRobot's format (--policy.path), or a LeRobot policy of type bascule to a checkpoint."""

    checkpoint: Positional[Path]
    """A checkpoint folder, or LeRobot's `pretrained_model` folder of a bascule policy."""
    out: Positional[Path]
    """The folder to write: it must be empty or not exist yet."""
    embodiment: str | None = None
    """The robot to control, for a checkpoint trained for several."""

    def run(self) -> None:
        """Convert in the direction that the source folder implies. ValueError if `out` is not empty."""
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise ValueError(f"{self.out} is not empty: choose another folder")
        from bascule.catalogue import is_lerobot, trained

        if is_lerobot(self.checkpoint):
            refuse_idle(self, "with a policy of LeRobot's, which controls one robot", "embodiment")
            from policies.lerobot.exchange import from_lerobot

            print(f"{from_lerobot(self.checkpoint, self.out)}: a checkpoint of ours, for vla eval, serve, rl")
        else:
            from policies.load import chosen_embodiment

            folder = trained(self.checkpoint)
            from policies.lerobot.exchange import to_lerobot

            out = to_lerobot(folder, self.out, member=chosen_embodiment(folder, self.embodiment))
            print(f"{out}: for LeRobot's tools, --policy.path={self.out}")


def by_policy(given: tuple[str, ...], policies: Iterable[str]) -> dict[str, str | None]:
    """("left", "arm=right") -> the embodiment wanted of each served policy. ValueError for a policy not served,
    or with two of them."""
    wanted: dict[str, str | None] = dict.fromkeys(policies)
    of_all: str | None = None
    for entry in given:
        policy, equals, name = entry.rpartition("=")
        if not equals and of_all is not None:
            raise ValueError(f"--embodiment names {of_all} and {name} for all policies: write POLICY=NAME for each")
        if not equals:
            of_all = name
        elif policy not in wanted:
            raise ValueError(unknown(policy, wanted, "policy in --embodiment"))
        elif wanted[policy] is not None:
            raise ValueError(f"--embodiment names {wanted[policy]} and {name} for '{policy}': give one of them")
        else:
            wanted[policy] = name
    return {policy: of_all if name is None else name for policy, name in wanted.items()}
