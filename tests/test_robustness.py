"""What does not go as planned: foreign checkpoints, two processes, disks, signals, impossible numbers, bytes from outside."""

import csv
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from helpers import FLAGS, ROOT, assert_same_end, make_args, run_here, run_script, start, wait_for, write_d4rl

import bc
import common
import d4rl_tasks
import data
import dql
import dtql_continuous as dtql
import fql
import idql
import iql
import kl_distill
import srpo
from common import UserError

SMALL = ("--env-id=hopper-medium-v2", *FLAGS, "--num-candidates=8", "--pretrain-epochs=1")


def assert_one_line(result, *messages: str, status: int = 2) -> None:
    """`result` is a finished process, or its (returncode, stderr)."""
    code, errors = (result.returncode, result.stderr) if hasattr(result, "stderr") else result
    assert code == status, errors
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and len(lines[0]) < 1000, errors
    for message in messages:
        assert message in lines[0], errors


# ---- 1. checkpoints and folders that are not what they seem ----------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished run of dtql_continuous.py, with its data; copy it before changing it."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("D4RL_DATASET_DIR", str(folder / "data"))
        write_d4rl(folder / "data" / d4rl_tasks.TASKS["hopper-medium-v2"].file)
        return Path(dtql.main(make_args(folder))["run_dir"])


@pytest.fixture
def run_dir(finished, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("D4RL_DATASET_DIR", str(finished.parent.parent / "data"))
    return Path(shutil.copytree(finished, tmp_path / "run"))


def change_checkpoint(run_dir: Path, change) -> None:
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    torch.save(change(saved) or saved, run_dir / "checkpoint.pt")


def resume(run_dir: Path, module=dtql) -> None:
    """As `--resume RUN_DIR` does it."""
    run_here(module, "--resume", run_dir)


@pytest.mark.parametrize(
    "content",
    [
        torch.zeros(3),
        [1, 2],
        {},
        {"format": common.FORMAT},
        {"agent": {"params": {}}, "args": {}},
        7,
        "text",
        None,
        {"state_dict": {"weight": torch.zeros(2)}},
    ],
    ids=str,
)
def test_a_checkpoint_that_is_something_else(run_dir, content):
    torch.save(content, run_dir / "checkpoint.pt")
    for attempt in (lambda: resume(run_dir), lambda: dtql.load_policy(str(run_dir / "checkpoint.pt"))):
        with pytest.raises(UserError) as error:
            attempt()
        assert "\n" not in str(error.value) and "checkpoint" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"text", None, "half", "pickle"])
