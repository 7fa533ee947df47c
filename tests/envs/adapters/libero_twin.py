"""LIBERO's own environment beside ours, step by step. Runs in LIBERO's interpreter: numpy and mujoco only.

python libero_twin.py ROOT OUT.json SUITE TASK... plays the tasks' published state 0 in both from the same seed: random
actions for some decisions, then the things of the goal are put into their places. Writes the largest differences.
"""

import json
import sys

sys.path.append(sys.argv[1])

import numpy as np

from envs.adapters.adapter_worlds import numpy_seed
from envs.adapters.libero_env import ACTION_SPEC, SETTLE_STEPS, LiberoWorlds, rotation_vector
from envs.adapters.libero_suites import CAMERAS, libero_suites
from envs.sim.render_options import RenderOptions

SIZE, DECISIONS, CHUNK = 128, 2, 8
IDLE = np.array([0.0] * 6 + [-1.0])


def theirs(worlds, number, seed):
    """The package's environment as an evaluation script sets it up, at the published state of `seed`."""
    from libero.libero.envs.env_wrapper import ControlEnv

    problem = worlds._libero.problem(number)
    with numpy_seed(0):
        env = ControlEnv(problem, use_camera_obs=False, ignore_done=True)  # drawn when asked, not at every step
    with numpy_seed(seed):
        env.env.reset()
    seen = env.set_init_state(worlds._libero.published_state(number, worlds.suite.scene_of(seed)[1]))
    for _ in range(SETTLE_STEPS):
        seen, _, _, _ = env.step(IDLE)
    return env, seen


def pictures(env):
    """(V, H, W, 3) as published evaluations show them: turned by 180 degrees."""
    env.sim._render_context_offscreen.gl_ctx.make_current()  # ours was, a moment ago
    drawn = [env.sim.render(camera_name=name, width=SIZE, height=SIZE) for name in CAMERAS.values()]
    return np.stack(drawn)[:, ::-1, ::-1]


def solve(env):
    """Put every thing of the goal where it belongs; True if the goal is of things and places only."""
    goal = env.env.parsed_problem["goal_state"]
    if any(len(predicate) < 3 for predicate in goal):
        return False
    for _, thing, place in goal:
        at = np.array(env.env.object_states_dict[place].get_geom_state()["pos"])
        joint = env.env.objects_dict[thing].joints[-1]
        pose = env.sim.data.get_joint_qpos(joint)
        env.sim.data.set_joint_qpos(joint, np.r_[at + [0.0, 0.0, 0.05], pose[3:]])
        env.sim.data.set_joint_qvel(joint, np.zeros(6))
    env.sim.forward()
    return True


def play(worlds, number):
    """Largest differences of one task."""
    seed = worlds.suite.eval_seed0 + number
    obs = worlds.reset(seeds=[seed])
    ours, (env, seen) = worlds._envs[0], theirs(worlds, number, seed)
    rng = np.random.default_rng(number)
    found = {"state": 0.0, "picture": 0, "proprio": 0.0, "done_differs": 0, "horizon": worlds.horizon}
    found["brightness"] = float(obs.images["front"].mean())
    found["instruction"] = obs.instruction[0]

    def compare():
        there, here = env.sim.get_state().flatten(), ours.sim.get_state().flatten()
        found["state"] = max(found["state"], float(abs(there - here)[1:].max()))
        found["picture"] = max(found["picture"], int(abs(pictures(env).astype(int) - worlds.images[0]).max()))
        told = np.r_[seen["robot0_eef_pos"], rotation_vector(seen["robot0_eef_quat"]), seen["robot0_gripper_qpos"]]
        found["proprio"] = max(found["proprio"], float(abs(told - worlds.proprio()[0]).max()))

    compare()
    for _ in range(DECISIONS):
        chunk = rng.uniform(ACTION_SPEC.low, ACTION_SPEC.high, (1, CHUNK, ACTION_SPEC.dim))
        result = worlds.step_chunk(chunk)
        for action in chunk[0]:
            seen, _, done, _ = env.step(action)
            found["done_differs"] += int(done)
        compare()
    found["solved"] = None
    if solve(env) and solve(ours):
        theirs_done = []
        result = worlds.step_chunk(np.tile(IDLE, (1, 60, 1)))
        while len(theirs_done) < 60 and not any(theirs_done):
            theirs_done.append(bool(env.step(IDLE)[2]))
        found["solved"] = bool(result.info["success"][0])
        found["done_differs"] += int(int(result.n_steps[0]) != len(theirs_done)) + int(
            any(theirs_done) != found["solved"]
        )
    env.close()
    return found


def main():
    suite, numbers = libero_suites()[sys.argv[3]], [int(number) for number in sys.argv[4:]]
    worlds = LiberoWorlds(suite, 1, render=RenderOptions(SIZE))
    report = {}
    for number in numbers:
        report[number] = play(worlds, number)
        print(suite.name, number, report[number], flush=True)
    with open(sys.argv[2], "w") as out:
        json.dump(report, out)


main()
