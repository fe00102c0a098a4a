"""Many runs, methods x tasks x seeds, on one machine or a Ray cluster, and their report beside the paper's tables.

    python -m tools.benchmark                                       three mazes that collect their own data, every method, 3 seeds
    python -m tools.benchmark --tasks paper --methods dtql_continuous --num-seeds 5 --gpus-per-run 0.5        Table 1
    python -m tools.benchmark --tasks gym --out-dir no_nll -- --no-nll --epochs 100                    flags for the scripts
    python -m tools.benchmark --address auto ...                    on the Ray cluster that this machine belongs to
    python -m tools.benchmark --out-dir bench --report-only         the report of what is there, finished or not

Running the same command again does what is left: a run that was killed goes on from its checkpoint.
"""

import contextlib
import itertools
import json
import os
import shlex
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import common
import evaluation
import tasks
from common import UserError, check
from tools import ROOT, import_method, methods, report

SHARED_VARIABLES = (
    "D4RL_DATASET_DIR",
    "D4RL_BASE_URL",
    "DTQL_DATASET_DIR",
    "MINARI_DATASETS_PATH",
    "OGBENCH_DATASET_DIR",
    "OGBENCH_BASE_URL",
)


@dataclass
class Args:
    """Train and evaluate methods x tasks x seeds and write their report. Flags behind `--` go to the scripts."""

    tasks: tuple[str, ...] = ("pointmaze",)
    """ids, groups: pointmaze, gym, antmaze, antmaze-v2, adroit, kitchen, paper (Table 1: gym antmaze adroit kitchen), ogbench,
    ogbench-manipulation, ogbench-pointmaze, and an environment's five tasks: cube-single-play-singletask-all"""
    methods: tuple[str, ...] = methods()
    """scripts, without .py"""
    num_seeds: int = 3
    """seeds 0, 1, ... of each task and method"""
    out_dir: str = "bench"
    """folder of the runs and the report; with --address one that all nodes see"""
    gpus_per_run: float = float(torch.cuda.is_available())
    """GPUs, or a fraction of one, for each run"""
    cpus_per_run: int = 1
    """CPU cores for each run, its evaluation included"""
    one_run_per_seed: bool = False
    """spread the seeds of a task and method over several runs, in place of training them together as one stack"""
    address: str | None = None
    """of a Ray cluster ("auto" finds the one of this machine); by default a local one is started and ended"""
    print_commands: bool = False
    """print a shell line for each run, for Slurm and the like, and do nothing else"""
    report_only: bool = False
    """write the report of what is there and train nothing"""


class Job(NamedTuple):
    """One run of a script in a folder of its own, OUT/<task>/<method>/<first seed>."""

    task: str
    method: str
    seed: int
    num_seeds: int
    folder: str
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.task} {self.method} {self.seed}"

    def argv(self) -> list[str]:
        """The script's arguments: a new run, or the one that is there, from its checkpoint."""
        checkpoints = sorted(Path(self.folder).glob("*/checkpoint.pt"))
        if checkpoints:
            hardware = [flag for flag in self.flags if flag.startswith("--device=")]
            return ["--resume", str(checkpoints[-1].parent), *hardware]
        return [
            "--env-id",
            self.task,
            "--seed",
            str(self.seed),
            "--num-seeds",
            str(self.num_seeds),
            "--run-dir",
            self.folder,
            *self.flags,
        ]

    def ended(self) -> bool:
        """Whether there is nothing left to do: the run is done, or its loss diverged. Bad input may have been mended."""
        result = report.read_status(Path(self.folder))
        return result is not None and result["status"] in ("", "diverged")


def expand_tasks(names: Sequence[str]) -> list[str]:
    """Ids of the groups and ids in `names`, each once. Raises UserError for one that is neither."""
    ids: list[str] = []
    for name in names:
        if name.endswith("-singletask-all"):
            group = [f"{name.removesuffix('all')}task{number}-v0" for number in range(1, 6)]
            check(tasks.is_ogbench(group[0]), f"unknown task {name}: cube-single-play-singletask-all is one that OGBench has")
            ids += group
            continue
        if name not in report.GROUPS:
            try:
                tasks.check_id(name)
            except UserError as error:
                raise UserError(f"{error}; groups are {', '.join(report.GROUPS)}") from None
        ids += report.GROUPS.get(name, [name])
    return list(dict.fromkeys(ids))


