"""dtql_online.py: what is collected, what is sampled, what is learned from it, and resuming in the middle."""

import csv
import functools
import subprocess

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import ROOT, assert_same_end, make_agent, make_args, plain, run_folder, snapshot

import common
import dtql_continuous as dtql
import dtql_online
import stacked
from common import UserError
from online import Collector, Replay
from stacked import Transitions
from tools import export, report

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tiny_networks")]


class Line(gym.Env):
    """A walk on a line: reward is the position; ends beyond 2, is cut after 5 steps. The observation is (position, seed-like)."""

    observation_space, action_space = gym.spaces.Box(-np.inf, np.inf, (2,)), gym.spaces.Box(-1.0, 1.0, (1,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.mark = 0.0, self.np_random.random()
        return np.array([self.at, self.mark]), {}

    def step(self, action):
        self.at += float(action[0])
        return np.array([self.at, self.mark]), self.at, self.at > 2, False, {}


for name in ("Line-v0", "Lane-v0"):
    gym.register(name, Line, max_episode_steps=5, disable_env_checker=True)


@pytest.fixture
def line(tmp_path) -> dict:
    """Settings of a short run on `Line` with random data."""
    rng = np.random.default_rng(0)
    file = tmp_path / "line.npz"
    np.savez(
        file,
        observations=rng.standard_normal((400, 2)),
        actions=rng.uniform(-1, 1, (400, 1)).astype(np.float32),
        rewards=rng.standard_normal(400),
        terminals=np.arange(400) % 20 == 19,
    )
    return dict(env_id="Line-v0", data=str(file), online_steps=48)


def collector(tmp_path, line, steps=30, **settings):
    """An agent after `steps` online steps on Line."""
    args = make_args(tmp_path, dtql_online, **{**line, "num_seeds": 3, **settings})
    task = dtql_online.tasks.load_task(args)
    data = Transitions(*task[:5], torch.device("cpu"))
    agent = dtql_online.DTQL(args, 2, 1, torch.device("cpu"), data)
    torch.manual_seed(0)
    online = Collector(agent, task, lambda rewards: rewards - 1, tmp_path)
    agent.start_online()
    for _ in range(steps):
        online.step()
    return agent, online


@pytest.mark.parametrize("normalize", [False, True])
def test_rows_are_what_happened_and_only_an_end_is_terminal(tmp_path, line, normalize):
    agent, online = collector(tmp_path, line, normalize=normalize)
    batch = agent.data.columns(agent.replay.rows[:, : online.size])
    assert normalize == bool(np.any(online.task.obs_mean != 0))
    mean, std = torch.as_tensor(online.task.obs_mean), torch.as_tensor(online.task.obs_std)
    raw = lambda obs: (obs * std + mean).round(decimals=5)
    batch = batch._replace(obs=raw(batch.obs), next_obs=raw(batch.next_obs))
    assert len(batch.rewards) == 3 and batch.rewards.shape[1] == 30
    torch.testing.assert_close(batch.rewards + 1, batch.next_obs[..., 0])  # the transform is applied
    torch.testing.assert_close(batch.next_obs[..., 0], batch.obs[..., 0] + batch.actions[..., 0])
    torch.testing.assert_close(batch.terminals, (batch.next_obs[..., 0] > 2).float())  # a cut episode bootstraps
    begins = batch.obs[:, 1:, 0] == 0
    assert begins.any() and not torch.equal(begins, batch.terminals[:, :-1].bool())
    marks = [set(batch.obs[model, :, 1].tolist()) for model in range(3)]
    assert not marks[0] & marks[1] and not marks[1] & marks[2]  # no episode of one model in the rows of another


@pytest.mark.parametrize("ratio", [None, 0.0, 0.25, 1.0])
def test_sampling_ratio_and_isolation(ratio):
    zeros = torch.zeros(300, 1)
    replay = Replay(Transitions(zeros, zeros, zeros[:, 0].numpy(), zeros[:, 0].numpy(), zeros, torch.device("cpu")), 2, 500)
    replay.rows[0, :100], replay.rows[1, :100], replay.rows[:, 100:] = 1, 2, torch.nan  # nothing beyond what was collected
    replay.size.fill_(100)
    torch.manual_seed(0)
    rewards = replay.sample(2, 4000, ratio).rewards
    assert set(rewards[0].tolist()) <= {0, 1} and set(rewards[1].tolist()) <= {0, 2}
    share = (rewards == 0).float().mean(1)
    if ratio is None:
        torch.testing.assert_close(share, torch.full((2,), 0.75), atol=0.03, rtol=0)
    else:
        assert share.tolist() == [ratio, ratio]


def test_td_loss_is_the_hand_computed_one():
    agent = make_agent(module=dtql_online, gamma=0.9, critic="td")
    agent.start_online()
    batch, z = agent.data.sample(1, 32), torch.randn(1, 32, 2)
    actor, targets = plain(agent.actor, 0), [plain(agent.target_critic, 0, i) for i in (0, 1)]
    with torch.no_grad():
        mean, log_std = actor(batch.next_obs[0])
        action = torch.tanh(mean + log_std.exp() * z[0])
        next_q = sum(q(batch.next_obs[0], action).squeeze(0) for q in targets) / 2
        y = batch.rewards[0] + 0.9 * (1 - batch.terminals[0]) * next_q
        expected = sum(((y - plain(agent.critic, 0, i)(batch.obs[0], batch.actions[0])) ** 2).mean() for i in (0, 1))
    _, metrics = agent.critic_loss(batch, z)
    torch.testing.assert_close(metrics["critic"][0], expected)


def test_what_the_online_flags_change():
    agent = make_agent(module=dtql_online, freeze_denoiser=True, online_alpha=7.0, lr_decay=True, epochs=1, online_steps=4)
    agent.update(training=True)
    agent.train_step.fill_(20)
    agent.update(training=True)
    assert float(agent.actor_optimizer.param_groups[0]["lr"]) == 0  # at the end of the offline cosine
    agent.replay.rows[:, :4], _ = agent.data.rows[:4], agent.replay.size.fill_(4)
    agent.start_online()
    before = snapshot(agent)
    agent.update(training=True)
    assert float(agent.actor_optimizer.param_groups[0]["lr"]) == pytest.approx(3e-4)
    assert agent.alpha.tolist() == [7.0]
    after = snapshot(agent)
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("denoiser"))
    assert not all(torch.equal(after[name], before[name]) for name in before if name.startswith("actor"))


def test_without_online_steps_it_is_dtql_to_the_bit(tmp_path, line):
    online = dtql_online.main(make_args(tmp_path, dtql_online, **{**line, "online_steps": 0}))
    offline = dtql.main(make_args(tmp_path, dtql, **{name: value for name, value in line.items() if name != "online_steps"}))
    ends = [common.open_checkpoint(f"{end['run_dir']}/checkpoint.pt")["agent"] for end in (online, offline)]
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())
    keep = lambda rows: [{key: row[key] for key in row if "seconds" not in key and key != "phase"} for row in rows]
    assert keep(online["rows"]) == keep(offline["rows"])


