"""The paper's 26 D4RL tasks on current Gymnasium and MuJoCo, without mujoco-py and d4rl.

Importing this module registers each id twice: `d4rl/<id>`, which is always the environment defined here, and the bare `<id>`,
unless that name is taken. `TASKS` holds each task's file, reference scores and episode limit.

    import gymnasium as gym, tasks.d4rl
    env = gym.make("antmaze-large-diverse-v0")
"""

import contextlib
import functools
import io
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import gymnasium.envs.mujoco
import h5py
import numpy as np
from gymnasium.envs.mujoco.ant_v4 import AntEnv
from gymnasium.utils import EzPickle

from tasks.download import fetch, folder
from tasks.task import KEYS, Task, read_columns

with contextlib.redirect_stderr(io.StringIO()):  # it prints a notice about Adroit tasks that are not ours
    import gymnasium_robotics  # noqa: F401

# D4RL's mazes, row by row: 1 wall, 0 free, r start, g goal. A cell is 4 m wide.
MAZES = {
    "umaze": "11111 1r001 11101 1g001 11111",
    "medium": "11111111 1r011001 10010001 11000111 10010001 10100101 100010g1 11111111",
    "large": "111111111111 1r0001000001 101101010101 100000010001 101111011101 100101000001 110101010111 100100010g01 "
    "111111111111",
}
CELL = 4.0  # m
WALL_HEIGHT = 2.0  # m


class AntMazeEnv(AntEnv):
    """D4RL's AntMaze: an ant walks from the start cell, whose centre is (0, 0), to a goal that it cannot see.

    The ant is Gymnasium's v4 model with D4RL's time step (0.02 s, 5 to an action), motors (30 N m) and contacts.
    Positions are in D4RL's frame: x = 4 (column - start column), y = 4 (row - start row), in metres.

    Observation (29,): qpos[0:15] (x and y first), qvel[0:14]. Action (8,) in [-1, 1]. Reward 1 and the end of the
    episode within 0.5 m of the goal, else 0; a fallen ant lies where it is.

    Args:
        maze: a key of `MAZES`.
        resample_goal: draw the goal at every reset (D4RL's v2) or once per environment instance (v0).
    """

    metadata = {**AntEnv.metadata, "render_fps": 10}

    def __init__(self, maze: str, resample_goal: bool, **kwargs):
        rows = MAZES[maze].split()
        cells = {symbol: np.array((col, row)) for row, line in enumerate(rows) for col, symbol in enumerate(line)}
        position = lambda col, row: CELL * (np.array((col, row)) - cells["r"])

        tree = ET.parse(Path(gymnasium.envs.mujoco.__file__).parent / "assets/ant.xml")
        tree.find("option").set("timestep", "0.02")
        tree.find("default/geom").set("solimp", "0.8 0.8 0.01")
        for motor in tree.iterfind("actuator/motor"):
            motor.set("gear", "30")
        for row, line in enumerate(rows):
            for col, symbol in enumerate(line):
                if symbol == "1":
                    x, y = position(col, row)
                    ET.SubElement(
                        tree.find("worldbody"),
                        "geom",
                        name=f"block_{row}_{col}",
                        type="box",
                        pos=f"{x} {y} {WALL_HEIGHT / 2}",
                        size=f"{CELL / 2} {CELL / 2} {WALL_HEIGHT / 2}",
                        contype="1",
                        conaffinity="1",
                        rgba="0.4 0.4 0.4 1",
                    )
        with tempfile.NamedTemporaryFile(suffix=".xml") as file:  # MuJoCo reads models from files
            tree.write(file)
            file.flush()
            super().__init__(file.name, exclude_current_positions_from_observation=False, **kwargs)
        EzPickle.__init__(self, maze, resample_goal, **kwargs)
        self.goal_cell = position(*cells["g"])
        self.resample_goal = resample_goal
        self.target_goal = None

    def reset_model(self) -> np.ndarray:
        if self.resample_goal or self.target_goal is None:
            noise = self.np_random.uniform(0, 1, size=2) + self.np_random.uniform(0, 0.5, size=2)
            self.target_goal = self.goal_cell + noise
        return super().reset_model()  # qpos + U(-0.1, 0.1), qvel + 0.1 N(0, 1), as in D4RL

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.do_simulation(action, self.frame_skip)
        if self.render_mode == "human":
            self.render()
        obs = self._get_obs()
        success = bool(np.linalg.norm(obs[:2] - self.target_goal) <= 0.5)
        return obs, float(success), success, False, {"success": success}


