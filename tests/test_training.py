"""Runs: learning, folders, interruption, resuming, evaluation, deployment, and one-line errors."""

import csv
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import common
import gymnasium as gym
import numpy as np
import pytest
import torch
from common import UserError
from conftest import TINY, command, make_args, run_script, write_d4rl

import dtql_continuous as dtql

FLAGS = [f"--{'' if value is not False else 'no-'}{name.replace('_', '-')}{'' if isinstance(value, bool) else f'={value}'}"
         for name, value in TINY.items() if name != "cudagraphs"]


def rows_of(run_dir: str | Path) -> list[dict[str, str]]:
    with open(Path(run_dir) / "eval.csv") as file:
        return list(csv.DictReader(file))


def params_of(run_dir: str | Path) -> dict[str, torch.Tensor]:
    networks = common.load_checkpoint(Path(run_dir) / "checkpoint.pt")["agent"]["params"]
    return {f"{network}.{name}": param for network, params in networks.items() for name, param in params.items()}


def assert_same_end(one: str | Path, other: str | Path) -> None:
    """Parameters equal to the bit, and the same evaluations but for the seconds they took."""
    a, b = params_of(one), params_of(other)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    results = [[{k: v for k, v in row.items() if "seconds" not in k} for row in rows_of(run)] for run in (one, other)]
    assert results[0] == results[1]


def whole_and_resumed(tmp_path: Path, monkeypatch, resume, **settings) -> tuple[str, str]:
    """The folders of a run of 60 updates and of one that was stopped after 33 and gone on with by resume(its folder)."""
    whole = dtql.main(make_args(tmp_path, **settings))["run_dir"]
    count, advance = [], common.Run.advance

    def stop_in_training(run: common.Run, steps: int) -> None:
        advance(run, steps)
        count.append(run)
        if len(count) == 33:
            run._stop = True

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "advance", stop_in_training)
        with pytest.raises(common.Interrupted):
            dtql.main(make_args(tmp_path, **settings))
    resume(str(count[0].dir))
    return whole, str(count[0].dir)


@pytest.mark.parametrize("policy", ["gaussian", "implicit"])
def test_training_changes_every_network_and_losses_fall(hopper, tmp_path, policy):
    args = make_args(tmp_path, policy=policy, pretrain_epochs=1, epochs=1, steps_per_epoch=150, num_seeds=2)
    task = common.load_task(args.env_id)
    agent = dtql.DTQL(args, task, torch.device("cpu"))
    before = {net: {name: param.detach().clone() for name, param in params.items()} for net, params in agent.params.items()}
    means = []
    for step in range(300):
        if step == 150:
            agent.start_training()
        agent.update(training=step >= 150)
        if step % 50 == 49:
            means.append(dict(zip(agent.metrics, (agent.sums / 50).mean(1).tolist())))
            agent.sums.zero_()
    for network, params in agent.params.items():
        for name, param in params.items():
            changed = (param != before[network][name]).flatten(1).any(1)
            assert changed.all(), f"{network}.{name} did not change in every model"
    assert means[-1]["critic"] < means[0]["critic"] and means[2]["denoiser"] < means[0]["denoiser"]
    assert means[-1]["actor"] < means[3]["actor"]


def test_a_run_leaves_a_whole_folder(hopper, tmp_path):
    args = make_args(tmp_path, num_seeds=3, seed=7, epochs=3, eval_every=2)
    result = dtql.main(args)
    run_dir = Path(result["run_dir"])
    assert run_dir.parent == tmp_path / "runs"
    assert run_dir.name.startswith("hopper-medium-v2__dtql_continuous__7__")
    config = json.loads((run_dir / "config.json").read_text())
    assert config["args"]["batch_size"] == 32 and config["data"]["transitions"] == 588
    assert config["data"]["origin"] == str(hopper) and config["versions"]["torch"] == torch.__version__
    rows = rows_of(run_dir)
    assert tuple(rows[0]) == common.EVAL_FIELDS
    assert [(row["epoch"], row["seed"]) for row in rows] == [(e, s) for e in "23" for s in "789"]
    for row in rows:
        score = 100 * (float(row["return_mean"]) + 20.272305) / (3234.3 + 20.272305)
        assert float(row["score_mean"]) == pytest.approx(score) and row["episodes"] == "2"
    assert result["rows"][0]["score_mean"] == float(rows[0]["score_mean"])

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"losses/critic", "losses/value", "losses/denoiser", "losses/actor", "losses/trust_region", "charts/SPS",
            "eval/score_mean", "eval/score_mean_seed8"} <= tags
    assert [event.step for event in events.Scalars("losses/critic")] == [20, 40, 60, 80]