def test_an_unreadable_checkpoint_gets_no_advice_to_trust_it(run_dir, content):
    file = run_dir / "checkpoint.pt"
    if content is None:
        file.unlink()
    elif content == "half":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif content == "pickle":
        torch.save({"module": common.Run}, file)  # would need weights_only=False
    else:
        file.write_bytes(content)
    for attempt in (lambda: resume(run_dir), lambda: dtql.load_policy(str(file))):
        with pytest.raises(UserError, match="cannot read the checkpoint") as error:
            attempt()
        assert "weights_only" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_seeds=3), "num_seeds"),
        (dict(seed=9), "seed"),
        (dict(batch_size=64), "batch_size"),
        (dict(policy="implicit"), "policy"),
        (dict(policy="nonsense"), "policy"),
        (dict(epochs=1), "epochs"),
        (dict(epochs=0), "epochs"),
        (dict(epochs=7), "epochs"),
        (dict(alpha=None), "alpha"),
        (dict(gamma="much"), "gamma"),
        (dict(batch_size=1.5), "batch_size"),
        (dict(nll=1), "nll"),
        (dict(env_id=3), "env_id"),
        (dict(more=1), "not this script's"),
    ],
)
def test_a_config_that_disagrees(run_dir, change, message):
    config = json.loads((run_dir / "config.json").read_text())
    config["args"].update(change)
    (run_dir / "config.json").write_text(json.dumps(config))
    before = {file.name: file.read_bytes() for file in run_dir.iterdir() if file.is_file()}
    with pytest.raises(UserError, match=message) as error:
        resume(run_dir)
    assert "\n" not in str(error.value)
    assert {name: (run_dir / name).read_bytes() for name in before} == before  # nothing was lost


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.pop("args"),
        lambda config: config.pop("data"),
        lambda config: config["data"].pop("fingerprint"),
        lambda config: config["data"].update(fingerprint="x"),
        lambda config: config.pop("exp_name"),
        lambda config: config.pop("format"),
        lambda config: config.update(args=[1]),
        lambda config: config.update(format=1),
    ],
)
def test_a_config_that_lacks_something(run_dir, change):
    config = json.loads((run_dir / "config.json").read_text())
    change(config)
    (run_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        resume(run_dir)
    assert "--resume" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(step=10**6), "updates"),
        (lambda s: s.update(step=-1), "updates"),
        (lambda s: s.update(random_state=torch.zeros(3)), "random state"),
        (lambda s: s["learner"]["params"].pop("value"), "lacks"),
        (lambda s: s.update(exp_name="kl_distill"), "kl_distill"),
        (lambda s: s["args"].update(batch_size=64), "batch_size"),
    ],
)
def test_a_checkpoint_that_disagrees(run_dir, change, message):
    change_checkpoint(run_dir, lambda saved: change(saved) and None)
    with pytest.raises(UserError, match=message):
        resume(run_dir)


@pytest.mark.parametrize("module", [kl_distill, bc, iql, idql, dql, fql, srpo])
def test_the_runs_of_other_scripts_are_refused(run_dir, module, capsys):
    with pytest.raises(UserError, match="dtql_continuous"):
        module.load_policy(str(run_dir / "checkpoint.pt"))
    with pytest.raises((UserError, SystemExit)) as error:
        resume(run_dir, module)
    assert "dtql_continuous" in str(error.value)
    with pytest.raises(UserError, match="made by dtql_continuous"):
        args = make_args(run_dir.parent, module)
        module.main(replace(args, resume=str(run_dir)))


def test_an_older_version_is_named(run_dir):
    config = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps({key: config[key] for key in ("exp_name", "args", "data")}))
    with pytest.raises(UserError, match="another version of this project"):
        resume(run_dir)


@pytest.mark.parametrize("options", [dict(num_candidates=0), dict(num_candidates=-3), dict(index=1), dict(device="cuda")])
def test_policies_that_cannot_be(run_dir, options):
    if options.get("device") and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError):
        dtql.load_policy(str(run_dir / "checkpoint.pt"), **options)


def test_resume_of_nothing_starts_no_new_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_one_line(run_script("--resume", ""), "no run is there")
    assert list(tmp_path.iterdir()) == []


# ---- 2. two processes in one folder ----------------------------------------------------------------------------------


def test_the_second_process_in_a_folder_is_refused(hopper, tmp_path):
    process = start(*SMALL, "--epochs=500", "--run-dir", tmp_path / "runs")
    try:
        run_dir = wait_for(tmp_path / "runs")
        assert_one_line(run_script("--resume", run_dir), "another process is writing")
        assert process.poll() is None  # the first trains on
        process.kill()
        process.wait()
        again = start("--resume", run_dir)  # the lock ended with its process
        time.sleep(8)
        assert again.poll() is None
        again.send_signal(signal.SIGTERM)
        _, errors = again.communicate(timeout=60)
        assert again.returncode == 143 and "continue with" in errors
    finally:
        process.kill()


