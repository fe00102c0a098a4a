"""Runs: learning, folders, interruption, resuming, evaluation, deployment, and one-line errors."""

import datetime
import importlib
import json
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import (
    FLAGS,
    ROOT,
    assert_same_end,
    make_args,
    params_of,
    rows_of,
    run_here,
    run_script,
    start,
    updates,
    wait_for,
    write_d4rl,
)

import bc
import common
import d4rl_tasks
import data
import dtql_continuous as dtql
import fql
import idql
import iql
import kl_distill
import srpo
from common import UserError


@pytest.mark.parametrize(
    ("module", "changes", "lower"),
    [
        (dtql, {}, ["critic", "denoiser", "actor"]),
        (dtql, dict(policy="implicit"), ["critic", "denoiser", "actor"]),
        (kl_distill, {}, ["critic"]),
        (bc, {}, ["actor"]),
        (bc, dict(policy="gaussian"), ["actor"]),
        (bc, dict(policy="diffusion"), ["actor"]),
        (iql, {}, ["actor"]),
        (idql, {}, ["denoiser"]),
        (fql, {}, ["flow", "critic"]),
        (srpo, {}, ["denoiser"]),
    ],
)
def test_training_changes_every_network_and_losses_fall(hopper, tmp_path, module, changes, lower):
    from helpers import AGENT

    args = make_args(tmp_path, module, epochs=1, steps_per_epoch=150, num_seeds=2, **changes)
    agent = AGENT[module](args, data.load_task(args.env_id), torch.device("cpu"))
    models, phases, means = agent.models, updates(agent), []
    before = {net: {name: param.detach().clone() for name, param in params.items()} for net, params in models.params.items()}
    for phase, update in enumerate(phases):
        if phase and hasattr(agent, "start_training"):
            agent.start_training()
        for step in range(150):
            update()
            if step % 50 == 49:
                means.append({name: (value / 50).mean().item() for name, value in models.sums.items()})
                for value in models.sums.values():
                    value.zero_()
    for network in models.params.keys() - {"settings"}:
        for name, param in models.params[network].items():
            changed = (param != before[network][name]).flatten(1).any(1)
            assert changed.all(), f"{network}.{name} did not change in every model"
    for name in lower:
        values = [mean[name] for mean in means if mean[name]]
        assert values[-1] < values[0] or values[2] < values[0], name


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
    assert config["data"]["origin"] == str(hopper) and config["versions"]["torch"] == torch.__version__
    rows = rows_of(run_dir)
    assert tuple(rows[0]) == common.EVAL_FIELDS
    episodes = rows_of(run_dir, "episodes.csv")
    assert tuple(episodes[0]) == common.EPISODE_FIELDS and len(episodes) == 2 * 3 * 2
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


def test_a_slice_of_three_models_is_a_plain_module_and_a_policy(hopper, tmp_path):
    run_dir = dtql.main(make_args(tmp_path, num_seeds=3))["run_dir"]
    params = common.open_checkpoint(f"{run_dir}/checkpoint.pt")["learner"]["params"]
    actor = dtql.GaussianActor(11, 3)
    actor.load_state_dict({name: param[2] for name, param in params["actor"].items()})
    denoiser = dtql.Denoiser(11, 3)
    denoiser.load_state_dict({name: param[1] for name, param in params["denoiser"].items()})

    act = dtql.load_policy(f"{run_dir}/checkpoint.pt", index=2, num_candidates=1)
    obs = np.random.default_rng(0).standard_normal((2000, 11))
    actions = act(obs)
    assert actions.shape == (2000, 3) and act(obs[0]).shape == (3,) and np.abs(actions).max() <= 1
    with torch.no_grad():
        mean, log_std = actor(torch.as_tensor(obs, dtype=torch.float32))
    z = (np.arctanh(actions.clip(-1 + 1e-6, 1 - 1e-6)) - mean.numpy()) / log_std.exp().numpy()
    inside = np.abs(actions) < 0.99
    assert abs(z[inside].mean()) < 0.15 and 0.7 < z[inside].std() < 1.1  # they are samples of model 2's Gaussian
    with pytest.raises(UserError, match="holds 3 model"):
        dtql.load_policy(f"{run_dir}/checkpoint.pt", index=3)
    with pytest.raises(UserError, match="must have shape"):
        act(obs[:, :5])


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


