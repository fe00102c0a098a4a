"""A task: offline data, evaluation environment and score. Reading and checking what all kinds of tasks share."""

import contextlib
import functools
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import h5py
import numpy as np

import evaluation
from common import UserError, check, line

KEYS = {"observations": 2, "actions": 2, "rewards": 1, "terminals": 1}  # columns of a file of transitions, with their dimensions
# Columns that say where the task ended (no bootstrapping) or the episode was cut: D4RL's names, and Gymnasium's
ALIASES = {"terminals": ("terminations", "terminated", "terminateds"), "timeouts": ("truncations", "truncated", "truncateds")}


class Task(NamedTuple):
    """A task's offline data, its evaluation environment and its score.

    obs, next_obs (N, S); actions (N, A), scaled to [-1, 1]; rewards, terminals (N,): float32 arrays of N transitions.
    """

    obs: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminals: np.ndarray  # 1 where the task ended (no bootstrapping), else 0
    next_obs: np.ndarray
    make_env: Callable[[], gym.Env] | None  # flat observations, action space (A,); None without an environment
    score: Callable[[np.ndarray], np.ndarray]  # returns (n,) -> scores (n,)
    score_name: str
    sparse_goal: bool  # the reward is 1 at the goal, where the episode ends, and 0 elsewhere
    origin: str  # where the data came from
    action_low: np.ndarray | None = None  # (A,) bounds, of the environment if there is one
    action_high: np.ndarray | None = None
    obs_mean: np.ndarray | float = 0.0  # (S,) subtracted from observations, and what they are then divided by (--normalize)
    obs_std: np.ndarray | float = 1.0
    max_copies: int = evaluation.MAX_COPIES  # of the environment at a time, fewer where they need much memory

    def normalized(self, obs: np.ndarray) -> np.ndarray:
        """Observations of the environment (..., S) on the scale of `obs`."""
        return (obs - self.obs_mean) / self.obs_std

    @property
    def ends(self) -> np.ndarray:
        """Whether a row is the last of its trajectory, (N,): the next one does not begin at its next_obs (by more than 1e-6)."""
        jumps = np.linalg.norm(self.obs[1:].astype(np.float64) - self.next_obs[:-1], axis=1) > 1e-6
        return np.append(jumps, True)

    def fingerprint(self) -> int:
        """Checksum of the transitions, to see on `--resume` that they are the same."""
        return functools.reduce(lambda crc, array: zlib.crc32(np.ascontiguousarray(array), crc), self[:5], 0)


def read_columns(file: Path, columns: dict[str, int], own: bool = False) -> dict[str, np.ndarray]:
    """The columns of an HDF5 or npz file, by name; {name: dimensions}. Those of `KEYS` must be there.

    `own`: a user's file, which may have Gymnasium's names, and whose other columns are asked about or named.
    Raises UserError if the file cannot be read or if the columns do not fit together.
    """
    place = f"--data {file}" if own else str(file)
    try:
        with np.load(file) if zipfile.is_zipfile(file) else h5py.File(file) as source:
            if isinstance(source, h5py.File):
                check_inside(source, place)
            names, arrays = set(source), {}
            for name in columns:
                found = [alias for alias in (name, *(ALIASES.get(name, ()) if own else ())) if alias in names]
                check(len(found) < 2, f"{place} has {' and '.join(found)}: which of them is meant?")
                if found:
                    arrays[name] = _read_column(source, found[0], place)
                    names.remove(found[0])
            number = len(arrays.get("observations", ()))
            for name in sorted(names) if own else ():
                column = (
                    _read_column(source, name, place) if getattr(source[name], "shape", ()) in ((number,), (number, 1)) else 2
                )
                question = (
                    f"{place}: does {name}, a column of 0 and 1, mark ends of episodes? Call it terminals where the task ended, "
                )
                flags = bool(np.isin(column, (0, 1)).all() and np.any(column))
                check(not flags, question + "timeouts where the recording was cut, or remove it")
    except UserError:
        raise
    except Exception as error:  # h5py, numpy and zipfile raise many kinds on wrong bytes
        broken = not isinstance(error, MemoryError) and getattr(error, "errno", None) is None
        advice = "it is damaged: replace it" + ("" if own else ", or delete it to download it again")
        raise UserError(f"cannot read {place} ({line(error)[:200]})" + (f"; {advice}" if broken else "")) from None
    if own and names:
        print(f"{place}: columns that are not used: {', '.join(sorted(names))}", file=sys.stderr)
    missing = [name for name in KEYS if name not in arrays]
    check(not missing, f"{place} lacks {', '.join(missing)}: save the columns {', '.join(KEYS)}")
    for name, array in arrays.items():
        check(array.dtype.kind in "buif", f"{place}: {name} are not numbers ({array.dtype}): save them as float32")
        if columns[name] == 1 and array.ndim == 2 and array.shape[1] == 1:
            array = arrays[name] = array[:, 0]
        question = "is a row one number, or one of a series? Save it as (N, 1)" if array.ndim == 1 else "flatten each row"
        fits = array.ndim == columns[name]
        check(fits, f"{place}: {name} have shape {array.shape}, not {columns[name]} dimension(s): {question}")
        check(len(array) == number, f"{place}: {number} observations and {len(array)} {name}: which belong together?")
        if name in ALIASES:
            check(bool(np.isin(array, (0, 1)).all()), f"{place}: {name} hold values other than 0 and 1")
    return arrays


def _read_column(source: Any, name: str, place: str) -> np.ndarray:
    if isinstance(source, h5py.File):
        check(isinstance(source.get(name), h5py.Dataset), f"{place}: {name} is a group: give a column of numbers")
    return np.asarray(source[name][()])


