"""The cell at work: the simulation on its own clock, libfranka's servers, the cameras' feed, and who judges an episode.

A controller meets it as it meets a real cell: over libfranka's protocol (ports 1337 and 1338 of `host`) and over the
feed (`policies.franka.feed`). Beside these an operator's requests are answered on the feed's port: to lay out a
scene, to tell how the episode stands, or to put the arm into a state of error. The verdict is the
simulator's alone.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import mujoco
import numpy as np
from franky_sim.mujoco_simulator import MujocoSimulator

from bascule.franka_cell.arm_server import CellServer
from bascule.franka_cell.film import Film
from bascule.franka_cell.scene import add_arm, add_scene, finish
from bascule.franka_cell.windows import Windows
from envs.registry import load_suite
from envs.sim.cameras import CameraRenderer
from envs.tabletop import goals as rules
from envs.tabletop.episode_source import EpisodeSource
from envs.tabletop.scene import REST_HEIGHT_M

STEP_S = 0.001
_BEHIND_S = 0.05
"""A simulation that is later than this gives the time up as lost, instead of running faster to catch up."""
_WIDE_M = 0.04
_SETTLES = 200
"""Steps after which the velocities that the arm tells have forgotten that it was put elsewhere."""
_PATIENCE_S = 0.02
"""The simulation waits this long for the answer to a state. An arm does not wait: it needs a real-time kernel."""


@dataclass(frozen=True)
class CellConfig:
    """The scene in the cell and its clock."""

    suite: str = "tabletop-pick"
    """The tabletop suite whose scenes are laid out."""
    seed: int = 5_000_000
    """Seed of the first scene."""
    host: str = "127.0.0.1"
    """Address of this machine on which the arm listens, ports 1337 and 1338. Another 127.0.0.x is another arm."""
    port: int = 7331
    """Port of the cameras' feed and of the operator; 0 takes any free one."""
    fps: float = 20.0
    """Pictures of each camera per second of the cell's clock."""
    image_size: int = 96
    """Height and width of the pictures in pixels."""
    speed: float = 1.0
    """Seconds of the cell's clock per second: below 1 for a machine that is too slow or too busy."""
    look: str = "hulls"
    """How the arm is drawn: as in the suites (hulls), or by the meshes of the real one (fr3), which takes 20 times as
    long."""


@dataclass
class Verdict:
    """How the present episode stands."""

    seed: int = -1
    task: str = ""
    instruction: str = ""
    swapped_instruction: str = ""
    """The same words for another object, of which only a failure can come."""
    success: bool = False
    wrong_object: bool = False
    at_s: float | None = None
    """When that was decided, s of the cell's clock since the arm first moved."""
    seconds: float = 0.0
    """Since the arm first moved."""
    commands: int = 0
    """Steps of 1 ms in which a motion ran, and those of them for which no command had come in time."""
    missed: int = 0
    lost_s: float = 0.0
    """Seconds by which the simulation has fallen behind its clock."""
    grip: list[float] = field(default_factory=list)
    """(3,) m, where the fingers are."""


