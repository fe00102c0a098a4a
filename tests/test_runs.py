"""Runs: folders, evaluation, settings, interruption, resuming, disks and one-line errors."""

import datetime
import importlib.machinery
import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import (
    FLAGS,
    METHODS,
    ROOT,
    assert_same_end,
    command,
    make_agent,
    make_args,
    params_of,
    rows_of,
    run_here,
    run_inside,
    run_script,
    start,
    train,
    wait_for,
    write_d4rl,
)

import common
import dtql_continuous as dtql
import dtql_online
import evaluation
import kl_distill
import run_folder
from common import UserError
from tasks import d4rl
from tools import report

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


@pytest.mark.slow
def test_a_run_leaves_a_whole_folder(hopper, tmp_path):
    args = make_args(tmp_path, num_seeds=3, seed=7, epochs=3, eval_every=2)
    result = dtql.main(args)
    run_dir = Path(result["run_dir"])
    assert run_dir.parent == tmp_path / "runs"
    assert run_dir.name.startswith("hopper-medium-v2__dtql_continuous__7__")
    config = json.loads((run_dir / "config.json").read_text())
    assert config["args"]["batch_size"] == 32 and config["data"]["transitions"] == 588
    assert config["device"].endswith(f", {torch.get_num_threads()} thread(s)")
    started = datetime.datetime.fromisoformat(config["started"])
    assert datetime.timedelta() <= datetime.datetime.now(datetime.UTC) - started < datetime.timedelta(minutes=5)
    assert config["data"]["origin"] == str(hopper)
    release = lambda version: version.split("+")[0]  # PyPI's build for CUDA has +cu130 in torch.__version__ alone
    assert release(config["versions"]["torch"]) == release(torch.__version__)
    rows = rows_of(run_dir)
    assert tuple(rows[0]) == run_folder.EVAL_FIELDS
    episodes = rows_of(run_dir, "episodes.csv")
    assert tuple(episodes[0]) == run_folder.EPISODE_FIELDS and len(episodes) == 2 * 3 * 2
    for row in rows:
        own = [episode for episode in episodes if (episode["epoch"], episode["seed"]) == (row["epoch"], row["seed"])]
        assert [episode["episode"] for episode in own] == ["0", "1"]
        for mean, value in (("return_mean", "return"), ("score_mean", "score"), ("length_mean", "length")):
            assert float(row[mean]) == pytest.approx(np.mean([float(episode[value]) for episode in own]))
    assert (run_dir / "dtql_continuous.py").read_bytes() == (ROOT / "dtql_continuous.py").read_bytes()
    assert [(row["epoch"], row["seed"]) for row in rows] == [(e, s) for e in "23" for s in "789"]
    for row in rows:
        score = 100 * (float(row["return_mean"]) + 20.272305) / (3234.3 + 20.272305)
        assert float(row["score_mean"]) == pytest.approx(score) and row["episodes"] == "2"
    assert result["rows"][0]["score_mean"] == float(rows[0]["score_mean"])

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {
        "losses/critic",
        "losses/value",
        "losses/denoiser",
        "losses/actor",
        "losses/trust_region",
        "charts/SPS",
        "eval/score_mean",
        "eval/score_mean_seed8",
    } <= tags
    assert [event.step for event in events.Scalars("losses/critic")] == [20, 40, 60, 80]


@pytest.mark.slow
def test_a_slice_of_three_models_is_a_plain_module_and_a_policy(hopper, tmp_path):
    args = make_args(tmp_path, num_seeds=3)
    run_dir = dtql.main(args)["run_dir"]
    saved = common.open_checkpoint(f"{run_dir}/checkpoint.pt")["agent"]
    actor = dtql.GaussianActor(11, 3)
    actor.load_state_dict({name.removeprefix("actor."): param[2] for name, param in saved.items() if name.startswith("actor.")})
    act = dtql.load_policy(f"{run_dir}/checkpoint.pt", index=2, num_candidates=1)
    obs = np.random.default_rng(0).standard_normal((2000, 11))
    actions = act(obs)
    with torch.no_grad():
        mean, log_std = actor(torch.as_tensor(obs, dtype=torch.float32))
    z = (np.arctanh(actions.clip(-1 + 1e-6, 1 - 1e-6)) - mean.numpy()) / log_std.exp().numpy()
    inside = np.abs(actions) < 0.99
    assert abs(z[inside].mean()) < 0.15 and 0.7 < z[inside].std() < 1.1  # they are samples of model 2's Gaussian


