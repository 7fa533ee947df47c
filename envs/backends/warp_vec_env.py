"""GPU backend: N environments of a tabletop suite in MuJoCo Warp on one device, with the contract of the CPU backend.

Same scenes, episodes, start states, controller and rules as `envs.backends.cpu_worlds`; only physics and images come
from Warp. All state lives on the device as torch tensors and nothing waits for it inside a chunk. `step_tensors` stays
there, `step_chunk` hands out numpy. It also runs, a hundred times slower than the CPU backend, on Warp's CPU device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from envs.backends.cpu_worlds import PROPRIO_NAMES
from envs.backends.warp_render import WarpCameras
from envs.backends.warp_sim import Buffers, WarpSim
from envs.sim.base_worlds import WordedEnv, check_seeds, check_started
from envs.sim.cameras import FrameHistory
from envs.sim.render_options import RenderOptions
from envs.tabletop import goals as rules
from envs.tabletop.control import action_spec, advance_command, joint_targets
from envs.tabletop.episode_source import EpisodeSource
from envs.tabletop.episodes import Episode
from envs.tabletop.initial_state import Start
from envs.tabletop.language import Phrasings
from envs.tabletop.scene import REST_HEIGHT_M, SCENES
from envs.tabletop.suites import Suite
from vla.core.types import ActionChunk, Observation, StepResult

_OF_EPISODE = ("active", "may_lift", "num_goals", "strict", "stage", "held", "spent")
"""Fields of the rules' state, besides the goals, that a new episode sets."""


@dataclass
class TensorObservation:
    """`vla.core.types.Observation` on the device. Images and depth are views of what the next render overwrites."""

    images: dict[str, torch.Tensor]  # (B, H, W, 3) uint8
    proprio: torch.Tensor  # (B, P)
    privileged: torch.Tensor  # (B, S)
    instruction: list[str]
    depth: dict[str, torch.Tensor] | None = None  # (B, H, W) m


@dataclass
class TensorStep:
    """`vla.core.types.StepResult` on the device; bool and int64 tensors of shape (B,)."""

    reward: torch.Tensor
    terminated: torch.Tensor
    truncated: torch.Tensor
    n_steps: torch.Tensor
    diverged: torch.Tensor
    info: dict[str, torch.Tensor]


