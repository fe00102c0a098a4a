"""benchmark.py and report.py: what is computed, what is written, and runs whose workers, nodes or driver are killed."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FLAGS, ROOT, command, make_args, params_of, run_here, run_inside, run_script, table, until

import bc
import common
import run_folder
import tasks
from tools import benchmark, report

pytestmark = pytest.mark.slow

# ---- statistics --------------------------------------------------------------------------------------------------------


def test_iqm_and_optimality_gap():
    scores = np.array([0.9, -5.0, 0.1, 0.5, 40.0, 0.3, 0.7, 1.1])  # sorted: -5 0.1 | 0.3 0.5 0.7 0.9 | 1.1 40
    assert report.iqm(scores) == pytest.approx(0.6)
    assert report.iqm(np.array([1.0, 2.0, 6.0])) == pytest.approx(3.0)  # a quarter of three is none
    assert report.optimality_gap(np.array([0.5, 2.0])) == pytest.approx(0.25)
    assert report.iqm(np.stack([scores, scores + 1])) == pytest.approx([0.6, 1.6])


def test_bootstrap_is_stratified():
    tasks = [np.array([0.0, 1.0]), np.array([10.0, 10.0])]
    low, high = report.bootstrap(tasks, lambda scores: scores.mean(-1))
    assert (low, high) == (5.0, 5.5)  # both draws equal: a quarter each; tasks are never drawn
    assert report.bootstrap([np.array([0.7])], report.iqm) == pytest.approx((0.7, 0.7))


def test_bootstrap_agrees_with_the_standard_error_of_a_mean():
    runs = np.random.default_rng(1).standard_normal(400)
    low, high = report.bootstrap([runs], lambda scores: scores.mean(-1))
    assert (high - low) / 2 == pytest.approx(1.96 * runs.std() / 20, rel=0.05)


def test_probability_of_improvement():
    better, worse = [np.array([3.0, 4.0])], [np.array([1.0, 2.0])]
    assert report.probability_of_improvement(better, worse) == (1.0, 1.0, 1.0)
    assert report.probability_of_improvement(worse, better) == (0.0, 0.0, 0.0)
    assert report.probability_of_improvement(better, better)[0] == 0.5
    mean, low, high = report.probability_of_improvement([np.array([1.0, 3.0])], [np.array([2.0])])
    assert (mean, low, high) == (0.5, 0.0, 1.0)
    assert report.probability_of_improvement(better + worse, worse + better)[0] == 0.5  # the mean over tasks


def test_evaluation_budget():
    policies = [np.full(5, score) for score in (0.1, 0.4, 0.9)]
    curve = report.evaluation_budget(policies)
    assert curve[0] == pytest.approx(np.mean([0.1, 0.4, 0.9]), abs=0.03)  # a policy by chance, before anything is known
    assert curve[1] == pytest.approx((0.4 + 0.9 + 0.9) / 3, abs=0.03)  # the better of two
    assert np.all(curve[2:] == pytest.approx(0.9))
    noisy = [np.random.default_rng(i).random(100) * 0.5 + 0.1 * i for i in range(5)]
    curve = report.evaluation_budget(noisy)
    assert curve[0] < curve[20] < curve[-1] <= noisy[-1].mean() + 1e-9


# ---- report ------------------------------------------------------------------------------------------------------------


def make_run(
    out: Path, task="hopper-medium-v2", method="bc", seed=0, scores=(10.0, 30.0, 20.0), epochs=None, num_seeds=1, episodes=4
):
    """A run folder as the scripts leave it: evaluations every 10 epochs, score +- 1 in turn."""
    run_dir = out / task.replace("/", "-") / method / str(seed) / "run"
    run_dir.mkdir(parents=True)
    args = dict(env_id=task, seed=seed, num_seeds=num_seeds, epochs=epochs or 10 * len(scores), steps_per_epoch=100)
    (run_dir / "config.json").write_text(
        json.dumps(dict(exp_name=method, device="a computer", started="2026-11-24T12:00:00+00:00", args=args))
    )
    row = dict(return_mean=0, return_std=0, score_std=1, length_mean=5, train_seconds=60, eval_seconds=7, episodes=episodes)
    seeds = range(seed, seed + num_seeds)
    rows = [dict(row, epoch=10 * (i + 1), seed=one, score_mean=score + one) for i, score in enumerate(scores) for one in seeds]
    (run_dir / "eval.csv").write_bytes(common.to_csv(run_folder.EVAL_FIELDS, rows))
    each = [
        {
            "epoch": row["epoch"],
            "seed": row["seed"],
            "episode": i,
            "return": 0,
            "score": row["score_mean"] + (-1) ** i,
            "length": 5,
        }
        for row in rows
        for i in range(episodes)
    ]
    (run_dir / "episodes.csv").write_bytes(common.to_csv(run_folder.EPISODE_FIELDS, each))
    return run_dir


def test_report_of_made_up_runs(tmp_path):
    make_run(tmp_path, seed=0, num_seeds=2)  # scores 20 and 21 at the end
    make_run(tmp_path, method="dtql_continuous", scores=(50.0,), epochs=100)
    make_run(tmp_path, "walker2d-medium-v2", scores=(1.0, 2.0))
    failed = tmp_path / "walker2d-medium-v2" / "dtql_continuous" / "0"
    failed.mkdir(parents=True)
    status = dict(task="walker2d-medium-v2", method="dtql_continuous", seed=0, status="no data", seconds=1)
    (failed / report.STATUS_FILE).write_text(json.dumps(status))
    text = report.write_report(tmp_path, [("hopper-medium-v2", "iql")]).read_text()
    rows = table(text, "## gym")
    # Two runs of four episodes: 19 21 19 21, 20 22 20 22
    assert rows["hopper-medium-v2"]["bc, last"] == f"20.5 ± {np.sqrt(1.25 / 8):.1f}"
    assert rows["hopper-medium-v2"]["dtql_continuous, last"] == "50.0 ± 0.5 (unfinished)"
    assert rows["hopper-medium-v2"]["iql, last"] == "missing"
    assert rows["walker2d-medium-v2"]["dtql_continuous, last"] == "failed [1]" and "\n[1] no data\n" in text
    assert rows["average"]["bc, last"] == "11.2" and rows["average"]["dtql_continuous, last"] == "missing"
    assert rows["hopper-medium-v2"]["paper: DTQL"] == "99.6 ± 0.87"  # Table 1
    assert rows["hopper-medium-v2"]["paper: BC"] == "52.9"
    with open(tmp_path / "scores.csv", newline="") as file:
        scores = {(row["task"], row["method"], row["seed"]): row for row in csv.DictReader(file)}
    assert len(scores) == 4 and scores["hopper-medium-v2", "bc", "1"]["best"] == "31.0"
    assert scores["hopper-medium-v2", "bc", "1"]["updates"] == "3000"
    times = table(text, "## Time")["hopper-medium-v2"]
    assert (times["models at once"], times["training, s"], times["evaluation, s"]) == ("2", "60", "21")
    assert (times["device"], times["date"]) == ("a computer", "2026-11-24")
    for picture in ("curves_gym.png", "profile.png", "budget.png"):
        assert picture in text and (tmp_path / picture).stat().st_size > 5000


def test_ogbench_is_reported_with_what_others_published(tmp_path, monkeypatch):
    task = "cube-single-play-singletask-v0"  # whose published name is task2
    run_dir = make_run(tmp_path, task, "fql", scores=(0.0, 30.0, 60.0, 90.0))
    config = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps(config | {"data": {"origin": "x.npz (made at home, seed 0)"}}))
    text = report.write_report(tmp_path).read_text()
    row = table(text, "## ogbench-manipulation")[task]
    assert row["fql, last"].startswith("90.0") and row["mean of the last three"] == "60.0" and "[1]" in row["fql, last"]
    assert "not OGBench's file" in text
    published = text[text.index("Published by others") :].splitlines()
    (line,) = (line for line in published if "FQL paper T3" in line and line.startswith("|"))
    assert "| FQL | 97 ± 2 (std)" in line and "| 1,000,000 | 8 |" in line
    assert "mean of the last three evaluations" in "".join(published)
    assert benchmark.expand_tasks(["cube-single-play-singletask-all"])[4] == "cube-single-play-singletask-task5-v0"
    with pytest.raises(common.UserError, match="unknown task ant-play-singletask-all"):
        benchmark.expand_tasks(["ant-play-singletask-all"])
    for content in (None, "task,method\n1,2\n"):
        monkeypatch.setattr(report, "ROOT", tmp_path)
        report.published.cache_clear()
        if content:
            (tmp_path / "results").mkdir()
            (tmp_path / "results" / "published.csv").write_text(content)
        with pytest.raises(common.UserError, match="published.csv cannot be read"):
            report.write_report(tmp_path)
    report.published.cache_clear()


def test_benchmarks_side_by_side_are_named_by_their_flags(tmp_path):
    for name, flags, score in (("with", [], 40.0), ("without", ["--no-nll"], 20.0)):
        make_run(tmp_path / name, method="dtql_continuous", scores=(score,))
        (tmp_path / name / report.SUITE_FILE).write_text(json.dumps(dict(num_seeds=1, one_run_per_seed=False, flags=flags)))
    failed = tmp_path / "without" / "walker2d-medium-v2" / "dtql_continuous" / "0"
    failed.mkdir(parents=True)
    status = dict(task="walker2d-medium-v2", method="dtql_continuous", seed=0, status="no data", seconds=1)
    (failed / report.STATUS_FILE).write_text(json.dumps(status))
    rows = table(report.write_report(tmp_path).read_text(), "## gym")
    hopper = rows["hopper-medium-v2"]
    assert (hopper["dtql_continuous, last"], hopper["dtql_continuous --no-nll, last"]) == ("40.0 ± 0.5", "20.0 ± 0.5")
    assert rows["walker2d-medium-v2"]["dtql_continuous --no-nll, last"] == "failed [1]"
    alone = table(report.write_report(tmp_path / "without").read_text(), "## gym")
    assert alone["hopper-medium-v2"]["dtql_continuous, last"] == "20.0 ± 0.5"
    (tmp_path / "with" / report.SUITE_FILE).write_text("{")
    with pytest.raises(common.UserError, match="suite.json is damaged"):
        report.write_report(tmp_path)


def test_misprints_are_footnotes_of_whole_groups(tmp_path):
    for task in report.GROUPS["gym"]:
        make_run(tmp_path, task)
    assert "the paper prints an average of 51.9" in report.write_report(tmp_path).read_text()
    for name, members in report.GROUPS.items():
        cells = report.paper_scores()
        for method in {method for task, method in cells if task in members}:
            scores = [cells[task, method][0] for task in members if (task, method) in cells]
            if (name, method) in report.MISPRINTS:
                assert f"{np.mean(scores):.1f}" == report.MISPRINTS[name, method].split()[-1]


def test_runs_with_different_settings_are_no_runs_of_one_method(tmp_path):
    """Nor are those of different lengths. What was in no run's settings when it was made says nothing."""
    for seed, changes in enumerate(({"alpha": 1.0}, {"alpha": 5.0}, {"alpha": 5.0, "device": "cpu"}, {})):
        file = make_run(tmp_path, method="dtql_continuous", seed=seed, scores=(10.0 * seed,)) / "config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps(config | {"args": config["args"] | changes}))
    make_run(tmp_path, method="bc")
    make_run(tmp_path, method="bc", seed=1, scores=(1.0, 2.0))
    found = report.by_cell(report.read_runs(tmp_path))
    assert {method: [run.seed for run in runs] for (_, method), runs in found.items()} == {
        "bc epochs=20": [1], "bc epochs=30": [0], "dtql_continuous": [3], "dtql_continuous alpha=1": [0],
        "dtql_continuous alpha=5": [1, 2],
    }  # fmt: skip


