"""A run's folder: settings, checkpoints, tables, TensorBoard, progress; and the evaluations in it."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import io
import json
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

import common
import evaluation
import stacked
from common import Args, Diverged, Interrupted, Unwritable, UserError, check, check_stop, line, write_atomically

LOG_EVERY = 100  # updates between readings of the losses, which make the host wait for the device
EVAL_FIELDS = ("epoch", "seed", "return_mean", "return_std", "score_mean", "score_std", "length_mean", "episodes",
               "train_seconds", "eval_seconds")  # fmt: skip
EPISODE_FIELDS = ("epoch", "seed", "episode", "return", "score", "length")
# When a run is resumed; data may have moved
MAY_CHANGE = ("resume", "run_dir", "device", "compile", "cudagraphs", "data", "evaluate_only", "track")
MAY_GROW = ("epochs", "eval_episodes")


def evaluate(
    task: Any, envs: evaluation.LockstepEnvs, act: Callable, args: Args, epoch: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Returns, scores and lengths (K, E) of an evaluation's episodes, and its seconds. Does not affect training."""
    start, entropy = time.perf_counter(), np.random.SeedSequence([args.seed, epoch]).generate_state(1, np.uint64)[0]
    generator, chunk = torch.Generator(device).manual_seed(int(entropy)), getattr(args, "chunk", 1)

    def act_in_env(obs: np.ndarray) -> np.ndarray:
        check_stop()
        actions = act(torch.as_tensor(task.normalized(obs), device=device), generator).cpu().numpy()
        return evaluation.to_env_units(actions.reshape(*obs.shape[:2], chunk, -1), task.action_low, task.action_high)

    seeds = evaluation.episode_seeds(args.model_seeds, epoch, args.eval_episodes)
    returns, lengths = evaluation.run_episodes(envs, act_in_env, seeds, chunk)
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
        self.tracked: Any = None  # the W&B run of --track
        self.before_save: Callable[[Path], None] | None = None  # writes what a method keeps beside the checkpoint
        data = {"origin": task.origin, "transitions": len(task.obs), "fingerprint": task.fingerprint(), "score": task.score_name}
        if args.resume is not None:
            self.dir = Path(args.resume)
            config = common.read_config(args.resume)
            self.lock = self._lock()
            self._resume(config, data)
            self._keep_edited(Path(script))
        else:
            self.dir = _create_run_dir(args, self.exp_name)
            try:
                self.lock = self._lock()
                self._begin(Path(script), data)
            except BaseException:
                shutil.rmtree(self.dir, ignore_errors=True)
                raise
        if args.device == "auto" and self.device.type == "cpu":
            print(f"PyTorch {torch.__version__} finds no GPU: training on the CPU", file=sys.stderr)
        if self.device.type == "mps":
            print("note: MPS has no CUDA graphs: going on without them", file=sys.stderr)
        print(f"{self.dir}: {args.num_models} model(s), {len(task.obs):,} transitions from {task.origin}, on {self.device}")

    def _begin(self, script: Path, data: dict[str, Any]) -> None:
        versions = {"python": platform.python_version()}
        for package in ("torch", "numpy", "gymnasium", "gymnasium-robotics", "mujoco", "minari", "ogbench"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # ogbench is optional
                versions[package] = importlib.metadata.version(package)
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        settings = dataclasses.asdict(self.args)
        if self.args.data is not None:  # the run may be resumed from another folder
            settings["data"] = str(Path(self.args.data).absolute())
        config = {"format": common.FORMAT, "exp_name": self.exp_name, "args": settings, "data": data,
                  "device": common.device_name(self.device), "started": started, "versions": versions}  # fmt: skip
        write_atomically(self.dir / script.name, script.read_bytes())
        write_atomically(self.dir / "config.json", json.dumps(config, indent=2).encode())
        self.save()

    def _resume(self, config: dict[str, Any], data: dict[str, Any]) -> None:
        place, name = f"--resume {self.dir}", config["exp_name"]
        check(
            name == self.exp_name, f"{place}: that run was made by {name}.py, not {self.exp_name}.py; resume it with that script"
        )
        before = common.saved_settings(type(self.args), config["args"], place)
        for name, value in dataclasses.asdict(self.args).items():
            same = name in MAY_CHANGE or before[name] == value or name in MAY_GROW and value > before[name]
            check(same, f"{place}: that run has {name} = {before[name]}, not {value}; leave the flag out")
        same = config["data"]["fingerprint"] == data["fingerprint"]
        check(same, f"{place}: {data['origin']} is not the data that the run began with; restore it")
        saved = common.open_checkpoint(self.dir / "checkpoint.pt", self.device)
        try:
            stacked.load_state(self.agent, saved["agent"])
            if saved.get("device", "cpu") == self.device.type:
                stacked.default_generator(self.device).set_state(saved["random_state"].cpu())
        except (ValueError, RuntimeError, TypeError) as error:
            raise UserError(f"{place}: its checkpoint does not fit ({line(error)}): it is of another script or version") from None
        for name in ("step", "logged_step", "train_seconds", "sums", "rows"):
            setattr(self, name, saved[name])
        grown = {name: getattr(self.args, name) for name in MAY_GROW}
        if grown != {name: before[name] for name in MAY_GROW} and self.args.evaluate_only is None:
            print(f"note: {place} goes on with {grown}; a schedule along the epochs is that of the new length", file=sys.stderr)
            config["args"] |= grown
            write_atomically(self.dir / "config.json", json.dumps(config, indent=2).encode())
        self.episodes = [{name: torch.as_tensor(value).cpu() for name, value in entry.items()} for entry in saved["episodes"]]
        self.saved_step, self.saved_rows = self.step, len(self.rows)
        if self.rows:
            self._write_tables()

    def _keep_edited(self, script: Path) -> None:
        """Keep a script that was edited since the run began beside the one that it began with."""
        latest = max(self.dir.glob(f"{script.stem}*.py"), key=lambda copy: copy.stat().st_mtime, default=None)
        if latest is None or latest.read_bytes() != script.read_bytes():
            copy = self.dir / f"{script.stem}_from_update_{self.step}.py"
            write_atomically(copy, script.read_bytes())
            print(f"note: {script.name} was edited since this run began; from here on it is {copy.name}", file=sys.stderr)

    def _lock(self) -> filelock.FileLock:
        return common.lock(self.dir / ".lock", f"{self.dir}: another process is writing to this run; wait for it or stop it")

    def __enter__(self) -> "Run":
        self.signals = common.signals_held()
        self.signals.__enter__()
        self.excepthook, threading.excepthook = threading.excepthook, self._on_thread_error
        if self.args.track:
            self._track()
        # A killed run may have logged beyond its last checkpoint: those events are dropped
        self.writer = SummaryWriter(str(self.dir), purge_step=self.step + 1 if self.step else None)
        self.progress = common.progress_bar(total=self.total_steps, initial=self.step, unit="update", smoothing=0.05)
        self.clock = time.perf_counter()
        return self

    def _track(self) -> None:
        """Log to Weights & Biases what TensorBoard gets; a resumed run goes on in its own W&B run."""
        import wandb

        settings = json.loads((self.dir / "config.json").read_text())
        self.tracked = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "dtql"), id=self.dir.name, name=self.dir.name, dir=str(self.dir),
            config=settings, sync_tensorboard=True, resume="allow",
        )  # fmt: skip

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        self.progress.close()
        with contextlib.suppress(OSError):  # a full disk, which a checkpoint has reported by now
            self.writer.close()
        if self.tracked is not None:
            self.tracked.finish()
        self.signals.__exit__(None, None, None)
        threading.excepthook = self.excepthook
        resume = f"continue with --resume {self.dir}"
        try:
            if isinstance(error, Interrupted) and error.consistent:
                self.save()
                print(f"stopped at update {self.step}; {resume}", file=sys.stderr)
            if isinstance(error, (OSError, Unwritable)):
                reason = f"cannot write to {self.dir} ({getattr(error, 'strerror', None) or line(error)}): free some space"
                raise Unwritable(f"{reason}; its checkpoint of update {self.saved_step} is valid: {resume}") from None
            if isinstance(error, evaluation.EnvironmentFailure):
                saved = f"the checkpoint of update {self.saved_step} is valid"
                raise UserError(f"{line(error)}; {saved}: when that is fixed, {resume}") from None
        finally:
            self.envs.close()
            self.lock.release()

    def _on_thread_error(self, error: Any) -> None:
        if not issubclass(error.exc_type, OSError):  # TensorBoard's thread: the next event raises it again, here
            self.excepthook(error)

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to train."""
        return self.step == self.total_steps or self.args.evaluate_only is not None

    @property
    def epoch(self) -> int | float:
        """Training epochs so far, a whole number at their ends; negative during pretraining."""
        epochs = (self.step - self.args.pretrain_steps) / self.args.steps_per_epoch
        return int(epochs) if epochs == int(epochs) else epochs

    def evaluation_due(self) -> bool:
        """Whether an evaluation belongs here and has not been done."""
        if self.args.evaluate_only is not None:
            return True
        due = bool(self.task.make_env) and self.args.evaluated_at(self.step)
        return due and not any(row["epoch"] == self.epoch for row in self.rows)

    def until_log(self) -> int:
        """Updates until the metrics should be logged or an evaluation is due."""
        within = self.step % self.args.steps_per_epoch
        most = min(self.args.steps_per_epoch - within, LOG_EVERY - within % LOG_EVERY)
        return next((n for n in range(1, most) if self.args.evaluated_at(self.step + n)), most)

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
        last = [row["score_mean"] for row in self._rows_of(self.rows[-1]["epoch"])] if self.rows else []
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
        args = self.args
        if args.evaluate_only is not None:
            return self._evaluate_only(act)
        self.save()  # nothing that was trained is lost, whatever the environment does
        number = self.epoch if isinstance(self.epoch, int) else self.step  # of this evaluation: gives its episodes' seeds
        returns, scores, lengths, seconds = evaluate(self.task, self.envs, act, args, number, self.device)
        rows = [
            dict(zip(EVAL_FIELDS, (self.epoch, seed, float(returns[i].mean()), float(returns[i].std()), float(scores[i].mean()),
                                   float(scores[i].std()), float(lengths[i].mean()), args.eval_episodes,
                                   round(self.train_seconds, 3), seconds)))
            | {name: value for name, value in (("phase", args.phase(self.step)), ("setting", args.labels[i])) if value}
            for i, seed in enumerate(args.model_seeds)
        ]  # fmt: skip
        self.rows += rows
        results = {"epoch": torch.tensor(self.epoch), "return": returns, "score": scores, "length": lengths}
        self.episodes.append({name: torch.as_tensor(value) for name, value in results.items()})
        content = self.save()  # before the tables, so that they never hold a row that a resumed run computes again
        if content and self._best_epoch() == self.epoch:
            write_atomically(self.dir / "best.pt", content)
        self._write_tables()
        for name in ("return_mean", "score_mean", "length_mean"):
            for row in rows:
                label = f"_{row['setting'].replace(' ', '_')}" if "setting" in row else ""
                self.writer.add_scalar(f"eval/{name}{label}_seed{row['seed']}", row[name], self.step)
            self.writer.add_scalar(f"eval/{name}", np.mean([row[name] for row in rows]), self.step)
        score, length = f"{self.task.score_name} {_by_setting(rows)}", f"{lengths.mean():.0f} steps per episode"
        self.progress.write(f"epoch {self.epoch}: {score}, {length}, {seconds:.0f} s")
        self.clock = time.perf_counter()  # evaluation is not training time

    def _rows_of(self, epoch: int | float) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["epoch"] == epoch]

    def _best_epoch(self) -> int | float:
        """The epoch of the evaluation with the best mean score, the first of equals."""
        scores: dict[int | float, list[float]] = {}
        for row in self.rows:
            scores.setdefault(row["epoch"], []).append(row["score_mean"])
        return max(scores, key=lambda epoch: np.mean(scores[epoch]))

    def _evaluate_only(self, act: Callable[[torch.Tensor, torch.Generator], torch.Tensor]) -> None:
        """Evaluate on episodes that no evaluation of the run has had; write evaluation.csv."""
        args = dataclasses.replace(self.args, eval_episodes=self.args.evaluate_only)
        check(self.task.make_env is not None, "--evaluate-only needs an environment: give --env-id")
        returns, scores, lengths, _ = evaluate(self.task, self.envs, act, args, 2**32 + self.step, self.device)
        rows = [
            {"step": self.step, "seed": args.model_seeds[i], "setting": args.labels[i], "episode": episode,
             "return": returns[i, episode], "score": scores[i, episode], "length": lengths[i, episode]}
            for i, episode in np.ndindex(*returns.shape)
        ]  # fmt: skip
        write_atomically(self.dir / "evaluation.csv", common.to_csv(list(rows[0]), rows))
        for i, seed in enumerate(args.model_seeds):
            error = scores[i].std() / np.sqrt(scores.shape[1])
            what = f"{self.task.score_name} {scores[i].mean():.1f} ± {error:.1f}, return {returns[i].mean():.1f}"
            print(f"update {self.step}, seed {seed} {args.labels[i]}: {what}, {scores.shape[1]} episodes")

    def _write_tables(self) -> None:
        labels = self.args.labels
        setting = ("setting",) if labels[0] else ()  # if several are trained at once
        write_atomically(self.dir / "eval.csv", common.to_csv(list(self.rows[0]), self.rows))
        rows = [
            {"epoch": entry["epoch"].item(), "seed": self.args.model_seeds[i], "episode": episode}
            | {name: entry[name][i, episode].item() for name in ("return", "score", "length")}
            | {name: labels[i] for name in setting}
            for entry in self.episodes
            for i, episode in np.ndindex(*entry["return"].shape)
        ]
        write_atomically(self.dir / "episodes.csv", common.to_csv((*EPISODE_FIELDS, *setting), rows))

    def save(self) -> bytes | None:
        """Write checkpoint.pt: everything that the run needs to continue as if it had not stopped. Returns what was written."""
        if self.saved_step == self.step and self.saved_rows == len(self.rows):
            return None
        start, state = time.perf_counter(), stacked.state_of(self.agent)
        if self.before_save:
            self.before_save(self.dir)
        if not all(bool(value.isfinite().all()) for value in state.values()):
            raise self._diverged("a parameter is no longer finite")
        names = ("exp_name", "step", "logged_step", "train_seconds", "sums", "rows", "episodes")
        checkpoint = {name: getattr(self, name) for name in names} | {
            "format": common.FORMAT,
            "args": dataclasses.asdict(self.args),
            "obs_dim": self.task.obs.shape[1],
            "action_low": torch.as_tensor(self.task.action_low),
            "action_high": torch.as_tensor(self.task.action_high),
            "obs_mean": torch.as_tensor(self.task.obs_mean),
            "obs_std": torch.as_tensor(self.task.obs_std),
            "agent": state,
            "device": self.device.type,
            "random_state": stacked.default_generator(self.device).get_state(),
        }
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_atomically(self.dir / "checkpoint.pt", content.getvalue())
        self.saved_step, self.saved_rows, self.saved_at = self.step, len(self.rows), time.perf_counter()
        self.save_seconds = self.saved_at - start
        return content.getvalue()

    def summary(self) -> dict[str, Any]:
        """Print the closing line; returns the folder and the rows of eval.csv."""
        result, ended = "trained without an environment, so without a score", f"{self.train_seconds / 60:.1f} min of training"
        if self.rows:
            best = self._best_epoch()
            last = f"{_by_setting(self._rows_of(self.rows[-1]['epoch']))} (last)"
            result = f"{self.task.score_name} {last}, {_by_setting(self._rows_of(best))} (best, epoch {best})"
        origin = f"data {self.task.origin}"
        print(f"{self.args.env_id or 'no environment'}: {result}; {self.args.num_models} model(s), {ended}, {origin}, {self.dir}")
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
