"""Tasks, each with its data, its environment and its score: D4RL's files, Minari's data sets, OGBench's single tasks, a file of
your own, and mazes that collect their own data."""

import difflib
import functools
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import numpy as np

from common import Args, UserError, check
from tasks import d4rl, mazes, minari, ogbench, own
from tasks.mazes import POINTMAZES
from tasks.ogbench import MANIPULATION
from tasks.task import Task, check_and_scale, return_range, temporary_files_removed

__all__ = [
    "MANIPULATION",
    "POINTMAZES",
    "Task",
    "check_id",
    "d4rl_id",
    "domain",
    "is_long",
    "is_ogbench",
    "load_task",
    "make_env",
    "return_range",
]

gym.logger.min_level = gym.logger.ERROR  # its warnings concern environments that no task here uses


def load_task(args: Args) -> Task:
    """The task of `--data` or `--env-id`, with actions scaled to [-1, 1].

    Raises UserError for an unknown id, and for data that is missing, damaged or does not fit the environment.
    """
    env_id = args.env_id
    check(not args.sparse_rewards or is_ogbench(env_id), "--sparse-rewards is for OGBench's tasks: leave it out")
    if args.data is not None:
        task = own.load(Path(args.data), env_id, args.action_low, args.action_high)
    else:
        check_id(env_id)
        bounds = args.action_low is not None or args.action_high is not None
        check(not bounds, f"--action-low and --action-high belong to --data: {env_id} has its own bounds")
        kind = _kind(env_id)
        task = ogbench.load(env_id, args.sparse_rewards) if kind is ogbench else kind.load(env_id)
    if args.max_episode_steps is not None and task.make_env is not None:
        task = task._replace(make_env=functools.partial(_limited, task.make_env, args.max_episode_steps))
    with temporary_files_removed():
        task = check_and_scale(task)
    if args.normalize:  # 1e-3 as in TD3+BC, for a dimension that never changes
        task = task._replace(obs_mean=task.obs.mean(0), obs_std=task.obs.std(0) + np.float32(1e-3))
        task = task._replace(obs=task.normalized(task.obs), next_obs=task.normalized(task.next_obs))
    return task


def make_env(args: Args) -> gym.Env | None:
    """The environment of a task; data are read only where they alone tell (Minari, OGBench, --data). Raises UserError."""
    kind = own if args.data is not None else _kind(args.env_id)
    if kind not in (d4rl, mazes):
        make = load_task(args).make_env
        return make and make()
    make = functools.partial(kind.make_env, args.env_id)
    return make() if args.max_episode_steps is None else _limited(make, args.max_episode_steps)


def _kind(env_id: str) -> ModuleType:
    return d4rl if env_id in d4rl.TASKS else ogbench if is_ogbench(env_id) else mazes if env_id in POINTMAZES else minari


def _limited(make_env: Callable[[], gym.Env], steps: int) -> gym.Env:
    return gym.wrappers.TimeLimit(make_env(), steps)


def check_id(env_id: str) -> None:
    """Raise UserError for an id that is none of D4RL's, Minari's, OGBench's single tasks' or the mazes'."""
    if env_id in d4rl.TASKS or is_ogbench(env_id) or minari.is_here(env_id):
        return
    if "/" in env_id:
        valid = re.fullmatch(r"(\w[\w.-]*/)+\w[\w.-]*-v\d+", env_id) and ".." not in env_id
        return check(bool(valid), f"unknown task {env_id}: a Minari id looks like D4RL/pen/human-v2, with its version")
    others = "visual-|powderworld-|.*(singletask|oraclerep|-navigate-|-stitch-|-explore-|-noisy-|-play-v0)"
    ids = "state-based single tasks, such as antmaze-large-navigate-singletask-v0 or cube-single-play-singletask-task2-v0"
    check(re.match(others, env_id) is None, f"unknown task {env_id}: OGBench's tasks here are {ids}")
    near = difflib.get_close_matches(env_id, d4rl.TASKS, 3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"D4RL ids look like {next(iter(d4rl.TASKS))}."
    raise UserError(f"unknown task {env_id}: {hint} A Minari id is D4RL/pen/human-v2, or that of a data set on this machine")


def d4rl_id(env_id: str) -> str | None:
    """The D4RL task of an id: itself, for a Minari id the D4RL task that is nearest to it, or None."""
    near = (name for name, task in d4rl.TASKS.items() if "/" in env_id and task.minari == env_id)
    return env_id if env_id in d4rl.TASKS else next(near, None)


def is_ogbench(env_id: str) -> bool:
    """Whether this is the id of one of OGBench's state-based single tasks."""
    return ogbench.ID.fullmatch(env_id) is not None


def is_long(env_id: str) -> bool:
    """Whether this is one of OGBench's long tasks, for which the field discounts by 0.995."""
    return re.search("giant|humanoidmaze|antsoccer", env_id) is not None


def domain(env_id: str) -> str:
    """The family of the D4RL task that `env_id` is or is nearest to: locomotion, antmaze, pen, kitchen; ogbench; "" for none."""
    if is_ogbench(env_id):
        return "ogbench"
    name = (d4rl_id(env_id) or "").split("-")[0]
    return "locomotion" if name in ("halfcheetah", "hopper", "walker2d") else name
