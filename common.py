"""What the scripts share beside the models: command line, one-line errors, lock-step evaluation, the folder of a run.
Nothing here knows the algorithms."""

import contextlib
import csv
import dataclasses
import datetime
import errno
import fcntl
import importlib.metadata
import io
import itertools
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
import typing
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class UserError(Exception):
    """Something the user can mend. The message is one line that says what to do."""


class Diverged(UserError):
    """A loss or a parameter is no longer finite."""


class InUse(UserError):
    """Another process is writing to the run's folder."""


class Unwritable(UserError):
    """The disk is full, or writing is not permitted."""


def line(error: BaseException) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__


# ---- command line --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Args:
    """The arguments of every script; a script adds those of its method."""

    env_id: str = "dtql/pointmaze-umaze-v0"
    """D4RL (hopper-medium-v2), Minari (has a slash) or OGBench id (has singletask); the default is a demo that makes its data"""
    data: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """your own transitions, HDF5 or npz (docs/tasks.md); evaluated if --env-id names a Gymnasium environment"""
    action_low: tuple[float, ...] | None = None
    """lower bound of the actions in --data where there is no environment, one number or one for each; by default the data's"""
    action_high: tuple[float, ...] | None = None
    """upper bounds, likewise"""
    seed: int = 0
    """seed of the first model; the next ones have seed + 1, seed + 2, ..."""
    num_seeds: int = 1
    """how many independent models to train at once; as many of each combination where flags have several values"""
    cuda: bool = torch.cuda.is_available()
    """train on the GPU"""
    torch_deterministic: bool = True
    """use deterministic kernels, so that a run can be repeated bit by bit on the same machine"""
    compile: bool = False
    """compile losses and policy with torch.compile; it takes a minute, so runs of less than 10,000 updates default to no"""
    cudagraphs: bool = torch.cuda.is_available()
    """replay the whole update as a CUDA graph (not used with --no-cuda)"""
    resume: Annotated[str | None, tyro.conf.arg(metavar="RUN_DIR")] = None
    """folder of a run to continue as if it had never stopped"""
    run_dir: str = "runs"
    """parent folder of the runs' folders"""
    batch_size: int = 256
    """transitions per update and model"""
    epochs: int = 2
    """training epochs"""
    steps_per_epoch: int = 1000
    """updates in an epoch"""
    eval_every: int = 50
    """training epochs between evaluations; the last one is always evaluated"""
    eval_episodes: int = 20
    """episodes per evaluation and model"""

    sweep: typing.ClassVar[tuple[str, ...]] = ()  # the arguments that may have several values, each of which is trained

    @property
    def combinations(self) -> list[dict[str, float]]:
        """Every combination of the values of the arguments in `sweep`."""
        values = (getattr(self, name) for name in self.sweep)
        every = itertools.product(*(value if isinstance(value, tuple) else (value,) for value in values))
        return [dict(zip(self.sweep, combination)) for combination in every]

    @property
    def num_models(self) -> int:
        """K: each combination with each seed."""
        return len(self.combinations) * self.num_seeds

    @property
    def model_seeds(self) -> list[int]:
        """The seed of each model: all seeds of the first combination, then those of the next."""
        return list(range(self.seed, self.seed + self.num_seeds)) * len(self.combinations)

    @property
    def model_settings(self) -> dict[str, list[float]]:
        """The value that each model has of each argument in `sweep`."""
        return {name: [each[name] for each in self.combinations for _ in range(self.num_seeds)] for name in self.sweep}

    @property
    def labels(self) -> list[str]:
        """What tells each model's combination from the others, like "alpha=5"; empty if there is one combination."""
        several = [name for name in self.sweep if isinstance(getattr(self, name), tuple) and len(getattr(self, name)) > 1]
        each = [" ".join(f"{name}={combination[name]:g}" for name in several) for combination in self.combinations]
        return [label for label in each for _ in range(self.num_seeds)]

    def about(self, index: int) -> dict[str, float]:
        """The seed of a model and its values of the arguments in `sweep`."""
        return {"seed": self.model_seeds[index], **{name: values[index] for name, values in self.model_settings.items()}}

    # Of methods that train part of their networks first; the others have none
    @property
    def pretrain_steps(self) -> int:
        """Updates before the training epochs."""
        return getattr(self, "pretrain_epochs", 0) * self.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Updates of the whole run."""
        return self.pretrain_steps + self.epochs * self.steps_per_epoch


def run_defaults(args: Args) -> dict[str, Any]:
    """The defaults that depend on other arguments."""
    return {"compile": args.total_steps >= 10_000}


def check_range(args: Any, **bounds: str) -> None:
    """Raise UserError unless each named argument lies in its interval, written as in mathematics: "[0, 1)"."""
    for name, interval in bounds.items():
        flag, values = f"--{name.replace('_', '-')}", getattr(args, name)
        values = values if isinstance(values, tuple) else (values,)
        check(len(set(values)) == len(values) > 0, f"{flag} {' '.join(map(str, values))}: give each value once")
        low, high = (float(bound) for bound in interval[1:-1].split(","))
        for value in values:
            inside = (low <= value if interval[0] == "[" else low < value) and (
                value <= high if interval[-1] == "]" else value < high
            )
            check(inside, f"{flag} must lie in {interval}, not {value}")


def check_args(args: Args) -> None:
    """Raise UserError for settings that cannot work, of those that every script has."""
    positive = {
        "num_seeds": "[1, 1e4]",
        "batch_size": "[1, 1e6]",
        "steps_per_epoch": "[1, 1e9]",
        "eval_every": "[1, 1e9]",
        "eval_episodes": "[1, 1e5]",
    }
    check_range(args, **positive, epochs="[0, 1e9]")
    check(args.num_models <= 10_000, f"{args.num_models} models are too many at once: give fewer values or --num-seeds")
    check(0 <= args.seed < 2**63 - args.num_seeds, f"--seed must lie in [0, 2^63 - --num-seeds), not {args.seed}")


def parse_args(cls: type, task_defaults: Callable[[str], dict[str, Any]], argv: Sequence[str] | None = None) -> Any:
    """Parse the command line into the dataclass `cls`, whose real defaults depend on the task and on each other.

    `task_defaults(env_id)` gives the fields in which the task differs from `cls`; `run_defaults` knows those that follow
    from the other arguments. With `--resume RUN_DIR` the defaults are the settings of that run. Exits with status 2 and
    one line on stderr if the arguments cannot be parsed.
    """
    fields = [(name, str | None, None) for name in ("env_id", "data", "resume")]
    given, _ = cli(dataclasses.make_dataclass("First", fields), argv, return_unknown_args=True, add_help=False)
    resumed = given.resume is not None
    env_id = given.env_id if given.env_id is not None else cls.env_id if given.data is None else ""
    settings = _resumed_settings(cls, given.resume) if resumed else task_defaults(env_id)
    settings = {"env_id": env_id, **settings, "resume": given.resume}
    if resumed:
        return cli(cls, argv, default=cls(**settings))
    # Twice, because --help should show what follows from the task, and what is given changes what follows
    args = cli(cls, argv, default=cls(**{**settings, **run_defaults(cls(**settings))}))
    return cli(cls, argv, default=cls(**{**settings, **run_defaults(args)}))


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
    settings = settings_from(cls, config.get("args"), f"--resume {run_dir} (a run of {config['exp_name']}.py)")
    # A run of a machine with a GPU may go on without one (--no-cuda)
    return {**settings, "cudagraphs": settings["cudagraphs"] and torch.cuda.is_available()}


def run(main: Callable[[Any], Any], parse: Callable[[], Any]) -> None:
    """Run `main(parse())` as a program: a `UserError` becomes one line on stderr and exit status 2.

    SIGINT and SIGTERM end it with one line and exit status 130 or 143.
    """
    for stream in (sys.stdout, sys.stderr):  # an ASCII terminal gets "?" for what it cannot show
        stream.reconfigure(errors="replace")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_now)
    try:
        main(parse())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + getattr(stop, "number", signal.SIGINT))


def progress_bar(**kwargs: Any) -> tqdm:
    """A tqdm bar that draws often on a terminal and seldom in a log file."""
    return tqdm(mininterval=0.2 if sys.stderr.isatty() else 30, **kwargs)


def check(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def find_device(args: Any) -> torch.device:
    """The device to train on. Raises UserError if a GPU is asked for and there is none."""
    for flag in ("cuda", "cudagraphs"):
        check(
            not getattr(args, flag, False) or torch.cuda.is_available(),
            f"--{flag}: PyTorch finds no usable GPU here; train on the CPU with --no-{flag}",
        )
    return torch.device("cuda" if args.cuda else "cpu")


def device_name(device: torch.device) -> str:
    """What the GPU, or the CPU and the threads that PyTorch uses, is called in results."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        name = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):  # not Linux, or a processor that is not named there
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} thread(s)"


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed PyTorch and choose whether its kernels must be deterministic."""
    # cuBLAS needs this for reproducible results; filling uninitialised memory is for debugging and costs time
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(deterministic)
    torch.manual_seed(seed)


# ---- evaluation ----------------------------------------------------------------------------------------------------


class _Shard:
    """Some environments, each running one episode at a time."""

    def __init__(self, make_env: Callable[[], gym.Env], seeds: Sequence[int]):
        self.envs = [make_env() for _ in seeds]
        # What is drawn once per instance (AntMaze v0's goal) must not depend on when a run was resumed
        if self.envs:
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
    for number in (signal.SIGINT, signal.SIGTERM):  # terminals and schedulers send these to all; the main process decides
        signal.signal(number, signal.SIG_IGN)
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

    max_workers: int | None = None  # where several runs share a machine

    def __init__(self, make_env: Callable[[], gym.Env], seeds: Sequence[int], num_workers: int | None = None):
        """`seeds`: one for each copy. `num_workers`: below 2 all copies live in this process; None chooses by cores."""
        if num_workers is None:  # with fewer than 4 copies each, workers' messages cost more than they save
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            num_workers = min(cores - 1 if self.max_workers is None else self.max_workers, len(seeds) // 4)
        self.num_copies, self.pipes, self.processes = len(seeds), [], []
        self.local = _Shard(make_env, seeds) if num_workers < 2 else None
        if self.local:
            return
        self.starts = np.linspace(0, len(seeds), num_workers + 1).astype(int)
        context = multiprocessing.get_context("fork")
        for start, stop in zip(self.starts, self.starts[1:]):
            ours, theirs = context.Pipe()
            self.pipes.append(ours)
            self.processes.append(
                context.Process(target=_serve, daemon=True, args=(theirs, list(self.pipes), make_env, seeds[start:stop]))
            )
            with warnings.catch_warnings():  # threads are no danger: workers use neither torch nor a lock of ours
                warnings.simplefilter("ignore", DeprecationWarning)
                self.processes[-1].start()
            theirs.close()
        for pipe in self.pipes:
            self._receive(pipe)

    @staticmethod
    def _receive(pipe: Any) -> tuple[np.ndarray, ...]:
        try:
            answer = pipe.recv()
        except (EOFError, OSError):
            raise UserError(
                "an evaluation worker has died (killed, or out of memory?): with less memory in use, try again"
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _call(self, method: str, indices: np.ndarray, argument: np.ndarray) -> tuple[np.ndarray, ...]:
        if self.local:
            return getattr(self.local, method)(indices, argument)
        bounds, busy = np.searchsorted(indices, self.starts), []
        for pipe, offset, start, stop in zip(self.pipes, self.starts, bounds, bounds[1:]):
            if stop > start:
                with contextlib.suppress(OSError):  # a dead worker shows when its answer is read
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
                process.kill()


LOG_EVERY = 100  # updates between readings of the losses, which make the host wait for the device
# So many copies at once keep a GPU and its cores busy; of the heaviest task (kitchen) they take 4 GiB
MAX_COPIES = 64


def make_lockstep_envs(task: Any, args: Args) -> LockstepEnvs:
    """The copies in which a run is evaluated."""
    copies = min(args.num_models * args.eval_episodes, MAX_COPIES) if task.make_env else 0
    return LockstepEnvs(task.make_env, np.random.SeedSequence(args.seed).generate_state(copies))


def run_episodes(envs: LockstepEnvs, act: Callable[[np.ndarray], np.ndarray], seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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
            check(
                bool(np.isfinite(obs[running]).all() and np.isfinite(rewards).all()),
                "the environment gave an observation or a reward that is NaN or infinite: its score would mean nothing",
            )
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


class Evaluation(NamedTuple):
    """Undiscounted returns, scores and lengths in steps, each (K, E), of E episodes of K models, and how long they took."""

    returns: np.ndarray
    scores: np.ndarray
    lengths: np.ndarray
    seconds: float


def evaluate(
    task: Any,
    envs: LockstepEnvs,
    act: Callable[[np.ndarray, torch.Generator], np.ndarray],
    args: Args,
    epoch: int,
    device: torch.device,
) -> Evaluation:
    """Evaluate the models of a run with `act`: observations (K, m, S) to actions (K, m, A) in the environment's units.

    It has its own random state: training goes on as if it had not happened. Raises Interrupted.
    """
    start = time.perf_counter()
    generator = torch.Generator(device).manual_seed(
        int(np.random.SeedSequence([args.seed, epoch]).generate_state(1, np.uint64)[0])
    )

    def act_or_stop(obs: np.ndarray) -> np.ndarray:
        check_stop()
        return act(obs, generator)

    seeds = args.model_seeds
    returns, lengths = run_episodes(envs, act_or_stop, episode_seeds(seeds, epoch, args.eval_episodes))
    return Evaluation(returns, np.asarray(task.score(returns), np.float64), lengths, time.perf_counter() - start)


# ---- stopping ----------------------------------------------------------------------------------------------------------


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM; `number` says which."""

    def __init__(self, number: int):
        self.number = number