def test_resume_after_an_end_is_a_no_op_and_conflicts_are_named(hopper, tmp_path, capsys):
    args = make_args(tmp_path)
    run_dir = dtql.main(args)["run_dir"]
    again = dtql.main(replace(args, resume=run_dir))
    assert again["run_dir"] == run_dir and len(rows_of(run_dir)) == 1
    with pytest.raises(UserError, match="has alpha = 5.0, not 2.0"):
        dtql.main(replace(args, resume=run_dir, alpha=2.0))
    write_d4rl(hopper, rewards=np.ones(600))
    with pytest.raises(UserError, match="not the data that the run began with"):
        dtql.main(replace(args, resume=run_dir))


@pytest.mark.slow
def test_the_best_checkpoint_is_kept(hopper, tmp_path, monkeypatch):
    scores = iter((3.0, 9.0, 5.0))
    monkeypatch.setattr(run_folder, "evaluate", lambda *_: (*2 * [np.full((1, 2), next(scores))], np.ones((1, 2)), 0.0))
    run_dir = Path(dtql.main(make_args(tmp_path, epochs=3, eval_every=1))["run_dir"])
    best, last = (common.open_checkpoint(run_dir / name) for name in ("best.pt", "checkpoint.pt"))
    assert (best["step"], last["step"]) == (20 + 40, 20 + 60)
    dtql.load_policy(str(run_dir / "best.pt"))(np.zeros(11))


@pytest.mark.slow
def test_a_finished_run_grows_and_is_evaluated_again(hopper, tmp_path, capsys, tiny_networks):
    whole = dtql.main(make_args(tmp_path, epochs=4, eval_every=2, eval_episodes=3, lr_decay=False))["run_dir"]
    run_dir = Path(dtql.main(make_args(tmp_path, epochs=2, eval_every=2, lr_decay=False))["run_dir"])
    run_here(dtql, "--resume", run_dir, "--epochs=4", "--eval-episodes=3")
    assert "goes on with" in capsys.readouterr().err
    rows = rows_of(run_dir)
    assert [row["epoch"] for row in rows] == ["2", "4"] and [row["episodes"] for row in rows] == ["2", "3"]
    assert all(torch.equal(params_of(whole)[name], value) for name, value in params_of(run_dir).items())
    assert rows_of(whole)[-1]["return_mean"] == rows[-1]["return_mean"]
    assert report.read_runs(run_dir)[0].finished
    with pytest.raises(UserError, match="has epochs = 4, not 3"):
        run_here(dtql, "--resume", run_dir, "--epochs=3")
    before = {file.name: file.read_bytes() for file in run_dir.iterdir() if file.suffix in (".pt", ".csv", ".json")}
    run_here(dtql, "--resume", run_dir, "--evaluate-only=5")
    assert "5 episodes" in capsys.readouterr().out and len(rows_of(run_dir, "evaluation.csv")) == 5
    assert all((run_dir / name).read_bytes() == content for name, content in before.items())
    assert_one_line(run_inside("--evaluate-only=5"), "--evaluate-only needs --resume")


@pytest.mark.slow
def test_tracking(hopper, tmp_path, monkeypatch):
    """What Weights & Biases is asked for; the package itself is no dependency."""
    calls = []
    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    fake.init = lambda **settings: calls.append(settings) or types.SimpleNamespace(finish=lambda: calls.append("finish"))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run_dir = dtql.main(make_args(tmp_path, track=True))["run_dir"]
    dtql.main(make_args(tmp_path, track=True, resume=run_dir))
    first, end, second, _ = calls
    assert end == "finish" and first == second  # the same W&B run
    assert first["id"] == Path(run_dir).name and first["resume"] == "allow" and first["sync_tensorboard"]
    assert first["config"]["args"]["env_id"] == "hopper-medium-v2"
    monkeypatch.delitem(sys.modules, "wandb")
    dtql.load_policy(f"{run_dir}/checkpoint.pt")  # a tracked run's policy needs no Weights & Biases
    if importlib.util.find_spec("wandb") is None:
        assert_one_line(run_inside("--track"), "pip install wandb")


