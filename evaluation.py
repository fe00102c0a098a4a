"""Evaluate K models: environments that step in lock-step, in worker processes."""

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from tqdm import tqdm

REPORT_EVERY = 30.0  # s, while something is waited for
MAX_COPIES = 64  # enough to keep a GPU and its cores busy; in kitchen they take 4 GiB


class EnvironmentFailure(Exception):
    """The environment raised an error, or gave something that its spaces do not allow. The message is one line."""


def to_env_units(actions: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Actions (..., A) in [-1, 1] scaled to the bounds (A,), in the dtype of the bounds and never outside them."""
    if not np.isfinite(actions).all():
        raise EnvironmentFailure("the policy gave actions that are NaN: are these observations on the scale of the data?")
    scaled = low + (actions.astype(np.float64) + 1) / 2 * (high.astype(np.float64) - low)
    return scaled.astype(low.dtype).clip(low, high)


class _Shard:
    """Some environments, each running one episode at a time."""

    def __init__(self, make_env: Callable[[], gym.Env], seeds: Sequence[int]):
        self.envs = [make_env() for _ in seeds]
        # What is drawn once per instance (AntMaze v0's goal) must not depend on when a run was resumed
        self.reset(range(len(seeds)), seeds)

    def reset(self, indices: Sequence[int], seeds: Sequence[int]) -> tuple[np.ndarray]:
        return (
            np.stack([self._checked(index, self.envs[index].reset(seed=int(seed))[0]) for index, seed in zip(indices, seeds)]),
        )

    def step(self, indices: Sequence[int], actions: np.ndarray) -> tuple[np.ndarray, ...]:
        obs, rewards, terminated, truncated, infos = zip(
            *(self.envs[index].step(a) for index, a in zip(indices, actions)), strict=True
        )
        obs = np.stack([self._checked(index, one) for index, one in zip(indices, obs)])
        rewards = np.array(rewards, np.float64)
        if rewards.shape != (len(obs),) or not np.isfinite(rewards).all():
            raise EnvironmentFailure(f"the environment gave a reward that is not one finite number: {rewards[0]}")
        # OGBench's evaluation counts successes, while its data have other rewards
        data_rewards = np.array([info.get("data_reward", reward) for info, reward in zip(infos, rewards)])
        return obs, rewards, np.logical_or(terminated, truncated), np.array(terminated, bool), data_rewards

    def _checked(self, index: int, obs: Any) -> np.ndarray:
        expected = self.envs[index].observation_space.shape
        if np.shape(obs) != expected or not np.isfinite(obs).all():
            what = f"of shape {np.shape(obs)}, not {expected}" if np.shape(obs) != expected else "that is NaN or infinite"
            raise EnvironmentFailure(f"the environment gave an observation {what}: its score would mean nothing")
        return np.asarray(obs, np.float32)

    def describe(self, *_: Any) -> tuple[np.ndarray, ...]:
        env = self.envs[0]
        limit = env.spec and env.spec.max_episode_steps or 0
        return env.action_space.low[None], env.action_space.high[None], np.array([(*env.observation_space.shape, limit)])

    def close(self) -> None:
        for env in self.envs:
            env.close()


def _call(shard: _Shard, method: str, *args: Any) -> Any:
    """Call a method of a shard; any error of the environment, also an attempt to exit, becomes an EnvironmentFailure."""
    try:
        return getattr(shard, method)(*args)
    except EnvironmentFailure:
        raise
    except (Exception, SystemExit) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise EnvironmentFailure(f"the environment failed in {method}: {text} ({frame.filename}:{frame.lineno})") from error


def end_with_parent() -> None:
    """Let this worker process end when the main one does, even while it hangs or waits."""
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def process_context() -> multiprocessing.context.BaseContext:
    """How to start a worker process: forked, which saves its imports, or spawned on Windows and macOS."""
    return multiprocessing.get_context("fork" if hasattr(os, "fork") and sys.platform != "darwin" else "spawn")


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _serve(pipe: Any, inherited: list[Any], make_env: Callable[[], gym.Env], seeds: Sequence[int]) -> None:
    """A worker process: a `_Shard` behind a pipe, until None arrives or the main process has ended."""
    from common import UserError  # which imports this module

    for other in inherited:  # so that the pipes close with the main process, even if it is killed
        other.close()
    end_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):  # terminals and schedulers signal every process; the main one decides
        signal.signal(number, signal.SIG_IGN)
    try:
        with contextlib.closing(_Shard(make_env, seeds)) as shard:
            pipe.send(())
            for message in iter(pipe.recv, None):
                pipe.send(_call(shard, *message))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    except Exception as error:
        known = isinstance(error, (EnvironmentFailure, UserError))
        pipe.send(error if known else EnvironmentFailure(f"{type(error).__name__}: {error}"))


class LockstepEnvs:
    """Copies of an environment that step together, in worker processes, so that none of them can end or stop the run.

    Create it before the first CUDA call: workers are forked where the system can.
    """

    max_workers: int | None = None  # set if several runs share a machine

    def __init__(self, make_env: Callable[[], gym.Env] | None, seeds: Sequence[int], num_workers: int | None = None):
        """`seeds`: one per copy. `num_workers`: by the number of cores if None."""
        if num_workers is None:  # with fewer than 4 copies each, messages cost more than workers save
            most = num_cores() - 1 if self.max_workers is None else self.max_workers
            num_workers = max(min(most, len(seeds) // 4), min(1, len(seeds)))
        self.num_copies, self.pipes, self.processes = len(seeds), [], []
        self.starts = np.linspace(0, len(seeds), num_workers + 1).astype(int)
        context = process_context()
        for start, stop in zip(self.starts, self.starts[1:]):
            ours, theirs = context.Pipe()
            self.pipes.append(ours)
            inherited = list(self.pipes) if context.get_start_method() == "fork" else []
            arguments = (theirs, inherited, make_env, seeds[start:stop])
            self.processes.append(context.Process(target=_serve, daemon=True, args=arguments))
            with warnings.catch_warnings():  # forking beside threads is safe: workers use neither torch nor our locks
                warnings.simplefilter("ignore", DeprecationWarning)
                self.processes[-1].start()
            theirs.close()
        atexit.register(self.close)  # multiprocessing would wait for them at the end of an unsuccessful run
        for pipe in self.pipes:
            self._receive(pipe)

    @staticmethod
    def _receive(pipe: Any) -> Any:
        try:
            while not pipe.poll(REPORT_EVERY):
                tqdm.write("waiting for the environment, which has not answered yet", file=sys.stderr)
            answer = pipe.recv()
        except (EOFError, OSError):
            raise EnvironmentFailure(
                "an evaluation worker has died (killed, out of memory, or ended by its environment?)"
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _call(self, method: str, indices: np.ndarray, argument: np.ndarray) -> tuple[np.ndarray, ...]:
        bounds, busy = np.searchsorted(indices, self.starts), []
        for pipe, offset, start, stop in zip(self.pipes, self.starts, bounds, bounds[1:]):
            if stop > start:
                try:
                    pipe.send((method, indices[start:stop] - offset, argument[start:stop]))
                except OSError:
                    pass  # a dead worker shows when its answer is read
                busy.append(pipe)
        return tuple(map(np.concatenate, zip(*[self._receive(pipe) for pipe in busy])))

    def reset(self, indices: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """Start an episode in the copies `indices` (m,), sorted, with `seeds` (m,): observations (m, S)."""
        return self._call("reset", indices, seeds)[0]

    def step(self, indices: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        """Step the copies `indices` (m,), sorted, with `actions` (m, A).

        Returns obs (m, S), rewards (m,), done (m,), terminated (m,) and the rewards that the data have (m,).
        """
        return self._call("step", indices, actions)

    def describe(self) -> tuple[np.ndarray, np.ndarray, int, int | None]:
        """Bounds of the actions (A,), size of the observations, and steps after which an episode is cut, if it is."""
        (low,), (high,), ((obs_dim, limit),) = self._call("describe", np.zeros(1, int), np.zeros(1))
        return low, high, int(obs_dim), int(limit) or None

    def close(self) -> None:
        """Close the environments and end the worker processes."""
        atexit.unregister(self.close)
        for pipe in self.pipes:
            with contextlib.suppress(OSError):  # a dead worker
                pipe.send(None)
            pipe.close()
        patience = time.monotonic() + 5  # s, for all of them together
        for process in self.processes:
            process.join(max(0, patience - time.monotonic()))
            if process.is_alive():
                process.kill()


def make_envs(task: Any, args: Any) -> LockstepEnvs:
    """The copies of a task's environment in which the run with `args` is evaluated; none without an environment."""
    copies = min(args.num_models * args.eval_episodes, task.max_copies) if task.make_env else 0
    return LockstepEnvs(task.make_env, np.random.SeedSequence(args.seed).generate_state(copies))


def episode_seeds(seeds: Sequence[int], epoch: int, num_episodes: int) -> np.ndarray:
    """(K, E) seeds of an evaluation's episodes; model i's are those of a single run of its seed."""
    return np.array([np.random.SeedSequence([seed, epoch]).generate_state(num_episodes) for seed in seeds])


def run_episodes(
    envs: LockstepEnvs, act: Callable[[np.ndarray], np.ndarray], seeds: np.ndarray, chunk: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Run one episode for every model and seed, in lock-step; every episode that starts counts once.

    Args:
        envs: the copies; copy c runs the episodes c, c + copies, c + 2 copies, ... one after another.
        act: observations (K, m, S) to actions (K, m, A) in the environment's units; the next `chunk` ones, (K, m, chunk, A).
        seeds: (K, E) seeds of the episodes.

    Returns:
        returns (K, E), undiscounted, and lengths (K, E) in steps. Raises EnvironmentFailure.
    """
    num_models = len(seeds)
    queue = seeds.T.ravel()  # the models take turns, so that each has about as many episodes running
    episode = np.arange(min(envs.num_copies, len(queue)))  # the one that each copy runs
    running = episode.copy()
    obs = envs.reset(running, queue[episode])
    returns, lengths = np.zeros(len(queue)), np.zeros(len(queue), int)
    plans = None  # the actions of each copy, (copies, chunk, A), of which the one at its episode's step modulo `chunk` is next
    often = 1 if sys.stderr.isatty() else REPORT_EVERY
    with tqdm(total=len(queue), unit="episode", desc="evaluating", leave=False, mininterval=often, miniters=0) as progress:
        while len(running):
            place = lengths[episode[running]] % chunk
            asking = running[place == 0]
            if len(asking):
                # Pack the observations into a rectangle (K, m, S); a model with fewer running episodes has unused rows
                model = episode[asking] % num_models
                column = np.tril(model[:, None] == model, -1).sum(1)
                batch = np.zeros((num_models, column.max() + 1, obs.shape[1]), np.float32)
                batch[model, column] = obs[asking]
                actions = act(batch)
                actions = actions.reshape(*actions.shape[:2], chunk, -1)
                if plans is None:
                    plans = np.zeros((envs.num_copies, *actions.shape[2:]), actions.dtype)
                plans[asking] = actions[model, column]
            obs[running], rewards, done, *_ = envs.step(running, plans[running, place])
            returns[episode[running]] += rewards
            lengths[episode[running]] += 1
            finished = running[done]
            episode[finished] += envs.num_copies
            again = finished[episode[finished] < len(queue)]
            if len(again):
                obs[again] = envs.reset(again, queue[episode[again]])
            running = running[episode[running] < len(queue)]
            progress.set_postfix_str(f"{lengths.sum():,} steps", refresh=False)
            progress.update(int(done.sum()))
    return returns.reshape(-1, num_models).T, lengths.reshape(-1, num_models).T
