"""Tables and pictures of many runs: each task and method, beside the paper's numbers where there are any.

A run is one training seed; its score on a task is the mean over its evaluation's episodes. Statistics over tasks follow Agarwal
et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (2021); the curve over the number of evaluation
episodes follows Jackson et al., "A Clean Slate for Offline Reinforcement Learning" (2025).
"""

import collections
import contextlib
import csv
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

import common
import tasks
from tasks import d4rl, is_ogbench
from tools import ROOT

DRAWS = 2000  # of the bootstrap
PULLS, REPEATS, POLICIES = 200, 1000, 8  # of the evaluation budget: episodes, repetitions, policies to choose among
PAPER_NAMES = {
    "dtql_continuous": "DTQL",
    "dtql_online": "DTQL, online",
    "dtql_chunk": "DTQL, chunks",
    "kl_distill": "DTQL with KL loss",
    "bc": "BC",
    "iql": "IQL",
    "idql": "IDQL",
    "dql": "DQL",
    "srpo": "SRPO",
    "fql": "FQL",
    "fan": "FAN",
}
PRETRAINING = ("pretrain_epochs", "diffusion_epochs", "critic_epochs")  # of the scripts that have it
STATUS_FILE = "status.json"  # beside the folder of a run of benchmark.py: how it ended
SUITE_FILE = "suite.json"  # in the folder of a benchmark: its seeds and the flags for its scripts

_d4rl = list(d4rl.TASKS)
GROUPS: dict[str, list[str]] = {
    "pointmaze": list(reversed(tasks.POINTMAZES)),  # the longest runs first, so that none is left over at the end
    "gym": [name for name in _d4rl if tasks.domain(name) == "locomotion"],
    "antmaze": [name for name in _d4rl if name.startswith("antmaze") and name.endswith("v0")],
    "antmaze-v2": [name for name in _d4rl if name.startswith("antmaze") and name.endswith("v2")],
    "adroit": [name for name in _d4rl if name.startswith("pen")],
    "kitchen": [name for name in _d4rl if name.startswith("kitchen")],
    "ogbench-pointmaze": [f"pointmaze-{size}-navigate-singletask-v0" for size in ("medium", "large", "giant", "teleport")],
    "ogbench-manipulation": [
        f"{name}-play-singletask-v0" for name in ("cube-single", "cube-double", "scene", "puzzle-3x3", "puzzle-4x4")
    ],
    "ogbench": [  # the default tasks of FQL's table
        f"{name}-singletask-v0"
        for name in (
            "antmaze-large-navigate",
            "antmaze-giant-navigate",
            "humanoidmaze-medium-navigate",
            "humanoidmaze-large-navigate",
            "antsoccer-arena-navigate",
            "cube-single-play",
            "cube-double-play",
            "scene-play",
            "puzzle-3x3-play",
            "puzzle-4x4-play",
        )
    ],
}
GROUPS["paper"] = [name for group in ("gym", "antmaze", "adroit", "kitchen") for name in GROUPS[group]]

# The paper's averages that its own cells do not give
MISPRINTS = {
    ("antmaze", "SRPO"): "the paper prints an average of 30.1; its cells give 60.1",
    ("antmaze", "Onestep RL"): "the paper prints an average of 20.9; its cells give 23.1",
    ("antmaze", "TD3+BC"): "the paper prints an average of 27.3; its cells give 25.0",
    ("gym", "BC"): "the paper prints an average of 51.9; its cells give 51.2",
    ("gym", "DT"): "the paper prints an average of 74.7; its cells give 74.6",
    ("gym", "CQL"): "the paper prints an average of 77.6; its cells give 77.7",
    ("gym", "DQL"): "the paper prints an average of 88.0; its cells give 87.9",
    ("antmaze-v2", "SRPO"): "the paper prints an average of 73.6 (Table 6); its cells give 73.7",
}


# ---- statistics, of scores divided by 100 ------------------------------------------------------------------------------