def test_both_versions_of_an_edited_script_are_kept(hopper, tmp_path, capsys):
    run_dir = Path(dtql.main(make_args(tmp_path))["run_dir"])
    assert "edited" not in capsys.readouterr().err
    (run_dir / "dtql_continuous.py").write_text("# as it was when the run began\n")
    for _ in range(2):  # the second resume has nothing new to keep
        dtql.main(make_args(tmp_path, resume=str(run_dir)))
    assert capsys.readouterr().err.count("was edited since this run began") == 1
    kept = {file.name: file.read_text() for file in run_dir.glob("*.py")}
    assert kept == {
        "dtql_continuous.py": "# as it was when the run began\n",
        "dtql_continuous_from_update_60.py": Path(dtql.__file__).read_text(),
    }


@pytest.mark.slow
def test_resume_takes_its_settings_from_the_folder(hopper, tmp_path):
    run_dir = run_here(dtql, *SMALL, "--alpha=2.5", "--run-dir", tmp_path / "runs")
    assert_one_line(run_inside("--resume", run_dir, "--alpha=3"), "has alpha = 2.5, not 3.0; leave the flag out")
    # Flags that did not exist when the run began take their defaults; those that are gone are named
    config = json.loads((run_dir / "config.json").read_text())
    del config["args"]["torch_deterministic"]
    (run_dir / "config.json").write_text(json.dumps(config | {"args": config["args"] | {"old_flag": 3}}))
    result = run_inside("--resume", run_dir)
    assert result.returncode == 0 and "does not know: old_flag" in result.stderr


@pytest.mark.slow
def test_interrupted_and_killed_runs_go_on(hopper, tmp_path):
    """SIGTERM leaves a checkpoint of that moment, SIGKILL the last one; both runs end as one that nothing happened to."""
    flags = (*SMALL, "--epochs=8", "--eval-every=2", "--lr-decay", "--steps-per-epoch=23")
    whole = run_here(dtql, *flags, "--run-dir", tmp_path / "whole")
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = start(*flags, "--run-dir", tmp_path / number.name)
        run_dir = wait_for(tmp_path / number.name)
        time.sleep(0.8)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        if number == signal.SIGTERM:
            assert process.returncode == 128 + number and f"--resume {run_dir}" in errors and "Traceback" not in errors
            assert common.open_checkpoint(run_dir / "checkpoint.pt")["step"] > 0
        run_here(dtql, "--resume", run_dir)
        assert_same_end(whole, run_dir)


@pytest.mark.slow
def test_a_second_signal_stops_at_once_and_saves_nothing_half_done(hopper, tmp_path, monkeypatch):
    """Two signals within one update: the checkpoint stays that of before, and the run continues from it."""
    whole = dtql.main(make_args(tmp_path, epochs=3))["run_dir"]
    runs, polyak_update = [], dtql.stacked.polyak_update

    def interrupted(*inputs) -> None:
        if len(runs) == 30:
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)
        polyak_update(*inputs)

    advance = run_folder.Run.advance
    with monkeypatch.context() as patch, pytest.raises(common.Interrupted):
        patch.setattr(run_folder.Run, "advance", lambda run, metrics: (runs.append(run), advance(run, metrics)))
        patch.setattr(dtql.stacked, "polyak_update", interrupted)
        dtql.main(make_args(tmp_path, epochs=3))
    assert common.open_checkpoint(runs[0].dir / "checkpoint.pt")["step"] < 30
    dtql.main(make_args(tmp_path, epochs=3, resume=str(runs[0].dir)))
    assert_same_end(whole, runs[0].dir)


def test_a_killed_write_leaves_the_previous_file_and_links_are_not_followed(tmp_path, monkeypatch):
    file, other = tmp_path / "checkpoint.pt", tmp_path / "other"
    common.write_atomically(file, b"one")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        common.write_atomically(file, b"another")
    assert file.read_bytes() == b"one"
    (tmp_path / "checkpoint.pt.tmp").unlink(missing_ok=True)
    other.write_bytes(b"mine")
    (tmp_path / "checkpoint.pt.tmp").symlink_to(other)
    common.write_atomically(file, b"another")
    assert file.read_bytes() == b"another" and other.read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 2


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(hopper, tmp_path):
    with pytest.raises(UserError, match="no longer finite"):
        dtql.main(make_args(tmp_path, learning_rate=1e30, epochs=5))
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert all(param.isfinite().all() for param in params_of(run_dir).values())


