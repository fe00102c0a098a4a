"""A file of your own transitions, with a Gymnasium environment or without."""

import functools
from collections.abc import Sequence
from pathlib import Path

import gymnasium as gym
import numpy as np

from common import UserError, check, line
from tasks import d4rl
from tasks.task import ALIASES, KEYS, Task, check_env, read_columns


def load(file: Path, env_id: str, action_low: Sequence[float] | None, action_high: Sequence[float] | None) -> Task:
    """A file of transitions, HDF5 or npz, with the environment `env_id`, or without one if that is empty.

    Raises UserError for what cannot be read, and, with the open question, for what can be read in two ways.
    """
    arrays = _read(file)
    obs, terminals = arrays["observations"].astype(np.float32), arrays["terminals"].astype(bool)
    cut = arrays["timeouts"].astype(bool) if "timeouts" in arrays else np.zeros(len(obs), bool)
    rows, following = np.arange(len(obs)), np.minimum(np.arange(len(obs)) + 1, len(obs) - 1)
    if "next_observations" in arrays:
        next_obs = arrays["next_observations"].astype(np.float32)
    else:  # the next row, except for the last row of a trajectory, which is only kept if nothing follows it
        rows, next_obs = np.flatnonzero(~cut & (terminals | (following != rows))), obs[following]
    row, make_env, (low, high) = d4rl.TASKS.get(env_id), None, (None, None)
    if env_id:
        given = action_low is not None or action_high is not None
        check(not given, f"--action-low and --action-high are for --data without an environment: {env_id} has its own bounds")
        make_env = functools.partial(d4rl.make_env if row else _make_env, env_id)
        try:
            make_env().close()
        except (gym.error.Error, ImportError) as error:
            raise UserError(f"--env-id {env_id} with --data must be a registered Gymnasium id ({line(error)[:200]})") from None
    else:
        low, high = _bounds(file, arrays["actions"], action_low, action_high)
    return Task(
        obs[rows],
        arrays["actions"][rows],
        arrays["rewards"].astype(np.float32)[rows],
        terminals.astype(np.float32)[rows],
        next_obs[rows],
        make_env,
        score=row.score if row else lambda returns: returns,
        score_name="D4RL normalised score" if row else "return",
        sparse_goal=row is not None and env_id.startswith("antmaze"),
        origin=str(file),
        action_low=low,
        action_high=high,
    )


def _make_env(env_id: str) -> gym.Env:
    return check_env(gym.make(env_id), env_id)


def _read(file: Path) -> dict[str, np.ndarray]:
    """The columns of the file, by D4RL's names."""
    place = f"--data {file}"
    check(file.is_file(), f"{place}: there is no such file; give an HDF5 or npz file with {', '.join(KEYS)}")
    arrays = read_columns(file, {**KEYS, "timeouts": 1, "next_observations": 2}, own=True)
    kind = arrays["actions"].dtype
    check(kind.kind == "f", f"{place}: actions are {kind}: are they discrete? Continuous ones are float32")
    if "next_observations" in arrays:
        shapes = arrays["observations"].shape, arrays["next_observations"].shape
        check(shapes[0] == shapes[1], f"{place}: observations {shapes[0]} and next_observations {shapes[1]} differ in shape")
    ends, cuts = (arrays[name].astype(bool) if name in arrays else np.zeros(len(arrays["rewards"]), bool) for name in ALIASES)
    both = int((ends & cuts).sum())
    check(both == 0, f"{place}: {both} row(s) are terminal and timeout: did the task end there, or only the recording?")
    check(
        "next_observations" in arrays or bool(ends.any() or cuts.any()),
        f"{place}: no row is terminal or a timeout, and there are no next_observations: where does a trajectory end? Add "
        "timeouts with 1 in the last row of each",
    )
    return arrays


def _bounds(
    file: Path, actions: np.ndarray, low: Sequence[float] | None, high: Sequence[float] | None
) -> tuple[np.ndarray, np.ndarray]:
    check((low is None) == (high is None), "--action-low and --action-high belong together: give both, or none")
    size = actions.shape[1]
    if low is None:
        low, high = actions.min(0, initial=np.inf), actions.max(0, initial=-np.inf)
        constant = [str(i) for i in range(size) if low[i] == high[i]]
        question = f"action(s) {', '.join(constant)} never change: what are the bounds? Give --action-low, --action-high"
        check(not constant, f"--data {file}: {question}")
        show = lambda bound: " ".join(f"{value:g}" for value in bound)
        print(f"action bounds are the range of {file}: --action-low {show(low)} --action-high {show(high)}")
    for flag, bound in (("--action-low", low), ("--action-high", high)):
        check(len(bound) in (1, size), f"{flag} has {len(bound)} numbers, an action {size}: give one for all, or one for each")
    low, high = (np.broadcast_to(np.asarray(bound, np.float32), size).copy() for bound in (low, high))
    return low, high