# ---- 3. the disk -------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_at_the_start_leaves_no_folder(hopper, tmp_path):
    limited = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-c", limited, ROOT / "dtql_continuous.py", *SMALL, "--run-dir", tmp_path / "runs"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert_one_line(result, "cannot write", "make room")
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_disk_that_fills_up_in_mid_run(hopper, tmp_path):
    """The last checkpoint stays good, and the run goes on once there is room."""
    whole = run_here(dtql, *SMALL, "--epochs=10", "--run-dir", tmp_path / "whole")
    process = start(*SMALL, "--epochs=10", "--run-dir", tmp_path / "runs")
    run_dir = wait_for(tmp_path / "runs", "*/events*")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
    _, errors = process.communicate(timeout=120)
    assert_one_line((process.returncode, errors), "make room", "--resume", "is good")
    assert not list(run_dir.glob("*.tmp"))
    assert run_script("--resume", run_dir).returncode == 0
    assert_same_end(whole, run_dir)


def test_a_folder_that_is_deleted_in_mid_run(hopper, tmp_path):
    process = start(*SMALL, "--epochs=500", "--run-dir", tmp_path / "runs")
    shutil.rmtree(wait_for(tmp_path / "runs", "*/events*"))
    _, errors = process.communicate(timeout=120)
    assert_one_line((process.returncode, errors), "cannot write")
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize(
    ("script", "flag"), [("dtql_continuous.py", "--run-dir"), ("toy_bandit.py", "--out-dir"), ("speed.py", "--csv")]
)
def test_what_cannot_be_written_is_found_before_any_work(hopper, script, flag):
    started = time.time()
    task = ["--env-id=hopper-medium-v2"] if script == "dtql_continuous.py" else []
    result = run_script(*task, flag, "/proc/nothing/here", script=script)
    assert_one_line(result, flag)
    assert time.time() - started < 60


def test_no_home_is_one_line():
    code = (
        "import data, common, os\nfrom pathlib import Path\n"
        "def no_home(): raise RuntimeError('Could not determine home directory.')\n"
        "Path.home = no_home\ncommon.run(lambda _: data.load_task(os.environ['ID']), lambda: None)"
    )
    for env_id, variable in (("hopper-medium-v2", "D4RL_DATASET_DIR"), ("D4RL/pen/human-v2", "MINARI_DATASETS_PATH")):
        environment = {name: value for name, value in os.environ.items() if name != variable} | {
            "ID": env_id,
            "PYTHONPATH": str(ROOT),
        }
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
        assert_one_line(result, variable)


# ---- 4. signals --------------------------------------------------------------------------------------------------------


def children(process: subprocess.Popen) -> list[int]:
    """The live processes of a group, without its leader."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[2]) == process.pid and fields[0] != "Z" and int(stat.parent.name) != process.pid:
            found.append(int(stat.parent.name))
    return found


def assert_nothing_left(process: subprocess.Popen) -> None:
    deadline = time.time() + 20
    while children(process) and time.time() < deadline:
        time.sleep(0.1)
    assert children(process) == []


WITH_WORKERS = """
import sys, common
workers = common.LockstepEnvs.__init__
common.LockstepEnvs.__init__ = lambda self, make_env, seeds, num_workers=None: workers(self, make_env, seeds, 2)
import dtql_continuous as dtql
step, told = common.LockstepEnvs.step, []
def spy(self, *args):
    told or print("evaluating", flush=True)
    told.append(1)
    return step(self, *args)