@pytest.mark.slow
def test_evaluation_does_not_disturb_training(hopper, tmp_path):
    often = dtql.main(make_args(tmp_path, epochs=4, eval_every=1))["run_dir"]
    seldom = dtql.main(make_args(tmp_path, epochs=4))["run_dir"]
    a, b = params_of(often), params_of(seldom)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert rows_of(often)[-1]["return_mean"] == rows_of(seldom)[-1]["return_mean"]


# ---- evaluation --------------------------------------------------------------------------------------------------------


class Countdown(gym.Env):
    """Ends after a number of steps drawn at reset; the return is that number. The observation is (seed-like, step)."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(-1.0, 1.0, (1,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.length, self.now = int(self.np_random.integers(1, 30)), 0
        return np.array([self.length, 0.0]), {}

    def step(self, action):
        assert action.shape == (1,) and action[0] == self.length + self.now  # this copy's own action
        self.now += 1
        return np.array([self.length, self.now]), 1.0, self.now == self.length, False, {}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("copies", [5, 12])
def test_every_episode_counts_once_however_short(workers, copies):
    seeds = evaluation.episode_seeds([0, 1], epoch=3, num_episodes=6)
    env, expected = Countdown(), np.zeros((2, 6), int)
    for index, seed in np.ndenumerate(seeds):
        env.reset(seed=int(seed))
        expected[index] = env.length
    envs = evaluation.LockstepEnvs(Countdown, range(copies), workers)
    assert len(envs.processes) == workers
    returns, lengths = evaluation.run_episodes(envs, lambda obs: obs.sum(-1, keepdims=True), seeds)
    envs.close()
    np.testing.assert_array_equal(returns, expected)
    np.testing.assert_array_equal(lengths, expected)
    assert not any(process.is_alive() for process in envs.processes)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_long_evaluation_says_where_it_is(monkeypatch, capsys, workers):
    monkeypatch.setattr(evaluation, "REPORT_EVERY", 0.1)
    step = Countdown.step
    monkeypatch.setattr(Countdown, "step", lambda env, action: (time.sleep(0.5), step(env, action))[1])
    envs = evaluation.LockstepEnvs(Countdown, range(4), workers)
    with pytest.raises(RuntimeError, match="enough"):

        def act(obs):
            if obs[..., 1].any():
                raise RuntimeError("enough")
            return obs.sum(-1, keepdims=True)

        evaluation.run_episodes(envs, act, np.arange(4)[None])
    envs.close()
    errors = capsys.readouterr().err
    assert "waiting for the environment" in errors and "0/4" in errors and "4 steps" in errors


def test_an_error_in_a_worker_arrives_with_its_line():
    envs = evaluation.LockstepEnvs(Countdown, range(4), 2)
    envs.reset(np.arange(4), np.arange(4))
    with pytest.raises(evaluation.EnvironmentFailure, match=r"AssertionError.*test_runs.py:\d+"):
        envs.step(np.arange(4), np.full((4, 1), -1.0))
    envs.close()


@pytest.mark.parametrize("error", [ZeroDivisionError("later"), SystemExit(0), "os._exit"])
def test_an_environment_that_fails_later_loses_nothing(hopper, tmp_path, monkeypatch, error):
    """The run is saved before its evaluation, and the line says how to continue."""
    step, steps = evaluation._Shard.step, []

    def failing(self, *inputs):
        steps.append(1)
        if len(steps) > 5:
            if error == "os._exit":
                os._exit(0)
            raise error
        return step(self, *inputs)

    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match="(failed in step|has died).*continue with --resume") as raised,
    ):
        patch.setattr(evaluation._Shard, "step", failing)
        dtql.main(make_args(tmp_path))
    assert "\n" not in str(raised.value)
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert common.open_checkpoint(run_dir / "checkpoint.pt")["step"] == 60
    assert len(dtql.main(make_args(tmp_path, resume=str(run_dir)))["rows"]) == 1


@pytest.mark.slow
def test_an_error_before_the_run_begins_ends_the_workers(hopper, tmp_path):
    write_d4rl(hopper, rewards=np.zeros(600, np.float32))
    result = run_script("--env-id=hopper-medium-v2", "--run-dir", tmp_path / "runs", script="iql.py")
    assert_one_line(result, "the same return")


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
@pytest.mark.parametrize("workers", [1, 2])
def test_an_environment_that_gives_nan(what, workers):
    envs = evaluation.LockstepEnvs(lambda: Broken(what), range(4), workers)
    with pytest.raises(evaluation.EnvironmentFailure, match="NaN|finite"):
        evaluation.run_episodes(envs, lambda obs: np.zeros((*obs.shape[:2], 1), np.float32), np.arange(4)[None])
    envs.close()


# ---- several values of a setting ---------------------------------------------------------------------------------------


SWEEPS = [(module, name) for module in METHODS for name in module.Args.sweep]


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name"), SWEEPS, ids=lambda value: getattr(value, "__name__", value))
def test_each_model_trains_with_its_own_value(module, name):
    """Two values in a stack: each model's loss is that of a stack in which all have its value."""
    values = (0.3, 0.8)
    together, alone = make_agent(module=module, **{name: values}), [make_agent(2, module=module, **{name: v}) for v in values]
    assert together.args.labels == [f"{name}=0.3", f"{name}=0.8"] and together.args.model_seeds == [0, 0]
    for agent in alone:  # the models of `together` start alike, both with seed 0
        dtql.stacked.load_state(agent, dtql.stacked.state_of(together))
    metrics = []
    for agent in (together, *alone):
        torch.manual_seed(0)
        metrics.append([train(agent) for _ in range(2)][1])
    for key in metrics[0]:
        for i in range(2):
            torch.testing.assert_close(metrics[0][key][i], metrics[1 + i][key][i], rtol=1e-3, atol=1e-4)
    assert any((metrics[1][key] - metrics[2][key]).abs().max() > 1e-6 for key in metrics[0])


