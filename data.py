"""Tasks, each with its data, its environment and its score: D4RL's files, Minari's data sets, OGBench's single tasks, a file of
your own, and mazes that collect their own data."""

import contextlib
import difflib
import fcntl
import functools
import hashlib
import http.client
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

import gymnasium as gym
import h5py
import numpy as np

import common
import d4rl_tasks
from common import UserError, check, line, progress_bar, write_atomically

gym.logger.min_level = gym.logger.ERROR  # its warnings concern environments that no task here uses

DEMO_ID = common.Args.env_id


class Task(NamedTuple):
    """A task's offline data, its evaluation environment and its score.

    obs, next_obs (N, S); actions (N, A), scaled to [-1, 1]; rewards, terminals (N,): float32 arrays of N transitions.
    action_low, action_high (A,): the environment's bounds.
    """

    obs: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminals: np.ndarray  # 1 where the episode really ended (no bootstrapping), else 0
    next_obs: np.ndarray
    make_env: Callable[[], gym.Env] | None  # flat observations, action space (A,); None where there is no environment
    score: Callable[[np.ndarray], np.ndarray]  # returns (n,) -> scores (n,)
    score_name: str
    sparse_goal: bool  # the reward is 1 at the goal, where the episode ends, and 0 elsewhere
    origin: str  # where the data came from
    action_low: np.ndarray
    action_high: np.ndarray

    @classmethod
    def without_data(cls, obs_dim: int, action_low: np.ndarray, action_high: np.ndarray) -> "Task":
        """What an agent that is only deployed needs to know of its task."""
        none = lambda *shape: np.zeros(shape, np.float32)
        return cls(
            none(0, obs_dim),
            none(0, len(action_low)),
            none(0),
            none(0),
            none(0, obs_dim),
            gym.Env,
            lambda x: x,
            "return",
            False,
            "nowhere",
            np.asarray(action_low),
            np.asarray(action_high),
        )

    def fingerprint(self) -> int:
        """Checksum of the transitions, to tell on `--resume` that they are still the same."""
        return functools.reduce(lambda crc, array: zlib.crc32(np.ascontiguousarray(array), crc), self[:5], 0)


def d4rl_id(env_id: str) -> str | None:
    """The D4RL task of an id: itself, for a Minari id the D4RL task that it is nearest to, or None."""
    if "/" in env_id:
        return next((name for name, task in d4rl_tasks.TASKS.items() if task.minari == env_id), None)
    return env_id if env_id in d4rl_tasks.TASKS else None