class Killed(BaseException):
    pass


@pytest.mark.parametrize("stop", ["killed", "interrupted"])
@pytest.mark.parametrize("settings", [{}, {"critic": "td", "warmup_steps": 20, "offline_ratio": 0.5, "normalize": True}])
def test_an_online_run_resumes_bit_identically(tmp_path, line, monkeypatch, stop, settings):
    make = functools.partial(make_args, tmp_path, dtql_online, num_seeds=2, **line, **settings)
    whole = dtql_online.main(make())["run_dir"]
    rows = list(csv.DictReader(open(f"{whole}/eval.csv")))
    assert [row["phase"] for row in rows[::2]] == ["offline"] + 4 * ["online"]
    assert [float(row["epoch"]) for row in rows[::2]] == [2, 2.3, 2.6, 3.2, 4.4]
    advance, runs = run_folder.Run.advance, []

    def stopped(run, metrics):
        runs.append(run)
        if run.step == 60 + 31:
            if stop == "killed":
                raise Killed
            common.request_stop(15)
        advance(run, metrics)

    with monkeypatch.context() as patch, pytest.raises((Killed, common.Interrupted)):
        patch.setattr(run_folder.Run, "advance", stopped)
        dtql_online.main(make())
    file = runs[0].dir / "online.f32"
    first, *others = file.read_bytes()
    file.write_bytes(bytes((first ^ 1, *others)))
    with pytest.raises(UserError, match="damaged"):
        dtql_online.main(make(resume=str(runs[0].dir)))
    file.unlink()
    with pytest.raises(UserError, match="missing"):
        dtql_online.main(make(resume=str(runs[0].dir)))
    file.write_bytes(bytes((first, *others)))
    dtql_online.main(make(resume=str(runs[0].dir)))
    assert_same_end(whole, runs[0].dir)
    assert file.read_bytes() == open(f"{whole}/online.f32", "rb").read()
    text = report.write_report(tmp_path / "runs").read_text()
    assert "## Online" in text and "regret" in text