@pytest.mark.slow
def test_a_run_says_which_is_which(hopper, tmp_path):
    """The command line: tables, TensorBoard, the policy, the report and a resumed run name the settings."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = [
        "--env-id",
        "hopper-medium-v2",
        "--alpha",
        "1",
        "5",
        "--num-seeds",
        "2",
        *FLAGS,
        "--pretrain-epochs=1",
        "--num-candidates=8",
        "--run-dir",
        tmp_path / "runs",
    ]
    result = run_inside(*flags)
    assert result.returncode == 0, result.stderr
    assert "alpha=1: " in result.stdout and "alpha=5: " in result.stdout and "4 model(s)" in result.stdout
    (run_dir,) = (tmp_path / "runs").iterdir()
    rows, episodes = rows_of(run_dir), rows_of(run_dir, "episodes.csv")
    expected = [("alpha=1", "0"), ("alpha=1", "1"), ("alpha=5", "0"), ("alpha=5", "1")]
    assert [(row["setting"], row["seed"]) for row in rows[-4:]] == expected
    assert {(row["setting"], row["seed"]) for row in episodes} == set(expected)
    events = EventAccumulator(str(run_dir)).Reload()
    assert "eval/score_mean_alpha=5_seed1" in events.Tags()["scalars"] and "losses_alpha=5/actor" in events.Tags()["scalars"]
    policy = dtql.load_policy(str(run_dir / "checkpoint.pt"), 2)
    assert policy.about["alpha"] == 5 and policy.about["seed"] == 0
    with pytest.raises(UserError, match=r"4 model\(s\): there is no 4"):
        dtql.load_policy(str(run_dir / "checkpoint.pt"), 4)
    again = run_inside("--resume", run_dir)
    assert again.returncode == 0, again.stderr
    assert rows_of(run_dir) == rows
    runs = report.read_runs(tmp_path / "runs")
    assert sorted((run.method, run.seed) for run in runs) == [(f"dtql_continuous {label}", int(seed)) for label, seed in expected]
    text = report.write_report(tmp_path / "runs", [("hopper-medium-v2", "dtql_continuous")]).read_text()
    assert "dtql_continuous alpha=1, last" in text and "missing" not in text.split("paper")[0]


@pytest.mark.parametrize("values", [(1.0, 1.0), ()])
def test_values_are_given_once(tmp_path, values):
    with pytest.raises(UserError, match="give each value once"):
        dtql.main(make_args(tmp_path, alpha=values))
    with pytest.raises(UserError, match="too many"):
        dtql.main(make_args(tmp_path, num_seeds=6000, alpha=(1.0, 2.0)))


# ---- checkpoints and folders that are not what they seem ---------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished run of dtql_continuous.py, with its data; copy it before changing it."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("D4RL_DATASET_DIR", str(folder / "data"))
        write_d4rl(folder / "data" / d4rl.TASKS["hopper-medium-v2"].file)
        return Path(dtql.main(make_args(folder))["run_dir"])


@pytest.fixture
def run_dir(finished, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("D4RL_DATASET_DIR", str(finished.parent.parent / "data"))
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "content",
    [torch.zeros(3), {}, {"format": 2}, {"agent": {"params": {}}, "args": {}}, b"", b"text", None, "half", "pickle"],
    ids=str,
)
def test_a_checkpoint_that_is_something_else_or_damaged(run_dir, content):
    file = run_dir / "checkpoint.pt"
    if content is None:
        file.unlink()
    elif content == "half":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save({"module": run_folder.Run} if content == "pickle" else content, file)
    for attempt in (lambda: run_here(dtql, "--resume", run_dir), lambda: dtql.load_policy(str(file))):
        with pytest.raises(UserError, match="checkpoint") as error:
            attempt()
        assert "\n" not in str(error.value) and "weights_only" not in str(error.value)


@pytest.mark.slow
def test_one_wrong_byte_in_a_checkpoint_is_noticed(run_dir):
    file = run_dir / "checkpoint.pt"
    good, rng, damaged = file.read_bytes(), np.random.default_rng(0), 0
    for position in rng.integers(1000, len(good) - 1000, size=20):
        changed = bytearray(good)
        changed[position] ^= 0x41
        file.write_bytes(changed)
        try:
            policy = dtql.load_policy(str(file))
            file.write_bytes(good)
            np.testing.assert_array_equal(policy(np.zeros(11)), dtql.load_policy(str(file))(np.zeros(11)))  # it was padding
        except UserError:
            damaged += 1
    assert damaged >= 15


@pytest.mark.slow
def test_a_policy_of_nan_is_refused(run_dir):
    act = dtql.load_policy(str(run_dir / "checkpoint.pt"))
    act.agent.act = lambda obs, _: torch.full((*obs.shape[:2], 3), torch.nan)
    with pytest.raises(UserError, match="NaN for these observations"):
        act(np.zeros(11))
    with pytest.raises(evaluation.EnvironmentFailure, match="NaN"):
        evaluation.to_env_units(np.full((2, 1), np.nan), np.full(1, -1.0), np.full(1, 1.0))
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    saved["agent"]["actor.net.0.weight"][0, 0, 0] = float("nan")
    torch.save(saved, run_dir / "checkpoint.pt")
    with pytest.raises(UserError, match="NaN"):
        dtql.load_policy(str(run_dir / "checkpoint.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("module", [kl_distill, dtql_online], ids=lambda module: module.__name__)
def test_the_runs_of_other_scripts_are_refused(run_dir, module):
    with pytest.raises(UserError, match="written by dtql_continuous.py"):
        module.load_policy(str(run_dir / "checkpoint.pt"))
    with pytest.raises(UserError, match="made by dtql_continuous.py"):
        run_here(module, "--resume", run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("change", [dict(format=2), dict(format=None), None])
def test_another_versions_folder_is_refused(run_dir, change):
    config = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps(config | change) if change else "no JSON")
    with pytest.raises(UserError, match="another version|is not a run") as error:
        run_here(dtql, "--resume", run_dir)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_resume_of_nothing_starts_no_new_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_one_line(run_inside("--resume", ""), "is not a run")
    assert list(tmp_path.iterdir()) == []


# ---- two processes, disks, signals -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_second_process_in_a_folder_is_refused(hopper, tmp_path):
    process = start(*SMALL, "--epochs=20", "--run-dir", tmp_path / "runs")
    try:
        run_dir = wait_for(tmp_path / "runs")
        assert_one_line(run_inside("--resume", run_dir), "another process is writing")
        assert process.poll() is None  # the first trains on
        process.kill()
        process.wait()
        run_here(dtql, "--resume", run_dir)  # the lock ended with its process
    finally:
        process.kill()


@pytest.mark.slow
def test_a_disk_that_fills_up_in_mid_run(hopper, tmp_path):
    """The last checkpoint stays good, and the run goes on once there is room."""
    whole = run_here(dtql, *SMALL, "--epochs=7", "--run-dir", tmp_path / "whole")
    process = start(*SMALL, "--epochs=7", "--run-dir", tmp_path / "runs")
    run_dir = wait_for(tmp_path / "runs", "*/events*")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
    _, errors = process.communicate(timeout=120)
    assert_one_line((process.returncode, errors), "free some space", "--resume", "is valid")
    assert not list(run_dir.glob("*.tmp"))
    run_here(dtql, "--resume", run_dir)
    assert_same_end(whole, run_dir)


@pytest.mark.parametrize(
    ("script", "flag"), [("dtql_continuous.py", "--run-dir"), ("toy_bandit.py", "--out-dir"), ("tools.speed", "--csv")]
)
def test_what_cannot_be_written_is_found_before_any_work(hopper, script, flag):
    started = time.time()
    task = ["--env-id=hopper-medium-v2"] if script == "dtql_continuous.py" else []
    result = run_inside(*task, flag, "/proc/nothing/here", script=script)
    assert_one_line(result, flag)
    assert time.time() - started < 60


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
import sys, common, evaluation
evaluation.LockstepEnvs.max_workers = 2
import dtql_continuous as dtql
step, told = evaluation.LockstepEnvs.step, []
def spy(self, *args):
    if len(self.pipes) == 2 and not told:
        print("evaluating", flush=True)
        told.append(1)
    return step(self, *args)
evaluation.LockstepEnvs.step = spy
common.run(dtql.main, lambda: common.parse_args(dtql.Args, dtql.task_defaults, sys.argv[1:]))
"""