def make_jobs(args: Args, flags: Sequence[str]) -> list[Job]:
    """The runs of a benchmark. Raises UserError for unknown tasks, methods or flags."""
    for method in args.methods:
        check(method in methods(), f"unknown method {method}: there are {', '.join(methods())}")
    check(1 <= args.num_seeds <= 10_000, f"--num-seeds must be at least 1, not {args.num_seeds}")
    check(0 <= args.gpus_per_run <= 1000, f"--gpus-per-run must be at least 0, not {args.gpus_per_run}")
    check(1 <= args.cpus_per_run <= 10_000, f"--cpus-per-run must be at least 1, not {args.cpus_per_run}")
    for flag in flags:
        own = flag.split("=")[0] in ("--env-id", "--seed", "--num-seeds", "--run-dir", "--resume")
        check(not own, f"{flag} cannot be passed on: the benchmark sets it for each run")
    seeds = range(args.num_seeds) if args.one_run_per_seed else [0]
    # Runs of the same shapes share the compiler's cache, so that it pays even for short ones
    hardware = ("--compile", f"--device={'cuda' if args.gpus_per_run else 'cpu'}")
    out = Path(args.out_dir).absolute()
    num_seeds = 1 if args.one_run_per_seed else args.num_seeds
    jobs = itertools.product(expand_tasks(args.tasks), dict.fromkeys(args.methods), seeds)
    folder = lambda *names: str(out.joinpath(*names))
    return [
        Job(task, method, seed, num_seeds, folder(task.replace("/", "-"), method, str(seed)), (*hardware, *flags))
        for task, method, seed in jobs
    ]


# ---- one run, in a process of its own ----------------------------------------------------------------------------------


@contextlib.contextmanager
def output_to(file: Path) -> Iterator[None]:
    """Append all output of this process, that of its children too, to `file`."""
    saved = [os.dup(number) for number in (1, 2)]
    with open(file, "a", buffering=1, errors="replace") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            for number in (1, 2):
                os.dup2(log.fileno(), number)
            yield
        finally:
            for number, old in zip((1, 2), saved):
                os.dup2(old, number)
                os.close(old)


def run_job(job: Job, cpus: int) -> dict[str, Any]:
    """Run a script's `main` to its end. Returns how it ended, and leaves that in the job's folder.

    Bad input and a diverged loss are results, not errors: trying again would not help. Whatever else goes wrong is raised.
    """
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(cpus)
    evaluation.LockstepEnvs.max_workers = cpus - 1
    started, status = time.time(), ""
    module = import_method(job.method)
    with output_to(folder / "log.txt"):
        while True:
            try:
                module.main(common.parse_args(module.Args, module.task_defaults, job.argv()))
            except UserError as error:
                print(f"error: {error}")
                if isinstance(error, common.InUse) and time.time() < started + 120:
                    time.sleep(2)  # a benchmark that was killed: its run is about to end
                    continue
                if isinstance(error, (common.InUse, common.Unwritable)):
                    raise  # may have passed when the command is given again: not a result
                status = "diverged" if isinstance(error, common.Diverged) else str(error)
            except Exception:
                traceback.print_exc()  # into the log
                raise
            except SystemExit:
                status = "its flags are wrong: see log.txt"
            break
    result = {
        "task": job.task,
        "method": job.method,
        "seed": job.seed,
        "status": status,
        "seconds": round(time.time() - started, 1),
    }
    common.write_atomically(folder / report.STATUS_FILE, json.dumps(result).encode())
    return result


# ---- all of them -------------------------------------------------------------------------------------------------------


def check_room(args: Args, nodes: Sequence[dict[str, float]]) -> None:
    """Raise UserError if none of the machines with these resources has room for a run, which would wait for ever."""
    for flag, name, wanted in (("--cpus-per-run", "CPU", args.cpus_per_run), ("--gpus-per-run", "GPU", args.gpus_per_run)):
        most = max((node.get(name, 0) for node in nodes), default=0)
        check(wanted <= most, f"{flag} {wanted:g}: no machine here has more than {most:g} {name}s")