class DroppedPenEnds(gym.Wrapper):
    """Ends the episode when the pen is dropped (D4RL; gymnasium-robotics goes on)."""

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated or bool(obs[26] < 0.075), truncated, info  # 26: height of the pen in m


class KitchenObservation(gym.ObservationWrapper):
    """FrankaKitchen's observation laid out as in D4RL's data: robot qpos (9), object qpos (21), goal (30)."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (60,), np.float64)
        self.goal = np.zeros(30)
        from gymnasium_robotics.envs.franka_kitchen.kitchen_env import OBS_ELEMENT_INDICES

        for element, value in env.unwrapped.goal.items():
            self.goal[OBS_ELEMENT_INDICES[element]] = value

    def observation(self, obs: dict) -> np.ndarray:
        return np.concatenate((obs["observation"][:9], obs["observation"][18:39], self.goal))


def make_pen(**kwargs) -> gym.Env:
    """Adroit pen: observation (45,), action (24,) in [-1, 1]."""
    from gymnasium_robotics.envs.adroit_hand.adroit_pen import AdroitHandPenEnv

    return DroppedPenEnds(AdroitHandPenEnv(**kwargs))


def make_kitchen(**kwargs) -> gym.Env:
    """Franka kitchen: observation (60,), action (9,) in [-1, 1]; 1 for each task done, 4 ends the episode."""
    from gymnasium_robotics.envs.franka_kitchen.kitchen_env import KitchenEnv

    # 0.1 is D4RL's observation noise of the robot. A completed task is paid once.
    return KitchenObservation(
        KitchenEnv(robot_noise_ratio=0.1, terminate_on_tasks_completed=True, remove_task_when_completed=True, **kwargs)
    )


class D4RLTask(NamedTuple):
    """One row of the table: where a task's data lies and how it is evaluated."""

    path: str  # below D4RL's server; its last part is the file's name on disk
    min_score: float  # return of a random policy
    max_score: float  # return of an expert
    limit: int  # steps per episode
    entry_point: Any
    kwargs: dict[str, Any]
    minari: str | None  # the nearest Minari data set, which is different data

    @property
    def file(self) -> str:
        return self.path.rsplit("/", 1)[1]

    def score(self, returns: np.ndarray) -> np.ndarray:
        """D4RL's normalised score of returns."""
        return 100 * (returns - self.min_score) / (self.max_score - self.min_score)


TASKS: dict[str, D4RLTask] = {}
for _env, _class, _low, _high in (
    ("halfcheetah", "half_cheetah_v4:HalfCheetahEnv", -280.178953, 12135.0),
    ("hopper", "hopper_v4:HopperEnv", -20.272305, 3234.3),
    ("walker2d", "walker2d_v4:Walker2dEnv", 1.629008, 4592.3),
):
    for _level in ("medium", "medium-replay", "medium-expert"):
        _path = f"gym_mujoco_v2/{_env}_{_level.replace('-', '_')}-v2.hdf5"
        _minari = f"mujoco/{_env}/medium-v0" if _level == "medium" else None
        TASKS[f"{_env}-{_level}-v2"] = D4RLTask(_path, _low, _high, 1000, f"gymnasium.envs.mujoco.{_class}", {}, _minari)
for _name, _maze, _file in (
    ("umaze", "umaze", "u-maze_noisy_multistart_False_multigoal_False"),
    ("umaze-diverse", "umaze", "u-maze_noisy_multistart_True_multigoal_True"),
    ("medium-play", "medium", "big-maze_noisy_multistart_True_multigoal_False"),
    ("medium-diverse", "medium", "big-maze_noisy_multistart_True_multigoal_True"),
    ("large-play", "large", "hardest-maze_noisy_multistart_True_multigoal_False"),
    ("large-diverse", "large", "hardest-maze_noisy_multistart_True_multigoal_True"),
):
    for _version, _prefix, _suffix in (("v0", "ant_maze_new", "sparse"), ("v2", "ant_maze_v2", "sparse_fixed")):
        _path, _limit = f"{_prefix}/Ant_maze_{_file}_{_suffix}.hdf5", 700 if _maze == "umaze" else 1000
        _kwargs = {"maze": _maze, "resample_goal": _version == "v2"}
        TASKS[f"antmaze-{_name}-{_version}"] = D4RLTask(_path, 0.0, 1.0, _limit, AntMazeEnv, _kwargs, f"D4RL/antmaze/{_name}-v1")