def evaluating(tmp_path: Path, hangs: bool = False) -> subprocess.Popen:
    """A run that has just begun a long evaluation in two worker processes, the steps of whose environments may hang."""
    hang = (
        "import time, evaluation as e\nshard_step = e._Shard.step\n"
        "e._Shard.step = lambda shard, *_: time.sleep(999) if len(shard.envs) > 1 else shard_step(shard, *_)\n"
    )
    code = hang * hangs + WITH_WORKERS
    process = subprocess.Popen(
        [sys.executable, "-c", code, *SMALL, "--epochs=1", "--eval-episodes=2000", "--run-dir", tmp_path / "runs"],
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


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_during_evaluation(hopper, tmp_path, number):
    process = evaluating(tmp_path)
    assert len(children(process)) == 2
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "continue with --resume" in errors and "Traceback" not in errors
    assert_nothing_left(process)


@pytest.mark.slow
def test_a_killed_evaluation_worker_is_one_line(hopper, tmp_path):
    process = evaluating(tmp_path)
    os.kill(children(process)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert_one_line((process.returncode, errors), "worker has died")
    assert_nothing_left(process)


@pytest.mark.slow
@pytest.mark.parametrize("hangs", [False, True])
def test_a_sigkill_leaves_no_workers(hopper, tmp_path, hangs):
    process = evaluating(tmp_path, hangs)
    process.kill()
    process.wait()
    assert_nothing_left(process)


def started_bandits(tmp_path):
    process = start("--out-dir", tmp_path, script="toy_bandit.py")
    deadline = time.time() + 60
    while len(children(process)) < 2 and time.time() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    return process


@pytest.mark.slow
def test_bandits_leave_no_workers(tmp_path):
    for stop in (
        lambda process: os.killpg(process.pid, signal.SIGINT),
        lambda process: os.kill(children(process)[0], signal.SIGKILL),
    ):
        process = started_bandits(tmp_path)
        stop(process)
        _, errors = process.communicate(timeout=60)
        assert process.returncode != 0
        assert_nothing_left(process)
        assert list(tmp_path.iterdir()) == []


# ---- bad input: one line, exit status 2, nothing left behind -------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--env-id", "hoper-medium-v2"], "unknown task hoper-medium-v2"),
        (["--env-id", "D4RL/pen/human"], "with its version"),
        (["--env-id", "walker2d-medium-v2"], "put walker2d_medium-v2.hdf5 into"),
        (["--batch-size", "0"], "--batch-size"),
        (["--batch-size", "many"], "batch-size"),
        (["--epochs", "-1"], "--epochs"),
        (["--pretrain-epochs", "-1"], "--pretrain-epochs"),
        (["--expectile", "1.5"], "--expectile"),
        (["--alpha", "nan"], "--alpha"),
        (["--num-seeds", "0"], "--num-seeds"),
        (["--nll", "--policy", "implicit"], "add --no-nll"),
        (["--policy", "deterministic"], "deterministic"),
        (["--no-such-flag"], "no-such-flag"),
        (["--resume", "."], "is not a run"),
        (["--run-dir", "/dev/null/runs"], "choose another --run-dir"),
        (["--device", "cuda:97"], "use --device cpu"),
        (["--device", "mps"], "use --device cpu"),
        (["--device", "gpu"], "cuda:1"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(hopper, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    defaults = [] if flags[0] == "--resume" else ["--env-id", "hopper-medium-v2"]
    result = run_inside(*defaults, *flags)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "runs").exists()


WINDOWS = """
import os, sys
sys.modules["fcntl"] = sys.modules["resource"] = None
del os.fork, os.sched_getaffinity
os.cpu_count = lambda: 4  # enough for evaluation in workers
"""


@pytest.mark.slow
def test_nothing_needs_fcntl_or_fork(hopper, tmp_path):
    """Train, evaluate in workers, which are spawned, and resume, without what Windows lacks."""
    (tmp_path / "sitecustomize.py").write_text(WINDOWS)
    environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    flags = ["--env-id=hopper-medium-v2", f"--run-dir={tmp_path}/runs", *FLAGS, "--num-candidates=8", "--eval-episodes=8"]
    first = run_script(*flags, "--epochs=1", **environment)
    assert first.returncode == 0, first.stderr
    run_dir = wait_for(tmp_path / "runs")
    again = run_script("--resume", run_dir, "--epochs=2", **environment)
    assert again.returncode == 0 and [row["epoch"] for row in rows_of(run_dir)] == ["1", "2"], again.stderr
    tools = "import tools.benchmark, tools.export, tools.report, tools.speed, tools.watch, tasks.make, toy_bandit"
    subprocess.run([sys.executable, "-c", tools], env={**os.environ, **environment}, check=True)


def test_help_shows_the_values_of_the_task():
    result = run_inside("--env-id", "pen-human-v1", "--help")
    assert result.returncode == 0
    text = " ".join(result.stdout.replace("│", " ").split())
    for default in ("(default: 1500.0)", "(default: 3e-05)", "(default: 300)", "(default: pen-human-v1)"):
        assert default in text
    assert "--nll, --no-nll" in text
    assert re.search(r"10,000 updates or more \(default: True\)", text)  # --compile, which follows from the number of updates


def test_help_into_a_closed_pipe_ends_quietly():
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(command("--help"), stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert result.returncode == 1 and result.stderr == ""


def test_table_4_and_other_defaults():
    assert set(dtql.TABLE_4) == set(kl_distill.TABLE_4) == set(d4rl.TASKS)
    assert kl_distill.TABLE_4 == dtql.TABLE_4
    large = dtql.task_defaults("antmaze-large-diverse-v0")
    assert (large["alpha"], large["expectile"], large["nll"], large["epochs"], large["batch_size"]) == (0.5, 0.9, True, 300, 2048)
    hopper = dtql.task_defaults("hopper-medium-v2")
    assert (hopper["learning_rate"], hopper["lr_decay"], hopper["batch_size"], hopper["eval_episodes"]) == (1e-4, True, 256, 10)
    assert dtql.task_defaults("pen-cloned-v1")["eval_episodes"] == 100
    assert dtql.task_defaults("D4RL/pen/human-v2")["alpha"] == 1500


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("dtql_continuous.py", ["--seed", str(2**63)]),
        ("dtql_continuous.py", ["--seed", "-1"]),
        ("dtql_continuous.py", ["--batch-size", str(10**12)]),
        ("dtql_continuous.py", ["--num-candidates", str(10**12)]),
        ("dtql_continuous.py", ["--eval-episodes", str(10**12)]),
        ("dtql_continuous.py", ["--num-seeds", str(10**9)]),
        ("dtql_continuous.py", ["--gamma", "nan"]),
        ("iql.py", ["--beta", "inf"]),
        ("tools.speed", ["--models", "0"]),
        ("tools.speed", ["--rounds", "0"]),
        ("tools.speed", ["--batch-sizes", "-5"]),
        ("toy_bandit.py", ["--seed", str(2**64)]),
        ("toy_bandit.py", ["--seed", "-1"]),
    ],
)
def test_impossible_numbers_are_refused_at_once(tmp_path, monkeypatch, script, flags):
    monkeypatch.chdir(tmp_path)
    assert_one_line(run_inside(*flags, script=script), flags[0])
    assert list(tmp_path.iterdir()) == []
