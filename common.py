"""Shared helpers: command line, one-line errors, run folders, checkpoints. Nothing here depends on an algorithm."""

import contextlib
import csv
import dataclasses
import importlib.util
import io
import itertools
import json
import os
import platform
import re
import signal
import sys
import typing
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import filelock
import numpy as np
import torch
import tyro
from tqdm import tqdm

import evaluation


class UserError(Exception):
    """An error that the user can fix. The message is one line that says what to do."""


class Diverged(UserError):
    """A loss or a parameter is no longer finite."""


class InUse(UserError):
    """Another process is writing to the same place."""


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
    """D4RL (hopper-medium-v2), Minari (D4RL/pen/human-v2) or OGBench id (contains singletask); default: a demo, no download"""
    data: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """your own transitions, HDF5 or npz (docs/tasks.md); evaluated if --env-id names a Gymnasium environment"""
    action_low: tuple[float, ...] | None = None
    """lower bounds of the actions in --data without an environment: one number, or one per dimension; default: their range"""
    action_high: tuple[float, ...] | None = None
    """upper bounds, likewise"""
    sparse_rewards: bool = False
    """OGBench's scene and puzzle: reward -1 until all is done, as in later papers, not minus the number of open subgoals"""
    seed: int = 0
    """seed of the first model; the others have seed + 1, seed + 2, ..."""
    num_seeds: int = 1
    """number of seeds to train in parallel (for each combination, if flags have several values)"""
    device: str = "auto"
    """auto (a CUDA GPU if there is one, else the CPU), cpu, cuda, cuda:1, ..., or mps"""
    torch_deterministic: bool = True
    """use deterministic kernels, so that a run can be repeated exactly on the same machine"""
    compile: bool = False
    """compile losses and policy with torch.compile; takes about a minute; on by default for runs of 10,000 updates or more"""
    cudagraphs: bool = True
    """on CUDA: replay each update as a CUDA graph"""
    matmul_precision: Literal["highest", "high"] = "highest"
    """of float32 matrix products on CUDA; high: TF32, faster and with a mantissa of 10 bits in place of 23"""
    resume: Annotated[str | None, tyro.conf.arg(metavar="RUN_DIR")] = None
    """folder of a run to continue exactly where it stopped, with the settings it was started with"""
    evaluate_only: int | None = None
    """with --resume: evaluate the checkpoint on so many episodes per model, write evaluation.csv and train nothing"""
    track: bool = False
    """log to Weights & Biases too, if it is installed (WANDB_PROJECT, WANDB_MODE and so on are its own)"""
    run_dir: str = "runs"
    """folder in which the run's own folder is created"""
    normalize: bool = False
    """standardise observations with the data's mean and standard deviation; for large ones, such as coordinates in a maze"""
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
    max_episode_steps: int | None = None
    """cut episodes in the environment after so many steps; default: as the environment does"""

    sweep: typing.ClassVar[tuple[str, ...]] = ()  # arguments that accept several values, each of which is trained

    def values(self, name: str) -> tuple[Any, ...]:
        """The values of an argument, of which those in `sweep` may have several."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,)

    def check(self) -> None:
        """Raise UserError for invalid settings. Scripts extend it."""
        for name in ("num_seeds", "batch_size", "steps_per_epoch", "eval_every", "eval_episodes"):
            check(1 <= getattr(self, name) <= 1e9, f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        check(self.max_episode_steps is None or self.max_episode_steps >= 1, "--max-episode-steps must be at least 1")
        there = not self.track or importlib.util.find_spec("wandb") is not None
        check(there, "--track needs Weights & Biases: pip install wandb, or leave the flag out")
        check(self.evaluate_only is None or self.resume is not None, "--evaluate-only needs --resume RUN_DIR")
        check(self.evaluate_only is None or 1 <= self.evaluate_only <= 1e9, "--evaluate-only must be at least 1")
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

    def evaluated_at(self, step: int) -> bool:
        """Whether an evaluation belongs after `step` updates: every `eval_every` training epochs and at the end."""
        epoch, rest = divmod(step - self.pretrain_steps, self.steps_per_epoch)
        return step == self.total_steps or rest == 0 and epoch > 0 and epoch % self.eval_every == 0

    def phase(self, step: int) -> str | None:
        """The phase that an evaluation after `step` updates belongs to, for methods that have several."""
        return None


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
        return cli(cls, argv, default=cls(**(settings | {"resume": given.resume})))
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
    except BrokenPipeError:  # of `--help | head`; at exit Python would flush stdout once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


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


stop_signal = 0  # received during a run, pending until the next `check_stop`


def request_stop(number: int, frame: Any = None) -> None:
    """Signal handler of a run: stop at the next `check_stop`; a second signal stops at once."""
    global stop_signal
    if stop_signal:
        raise Interrupted(number)
    stop_signal = number
    os.write(2, b"\nstopping after this update or environment step; a second signal stops at once\n")


def stop_now(number: int, frame: Any = None) -> None:
    """Signal handler before and after a run."""
    raise Interrupted(number)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Within, SIGINT and SIGTERM wait for the next `check_stop`, so that libraries cannot swallow them."""
    global stop_signal
    stop_signal = 0
    before = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        stop_signal = 0


