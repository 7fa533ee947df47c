"""The state in which an episode begins, as arrays: a pure function of the episode, the same for every backend."""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import numpy as np

from envs.seeds import Stream
from envs.tabletop.episodes import Episode
from envs.tabletop.scene import COLORS, HOME_QPOS, REST_HEIGHT_M, SceneConfig, SceneIndex, parking_pos

_START_NOISE_RAD = 0.06
_GRAVITY = 9.81


@dataclass(frozen=True)
class Start:
    """The values to write into one simulation; velocities are zero and controls hold the pose."""

    qpos: np.ndarray  # (nq,)
    mocap_pos: np.ndarray  # (nmocap, 3) m
    mocap_quat: np.ndarray  # (nmocap, 4)
    lift_force: np.ndarray  # (nbody,) N upward, carries what hangs in the air; goes into xfrc_applied[:, 2]
    rgba: np.ndarray  # (C, 4) float32, of `SceneIndex.colored_geom`


def initial_state(
    episode: Episode,
    scene: SceneConfig,
    model: mujoco.MjModel,
    index: SceneIndex,
    *,
    finger_open_m: float,
) -> Start:
    """The first state of `episode`."""
    rng = np.random.default_rng([episode.seed, Stream.ARM_START])
    qpos = model.qpos0.copy()
    for slot in range(len(scene.objects)):
        a = index.object_qpos[slot]
        qpos[a : a + 3] = parking_pos(slot, floating=scene.parked_float)
    for slot, (x, y, yaw) in zip(episode.slots, episode.poses, strict=True):
        a = index.object_qpos[slot]
        rest = REST_HEIGHT_M[scene.objects[slot]]
        rest += episode.first_floor if slot == episode.slots[0] else 0.0
        qpos[a : a + 7] = [x, y, rest, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
    lift_force = np.zeros(model.nbody)
    if scene.parked_float:
        away = [slot for slot in range(len(scene.objects)) if slot not in episode.slots]
        lift_force[index.object_body[away]] = _GRAVITY * model.body_mass[index.object_body[away]]
    qpos[index.joint_qpos] = index.joint_travel * np.array(episode.openings)

    mocap_pos, mocap_quat = _mocap_rest(model)
    standing = [(x, y, 0.0) for x, y in episode.plate_xy] + list(episode.fixtures)
    first = 0 if episode.plate_xy else scene.num_plates
    for k, (x, y, yaw) in enumerate(standing):
        m = index.fixture_mocap[first + k]
        mocap_pos[m] = [x, y, index.fixture_height[first + k]]
        mocap_quat[m] = [np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]

    qpos[index.arm_qpos] = np.array(HOME_QPOS) + rng.normal(0, _START_NOISE_RAD, 7)
    qpos[index.finger_qpos] = [finger_open_m, -finger_open_m]

    colors = np.ones((len(scene.objects) + len(index.fixture_mocap), 4), np.float32)
    colors[:, :3] = 0.5
    named = [*zip(episode.slots, episode.colors, strict=True)]
    after = len(scene.objects) + first
    named += [*enumerate((*episode.plate_colors, *episode.fixture_colors), start=after)]
    for entity, color in named:
        colors[entity, :3] = COLORS[color]
    return Start(qpos, mocap_pos, mocap_quat, lift_force, colors[index.colored_entity])


def _mocap_rest(model: mujoco.MjModel) -> tuple[np.ndarray, np.ndarray]:
    """Poses of mocap bodies in the scene file: plates that take no part stay there."""
    pos, quat = np.zeros((model.nmocap, 3)), np.zeros((model.nmocap, 4))
    bodies = np.flatnonzero(model.body_mocapid >= 0)
    pos[model.body_mocapid[bodies]] = model.body_pos[bodies]
    quat[model.body_mocapid[bodies]] = model.body_quat[bodies]
    return pos, quat