def test_from_a_finished_run(tmp_path, line):
    offline = dtql.main(make_args(tmp_path, dtql, **{name: value for name, value in line.items() if name != "online_steps"}))
    args = make_args(tmp_path, dtql_online, **line, offline=offline["run_dir"])
    rows = dtql_online.main(args)["rows"]
    assert [row["epoch"] for row in rows] == [0, 0.3, 0.6, 1.2, 2.4]
    assert [row["phase"] for row in rows] == ["offline"] + 4 * ["online"]
    with pytest.raises(UserError, match="--from .* differs from this script's"):
        dtql_online.main(make_args(tmp_path, dtql_online, **line, offline=offline["run_dir"], policy="implicit", nll=False))
    export.main(export.Args(offline["run_dir"], format="policy"))
    with pytest.raises(UserError, match="--from .* differs from this script's"):  # a policy alone has no critic to go on with
        dtql_online.main(make_args(tmp_path, dtql_online, **line, offline=f"{offline['run_dir']}/policy"))
    with pytest.raises(UserError, match="--normalize differs"):
        dtql_online.main(make_args(tmp_path, dtql_online, **line, offline=offline["run_dir"], normalize=True))
    with pytest.raises(UserError, match="was trained on Line-v0, not"):
        dtql_online.main(make_args(tmp_path, dtql_online, **(line | {"env_id": "Lane-v0"}), offline=offline["run_dir"]))
    with pytest.raises(UserError, match="is not a run of dtql_continuous.py"):
        dtql_online.main(make_args(tmp_path, dtql_online, **line, offline=dtql_online.main(args)["run_dir"]))


def test_each_phase_gets_an_update_of_its_own(tmp_path, line, monkeypatch):
    """A CUDA graph replays what was captured: the offline one would go on sampling the data alone."""
    prepared = []

    def fastest(update, agent, *_):
        phase = (update.args[0], agent.online)
        prepared.append(phase)

        def replay():
            assert phase[1] == agent.online
            return update()

        return replay

    monkeypatch.setattr(stacked, "fastest", fastest)
    dtql_online.main(make_args(tmp_path, dtql_online, **line, pretrain_epochs=1))
    assert prepared == [(False, False), (True, False), (True, True)]


def test_without_an_environment_there_is_no_online_phase(tmp_path, line):
    with pytest.raises(UserError, match="needs an environment"):
        dtql_online.main(make_args(tmp_path, dtql_online, **{**line, "env_id": ""}))


def test_the_diff_shows_the_online_part():
    result = subprocess.run(["diff", ROOT / "dtql_continuous.py", ROOT / "dtql_online.py"], capture_output=True, text=True)
    lines = [line for line in result.stdout.splitlines() if line[0] in "<>"]
    assert len(lines) <= 100 and sum(line[0] == "<" for line in lines) <= 20
