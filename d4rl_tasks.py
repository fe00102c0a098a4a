"""The paper's 26 D4RL tasks on current Gymnasium and MuJoCo, without mujoco-py and d4rl.

Importing this module registers each id twice: `d4rl/<id>`, which is always the environment defined here, and the
bare `<id>`, unless somebody else holds that name already. `TASKS` knows each task's file, reference scores and
episode limit.

    import gymnasium as gym, d4rl_tasks
    env = gym.make("antmaze-large-diverse-v0")
"""

import contextlib
import io
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import gymnasium.envs.mujoco
import numpy as np
from gymnasium.envs.mujoco.ant_v4 import AntEnv
from gymnasium.utils import EzPickle

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

    path: str  # below D4RL's server; the base name is the file's name on disk
    min_score: float  # return of a random policy
    max_score: float  # return of an expert
    limit: int  # steps in an episode
    entry_point: Any
    kwargs: dict[str, Any]
    obs_dim: int
    action_dim: int
    minari: str | None  # the nearest Minari dataset, which is not the same data
    difference: str  # between that dataset and D4RL's

    @property
    def file(self) -> str:
        return self.path.rsplit("/", 1)[1]


def _tasks() -> dict[str, D4RLTask]:
    tasks = {}
    for env, entry_point, low, high, obs_dim, action_dim in (
        ("halfcheetah", "gymnasium.envs.mujoco.half_cheetah_v4:HalfCheetahEnv", -280.178953, 12135.0, 17, 6),
        ("hopper", "gymnasium.envs.mujoco.hopper_v4:HopperEnv", -20.272305, 3234.3, 11, 3),
        ("walker2d", "gymnasium.envs.mujoco.walker2d_v4:Walker2dEnv", 1.629008, 4592.3, 17, 6),
    ):
        for level in ("medium", "medium-replay", "medium-expert"):
            minari = f"mujoco/{env}/medium-v0" if level == "medium" else None
            tasks[f"{env}-{level}-v2"] = D4RLTask(
                f"gym_mujoco_v2/{env}_{level.replace('-', '_')}-v2.hdf5",
                low,
                high,
                1000,
                entry_point,
                {},
                obs_dim,
                action_dim,
                minari,
                "other policies, v5 environments, no reference scores" if minari else "",
            )
    for name, maze, file in (
        ("umaze", "umaze", "u-maze_noisy_multistart_False_multigoal_False"),
        ("umaze-diverse", "umaze", "u-maze_noisy_multistart_True_multigoal_True"),
        ("medium-play", "medium", "big-maze_noisy_multistart_True_multigoal_False"),
        ("medium-diverse", "medium", "big-maze_noisy_multistart_True_multigoal_True"),
        ("large-play", "large", "hardest-maze_noisy_multistart_True_multigoal_False"),
        ("large-diverse", "large", "hardest-maze_noisy_multistart_True_multigoal_True"),
    ):
        for version, folder, suffix in (("v0", "ant_maze_new", "sparse"), ("v2", "ant_maze_v2", "sparse_fixed")):
            tasks[f"antmaze-{name}-{version}"] = D4RLTask(
                f"{folder}/Ant_maze_{file}_{suffix}.hdf5",
                0.0,
                1.0,
                700 if maze == "umaze" else 1000,
                AntMazeEnv,
                {"maze": maze, "resample_goal": version == "v2"},
                29,
                8,
                f"D4RL/antmaze/{name}-v1",
                "another ant policy and frame, episodes go on at the goal",
            )
    for level in ("human", "cloned"):
        tasks[f"pen-{level}-v1"] = D4RLTask(
            f"hand_dapg_v1/pen-{level}-v1.hdf5",
            96.262799,
            3076.8331017826877,
            100,
            make_pen,
            {},
            45,
            24,
            f"D4RL/pen/{level}-v2",
            "replayed actions, 200 steps, goes on with a dropped pen: returns about twice as high",
        )
    first_two, last_two = ["microwave", "kettle"], ["light switch", "slide cabinet"]
    for level, file, elements in (
        ("complete", "mini_kitchen_microwave_kettle_light_slider-v0", first_two + last_two),
        ("partial", "kitchen_microwave_kettle_light_slider-v0", first_two + last_two),
        ("mixed", "kitchen_microwave_kettle_bottomburner_light-v0", first_two + ["bottom burner", "light switch"]),
    ):
        tasks[f"kitchen-{level}-v0"] = D4RLTask(
            f"kitchen/{file}.hdf5",
            0.0,
            4.0,
            280,
            make_kitchen,
            {"tasks_to_complete": elements},
            60,
            9,
            f"D4RL/kitchen/{level}-v2",
            "replayed, 59 numbers instead of 60, the stored environment accumulates reward",
        )
    return tasks


TASKS = _tasks()

for _id, _task in TASKS.items():
    for _name in (f"d4rl/{_id}", _id):
        if _name not in gym.registry:
            gym.register(_name, _task.entry_point, max_episode_steps=_task.limit, kwargs=_task.kwargs, disable_env_checker=True)