def check_id(env_id: str) -> None:
    """Raise UserError for an id that is none of D4RL's, Minari's or OGBench's single tasks."""
    if "/" in env_id:
        check(re.search(r"-v\d+$", env_id) is not None, f"unknown task {env_id}: a Minari id ends in its version, like -v2")
    elif d4rl_id(env_id) is None and not is_ogbench(env_id):
        check(
            re.match("visual-|powderworld-|.*(singletask|oraclerep|-navigate-|-stitch-|-explore-|-noisy-|-play-v0)", env_id)
            is None,
            f"unknown task {env_id}: of OGBench there are state-based single tasks, like antmaze-large-navigate-singletask-v0 "
            "or cube-single-play-singletask-task2-v0",
        )
        near = difflib.get_close_matches(env_id, d4rl_tasks.TASKS, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"D4RL ids look like {next(iter(d4rl_tasks.TASKS))}."
        raise UserError(f"unknown task {env_id}: {hint} Minari ids contain a slash")


def task_of(args: common.Args) -> Task:
    """The task that the arguments name: `--data`, or else `--env-id`. Raises UserError as `load_task` does."""
    if args.data is not None:
        return _check_and_scale(_load_own(Path(args.data), args.env_id, args.action_low, args.action_high))
    bounds = args.action_low is None and args.action_high is None
    check(bounds, f"--action-low and --action-high belong to --data: {args.env_id} has bounds of its own")
    return load_task(args.env_id)


def load_task(env_id: str) -> Task:
    """Load a D4RL id (D4RL's file and environment), OGBench's or an id with a slash (Minari's data and its own environment).

    Raises UserError for an unknown id and for data that is missing, broken or does not fit the environment.
    """
    check_id(env_id)
    if d4rl_id(env_id) == env_id:
        return _check_and_scale(_load_d4rl(env_id))
    if is_ogbench(env_id):
        return _check_and_scale(_load_ogbench(env_id))
    with _temporary_files_removed():
        return _check_and_scale(_load_minari(env_id))


def _check_and_scale(task: Task) -> Task:
    """Refuse data that cannot be trained on; scale actions from the environment's bounds to [-1, 1]."""
    check(len(task.obs) > 0, f"{task.origin} holds no transitions: give a complete data set")
    for name in ("obs", "actions", "rewards", "terminals", "next_obs"):
        check(
            bool(np.isfinite(getattr(task, name)).all()),
            f"{task.origin} holds NaN or infinite {name}: repair the data or fetch it again",
        )
    if task.make_env is None:
        low, high = task.action_low, task.action_high
    else:
        env = task.make_env()
        obs_dim, (low, high) = env.observation_space.shape[0], (env.action_space.low, env.action_space.high)
        env.close()
        check(
            task.obs.shape[1] == obs_dim and task.actions.shape[1] == len(low),
            f"{task.origin} has observations of size {task.obs.shape[1]} and actions of size {task.actions.shape[1]}, its "
            f"environment {obs_dim} and {len(low)}: this is data of another task",
        )
    actions, whose = 2 * (task.actions - low) / (high - low) - 1, "the given" if task.make_env is None else "the environment's"
    check(
        bool((np.abs(actions) <= 1 + 1e-4).all()),
        f"{task.origin} has actions outside {whose} bounds: repair the data or fetch it again",
    )
    return task._replace(actions=actions.clip(-1, 1).astype(np.float32), action_low=low, action_high=high)


def domain(env_id: str) -> str:
    """The family of the D4RL task that `env_id` is or is nearest to: locomotion, antmaze, pen, kitchen; ogbench; "" for none."""
    if is_ogbench(env_id):
        return "ogbench"
    name = (d4rl_id(env_id) or "").split("-")[0]
    return "locomotion" if name in ("halfcheetah", "hopper", "walker2d") else name


def return_range(task: Task) -> float:
    """Largest minus smallest undiscounted return of an episode in the data, as IQL counts episodes.

    An episode ends at a terminal, where the next row does not begin at this row's next_obs (by more than 1e-6), and at the
    last row. Raises UserError if all returns are equal.
    """
    jumps = np.linalg.norm(task.obs[1:].astype(np.float64) - task.next_obs[:-1], axis=1) > 1e-6
    ends = np.append((task.terminals[:-1] == 1) | jumps, True)
    starts = np.concatenate(([0], np.flatnonzero(ends[:-1]) + 1))
    returns = np.add.reduceat(task.rewards.astype(np.float64), starts)
    difference = float(returns.max() - returns.min())
    check(
        difference > 0,
        f"{task.origin}: all {len(returns)} episodes have the same return, by whose range rewards are scaled: "
        "give a data set with better and worse episodes",
    )
    return difference


def _check_env(env: gym.Env, name: str) -> gym.Env:
    """Flatten dictionary observations; insist on a bounded Box of actions."""
    check(
        isinstance(env.action_space, gym.spaces.Box) and env.action_space.is_bounded() and len(env.action_space.shape) == 1,
        f"{name}: actions must be a bounded vector (Box), not {env.action_space}; take a continuous task",
    )
    if not isinstance(env.observation_space, gym.spaces.Box) or len(env.observation_space.shape) != 1:
        env = gym.wrappers.FlattenObservation(env)
    return env


KEYS = {"observations": 2, "actions": 2, "rewards": 1, "terminals": 1}  # of a file of transitions, with their dimensions


def _read_hdf5(file: Path, keys: Sequence[str]) -> dict[str, np.ndarray]:
    with h5py.File(file) as data:
        return {key: np.asarray(data[key][:]) for key in keys if data.get(key, getlink=True) is not None}


def d4rl_transitions(file: Path, limit: int) -> dict[str, np.ndarray]:
    """Transitions of a D4RL HDF5 file, exactly those of d4rl's `qlearning_dataset`, float32.

    next_obs is the next row's observation. Where an episode is cut (`timeouts`, or without that key after `limit`
    steps) there is none, and the row is dropped even if it is also terminal. The last row only serves as next_obs.
    Raises UserError if the file is not HDF5, cut off, lacks a key, or if the keys disagree in length.
    """
    try:
        arrays = _read_hdf5(file, (*KEYS, "timeouts"))
    except Exception as error:  # h5py raises many kinds on wrong bytes
        raise UserError(f"{file} is not a complete HDF5 file ({line(error)[:200]}): delete it to download it again") from None
    missing = [key for key in KEYS if key not in arrays]
    check(not missing, f"{file} lacks the key(s) {', '.join(missing)}: delete it to download it again")
    for key, array in arrays.items():
        check(array.dtype.kind in "buif", f"{file}: {key} are not numbers ({array.dtype}): this is not D4RL's format")
    for key, dimensions in KEYS.items():
        check(
            arrays[key].ndim == dimensions and len(arrays[key]) == len(arrays["observations"]),
            f"{file}: {key} has shape {arrays[key].shape}, which does not fit observations "
            f"{arrays['observations'].shape}: this is not D4RL's format",
        )
    for key in arrays.keys() & {"terminals", "timeouts"}:
        check(
            bool(np.isin(arrays[key], (0, 1)).all()),
            f"{file}: {key} hold something else than 0 and 1: repair the data or delete it to download it again",
        )
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


def _folder(variable: str, below_home: str) -> Path:
    """The folder that an environment variable names, else one in the user's home. Raises UserError if there is neither."""
    try:
        return Path(os.environ.get(variable) or Path.home() / below_home)
    except RuntimeError:
        raise UserError(f"there is no home folder here: name a folder for the data in {variable}") from None


D4RL_SOURCES = ("http://rail.eecs.berkeley.edu/datasets/offline_rl/",)
OGBENCH_SOURCES = (
    "https://rail.eecs.berkeley.edu/datasets/ogbench/",
    "https://huggingface.co/datasets/zhouzypaul/ogbench_datasets/resolve/main/",
)


def _fetch(variable: str, sources: Sequence[str], path: str, file: Path, advice: str, check_file: Callable[[Path], None]) -> None:
    """Make sure that `file` is there: from the address in an environment variable, which comes first, or another source."""
    if file.exists():
        verify_later(file)
        return
    bases = [base for base in (os.environ.get(variable), *sources) if base]
    download([f"{base.rstrip('/')}/{path}" for base in bases], file, advice, check_file)


def _make_d4rl_env(env_id: str) -> gym.Env:
    return gym.make(gym.spec(f"d4rl/{env_id}"))  # a spec, because gym.make(id) warns that v2 is newer than v0


def _normalised(row: d4rl_tasks.D4RLTask, returns: np.ndarray) -> np.ndarray:
    return 100 * (returns - row.min_score) / (row.max_score - row.min_score)


def _load_d4rl(env_id: str) -> Task:
    row = d4rl_tasks.TASKS[env_id]
    folder = _folder("D4RL_DATASET_DIR", ".d4rl/datasets")
    file = folder / row.file
    near = f"; the nearest Minari data set, {row.minari}, is different data" if row.minari else ""
    advice = f"{env_id}: put {row.file} into {folder}{near}"
    _fetch("D4RL_BASE_URL", D4RL_SOURCES, row.path, file, advice, lambda part: h5py.File(part).close())
    return Task(
        **d4rl_transitions(file, row.limit),
        make_env=functools.partial(_make_d4rl_env, env_id),
        score=functools.partial(_normalised, row),
        score_name="D4RL normalised score",
        sparse_goal=env_id.startswith("antmaze"),
        origin=str(file),
        action_low=None,  # these are filled in where the data is checked against the environment
        action_high=None,
    )


def _load_minari(env_id: str) -> Task:
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # Minari's server: the last of its retries says enough
    import minari

    try:
        if not (_minari_root() / env_id / "data").exists():
            if env_id in POINTMAZES:
                collect_pointmaze(env_id)
            else:
                print(f"downloading {env_id} with Minari")
                with _staged_minari(env_id):
                    minari.download_dataset(env_id)
        dataset = minari.load_dataset(env_id)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(
            f"Minari data set {env_id} is neither in {_minari_root()} nor can it be downloaded "
            f"({line(error)}): `minari list remote` shows what there is"
        ) from None
    check(
        isinstance(dataset.action_space, gym.spaces.Box),
        f"{env_id}: actions must be a bounded vector (Box), not {dataset.action_space}; take a continuous task",
    )
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
        raise UserError(f"{env_id}: its environment cannot be made ({line(error)}): install what it needs") from None

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
    except Exception as error:  # h5py and Minari raise many kinds on wrong bytes
        raise UserError(f"{env_id} in {_minari_root()} is damaged ({line(error)[:200]}): delete it and fetch it again") from None
    check(bool(parts["obs"]), f"{env_id} holds no transitions: give a complete data set")

    low, high = (dataset.storage.metadata.get(f"ref_{bound}_score") for bound in ("min", "max"))
    known = low is not None and high is not None
    check(
        not known or bool(np.isfinite([low, high]).all()) and low < high,
        f"{env_id}: its reference scores, {low} and {high}, give no scale: repair its metadata, or take them out",
    )
    return Task(
        **{name: np.concatenate(arrays).astype(np.float32) for name, arrays in parts.items()},
        make_env=make_env,
        score=(lambda returns: 100 * minari.get_normalized_score(dataset, returns)) if known else (lambda returns: returns),
        score_name="Minari normalised score" if known else "return",
        sparse_goal=sparse_goal,
        origin=f"Minari {env_id}",
        action_low=None,
        action_high=None,
    )


def _minari_root() -> Path:
    return _folder("MINARI_DATASETS_PATH", ".minari/datasets")


@contextlib.contextmanager
def _staged_minari(env_id: str) -> Iterator[None]:
    """Let Minari write data set `env_id` to a folder of its own; it is moved to its place when it is whole."""
    root = _minari_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=root, prefix=".incomplete-"))
    except OSError as error:
        raise UserError(f"cannot write {env_id} to {root} ({line(error)}): set MINARI_DATASETS_PATH") from None
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
    with _temporary_files_removed():
        return _check_env(gym.make(spec, **options), name)