RUN = ("--env-id=hopper-medium-v2", *FLAGS, "--epochs=8", "--eval-every=2")
SCRIPTS = {
    "dtql_continuous.py": ("--num-candidates=8", "--pretrain-epochs=1", "--lr-decay"),
    "kl_distill.py": ("--num-candidates=8", "--pretrain-epochs=1"),
    "bc.py": ("--policy=diffusion", "--sampling-steps=3"),
    "iql.py": ("--dropout=0.1",),
    "idql.py": ("--num-candidates=4",),
    "dql.py": ("--num-candidates=4",),
    "fql.py": (),
    "srpo.py": ("--diffusion-epochs=2", "--critic-epochs=2", "--diffusion-batch-size=32"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_at_any_moment_and_resumed_is_bit_equal(hopper, tmp_path, script):
    flags = (*RUN, *SCRIPTS[script])
    whole = run_here(importlib.import_module(script.removesuffix(".py")), *flags, "--run-dir", tmp_path / "whole")
    for attempt, delay in enumerate((0.1, 1.3) if script == "dtql_continuous.py" else (0.4,)):
        process = start(*flags, "--run-dir", tmp_path / f"killed{attempt}", script=script)
        run_dir = wait_for(tmp_path / f"killed{attempt}")
        time.sleep(delay)
        process.kill()
        process.wait()
        kills = int(script == "dtql_continuous.py")
        for again in range(1 + kills):  # killed again while resumed, then let through
            process = start("--resume", run_dir, script=script)
            if again < kills:
                time.sleep(4 + delay)
                process.kill()
            output = process.communicate(timeout=120)
        assert process.returncode == 0, output
        assert_same_end(whole, run_dir)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_a_checkpoint_of_that_moment(hopper, tmp_path, number):
    flags = (*RUN, *SCRIPTS["dtql_continuous.py"], "--steps-per-epoch=37")
    whole = run_here(dtql, *flags, "--run-dir", tmp_path / "whole")
    process = start(*flags, "--run-dir", tmp_path / "stopped")
    run_dir = wait_for(tmp_path / "stopped")
    time.sleep(0.8)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and f"--resume {run_dir}" in errors and "Traceback" not in errors
    assert common.open_checkpoint(run_dir / "checkpoint.pt")["step"] > 0
    assert run_script("--resume", run_dir).returncode == 0
    assert_same_end(whole, run_dir)


def test_a_kill_while_writing_leaves_the_previous_file(tmp_path, monkeypatch):
    file = tmp_path / "checkpoint.pt"
    common.write_atomically(file, b"one")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", killed)
        common.write_atomically(file, b"another")
    assert file.read_bytes() == b"one" and list(tmp_path.iterdir()) == [file]
    common.write_atomically(file, b"another")
    assert file.read_bytes() == b"another" and list(tmp_path.iterdir()) == [file]


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(hopper, tmp_path):
    with pytest.raises(UserError, match="no longer finite"):
        dtql.main(make_args(tmp_path, learning_rate=1e30, epochs=5))
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert all(param.isfinite().all() for param in params_of(run_dir).values())


def test_evaluation_does_not_disturb_training(hopper, tmp_path):
    often = dtql.main(make_args(tmp_path, epochs=4, eval_every=1))["run_dir"]
    seldom = dtql.main(make_args(tmp_path, epochs=4))["run_dir"]
    a, b = params_of(often), params_of(seldom)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert rows_of(often)[-1]["return_mean"] == rows_of(seldom)[-1]["return_mean"]


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


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("copies", [5, 12])
def test_every_episode_counts_once_however_short(workers, copies):
    seeds = common.episode_seeds([0, 1], epoch=3, num_episodes=6)
    env, expected = Countdown(), np.zeros((2, 6), int)
    for index, seed in np.ndenumerate(seeds):
        env.reset(seed=int(seed))
        expected[index] = env.length
    envs = common.LockstepEnvs(Countdown, range(copies), workers)
    assert len(envs.processes) == workers
    returns, lengths = common.run_episodes(envs, lambda obs: obs.sum(-1, keepdims=True), seeds)
    envs.close()
    np.testing.assert_array_equal(returns, expected)
    np.testing.assert_array_equal(lengths, expected)
    assert not any(process.is_alive() for process in envs.processes)


def test_an_error_in_a_worker_is_raised_here():
    envs = common.LockstepEnvs(Countdown, range(4), 2)
    envs.reset(np.arange(4), np.arange(4))
    with pytest.raises(AssertionError):
        envs.step(np.arange(4), np.full((4, 1), -1.0))
    envs.close()


# ---- bad input: one line, exit status 2, nothing left behind -------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--env-id", "hoper-medium-v2"], "unknown task hoper-medium-v2"),
        (["--env-id", "D4RL/pen/human"], "ends in its version"),
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
        (["--resume", "."], "no run is there"),
        (["--run-dir", "/dev/null/runs"], "choose another --run-dir"),
        (["--cuda"], "--no-cuda"),
        (["--cudagraphs"], "GPU"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(hopper, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    if flags[0] in ("--cuda", "--cudagraphs") and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    defaults = [] if flags[0] == "--resume" else ["--env-id", "hopper-medium-v2"]
    result = run_script(*defaults, *flags)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "runs").exists()


def test_help_shows_the_values_of_the_task():
    result = run_script("--env-id", "pen-human-v1", "--help")
    assert result.returncode == 0
    text = " ".join(result.stdout.replace("│", " ").split())
    for default in ("(default: 1500.0)", "(default: 3e-05)", "(default: 300)", "(default: pen-human-v1)"):
        assert default in text
    assert "--nll, --no-nll" in text
    assert re.search(r"default to no \(default: True\)", text)  # --compile, which follows from the number of updates


def test_table_4_and_other_defaults():
    assert set(dtql.TABLE_4) == set(kl_distill.TABLE_4) == set(d4rl_tasks.TASKS)
    assert kl_distill.TABLE_4 == dtql.TABLE_4
    large = dtql.task_defaults("antmaze-large-diverse-v0")
    assert (large["alpha"], large["expectile"], large["nll"], large["epochs"], large["batch_size"]) == (0.5, 0.9, True, 300, 2048)
    hopper = dtql.task_defaults("hopper-medium-v2")
    assert (hopper["learning_rate"], hopper["lr_decay"], hopper["batch_size"], hopper["eval_episodes"]) == (1e-4, True, 256, 10)
    assert dtql.task_defaults("pen-cloned-v1")["eval_episodes"] == 100
    assert dtql.task_defaults("D4RL/pen/human-v2")["alpha"] == 1500