_stop_signal = 0  # that arrived while a run was going on, and waits for `check_stop`


def request_stop(number: int, frame: Any = None) -> None:
    """Signal handler of a run: stop at the next `check_stop`, where nothing is half done; the second time at once."""
    global _stop_signal
    if _stop_signal:
        raise Interrupted(number)
    _stop_signal = number


def stop_now(number: int, frame: Any = None) -> None:
    """Signal handler before and after a run."""
    raise Interrupted(number)


def check_stop() -> None:
    """Raise Interrupted if somebody asked for a stop. Call it where the state is whole."""
    if _stop_signal:
        raise Interrupted(_stop_signal)


# ---- a run's folder ----------------------------------------------------------------------------------------------------

FORMAT = 2  # of a run's folder: 1 (before `stacked.py`) kept parameters by position and cannot be resumed
EVAL_FIELDS = (
    "epoch",
    "seed",
    "return_mean",
    "return_std",
    "score_mean",
    "score_std",
    "length_mean",
    "episodes",
    "train_seconds",
    "eval_seconds",
)
EPISODE_FIELDS = ("epoch", "seed", "episode", "return", "score", "length")


def write_atomically(file: Path, content: bytes) -> None:
    """Write `content` to a temporary file, flush it to disk and rename it to `file`: there is always the old one or the new.

    Raises UserError, with no temporary file left, if it cannot be written.
    """
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        with open(temporary, "wb") as target:
            target.write(content)
            target.flush()
            os.fsync(target.fileno())
        temporary.replace(file)
    except OSError as error:
        raise Unwritable(f"cannot write {file} ({error.strerror or line(error)}): make room, or permit writing there") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_writable(file: Path, flag: str) -> None:
    """Raise UserError, before any work, unless `file` can be written; makes its folder, leaves no file that was not there."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        there = file.exists()
        open(file, "ab").close()
        if not there:
            file.unlink()
    except OSError as error:
        raise UserError(f"cannot write {file} ({error.strerror or line(error)}): choose another {flag}") from None


def to_csv(fields: Sequence[str], rows: Sequence[dict[str, Any]]) -> bytes:
    """A table with a head line."""
    target = io.StringIO(newline="")
    writer = csv.DictWriter(target, fields)
    writer.writeheader()
    writer.writerows(rows)
    return target.getvalue().encode()


def settings_from(cls: type, saved: Any, place: str) -> dict[str, Any]:
    """The arguments of `cls` as they were saved. Raises UserError if they are another script's or of impossible types."""
    every = typing.get_type_hints(cls)
    hints = {field.name: every[field.name] for field in dataclasses.fields(cls)}
    check(isinstance(saved, dict) and saved.keys() == hints.keys(), f"{place}: the settings there are not this script's")
    for name, hint in hints.items():
        wrong = f"{place}: {name} = {saved[name]!r} there is impossible; put back the file that the run wrote"
        check(_fits(saved[name], hint), wrong)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a saved value is of the type that an argument has."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return value in inside
    if origin is tuple:
        return isinstance(value, (list, tuple)) and all(_fits(element, inside[0]) for element in value)
    if inside:  # a union
        return any(_fits(value, kind) for kind in inside)
    return type(value) is hint or hint is float and type(value) is int