class Cell:
    """One cell in this thread. `run` until `stop`."""

    def __init__(self, config: CellConfig) -> None:
        """OSError for an address or port that is taken, ValueError for a configuration that cannot be."""
        if not 0 < config.speed <= 1 or config.fps <= 0:
            raise ValueError(f"the speed must be above 0 and at most 1, fps above 0; got {config.speed}, {config.fps}")
        self.config = config
        self.source = EpisodeSource(load_suite(config.suite))
        self._sim = MujocoSimulator()
        self._sim.init()
        self._arm = add_arm(self._sim)
        add_scene(self._sim, self.source.scene)
        self._server = CellServer(self._sim, [config.host])
        self._server.init()
        self._count_commands()
        self.model: mujoco.MjModel = self._sim.model
        self.data: mujoco.MjData = self._sim.data
        self.index = finish(self.model, self.source.scene, config.look)
        rest = np.array([REST_HEIGHT_M[kind] for kind in self.source.scene.objects])
        self._rules = rules.empty_state(1, rest, self.index.place_radius, len(self.index.joint_qpos))
        self._renderer: CameraRenderer | None = None
        shape = (len(self.index.cameras), config.image_size, config.image_size, 3)
        self._images = np.zeros(shape, np.uint8)
        self.verdict = Verdict()
        self.film = Film(self.model, self.data, self.source.scene)
        self._steps = 0
        self._moved_at: int | None = None
        self._requests: queue.Queue[tuple[dict[str, Any], queue.Queue[dict[str, Any]]]] = queue.Queue()
        self._stopped = threading.Event()
        self.windows = Windows(config.host, config.port, self.index.cameras, config.image_size, self._request)
        self.lay_out(config.seed)

    def run(self) -> None:
        """Step, render and judge until `stop`."""
        self._renderer = CameraRenderer(self.model, self.index.camera_ids, self.config.image_size)
        judge_every = round(1 / (self.source.scene.control_hz * STEP_S))
        picture_every = max(1, round(1 / (self.config.fps * STEP_S)))
        due = time.monotonic()
        try:
            while not self._stopped.is_set():
                self._server.arm.await_command(_PATIENCE_S)
                self._server.run_once(realtime=False)
                self._steps += 1
                if self._steps % judge_every == 0:
                    self._judge()
                if self._steps % picture_every == 0:
                    self._show()
                self._answer()
                due += STEP_S / self.config.speed
                left = due - time.monotonic()
                if left > 0:
                    time.sleep(left)
                elif left < -_BEHIND_S:
                    self.verdict.lost_s -= left * self.config.speed
                    due = time.monotonic()
        finally:
            self.windows.close()
            self._server.cleanup()
            self._renderer.close()

    def stop(self) -> None:
        """End `run`, from any thread."""
        self._stopped.set()

    def lay_out(self, seed: int, task: str | None = None) -> None:
        """Begin the episode that `seed` means: the things at their places, the arm at its start. Whoever drives the arm
        is disconnected. ValueError for a task that the suite lacks."""
        episode = self.source.sample(seed, task)
        start = self.source.initial_state(episode, self.model, self.index)
        data, index = self.data, self.index
        data.qpos[:], data.mocap_pos[:], data.mocap_quat[:] = start.qpos, start.mocap_pos, start.mocap_quat
        data.qpos[index.finger_qpos] = _WIDE_M  # both fingers open upwards, unlike our Panda's
        data.qvel[:] = data.qfrc_applied[:] = data.qacc_warmstart[:] = 0.0
        data.xfrc_applied[:, 2] = start.lift_force
        self._arm.set_hand_goal(2 * _WIDE_M, 0.05, 70.0)
        self.model.geom_rgba[index.colored_geom] = start.rgba
        mujoco.mj_forward(self.model, data)
        server = self._server.arm
        server.recover()
        server.reset_state()  # else the arm goes back to where it was held before
        if server.gripper_server is not None:
            server.gripper_server.reset_state()
        for _ in range(_SETTLES):
            self._server.run_once(realtime=False)
        rules.write_goals(self._rules, 0, episode.goals, episode.slots, strict=episode.strict)
        self.verdict = Verdict(seed, episode.task, episode.instruction, episode.swapped_instruction)
        self._moved_at = None
        self.film.begin()
        self._read()

    def _count_commands(self) -> None:
        control = self._arm.cartesian_position_control

        def counted(pose: Any, elbow: Any, has_new_command: bool = True) -> None:
            if self._moved_at is None:
                self._moved_at = self._steps
            self.verdict.commands += 1
            self.verdict.missed += not has_new_command
            control(pose, elbow, has_new_command)

        self._arm.cartesian_position_control = counted

    def _judge(self) -> None:
        self._read()
        told = self.verdict
        done, wrong = bool(rules.advance(self._rules)[0]), bool(rules.wrong_object(self._rules)[0])
        if self._moved_at is not None:
            told.seconds = round((self._steps - self._moved_at) * STEP_S, 3)
        if not (told.success or told.wrong_object) and (done or wrong):
            told.success, told.wrong_object, told.at_s = done and not wrong, wrong, told.seconds
        self.film.look(told)

    def _read(self) -> None:
        data, index, state = self.data, self.index, self._rules
        mujoco.mj_kinematics(self.model, data)
        state.objects[0], state.grip[0] = data.xpos[index.object_body], data.site_xpos[index.grip_site]
        state.finger_opening[0] = data.qpos[index.finger_qpos[0]] / _WIDE_M
        if len(index.place_body):
            state.places[0] = data.xpos[index.place_body]
            state.places[0, :, 2] += index.place_height
        if len(index.joint_qpos):
            state.joints[0] = data.qpos[index.joint_qpos] / index.joint_travel
            state.handles[0] = data.site_xpos[index.handle_site]
        self.verdict.grip = state.grip[0].round(4).tolist()

    def _show(self) -> None:
        if not self.windows.watched or self._renderer is None:
            return
        mujoco.mj_camlight(self.model, self.data)
        self._renderer.render(self.data, self._images)
        self.windows.show(self._images.copy(), time.monotonic())

    def _request(self, request: dict[str, Any]) -> dict[str, Any]:
        """Have a request answered between two steps, from any thread."""
        answer: queue.Queue[dict[str, Any]] = queue.Queue()
        self._requests.put((request, answer))
        return answer.get(timeout=5.0)

    def _answer(self) -> None:
        while not self._requests.empty():
            request, answer = self._requests.get()
            try:
                answer.put(self._done(request))
            except (ValueError, TypeError, KeyError) as error:
                answer.put({"error": str(error)})

    def _done(self, request: dict[str, Any]) -> dict[str, Any]:
        match request.get("do"):
            case "scene":
                self.lay_out(int(request["seed"]), request.get("task"))
            case "fault":
                self._server.arm.fail(str(request.get("kind")))
            case "verdict":
                pass
            case "stop":
                self.stop()
            case unknown:
                raise ValueError(f"no request '{unknown}': camera, scene, verdict, fault or stop")
        return asdict(self.verdict)