common.LockstepEnvs.step = spy
common.run(dtql.main, lambda: common.parse_args(dtql.Args, dtql.task_defaults, sys.argv[1:]))
"""


def evaluating(tmp_path: Path) -> subprocess.Popen:
    """A run that has just begun a long evaluation in two worker processes."""
    process = subprocess.Popen(
        [sys.executable, "-c", WITH_WORKERS, *SMALL, "--epochs=1", "--eval-episodes=2000", "--run-dir", tmp_path / "runs"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    for line in process.stdout:
        if line.startswith("evaluating"):
            return process
    raise AssertionError(process.stderr.read())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_during_evaluation(hopper, tmp_path, number):
    process = evaluating(tmp_path)
    assert len(children(process)) == 2
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "continue with --resume" in errors and "Traceback" not in errors
    assert_nothing_left(process)


def test_a_killed_evaluation_worker_is_one_line(hopper, tmp_path):
    process = evaluating(tmp_path)
    os.kill(children(process)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert_one_line((process.returncode, errors), "worker has died")
    assert_nothing_left(process)


def test_a_sigkill_leaves_no_workers(hopper, tmp_path):
    process = evaluating(tmp_path)
    process.kill()
    process.wait()
    assert_nothing_left(process)


def test_ctrl_c_while_compiling(hopper, tmp_path):
    process = start(
        *[flag for flag in SMALL if "compile" not in flag],
        "--compile",
        "--run-dir",
        tmp_path / "runs",
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
    )
    wait_for(tmp_path / "runs", "*/events*")
    time.sleep(3)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "continue with --resume" in errors, errors[-2000:]
    assert "Traceback" not in errors and len(errors.splitlines()) < 15, errors[-2000:]
    assert common.open_checkpoint(next((tmp_path / "runs").glob("*/checkpoint.pt")))["step"] <= 1
    assert_nothing_left(process)


def test_sigterm_while_the_demo_collects(tmp_path):
    process = start(*FLAGS, "--run-dir", tmp_path / "runs", MINARI_DATASETS_PATH=str(tmp_path / "minari"))
    wait_for(tmp_path / "minari", ".incomplete-*/*")
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in errors and errors.strip().endswith("interrupted")
    assert list((tmp_path / "minari").iterdir()) == [] and not (tmp_path / "runs").exists()


def started_bandits(tmp_path):
    process = start("--out-dir", tmp_path, script="toy_bandit.py")
    deadline = time.time() + 60
    while len(children(process)) < 2 and time.time() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("group", [False, True])
def test_bandits_leave_no_workers(tmp_path, number, group):
    process = started_bandits(tmp_path)
    (os.killpg if group else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in errors, errors
    assert_nothing_left(process)
    assert list(tmp_path.iterdir()) == []


def test_bandits_end_with_any_of_their_processes(tmp_path):
    """Killed outright, as for want of memory: nobody waits for the one that is gone."""
    for victim in (lambda process: process.pid, lambda process: children(process)[0]):
        process = started_bandits(tmp_path)
        os.kill(victim(process), signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode != 0
        assert_nothing_left(process)


# ---- 5. numbers that cannot work ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("dtql_continuous.py", ["--seed", str(2**63)]),
        ("dtql_continuous.py", ["--seed", str(2**63 - 1)]),
        ("dtql_continuous.py", ["--seed", "-1"]),
        ("dtql_continuous.py", ["--batch-size", str(10**12)]),
        ("dtql_continuous.py", ["--num-candidates", str(10**12)]),
        ("dtql_continuous.py", ["--eval-episodes", str(10**12)]),
        ("dtql_continuous.py", ["--num-seeds", str(10**9)]),
        ("dtql_continuous.py", ["--learning-rate", "inf"]),
        ("dtql_continuous.py", ["--gamma", "nan"]),
        ("iql.py", ["--beta", "inf"]),
        ("speed.py", ["--models", "0"]),
        ("speed.py", ["--rounds", "0"]),
        ("speed.py", ["--batch-sizes", "-5"]),
        ("toy_bandit.py", ["--seed", str(2**64)]),
        ("toy_bandit.py", ["--seed", "-1"]),
    ],
)
def test_impossible_numbers_are_refused_at_once(tmp_path, monkeypatch, script, flags):
    monkeypatch.chdir(tmp_path)
    assert_one_line(run_script(*flags, script=script), flags[0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", [1795476957123456789, 2**63 - 3])
def test_time_stamps_are_seeds(hopper, tmp_path, seed):
    result = dtql.main(make_args(tmp_path, seed=seed, num_seeds=2))
    assert [row["seed"] for row in result["rows"]] == [seed, seed + 1]


# ---- 6. data from outside ----------------------------------------------------------------------------------------------


def answer(reply: bytes) -> str:
    """The address of a server that answers the first connection with `reply` and hangs up."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = server.accept()
        connection.recv(65536)
        connection.sendall(reply)
        connection.close()
        server.close()

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1000\r\nonly this",
        b"no HTTP at all\r\n\r\n",
        b"",
        b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 70_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(300)) + b"\r\n",
        b"HTTP/1.1 404 Not Found\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: ftp:nowhere\r\n\r\n",
        b"HTTP/1.1 nine OK\r\n\r\n",
    ],
    ids=range(9),
)
def test_servers_that_misbehave(hopper, monkeypatch, reply):
    hopper.unlink()
    monkeypatch.setenv("D4RL_BASE_URL", answer(reply))
    with pytest.raises(UserError, match=f"cannot download .*put {hopper.name} into") as error:
        data.load_task("hopper-medium-v2")
    assert "\n" not in str(error.value) and len(str(error.value)) < 700 and list(hopper.parent.iterdir()) == []