@contextlib.contextmanager
def _temporary_files_removed() -> Iterator[None]:
    """gymnasium-robotics' mazes write their model to the temporary folder and leave it there."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory() as tempfile.tempdir:
        try:
            yield
        finally:
            tempfile.tempdir = before


def _flatten(space: gym.Space, rows: Any) -> np.ndarray:
    """Rows of observations (T, ...), nested as in `space`, as (T, S), in the order of FlattenObservation."""
    if isinstance(space, gym.spaces.Dict):
        return np.concatenate([_flatten(sub, rows[key]) for key, sub in space.spaces.items()], axis=1)
    if isinstance(space, gym.spaces.Tuple):
        return np.concatenate([_flatten(sub, row) for sub, row in zip(space.spaces, rows)], axis=1)
    if isinstance(space, gym.spaces.Box):
        return np.asarray(rows).reshape(len(rows), -1)
    return np.stack([gym.spaces.flatten(space, row) for row in rows])


# ---- files that arrive: from the first source that has them, resumed where they were cut off, with a checksum ---------


def download(urls: Sequence[str], file: Path, advice: str, check_file: Callable[[Path], None]) -> None:
    """Download `file` from the first of `urls` that gives it, with a progress bar, and put its SHA-256 beside it.

    `file` appears only when it is complete and `check_file` raises nothing. What was cut off stays as FILE.part and is continued
    if its source has not changed. Raises UserError, ending in `advice`, if no source gives the file or it cannot be written.
    """
    part, source, failures = file.with_name(f"{file.name}.part"), file.with_name(f"{file.name}.part.source"), []
    with contextlib.ExitStack() as opened:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            opened.enter_context(_locked(source, file))
            target = opened.enter_context(open(part, "ab"))
        except OSError as error:
            raise UserError(f"cannot write {file} ({error.strerror or line(error)}). {advice}") from None
        if not file.exists():  # another process may have been faster
            for url in urls:
                try:
                    _download(url, target, source, file.name)
                    try:
                        check_file(part)
                    except Exception:
                        target.truncate(0)
                        raise
                    with open(part, "rb") as content:
                        digest = hashlib.file_digest(content, "sha256").hexdigest()
                    write_atomically(_sums(file), f"{digest}  {file.name}\n".encode())
                    part.replace(file)
                    break
                # URLError and timeouts are OSErrors; what is no HTTP, no address or another format is one of the others
                except (OSError, ValueError, http.client.HTTPException, UserError) as error:
                    failures.append(f"{url} ({line(error)[:200]})")
        if file.exists() or not part.stat().st_size:
            for left in (part, source):
                left.unlink(missing_ok=True)
    check(file.exists(), f"cannot download {', nor '.join(failures)}. {advice}")


def _locked(source: Path, file: Path) -> TextIO:
    """`source`, open, as soon as no other process downloads `file`.

    With flock: a POSIX lock would end when this process closes the same file elsewhere. Not on FILE.part, which HDF5 locks.
    """
    while True:
        lock = open(source, "a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process, which downloads {file}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: go on without
            return lock
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), source.stat()):
                return lock
        lock.close()  # the other process is done, and has taken it away


def _download(url: str, target: BinaryIO, source: Path, name: str) -> None:
    """Append to `target` what it lacks of `url`; all of it unless `source` says that it began there and is unchanged."""
    target.seek(0, os.SEEK_END)
    known = source.read_text().splitlines()
    request = urllib.request.Request(url)
    if target.tell() and known[:1] == [url] and len(known) == 2:
        request.headers |= {"Range": f"bytes={target.tell()}-", "If-range": known[1]}
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing after that byte
            raise
        response = urllib.request.urlopen(url, timeout=30)
    with response:
        if response.status != 206:
            target.truncate(0)
        validator = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        # A weak ETag says nothing of single bytes
        source.write_text(url + (f"\n{validator}" if validator and not validator.startswith("W/") else ""))
        begun = target.seek(0, os.SEEK_END)
        size = begun + int(response.headers.get("Content-Length", 0))
        with progress_bar(
            total=size if size > begun else None, initial=begun, unit="B", unit_scale=True, desc=name, disable=None
        ) as progress:
            while chunk := response.read(1 << 20):
                target.write(chunk)
                progress.update(len(chunk))
        target.flush()
        if size > begun and target.tell() != size:
            raise OSError(f"{target.tell()} of {size} bytes arrived; the same command goes on from there")


def _sums(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


CHECKED, DAMAGED = "# checked", "# damaged"  # last line of FILE.sha256, after `compare` has looked
_checking: list[subprocess.Popen] = []


def verify_later(file: Path) -> None:
    """At the first start after a download, compare the file with its SHA-256, in another process.

    Raises UserError if an earlier such process found it damaged.
    """
    try:
        lines = _sums(file).read_text().splitlines()
    except OSError:
        return  # not downloaded by us
    check(DAMAGED not in lines, f"{file} is not what was downloaded (its SHA-256 has changed): delete it to download it again")
    if CHECKED not in lines:
        with contextlib.suppress(OSError):
            _checking.append(subprocess.Popen([sys.executable, __file__, str(file)], start_new_session=True))


def compare(file: Path) -> None:
    """Compare `file` with its SHA-256 and note what came out there; on stderr too if it differs."""
    with contextlib.suppress(OSError):
        os.nice(10)
        first = _sums(file).read_text().splitlines()[0]
        with open(file, "rb") as content:
            equal = hashlib.file_digest(content, "sha256").hexdigest() == first.split()[0]
        write_atomically(_sums(file), f"{first}\n{CHECKED if equal else DAMAGED}\n".encode())
        if not equal:
            print(f"error: {file} is not what was downloaded (its SHA-256 has changed): stop, and delete it", file=sys.stderr)


# ---- OGBench: state-based single tasks (Park et al. 2025) --------------------------------------------------------------

_OGBENCH = re.compile(
    r"((?!visual-)(?:antmaze|humanoidmaze|pointmaze|antsoccer|cube|scene|puzzle)(?:-(?!\w*oraclerep)\w+)*?)"
    r"-(navigate|stitch|explore|play|noisy)-singletask(-task[1-5])?-v0"
)


def is_ogbench(env_id: str) -> bool:
    """Whether this is the id of one of OGBench's state-based single tasks."""
    return _OGBENCH.fullmatch(env_id) is not None


