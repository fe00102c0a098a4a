"""What the scripts share: command line, tasks (data, environment, score), lock-step evaluation, the folder of a run,
checkpoints and CUDA graphs. Nothing here knows the algorithms."""

import contextlib
import csv
import dataclasses
import difflib
import functools
import importlib.metadata
import io
import json
import logging
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import time
import urllib.request
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import h5py
import numpy as np
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import d4rl_tasks

gym.logger.min_level = gym.logger.ERROR  # its warnings concern environments that no task here uses

DEMO_ID = "dtql/pointmaze-umaze-v0"


class UserError(Exception):
    """Something the user can mend. The message is one line that says what to do."""


# ---- command line --------------------------------------------------------------------------------------------------


def parse_args(cls: type, task_defaults: Callable[[str], dict[str, Any]], run_defaults: Callable[[Any], dict[str, Any]],
               argv: Sequence[str] | None = None) -> Any:
    """Parse the command line into the dataclass `cls`, whose real defaults depend on the task and on each other.

    `task_defaults(env_id)` gives the fields in which the task differs from `cls`, `run_defaults(args)` those that follow
    from the other arguments. With `--resume RUN_DIR` the defaults are the settings of that run. Exits with status 2 and
    one line on stderr if the arguments cannot be parsed.
    """
    first = dataclasses.make_dataclass("First", [("env_id", str, cls.env_id), ("resume", str | None, None)])
    given, _ = cli(first, argv, return_unknown_args=True, add_help=False)
    settings = _resumed_settings(cls, given.resume) if given.resume else task_defaults(given.env_id)
    settings = {"env_id": given.env_id, **settings, "resume": given.resume}
    args = cli(cls, argv, default=cls(**settings))
    return args if given.resume else cli(cls, argv, default=cls(**{**settings, **run_defaults(args)}))


def cli(cls: type, argv: Sequence[str] | None = None, **options: Any) -> Any:
    """`tyro.cli`, but what is wrong with the arguments is one line on stderr. Exits with status 2 after it."""
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(cls, args=argv, description=cls.__doc__, **options)
    except SystemExit as exit:
        if exit.code == 2:  # tyro draws a box: keep its message, drop the frame, the title and the help text
            lines = [line.strip("│╭╮╰╯─ ") for line in captured.getvalue().splitlines()]
            body = lines[1 : lines.index("", 1)] if "" in lines[1:] else lines
            print(f"error: {' '.join(body)} (see --help)", file=sys.stderr)
        raise


def _resumed_settings(cls: type, run_dir: str) -> dict[str, Any]:
    config = _read_config(run_dir)
    check(config["args"].keys() == {field.name for field in dataclasses.fields(cls)},
          f"--resume {run_dir}: the settings there are not this script's; resume it with {config['exp_name']}.py")
    # A run of a machine with a GPU may go on without one (--no-cuda)
    return {**config["args"], "cudagraphs": config["args"]["cudagraphs"] and torch.cuda.is_available()}


def run(main: Callable[[Any], Any], parse: Callable[[], Any]) -> None:
    """Run `main(parse())` as a program: a `UserError` becomes one line on stderr and exit status 2."""
    try:
        main(parse())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def progress_bar(**kwargs: Any) -> tqdm:
    """A tqdm bar that draws often on a terminal and seldom in a log file."""
    return tqdm(mininterval=0.2 if sys.stderr.isatty() else 30, **kwargs)


