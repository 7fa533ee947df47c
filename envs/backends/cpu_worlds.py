"""N tabletop environments in this process: physics, control, task rules, images.

`envs.backends.cpu_vec_env` spreads them over processes. The environments share one MjModel; each has its own
MjData. A chunk's control steps run without rendering; the frame that the policy will see is rendered once, at the end.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import mujoco
import numpy as np
from numpy.typing import NDArray

from envs.sim.base_worlds import BaseWorlds, ChunkOutcome, Frames
from envs.sim.cameras import CameraRenderer, extrinsics, intrinsics
from envs.sim.divergence import diverged
from envs.sim.render_options import RenderOptions
from envs.tabletop import goals as rules
from envs.tabletop.control import action_spec, advance_command, joint_targets
from envs.tabletop.episode_source import EpisodeSource
from envs.tabletop.episodes import Episode, continued
from envs.tabletop.language import Phrasings
from envs.tabletop.scene import COLORS, REST_HEIGHT_M, joint_names
from envs.tabletop.shapes import FLASH_COLOR
from envs.tabletop.suites import Suite
from vla.core.types import ActionChunk

_LIT = (1.0, 0.95, 0.75, 1.0)
PROPRIO_NAMES = (
    "grip_x", "grip_y", "grip_z", "lead_x", "lead_y", "lead_z", "finger_opening", "gripper_command",
)  # fmt: skip
"""Metres for the first six (grip position; commanded minus actual position), 0..1, -1 or +1."""


class TabletopWorlds(BaseWorlds):
    """`num_worlds` independent environments of one suite. Not thread-safe; one per process."""

    proprio_names = PROPRIO_NAMES

    def __init__(
        self,
        suite: Suite,
        num_worlds: int,
        *,
        phrasings: Phrasings = "train",
        render: RenderOptions = RenderOptions(),  # noqa: B008 - frozen
        source: Callable[..., EpisodeSource] = EpisodeSource,
        frames_out: Frames | None = None,
    ) -> None:
        """`source(suite, phrasings=...)` decides on scene, episodes and initial states."""
        self.source = source(suite, phrasings=phrasings)
        self.scene, self.control = self.source.scene, self.source.control
        self.model, self.index = self.source.build()
        self._full = bool(self.scene.fixtures)
        super().__init__(
            suite, num_worlds, action_spec=action_spec(self.scene.control_hz), cameras=self.index.cameras,
            proprio_dim=len(PROPRIO_NAMES), phrasings=phrasings, render=render, frames_out=frames_out,
            privileged_dim=rules.PRIVILEGED_FULL_DIM if self._full else rules.PRIVILEGED_DIM,
        )  # fmt: skip
        self.substeps = round(1.0 / (self.scene.control_hz * self.model.opt.timestep))
        self.data = [mujoco.MjData(self.model) for _ in range(num_worlds)]
        self._renderer: CameraRenderer | None = None

        n, index = num_worlds, self.index
        self._success = np.zeros(n, bool)
        self._wrong = np.zeros(n, bool)
        self._command = np.zeros((n, 3))
        self._hold_rotation = np.diag([1.0, -1.0, -1.0])
        self._geoms = index.colored_geom
        self._rgba = np.ones((n, len(self._geoms), 4), np.float32)
        self._compiled = copy.copy(self.model) if self.source.varies_model else self.model
        """The model before any environment wrote its own colours, lights and cameras into the shared one."""
        self._fields: list[dict[str, NDArray]] = [{} for _ in range(num_worlds)]
        self._lamp_bodies = [
            [self.model.body(name).id, self.model.body(f"{name}_part").id] for name, _ in joint_names(self.scene)
        ]
        self._jacobian = np.zeros((n, 6, 7))
        self._jac_buffer = np.zeros((6, self.model.nv))
        self._gripper = np.ones(n)
        rest = np.array([REST_HEIGHT_M[kind] for kind in self.scene.objects])
        self.state = rules.empty_state(n, rest, index.place_radius, len(index.joint_qpos))

    # ------------------------------------------------------------------ episodes
    def start_episodes(self, seeds: Sequence[int], tasks: Sequence[str] | None, env_ids: Sequence[int] | None) -> None:
        """See `BaseWorlds.start_episodes`."""
        ids = self._ids(seeds, env_ids)
        for k, i in enumerate(ids):
            self.place(i, self.source.sample(int(seeds[k]), tasks[k] if tasks else None))
        self._render(ids)

    def place(self, i: int, episode: Episode) -> None:
        """Put environment `i` into the initial state of `episode` (no rendering)."""
        model, data, index = self.model, self.data[i], self.index
        start = self.source.initial_state(episode, self._compiled, index)
        mujoco.mj_resetData(model, data)
        data.qpos[:], data.mocap_pos[:], data.mocap_quat[:] = start.qpos, start.mocap_pos, start.mocap_quat
        data.xfrc_applied[:, 2] = start.lift_force
        data.ctrl[:7] = data.qpos[index.arm_qpos]
        data.ctrl[7:9] = data.qpos[index.finger_qpos]
        mujoco.mj_forward(model, data)

        self.episodes[i] = episode
        self.over[i] = self._success[i] = self._wrong[i] = False
        self.elapsed[i] = 0
        self._gripper[i] = 1.0
        self._fields[i] = self.source.model_fields(episode, start, self._compiled, index)
        rgba = self._fields[i].get("geom_rgba")
        self._rgba[i] = start.rgba if rgba is None else rgba[self._geoms]
        rules.write_goals(self.state, i, episode.goals, episode.slots, strict=episode.strict)
        self._read(i)
        self._command[i] = self.state.grip[i]

    def continue_episodes(self, seeds: Sequence[int], tasks: Sequence[str], env_ids: Sequence[int] | None) -> None:
        """Begin episodes of `tasks` where environments `env_ids` (all when None) are now: other goals and words, the
        same scene in the same state. Lifting another object than the named one does not end them.

        RuntimeError where nothing was played yet, ValueError for a task that cannot go on in the scene.
        """
        for seed, task, i in zip(seeds, tasks, self._ids(seeds, env_ids), strict=True):
            if self.episodes[i] is None:
                raise RuntimeError("no episode has begun: call reset() before continue_episodes()")
            episode = continued(
                self.episodes[i], self.source.suite, self.scene, task, seed=int(seed), phrasings=self.phrasings
            )
            self.episodes[i] = episode
            self.over[i] = self._success[i] = self._wrong[i] = False
            self.elapsed[i] = 0
            rules.write_goals(self.state, i, episode.goals, episode.slots, strict=episode.strict)
            self.state.may_lift[i] |= self.state.active[i]

    # ------------------------------------------------------------------ stepping
    def run_chunk(self, chunk: ActionChunk) -> ChunkOutcome:
        """See `BaseWorlds.run_chunk`."""
        chunk = self._checked(chunk)
        was_over = self.over.copy()
        n_steps = np.zeros(self.num_envs, np.int64)
        terminated, truncated, lost = (np.zeros(self.num_envs, bool) for _ in range(3))
        for c in range(chunk.shape[1]):
            live = np.flatnonzero(~self.over)
            if not len(live):
                break
            lost[live] = self._control_step(live, chunk[live, c])
            n_steps[live] += 1
            self.elapsed[live] += 1
            self._success[live] |= rules.advance(self.state)[live] & ~lost[live]
            self._wrong[live] |= rules.wrong_object(self.state)[live] & ~lost[live]
            terminated[live] = self._success[live] | self._wrong[live]
            truncated[live] = ~terminated[live] & ((self.elapsed[live] >= self.horizon) | lost[live])
            self.over[live] = terminated[live] | truncated[live]
        self._success &= ~self._wrong
        self._render(list(np.flatnonzero(~was_over & ~lost)))
        success = self._success & ~was_over
        info = {"success": success & terminated, "wrong_object": self._wrong & ~was_over}
        reward = info["success"].astype(np.float32)
        return ChunkOutcome(reward, terminated, truncated, n_steps, lost, info)

    def _control_step(self, live: np.ndarray, action_nA: np.ndarray) -> np.ndarray:
        """One control step of worlds `live`: which of them blew up (bool). Of those, what was read last stays."""
        lost = np.zeros(len(live), bool)
        model, index, state = self.model, self.index, self.state
        rotation = np.empty((len(live), 3, 3))
        qpos = np.empty((len(live), 7))
        for k, i in enumerate(live):
            data = self.data[i]
            mujoco.mj_jacSite(model, data, self._jac_buffer[:3], self._jac_buffer[3:], index.grip_site)
            self._jacobian[i] = self._jac_buffer[:, index.arm_dof]
            rotation[k] = data.site_xmat[index.grip_site].reshape(3, 3)
            qpos[k] = data.qpos[index.arm_qpos]
        self._command[live] = advance_command(self._command[live], state.grip[live], action_nA, self.control)
        targets = joint_targets(
            qpos, self._jacobian[live], state.grip[live], rotation, self._command[live],
            self._hold_rotation, self.control.damping,
        )  # fmt: skip
        self._gripper[live] = np.where(action_nA[:, 3] > 0, 1.0, -1.0)
        for k, i in enumerate(live):
            data = self.data[i]
            data.ctrl[:7] = targets[k]
            width = self.control.finger_open_m if self._gripper[i] > 0 else 0.0
            data.ctrl[7], data.ctrl[8] = width, -width
            mujoco.mj_step(model, data, self.substeps)
            mujoco.mj_kinematics(model, data)
            lost[k] = diverged(data)
            if not lost[k]:
                self._read(i)
        return lost

    def _read(self, i: int) -> None:
        data, index, state = self.data[i], self.index, self.state
        state.objects[i] = data.xpos[index.object_body]
        state.grip[i] = data.site_xpos[index.grip_site]
        state.finger_opening[i] = data.qpos[index.finger_qpos[0]] / self.control.finger_open_m
        if len(index.place_body):
            state.places[i] = data.xpos[index.place_body]
            state.places[i, :, 2] += index.place_height
        if len(index.joint_qpos):
            state.joints[i] = data.qpos[index.joint_qpos] / index.joint_travel
            state.handles[i] = data.site_xpos[index.handle_site]

    # ------------------------------------------------------------------ observing
    def _render(self, ids: list[int]) -> None:
        if not self.render_images:
            return
        if self._renderer is None:
            self._renderer = CameraRenderer(
                self.model, self.index.camera_ids, self.image_size, shadows=self.source.shadows
            )
        for i in ids:
            for name, values in self._fields[i].items():
                if name == "headlight":
                    self.model.vis.headlight.ambient[:], self.model.vis.headlight.diffuse[:] = values
                else:
                    getattr(self.model, name)[:] = values
            self.model.geom_rgba[self._geoms] = self._rgba[i]
            mujoco.mj_camlight(self.model, self.data[i])
            with self._lamps(i):
                self._renderer.render(self.data[i], self.images[i], None if self.depth is None else self.depth[i])
            if self.intrinsics is not None:
                self.intrinsics[i] = intrinsics(self.model, self.index.camera_ids, self.image_size)
                self.extrinsics[i] = extrinsics(self.data[i], self.index.camera_ids)
            if self.source.noisy:
                self.images[i] = self.source.observed_images(self.images[i], self.episodes[i], int(self.elapsed[i]))

    @contextmanager
    def _lamps(self, i: int) -> Iterator[None]:
        """Within this, the buttons of world `i` whose lamps are lit look so."""
        joints = rules.lit(self.state, i, self.episodes[i].flashes, int(self.elapsed[i])) if self._full else ()
        # A whole button lights up; where lamps flash, a button in another colour is what a backbone knows.
        whole = not self._full or not self.episodes[i].flashes
        lit = np.isin(self.model.geom_bodyid, [self._lamp_bodies[j][0 if whole else 1 :] for j in joints])
        before = self.model.geom_rgba[lit]
        self.model.geom_rgba[lit] = _LIT if whole else (*COLORS[FLASH_COLOR], 1.0)
        try:
            yield
        finally:
            self.model.geom_rgba[lit] = before

    def exact_proprio(self) -> np.ndarray | None:
        """See `BaseWorlds.exact_proprio`."""
        return self._measured() if self.source.noisy else None

    def _measured(self) -> np.ndarray:
        state = self.state
        columns = (state.grip, self._command - state.grip, state.finger_opening[:, None], self._gripper[:, None])
        return np.concatenate(columns, axis=1).astype(np.float32)

    def proprio(self) -> np.ndarray:
        """(n, P) float32, see PROPRIO_NAMES."""
        rows = self._measured()
        for i, episode in enumerate(self.episodes) if self.source.noisy else ():
            if episode is not None:
                rows[i] = self.source.observed_proprio(rows[i], episode, int(self.elapsed[i]))
        return rows

    def privileged(self) -> np.ndarray:
        """(n, S) float32 for critics and experts, see `envs.tabletop.goals.privileged`."""
        return rules.privileged(self.state, self._gripper, self._command, np, full=self._full)

    def close(self) -> None:
        """Free the graphics context. Safe to call twice."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