def discount(env_id: str) -> float:
    """0.99; 0.995 for OGBench's long tasks, as in FQL's official settings."""
    return 0.995 if is_ogbench(env_id) and re.search("giant|humanoidmaze|antsoccer", env_id) else 0.99


def ogbench_defaults(env_id: str) -> dict[str, int]:
    """What FQL's evaluation on OGBench fixes: a million updates, 50 episodes every 100,000. Empty for other tasks."""
    return dict(epochs=1000, eval_every=100, eval_episodes=50) if is_ogbench(env_id) else {}


class OGBenchEnv(gym.Wrapper):
    """An OGBench task whose reward is 1 where it is solved, which ends the episode, and that is as random as its seed.

    The mazes draw from numpy's global state, teleporting ones in their steps too: each copy has a state of its own.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
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
            obs, _, terminated, truncated, info = self.env.step(action)
        solved = bool(info["success"])
        return obs, float(solved), terminated or solved, truncated, info


def _make_ogbench_env(gym_id: str) -> gym.Env:
    if not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "disabled")  # nothing is drawn, and GLFW would complain
    try:
        import ogbench  # noqa: F401  registers the environments
    except ImportError:
        raise UserError(f"{gym_id} needs ogbench: pip install -r requirements.txt") from None
    try:
        return OGBenchEnv(_check_env(gym.make(gym_id), gym_id))
    except gym.error.UnregisteredEnv as error:
        raise UserError(f"OGBench has no {gym_id} ({line(error)[:100]}): see its list of environments") from None


def _load_ogbench(env_id: str) -> Task:
    name, kind, number = _OGBENCH.fullmatch(env_id).groups()
    gym_id, file_name = f"{name}-singletask{number or ''}-v0", f"{name}-{kind}-v0.npz"
    make_env = functools.partial(_make_ogbench_env, gym_id)
    env = make_env()
    import ogbench.relabel_utils

    folder = _folder("OGBENCH_DATASET_DIR", ".ogbench/data")
    file = folder / file_name
    advice = f"{env_id}: put {file_name} into {folder}"
    _fetch("OGBENCH_BASE_URL", OGBENCH_SOURCES, file_name, file, advice, lambda part: np.load(part).close())
    try:
        arrays = ogbench.utils.load_dataset(str(file), add_info=True)
        ogbench.relabel_utils.relabel_dataset(gym_id, env, arrays)
    except Exception as error:  # numpy and zipfile raise many kinds on wrong bytes
        raise UserError(f"{file} is not a complete OGBench file ({line(error)[:200]}): delete it to download it again") from None
    finally:
        env.close()
    columns = ("observations", "actions", "rewards", "masks", "next_observations")
    obs, actions, rewards, masks, next_obs = (np.asarray(arrays[column], np.float32) for column in columns)
    same = len(obs) == len(actions) == len(rewards) == len(masks) == len(next_obs) and obs.ndim == actions.ndim == 2
    check(same, f"{file}: its columns differ in length or dimensions: delete it to download it again")
    return Task(
        obs,
        actions,
        rewards,
        1 - masks,  # not `terminals`, which end trajectories without ending the task
        next_obs,
        make_env,
        score=lambda returns: 100 * returns,
        score_name="success rate",
        sparse_goal=False,  # its rewards are -1 and 0 already, or minus the number of subgoals left
        origin=str(file),
        action_low=None,
        action_high=None,
    )


# ---- your own data -----------------------------------------------------------------------------------------------------


def _load_own(file: Path, env_id: str, action_low: Sequence[float] | None, action_high: Sequence[float] | None) -> Task:
    """A file of transitions, HDF5 or npz, with the environment `env_id`, or without one if that is empty.

    Raises UserError for what cannot be read, and for what can be read in two ways, with the question that is open.
    """
    arrays = _own_arrays(file)
    obs, actions = arrays["observations"].astype(np.float32), arrays["actions"].astype(np.float32)
    terminals = arrays["terminals"].astype(bool)
    if "next_observations" in arrays:
        rows, next_obs = np.arange(len(obs)), arrays["next_observations"].astype(np.float32)
    else:  # the next row, but for the last of a trajectory, which can only be kept if nothing follows it
        cut = arrays["timeouts"].astype(bool) if "timeouts" in arrays else np.zeros(len(obs), bool)
        rows = np.flatnonzero(~cut & (terminals | (np.arange(len(obs)) < len(obs) - 1)))
        next_obs = obs[np.minimum(np.arange(len(obs)) + 1, len(obs) - 1)]
    bounds, row, make_env = (None, None), d4rl_tasks.TASKS.get(env_id), None
    if env_id:
        given = action_low is not None or action_high is not None
        check(not given, f"--action-low and --action-high are for --data without an environment: {env_id} has its own bounds")
        make_env = functools.partial(_make_d4rl_env if row else _make_registered_env, env_id)
        try:
            make_env().close()
        except gym.error.Error as error:
            raise UserError(f"--env-id {env_id} with --data must be a registered Gymnasium id ({line(error)[:200]})") from None
    else:
        bounds = _own_bounds(file, actions, action_low, action_high)
    return Task(
        obs[rows],
        actions[rows],
        arrays["rewards"].astype(np.float32)[rows],
        terminals.astype(np.float32)[rows],
        next_obs[rows],
        make_env,
        score=functools.partial(_normalised, row) if row else lambda returns: returns,
        score_name="D4RL normalised score" if row else "return",
        sparse_goal=row is not None and env_id.startswith("antmaze"),
        origin=str(file),
        action_low=bounds[0],
        action_high=bounds[1],
    )


def _make_registered_env(env_id: str) -> gym.Env:
    return _check_env(gym.make(env_id), env_id)


def _own_arrays(file: Path) -> dict[str, np.ndarray]:
    keys = {**KEYS, "timeouts": 1, "next_observations": 2}
    check(file.is_file(), f"--data {file}: there is no such file; give an HDF5 or npz file with {', '.join(KEYS)}")
    try:
        if zipfile.is_zipfile(file):
            with np.load(file) as source:
                arrays = {key: source[key] for key in keys if key in source}
        else:
            arrays = _read_hdf5(file, list(keys))
    except Exception as error:  # h5py, numpy and zipfile raise many kinds on wrong bytes
        raise UserError(f"--data {file} is no complete HDF5 or npz file ({line(error)[:200]}): save it again") from None
    missing = [key for key in KEYS if key not in arrays]
    check(not missing, f"--data {file} lacks {', '.join(missing)}: save the columns {', '.join(KEYS)}")
    for key, array in arrays.items():
        check(array.dtype.kind in "buif", f"--data {file}: {key} are not numbers ({array.dtype}): save them as float32")
        if keys[key] == 1 and array.ndim == 2 and array.shape[1] == 1:
            array = arrays[key] = array[:, 0]
        question = "is a row one number, or one of a series? Save it as (N, 1)" if array.ndim == 1 else "flatten each row"
        check(array.ndim == keys[key], f"--data {file}: {key} have shape {array.shape}, not {keys[key]} dimension(s): {question}")
        number = len(arrays["observations"])
        check(len(array) == number, f"--data {file}: {number} observations and {len(array)} {key}: which belong together?")
    check(
        arrays["actions"].dtype.kind == "f",
        f"--data {file}: actions are {arrays['actions'].dtype}: are they discrete? Continuous ones are float32",
    )
    for key in arrays.keys() & {"terminals", "timeouts"}:
        check(bool(np.isin(arrays[key], (0, 1)).all()), f"--data {file}: {key} hold something else than 0 and 1")
    if "next_observations" in arrays:
        shapes = arrays["observations"].shape, arrays["next_observations"].shape
        check(
            shapes[0] == shapes[1], f"--data {file}: observations {shapes[0]} and next_observations {shapes[1]} differ in shape"
        )
    ends = arrays["terminals"].astype(bool)
    if "timeouts" in arrays:
        both = int((ends & arrays["timeouts"].astype(bool)).sum())
        check(both == 0, f"--data {file}: {both} row(s) are terminal and timeout: did the task end there, or only the recording?")
    elif "next_observations" not in arrays:
        check(
            bool(ends.any()),
            f"--data {file}: no row is terminal and there are neither timeouts nor next_observations: where does a trajectory "
            "end? Add timeouts with 1 in the last row of each",
        )
    return arrays


def _own_bounds(
    file: Path, actions: np.ndarray, low: Sequence[float] | None, high: Sequence[float] | None
) -> tuple[np.ndarray, np.ndarray]:
    check((low is None) == (high is None), "--action-low and --action-high belong together: give both, or none")
    size = actions.shape[1]
    if low is None:
        low, high = actions.min(0, initial=np.inf), actions.max(0, initial=-np.inf)
        constant = [str(i) for i in range(size) if low[i] == high[i]]
        check(
            not constant,
            f"--data {file}: action(s) {', '.join(constant)} never change: what are the bounds? Give --action-low, --action-high",
        )
        show = lambda bound: " ".join(f"{value:g}" for value in bound)
        print(f"action bounds are the range of {file}: --action-low {show(low)} --action-high {show(high)}")
    for flag, bound in (("--action-low", low), ("--action-high", high)):
        check(len(bound) in (1, size), f"{flag} has {len(bound)} numbers, an action {size}: give one for all, or one for each")
    low, high = (np.broadcast_to(np.asarray(bound, np.float32), size).copy() for bound in (low, high))
    check(bool((low < high).all() and np.isfinite(high - low).all()), "--action-low must lie below --action-high, both finite")
    return low, high


# ---- mazes that collect their own data ---------------------------------------------------------------------------------

# gymnasium-robotics' PointMaze and steps of data; the first is the demo
POINTMAZES = {
    DEMO_ID: ("PointMaze_UMaze-v3", 100_000),
    "dtql/pointmaze-medium-v0": ("PointMaze_Medium-v3", 200_000),
    "dtql/pointmaze-large-v0": ("PointMaze_Large-v3", 200_000),
}
Cell = tuple[int, int]  # row, column


def shortest_paths(maze_map: list[list[Any]], start: Cell) -> dict[Cell, list[Cell]]:
    """The shortest path from `start` to each free cell, both ends included, nearest cells first."""
    paths, queue = {start: [start]}, [start]
    for row, column in queue:  # breadth first: the queue grows while it is walked through
        for cell in ((row, column + 1), (row + 1, column), (row, column - 1), (row - 1, column)):
            if maze_map[cell[0]][cell[1]] != 1 and cell not in paths:
                paths[cell] = [*paths[row, column], cell]
                queue.append(cell)
    return paths


def _free_cells(maze_map: list[list[Any]]) -> list[Cell]:
    return [(i, j) for i, row in enumerate(maze_map) for j, cell in enumerate(row) if cell != 1]


def collect_pointmaze(env_id: str) -> None:
    """Collect a maze's data into a local Minari data set: a point mass between random cells.

    A scripted controller (PD with noise) drives along shortest paths, as D4RL's maze2d data was made. Evaluation goes from one
    end of the maze's longest shortest path to the other.
    """
    import minari

    gym_id, total = POINTMAZES[env_id]
    with _staged_minari(env_id):
        maze_map = [list(row) for row in gym.spec(gym_id).kwargs["maze_map"]]
        paths = {cell: shortest_paths(maze_map, cell) for cell in _free_cells(maze_map)}
        goal, start = max(((a, b) for a in paths for b in paths), key=lambda ends: len(paths[ends[0]][ends[1]]))
        maze_map[goal[0]][goal[1]] = "g"
        evaluation_map = [list(row) for row in maze_map]
        evaluation_map[start[0]][start[1]] = "r"
        cells = list(paths[goal])
        make = functools.partial(gym.make, gym_id, continuing_task=False, disable_env_checker=True)
        env = minari.DataCollector(make(maze_map=maze_map))
        maze, rng = env.unwrapped.maze, np.random.default_rng(0)
        with progress_bar(total=total, unit="step", desc=f"collecting the data of {env_id}") as progress:
            steps = 0
            while steps < total:
                obs, _ = env.reset(seed=int(rng.integers(2**31)))
                done, path = False, []
                while not done:
                    position, velocity = obs["observation"][:2], obs["observation"][2:]
                    if not path:  # walk to another cell, through all the cells between
                        here = tuple(int(i) for i in maze.cell_xy_to_rowcol(position))
                        path = list(paths[here][cells[rng.integers(len(cells))]])
                    target = maze.cell_rowcol_to_xy(np.array(path[0]))
                    action = 10 * (target - position) - velocity + 0.5 * rng.standard_normal(2)
                    obs, _, terminated, truncated, _ = env.step(action.clip(-1, 1).astype(np.float32))
                    done = terminated or truncated
                    if np.linalg.norm(target - obs["achieved_goal"]) < 0.3:
                        path.pop(0)
                    steps += 1
                    progress.update()
        evaluation_env = make(maze_map=evaluation_map)
        env.create_dataset(
            env_id,
            eval_env=evaluation_env,
            algorithm_name="PD controller between random cells",
            author="DTQL",
            author_email="none",
            code_permalink="none",
            ref_min_score=0.0,
            ref_max_score=1.0,
            description="A maze of the DTQL scripts",
        )
        env.close()


if __name__ == "__main__":
    compare(Path(sys.argv[1]))