def test_report_of_runs_made_by_hand_and_without_evaluation(hopper, tmp_path):
    run_dir = bc.main(make_args(tmp_path, bc))["run_dir"]
    stopped = make_run(tmp_path / "runs", "walker2d-medium-v2")
    for name in ("eval.csv", "episodes.csv"):
        (stopped / name).unlink()
    rows = table(report.write_report(tmp_path / "runs").read_text(), "## gym")
    with open(Path(run_dir) / "eval.csv", newline="") as file:
        last = float(list(csv.DictReader(file))[-1]["score_mean"])
    assert rows["hopper-medium-v2"]["bc, last"].split()[0] == f"{last:.1f}"
    assert rows["walker2d-medium-v2"]["bc, last"] == "missing"


# ---- runs --------------------------------------------------------------------------------------------------------------

SMALL = (*FLAGS, "--batch-size=32", "--eval-every=20", "--epochs=40", "--steps-per-epoch=100", "--no-compile")


def parameters(out: Path) -> dict[str, torch.Tensor]:
    """Every parameter of all runs of a benchmark, by run and name."""
    found = {}
    for file in sorted(out.glob("*/*/*/*/checkpoint.pt")):
        assert common.open_checkpoint(file)["step"] == 4000, file
        where = "/".join(file.relative_to(out).parts[:3])
        found |= {f"{where} {name}": param for name, param in params_of(file.parent).items()}
    return found