def start_ray(args: Args) -> Any:
    """Connect to the cluster, or start a local one. Raises UserError if nobody answers or a run can never be placed."""
    os.environ.update(
        RAY_USAGE_STATS_ENABLED="0", RAY_task_oom_retries="3", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0", RAY_DEDUP_LOGS="0"
    )
    try:
        import ray
    except ImportError:
        raise UserError("the benchmark needs Ray: pip install -r requirements-dev.txt") from None
    import ray._private.worker as ray_worker

    ray_worker._worker_logs_enabled = False  # of dead workers, which are tried again; log_to_driver does not silence those
    if args.address not in (None, "auto"):  # Ray itself tries for minutes
        host, _, port = args.address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, ValueError) as error:
            raise UserError(f"--address {args.address}: no Ray cluster answers there ({common.line(error)})") from None
        print(f"connecting to the Ray cluster at {args.address}; Ray gives up after some minutes", file=sys.stderr)
    # Nodes find the scripts and the data where this machine has them
    seen = {name: os.environ[name] for name in SHARED_VARIABLES if name in os.environ}
    settings: dict[str, Any] = {"runtime_env": {"env_vars": {**seen, "PYTHONPATH": str(ROOT)}}}
    if args.address is None:
        check_room(args, [{"CPU": os.cpu_count(), "GPU": torch.cuda.device_count()}])
        # 80 MiB suit small /dev/shm; results are dictionaries of a few words
        settings |= dict(num_cpus=os.cpu_count(), object_store_memory=80 << 20, include_dashboard=False)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            ray.init(address=args.address or "local", log_to_driver=False, logging_level="critical", **settings)
    except (Exception, SystemExit) as error:
        where = f"--address {args.address}: no Ray cluster answers there" if args.address else "Ray does not start"
        raise UserError(f"{where} ({common.line(error)[:200]})") from None
    if args.address is not None:
        try:
            check_room(args, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        except UserError:
            ray.shutdown()
            raise
    return ray


def run_all(args: Args, jobs: Sequence[Job]) -> list[str]:
    """Run what has not ended yet, as many at a time as there is room. Returns what went wrong, a line each."""
    left = [job for job in jobs if not job.ended()]
    if not left:
        return []
    # A maze's data is collected once, before several runs ask for it at a time
    for task in dict.fromkeys(job.task for job in left if job.task in tasks.POINTMAZES):
        tasks.load_task(common.Args(env_id=task))
    ray = start_ray(args)
    remote = ray.remote(max_calls=1, max_retries=5, num_cpus=args.cpus_per_run, num_gpus=args.gpus_per_run,
                        scheduling_strategy="SPREAD")(run_job)  # fmt: skip
    pending = {remote.remote(job, args.cpus_per_run): job for job in left}
    failures = []
    try:
        with tqdm(total=len(jobs), initial=len(jobs) - len(left), unit="run", desc="benchmark") as progress:
            while pending:
                node = ray._private.worker._global_node  # without this, Ray waits for its own dead processes without a word
                check(not (node and node.dead_processes()), "Ray's own processes have died: give the same command again")
                done, _ = ray.wait(list(pending), timeout=1)
                for reference in done:
                    job = pending.pop(reference)
                    try:
                        result = ray.get(reference)
                        line = f"{job.name}: {result['status'] or 'done'}, {result['seconds']:.0f} s"
                    except Exception as error:  # of one run: the others go on
                        cause = getattr(error, "cause", None) or error
                        line = f"{job.name}: failed, {common.line(cause)[:300]}; see {job.folder}/log.txt"
                        failures.append(line)
                    progress.write(line, file=sys.stderr)
                    progress.update()
    except KeyboardInterrupt:
        for reference in pending:
            ray.cancel(reference)  # KeyboardInterrupt in the run, which saves a checkpoint on it
        ray.wait(list(pending), num_returns=len(pending), timeout=30)
        raise
    finally:
        ray.shutdown()
    return failures


def open_suite(args: Args, flags: Sequence[str]) -> None:
    """Make the folder of this benchmark. Raises UserError if it cannot be written or belongs to another one."""
    out = Path(args.out_dir)
    common.check_writable(out / report.SUITE_FILE, "--out-dir")
    suite = {"num_seeds": args.num_seeds, "one_run_per_seed": args.one_run_per_seed, "flags": list(flags)}
    file = out / report.SUITE_FILE
    if file.exists():
        try:
            before = json.loads(file.read_text())
        except ValueError:
            before = None
        check(before == suite, f"{out} holds a benchmark with other settings ({before}, not {suite}): choose another --out-dir")
    else:
        common.write_atomically(file, json.dumps(suite).encode())


def main(args: Args, flags: Sequence[str] = ()) -> Path | None:
    """Run the benchmark and write its report; returns that file. Raises UserError for bad input."""
    jobs = make_jobs(args, flags)
    if args.print_commands:
        for job in jobs:
            print(shlex.join(["python", f"{job.method}.py", *job.argv()]))
        return None
    expected = [(job.task, job.method) for job in jobs]
    if args.report_only:
        check(Path(args.out_dir).is_dir(), f"--out-dir {args.out_dir}: there is no such folder to report on")
        expected = []
    else:
        open_suite(args, flags)
        signal.signal(signal.SIGTERM, common.stop_now)
        lock = common.lock(Path(args.out_dir) / ".lock", f"--out-dir {args.out_dir}: another benchmark is running in this folder")
        try:
            failures = run_all(args, jobs)
        finally:
            lock.release()
    file = report.write_report(Path(args.out_dir), expected)
    print(file)
    if not args.report_only:
        check(
            not failures,
            f"{len(failures)} of {len(jobs)} runs failed; the same command tries them again: {'; '.join(failures)[:600]}",
        )
    return file


if __name__ == "__main__":
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    own, passed_on = sys.argv[1:split], sys.argv[split + 1 :]
    common.run(lambda args: main(args, passed_on), lambda: common.cli(Args, own))