def check(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def find_device(cuda: bool, cudagraphs: bool) -> torch.device:
    """The device to train on. Raises UserError if a GPU is asked for and there is none."""
    for flag, wanted in (("cuda", cuda), ("cudagraphs", cudagraphs)):
        check(not wanted or torch.cuda.is_available(),
              f"--{flag}: PyTorch finds no usable GPU here; train on the CPU with --no-{flag}")
    return torch.device("cuda" if cuda else "cpu")


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed PyTorch and choose whether its kernels must be deterministic."""
    # cuBLAS needs this for reproducible results; filling uninitialised memory is for debugging and costs time
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(deterministic)
    torch.manual_seed(seed)


# ---- tasks: data, environment, score -------------------------------------------------------------------------------


class Task(NamedTuple):
    """A task's offline data, its evaluation environment and its score.

    obs, next_obs (N, S); actions (N, A), scaled to [-1, 1]; rewards, terminals (N,): float32 arrays of N transitions.
    """

    obs: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminals: np.ndarray  # 1 where the episode really ended (no bootstrapping), else 0
    next_obs: np.ndarray
    make_env: Callable[[], gym.Env]  # flat observations, action space (A,)
    score: Callable[[np.ndarray], np.ndarray]  # returns (n,) -> scores (n,)
    score_name: str
    sparse_goal: bool  # the reward is 1 at the goal, where the episode ends, and 0 elsewhere
    origin: str  # where the data came from

    def fingerprint(self) -> int:
        """Checksum of the transitions, to tell on `--resume` that they are still the same."""
        return functools.reduce(lambda crc, array: zlib.crc32(np.ascontiguousarray(array), crc), self[:5], 0)


def d4rl_id(env_id: str) -> str | None:
    """The D4RL task of an id: itself, for a Minari id the D4RL task that it is nearest to, or None.

    Raises UserError for an id that is neither D4RL's nor Minari's.
    """
    if "/" in env_id:
        check(re.search(r"-v\d+$", env_id) is not None, f"unknown task {env_id}: a Minari id ends in its version, like -v2")
        return next((name for name, task in d4rl_tasks.TASKS.items() if task.minari == env_id), None)
    near = difflib.get_close_matches(env_id, d4rl_tasks.TASKS, 3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"D4RL ids look like {next(iter(d4rl_tasks.TASKS))}."
    check(env_id in d4rl_tasks.TASKS, f"unknown task {env_id}: {hint} Minari ids contain a slash")
    return env_id


def load_task(env_id: str) -> Task:
    """Load a D4RL id (D4RL's file and environment) or an id with a slash (Minari's data and its own environment).

    Raises UserError for an unknown id and for data that is missing, broken or does not fit the environment.
    """
    return _check_and_scale(_load_minari(env_id) if d4rl_id(env_id) != env_id else _load_d4rl(env_id))


def _check_and_scale(task: Task) -> Task:
    """Refuse data that cannot be trained on; scale actions from the environment's bounds to [-1, 1]."""
    check(len(task.obs) > 0, f"{task.origin} holds no transitions: give a complete data set")
    for name in ("obs", "actions", "rewards", "next_obs"):
        check(bool(np.isfinite(getattr(task, name)).all()),
              f"{task.origin} holds NaN or infinite {name}: repair the data or fetch it again")
    env = task.make_env()
    obs_dim, space = env.observation_space.shape[0], env.action_space
    env.close()
    check(task.obs.shape[1] == obs_dim and task.actions.shape[1] == space.shape[0],
          f"{task.origin} has observations of size {task.obs.shape[1]} and actions of size {task.actions.shape[1]}, its "
          f"environment {obs_dim} and {space.shape[0]}: this is data of another task")
    actions = 2 * (task.actions - space.low) / (space.high - space.low) - 1
    check(bool((np.abs(actions) <= 1 + 1e-4).all()),
          f"{task.origin} has actions outside the environment's bounds: repair the data or fetch it again")
    return task._replace(actions=actions.clip(-1, 1).astype(np.float32))


def _check_env(env: gym.Env, name: str) -> gym.Env:
    """Flatten dictionary observations; insist on a bounded Box of actions."""
    check(isinstance(env.action_space, gym.spaces.Box) and env.action_space.is_bounded() and
          len(env.action_space.shape) == 1,
          f"{name}: actions must be a bounded vector (Box), not {env.action_space}; take a continuous task")
    if not isinstance(env.observation_space, gym.spaces.Box) or len(env.observation_space.shape) != 1:
        env = gym.wrappers.FlattenObservation(env)
    return env


def d4rl_transitions(file: Path, limit: int) -> dict[str, np.ndarray]:
    """Transitions of a D4RL HDF5 file, exactly those of d4rl's `qlearning_dataset`, float32.

    next_obs is the next row's observation. Where an episode is cut (`timeouts`, or without that key after `limit`
    steps) there is none, and the row is dropped even if it is also terminal. The last row only serves as next_obs.
    Raises UserError if the file is not HDF5, cut off, lacks a key, or if the keys disagree in length.
    """
    try:
        with h5py.File(file) as data:
            keys = {"observations": 2, "actions": 2, "rewards": 1, "terminals": 1}
            arrays = {key: data[key][:] for key in (*keys, "timeouts") if key in data}
    except (OSError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is not a complete HDF5 file ({_line(error)}): delete it to download it again") from None
    missing = [key for key in keys if key not in arrays]
    check(not missing, f"{file} lacks the key(s) {', '.join(missing)}: delete it to download it again")
    for key, dimensions in keys.items():
        check(arrays[key].ndim == dimensions and len(arrays[key]) == len(arrays["observations"]),
              f"{file}: {key} has shape {arrays[key].shape}, which does not fit observations "
              f"{arrays['observations'].shape}: this is not D4RL's format")
    terminals = arrays["terminals"].astype(bool)
    if "timeouts" in arrays:
        final = arrays["timeouts"].astype(bool)
        check(final.shape == terminals.shape, f"{file}: timeouts has shape {final.shape}, terminals {terminals.shape}")
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
        "actions": arrays["actions"][kept].astype(np.float32),
        "rewards": arrays["rewards"][kept].astype(np.float32),
        "terminals": terminals[kept].astype(np.float32),
        "next_obs": observations[kept + 1],
    }


def _make_d4rl_env(env_id: str) -> gym.Env:
    return gym.make(gym.spec(f"d4rl/{env_id}"))  # a spec, because gym.make(id) warns that v2 is newer than v0


def _load_d4rl(env_id: str) -> Task:
    row = d4rl_tasks.TASKS[env_id]
    folder = Path(os.environ.get("D4RL_DATASET_DIR") or Path.home() / ".d4rl" / "datasets")
    file = folder / row.file
    if not file.exists():
        base = os.environ.get("D4RL_BASE_URL", "http://rail.eecs.berkeley.edu/datasets/offline_rl/")
        near = f"; the nearest Minari data set, {row.minari}, is different data" if row.minari else ""
        download(f"{base.rstrip('/')}/{row.path}", file, f"{env_id}: put {row.file} into {folder}{near}")
    return Task(
        **d4rl_transitions(file, row.limit),
        make_env=functools.partial(_make_d4rl_env, env_id),
        score=lambda returns: 100 * (returns - row.min_score) / (row.max_score - row.min_score),
        score_name="D4RL normalised score",
        sparse_goal=env_id.startswith("antmaze"),
        origin=str(file),
    )


def download(url: str, file: Path, advice: str) -> None:
    """Fetch an HDF5 file with a progress bar. `file` appears only when it is complete and readable.

    Raises UserError, ending in `advice`, if the server cannot be reached or sends something else.
    """
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as response, open(part, "wb") as target:
            size = int(response.headers.get("Content-Length", 0))
            with progress_bar(total=size or None, unit="B", unit_scale=True, desc=file.name, disable=None) as progress:
                while chunk := response.read(1 << 20):
                    target.write(chunk)
                    progress.update(len(chunk))
        if size and part.stat().st_size != size:
            raise OSError(f"{part.stat().st_size} of {size} bytes arrived")
        h5py.File(part).close()
        part.replace(file)
    except (OSError, ValueError) as error:  # URLError, timeouts and "not HDF5" are all OSErrors
        raise UserError(f"cannot download {url} ({_line(error)}). {advice}") from None
    finally:
        part.unlink(missing_ok=True)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _load_minari(env_id: str) -> Task:
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # Minari's server: the last of its retries says enough
    import minari

    try:
        if not (_minari_root() / env_id / "data").exists():
            if env_id == DEMO_ID:
                collect_demo()
            else:
                print(f"downloading {env_id} with Minari")
                with _staged_minari(env_id):
                    minari.download_dataset(env_id)
        dataset = minari.load_dataset(env_id)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"Minari data set {env_id} is neither in {_minari_root()} nor can it be downloaded "
                        f"({_line(error)}): `minari list remote` shows what there is") from None
    check(isinstance(dataset.action_space, gym.spaces.Box),
          f"{env_id}: actions must be a bounded vector (Box), not {dataset.action_space}; take a continuous task")
    # Where the data's environment goes on at the goal, or pays a finished task again and again, evaluation does not
    options = {"continuing_task": False, "terminate_on_tasks_completed": True, "remove_task_when_completed": True}
    try:
        env = dataset.recover_environment(eval_env=True)
        options = {name: value for name, value in options.items() if hasattr(env.unwrapped, name)}
        make_env = functools.partial(_make_minari_env, env_id, env.spec, options)
        sparse_goal = "continuing_task" in options and env.unwrapped.reward_type == "sparse"
        env.close()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{env_id}: its environment cannot be made ({_line(error)}): install what it needs") from None

    parts: dict[str, list[np.ndarray]] = {"obs": [], "actions": [], "rewards": [], "terminals": [], "next_obs": []}
    try:
        for episode in dataset.iterate_episodes():
            obs = _flatten(dataset.observation_space, episode.observations)
            terminals, length = np.array(episode.terminations, np.float32), len(episode.rewards)
            if sparse_goal and (episode.rewards > 0).any():
                # AntMaze's data goes on after the goal: the task ends at the first success
                length = int(np.argmax(episode.rewards > 0)) + 1
                terminals[length - 1] = 1
            parts["obs"].append(obs[:length])
            parts["actions"].append(episode.actions[:length])
            parts["rewards"].append(episode.rewards[:length])
            parts["terminals"].append(terminals[:length])
            parts["next_obs"].append(obs[1 : length + 1])
    except (OSError, KeyError, ValueError, AttributeError) as error:
        raise UserError(f"{env_id} in {_minari_root()} is damaged ({_line(error)}): delete it and fetch it again") from None
    check(bool(parts["obs"]), f"{env_id} holds no transitions: give a complete data set")

    low, high = (dataset.storage.metadata.get(f"ref_{bound}_score") for bound in ("min", "max"))
    known = low is not None and high is not None
    return Task(
        **{name: np.concatenate(arrays).astype(np.float32) for name, arrays in parts.items()},
        make_env=make_env,
        score=(lambda returns: 100 * minari.get_normalized_score(dataset, returns)) if known else (lambda returns: returns),
        score_name="Minari normalised score" if known else "return",
        sparse_goal=sparse_goal,
        origin=f"Minari {env_id}",
    )