def check_stop() -> None:
    """Raise Interrupted if a signal has arrived. Call it only where the state is consistent."""
    if stop_signal:
        raise Interrupted(stop_signal, consistent=True)


# ---- devices and files -------------------------------------------------------------------------------------------------


def find_device(name: str) -> torch.device:
    """The device that `--device` names. Raises UserError if there is no such device here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check(re.fullmatch(r"cpu|mps|cuda(:\d{1,2})?", name), f"--device {name}: there are auto, cpu, cuda, cuda:1, ... and mps")
    device = torch.device(name)
    if device.type == "cuda":
        there = torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    else:
        there = device.type == "cpu" or torch.backends.mps.is_available()
    check(there, f"--device {name}: PyTorch {torch.__version__} finds no such GPU here; use --device cpu")
    return device


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the CPU and the number of threads that PyTorch uses."""
    if device.type != "cpu":
        return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} GPU"
    try:
        name = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):  # not Linux, or a processor without a name there
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} thread(s)"


def set_up_torch(args: Args, device: torch.device) -> None:
    """Seed PyTorch; set its current GPU, the precision of its products and whether its kernels must be deterministic."""
    if device.index is not None:
        torch.cuda.set_device(device)
    torch.set_float32_matmul_precision(args.matmul_precision)
    # cuBLAS needs this for reproducible results; filling uninitialised memory is for debugging and costs time
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.manual_seed(args.seed)


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


def lock(file: Path, busy: str) -> filelock.FileLock:
    """Hold a lock on `file` until its release, or until this process ends. Raises InUse(busy) if another process holds it."""
    held = filelock.FileLock(file)
    try:
        held.acquire(timeout=0)
    except filelock.Timeout:
        raise InUse(busy) from None
    except NotImplementedError:  # a file system without locks
        pass
    except OSError as error:
        raise Unwritable(f"cannot write to {file.parent} ({error.strerror}): free some space or check permissions") from None
    return held


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
    place = find_device(device)
    saved = open_checkpoint(checkpoint, place)
    check(saved["exp_name"] == Path(script).stem, f"{checkpoint} was written by {saved['exp_name']}.py: load it with that script")
    args = cls(**saved_settings(cls, saved["args"], checkpoint))
    check(-args.num_models <= index < args.num_models, f"{checkpoint} holds {args.num_models} model(s): there is no {index}")
    index %= args.num_models
    changes = {name: value for name, value in changes.items() if value is not None}
    args = dataclasses.replace(args.of_model(index), compile=False, track=False, **changes)
    args.check()
    low, high = (saved[name].cpu().numpy() for name in ("action_low", "action_high"))
    # BC's checkpoints of before --normalize was every method's have these in the agent
    mean, std = (torch.as_tensor(saved.get(name, saved["agent"].get(name, default))).cpu().numpy()
                 for name, default in (("obs_mean", 0.0), ("obs_std", 1.0)))  # fmt: skip
    agent = make_agent(args, saved["obs_dim"], len(low), place)
    params = dict(agent.named_parameters())
    with torch.no_grad():
        for name, value in agent.state_dict(keep_vars=True).items():
            if name.split(".")[0] in saved.get("left_out", ()):  # what acting does not need (tools.export)
                continue
            check(name in saved["agent"], f"{checkpoint} has no {name}: it is of another version of {saved['exp_name']}.py")
            value.copy_(saved["agent"][name][index : index + 1] if name in params else saved["agent"][name])
    check(all(bool(param.isfinite().all()) for param in params.values()), f"{checkpoint} holds NaN or infinity: train again")
    generator, plan = torch.Generator(device).manual_seed(seed), []  # what is left of a chunk of actions

    def act(obs: np.ndarray) -> np.ndarray:
        obs = np.asarray(obs, np.float32)
        fits = obs.ndim in (1, 2) and obs.shape[-1] == saved["obs_dim"]
        check(fits, f"observations have shape {obs.shape}, not ({saved['obs_dim']},) or (B, {saved['obs_dim']})")
        check(bool(np.isfinite(obs).all()), "observations must be finite, but some are NaN or infinite")
        if plan and plan[0].shape[:-1] == obs.shape[:-1]:
            return plan.pop(0)
        scaled = torch.as_tensor((np.atleast_2d(obs)[None] - mean) / std, device=device)
        actions = agent.act(scaled, generator)[0].cpu().numpy()
        check(bool(np.isfinite(actions).all()), "the policy gives NaN for these observations: are they on the scale of the data?")
        plan[:] = evaluation.to_env_units(np.moveaxis(actions.reshape(*obs.shape[:-1], -1, len(low)), -2, 0), low, high)
        return plan.pop(0)

    act.reset = plan.clear  # an episode begins
    act.agent, act.obs_dim, act.low, act.high, act.obs_mean, act.obs_std = agent, saved["obs_dim"], low, high, mean, std
    act.about = {"seed": args.seed, **{name: args.values(name)[0] for name in args.sweep}}
    return act