@pytest.mark.parametrize(
    "url", ["http://no such host/", "http://127.0.0.1:99999/", "http://127.0.0.1:port/", "gopher://x/", "nonsense", "http://[::1"]
)
def test_addresses_that_are_none(hopper, monkeypatch, url):
    hopper.unlink()
    monkeypatch.setenv("D4RL_BASE_URL", url)
    with pytest.raises(UserError, match=f"put {hopper.name} into"):
        data.load_task("hopper-medium-v2")
    assert list(hopper.parent.iterdir()) == []


def corrupted(content: bytes, rng: np.random.Generator) -> bytes:
    """Some wrong bytes, a cut, or a stretch of zeros."""
    changed = bytearray(content)
    kind = rng.integers(4)
    if kind == 0:
        return bytes(changed[: rng.integers(len(changed))])
    if kind == 1:
        start = rng.integers(len(changed))
        changed[start : start + rng.integers(1, 200)] = b""
        return bytes(changed)
    # wrong bytes matter most where the structure is
    where = rng.integers(len(changed), size=20) if kind == 2 else rng.integers(min(4000, len(changed)), size=5)
    for position in where:
        changed[position] = rng.integers(256)
    return bytes(changed)


def test_hdf5_files_with_wrong_bytes(tmp_path):
    """Each of 250 corruptions is read as data or refused in one line that ends in advice."""
    content, file = write_d4rl(tmp_path / "good.hdf5", rows=60).read_bytes(), tmp_path / "bad.hdf5"
    refused = 0
    for seed in range(250):
        file.write_bytes(corrupted(content, np.random.default_rng(seed)))
        try:
            data.d4rl_transitions(file, 1000)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 700 and str(file) in str(error)
    assert refused > 50


@pytest.mark.parametrize(
    "changes",
    [
        dict(rewards=np.array([b"much"] * 600)),
        dict(actions=np.array([[b"left"] * 3] * 600)),
        dict(terminals=np.full(600, np.nan)),
        dict(timeouts=np.full(600, np.nan)),
        dict(timeouts=np.full(600, 2.0)),
        dict(terminals=np.full(600, -1)),
        dict(observations=np.float32(3)),
        dict(rewards=np.zeros(600, complex)),
        dict(timeouts=np.zeros((600, 2))),
        dict(timeouts=np.float32(0)),
    ],
)
def test_columns_that_are_no_numbers(hopper, changes):
    write_d4rl(hopper, **changes)
    with pytest.raises(UserError) as error:
        data.load_task("hopper-medium-v2")
    assert str(hopper) in str(error.value) and "\n" not in str(error.value)


def test_dangling_links_and_folders(hopper):
    import h5py

    with h5py.File(hopper, "a") as file:
        del file["rewards"]
        file["rewards"] = h5py.SoftLink("/nowhere")
    with pytest.raises(UserError):
        data.load_task("hopper-medium-v2")
    with h5py.File(hopper, "a") as file:
        del file["rewards"]
        file.create_group("rewards")
    with pytest.raises(UserError):
        data.load_task("hopper-medium-v2")
    hopper.unlink()
    hopper.symlink_to(hopper.parent / "nothing")
    with pytest.raises(UserError):
        data.load_task("hopper-medium-v2")
    hopper.unlink()
    hopper.mkdir()
    with pytest.raises(UserError):
        data.load_task("hopper-medium-v2")