def _minari_root() -> Path:
    return Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")


@contextlib.contextmanager
def _staged_minari(env_id: str) -> Iterator[None]:
    """Let Minari write data set `env_id` to a folder of its own; it is moved to its place when it is whole."""
    root = _minari_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=root, prefix=".incomplete-"))
    except OSError as error:
        raise UserError(f"cannot write {env_id} to {root} ({_line(error)}): set MINARI_DATASETS_PATH") from None
    try:
        os.environ["MINARI_DATASETS_PATH"] = str(staging)
        yield
        (root / env_id).parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # it is there by now: another run was faster
            (staging / env_id).rename(root / env_id)
    finally:
        os.environ["MINARI_DATASETS_PATH"] = str(root)
        shutil.rmtree(staging, ignore_errors=True)


def _make_minari_env(name: str, spec: gym.envs.registration.EnvSpec, options: dict[str, Any]) -> gym.Env:
    return _check_env(gym.make(spec, **options), name)


def _flatten(space: gym.Space, rows: Any) -> np.ndarray:
    """Rows of observations (T, ...), nested as in `space`, as (T, S), in the order of FlattenObservation."""
    if isinstance(space, gym.spaces.Dict):
        return np.concatenate([_flatten(sub, rows[key]) for key, sub in space.spaces.items()], axis=1)
    if isinstance(space, gym.spaces.Tuple):
        return np.concatenate([_flatten(sub, row) for sub, row in zip(space.spaces, rows)], axis=1)
    if isinstance(space, gym.spaces.Box):
        return np.asarray(rows).reshape(len(rows), -1)
    return np.stack([gym.spaces.flatten(space, row) for row in rows])


