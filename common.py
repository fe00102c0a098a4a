"""Shared helpers: command line, one-line errors, run folders, checkpoints. Nothing here depends on an algorithm."""

import contextlib
import csv
import dataclasses
import datetime
import importlib.metadata
import io
import itertools
import json
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
import typing
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import filelock
import numpy as np
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import evaluation
import stacked


class UserError(Exception):
    """An error that the user can fix. The message is one line that says what to do."""


class Diverged(UserError):
    """A loss or a parameter is no longer finite."""


class InUse(UserError):
    """Another process is writing to the run's folder."""


class Unwritable(UserError):
    """The disk is full, or writing is not permitted."""


def check(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def line(error: BaseException) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__


# ---- command line --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Args:
    """The arguments of every script; a script adds those of its method."""

    env_id: str = "dtql/pointmaze-umaze-v0"
    """D4RL (hopper-medium-v2), Minari (contains a slash) or OGBench id (contains singletask); default: a demo without download"""
    data: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """your own transitions, HDF5 or npz (docs/tasks.md); evaluated if --env-id names a Gymnasium environment"""
    action_low: tuple[float, ...] | None = None
    """lower bounds of the actions in --data without an environment: one number, or one per dimension; default: their range"""
    action_high: tuple[float, ...] | None = None
    """upper bounds, likewise"""
    seed: int = 0
    """seed of the first model; the others have seed + 1, seed + 2, ..."""
    num_seeds: int = 1
    """number of seeds to train in parallel (for each combination, if flags have several values)"""
    cuda: bool = torch.cuda.is_available()
    """train on the GPU"""
    torch_deterministic: bool = True
    """use deterministic kernels, so that a run can be repeated exactly on the same machine"""
    compile: bool = False
    """compile losses and policy with torch.compile; takes about a minute; on by default for runs of 10,000 updates or more"""
    cudagraphs: bool = torch.cuda.is_available()
    """replay each update as a CUDA graph (ignored with --no-cuda)"""
    resume: Annotated[str | None, tyro.conf.arg(metavar="RUN_DIR")] = None
    """folder of a run to continue exactly where it stopped, with the settings it was started with"""
    run_dir: str = "runs"
    """folder in which the run's own folder is created"""
    batch_size: int = 256
    """minibatch size"""
    epochs: int = 2
    """training epochs"""
    steps_per_epoch: int = 1000
    """updates per epoch"""
    eval_every: int = 50
    """training epochs between evaluations; the last epoch is always evaluated"""
    eval_episodes: int = 20
    """episodes per evaluation and model"""

    sweep: typing.ClassVar[tuple[str, ...]] = ()  # arguments that accept several values, each of which is trained

    def values(self, name: str) -> tuple[Any, ...]:
        """The values of an argument, of which those in `sweep` may have several."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,)

    def check(self) -> None:
        """Raise UserError for invalid settings. Scripts extend it."""
        for name in ("num_seeds", "batch_size", "steps_per_epoch", "eval_every", "eval_episodes"):
            check(1 <= getattr(self, name) <= 1e9, f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        check(0 <= self.epochs <= 1e9, f"--epochs must not be negative, not {self.epochs}")
        check(0 <= self.seed < 2**63 - self.num_seeds, f"--seed must lie in [0, 2^63 - --num-seeds), not {self.seed}")
        for name in self.sweep:
            check(len(set(self.values(name))) == len(self.values(name)) > 0, f"--{name}: give each value once")
        check(self.num_models <= 10_000, f"{self.num_models} models are too many: give fewer values or --num-seeds")

    @property
    def combinations(self) -> list[dict[str, float]]:
        """Every combination of the values of the arguments in `sweep`."""
        return [dict(zip(self.sweep, each)) for each in itertools.product(*map(self.values, self.sweep))]

    @property
    def num_models(self) -> int:
        """K: every combination with every seed."""
        return len(self.combinations) * self.num_seeds

    @property
    def model_seeds(self) -> list[int]:
        """The seed of each model: all seeds of the first combination, then those of the next."""
        return list(range(self.seed, self.seed + self.num_seeds)) * len(self.combinations)

    def per_model(self, name: str, device: torch.device) -> torch.Tensor:
        """The value of an argument in `sweep` for each model, (K,)."""
        values = [float(each[name]) for each in self.combinations for _ in range(self.num_seeds)]
        return torch.tensor(values, device=device)

    @property
    def labels(self) -> list[str]:
        """What distinguishes each model's combination, such as "alpha=5"; empty strings if there is one combination."""
        several = [name for name in self.sweep if len(self.values(name)) > 1]
        each = [" ".join(f"{name}={combination[name]:g}" for name in several) for combination in self.combinations]
        return [label for label in each for _ in range(self.num_seeds)]

    def of_model(self, index: int) -> "Args":
        """The arguments of a run of model `index` alone."""
        return dataclasses.replace(self, **self.combinations[index // self.num_seeds], seed=self.model_seeds[index], num_seeds=1)

    @property
    def pretrain_steps(self) -> int:
        """Updates before the training epochs."""
        return getattr(self, "pretrain_epochs", 0) * self.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Updates of the whole run."""
        return self.pretrain_steps + self.epochs * self.steps_per_epoch


def parse_args(cls: type, task_defaults: Callable[[str], dict[str, Any]], argv: Sequence[str] | None = None) -> Any:
    """Parse the command line into the dataclass `cls`, with the defaults of the given task.

    `task_defaults(env_id)` gives the fields in which a task differs from `cls`. With `--resume RUN_DIR` the defaults are the
    settings of that run. Exits with status 2 and one line on stderr if the arguments cannot be parsed.
    """
    first = dataclasses.make_dataclass("First", [(name, str | None, None) for name in ("env_id", "data", "resume")])
    given, _ = cli(first, argv, return_unknown_args=True, add_help=False)
    env_id = given.env_id if given.env_id is not None else cls.env_id if given.data is None else ""
    if given.resume is not None:
        settings = saved_settings(cls, read_config(given.resume)["args"], f"--resume {given.resume}")
        # The run may continue on a machine without a GPU (--no-cuda)
        settings |= {"resume": given.resume, "cudagraphs": settings["cudagraphs"] and torch.cuda.is_available()}
        return cli(cls, argv, default=cls(**settings))
    settings = {"env_id": env_id, **task_defaults(env_id)}
    default = cls(**settings)
    args = cli(cls, argv, default=dataclasses.replace(default, compile=default.total_steps >= 10_000))
    # The length on the command line decides whether compiling pays
    return cli(cls, argv, default=dataclasses.replace(default, compile=args.total_steps >= 10_000))


def cli(cls: type, argv: Sequence[str] | None = None, **options: Any) -> Any:
    """`tyro.cli` with one-line errors. Exits with status 2 if the arguments cannot be parsed."""
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


def run(main: Callable[[Any], Any], parse: Callable[[], Any]) -> None:
    """Run `main(parse())` as a program: a UserError is one line on stderr and exit status 2; SIGINT and SIGTERM 130 and 143."""
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


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM. `consistent`: raised by `check_stop`, so that the state can be saved."""

    def __init__(self, number: int, consistent: bool = False):
        self.number, self.consistent = number, consistent


_stop_signal = 0  # received during a run, pending until the next `check_stop`


def request_stop(number: int, frame: Any = None) -> None:
    """Signal handler of a run: stop at the next `check_stop`; a second signal stops at once."""
    global _stop_signal
    if _stop_signal:
        raise Interrupted(number)
    _stop_signal = number
    os.write(2, b"\nstopping after this update or environment step; a second signal stops at once\n")


def stop_now(number: int, frame: Any = None) -> None:
    """Signal handler before and after a run."""
    raise Interrupted(number)


def check_stop() -> None:
    """Raise Interrupted if a signal has arrived. Call it only where the state is consistent."""
    if _stop_signal:
        raise Interrupted(_stop_signal, consistent=True)


# ---- devices and files -------------------------------------------------------------------------------------------------


def find_device(args: Any) -> torch.device:
    """The device to train on. Raises UserError if a GPU is requested and there is none."""
    for flag in ("cuda", "cudagraphs"):
        usable = not getattr(args, flag, False) or torch.cuda.is_available()
        check(usable, f"--{flag}: PyTorch finds no usable GPU here; train on the CPU with --no-{flag}")
    return torch.device("cuda" if args.cuda else "cpu")


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the CPU and the number of threads that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        name = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):  # not Linux, or a processor without a name there
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} thread(s)"


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed PyTorch and choose whether its kernels must be deterministic."""
    # cuBLAS needs this for reproducible results; filling uninitialised memory is for debugging and costs time
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(deterministic)
    torch.manual_seed(seed)


def progress_bar(**kwargs: Any) -> tqdm:
    """A tqdm bar that is drawn often on a terminal and rarely in a log file."""
    return tqdm(mininterval=0.2 if sys.stderr.isatty() else 30, **kwargs)


def write_atomically(file: Path, content: bytes) -> None:
    """Write to a temporary file, flush it to disk and rename it to `file`, which is always the old version or the new one.

    Raises Unwritable, with no temporary file left.
    """
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as target:  # "x" does not follow a link to another file
            target.write(content)
            target.flush()
            os.fsync(target.fileno())
        temporary.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise Unwritable(f"cannot write {file} ({error.strerror or line(error)}): free some space or check permissions") from None


def check_writable(file: Path, flag: str) -> None:
    """Raise UserError, before any work, unless `file` can be written. Creates its folder."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        existed = file.exists()
        open(file, "ab").close()
        if not existed:
            file.unlink()
    except OSError as error:
        raise UserError(f"cannot write {file} ({error.strerror or line(error)}): choose another {flag}") from None


def to_csv(fields: Sequence[str], rows: Sequence[dict[str, Any]]) -> bytes:
    """A table with a header."""
    target = io.StringIO(newline="")
    writer = csv.DictWriter(target, fields)
    writer.writeheader()
    writer.writerows(rows)
    return target.getvalue().encode()


# ---- checkpoints -------------------------------------------------------------------------------------------------------

FORMAT = 3  # of a run's folder; other formats are those of other versions of this project


def read_config(run_dir: str) -> dict[str, Any]:
    """config.json of a run. Raises UserError if the folder holds no run of this version."""
    try:
        config = json.loads((Path(run_dir) / "config.json").read_text()) if run_dir else {}
        check(config["format"] == FORMAT, f"{run_dir} was made by another version of this project: resume it with that version")
        return config
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{run_dir or '(empty)'} is not a run ({line(error)}): give a folder with config.json and checkpoint.pt"
        ) from None


