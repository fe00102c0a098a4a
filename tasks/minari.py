"""Minari's data sets, with their own environments."""

import contextlib
import functools
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import gymnasium as gym
import h5py
import numpy as np

from common import UserError, check, line
from tasks.download import folder
from tasks.task import Task, check_actions, check_env, check_inside, temporary_files_removed

# The environment of a data set may only name code of these packages, or an environment that is registered
TRUSTED = ("gymnasium.", "gymnasium_robotics.", "minari.")
# Some environments continue at the goal, or reward a completed task again and again; evaluation does not
OPTIONS = {"continuing_task": False, "terminate_on_tasks_completed": True, "remove_task_when_completed": True}


def is_here(env_id: str) -> bool:
    """Whether there is a data set of this id, which needs no namespace, on this machine."""
    return re.fullmatch(r"\w[\w.-]*-v\d+", env_id) is not None and (_root() / env_id / "data").exists()


def _root() -> Path:
    return folder("MINARI_DATASETS_PATH", ".minari/datasets")


def load(env_id: str) -> Task:
    """A Minari data set, downloaded if it is missing. Raises UserError."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # Minari's server: the last of its retries says enough
    import minari

    root = _root()
    try:
        if not (root / env_id / "data").exists():
            print(f"downloading {env_id} with Minari")
            with _staged(root, env_id):
                minari.download_dataset(env_id)
        dataset = minari.load_dataset(env_id)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        reason = f"is neither in {root} nor can it be downloaded ({line(error)[:300]})"
        raise UserError(f"Minari data set {env_id} {reason}: `minari list remote` shows what there is") from None
    check_actions(dataset.action_space, env_id)
    spec = dataset._eval_env_spec or dataset.env_spec
    if spec is None:
        print(f"note: {env_id} names no environment: training without evaluation", file=sys.stderr)
        options, sparse_goal, observation_space = {}, False, dataset.observation_space
    else:
        options, sparse_goal, observation_space = _inspect(env_id, spec)

    parts: dict[str, list[np.ndarray]] = {"obs": [], "actions": [], "rewards": [], "terminals": [], "next_obs": []}
    try:
        if (file := root / env_id / "data" / "main_data.hdf5").exists():
            with h5py.File(file) as source:
                check_inside(source, str(file))
        for episode in dataset.iterate_episodes():
            obs, terminals = flatten(observation_space, episode.observations), np.array(episode.terminations, np.float32)
            steps = len(episode.rewards)
            same = steps == len(episode.actions) == len(terminals) and steps <= len(obs)
            check(same, f"{env_id}: episode {episode.id} has {steps} rewards and another number of actions, ends or observations")
            length = min(steps, len(obs) - 1)  # a last step without a next observation is dropped
            if sparse_goal and (episode.rewards[:length] > 0).any():
                # AntMaze's data continues after the goal: the task ends at the first success
                length = int(np.argmax(episode.rewards > 0)) + 1
                terminals[length - 1] = 1
            columns = (obs, episode.actions, episode.rewards, terminals, obs[1:])
            for part, column in zip(parts.values(), columns):
                part.append(column[:length])
    except UserError:
        raise
    except Exception as error:  # h5py and Minari raise many kinds on wrong bytes
        raise UserError(f"{env_id} in {root} cannot be read ({line(error)[:200]}): download it again") from None
    check(bool(parts["obs"]), f"{env_id} holds no transitions: use a complete data set")

    low, high = (dataset.storage.metadata.get(f"ref_{bound}_score") for bound in ("min", "max"))
    known = low is not None and high is not None
    valid = not known or bool(np.isfinite([low, high]).all()) and low < high
    check(valid, f"{env_id}: its reference scores, {low} and {high}, are no scale: repair its metadata, or remove them")
    arrays = {name: np.concatenate(part) for name, part in parts.items()}
    return Task(
        **{name: array if name == "actions" else array.astype(np.float32) for name, array in arrays.items()},
        make_env=functools.partial(_make_env, env_id, spec, options) if spec else None,
        score=(lambda returns: 100 * (returns - low) / (high - low)) if known else (lambda returns: returns),
        score_name="Minari normalised score" if known else "return",
        sparse_goal=sparse_goal,
        origin=f"Minari {env_id}",
        action_low=dataset.action_space.low,
        action_high=dataset.action_space.high,
    )


def _inspect(env_id: str, spec: gym.envs.registration.EnvSpec) -> tuple[dict[str, bool], bool, gym.Space]:
    """The options that its environment has, whether it is a sparse maze, and its observations, with the order of their keys."""
    for entry in (spec, *(spec.additional_wrappers or ())):
        _check_trusted(env_id, entry)
    try:
        with temporary_files_removed(), contextlib.closing(gym.make(spec)) as env:
            options = {name: value for name, value in OPTIONS.items() if hasattr(env.unwrapped, name)}
            return options, "continuing_task" in options and env.unwrapped.reward_type == "sparse", env.observation_space
    except Exception as error:
        raise UserError(f"{env_id}: its environment cannot be made ({line(error)[:300]}): install what it needs") from None


def _make_env(name: str, spec: gym.envs.registration.EnvSpec, options: dict[str, Any]) -> gym.Env:
    with temporary_files_removed():
        return check_env(gym.make(spec, **options), name)


def _check_trusted(env_id: str, entry: Any) -> None:
    """Raise UserError unless the code that a data set's environment or wrapper names may be run."""
    registered = gym.registry.get(getattr(entry, "id", None))
    trusted = str(entry.entry_point).startswith(TRUSTED) or registered and registered.entry_point == entry.entry_point
    allowed = entry.entry_point in os.environ.get("DTQL_TRUSTED_CODE", "").split(",")
    check(
        bool(trusted or allowed),
        f"{env_id}: its file asks to run {entry.entry_point}, which is code outside Gymnasium and Minari; if you trust it, set "
        f"DTQL_TRUSTED_CODE={entry.entry_point}",
    )


@contextlib.contextmanager
def _staged(root: Path, env_id: str) -> Iterator[None]:
    """Let Minari write a data set into a folder of its own, which is moved into place when it is complete."""
    staging = root / f".incomplete-{env_id.replace('/', '-')}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{staging}.lock"):
            shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed
            staging.mkdir()
            os.environ["MINARI_DATASETS_PATH"] = str(staging)
            yield
            (root / env_id).parent.mkdir(parents=True, exist_ok=True)
            if not (root / env_id).exists():  # another process may have been faster
                (staging / env_id).rename(root / env_id)
    except OSError as error:
        raise UserError(f"cannot write {env_id} to {root} ({line(error)}): set MINARI_DATASETS_PATH") from None
    finally:
        os.environ["MINARI_DATASETS_PATH"] = str(root)
        shutil.rmtree(staging, ignore_errors=True)


def flatten(space: gym.Space, rows: Any) -> np.ndarray:
    """Rows of observations (T, ...), nested as in `space`, as (T, S), in the order of FlattenObservation."""
    if isinstance(space, gym.spaces.Dict):
        return np.concatenate([flatten(sub, rows[key]) for key, sub in space.spaces.items()], axis=1)
    if isinstance(space, gym.spaces.Tuple):
        return np.concatenate([flatten(sub, row) for sub, row in zip(space.spaces, rows)], axis=1)
    if isinstance(space, gym.spaces.Box):
        return np.asarray(rows).reshape(len(rows), -1)
    return np.stack([gym.spaces.flatten(space, row) for row in rows])