def processes(mark: str) -> dict[int, str]:
    """Processes whose environment holds `mark`: pid -> command line."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes() and int(folder.name) != os.getpid():
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except OSError:
            pass
    return found


@pytest.fixture
def mark(tmp_path, hopper, monkeypatch):
    """A word in the environment of everything that a test starts; nothing with it may be left at the end."""
    word = f"DTQL_TEST_MARK={tmp_path}"
    monkeypatch.setenv("DTQL_TEST_MARK", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else whatever runs beside the tests goes first
    yield word
    until(lambda: not processes(word), 30)


def undisturbed(tmp_path: Path, seeds: range) -> dict[str, torch.Tensor]:
    """The parameters that runs of bc.py with these seeds have when nothing happens to them."""
    for seed in seeds:
        folder = tmp_path / "alone" / "hopper-medium-v2" / "bc" / str(seed)
        run_here(bc, "--env-id=hopper-medium-v2", f"--seed={seed}", f"--run-dir={folder}", "--device=cpu", *SMALL)
    return parameters(tmp_path / "alone")


def workers(mark: str) -> list[int]:
    return [pid for pid, line in processes(mark).items() if line.startswith("ray::run_job")]


def assert_equal(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys() and expected
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name


def test_killed_drivers_workers_and_nodes_change_nothing(tmp_path, mark):
    """On a cluster of two nodes: the driver, then a worker are killed, and a node is lost; the same command goes on."""
    from ray.cluster_utils import Cluster

    out = tmp_path / "bench"
    cluster = Cluster(
        initialize_head=True, head_node_args=dict(num_cpus=1, object_store_memory=80 << 20, include_dashboard=False)
    )
    try:
        node = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
        arguments = ("--tasks", "hopper-medium-v2", "--methods", "bc", "--num-seeds", 2, "--one-run-per-seed", "--out-dir", out,
                     "--address", cluster.address, "--", *SMALL)  # fmt: skip

        def drive() -> subprocess.Popen:
            with open(tmp_path / "log", "w") as log:
                return subprocess.Popen(command(*arguments, script="tools.benchmark"), stdout=log, stderr=subprocess.STDOUT)

        driver = drive()
        until(lambda: len(list(out.glob("*/*/*/*/checkpoint.pt"))) == 2, 120)
        driver.kill()
        driver.wait()
        until(lambda: not workers(mark), 60)
        driver = drive()
        until(lambda: len(workers(mark)) == 2, 60)
        os.kill(workers(mark)[0], signal.SIGKILL)
        time.sleep(1)
        cluster.remove_node(node)
        assert driver.wait(240) == 0, (tmp_path / "log").read_text()
        # Once more there is nothing to do, and Ray is not asked for it
        start = time.perf_counter()
        assert run_inside(*arguments, script="tools.benchmark").returncode == 0
        assert time.perf_counter() - start < 5
    finally:
        cluster.shutdown()
    log = (tmp_path / "log").read_text()
    assert log.count(": done") == 2 and "died" not in log and "Traceback" not in log, log
    assert len(list(out.glob("*/*/*/*/config.json"))) == 2  # no run began anew
    assert_equal(parameters(out), undisturbed(tmp_path, range(2)))


def test_ctrl_c_leaves_checkpoints_and_what_cannot_work_is_a_row(tmp_path, mark):
    out = tmp_path / "bench"
    tasks = ("walker2d-medium-v2", "hopper-medium-v2")  # of the first there is no data
    arguments = ("--tasks", *tasks, "--methods", "bc", "--num-seeds", 2, "--out-dir", out, "--")
    long = [flag for flag in SMALL if "epochs" not in flag]
    driver = subprocess.Popen(
        command(*arguments, *long, "--epochs=100000", script="tools.benchmark"), stderr=subprocess.PIPE, text=True
    )
    until(lambda: list(out.glob("hopper*/*/*/*/checkpoint.pt")) and list(out.glob("walker*/*/*/status.json")), 120)
    driver.send_signal(signal.SIGINT)
    errors = driver.communicate(timeout=60)[1]
    assert driver.returncode == 130 and "interrupted" in errors and "Traceback" not in errors, errors
    assert "walker2d-medium-v2 bc 0: cannot download" in errors
    (log,) = out.glob("hopper*/bc/0/log.txt")
    assert "stopped at update" in log.read_text(errors="replace")
    result = run_script("--report-only", "--out-dir", out, script="tools.benchmark")
    rows = table((out / "report.md").read_text(), "## gym")
    assert result.returncode == 0 and rows["walker2d-medium-v2"]["bc, last"].startswith("failed")


def test_a_diverged_run_is_a_row_with_its_last_score(hopper, tmp_path):
    out = tmp_path / "bench"
    args = benchmark.Args(("hopper-medium-v2",), ("dtql_continuous",), num_seeds=1, out_dir=str(out), gpus_per_run=0)
    flags = [*FLAGS, "--batch-size=32", "--num-candidates=4", "--pretrain-epochs=0", "--epochs=2", "--eval-every=1",
             "--steps-per-epoch=200", "--no-compile"]  # fmt: skip
    (job,) = benchmark.make_jobs(args, [*flags, "--learning-rate=1e18"])
    result = benchmark.run_job(job, 1)
    assert result["status"] == "diverged" and job.ended()
    assert "no longer finite" in (Path(job.folder) / "log.txt").read_text()
    text = report.write_report(out).read_text()
    assert table(text, "## gym")["hopper-medium-v2"]["dtql_continuous, last"] == "failed [1]" and "[1] diverged" in text
    make_run(tmp_path / "other", method="dtql_continuous", scores=(5.0,), epochs=20)
    status = tmp_path / "other" / "hopper-medium-v2" / "dtql_continuous" / "0" / report.STATUS_FILE
    status.write_text(json.dumps(result))
    cell = table(report.write_report(tmp_path / "other").read_text(), "## gym")["hopper-medium-v2"]["dtql_continuous, last"]
    assert cell == "5.0 ± 0.5 (unfinished) [1]"


def test_bad_input_is_not_tried_again_until_the_command_is(hopper, tmp_path):
    args = benchmark.Args(("hopper-medium-v2",), ("bc",), num_seeds=1, out_dir=str(tmp_path / "bench"), gpus_per_run=0)
    (job,) = benchmark.make_jobs(args, ["--batch-size=-1"])
    assert "--batch-size must be at least 1" in benchmark.run_job(job, 1)["status"] and not job.ended()
    (job,) = benchmark.make_jobs(args, ["--no-such-flag"])
    assert benchmark.run_job(job, 1)["status"] == "its flags are wrong: see log.txt"
    assert "no-such-flag" in (Path(job.folder) / "log.txt").read_text()
    assert sys.stdout is not None and not sys.stdout.closed


def test_commands_for_other_schedulers(tmp_path):
    out = tmp_path / "bench"
    arguments = ("--print-commands", "--methods", "bc", "iql", "--out-dir", out, "--gpus-per-run", 0, "--one-run-per-seed")
    result = run_script(*arguments, "--tasks", "pointmaze", "pen-human-v1", "--", "--epochs", 5, script="tools.benchmark")
    lines = result.stdout.splitlines()
    assert len(lines) == len(set(lines)) == 4 * 2 * 3 and not out.exists()
    settings = f"--env-id pen-human-v1 --seed 2 --num-seeds 1 --run-dir {out}/pen-human-v1/iql/2"
    assert f"python iql.py {settings} --compile --device=cpu --epochs 5" in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "no-such-task"), "groups are pointmaze, gym"),
        (("--methods", "sac"), "unknown method sac"),
        (("--tasks", "pointmazes"), "groups are"),
        (("--gpus-per-run", "2"), "no machine here has more than"),
        (("--cpus-per-run", "1000"), "--cpus-per-run 1000: no machine here has more than"),
        (("--num-seeds", "0"), "--num-seeds must be at least 1"),
        (("--gpus-per-run", "-1"), "--gpus-per-run must be at least 0"),
        (("--out-dir", "/proc/nowhere"), "--out-dir"),
        (("--report-only", "--out-dir", "/nonexistent"), "there is no such folder"),
        (("--", "--seed", "3"), "--seed cannot be passed on"),
        (("--no-such-flag",), "no-such-flag"),
    ],
)
def test_bad_input(arguments, message, tmp_path, hopper, capsys):
    if "--out-dir" not in arguments:
        arguments = ("--out-dir", str(tmp_path / "bench"), *arguments)
    if "--tasks" not in arguments and "--" not in arguments:
        arguments += ("--tasks", "hopper-medium-v2")
    split = arguments.index("--") if "--" in arguments else len(arguments)
    with pytest.raises(SystemExit) as stop:
        parse = lambda: common.cli(benchmark.Args, arguments[:split])
        common.run(lambda args: benchmark.main(args, arguments[split + 1 :]), parse)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert stop.value.code == 2 and line.startswith("error:") and message in line


def test_an_address_that_nobody_answers(tmp_path, mark):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    result = run_script(
        "--tasks", "hopper-medium-v2", "--address", address, "--out-dir", tmp_path / "bench", script="tools.benchmark"
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith(f"error: --address {address}: no Ray cluster answers there")


def test_a_folder_of_another_benchmark(hopper, tmp_path):
    args = benchmark.Args(("hopper-medium-v2",), ("bc",), out_dir=str(tmp_path / "bench"))
    benchmark.open_suite(args, ["--epochs", "2"])
    with pytest.raises(common.UserError, match="holds a benchmark with other settings"):
        benchmark.open_suite(args, ["--epochs", "3"])
    benchmark.open_suite(args, ["--epochs", "2"])


def test_two_benchmarks_in_a_folder(hopper, tmp_path, monkeypatch):
    args = benchmark.Args(("hopper-medium-v2",), ("bc",), out_dir=str(tmp_path / "bench"))
    monkeypatch.setattr(benchmark, "run_all", lambda *_: benchmark.main(args))  # the second begins while the first runs
    with pytest.raises(common.UserError, match="another benchmark is running"):
        benchmark.main(args)


def test_scripts_run_without_ray(hopper, tmp_path):
    """A module that cannot be imported stands in for one that is not installed."""
    (tmp_path / "ray.py").write_text("raise ImportError('no ray')")
    flags = ("--env-id=hopper-medium-v2", *FLAGS, "--epochs=1", "--steps-per-epoch=10", "--run-dir", tmp_path / "runs")
    environment = dict(PYTHONPATH=str(tmp_path))
    assert run_script(*flags, script="bc.py", **environment).returncode == 0
    result = run_script("--tasks", "hopper-medium-v2", "--out-dir", tmp_path / "b", script="tools.benchmark", **environment)
    assert result.returncode == 2 and "needs Ray" in result.stderr


def test_the_default_suite_is_the_three_mazes():
    jobs = benchmark.make_jobs(benchmark.Args(gpus_per_run=0), [])
    assert {job.task for job in jobs} == set(tasks.POINTMAZES) and len(jobs) == 3 * len(benchmark.methods())
    assert all(job.num_seeds == 3 and Path(job.folder).is_absolute() for job in jobs)
    assert len(benchmark.expand_tasks(["paper", "gym", "hopper-medium-v2"])) == 20
    assert (ROOT / "results" / "published.csv").exists()