@pytest.fixture
def minari_set(monkeypatch, tmp_path) -> Path:
    """The folder of a small Minari data set test/small-v0."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    collector = minari.DataCollector(gym.make("Pendulum-v1", max_episode_steps=30))
    for _ in range(3):
        collector.reset(seed=0)
        for _ in range(30):
            collector.step(collector.action_space.sample())
    collector.create_dataset(
        "test/small-v0",
        algorithm_name="random",
        author="t",
        author_email="t",
        code_permalink="t",
        description="t",
        eval_env=gym.make("Pendulum-v1"),
        ref_min_score=-1000.0,
        ref_max_score=0.0,
    )
    return tmp_path / "minari" / "test" / "small-v0"


def test_minari_files_with_wrong_bytes(minari_set):
    files = [file for file in minari_set.rglob("*") if file.is_file()]
    good, refused = {file: file.read_bytes() for file in files}, 0
    data.load_task("test/small-v0")
    for seed in range(120):
        rng = np.random.default_rng(seed)
        file = files[rng.integers(len(files))]
        file.write_bytes(corrupted(good[file], rng))
        try:
            data.load_task("test/small-v0")
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 700
        file.write_bytes(good[file])
    assert refused > 30


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0)])
def test_reference_scores_without_a_scale(minari_set, low, high):
    file = minari_set / "data" / "metadata.json"
    metadata = json.loads(file.read_text())
    file.write_text(json.dumps({**metadata, "ref_min_score": low, "ref_max_score": high}))
    with pytest.raises(UserError, match="reference scores"):
        data.load_task("test/small-v0")


# ---- 7. terminals ------------------------------------------------------------------------------------------------------


def test_an_ascii_terminal(hopper, tmp_path):
    result = run_script(*SMALL, "--run-dir", tmp_path / "runs", PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONUTF8="0")
    assert result.returncode == 0, result.stderr
    assert "(last)" in result.stdout
    with open(next((tmp_path / "runs").glob("*/eval.csv"))) as file:
        assert len(list(csv.DictReader(file))) == 1


# ---- 9. silent nonsense ------------------------------------------------------------------------------------------------


class Broken(gym.Env):
    """Gives NaN at its third step: as a reward or as an observation."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1.0, 1.0, (1,))

    def __init__(self, what: str):
        self.what = what

    def reset(self, seed=None, options=None):
        self.steps = 0
        return np.zeros(2), {}

    def step(self, action):
        self.steps += 1
        broken = self.steps == 3
        obs = np.full(2, np.nan if broken and self.what == "obs" else 0.0)
        return obs, float("nan") if broken and self.what == "reward" else 1.0, self.steps == 5, False, {}


@pytest.mark.parametrize("what", ["obs", "reward"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_environment_that_gives_nan(what, workers):
    envs = common.LockstepEnvs(lambda: Broken(what), range(4), workers)
    with pytest.raises(UserError, match="NaN"):
        common.run_episodes(envs, lambda obs: np.zeros((*obs.shape[:2], 1), np.float32), np.arange(4)[None])
    envs.close()


def test_policies_refuse_nan(run_dir):
    act = dtql.load_policy(str(run_dir / "checkpoint.pt"))
    for value in (np.nan, np.inf):
        with pytest.raises(UserError, match="finite"):
            act(np.full((3, 11), value))


def test_mazes_leave_no_files(monkeypatch, tmp_path):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setattr(data, "POINTMAZES", {data.DEMO_ID: ("PointMaze_UMaze-v3", 500)})
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    task = data.load_task(data.DEMO_ID)
    env = task.make_env()
    env.reset(seed=0)
    env.close()
    assert list((tmp_path / "tmp").iterdir()) == []