class WarpVecEnv(WordedEnv):
    """`vla.core.types.VecEnv` on one device.

    `info["overflow"]` (B,): contacts or constraints were dropped for want of room. An environment that diverges goes
    back to its start, and its episode is truncated.
    """

    proprio_names = PROPRIO_NAMES

    def __init__(
        self,
        suite: Suite,
        num_envs: int,
        *,
        device: str = "cuda",
        phrasings: Phrasings = "train",
        render: RenderOptions = RenderOptions(),  # noqa: B008 - frozen
        source: Callable[..., EpisodeSource] = EpisodeSource,
        buffers: Buffers | None = None,
    ) -> None:
        """`source(suite, phrasings=...)` decides on scene, episodes and initial states; `buffers` is the room for
        contacts and constraints."""
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        if any(suite.task(name).strict for name in suite.tasks if SCENES[suite.scene].fixtures):
            raise ValueError(f"suite {suite.name} has buttons that light up, which only --backend cpu draws")
        self.suite, self.num_envs, self.horizon = suite, num_envs, suite.horizon
        self.task_names, self.plane = suite.tasks, suite.plane
        self.source = source(suite, phrasings=phrasings)
        self.scene, self.control = self.source.scene, self.source.control
        self.model, self.index = self.source.build()
        self.action_spec, self.cameras = action_spec(self.scene.control_hz), self.index.cameras
        self._full = bool(self.scene.fixtures)
        self.proprio_dim = len(PROPRIO_NAMES)
        self.privileged_dim = rules.PRIVILEGED_FULL_DIM if self._full else rules.PRIVILEGED_DIM
        substeps = round(1.0 / (self.scene.control_hz * self.model.opt.timestep))
        self.sim = WarpSim(self.model, num_envs, substeps, device=device, buffers=buffers)
        self.device = self.sim.device
        self._cameras = WarpCameras(self.sim, self.model, self.index.camera_ids, render.image_size, depth=render.depth)
        self._calibration = render.calibration
        self._history = FrameHistory(render.history) if render.history else None
        self._drawing = True

        self._rest = np.array([REST_HEIGHT_M[kind] for kind in self.scene.objects])
        self.state = self._to_device(self._empty(num_envs))
        self._ids = {name: self._long(values) for name, values in self._addresses().items()}
        self._place_up = self._float([[0.0, 0.0, float(h)] for h in self.index.place_height])
        self._travel = self._float(self.index.joint_travel)
        self._hold_rotation = self._float(np.diag([1.0, -1.0, -1.0]))
        self.episodes: list[Episode | None] = [None] * num_envs
        self.over = torch.ones(num_envs, dtype=torch.bool, device=self.device)
        self.elapsed = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        self._command = torch.zeros(num_envs, 3, device=self.device)
        self._gripper = torch.ones(num_envs, device=self.device)
        self.num_diverged = 0
        """Episodes lost to a state that was no longer finite, since the environment was made."""
        self.num_overflows = 0
        """Chunks in which contacts or constraints did not fit."""
        self._warned = (0, 0)

    # ------------------------------------------------------------------ small things
    def _float(self, values: Any) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values, np.float32), device=self.device)

    def _long(self, values: Any) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values, np.int64), device=self.device)

    def _addresses(self) -> dict[str, np.ndarray]:
        index, model = self.index, self.model
        return {
            "object": index.object_body, "place": index.place_body, "slide": index.joint_qpos,
            "handle": index.handle_site, "arm": index.arm_qpos, "colored": index.colored_geom,
            "arm_joint": model.dof_jntid[index.arm_dof],
        }  # fmt: skip

    def _empty(self, num_worlds: int) -> rules.WorldState:
        return rules.empty_state(num_worlds, self._rest, self.index.place_radius, len(self.index.joint_qpos))

    def _to_device(self, state: rules.WorldState) -> rules.WorldState:
        def tensor(values: np.ndarray) -> torch.Tensor:
            kind = np.float32 if values.dtype.kind == "f" else values.dtype
            return torch.as_tensor(values.astype(kind), device=self.device)

        return rules.WorldState(**{name: tensor(values) for name, values in vars(state).items()})

    def set_rendering(self, on: bool) -> None:
        """See `vla.core.types.VecEnv.set_rendering`."""
        self._drawing = on

    # ------------------------------------------------------------------ episodes
    def reset(
        self,
        *,
        seeds: Sequence[int],
        tasks: Sequence[str] | None = None,
        env_ids: Sequence[int] | None = None,
    ) -> Observation:
        """See `vla.core.types.VecEnv.reset`."""
        ids = self.reset_tensors(seeds=seeds, tasks=tasks, env_ids=env_ids)
        if self._history is not None:
            self._history.restart(self._numpy_images(), ids)
        return self.observation()

    def reset_tensors(
        self,
        *,
        seeds: Sequence[int],
        tasks: Sequence[str] | None = None,
        env_ids: Sequence[int] | None = None,
    ) -> list[int]:
        """`reset` without a copy to the host: read `observation_tensors`. Returns the worlds that were reset."""
        ids = list(range(self.num_envs)) if env_ids is None else [int(i) for i in env_ids]
        check_seeds(ids, seeds, tasks)
        if not ids:
            return ids
        episodes = [self.source.sample(int(s), task) for s, task in zip(seeds, tasks or [None] * len(ids), strict=True)]
        self.place(ids, episodes)
        self.render()
        return ids

    def _paint(self, rows: torch.Tensor, episodes: Sequence[Episode], starts: Sequence[Start]) -> None:
        colors = self._float([start.rgba for start in starts])
        self._cameras.fields["geom_rgba"][rows[:, None], self._ids["colored"]] = colors
        if not self.source.varies_model:
            return
        drawn = [
            self.source.model_fields(episode, start, self.model, self.index)
            for episode, start in zip(episodes, starts, strict=True)
        ]
        for name in drawn[0].keys() - {"geom_matid"}:  # the ray caster cannot texture a box: the colour only
            self._cameras.fields[name][rows] = self._float([fields[name] for fields in drawn])

    def place(self, ids: Sequence[int], episodes: Sequence[Episode]) -> None:
        """Put worlds `ids` into the initial states of `episodes`; the others stay exactly as they are. No rendering."""
        model, index = self.model, self.index
        starts = [self.source.initial_state(episode, model, index) for episode in episodes]
        rows, fresh = self._long(ids), self._empty(len(ids))
        for k, (i, episode) in enumerate(zip(ids, episodes, strict=True)):
            self.episodes[i] = episode
            rules.write_goals(fresh, k, episode.goals, episode.slots, strict=episode.strict)
        qpos = np.stack([start.qpos for start in starts])
        held = np.concatenate([self.index.arm_qpos, self.index.finger_qpos])  # the actuators' order
        self.sim.place(
            rows,
            qpos=self._float(qpos),
            ctrl=self._float(qpos[:, held]),
            mocap_pos=self._float([start.mocap_pos for start in starts]),
            mocap_quat=self._float([start.mocap_quat for start in starts]),
            lift_force=self._float([start.lift_force for start in starts]),
        )
        self._paint(rows, episodes, starts)
        for name, values in vars(self._to_device(fresh)).items():
            if name.startswith("goal_") or name in _OF_EPISODE:
                getattr(self.state, name)[rows] = values
        self.over[rows], self.elapsed[rows], self._gripper[rows] = False, 0, 1.0
        self.read()
        self._command[rows] = self.state.grip[rows]

    # ------------------------------------------------------------------ stepping
    def step_chunk(self, chunk: ActionChunk) -> StepResult:
        """See `vla.core.types.VecEnv.step_chunk`."""
        chunk = np.asarray(chunk, np.float32)
        if not np.isfinite(chunk).all():
            raise ValueError("action chunk holds NaN or Inf")
        step = self.step_tensors(torch.as_tensor(chunk, device=self.device))
        if self._history is not None:
            self._history.push(self._numpy_images())
        info = {name: values.cpu().numpy() for name, values in step.info.items()}
        facts = {name: tensor.cpu().numpy() for name, tensor in vars(step).items() if name != "info"}
        return StepResult(self.observation(), **facts, info=info)

    def step_tensors(self, chunk_BCA: torch.Tensor) -> TensorStep:
        """`step_chunk` on the device; then read `observation_tensors`. Actions must be finite."""
        if chunk_BCA.ndim != 3 or chunk_BCA.shape[0] != self.num_envs or chunk_BCA.shape[2] != self.action_spec.dim:
            raise ValueError(
                f"action chunk must be ({self.num_envs}, C, {self.action_spec.dim}), got {tuple(chunk_BCA.shape)}"
            )
        check_started(self.episodes)
        was_over = self.over.clone()
        n_steps = torch.zeros_like(self.elapsed)
        success, wrong, terminated, truncated, diverged = (torch.zeros_like(self.over) for _ in range(5))
        for c in range(chunk_BCA.shape[1]):
            live = ~self.over
            if self.device.type == "cpu" and not live.any():  # elsewhere, asking would wait for the device
                break
            self._control_step(live, chunk_BCA[:, c])
            n_steps += live
            self.elapsed += live
            lost = live & self.sim.diverged
            diverged |= lost
            success |= live & ~lost & rules.advance(self.state)
            wrong |= live & ~lost & rules.wrong_object(self.state)
            terminated |= live & (success | wrong)
            truncated |= live & ~terminated & ((self.elapsed >= self.horizon) | lost)
            self.over |= terminated | truncated
        self.render()
        success &= ~wrong & ~was_over
        overflow = self._overflow()
        self.num_diverged += int(diverged.sum())
        info = {"success": success, "wrong_object": wrong, "overflow": overflow & ~was_over}
        return TensorStep(success.float(), terminated, truncated, n_steps, diverged, info)

    def _control_step(self, live: torch.Tensor, action_BA: torch.Tensor) -> None:
        sim = self.sim
        self.steer(live, action_BA)
        sim.live.copy_(live)
        sim.diverged.zero_()
        sim.step()
        self.read()
        self._command = torch.where(sim.diverged[:, None], self.state.grip, self._command)

    def steer(self, live: torch.Tensor, action_BA: torch.Tensor) -> None:
        """Turn one control step's actions into the actuators' targets: `envs.tabletop.control`, as on the CPU."""
        sim, state, arm = self.sim, self.state, self._ids["arm_joint"]
        axis, anchor = sim.stale_xaxis[:, arm], sim.stale_xanchor[:, arm]
        lever = torch.linalg.cross(axis, state.grip[:, None] - anchor)
        jacobian = torch.cat([lever, axis], -1).swapaxes(1, 2)
        command = advance_command(self._command, state.grip, action_BA, self.control)
        self._command = torch.where(live[:, None], command, self._command)
        sim.ctrl[:, :7] = joint_targets(
            sim.qpos[:, self._ids["arm"]], jacobian, state.grip, sim.site_xmat[:, self.index.grip_site],
            self._command, self._hold_rotation, self.control.damping,
        )  # fmt: skip
        opened = (action_BA[:, 3] > 0).float()
        self._gripper = torch.where(live, 2.0 * opened - 1.0, self._gripper)
        sim.ctrl[:, 7] = self.control.finger_open_m * opened
        sim.ctrl[:, 8] = -sim.ctrl[:, 7]

    def read(self) -> None:
        """Copy the inputs of the task rules from the simulation's present state."""
        sim, state, ids = self.sim, self.state, self._ids
        state.objects = sim.xpos[:, ids["object"]]
        state.grip = sim.site_xpos[:, self.index.grip_site].clone()
        state.finger_opening = sim.qpos[:, int(self.index.finger_qpos[0])] / self.control.finger_open_m
        if len(self.index.place_body):
            state.places = sim.xpos[:, ids["place"]] + self._place_up
        if len(self.index.joint_qpos):
            state.joints = sim.qpos[:, ids["slide"]] / self._travel
            state.handles = sim.site_xpos[:, ids["handle"]]

    def _overflow(self) -> torch.Tensor:
        """(B,) worlds that lost contacts or constraints in this chunk. Warns when it is worse than ever before."""
        lost, contacts, rows = self.sim.overflow()
        if lost.any():
            self.num_overflows += 1
            if contacts > self._warned[0] or rows > self._warned[1]:
                self._warned = (max(contacts, self._warned[0]), max(rows, self._warned[1]))
                room = self.sim.buffers
                more = f"nconmax={max(room.nconmax, 2 * contacts)}, njmax={max(room.njmax, 2 * rows)}"
                warnings.warn(
                    f"MuJoCo Warp dropped contacts: {contacts} per world and {rows} constraint rows were needed, there "
                    f"is room for {room.nconmax} and {room.njmax}; make_vec(..., {more}) gives more",
                    RuntimeWarning,
                    stacklevel=4,
                )
        return lost

    # ------------------------------------------------------------------ observing
    def render(self) -> None:
        """Render all environments as they are now, unless rendering is switched off.

        Noise is drawn on the host, as on the CPU backend: the same numbers, at the price of a round trip.
        """
        if not self._drawing:
            return
        self._cameras.render()
        if self.source.noisy:
            images = self._cameras.rgb.cpu().numpy()
            for i, episode, step in self._begun():
                images[i] = self.source.observed_images(images[i], episode, step)
            self._cameras.rgb.copy_(torch.as_tensor(images))

    def _measured(self) -> torch.Tensor:
        state = self.state
        columns = (state.grip, self._command - state.grip, state.finger_opening[:, None], self._gripper[:, None])
        return torch.cat(columns, 1)

    def proprio(self) -> torch.Tensor:
        """(B, P), see PROPRIO_NAMES."""
        rows = self._measured()
        if not self.source.noisy:
            return rows
        noisy = rows.cpu().numpy()
        for i, episode, step in self._begun():
            noisy[i] = self.source.observed_proprio(noisy[i], episode, step)
        return self._float(noisy)

    def _begun(self) -> list[tuple[int, Episode, int]]:
        """(environment, episode, control step) of every environment that has an episode."""
        steps = self.elapsed.tolist()
        return [(i, episode, steps[i]) for i, episode in enumerate(self.episodes) if episode is not None]

    def privileged(self) -> torch.Tensor:
        """(B, S), see `envs.tabletop.goals.privileged`."""
        return rules.privileged(self.state, self._gripper, self._command, torch, full=self._full)

    def _by_camera(self, values: torch.Tensor | None) -> dict[str, torch.Tensor] | None:
        return None if values is None else {name: values[:, v] for v, name in enumerate(self.cameras)}

    def observation_tensors(self) -> TensorObservation:
        """The present observation of all environments, without a copy to the host; images are views."""
        images = self._by_camera(self._cameras.rgb)
        assert images is not None
        depth = self._by_camera(self._cameras.depth)
        return TensorObservation(images, self.proprio(), self.privileged(), self.words("instruction"), depth)

    def observation(self) -> Observation:
        """See `vla.core.types.VecEnv.observation`. Everything is a copy on the host."""
        cameras, calibrated = self._cameras, self._calibration
        return Observation(
            self._numpy_images(),
            self.proprio().cpu().numpy(),
            self.words("instruction"),
            self.privileged().cpu().numpy(),
            depth=_numpy(self._by_camera(cameras.depth)),
            intrinsics=_numpy(self._by_camera(cameras.intrinsics())) if calibrated else None,
            extrinsics=_numpy(self._by_camera(cameras.extrinsics())) if calibrated else None,
            history=None if self._history is None else self._history.before(),
            exact_proprio=self._measured().cpu().numpy() if self.source.noisy else None,
        )

    def _numpy_images(self) -> dict[str, np.ndarray]:
        images = _numpy(self._by_camera(self._cameras.rgb))
        assert images is not None
        return images

    def close(self) -> None:
        """Nothing to stop: the device's memory goes with the object."""


def _numpy(tensors: Mapping[str, torch.Tensor] | None) -> dict[str, np.ndarray] | None:
    """Copies on the host."""
    return None if tensors is None else {name: t.to("cpu", copy=True).numpy() for name, t in tensors.items()}