def open_checkpoint(file: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """A checkpoint as `Run` saved it. Raises UserError if it is missing, unreadable or something else."""
    device = torch.device(device)
    check(device.type != "cuda" or torch.cuda.is_available(), 'PyTorch finds no usable GPU here: take device="cpu"')
    try:
        saved = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # torch's own advice, weights_only=False, would let a foreign file run code
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is damaged or no checkpoint"
        raise UserError(f"cannot read the checkpoint {file} ({reason}): give the checkpoint.pt of a run") from None
    check(
        isinstance(saved, dict) and not ("agent" in saved and "format" not in saved),
        f"{file} was written by an earlier version of this project, or is no checkpoint: train anew",
    )
    check(saved.get("format") == FORMAT, f"{file} is no checkpoint of a run: give the checkpoint.pt of a run")
    kinds = {
        "exp_name": str,
        "args": dict,
        "spaces": dict,
        "step": int,
        "logged_step": int,
        "rows": list,
        "episodes": list,
        "train_seconds": float,
        "learner": dict,
        "random_state": torch.Tensor,
    }
    wrong = [name for name, kind in kinds.items() if type(saved.get(name)) is not kind]
    check(not wrong, f"{file} is damaged: it has no usable {', '.join(wrong)}")
    return saved


def open_policy(file: str | Path, script: str, cls: type, index: int, device: str) -> tuple[Any, dict, dict]:
    """What deploying a policy takes: the arguments, the spaces (obs_dim, action_low, action_high), the learner's state.

    Raises UserError if the checkpoint cannot be read, was written by another script, or has no model `index`.
    """
    saved = open_checkpoint(file, device)
    check(saved["exp_name"] == Path(script).stem, f"{file} was written by {saved['exp_name']}.py: load it with that")
    args = cls(**settings_from(cls, saved["args"], str(file)))
    check(-args.num_models <= index < args.num_models, f"{file} holds {args.num_models} model(s): there is no {index}")
    spaces = {name: value.cpu().numpy() if isinstance(value, torch.Tensor) else value for name, value in saved["spaces"].items()}
    return dataclasses.replace(args, compile=False), spaces, saved["learner"]


def _read_config(run_dir: str) -> dict[str, Any]:
    """config.json of a run. Raises UserError if the folder is not a run."""
    place = f"--resume {run_dir}" if run_dir else '--resume ""'
    try:
        config = json.loads((Path(run_dir) / "config.json").read_text()) if run_dir else None
    except (OSError, ValueError):
        config = None
    check(
        isinstance(config, dict) and isinstance(config.get("exp_name"), str),
        f"{place}: no run is there; give a folder that has config.json and checkpoint.pt",
    )
    check(
        config.get("format") == FORMAT,
        f"{place}: that run was made by another version of this project, with which alone it can go on; start it anew",
    )
    check(
        isinstance(config.get("data"), dict) and type(config["data"].get("fingerprint")) is int,
        f"{place}: config.json lacks the data's fingerprint; put back the file that the run wrote",
    )
    return config


# Only the hardware and the place may change when a run is resumed
_FREE = dict.fromkeys(("resume", "run_dir", "cuda", "compile", "cudagraphs"))


def _check_same(settings: dict[str, Any], before: dict[str, Any], message: Callable[[str, Any, Any], str]) -> None:
    for name, value in settings.items():
        check(name in _FREE or before.get(name) == value, message(name, before.get(name), value))


class Run:
    """A run's folder and everything that is written there, with the progress bar. Use it as a context.

    On SIGINT or SIGTERM the run ends at the next `check_stop`, with a checkpoint. Whatever goes wrong with the disk ends it
    with a UserError; the last checkpoint stays good.
    """

    def __init__(self, script: str, args: Args, task: Any, learner: Any, device: torch.device):
        """Make the folder, or with `args.resume` load its checkpoint into `learner`. Raises UserError if it cannot.

        `script` is the file that runs. `learner` (a `stacked.Learner`) has state_dict, load_state_dict and `sums`, the metrics
        (K,) by name, which add up over updates.
        """
        self.args, self.learner, self.score_name, self.device = args, learner, task.score_name, device
        self.evaluates = task.make_env is not None
        self.exp_name, self.total_steps = Path(script).stem, args.total_steps
        self.spaces = {
            "obs_dim": task.obs.shape[1],
            "action_low": torch.as_tensor(task.action_low),
            "action_high": torch.as_tensor(task.action_high),
        }
        self.step, self.train_seconds, self.logged_step, self.saved_step = 0, 0.0, 0, -1
        self.rows: list[dict[str, Any]] = []  # of eval.csv
        self.episodes: list[dict[str, Any]] = []  # one entry per evaluation: its returns, scores and lengths (K, E)
        data = {"origin": task.origin, "transitions": len(task.obs), "fingerprint": task.fingerprint(), "score": task.score_name}
        if args.resume is not None:
            config = _read_config(args.resume)
            self.dir = Path(args.resume)
            self._lock()
            self._resume(config, data)
        else:
            self.dir = _create_run_dir(args.run_dir, args.env_id or Path(args.data).stem, self.exp_name, args.seed)
            try:
                self._lock()
                self._begin(script, data)
            except BaseException:
                shutil.rmtree(self.dir, ignore_errors=True)
                raise
        if not args.cuda and not torch.cuda.is_available():
            print("no GPU found: training on the CPU", file=sys.stderr)
        print(f"{self.dir}: {args.num_models} model(s), {len(task.obs):,} transitions from {task.origin}, on {device}")

    def _begin(self, script: str, data: dict[str, Any]) -> None:
        packages, versions = ("numpy", "gymnasium", "gymnasium-robotics", "mujoco", "minari", "ogbench"), {}
        for package in packages:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # ogbench is needed for its tasks only
                versions[package] = importlib.metadata.version(package)
        config = {
            "format": FORMAT,
            "exp_name": self.exp_name,
            "args": dataclasses.asdict(self.args),
            "data": data,
            "device": device_name(self.device),
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, **versions},
        }
        write_atomically(self.dir / Path(script).name, Path(script).read_bytes())
        write_atomically(self.dir / "config.json", json.dumps(config, indent=2).encode())
        self.save()

    def _resume(self, config: dict[str, Any], data: dict[str, Any]) -> None:
        place, settings = f"--resume {self.dir}", dataclasses.asdict(self.args)
        check(
            config["exp_name"] == self.exp_name,
            f"{place}: that run was made by {config['exp_name']}.py, not {self.exp_name}.py; resume it with that",
        )
        before = settings_from(type(self.args), config.get("args"), place)
        _check_same(
            settings, before, lambda name, old, new: f"{place}: that run has {name} = {old}, not {new}; leave the flag out"
        )
        check(
            config["data"]["fingerprint"] == data["fingerprint"],
            f"{place}: {data['origin']} is not the data that the run began with; put that back",
        )
        saved = open_checkpoint(self.dir / "checkpoint.pt", self.device)
        check(saved["exp_name"] == self.exp_name, f"{place}: its checkpoint is of {saved['exp_name']}.py, its config.json is not")
        _check_same(
            settings,
            saved["args"],
            lambda name, old, new: (
                f"{place}: its config.json has {name} = {new} and its checkpoint {old}: they are of different runs"
            ),
        )
        check(
            0 <= saved["logged_step"] <= saved["step"] <= self.total_steps,
            f"{place}: its checkpoint is after {saved['step']} updates, the whole run has {self.total_steps}",
        )
        random_state, cuda_state = saved["random_state"].cpu(), saved.get("cuda_random_state")
        check(
            random_state.shape == torch.get_rng_state().shape and random_state.dtype == torch.uint8,
            f"{place}: the checkpoint's random state is not this version of torch's",
        )
        self.learner.load_state_dict(saved["learner"])
        torch.set_rng_state(random_state)
        if self.device.type == "cuda" and isinstance(cuda_state, torch.Tensor):
            torch.cuda.set_rng_state(cuda_state.cpu())
        self.step, self.logged_step, self.train_seconds = saved["step"], saved["logged_step"], saved["train_seconds"]
        self.rows, self.episodes = (
            saved["rows"],
            [
                {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in entry.items()}
                for entry in saved["episodes"]
            ],
        )
        self.saved_step, self._saved_rows = self.step, len(self.rows)
        self._saved_at, self._save_seconds = time.perf_counter(), 0.0
        if self.rows:
            self._write_tables()

    def _lock(self) -> None:
        """Make sure that no other process writes here. The lock ends with this process, however that ends.

        A POSIX lock: forked workers do not inherit it, and network file systems know it.
        """
        try:
            self._lock_file = open(self.dir / ".lock", "a")
            fcntl.lockf(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN) and not isinstance(error, PermissionError):
                raise InUse(f"{self.dir}: another process is writing to this run; wait for it or stop it") from None
            if error.errno != errno.ENOLCK:  # a file system without locks: go on without
                raise Unwritable(f"cannot write to {self.dir} ({error.strerror}): make room, or permit writing there") from None

    def __enter__(self) -> "Run":
        global _stop_signal
        _stop_signal = 0
        self._handlers = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        self._excepthook, threading.excepthook = threading.excepthook, self._on_thread_error
        # A killed run may have logged beyond its last checkpoint: those events are dropped
        self.writer = SummaryWriter(str(self.dir), purge_step=self.step + 1 if self.step else None)
        self.progress = progress_bar(total=self.total_steps, initial=self.step, unit="update", smoothing=0.05)
        self._clock = time.perf_counter()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        global _stop_signal
        self.progress.close()
        with contextlib.suppress(OSError):  # a full disk, of which a checkpoint has told by now
            self.writer.close()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        threading.excepthook = self._excepthook
        stopped, _stop_signal = _stop_signal, 0
        try:
            if kind is Interrupted and stopped:
                self.save()
                print(f"stopped at update {self.step}; continue with --resume {self.dir}", file=sys.stderr)
            if kind is not None and issubclass(kind, OSError):
                raise Unwritable(
                    f"cannot write to {self.dir} ({error.strerror or line(error)}); its checkpoint of update "
                    f"{self.saved_step} is good: make room and continue with --resume {self.dir}"
                ) from None
        finally:
            self._lock_file.close()

    def _on_thread_error(self, error: Any) -> None:
        if not issubclass(error.exc_type, OSError):  # TensorBoard's thread: the next event raises it again, here
            self._excepthook(error)

    @property
    def epoch(self) -> int:
        """Training epochs begun so far; below 0 in the epochs of pretraining."""
        return (self.step - self.args.pretrain_steps) // self.args.steps_per_epoch

    def evaluation_due(self) -> bool:
        """Whether an evaluation belongs here and has not been done: every so many training epochs and at the end."""
        due = (
            self.evaluates
            and self.step % self.args.steps_per_epoch == 0
            and self.epoch >= 0
            and (self.step == self.total_steps or self.epoch > 0 and self.epoch % self.args.eval_every == 0)
        )
        return due and not any(row["epoch"] == self.epoch for row in self.rows)

    def until_log(self) -> int:
        """Updates until the metrics should be logged."""
        within = self.step % self.args.steps_per_epoch
        return min(self.args.steps_per_epoch - within, LOG_EVERY - within % LOG_EVERY)

    def advance(self) -> None:
        """One more update is done: the place where a run can stop. Raises Interrupted."""
        self.step += 1
        self.progress.update()
        check_stop()

    def log(self) -> None:
        """Write the metrics since the last log, and a checkpoint if one is due. Raises UserError if one is not finite."""
        sums = self.learner.sums
        each = (torch.stack(list(sums.values())) / max(1, self.step - self.logged_step)).cpu()  # waits for the device
        means = each.mean(1).tolist()
        seconds = time.perf_counter() - self._clock
        self.train_seconds += seconds
        self._clock = time.perf_counter()
        losses = dict(zip(sums, means))
        if not np.isfinite(means).all():
            listed = ", ".join(f"{name} {mean:.3g}" for name, mean in losses.items())
            raise self._diverged(f"a loss is no longer finite ({listed})")
        losses = {name: mean for name, mean in losses.items() if mean}  # the others are not computed while pretraining
        for name, mean in losses.items():
            self.writer.add_scalar(f"losses/{name}", mean, self.step)
        labels = dict.fromkeys(self.args.labels)
        if len(labels) > 1:
            for label, part in zip(labels, each.split(self.args.num_seeds, 1)):
                for name, mean in zip(sums, part.mean(1).tolist()):
                    if name in losses:
                        self.writer.add_scalar(f"losses_{label.replace(' ', '_')}/{name}", mean, self.step)
        self.writer.add_scalar("charts/SPS", (self.step - self.logged_step) / seconds, self.step)
        self.progress.set_postfix({name: f"{mean:.3g}" for name, mean in losses.items()} | self._last_score(), refresh=False)
        for value in sums.values():
            value.zero_()
        self.logged_step = self.step
        # Checkpoints should take no more than about a twentieth of the time
        if time.perf_counter() - self._saved_at > 20 * self._save_seconds:
            self.save()

    def _diverged(self, what: str) -> Diverged:
        return Diverged(
            f"update {self.step}: {what}; {self.dir}/checkpoint.pt of update {self.saved_step} is good; "
            "try a lower --learning-rate"
        )

    def _last_score(self) -> dict[str, str]:
        last = [row["score_mean"] for row in self.rows if row["epoch"] == self.rows[-1]["epoch"]]
        return {"score": f"{np.mean(last):.1f}"} if last else {}

    def add_evaluation(self, evaluation: "Evaluation") -> None:
        """Add an evaluation to eval.csv, episodes.csv, TensorBoard and the next checkpoint."""
        returns, scores, lengths = evaluation.returns, evaluation.scores, evaluation.lengths
        rows = [
            {
                "epoch": self.epoch,
                "seed": seed,
                "return_mean": float(returns[i].mean()),
                "return_std": float(returns[i].std()),
                "score_mean": float(scores[i].mean()),
                "score_std": float(scores[i].std()),
                "length_mean": float(lengths[i].mean()),
                "episodes": returns.shape[1],
                "train_seconds": round(self.train_seconds, 3),
                "eval_seconds": evaluation.seconds,
            }
            for i, seed in enumerate(self.args.model_seeds)
        ]
        for row, label in zip(rows, self.args.labels):
            row |= {"setting": label} if label else {}
        self.rows += rows
        self.episodes.append(
            {
                "epoch": self.epoch,
                "return": torch.from_numpy(returns),
                "score": torch.from_numpy(scores),
                "length": torch.from_numpy(lengths),
            }
        )
        self.save()  # before the tables, so that a row there is never one that a resumed run computes again
        self._write_tables()
        for name in ("return_mean", "score_mean", "length_mean"):
            for row in rows:
                which = f"_{row['setting'].replace(' ', '_')}" if "setting" in row else ""
                self.writer.add_scalar(f"eval/{name}{which}_seed{row['seed']}", row[name], self.step)
            self.writer.add_scalar(f"eval/{name}", np.mean([row[name] for row in rows]), self.step)
        self.progress.write(
            f"epoch {self.epoch}: {self.score_name} {_by_setting(rows)}, "
            f"{np.mean([row['length_mean'] for row in rows]):.0f} steps per episode, {evaluation.seconds:.0f} s"
        )
        self._clock = time.perf_counter()  # evaluation is not training time

    def _write_tables(self) -> None:
        more = ("setting",) if self.args.labels[0] else ()  # where several are trained at once
        write_atomically(self.dir / "eval.csv", to_csv((*EVAL_FIELDS, *more), self.rows))
        rows = [
            {
                "epoch": entry["epoch"],
                "seed": self.args.model_seeds[i],
                "episode": episode,
                **{name: self.args.labels[i] for name in more},
                **{name: entry[name][i, episode].item() for name in ("return", "score", "length")},
            }
            for entry in self.episodes
            for i in range(len(entry["return"]))
            for episode in range(entry["return"].shape[1])
        ]
        write_atomically(self.dir / "episodes.csv", to_csv((*EPISODE_FIELDS, *more), rows))

    def save(self) -> None:
        """Write checkpoint.pt: everything that the run needs to continue as if it had not stopped."""
        if self.saved_step == self.step and self._saved_rows == len(self.rows):
            return
        start = time.perf_counter()
        checkpoint = {
            "format": FORMAT,
            "exp_name": self.exp_name,
            "args": dataclasses.asdict(self.args),
            "spaces": self.spaces,
            "step": self.step,
            "logged_step": self.logged_step,
            "rows": self.rows,
            "episodes": self.episodes,
            "train_seconds": self.train_seconds,
            "learner": self.learner.state_dict(),
            "random_state": torch.get_rng_state(),
            "cuda_random_state": torch.cuda.get_rng_state() if self.args.cuda else None,
        }
        params = [param for network in checkpoint["learner"]["params"].values() for param in network.values()]
        if not all(bool(param.isfinite().all()) for param in params):
            raise self._diverged("a parameter is no longer finite")
        content = io.BytesIO()
        torch.save(checkpoint, content)
        try:
            write_atomically(self.dir / "checkpoint.pt", content.getvalue())
        except Unwritable as error:
            if self.saved_step < 0:
                raise
            raise Unwritable(
                f"{error}; the checkpoint of update {self.saved_step} is good: continue with --resume {self.dir}"
            ) from None
        self.saved_step, self._saved_rows = self.step, len(self.rows)
        self._saved_at = time.perf_counter()
        self._save_seconds = self._saved_at - start

    def summary(self) -> dict[str, Any]:
        """Print the closing line; returns the folder and the rows of eval.csv."""
        ended = f"{self.args.num_models} model(s), {self.train_seconds / 60:.1f} min of training, {self.dir}"
        if not self.evaluates:
            print(f"{self.args.data}: trained without an environment, so without a score; {ended}")
            return {"run_dir": str(self.dir), "rows": self.rows}
        epochs = sorted({row["epoch"] for row in self.rows})
        by_epoch = {epoch: [row for row in self.rows if row["epoch"] == epoch] for epoch in epochs}
        best = max(epochs, key=lambda epoch: np.mean([row["score_mean"] for row in by_epoch[epoch]]))
        print(
            f"{self.args.env_id}: {self.score_name} {_by_setting(by_epoch[epochs[-1]])} (last), "
            f"{_by_setting(by_epoch[best])} (best, epoch {best}); {ended}"
        )
        return {"run_dir": str(self.dir), "rows": self.rows}


def _mean_and_spread(rows: list[dict[str, Any]]) -> str:
    """Mean score and its standard error, over all episodes of all models (which have equally many each)."""
    means, stds = (np.array([row[name] for row in rows]) for name in ("score_mean", "score_std"))
    variance = (stds**2).mean() + means.var()
    return f"{means.mean():.1f} ± {np.sqrt(variance / sum(row['episodes'] for row in rows)):.1f}"


def _by_setting(rows: list[dict[str, Any]]) -> str:
    """Mean score and its standard error, of each combination of settings on its own."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row.get("setting", ""), []).append(row)
    return ", ".join((f"{label}: " if label else "") + _mean_and_spread(group) for label, group in groups.items())


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
                raise UserError(f"cannot make the run folder {run_dir} ({line(error)}): choose another --run-dir") from None
            now += 1  # two runs in one second
        except OSError as error:
            raise UserError(f"cannot make the run folder {run_dir} ({line(error)}): choose another --run-dir") from None