def saved_settings(cls: type, saved: dict[str, Any], place: str) -> dict[str, Any]:
    """The arguments of `cls` as saved; those that did not exist yet take their defaults, those that are gone are named."""
    names = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(saved.keys() - names):
        print(f"note: {place} has settings that this script does not know: {', '.join(unknown)}", file=sys.stderr)
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items() if name in names}
    return {**{field.name: field.default for field in dataclasses.fields(cls)}, **settings}


def open_checkpoint(file: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """A checkpoint as `Run` saved it. Raises UserError if it is missing, damaged or something else."""
    check(
        torch.device(device).type != "cuda" or torch.cuda.is_available(), f'no usable GPU here: use device="cpu", not "{device}"'
    )
    try:
        with zipfile.ZipFile(file) as archive:  # torch does not verify the checksums in its own files
            check(archive.testzip() is None, "a checksum is wrong")
        saved = torch.load(file, map_location=device, weights_only=True)
        version = saved["format"] if isinstance(saved, dict) and "format" in saved else None
    except Exception as error:  # torch's own advice, weights_only=False, would let a foreign file run code
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is damaged or not a checkpoint"
        raise UserError(f"cannot read the checkpoint {file} ({reason}): give the checkpoint.pt of a run") from None
    check(version == FORMAT, f"{file} is of another version of this project, or not a checkpoint of it: train again")
    return saved


def load_policy(
    checkpoint: str, script: str, make_agent: Callable, cls: type, index: int, device: str, seed: int, **changes: Any
) -> Callable[[np.ndarray], np.ndarray]:
    """What every script's `load_policy` does. `changes`: settings that differ from the checkpoint's, unless None."""
    saved = open_checkpoint(checkpoint, device)
    check(saved["exp_name"] == Path(script).stem, f"{checkpoint} was written by {saved['exp_name']}.py: load it with that script")
    args = cls(**saved_settings(cls, saved["args"], checkpoint))
    check(-args.num_models <= index < args.num_models, f"{checkpoint} holds {args.num_models} model(s): there is no {index}")
    index %= args.num_models
    changes = {name: value for name, value in changes.items() if value is not None}
    args = dataclasses.replace(args.of_model(index), compile=False, **changes)
    args.check()
    low, high = (saved[name].cpu().numpy() for name in ("action_low", "action_high"))
    agent = make_agent(args, saved["obs_dim"], len(low), torch.device(device))
    params = dict(agent.named_parameters())
    with torch.no_grad():
        for name, value in agent.state_dict(keep_vars=True).items():
            check(name in saved["agent"], f"{checkpoint} has no {name}: it is of another version of {saved['exp_name']}.py")
            value.copy_(saved["agent"][name][index : index + 1] if name in params else saved["agent"][name])
    check(all(bool(param.isfinite().all()) for param in params.values()), f"{checkpoint} holds NaN or infinity: train again")
    generator = torch.Generator(device).manual_seed(seed)

    def act(obs: np.ndarray) -> np.ndarray:
        obs = np.asarray(obs, np.float32)
        shape = f"({saved['obs_dim']},)"
        check(
            obs.ndim in (1, 2) and obs.shape[-1] == saved["obs_dim"],
            f"observations have shape {obs.shape}, not {shape} or (B, *{shape})",
        )
        check(bool(np.isfinite(obs).all()), "observations must be finite, but some are NaN or infinite")
        actions = agent.act(torch.as_tensor(np.atleast_2d(obs)[None], device=device), generator)[0]
        return evaluation.to_env_units(actions.cpu().numpy().reshape(*obs.shape[:-1], -1), low, high)

    act.about = {"seed": args.seed, **{name: args.values(name)[0] for name in args.sweep}}
    return act


# ---- a run's folder ----------------------------------------------------------------------------------------------------

LOG_EVERY = 100  # updates between readings of the losses, which make the host wait for the device
EVAL_FIELDS = ("epoch", "seed", "return_mean", "return_std", "score_mean", "score_std", "length_mean", "episodes",
               "train_seconds", "eval_seconds")  # fmt: skip
EPISODE_FIELDS = ("epoch", "seed", "episode", "return", "score", "length")
HARDWARE = ("resume", "run_dir", "cuda", "compile", "cudagraphs")  # what may change when a run is resumed


def evaluate(
    task: Any, envs: evaluation.LockstepEnvs, act: Callable, args: Args, epoch: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Returns, scores and lengths (K, E) of an evaluation's episodes, and its seconds. Does not affect training."""
    start, entropy = time.perf_counter(), np.random.SeedSequence([args.seed, epoch]).generate_state(1, np.uint64)[0]
    generator = torch.Generator(device).manual_seed(int(entropy))

    def act_in_env(obs: np.ndarray) -> np.ndarray:
        check_stop()
        actions = act(torch.as_tensor(obs, device=device), generator).cpu().numpy()
        return evaluation.to_env_units(actions, task.action_low, task.action_high)

    seeds = evaluation.episode_seeds(args.model_seeds, epoch, args.eval_episodes)
    returns, lengths = evaluation.run_episodes(envs, act_in_env, seeds)
    return returns, np.asarray(task.score(returns), np.float64), lengths, time.perf_counter() - start


class Run:
    """A run's folder and everything written to it, with the progress bar. Use it as a context manager.

    On SIGINT or SIGTERM the run stops at the next `check_stop`, with a checkpoint. Disk errors end it with a UserError; the
    last checkpoint remains valid.
    """

    def __init__(self, script: str, args: Args, task: Any, envs: evaluation.LockstepEnvs, agent: Any):
        """Create the folder, or with `args.resume` load its checkpoint into `agent`. Raises UserError if that fails.

        script: the file that runs. agent: an nn.Module whose optimizers are attributes (see `stacked.state_of`).
        """
        self.args, self.task, self.envs, self.agent = args, task, envs, agent
        self.device, self.exp_name, self.total_steps = next(agent.parameters()).device, Path(script).stem, args.total_steps
        self.step, self.train_seconds, self.logged_step, self.saved_step, self.saved_rows = 0, 0.0, 0, -1, 0
        self.sums: dict[str, torch.Tensor] = {}  # of the metrics since the last log, (K,)
        self.rows: list[dict[str, Any]] = []  # of eval.csv
        self.episodes: list[dict[str, Any]] = []  # one entry per evaluation: its returns, scores and lengths (K, E)
        self.saved_at, self.save_seconds = time.perf_counter(), 0.0
        data = {"origin": task.origin, "transitions": len(task.obs), "fingerprint": task.fingerprint(), "score": task.score_name}
        if args.resume is not None:
            self.dir = Path(args.resume)
            config = read_config(args.resume)
            self._lock()
            self._resume(config, data)
        else:
            self.dir = _create_run_dir(args, self.exp_name)
            try:
                self._lock()
                self._begin(script, data)
            except BaseException:
                shutil.rmtree(self.dir, ignore_errors=True)
                raise
        if not args.cuda and not torch.cuda.is_available():
            print("no GPU found: training on the CPU", file=sys.stderr)
        print(f"{self.dir}: {args.num_models} model(s), {len(task.obs):,} transitions from {task.origin}, on {self.device}")

    def _begin(self, script: str, data: dict[str, Any]) -> None:
        versions = {"python": platform.python_version()}
        for package in ("torch", "numpy", "gymnasium", "gymnasium-robotics", "mujoco", "minari", "ogbench"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # ogbench is optional
                versions[package] = importlib.metadata.version(package)
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        config = {"format": FORMAT, "exp_name": self.exp_name, "args": dataclasses.asdict(self.args), "data": data,
                  "device": device_name(self.device), "started": started, "versions": versions}  # fmt: skip
        write_atomically(self.dir / Path(script).name, Path(script).read_bytes())
        write_atomically(self.dir / "config.json", json.dumps(config, indent=2).encode())
        self.save()

    def _resume(self, config: dict[str, Any], data: dict[str, Any]) -> None:
        place, name = f"--resume {self.dir}", config["exp_name"]
        check(
            name == self.exp_name, f"{place}: that run was made by {name}.py, not {self.exp_name}.py; resume it with that script"
        )
        before = saved_settings(type(self.args), config["args"], place)
        for name, value in dataclasses.asdict(self.args).items():
            same = name in HARDWARE or before[name] == value
            check(same, f"{place}: that run has {name} = {before[name]}, not {value}; leave the flag out")
        same = config["data"]["fingerprint"] == data["fingerprint"]
        check(same, f"{place}: {data['origin']} is not the data that the run began with; restore it")
        saved = open_checkpoint(self.dir / "checkpoint.pt", self.device)
        try:
            stacked.load_state(self.agent, saved["agent"])
            torch.set_rng_state(saved["random_state"].cpu())
            if self.device.type == "cuda" and saved["cuda_random_state"] is not None:
                torch.cuda.set_rng_state(saved["cuda_random_state"].cpu())
        except (ValueError, RuntimeError, TypeError) as error:
            raise UserError(f"{place}: its checkpoint does not fit ({line(error)}): it is of another script or version") from None
        for name in ("step", "logged_step", "train_seconds", "sums", "rows"):
            setattr(self, name, saved[name])
        self.episodes = [{name: torch.as_tensor(value).cpu() for name, value in entry.items()} for entry in saved["episodes"]]
        self.saved_step, self.saved_rows = self.step, len(self.rows)
        if self.rows:
            self._write_tables()

    def _lock(self) -> None:
        """Raise InUse if another process writes here. The lock ends with this process, however that ends."""
        self.lock = filelock.FileLock(self.dir / ".lock")
        try:
            self.lock.acquire(timeout=0)
        except filelock.Timeout:
            raise InUse(f"{self.dir}: another process is writing to this run; wait for it or stop it") from None
        except NotImplementedError:  # a file system without locks
            pass
        except OSError as error:
            raise Unwritable(f"cannot write to {self.dir} ({error.strerror}): free some space or check permissions") from None

    def __enter__(self) -> "Run":
        global _stop_signal
        _stop_signal = 0
        self.handlers = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        self.excepthook, threading.excepthook = threading.excepthook, self._on_thread_error
        # A killed run may have logged beyond its last checkpoint: those events are dropped
        self.writer = SummaryWriter(str(self.dir), purge_step=self.step + 1 if self.step else None)
        self.progress = progress_bar(total=self.total_steps, initial=self.step, unit="update", smoothing=0.05)
        self.clock = time.perf_counter()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        global _stop_signal
        self.progress.close()
        with contextlib.suppress(OSError):  # a full disk, which a checkpoint has reported by now
            self.writer.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        threading.excepthook, _stop_signal = self.excepthook, 0
        resume = f"continue with --resume {self.dir}"
        try:
            if isinstance(error, Interrupted) and error.consistent:
                self.save()
                print(f"stopped at update {self.step}; {resume}", file=sys.stderr)
            if isinstance(error, (OSError, Unwritable)):
                reason = f"cannot write to {self.dir} ({getattr(error, 'strerror', None) or line(error)}): free some space"
                raise Unwritable(f"{reason}; its checkpoint of update {self.saved_step} is valid: {resume}") from None
            if isinstance(error, evaluation.EnvironmentFailure):
                raise UserError(f"{line(error)}; the run is saved: when that is fixed, {resume}") from None
        finally:
            self.envs.close()
            self.lock.release()

    def _on_thread_error(self, error: Any) -> None:
        if not issubclass(error.exc_type, OSError):  # TensorBoard's thread: the next event raises it again, here
            self.excepthook(error)

    @property
    def epoch(self) -> int:
        """Training epochs begun so far; negative during pretraining."""
        return (self.step - self.args.pretrain_steps) // self.args.steps_per_epoch

    def evaluation_due(self) -> bool:
        """Whether an evaluation belongs here and has not been done: every `eval_every` training epochs and at the end."""
        begins = self.step % self.args.steps_per_epoch == 0 and self.epoch >= 0
        due = self.step == self.total_steps or self.epoch > 0 and self.epoch % self.args.eval_every == 0
        return bool(self.task.make_env) and begins and due and not any(row["epoch"] == self.epoch for row in self.rows)

    def until_log(self) -> int:
        """Updates until the metrics should be logged."""
        within = self.step % self.args.steps_per_epoch
        return min(self.args.steps_per_epoch - within, LOG_EVERY - within % LOG_EVERY)

    def advance(self, metrics: dict[str, torch.Tensor]) -> None:
        """Count one more update and add up its metrics. Raises Interrupted if a signal has arrived."""
        for name in metrics.keys() - self.sums.keys():
            self.sums[name] = torch.zeros_like(metrics[name])
        torch._foreach_add_([self.sums[name] for name in metrics], list(metrics.values()))
        self.step += 1
        self.progress.update()
        check_stop()

    def log(self) -> None:
        """Write the metrics since the last log, and a checkpoint if one is due. Raises Diverged if one is not finite."""
        each = torch.stack([value.expand(self.args.num_models) for value in self.sums.values()]).cpu()  # waits for the device
        each /= max(1, self.step - self.logged_step)
        losses = dict(zip(self.sums, each.mean(1).tolist()))
        seconds, self.clock = time.perf_counter() - self.clock, time.perf_counter()
        self.train_seconds += seconds
        if not all(map(np.isfinite, losses.values())):
            raise self._diverged(
                f"a loss is no longer finite ({', '.join(f'{name} {mean:.3g}' for name, mean in losses.items())})"
            )
        for name, mean in losses.items():
            self.writer.add_scalar(f"losses/{name}", mean, self.step)
        labels = dict.fromkeys(filter(None, self.args.labels))
        for label, part in zip(labels, each.split(self.args.num_seeds, 1)):
            for name, mean in zip(self.sums, part.mean(1).tolist()):
                self.writer.add_scalar(f"losses_{label.replace(' ', '_')}/{name}", mean, self.step)
        self.writer.add_scalar("charts/SPS", (self.step - self.logged_step) / seconds, self.step)
        last = [row["score_mean"] for row in self.rows if row["epoch"] == self.rows[-1]["epoch"]]
        shown = {name: f"{mean:.3g}" for name, mean in losses.items()} | ({"score": f"{np.mean(last):.1f}"} if last else {})
        self.progress.set_postfix(shown, refresh=False)
        self.sums, self.logged_step = {}, self.step
        if time.perf_counter() - self.saved_at > 20 * self.save_seconds:  # checkpoints take a twentieth of the time at most
            self.save()

    def _diverged(self, what: str) -> Diverged:
        good = f"{self.dir}/checkpoint.pt of update {self.saved_step} is valid"
        return Diverged(f"update {self.step}: {what}; {good}; try a lower --learning-rate")

    def evaluate(self, act: Callable[[torch.Tensor, torch.Generator], torch.Tensor]) -> None:
        """Run the evaluation's episodes with `act`; write eval.csv, episodes.csv, TensorBoard and a checkpoint."""
        self.save()  # nothing that was trained is lost, whatever the environment does
        args = self.args
        returns, scores, lengths, seconds = evaluate(self.task, self.envs, act, args, self.epoch, self.device)
        rows = [
            dict(zip(EVAL_FIELDS, (self.epoch, seed, float(returns[i].mean()), float(returns[i].std()), float(scores[i].mean()),
                                   float(scores[i].std()), float(lengths[i].mean()), args.eval_episodes,
                                   round(self.train_seconds, 3), seconds)))
            | ({"setting": args.labels[i]} if args.labels[i] else {})
            for i, seed in enumerate(args.model_seeds)
        ]  # fmt: skip
        self.rows += rows
        results = {"epoch": torch.tensor(self.epoch), "return": returns, "score": scores, "length": lengths}
        self.episodes.append({name: torch.as_tensor(value) for name, value in results.items()})
        self.save()  # before the tables, so that they never hold a row that a resumed run computes again
        self._write_tables()
        for name in ("return_mean", "score_mean", "length_mean"):
            for row in rows:
                label = f"_{row['setting'].replace(' ', '_')}" if "setting" in row else ""
                self.writer.add_scalar(f"eval/{name}{label}_seed{row['seed']}", row[name], self.step)
            self.writer.add_scalar(f"eval/{name}", np.mean([row[name] for row in rows]), self.step)
        score, length = f"{self.task.score_name} {_by_setting(rows)}", f"{lengths.mean():.0f} steps per episode"
        self.progress.write(f"epoch {self.epoch}: {score}, {length}, {seconds:.0f} s")
        self.clock = time.perf_counter()  # evaluation is not training time

    def _write_tables(self) -> None:
        labels = self.args.labels
        setting = ("setting",) if labels[0] else ()  # if several are trained at once
        write_atomically(self.dir / "eval.csv", to_csv((*EVAL_FIELDS, *setting), self.rows))
        rows = [
            {"epoch": int(entry["epoch"]), "seed": self.args.model_seeds[i], "episode": episode}
            | {name: entry[name][i, episode].item() for name in ("return", "score", "length")}
            | {name: labels[i] for name in setting}
            for entry in self.episodes
            for i, episode in np.ndindex(*entry["return"].shape)
        ]
        write_atomically(self.dir / "episodes.csv", to_csv((*EPISODE_FIELDS, *setting), rows))

    def save(self) -> None:
        """Write checkpoint.pt: everything that the run needs to continue as if it had not stopped."""
        if self.saved_step == self.step and self.saved_rows == len(self.rows):
            return
        start, state = time.perf_counter(), stacked.state_of(self.agent)
        if not all(bool(value.isfinite().all()) for value in state.values()):
            raise self._diverged("a parameter is no longer finite")
        names = ("exp_name", "step", "logged_step", "train_seconds", "sums", "rows", "episodes")
        checkpoint = {name: getattr(self, name) for name in names} | {
            "format": FORMAT,
            "args": dataclasses.asdict(self.args),
            "obs_dim": self.task.obs.shape[1],
            "action_low": torch.as_tensor(self.task.action_low),
            "action_high": torch.as_tensor(self.task.action_high),
            "agent": state,
            "random_state": torch.get_rng_state(),
            "cuda_random_state": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
        }
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_atomically(self.dir / "checkpoint.pt", content.getvalue())
        self.saved_step, self.saved_rows, self.saved_at = self.step, len(self.rows), time.perf_counter()
        self.save_seconds = self.saved_at - start

    def summary(self) -> dict[str, Any]:
        """Print the closing line; returns the folder and the rows of eval.csv."""
        result, ended = "trained without an environment, so without a score", f"{self.train_seconds / 60:.1f} min of training"
        if self.rows:
            by_epoch = {row["epoch"]: [other for other in self.rows if other["epoch"] == row["epoch"]] for row in self.rows}
            best = max(by_epoch, key=lambda epoch: np.mean([row["score_mean"] for row in by_epoch[epoch]]))
            last = f"{_by_setting(by_epoch[max(by_epoch)])} (last)"
            result = f"{self.task.score_name} {last}, {_by_setting(by_epoch[best])} (best, epoch {best})"
        print(f"{self.args.env_id or self.args.data}: {result}; {self.args.num_models} model(s), {ended}, {self.dir}")
        return {"run_dir": str(self.dir), "rows": self.rows}


def _by_setting(rows: list[dict[str, Any]]) -> str:
    """Mean score and its standard error over all episodes of all models, for each combination of settings."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row.get("setting", ""), []).append(row)
    texts = []
    for label, group in groups.items():
        means, stds = (np.array([row[name] for row in group]) for name in ("score_mean", "score_std"))
        error = np.sqrt(((stds**2).mean() + means.var()) / sum(row["episodes"] for row in group))
        texts.append((f"{label}: " if label else "") + f"{means.mean():.1f} ± {error:.1f}")
    return ", ".join(texts)


def _create_run_dir(args: Args, exp_name: str) -> Path:
    """Create the folder `{env_id}__{exp_name}__{seed}__{unix time}`. Raises UserError if that fails."""
    name, now = (args.env_id or Path(args.data).stem).replace("/", "-"), int(time.time())
    try:
        Path(args.run_dir).mkdir(parents=True, exist_ok=True)
        while True:
            run_dir = Path(args.run_dir) / f"{name}__{exp_name}__{args.seed}__{now}"
            with contextlib.suppress(FileExistsError):  # two runs in the same second
                run_dir.mkdir()
                return run_dir
            now += 1
    except OSError as error:
        raise UserError(f"cannot create a run folder in {args.run_dir} ({line(error)}): choose another --run-dir") from None