# ---- the demo ------------------------------------------------------------------------------------------------------

DEMO_STEPS = 100_000
_DEMO_MAP = [[1, 1, 1, 1, 1], [1, "g", 0, 0, 1], [1, 1, 1, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]]
_DEMO_PATH = [(1, 1), (1, 2), (1, 3), (2, 3), (3, 3), (3, 2), (3, 1)]  # the U's free cells in walking order


def collect_demo() -> None:
    """Collect the demo's data into a local Minari data set: a point mass in a U-maze.

    A scripted controller (PD with noise) drives between random cells, as D4RL's maze2d data was made. The goal is one
    end of the U; evaluation starts at the other.
    """
    import minari

    with _staged_minari(DEMO_ID):
        evaluation_map = [list(row) for row in _DEMO_MAP]
        evaluation_map[3][1] = "r"
        make = functools.partial(gym.make, "PointMaze_UMaze-v3", continuing_task=False, disable_env_checker=True)
        env = minari.DataCollector(make(maze_map=_DEMO_MAP))
        maze, rng = env.unwrapped.maze, np.random.default_rng(0)
        with progress_bar(total=DEMO_STEPS, unit="step", desc="collecting the demo's data") as progress:
            steps = 0
            while steps < DEMO_STEPS:
                obs, _ = env.reset(seed=int(rng.integers(2**31)))
                done, path = False, []
                while not done:
                    position, velocity = obs["observation"][:2], obs["observation"][2:]
                    if not path:  # walk to another cell, through all the cells between
                        cell = tuple(int(i) for i in maze.cell_xy_to_rowcol(position))
                        here, there = _DEMO_PATH.index(cell), int(rng.integers(len(_DEMO_PATH)))
                        path = _DEMO_PATH[here : there + 1] or _DEMO_PATH[there : here + 1][::-1]
                    target = maze.cell_rowcol_to_xy(np.array(path[0]))
                    action = 10 * (target - position) - velocity + 0.5 * rng.standard_normal(2)
                    obs, _, terminated, truncated, _ = env.step(action.clip(-1, 1).astype(np.float32))
                    done = terminated or truncated
                    if np.linalg.norm(target - obs["achieved_goal"]) < 0.3:
                        path.pop(0)
                    steps += 1
                    progress.update()
        evaluation_env = make(maze_map=evaluation_map)
        env.create_dataset(DEMO_ID, eval_env=evaluation_env, algorithm_name="PD controller between random cells",
                           author="DTQL", author_email="none", code_permalink="none", ref_min_score=0.0,
                           ref_max_score=1.0, description="The demo task of the DTQL scripts")
        env.close()


# ---- evaluation ----------------------------------------------------------------------------------------------------