def check_inside(group: h5py.Group, place: str) -> None:
    """Raise UserError for an HDF5 file in which anything is stored in another file: that is not the data that was given."""
    for name in group:
        item = group[name] if isinstance(group.get(name, getlink=True), h5py.HardLink) else None
        if isinstance(item, h5py.Group):
            check_inside(item, place)
        else:
            inside = isinstance(item, h5py.Dataset) and not item.external and not item.is_virtual
            check(inside, f"{place}: {name} is stored in another file: copy its numbers into this one")


def check_and_scale(task: Task) -> Task:
    """Refuse data that cannot be trained on; scale actions from the environment's bounds to [-1, 1]."""
    check(len(task.obs) > 0, f"{task.origin} holds no transitions: use a complete data set")
    for name in ("obs", "actions", "rewards", "terminals", "next_obs"):
        finite = bool(np.isfinite(getattr(task, name)).all())
        check(finite, f"{task.origin} holds NaN or infinite {name}: repair the data or download it again")
    if task.sparse_goal:
        question = "-1 and 0 would be shifted twice: add 1" if task.rewards.min() < 0 else "are they scaled?"
        check(bool(np.isin(task.rewards, (0, 1)).all()), f"{task.origin}: rewards must be 0 and 1 (at the goal) here; {question}")
    low, high = task.action_low, task.action_high
    if task.make_env is not None:
        obs_dim, (low, high), limit = _try_env(task.make_env)
        if limit is None or limit > 10_000:
            longest = int(np.diff(np.append(episode_starts(task), len(task.obs))).max())
            ends = "never cuts an episode" if limit is None else f"cuts episodes after {limit:,} steps"
            advice = f"the data's longest has {longest:,}. Evaluations may take for ever: --max-episode-steps limits them"
            if limit is None or limit > 10 * longest:
                print(f"note: the environment {ends}; {advice}", file=sys.stderr)
        fits = task.obs.shape[1] == obs_dim and task.actions.shape[1] == len(low)
        sizes = f"{task.obs.shape[1]} and actions of size {task.actions.shape[1]}, its environment {obs_dim} and {len(low)}"
        check(fits, f"{task.origin} has observations of size {sizes}: this is data of another task")
    wide, actions = high.astype(np.float64) - low, task.actions.astype(np.float64)
    check(
        bool(np.isfinite(wide).all() and (wide > 0).all()),
        f"action bounds {low} and {high} must be finite, the upper ones larger",
    )
    scaled = 2 * (actions - low) / wide - 1
    inside = bool((np.abs(scaled) <= 1 + 1e-4).all())
    whose = "the given" if task.make_env is None else "the environment's"
    check(inside, f"{task.origin} has actions outside {whose} bounds: repair the data or download it again")
    spread = np.ptp(actions, axis=0)
    scale = np.where(spread > 0, spread, np.abs(actions).max(0))
    step = np.finfo(np.float32).eps * wide  # between neighbouring actions near the bounds
    vary = f"{task.origin}: actions vary by {spread.min():.3g} within bounds that are {wide.max():.3g} apart"
    check(not ((scale > 0) & (step > 1e-3 * scale)).any(), f"{vary}, too wide for float32 to resolve: use narrower bounds")
    return task._replace(actions=scaled.clip(-1, 1).astype(np.float32), action_low=low, action_high=high)


def _try_env(make_env: Callable[[], gym.Env]) -> tuple[int, tuple[np.ndarray, np.ndarray], int | None]:
    """Size of observations, bounds of actions and steps per episode, after one step, so that errors show before any training.

    In a process of its own, which the environment may end.
    """
    try:
        with contextlib.closing(evaluation.LockstepEnvs(make_env, [0])) as envs:
            low, high, obs_dim, limit = envs.describe()
            envs.step(np.zeros(1, int), evaluation.to_env_units(np.zeros((1, len(low))), low, high))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the environment does not work: {line(error)[:400]}") from None
    return obs_dim, (low, high), limit


def check_actions(space: gym.Space, name: str) -> None:
    """Raise UserError unless actions are a bounded vector of floats."""
    fits = isinstance(space, gym.spaces.Box) and space.is_bounded() and len(space.shape) == 1 and space.dtype.kind == "f"
    check(fits, f"{name}: actions must be a bounded vector of floats (Box), not {space}; use a continuous task")


def check_env(env: gym.Env, name: str) -> gym.Env:
    """The environment, with flattened observations if they are no vector. Raises UserError for actions that are none."""
    check_actions(env.action_space, name)
    if not isinstance(env.observation_space, gym.spaces.Box) or len(env.observation_space.shape) != 1:
        env = gym.wrappers.FlattenObservation(env)
    return env


@contextlib.contextmanager
def temporary_files_removed() -> Iterator[None]:
    """gymnasium-robotics' mazes write their model to the temporary folder and leave it there."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory() as tempfile.tempdir:
        try:
            yield
        finally:
            tempfile.tempdir = before


def episode_starts(task: Task) -> np.ndarray:
    """The first row of each episode, as IQL counts them: after a terminal, and where a trajectory ends."""
    return np.concatenate(([0], np.flatnonzero((task.terminals == 1) | task.ends)[:-1] + 1))


def return_range(task: Task) -> float:
    """Largest minus smallest undiscounted return of an episode in the data. Raises UserError if all are equal."""
    returns = np.add.reduceat(task.rewards.astype(np.float64), episode_starts(task))
    check(
        bool(np.ptp(returns) > 0),
        f"{task.origin}: all {len(returns)} episodes have the same return, but rewards are divided by the range of returns: "
        "use a data set with better and worse episodes",
    )
    return float(np.ptp(returns))