_PAGE = """# Tasks

<!-- Written by `python d4rl_tasks.py > docs/tasks.md`. -->

| what | id | data | environment |
|---|---|---|---|
| D4RL | `hopper-medium-v2`, the 26 ids below | D4RL's file in `$D4RL_DATASET_DIR` (else `~/.d4rl/datasets`), downloaded if it is missing; `$D4RL_BASE_URL` names another server | D4RL's, rebuilt on Gymnasium: this page |
| Minari | `D4RL/pen/human-v2`, any id with a slash | where Minari keeps it (`$MINARI_DATASETS_PATH`), downloaded if it is missing | the data set's own |
| mazes | `dtql/pointmaze-umaze-v0` (the demo), `dtql/pointmaze-medium-v0`, `dtql/pointmaze-large-v0` | collected in a minute by a scripted controller that drives between random cells | gymnasium-robotics' PointMaze, from one end of the longest shortest path to the other |
| OGBench | `antmaze-large-navigate-singletask-v0`, `cube-single-play-singletask-task2-v0`, ... | OGBench's file in `$OGBENCH_DATASET_DIR` (else `~/.ogbench/data`), downloaded if it is missing from OGBench's server or its public mirror; `$OGBENCH_BASE_URL` comes before both | OGBench's, scored by success |
| your own | `--data FILE`, with `--env-id` of any registered Gymnasium environment or without | an HDF5 or npz file: below | that one, or none: trained and not evaluated |

A D4RL id always means D4RL's file and D4RL's environment, a Minari id Minari's data and its own environment: scores of the two are
not comparable. `import d4rl_tasks` registers every D4RL id twice: `d4rl/<id>`, always the environment of this project, and `<id>`
itself, unless somebody else holds that name.

Downloads go on where they were cut off (`FILE.part`), if the server's file has not changed. A complete file gets a `FILE.sha256`; at
the next start another process compares the two, once. A file that has changed is refused from then on.

## OGBench

State-based single tasks, by their dataset's name: `{{environment}}-{{navigate, stitch, explore, play or noisy}}-singletask[-task1 to 5]-v0`.
Rewards and masks are OGBench's (`ogbench.relabel_utils`): -1 and 0 in mazes, minus the number of unfinished parts elsewhere; the mask of
the solved state, not the end of a trajectory, stops the bootstrap. The score is the share of episodes that are solved. Environments
that draw from numpy's global state (mazes, also teleporting ones) get a state of their own, so that a seed says everything. ogbench
1.2.2 takes success from the state before the step, as its 1.1 did not: published FQL numbers are of 1.1. `fql.py` has the official
settings; DTQL's are a guess (AntMaze's row of Table 4 with batches of 256), never run on OGBench's own files, which were out of reach.
Pixels, discrete actions and goal-conditioned tasks are refused.

## Your own data

```bash
python dtql_continuous.py --data log.npz --env-id Pendulum-v1             # evaluated by return; a D4RL id has D4RL's score and settings
python dtql_continuous.py --data arm.hdf5 --action-low -1 --action-high 1   # no environment: losses, a checkpoint, load_policy
```

| column | shape | |
|---|---|---|
| `observations`, `actions` | (N, S), (N, A) | floating-point actions, in the environment's or the given bounds; by default their own range, which is said |
| `rewards`, `terminals` | (N,) | 1 where the task ended: no bootstrap there |
| `timeouts` | (N,), optional | 1 in the last row of a trajectory that was only cut; that row is dropped if it has no next observation |
| `next_observations` | (N, S), optional | else the next row is taken |

What could be read in two ways is refused with the question: rows that are terminal and timeout, files in which no trajectory ends,
integer actions, actions that never change, one-dimensional actions, observations that are images.

## The paper's 26 D4RL tasks

Score = 100 (return - lower reference) / (upper - lower).

{rows}

* **AntMaze** is D4RL's: time step 0.02 s, motors of 30 N m, its contacts, its frame (start cell at the origin, y along the rows of
  the map), a goal that is not observed, no end when the ant falls. gymnasium-robotics' AntMaze has another physics and a
  mirrored frame. The v0 files have timeouts that are out of step with the real ends of episodes (mended in v2); they are used as
  they are, since the paper did so. v0 draws its goal once per environment instance, v2 at every reset.
* **Kitchen**: the robot's observation noise is D4RL's 0.1. **Locomotion** is Gymnasium's v4; v5 changes physics and rewards.
* Minari's AntMaze data goes on at the goal: each episode is cut at its first success, terminal there, and evaluated in an
  environment that ends there.
"""


def _page() -> str:
    """docs/tasks.md."""
    head = ("id", "file", "environment", "steps", "reference returns", "nearest Minari data", "why that is not the same")
    environments = {
        "halfcheetah": "`HalfCheetah-v4`",
        "hopper": "`Hopper-v4`",
        "walker2d": "`Walker2d-v4`",
        "antmaze": "`AntMazeEnv`, D4RL's physics and frame",
        "pen": "`AdroitHandPen-v1`, ends when dropped",
        "kitchen": "`FrankaKitchen-v1`, 60-d observation",
    }
    rows = [head, ["---"] * len(head)]
    for name, task in TASKS.items():
        rows.append(
            (
                f"`{name}`",
                f"`{task.file}`",
                environments[name.split("-")[0]],
                task.limit,
                f"{task.min_score:g} to {task.max_score:g}",
                f"`{task.minari}`" if task.minari else "none",
                task.difference or "-",
            )
        )
    return _PAGE.format(rows="\n".join(f"| {' | '.join(map(str, row))} |" for row in rows))


if __name__ == "__main__":
    print(_page(), end="")