def iqm(scores: np.ndarray) -> np.ndarray:
    """Interquartile mean over the last dimension (n,): without floor(n / 4) scores at each end."""
    cut = scores.shape[-1] // 4
    return np.sort(scores, -1)[..., cut : scores.shape[-1] - cut].mean(-1)


def optimality_gap(scores: np.ndarray) -> np.ndarray:
    """1 - mean of min(score, 1) over the last dimension."""
    return 1 - np.minimum(scores, 1).mean(-1)


def bootstrap(tasks: Sequence[np.ndarray], statistic: Callable[[np.ndarray], np.ndarray], seed: int = 0) -> tuple[float, float]:
    """95 % interval of a statistic of all runs, from `tasks`, one array of run scores each.

    Stratified: runs are resampled with replacement within each task. Intervals are too narrow with few runs.
    """
    rng = np.random.default_rng(seed)
    drawn = [runs[rng.integers(len(runs), size=(DRAWS, len(runs)))] for runs in tasks]
    return tuple(np.percentile(statistic(np.concatenate(drawn, 1)), (2.5, 97.5)))


def probability_of_improvement(
    ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], seed: int = 0
) -> tuple[float, float, float]:
    """Mean over tasks of P(x > y) + P(x = y) / 2 over all pairs of runs, with its stratified 95 % interval."""

    def of(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        difference = x[..., :, None] - y[..., None, :]
        return ((difference > 0) + 0.5 * (difference == 0)).mean((-2, -1))

    rng = np.random.default_rng(seed)
    draw = lambda runs: runs[rng.integers(len(runs), size=(DRAWS, len(runs)))]
    draws = np.mean([of(draw(x), draw(y)) for x, y in zip(ours, theirs)], 0)
    return (float(np.mean([of(x, y) for x, y in zip(ours, theirs)])), *map(float, np.percentile(draws, (2.5, 97.5))))


def evaluation_budget(policies: Sequence[np.ndarray], seed: int = 0) -> np.ndarray:
    """True mean score of the policy that looks best after 1, 2, ... PULLS episodes, (PULLS,).

    `policies`: each one's episode scores. They are the arms of a bandit, each pull an episode of one of them; which comes next is
    chosen by mean + sqrt(2 ln t / n). The mean over REPEATS repetitions, each with POLICIES of the policies.
    """
    rng = np.random.default_rng(seed)
    number, length = min(POLICIES, len(policies)), min(map(len, policies))
    episodes = np.stack([policy[:length] for policy in policies])
    arms = rng.permuted(np.tile(np.arange(len(policies)), (REPEATS, 1)), axis=1)[:, :number]
    truth, rows = episodes.mean(1)[arms], np.arange(REPEATS)
    sums, counts, curve = np.zeros((REPEATS, number)), np.zeros((REPEATS, number)), np.zeros(PULLS)
    for pull in range(PULLS):
        with np.errstate(divide="ignore", invalid="ignore"):
            bound = np.where(counts > 0, sums / counts + np.sqrt(2 * np.log(pull + 1) / counts), np.inf)
            arm = bound.argmax(1)
            sums[rows, arm] += episodes[arms[rows, arm], rng.integers(length, size=REPEATS)]
            counts[rows, arm] += 1
            best = np.where(counts > 0, sums / counts, -np.inf).argmax(1)
        curve[pull] = truth[rows, best].mean()
    return curve


# ---- reading -----------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One training seed's evaluations, by epoch, and its episodes in the last one."""

    task: str
    method: str
    seed: int
    epochs: list[float]
    scores: list[float]
    train_seconds: float
    eval_seconds: float  # all evaluations together
    episodes: np.ndarray  # scores in the last evaluation (E,)
    updates: int  # at the last evaluation, with pretraining
    device: str
    date: str  # when it began
    finished: bool
    status: str  # "" or why it did not end as it should
    steps_per_epoch: int
    together: int  # models trained as one stack, in train_seconds
    origin: str = ""  # of the data
    online_from: float | None = None  # epochs of the offline phase, where another follows


def read_table(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as source:
        return list(csv.DictReader(source))


def read_status(folder: Path) -> dict[str, Any] | None:
    """How the run in a job's folder ended: task, method, status ("" is well); None if it has not.

    Raises UserError if that cannot be read.
    """
    file = folder / STATUS_FILE
    if not file.exists():
        return None
    try:
        status = json.loads(file.read_text())
        common.check(all(isinstance(status[name], str) for name in ("task", "method", "status")), "it has no words there")
        return status
    except (OSError, ValueError, KeyError, TypeError, common.UserError) as error:
        raise common.UserError(f"{file} is damaged ({common.line(error)}): delete it, and the run is looked at again") from None


def flags_of(place: Path, folder: Path) -> str:
    """The flags for the scripts of the benchmark that `place` is in, where `folder` holds it beside others; else "".

    Raises UserError if they cannot be read.
    """
    files = (parent / SUITE_FILE for parent in place.parents if folder in parent.parents)
    file = next((file for file in files if file.exists()), None)
    if file is None:
        return ""
    try:
        return " ".join(json.loads(file.read_text())["flags"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise common.UserError(f"{file} is damaged ({common.line(error)}): take it out of {folder}") from None


# Settings in which the runs of one method may differ
FREE = ("seed", "num_seeds", "run_dir", "resume", "data", "offline", "device", "compile", "cudagraphs", "torch_deterministic",
        "matmul_precision", "track", "evaluate_only", "eval_every", "eval_episodes")  # fmt: skip


@contextlib.contextmanager
def whole_run(run_dir: Path, folder: Path) -> Iterator[None]:
    """Errors within are those of a run in `folder` that cannot be read."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise common.UserError(
            f"{run_dir} is no whole run ({common.line(error)}): take it out of {folder}, or run it again"
        ) from None


def read_runs(folder: Path) -> list[Run]:
    """All runs below a folder, however they were made; of several of one task, method and seed the longest.

    Where it holds several benchmarks, their flags are part of their methods' names; so are settings in which other runs differ.
    """
    found: dict[tuple[str, str, int], Run] = {}
    configs, values = {}, collections.defaultdict(set)
    for config_file in sorted(folder.rglob("config.json")):
        with whole_run(config_file.parent, folder):
            config = json.loads(config_file.read_text())
            args, flags = config["args"], flags_of(config_file.parent, folder)
            if not args["env_id"]:
                continue  # trained on somebody's own data, without an environment
            configs[config_file.parent] = config, args, flags
            for name, value in args.items():
                values[args["env_id"], config["exp_name"], flags, name].add(json.dumps(value))
    for run_dir, (config, args, flags) in configs.items():
        key = args["env_id"], config["exp_name"], flags
        differ = {name: value for name, value in args.items() if len(values[*key, name]) > 1 and name not in FREE}
        # Of a setting with several values, each is in the rows
        named = [f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in differ.items()
                 if not isinstance(value, list)]  # fmt: skip
        with whole_run(run_dir, folder):
            rows = read_table(run_dir / "eval.csv") if (run_dir / "eval.csv").exists() else []
            episodes = read_table(run_dir / "episodes.csv") if rows and (run_dir / "episodes.csv").exists() else []
            last = rows[-1]["epoch"] if rows else None
            ended = read_status(run_dir.parent)
            seeds = range(args["seed"], args["seed"] + args["num_seeds"])
            settings = dict.fromkeys(row.get("setting", "") for row in rows) or [""]  # where several were trained at once
            for setting, seed in itertools.product(settings, seeds):
                of_this = lambda row: int(row["seed"]) == seed and row.get("setting", "") == setting
                own = [row for row in rows if of_this(row)]
                run = Run(
                    args["env_id"],
                    " ".join(filter(None, (config["exp_name"], flags, setting, *named))),
                    seed,
                    [float(row["epoch"]) for row in own],
                    [float(row["score_mean"]) for row in own],
                    float(own[-1]["train_seconds"]) if own else 0.0,
                    sum(float(row["eval_seconds"]) for row in own),
                    np.array([float(row["score"]) for row in episodes if row["epoch"] == last and of_this(row)]),
                    round((float(last or 0) + sum(args.get(name, 0) for name in PRETRAINING)) * args["steps_per_epoch"]),
                    config["device"],
                    config.get("started", "")[:10],
                    bool(own)
                    and float(own[-1]["epoch"]) == args["epochs"] + args.get("online_steps", 0) / args["steps_per_epoch"],
                    ended["status"] if ended else "",
                    args["steps_per_epoch"],
                    len(settings) * args["num_seeds"],
                    config.get("data", {}).get("origin", ""),
                    args["epochs"] if "online_steps" in args else None,
                )
                key = run.task, run.method, seed
                if key not in found or len(run.epochs) >= len(found[key].epochs):
                    found[key] = run
    return list(found.values())


def read_failures(folder: Path) -> dict[tuple[str, str], set[str]]:
    """(task, method) -> why there is no whole run of it, of those that benchmark.py started."""
    failures = collections.defaultdict(set)
    for file in sorted(folder.rglob(STATUS_FILE)):
        ended = read_status(file.parent)
        if ended["status"]:
            failures[ended["task"], f"{ended['method']} {flags_of(file, folder)}".strip()].add(ended["status"])
    return dict(failures)


@functools.cache
def published() -> list[dict[str, str]]:
    """The rows of results/published.csv. Raises UserError if it is missing or not such a table."""
    file = ROOT / "results" / "published.csv"
    try:
        rows = read_table(file)
        for row in rows:
            float(row["score"]), row["task"], row["method"], row["source"], row["spread"], row["updates"]
        return rows
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise common.UserError(f"{file} cannot be read ({common.line(error)}): restore it from the repository") from None


def paper_scores() -> dict[tuple[str, str], tuple[float, float | None]]:
    """The paper's cells: (task, method) -> (score, standard error)."""
    cells = {}
    for row in published():
        if row["source"].startswith("DTQL paper"):
            error = float(row["spread"]) if row["spread"] else None
            cells.setdefault((row["task"], row["method"]), (float(row["score"]), error))
    return cells


AT_HOME = "data made at home with OGBench's own experts: another draw from the same distribution, not OGBench's file"
# What else differs between a source's protocol and ours
PROTOCOLS = {
    "FQL": "success judged after the step (OGBench 1.1); its IQL has nets of 4 x 256 in manipulation, its IDQL those of IDQL",
    "OptiFlow": "reruns of that paper's authors, 100 episodes",
    "QC": "one evaluation of 50 episodes",
    "QAM": "10 Qs, one evaluation of 50 episodes; actions in chunks of 5 in manipulation",
    "CORL": "evaluated on 10 episodes, AntMaze 100",
    "ReBRAC": "tuned for each task",
}
METRICS = {"success_last3": "mean of the last three evaluations", "score_best": "best evaluation of each seed"}
METRICS["success_best"] = METRICS["score_best"]


def numbered(task: str) -> str:
    """A task as published tables name it: OGBench's default tasks with their number."""
    if tasks.is_ogbench(task) and "singletask-v0" in task:
        number = 1 if "maze" in task else 4 if task.startswith(("antsoccer", "puzzle-3x3", "puzzle-4x4")) else 2
        return task.replace("singletask-v0", f"singletask-task{number}-v0")
    return task


def published_section(group: list[str], methods: list[str]) -> str:
    """What others published of the same tasks and methods, with its source; the longest training of each source."""
    rows, notes, cells = [], [], collections.defaultdict(list)
    for row in published():
        if not row["source"].startswith("DTQL paper"):
            cells[row["task"], row["method"].partition(" (")[0]].append(row)
    for task, method in itertools.product(group, methods):
        own = cells.get((numbered(task), PAPER_NAMES.get(method)), [])
        longest = collections.defaultdict(int)
        for row in own:
            key = row["source"], row["method"]
            longest[key] = max(longest[key], int(row["updates"] or 0))
        for row in own:
            if int(row["updates"] or 0) < longest[row["source"], row["method"]]:
                continue
            spread = f" ± {float(row['spread']):g} ({row['spread_kind']})" if row["spread"] else ""
            updates = f"{int(row['updates']):,}" if row["updates"] else "not stated"
            remarks = [METRICS.get(row["metric"], ""), PROTOCOLS.get(row["source"].split()[0], ""), row["note"]]
            mark = footnote(notes, "; ".join(filter(None, remarks)))
            what = f"{float(row['score']):g}{spread} {mark}"
            rows.append([f"`{task}`", row["method"], what, updates, row["seeds"] or "not stated", row["source"]])
    if not rows:
        return ""
    text = "Published by others, for the same tasks and methods; protocols differ, so these are never averaged with ours:\n\n"
    text += markdown(["task", "method", "score", "updates", "seeds", "source"], rows)
    return text + "".join(f"\n[{number}] {note}\n" for number, note in enumerate(notes, 1)) + "\n"


# ---- writing -----------------------------------------------------------------------------------------------------------


def mean_and_error(runs: Sequence[Run]) -> tuple[float, float]:
    """Mean and standard error over all episodes of all runs' last evaluation, as in the paper's tables."""
    scores = [run.scores[-1] for run in runs]
    episodes = np.concatenate([run.episodes for run in runs]) if all(len(run.episodes) for run in runs) else np.array(scores)
    return float(np.mean(scores)), float(episodes.std() / np.sqrt(len(episodes)))


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def by_cell(runs: Sequence[Run]) -> dict[tuple[str, str], list[Run]]:
    """(task, method) -> runs, tasks in the order of the groups."""
    cells = collections.defaultdict(list)
    order = [task for tasks in GROUPS.values() for task in tasks]
    place = {task: index for index, task in reversed(list(enumerate(order)))}
    for run in sorted(runs, key=lambda run: (place.get(run.task, len(order)), run.task, run.method, run.seed)):
        cells[run.task, run.method].append(run)
    return dict(cells)


def groups_of(tasks: Iterable[str]) -> dict[str, list[str]]:
    """The groups that these tasks belong to, each task once; what is in none is "other"."""
    left, groups = list(dict.fromkeys(tasks)), {}
    for name, members in GROUPS.items():
        inside = [task for task in left if task in members]
        if inside and name != "paper":
            groups[name] = inside
            left = [task for task in left if task not in inside]
    return {**groups, "other": left} if left else groups


def footnote(notes: list[str], note: str) -> str:
    """The mark of a note, which is added to `notes` if it is new."""
    if note not in notes:
        notes.append(note)
    return f"[{notes.index(note) + 1}]"


def group_section(
    name: str,
    tasks: list[str],
    methods: list[str],
    cells: dict[tuple[str, str], list[Run]],
    failures: dict[tuple[str, str], set[str]],
) -> str:
    """The table of a group beside the paper's numbers, its footnotes and its statistics."""
    paper, notes, rows, average = paper_scores(), [], [], ["average"]
    printed = [PAPER_NAMES.get(method) for method in methods]
    printed = [method for method in printed if any((task, method) in paper for task in tasks)]
    three = all(map(is_ogbench, tasks))  # there the mean of the last three evaluations is reported
    for task in tasks:
        row = [f"`{task}`"]
        for method in methods:
            runs = [run for run in cells.get((task, method), []) if run.scores]
            marks = "".join(f" {footnote(notes, reason)}" for reason in sorted(failures.get((task, method), ())))
            if runs:
                mean, error = mean_and_error(runs)
                if any("made at home" in run.origin for run in runs):
                    marks += f" {footnote(notes, AT_HOME)}"
                marks = ("" if all(run.finished for run in runs) else " (unfinished)") + marks
                row += [f"{mean:.1f} ± {error:.1f}{marks}", f"{np.mean([max(run.scores) for run in runs]):.1f}"]
                row += [f"{np.mean([np.mean(run.scores[-3:]) for run in runs]):.1f}"] * three
            else:
                row += [f"failed{marks}" if marks else "missing", "missing"] + ["missing"] * three
        for method in printed:
            score, error = paper.get((task, method), (None, None))
            row.append("missing" if score is None else f"{score:g}" + (f" ± {error:g}" if error is not None else ""))
        rows.append(row)
    for method in methods:
        last_three = [lambda run: np.mean(run.scores[-3:])] * three
        for pick in ((lambda run: run.scores[-1]), (lambda run: max(run.scores)), *last_three):
            means = [[pick(run) for run in cells.get((task, method), []) if run.scores] for task in tasks]
            average.append(f"{np.mean([np.mean(scores) for scores in means]):.1f}" if all(means) else "missing")
    for method in printed:
        scores = [paper[task, method][0] for task in tasks if (task, method) in paper]
        mark = ""
        if tasks == GROUPS.get(name) and (name, method) in MISPRINTS:
            mark = f" {footnote(notes, f'{method}: {MISPRINTS[name, method]}')}"
        average.append(f"{np.mean(scores):.1f}{mark}" if len(scores) == len(tasks) else "missing")
    columns = [column for method in methods for column in (f"{method}, last", "best", *["mean of the last three"] * three)]
    text = markdown(["task", *columns, *(f"paper: {method}" for method in printed)], [*rows, average])
    text += "".join(f"\n[{number}] {note}\n" for number, note in enumerate(notes, 1))
    return f"## {name}\n\n{text}\n{published_section(tasks, methods)}{statistics_section(tasks, methods, cells)}"


def score_matrices(
    tasks: Sequence[str], methods: Sequence[str], cells: dict[tuple[str, str], list[Run]]
) -> dict[str, list[np.ndarray]]:
    """Of each method with a run of every task: the last scores of each task's runs, divided by 100."""
    matrices = {}
    for method in methods:
        matrix = [np.array([run.scores[-1] / 100 for run in cells.get((task, method), []) if run.scores]) for task in tasks]
        if all(len(runs) for runs in matrix):
            matrices[method] = matrix
    return matrices


def statistics_section(tasks: list[str], methods: list[str], cells: dict[tuple[str, str], list[Run]]) -> str:
    """IQM, optimality gap and probability of improvement of the methods with a run of every task."""
    matrices = score_matrices(tasks, methods, cells)
    if not matrices:
        return ""
    rows = []
    for method, matrix in matrices.items():
        everything, means = np.concatenate(matrix), [runs.mean() for runs in matrix]
        row = [method, "/".join(sorted({str(len(runs)) for runs in matrix}))]
        for statistic in (iqm, optimality_gap):
            low, high = bootstrap(matrix, statistic)
            row.append(f"{statistic(everything):.3f} ({low:.3f} to {high:.3f})")
        rows.append([*row, f"{np.mean(means):.3f}", f"{np.median(means):.3f}"])
    text = "Last scores / 100 over these tasks; intervals by stratified bootstrap, somewhat too narrow with so few runs.\n\n"
    text += markdown(["method", "runs per task", "IQM (95 %)", "optimality gap (95 %)", "mean", "median"], rows)
    if len(matrices) > 1:

        def better(x: str, y: str) -> str:
            return "{:.2f} ({:.2f} to {:.2f})".format(*probability_of_improvement(matrices[x], matrices[y]))

        rows = [[x, *("-" if x == y else better(x, y) for y in matrices)] for x in matrices]
        text += "\nProbability that a run of the row's method scores above one of the column's (95 %):\n\n"
        text += markdown(["", *matrices], rows)
    return text + "\n"


def online_section(cells: dict[tuple[str, str], list[Run]]) -> str:
    """Scores at the end of the offline phase and along the online one, and regret: 1 - mean score / 100 over the online phase."""
    rows = []
    for (task, method), runs in cells.items():
        ended = [run for run in runs if run.online_from is not None and run.finished and run.epochs[-1] > run.online_from]
        if ended:
            x = np.array([epoch for epoch in ended[0].epochs if epoch >= ended[0].online_from])
            scores = np.array([run.scores[-len(x) :] for run in ended])
            mean = np.trapezoid(scores.mean(0) / 100, x) / (x[-1] - x[0])
            first, *between, last = (f"{score:.1f}" for score in scores.mean(0))
            rows.append([f"`{task}`", method, len(ended), first, " / ".join(between), last, f"{1 - mean:.3f}"])
    if not rows:
        return ""
    head = ["task", "method", "runs", "end of offline", "after 1/8, 1/4 and 1/2 of the steps", "after all", "regret"]
    text = "## Online\n\nMean scores over the runs; regret is 1 - mean score / 100 over the online phase.\n\n"
    return text + markdown(head, rows) + "\n"


def time_section(cells: dict[tuple[str, str], list[Run]]) -> str:
    """What the runs took, and where."""
    rows = []
    for (task, method), runs in cells.items():
        training, evaluation = (np.mean([getattr(run, name) for run in runs]) for name in ("train_seconds", "eval_seconds"))
        updates, times = f"{max(run.updates for run in runs):,}", (f"{training:.0f}", f"{evaluation:.0f}")
        together, devices, dates = (
            "/".join(sorted({str(getattr(run, n)) for run in runs})) for n in ("together", "device", "date")
        )
        rows.append([f"`{task}`", method, updates, together, *times, devices, dates])
    head = ["task", "method", "updates", "models at once", "training, s", "evaluation, s", "device", "date"]
    return "## Time\n\nSeconds of a run, with all models that it trains at once.\n\n" + markdown(head, rows)


# ---- pictures ----------------------------------------------------------------------------------------------------------


def draw_curves(tasks: list[str], methods: list[str], cells: dict[tuple[str, str], list[Run]], file: Path) -> None:
    """A panel per task, a line per method: mean over seeds, band from the lowest to the highest seed."""
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows + 0.4), layout="constrained")
    lines = {}
    for axes, task in zip(figure.subplots(rows, columns, squeeze=False).ravel(), tasks):
        for color, method in enumerate(methods):
            runs = [run for run in cells.get((task, method), []) if run.scores]
            if not runs:
                continue
            length = min(len(run.scores) for run in runs)
            scores = np.array([run.scores[:length] for run in runs])
            updates = np.array(runs[0].epochs[:length]) * runs[0].steps_per_epoch
            (lines[method],) = axes.plot(updates, scores.mean(0), marker="o", markersize=3, color=f"C{color}")
            axes.fill_between(updates, scores.min(0), scores.max(0), color=f"C{color}", alpha=0.2)
        for start in {run.online_from * run.steps_per_epoch for (name, _), runs in cells.items() if name == task for run in runs
                      if run.online_from is not None}:  # fmt: skip
            axes.axvline(start, color="grey", linestyle=":", label="online")
        axes.set(title=task, xlabel="training updates", ylabel="score", xlim=(0, None))
        axes.grid(alpha=0.3)
    for axes in figure.axes[len(tasks) :]:
        axes.set_axis_off()
    entry = 0.6 + 0.075 * max(map(len, lines))  # inches
    ncols = int(min(4, max(1, figure.get_figwidth() // entry)))
    figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=ncols, fontsize=9)
    figure.savefig(file, dpi=110)


def draw_lines(curves: dict[str, tuple[np.ndarray, np.ndarray]], file: Path, **axes_settings: Any) -> None:
    """One line (x, y) per method."""
    figure = Figure(figsize=(6.2, 3.4), layout="constrained")
    axes = figure.subplots()
    for method, (x, y) in curves.items():
        axes.plot(x, y, label=method)
    axes.set(**axes_settings)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(file, dpi=110)


SCORE_FIELDS = ("task", "method", "seed", "updates", "last", "best", "episodes", "finished", "status", "train_seconds",
                "eval_seconds", "device", "date")  # fmt: skip


def write_report(folder: Path, expected: Iterable[tuple[str, str]] = ()) -> Path:
    """Write report.md, scores.csv and pictures of all runs below `folder`. Returns report.md.

    `expected`: pairs (task, method) that are said to be missing where there is no run. Raises UserError if there are no runs or
    one cannot be read.
    """
    runs, failures = read_runs(folder), read_failures(folder)
    common.check(bool(runs or failures), f"{folder} holds no runs: give the folder of a benchmark, or one with runs in it")
    cells = by_cell(runs)
    columns = {method: {other for _, other in cells if other.split()[0] == method} or {method} for _, method in expected}
    expected = [(task, column) for task, method in expected for column in sorted(columns[method])]  # one for each setting
    pairs = list(dict.fromkeys([*expected, *cells, *failures]))
    place = lambda method: [*PAPER_NAMES, method.split()[0]].index(method.split()[0])
    methods = sorted(dict.fromkeys(method for _, method in pairs), key=place)
    groups = groups_of(task for task, _ in pairs)
    tasks = [task for group in groups.values() for task in group]

    rows = []
    for run in (run for group in cells.values() for run in group):
        scores = {"last": run.scores[-1], "best": max(run.scores)} if run.scores else {"last": "", "best": ""}
        rows.append({name: value for name, value in run._asdict().items() if name in SCORE_FIELDS} | scores)
        rows[-1]["episodes"] = len(run.episodes)
    common.write_atomically(folder / "scores.csv", common.to_csv(SCORE_FIELDS, rows))

    text = (
        "# Report\n\nMean ± standard error over all episodes of all runs' last evaluation; *best* is the highest evaluation of "
        "each run, an oracle that grows with the number of evaluations. The paper's columns are copied from its tables, not run "
        "here.\n\n"
    )
    for name, members in groups.items():
        text += group_section(name, members, methods, cells, failures)
        if any(run.scores for run in runs if run.task in members):
            draw_curves(members, methods, cells, folder / f"curves_{name}.png")
            text += f"![Learning curves](curves_{name}.png)\n\n"
    if len(groups) > 1:
        text += "## All tasks\n\n" + statistics_section(tasks, methods, cells)
    levels = np.linspace(0, 1.2, 241)
    matrices = score_matrices(tasks, methods, cells)
    if matrices:
        profile = {x: (levels, (np.concatenate(matrix)[:, None] > levels).mean(0)) for x, matrix in matrices.items()}
        draw_lines(profile, folder / "profile.png", xlabel="score / 100", ylabel="share of runs above it", ylim=(-0.02, 1.02))
        text += "Share of the runs that score above each level:\n\n![Performance profile](profile.png)\n\n"
        curves = {}
        for method in matrices:
            arms = [[run.episodes / 100 for run in cells[task, method] if len(run.episodes)] for task in tasks]
            if all(arms):
                curves[method] = np.arange(1, PULLS + 1), 100 * np.mean([evaluation_budget(policies) for policies in arms], 0)
        if curves:
            draw_lines(
                curves, folder / "budget.png", xlabel="evaluation episodes spent", ylabel="score of the seed chosen", xscale="log"
            )
            text += (
                "What is deployed if the seed that looks best is chosen after so many evaluation episodes (a UCB bandit over the "
                "seeds, mean over the tasks):\n\n![Evaluation budget](budget.png)\n\n"
            )
    text += online_section(cells) + time_section(cells)
    common.write_atomically(folder / "report.md", text.encode())
    return folder / "report.md"