class _Shard:
    """Some environments, each running one episode at a time."""

    def __init__(self, make_env: Callable[[], gym.Env], seeds: Sequence[int]):
        self.envs = [make_env() for _ in seeds]
        # What is drawn once per instance (AntMaze v0's goal) must not depend on when a run was resumed
        self.reset(range(len(seeds)), seeds)

    def reset(self, indices: Sequence[int], seeds: Sequence[int]) -> tuple[np.ndarray]:
        return (np.stack([self.envs[index].reset(seed=int(seed))[0] for index, seed in zip(indices, seeds)]),)

    def step(self, indices: Sequence[int], actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        results = [self.envs[index].step(action)[:4] for index, action in zip(indices, actions)]
        obs, rewards, terminated, truncated = zip(*results)
        return np.stack(obs), np.array(rewards, np.float64), np.logical_or(terminated, truncated)

    def close(self) -> None:
        for env in self.envs:
            env.close()


def _serve(pipe: Any, inherited: list[Any], make_env: Callable[[], gym.Env], seeds: Sequence[int]) -> None:
    """A worker process: a `_Shard` behind a pipe, until the pipe closes."""
    for other in inherited:  # so that the pipes close with the main process, even if it is killed
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        shard = _Shard(make_env, seeds)
        pipe.send(())
        while True:
            method, *args = pipe.recv()
            pipe.send(getattr(shard, method)(*args))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    except Exception as error:
        pipe.send(error)


class LockstepEnvs:
    """Copies of an environment that step together, in worker processes if there are cores for it.

    Create it before the first CUDA call: workers are forked.
    """

    def __init__(self, make_env: Callable[[], gym.Env], seeds: Sequence[int], num_workers: int | None = None):
        """`seeds`: one for each copy. `num_workers`: below 2 all copies live in this process; None chooses by cores."""
        if num_workers is None:  # with fewer than 4 copies each, workers' messages cost more than they save
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            num_workers = min(cores - 1, len(seeds) // 4)
        self.num_copies, self.pipes, self.processes = len(seeds), [], []
        self.local = _Shard(make_env, seeds) if num_workers < 2 else None
        if self.local:
            return
        self.starts = np.linspace(0, len(seeds), num_workers + 1).astype(int)
        context = multiprocessing.get_context("fork")
        for start, stop in zip(self.starts, self.starts[1:]):
            ours, theirs = context.Pipe()
            self.pipes.append(ours)
            self.processes.append(context.Process(target=_serve, daemon=True,
                                                  args=(theirs, list(self.pipes), make_env, seeds[start:stop])))
            with warnings.catch_warnings():  # threads are no danger: workers use neither torch nor a lock of ours
                warnings.simplefilter("ignore", DeprecationWarning)
                self.processes[-1].start()
            theirs.close()
        for pipe in self.pipes:
            self._receive(pipe)

    @staticmethod
    def _receive(pipe: Any) -> tuple[np.ndarray, ...]:
        answer = pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _call(self, method: str, indices: np.ndarray, argument: np.ndarray) -> tuple[np.ndarray, ...]:
        if self.local:
            return getattr(self.local, method)(indices, argument)
        bounds, busy = np.searchsorted(indices, self.starts), []
        for pipe, offset, start, stop in zip(self.pipes, self.starts, bounds, bounds[1:]):
            if stop > start:
                pipe.send((method, indices[start:stop] - offset, argument[start:stop]))
                busy.append(pipe)
        return tuple(map(np.concatenate, zip(*[self._receive(pipe) for pipe in busy])))

    def reset(self, indices: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """Start an episode in the copies `indices` (m,), sorted, with `seeds` (m,): observations (m, S)."""
        return self._call("reset", indices, seeds)[0]

    def step(self, indices: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Step the copies `indices` (m,), sorted, with `actions` (m, A): obs (m, S), rewards (m,), done (m,)."""
        return self._call("step", indices, actions)

    def close(self) -> None:
        """Close the environments and end the worker processes."""
        if self.local:
            self.local.close()
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(timeout=5)
            if process.is_alive():
                process.terminate()


# So many copies at once keep a GPU and its cores busy; of the heaviest task (kitchen) they take 4 GiB
MAX_COPIES = 64


def make_lockstep_envs(task: Task, seed: int, num_models: int, num_episodes: int) -> LockstepEnvs:
    """The copies in which `run_episodes` evaluates `num_models` models in `num_episodes` episodes each."""
    copies = min(num_models * num_episodes, MAX_COPIES)
    return LockstepEnvs(task.make_env, np.random.SeedSequence(seed).generate_state(copies))


def run_episodes(
    envs: LockstepEnvs, act: Callable[[np.ndarray], np.ndarray], seeds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """One episode for every model and seed, in lock-step; every episode that starts counts once.

    Args:
        envs: the copies; copy c runs the episodes c, c + copies, c + 2 copies, ... one after another.
        act: observations (K, m, S) to actions (K, m, A) in the environment's units.
        seeds: (K, E) seeds of the episodes.

    Returns:
        returns (K, E), undiscounted, and lengths (K, E) in steps.
    """
    num_models = len(seeds)
    queue = seeds.T.ravel()  # the models take turns, so that each has about as many episodes running
    episode = np.arange(min(envs.num_copies, len(queue)))  # that each copy is running
    running = episode.copy()
    obs = envs.reset(running, queue[episode]).astype(np.float32)
    returns, lengths = np.zeros(len(queue)), np.zeros(len(queue), int)
    with progress_bar(total=len(queue), unit="episode", desc="evaluating", leave=False) as progress:
        while len(running):
            # Pack the observations into a rectangle (K, m, S); a model with fewer episodes running has rows to spare
            model = episode[running] % num_models
            same = model[:, None] == model
            column = np.tril(same, -1).sum(1)
            batch = np.zeros((num_models, column.max() + 1, obs.shape[1]), np.float32)
            batch[model, column] = obs[running]
            obs[running], rewards, done = envs.step(running, act(batch)[model, column])
            returns[episode[running]] += rewards
            lengths[episode[running]] += 1
            finished = running[done]
            episode[finished] += envs.num_copies
            again = finished[episode[finished] < len(queue)]
            if len(again):
                obs[again] = envs.reset(again, queue[episode[again]])
            running = running[episode[running] < len(queue)]
            progress.update(int(done.sum()))
    return returns.reshape(-1, num_models).T, lengths.reshape(-1, num_models).T


def episode_seeds(seeds: Sequence[int], epoch: int, num_episodes: int) -> np.ndarray:
    """(K, E) seeds of an evaluation's episodes: model i's are those it would get if trained alone."""
    return np.array([np.random.SeedSequence([seed, epoch]).generate_state(num_episodes) for seed in seeds])


def evaluate(task: Task, envs: LockstepEnvs, act: Callable[[np.ndarray], np.ndarray], seeds: Sequence[int], epoch: int,
             num_episodes: int) -> list[dict[str, Any]]:
    """`run_episodes` of the models trained from `seeds`, as rows of eval.csv, one per model."""
    start = time.perf_counter()
    returns, lengths = run_episodes(envs, act, episode_seeds(seeds, epoch, num_episodes))
    scores, seconds = task.score(returns), time.perf_counter() - start
    return [
        {"epoch": epoch, "seed": seed, "return_mean": returns[i].mean(), "return_std": returns[i].std(),
         "score_mean": scores[i].mean(), "score_std": scores[i].std(), "length_mean": lengths[i].mean(),
         "episodes": num_episodes, "eval_seconds": seconds}
        for i, seed in enumerate(seeds)
    ]


# ---- a run's folder ------------------------------------------------------------------------------------------------

EVAL_FIELDS = ("epoch", "seed", "return_mean", "return_std", "score_mean", "score_std", "length_mean", "episodes",
               "train_seconds", "eval_seconds")


def write_atomically(file: Path, write: Callable[[Path], None]) -> None:
    """`write` a temporary file, flush it to disk and rename it to `file`: a kill leaves the old one or the new one."""
    temporary = file.with_name(file.name + ".tmp")
    write(temporary)
    with open(temporary, "rb") as written:
        os.fsync(written.fileno())
    temporary.replace(file)


def load_checkpoint(file: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """A checkpoint as saved. Raises UserError if the file is missing or damaged."""
    try:
        return torch.load(file, map_location=device, weights_only=True)
    except Exception as error:
        raise UserError(f"cannot read the checkpoint {file} ({_line(error)[:200]}): give the checkpoint.pt of a run") from None


def _read_config(run_dir: str) -> dict[str, Any]:
    """config.json of a run. Raises UserError if the folder is not a run."""
    try:
        config = json.loads((Path(run_dir) / "config.json").read_text())
        return {key: config[key] for key in ("exp_name", "args", "data")}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--resume {run_dir}: no run is there; give a folder that has config.json and checkpoint.pt") from None


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM, raised where nothing is half done."""


class Run:
    """A run's folder and everything that is written there, with the progress bar. Use it as a context.

    On SIGINT or SIGTERM the run ends at the next call of `check_stop`, with a checkpoint.
    """

    def __init__(self, exp_name: str, args: Any, task: Task, agent: Any, device: torch.device, total_steps: int):
        """Make the folder, or with `args.resume` load its checkpoint into `agent`. Raises UserError if it cannot.

        `agent` has state_dict() and load_state_dict(), `metrics` (names) and `sums` (metrics, K), which add up.
        """
        self.args, self.agent, self.score_name, self.total_steps = args, agent, task.score_name, total_steps
        self.step, self.train_seconds, self.rows, self.logged_step, self.saved_step = 0, 0.0, [], 0, -1
        settings = dataclasses.asdict(args)
        data = {"origin": task.origin, "transitions": len(task.obs), "fingerprint": task.fingerprint(),
                "score": task.score_name}
        if args.resume:
            self.dir = Path(args.resume)
            config = _read_config(args.resume)
            # Only the hardware and the place may change
            free = {"resume": None, "run_dir": None, "cuda": None, "compile": None, "cudagraphs": None}
            before, now = ({"script": name, **values, **free}
                           for name, values in ((config["exp_name"], config["args"]), (exp_name, settings)))
            for name, value in now.items():
                check(name in before and before[name] == value,
                      f"--resume {self.dir}: that run has {name} = {before.get(name)}, not {value}; leave the flag out")
            check(config["data"]["fingerprint"] == data["fingerprint"],
                  f"--resume {self.dir}: {task.origin} is not the data that the run began with; put that back")
            self._load(load_checkpoint(self.dir / "checkpoint.pt", device), device)
        else:
            self.dir = _create_run_dir(args.run_dir, args.env_id, exp_name, args.seed)
            packages = ("numpy", "gymnasium", "gymnasium-robotics", "mujoco", "minari")
            versions = {package: importlib.metadata.version(package) for package in packages}
            name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
            config = {"exp_name": exp_name, "args": settings, "data": data, "device": name,
                      "versions": {"python": platform.python_version(), "torch": torch.__version__, **versions}}
            write_atomically(self.dir / "config.json", lambda file: file.write_text(json.dumps(config, indent=2)))
            self.save()
        if not args.cuda and not torch.cuda.is_available():
            print("no GPU found: training on the CPU", file=sys.stderr)
        print(f"{self.dir}: {args.num_seeds} model(s), {len(task.obs):,} transitions from {task.origin}, on {device}")

    def __enter__(self) -> "Run":
        self._stop = False
        self._handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        # A killed run may have logged beyond its last checkpoint: those events are dropped
        self.writer = SummaryWriter(str(self.dir), purge_step=self.step + 1 if self.step else None)
        self.progress = progress_bar(total=self.total_steps, initial=self.step, unit="update", smoothing=0.05)
        self._clock = time.perf_counter()
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        self.progress.close()
        self.writer.close()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if kind is Interrupted:
            self.save()
            print(f"stopped at update {self.step}; continue with --resume {self.dir}", file=sys.stderr)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._stop:  # the second time: at once, without a new checkpoint
            raise KeyboardInterrupt
        self._stop = True

    def check_stop(self) -> None:
        """Raise Interrupted if somebody asked for a stop. Call it where the state is whole."""
        if self._stop:
            raise Interrupted

    def resume_clock(self) -> None:
        """Count the training time from here on (evaluation has its own)."""
        self._clock = time.perf_counter()

    def advance(self, steps: int) -> None:
        """`steps` more updates are done."""
        self.step += steps
        self.progress.update(steps)

    def log(self) -> None:
        """Write the metrics since the last log. Raises UserError if one is not finite."""
        means = (self.agent.sums / max(1, self.step - self.logged_step)).mean(1).tolist()  # waits for the device
        seconds = time.perf_counter() - self._clock
        self.train_seconds += seconds
        self._clock = time.perf_counter()
        losses = {name: mean for name, mean in zip(self.agent.metrics, means)}
        check(bool(np.isfinite(means).all()),
              f"update {self.step}: a loss is no longer finite ({', '.join(f'{k} {v:.3g}' for k, v in losses.items())}); "
              f"{self.dir}/checkpoint.pt of update {self.saved_step} is good; try a lower --learning-rate")
        for name, mean in losses.items():
            if mean:  # the policy's are not computed while pretraining
                self.writer.add_scalar(f"losses/{name}", mean, self.step)
        self.writer.add_scalar("charts/SPS", (self.step - self.logged_step) / seconds, self.step)
        self.progress.set_postfix({name: f"{mean:.3g}" for name, mean in losses.items() if mean} | self._last_score(), refresh=False)
        self.agent.sums.zero_()
        self.logged_step = self.step

    def _last_score(self) -> dict[str, str]:
        last = [row["score_mean"] for row in self.rows if row["epoch"] == self.rows[-1]["epoch"]]
        return {"score": f"{np.mean(last):.1f}"} if last else {}

    def evaluated(self, epoch: int) -> bool:
        """Whether the evaluation after this training epoch has been done."""
        return any(row["epoch"] == epoch for row in self.rows)

    def add_evaluation(self, rows: list[dict[str, Any]]) -> None:
        """Append one evaluation, a row per model, to eval.csv, TensorBoard and the next checkpoint."""
        rows = [{"train_seconds": round(self.train_seconds, 3), **row} for row in rows]
        self.rows += [{name: row[name] if isinstance(row[name], int) else float(row[name]) for name in EVAL_FIELDS}
                      for row in rows]
        self.save()  # before eval.csv, so that a row there is never one that a resumed run computes again
        self._write_eval_csv()
        for name in ("return_mean", "score_mean", "length_mean"):
            for row in rows:
                self.writer.add_scalar(f"eval/{name}_seed{row['seed']}", row[name], self.step)
            self.writer.add_scalar(f"eval/{name}", np.mean([row[name] for row in rows]), self.step)
        self.progress.write(f"epoch {rows[0]['epoch']}: {self.score_name} {_mean_and_spread(rows)}, "
                            f"{np.mean([row['length_mean'] for row in rows]):.0f} steps per episode, "
                            f"{rows[0]['eval_seconds']:.0f} s")

    def _write_eval_csv(self) -> None:
        def write(file: Path) -> None:
            with open(file, "w", newline="") as target:
                writer = csv.DictWriter(target, EVAL_FIELDS)
                writer.writeheader()
                writer.writerows(self.rows)

        write_atomically(self.dir / "eval.csv", write)

    def save_now_and_then(self) -> None:
        """Save a checkpoint if one is due: they should take no more than about a twentieth of the time."""
        if time.perf_counter() - self._saved_at > 20 * self._save_seconds:
            self.save()

    def save(self) -> None:
        """Write checkpoint.pt: everything that the run needs to continue as if it had not stopped."""
        if self.saved_step == self.step and self._saved_rows == len(self.rows):
            return
        start = time.perf_counter()
        checkpoint = {
            "args": dataclasses.asdict(self.args), "step": self.step, "logged_step": self.logged_step, "rows": self.rows,
            "train_seconds": self.train_seconds, "agent": self.agent.state_dict(), "random_state": torch.get_rng_state(),
            "cuda_random_state": torch.cuda.get_rng_state() if self.args.cuda else None,
        }
        params = [param for network in checkpoint["agent"]["params"].values() for param in network.values()]
        check(all(bool(param.isfinite().all()) for param in params),
              f"update {self.step}: a parameter is no longer finite; {self.dir}/checkpoint.pt of update {self.saved_step} "
              "is good; try a lower --learning-rate")
        write_atomically(self.dir / "checkpoint.pt", lambda file: torch.save(checkpoint, file))
        self.saved_step, self._saved_rows = self.step, len(self.rows)
        self._saved_at = time.perf_counter()
        self._save_seconds = self._saved_at - start

    def _load(self, checkpoint: dict[str, Any], device: torch.device) -> None:
        self.step, self.logged_step, self.rows = checkpoint["step"], checkpoint["logged_step"], checkpoint["rows"]
        self.train_seconds = checkpoint["train_seconds"]
        self.agent.load_state_dict(checkpoint["agent"])
        torch.set_rng_state(checkpoint["random_state"].cpu())
        if device.type == "cuda" and checkpoint["cuda_random_state"] is not None:
            torch.cuda.set_rng_state(checkpoint["cuda_random_state"].cpu())
        self.saved_step, self._saved_rows = self.step, len(self.rows)
        self._saved_at, self._save_seconds = time.perf_counter(), 0.0
        if self.rows:
            self._write_eval_csv()

    def summary(self) -> dict[str, Any]:
        """Print the closing line; returns the folder and the rows of eval.csv."""
        epochs = sorted({row["epoch"] for row in self.rows})
        by_epoch = {epoch: [row for row in self.rows if row["epoch"] == epoch] for epoch in epochs}
        best = max(epochs, key=lambda epoch: np.mean([row["score_mean"] for row in by_epoch[epoch]]))
        print(f"{self.args.env_id}: {self.score_name} {_mean_and_spread(by_epoch[epochs[-1]])} (last), "
              f"{_mean_and_spread(by_epoch[best])} (best, epoch {best}); {self.args.num_seeds} model(s), "
              f"{self.train_seconds / 60:.1f} min of training, {self.dir}")
        return {"run_dir": str(self.dir), "rows": self.rows}


def _mean_and_spread(rows: list[dict[str, Any]]) -> str:
    """Mean score and its standard error, over all episodes of all models (which have equally many each)."""
    means, stds = (np.array([row[name] for row in rows]) for name in ("score_mean", "score_std"))
    variance = (stds**2).mean() + means.var()
    return f"{means.mean():.1f} ± {np.sqrt(variance / sum(row['episodes'] for row in rows)):.1f}"


def _create_run_dir(parent: str, env_id: str, exp_name: str, seed: int) -> Path:
    """Make the folder `{env_id}__{exp_name}__{seed}__{unix time}` below `parent`. Raises UserError if it cannot."""
    now = int(time.time())
    while True:
        run_dir = Path(parent) / f"{env_id.replace('/', '-')}__{exp_name}__{seed}__{now}"
        try:
            run_dir.mkdir(parents=True)
            return run_dir
        except FileExistsError as error:
            if not run_dir.is_dir():
                raise UserError(f"cannot make the run folder {run_dir} ({_line(error)}): choose another --run-dir") from None
            now += 1  # two runs in one second
        except OSError as error:
            raise UserError(f"cannot make the run folder {run_dir} ({_line(error)}): choose another --run-dir") from None


# ---- CUDA graphs ---------------------------------------------------------------------------------------------------


@functools.cache
def _can_compile(device: torch.device) -> bool:
    # Where CUDA is installed but no GPU, torch says so, which is no news to anybody
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        x = torch.ones(64, device=device, requires_grad=True)
        torch.compile(lambda x: x.sin().sum())(x).backward()
        return True
    except Exception as error:
        print(f"note: going on without --compile, torch.compile does not work here: {_line(error)}", file=sys.stderr)
        return False


def compile(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """`function`, which works on tensors of static shape, through torch.compile.

    That needs a C++ compiler, on a GPU also triton: without them one note is printed and `function` itself returned.
    """
    if not _can_compile(device):
        return function
    torch._dynamo.config.trace_autograd_ops = True  # a function may contain torch.autograd.grad
    warnings.filterwarnings("ignore", "TensorFloat32")  # advice for a GPU: plain float32 is what is meant
    return torch.compile(function, dynamic=False)


def warm_up(update: Callable[[], None], state: Sequence[torch.Tensor], device: torch.device,
            graph: bool) -> Callable[[], None]:
    """Let what `update` contains be compiled, and with `graph` capture it in a CUDA graph; says how long that took.

    `update` takes and returns nothing and works on tensors of static shape. It runs a few times for this; `state`, every
    tensor that it changes, and the random state are put back afterwards. Returns a function that does the same; noise
    differs from call to call.
    """
    started, cuda = time.perf_counter(), device.type == "cuda"
    generator = torch.cuda.default_generators[torch.cuda.current_device()] if cuda else torch.default_generator
    saved, random_state = [tensor.clone() for tensor in state], generator.get_state()
    stream = torch.cuda.Stream() if graph else None  # capturing asks for a stream of its own, which waits for no other
    if cuda:
        torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(3 if graph else 1):
            update()
    if cuda:
        torch.cuda.synchronize()
    with torch.no_grad():
        for tensor, value in zip(state, saved):
            tensor.copy_(value)
    generator.set_state(random_state)
    if graph:
        cuda_graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(cuda_graph, stream=stream):
            update()
        update = cuda_graph.replay
    tqdm.write(f"update made ready in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return update
