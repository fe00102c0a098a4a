"""OGBench's state-based single tasks (Park et al. 2025)."""

import contextlib
import functools
import json
import os
import re
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np

import evaluation
from common import UserError, check, line
from tasks.download import fetch, folder
from tasks.task import Task, check_env

SOURCES = ("https://rail.eecs.berkeley.edu/datasets/ogbench/",)
MIRROR = "zhouzypaul/ogbench_datasets"  # on the Hugging Face hub
ID = re.compile(
    r"((?!visual-)(?:antmaze|humanoidmaze|pointmaze|antsoccer|cube|scene|puzzle)(?:-(?!\w*oraclerep)\w+)*?)"
    r"-(navigate|stitch|explore|play|noisy)-singletask(-task[1-5])?-v0"
)
MANIPULATION = ("cube", "scene", "puzzle")  # beginnings of the ids of a robot arm's tasks
# What tasks/make.py makes
CAN_BE_MADE = re.compile(
    r"pointmaze-(medium|large|giant|teleport)-(navigate|stitch)-v0"
    r"|(cube-(single|double|triple|quadruple|octuple)|scene|puzzle-(3x3|4x4|4x5|4x6))-(play|noisy)-v0"
)


class OGBenchEnv(gym.Wrapper):
    """An OGBench task whose reward is 1 where it is solved, which ends the episode, and whose randomness is its seed's.

    The mazes draw from numpy's global state, teleporting ones also in their steps: each copy has a state of its own.
    """

    def __init__(self, env: gym.Env, sparse: bool = False):
        super().__init__(env)
        self.sparse = sparse
        self.random_state = np.random.RandomState(0).get_state()

    @contextlib.contextmanager
    def _own_randomness(self) -> Iterator[None]:
        outside = np.random.get_state()
        np.random.set_state(self.random_state)
        try:
            yield
        finally:
            self.random_state = np.random.get_state()
            np.random.set_state(outside)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        if seed is not None:
            self.random_state = np.random.RandomState(seed).get_state()
            self.action_space.seed(seed)
        with self._own_randomness():
            return self.env.reset(seed=seed, options=options)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        with self._own_randomness():
            obs, reward, terminated, truncated, info = self.env.step(action)
        solved = bool(info["success"])
        data_reward = -float(reward != 0) if self.sparse else reward
        return obs, float(solved), terminated or solved, truncated, {**info, "data_reward": data_reward}


def register() -> None:
    """Register OGBench's environments. Raises UserError if it is missing."""
    if not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "disabled")  # nothing is drawn, and GLFW would complain
    try:
        import ogbench  # noqa: F401
    except ImportError:
        raise UserError("this task needs OGBench: pip install -r requirements-dev.txt") from None


def make_env(gym_id: str, sparse: bool = False) -> gym.Env:
    """The environment of a single task. Raises UserError if OGBench is missing or does not know it."""
    register()
    try:
        return OGBenchEnv(check_env(gym.make(gym_id), gym_id), sparse)
    except gym.error.UnregisteredEnv as error:
        raise UserError(f"OGBench has no {gym_id} ({line(error)[:100]}): see its list of environments") from None


def load(env_id: str, sparse: bool = False) -> Task:
    """A single task with its file, which is downloaded if it is missing; `sparse`: rewards -1 and 0 alone. Raises UserError."""
    name, kind, number = ID.fullmatch(env_id).groups()
    gym_id, file_name = f"{name}-singletask{number or ''}-v0", f"{name}-{kind}-v0.npz"
    env = make_env(gym_id)
    import ogbench.relabel_utils

    file = folder("OGBENCH_DATASET_DIR", ".ogbench/data") / file_name
    advice = f"{env_id}: put {file_name} into {file.parent}"
    if CAN_BE_MADE.fullmatch(file.stem):
        advice += f", or make it: python -m tasks.make {file.stem}"
    fetch("OGBENCH_BASE_URL", SOURCES, file_name, file, advice, lambda part: np.load(part).close(), MIRROR)
    try:
        with np.load(file) as archive:
            about = json.loads(str(archive["about"])) if "about" in archive else {}
        arrays = ogbench.utils.load_dataset(str(file), add_info=True)
        ogbench.relabel_utils.relabel_dataset(gym_id, env, arrays)
    except Exception as error:  # numpy and zipfile raise many kinds on wrong bytes
        advice = "if it is damaged, delete it to download it again"
        raise UserError(f"{file} cannot be read as an OGBench file ({line(error)[:200]}): {advice}") from None
    finally:
        env.close()
    columns = ("observations", "actions", "rewards", "masks", "next_observations")
    obs, actions, rewards, masks, next_obs = (np.asarray(arrays[column], np.float32) for column in columns)
    same = len(obs) == len(actions) == len(rewards) == len(masks) == len(next_obs) and obs.ndim == actions.ndim == 2
    check(same, f"{file}: its columns differ in length or dimensions: delete it to download it again")
    return Task(
        obs,
        actions,
        -(rewards != 0).astype(np.float32) if sparse else rewards,
        1 - masks,  # not `terminals`, which end trajectories without ending the task
        next_obs,
        make_env=functools.partial(make_env, gym_id, sparse),
        score=lambda returns: 100 * returns,
        score_name="success rate",
        max_copies=16 if name.startswith(MANIPULATION) else evaluation.MAX_COPIES,  # the arm takes 180 MB
        sparse_goal=False,  # its rewards are already -1 and 0, or minus the number of subgoals left
        origin=f"{file} (made at home, {', '.join(f'{key} {value}' for key, value in about.items())})" if about else str(file),
    )