def test_a_slice_of_three_models_is_a_plain_module_and_a_policy(hopper, tmp_path):
    run_dir = dtql.main(make_args(tmp_path, num_seeds=3))["run_dir"]
    params = common.load_checkpoint(f"{run_dir}/checkpoint.pt")["agent"]["params"]
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
    again = dtql.main(dtql.replace(args, resume=run_dir))
    assert again["run_dir"] == run_dir and len(rows_of(run_dir)) == 1
    with pytest.raises(UserError, match="has alpha = 5.0, not 2.0"):
        dtql.main(dtql.replace(args, resume=run_dir, alpha=2.0))
    write_d4rl(hopper, rewards=np.ones(600))
    with pytest.raises(UserError, match="not the data that the run began with"):
        dtql.main(dtql.replace(args, resume=run_dir))


def start(hopper: Path, run_dir: Path, *flags: str) -> subprocess.Popen:
    environment = {**os.environ, "D4RL_DATASET_DIR": str(hopper.parent)}
    return subprocess.Popen(command("--env-id", "hopper-medium-v2", "--run-dir", run_dir, *FLAGS, "--epochs=8",
                                    "--eval-every=2", "--lr-decay", *flags), env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_checkpoint(parent: Path) -> Path:
    deadline = time.time() + 120
    while time.time() < deadline:
        found = list(parent.glob("*/checkpoint.pt"))
        if found:
            return found[0].parent
        time.sleep(0.01)
    raise AssertionError("no checkpoint appeared")


def test_killed_at_any_moment_and_resumed_is_bit_equal(hopper, tmp_path):
    process = start(hopper, tmp_path / "whole")
    assert process.wait(120) == 0
    whole = wait_for_checkpoint(tmp_path / "whole")
    for attempt, delay in enumerate((0.1, 0.7, 1.9)):
        process = start(hopper, tmp_path / f"killed{attempt}")
        run_dir = wait_for_checkpoint(tmp_path / f"killed{attempt}")
        time.sleep(delay)
        process.kill()
        process.wait()
        for _ in range(2):  # killed again while resumed, then let through
            process = subprocess.Popen(command("--resume", run_dir), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            if _ == 0:
                time.sleep(4 + delay)
                process.kill()
            output = process.communicate(timeout=120)
        assert process.returncode == 0, output
        assert_same_end(whole, run_dir)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_a_checkpoint_of_that_moment(hopper, tmp_path, number):
    process = start(hopper, tmp_path / "whole", "--steps-per-epoch=37")
    assert process.wait(120) == 0
    process = start(hopper, tmp_path / "stopped", "--steps-per-epoch=37")
    run_dir = wait_for_checkpoint(tmp_path / "stopped")
    time.sleep(0.8)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and f"--resume {run_dir}" in errors and "Traceback" not in errors
    assert common.load_checkpoint(run_dir / "checkpoint.pt")["step"] > 0
    assert run_script("--resume", run_dir).returncode == 0
    assert_same_end(wait_for_checkpoint(tmp_path / "whole"), run_dir)


def test_a_kill_while_writing_leaves_the_previous_checkpoint(tmp_path):
    file = tmp_path / "checkpoint.pt"
    common.write_atomically(file, lambda target: torch.save({"step": 1}, target))

    def killed(target: Path) -> None:
        target.write_bytes(b"half a checkpoint")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        common.write_atomically(file, killed)
    assert common.load_checkpoint(file) == {"step": 1}
    common.write_atomically(file, lambda target: torch.save({"step": 2}, target))
    assert common.load_checkpoint(file) == {"step": 2} and list(tmp_path.iterdir()) == [file]


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


def test_table_4_and_other_defaults():
    assert list(dtql.TABLE_4) and set(dtql.TABLE_4) == set(common.d4rl_tasks.TASKS)
    large = dtql.task_defaults("antmaze-large-diverse-v0")
    assert (large["alpha"], large["expectile"], large["nll"], large["epochs"], large["batch_size"]) == (0.5, 0.9, True, 300, 2048)
    hopper = dtql.task_defaults("hopper-medium-v2")
    assert (hopper["learning_rate"], hopper["lr_decay"], hopper["batch_size"], hopper["eval_episodes"]) == (1e-4, True, 256, 10)
    assert dtql.task_defaults("pen-cloned-v1")["eval_episodes"] == 100
    assert dtql.task_defaults("D4RL/pen/human-v2")["alpha"] == 1500