for _level in ("human", "cloned"):
    TASKS[f"pen-{_level}-v1"] = D4RLTask(
        f"hand_dapg_v1/pen-{_level}-v1.hdf5", 96.262799, 3076.8331017826877, 100, make_pen, {}, f"D4RL/pen/{_level}-v2"
    )
for _level, _file, _elements in (
    ("complete", "mini_kitchen_microwave_kettle_light_slider-v0", ["microwave", "kettle", "light switch", "slide cabinet"]),
    ("partial", "kitchen_microwave_kettle_light_slider-v0", ["microwave", "kettle", "light switch", "slide cabinet"]),
    ("mixed", "kitchen_microwave_kettle_bottomburner_light-v0", ["microwave", "kettle", "bottom burner", "light switch"]),
):
    _kwargs = {"tasks_to_complete": _elements}
    TASKS[f"kitchen-{_level}-v0"] = D4RLTask(
        f"kitchen/{_file}.hdf5", 0.0, 4.0, 280, make_kitchen, _kwargs, f"D4RL/kitchen/{_level}-v2"
    )

for _id, _task in TASKS.items():
    for _name in (f"d4rl/{_id}", _id):
        if _name not in gym.registry:
            gym.register(_name, _task.entry_point, max_episode_steps=_task.limit, kwargs=_task.kwargs, disable_env_checker=True)


# ---- data --------------------------------------------------------------------------------------------------------------

SOURCES = ("http://rail.eecs.berkeley.edu/datasets/offline_rl/",)


def make_env(env_id: str) -> gym.Env:
    """The environment of a D4RL id; made from its spec, because gym.make(id) warns that v2 is newer than v0."""
    return gym.make(gym.spec(f"d4rl/{env_id}"))


def load(env_id: str) -> Task:
    """A D4RL task with its file, which is downloaded if it is missing. Raises UserError."""
    row = TASKS[env_id]
    file = folder("D4RL_DATASET_DIR", ".d4rl/datasets") / row.file
    near = f"; the nearest Minari data set, {row.minari}, is different data" if row.minari else ""
    advice = f"{env_id}: put {row.file} into {file.parent}{near}"
    fetch("D4RL_BASE_URL", SOURCES, row.path, file, advice, lambda part: h5py.File(part).close())
    return Task(
        **transitions(file, row.limit),
        make_env=functools.partial(make_env, env_id),
        score=row.score,
        score_name="D4RL normalised score",
        sparse_goal=env_id.startswith("antmaze"),
        origin=str(file),
    )


def transitions(file: Path, limit: int) -> dict[str, np.ndarray]:
    """Transitions of a D4RL HDF5 file, exactly those of d4rl's `qlearning_dataset`, float32.

    next_obs is the next row's observation. Where an episode is cut (`timeouts`, or without that key after `limit` steps) there
    is none, and the row is dropped even if it is also terminal. The last row only serves as next_obs.
    Raises UserError if the file is damaged or lacks a column, or if columns differ in length.
    """
    arrays = read_columns(file, {**KEYS, "timeouts": 1})
    terminals = arrays["terminals"].astype(bool)
    if "timeouts" in arrays:
        final = arrays["timeouts"].astype(bool)
    else:
        final, step = np.zeros(len(terminals), bool), 0
        for row, terminal in enumerate(terminals):
            final[row] = step == limit - 1
            # d4rl sets its step to 0 at a terminal and still counts that row, so the next episode starts at 1
            step = 0 if final[row] else 1 if terminal else step + 1
    kept = np.flatnonzero(~final[:-1])
    observations = arrays["observations"].astype(np.float32)
    return {
        "obs": observations[kept],
        "actions": arrays["actions"][kept],
        "rewards": arrays["rewards"][kept].astype(np.float32),
        "terminals": terminals[kept].astype(np.float32),
        "next_obs": observations[kept + 1],
    }
