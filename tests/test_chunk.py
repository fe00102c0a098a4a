"""dtql_chunk.py: returns, validity and masks of chunks, losses that do not see what is behind an end, acting in chunks."""

import numpy as np
import pytest
import torch
from helpers import make_args, write_d4rl

import common
import dtql_chunk
import dtql_continuous as dtql
import evaluation
import tasks
from stacked import Transitions


def agent_on(rewards, terminals, ends, chunk=3, gamma=0.5, **settings):
    """An agent on transitions whose observation is the row's number and whose action is a tenth of it."""
    n = len(rewards)
    rows = torch.arange(float(n))[:, None]
    data = Transitions(
        rows, rows / 10, np.array(rewards, np.float32), np.array(terminals, np.float32), rows + 1, torch.device("cpu")
    )
    args = dtql_chunk.Args(chunk=chunk, gamma=gamma, batch_size=64, **settings)
    return dtql_chunk.DTQL(args, 1, 1, torch.device("cpu"), data, torch.tensor(ends, dtype=torch.float32))


def test_h_step_returns_masks_and_validity():
    """Rows 0 to 4 are a trajectory, solved in row 3, after which it goes on; rows 5 to 7 another."""
    agent = agent_on([1, 2, 4, 8, 16, 32, 64, 128], [0, 0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0, 1])
    batch = agent.sample_chunks(1, 400)
    first = batch.obs[0, :, 0].long()
    assert set(first.tolist()) == set(range(6))  # no chunk begins where fewer than h rows are left
    expected = {0: 1 + 1 + 1, 1: 2 + 2 + 2, 2: 4 + 4 + 4, 3: 8 + 8 + 8, 4: 16 + 16 + 16, 5: 32 + 32 + 32}
    terminal, valid = {0: 0, 1: 1, 2: 1, 3: 1, 4: 0, 5: 0}, {0: "111", 1: "111", 2: "111", 3: "110", 4: "100", 5: "111"}
    for row, start in enumerate(first.tolist()):
        assert batch.rewards[0, row] == expected[start] and batch.terminals[0, row] == terminal[start]
        assert "".join(str(int(one)) for one in batch.valid[0, row]) == valid[start]
        assert batch.next_obs[0, row, 0] == start + 3
        torch.testing.assert_close(batch.actions[0, row], torch.arange(start, start + 3) / 10)


def test_the_target_is_the_h_step_one_and_crosses_no_end():
    agent = agent_on([1.0] * 8, [0] * 8, [0, 0, 0, 1, 0, 0, 0, 1])
    batch = agent.sample_chunks(1, 64)
    with torch.no_grad():
        target = batch.rewards + 0.5**3 * agent.value(batch.next_obs)
        error = (target[:, None] - agent.critic(batch.obs, batch.actions)).square()
        inside = batch.valid[0, :, -1].bool()
        assert 0 < inside.sum() < 64
        expected = error[0, :, inside].sum() / 64
    _, metrics = agent.critic_loss(batch)
    torch.testing.assert_close(metrics["critic"][0], expected)
    # What lies behind an end changes no loss
    other = batch._replace(actions=torch.where(agent.per_action(batch.valid) == 1, batch.actions, 0.123))
    sigma, noise = torch.ones(1, 64, 1), torch.zeros(1, 64, 3)
    mean, log_std = agent.actor(batch.obs)
    mask = agent.per_action(batch.valid)
    nll = [dtql_chunk.gaussian_nll(mean, log_std, each.actions, mask) for each in (batch, other)]
    torch.testing.assert_close(*nll)
    denoised = agent.denoiser(batch.actions, sigma, batch.obs).clamp(-1, 1)
    expected = (((denoised - batch.actions) / dtql.c_out(sigma)).square() * mask).mean((-1, -2))
    torch.testing.assert_close(agent.denoiser_loss(batch, sigma, noise)[0], expected)


@pytest.mark.slow
def test_one_action_at_a_time_is_dtql_to_the_bit(hopper, tmp_path):
    one = dtql_chunk.main(make_args(tmp_path, dtql_chunk, chunk=1))
    plain = dtql.main(make_args(tmp_path, dtql))
    ends = [common.open_checkpoint(f"{end['run_dir']}/checkpoint.pt")["agent"] for end in (one, plain)]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][name], value) for name, value in ends[1].items())
    assert [row["return_mean"] for row in one["rows"]] == [row["return_mean"] for row in plain["rows"]]


def test_trajectories_end_where_the_next_row_does_not_follow(tmp_path, monkeypatch):
    """The random walks of the file have 50 rows, of which the last is dropped; a terminal row ends nothing by itself."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    write_d4rl(tmp_path / "hopper_medium-v2.hdf5", terminals=np.arange(600) == 20)
    task = tasks.load_task(common.Args(env_id="hopper-medium-v2"))
    np.testing.assert_array_equal(np.flatnonzero(task.ends), np.arange(48, len(task.obs), 49))


class Recorder:
    """Environments that say what they are asked to do; episodes of 4, 7, 2 and 5 steps."""

    num_copies, lengths = 2, [4, 7, 2, 5]

    def __init__(self):
        self.asked, self.at = [], {}

    def reset(self, indices, seeds):
        self.at.update({int(i): (int(seed), 0) for i, seed in zip(indices, seeds)})
        return np.array([[*self.at[int(i)]] for i in indices], np.float32)

    def step(self, indices, actions):
        self.asked += [(*self.at[int(i)], float(a[0])) for i, a in zip(indices, actions)]
        self.at.update({int(i): (self.at[int(i)][0], self.at[int(i)][1] + 1) for i in indices})
        obs = np.array([[*self.at[int(i)]] for i in indices], np.float32)
        done = np.array([step >= self.lengths[seed] for seed, step in obs.astype(int)])
        return obs, np.ones(len(indices)), done


def test_chunks_are_carried_out_whole_and_dropped_at_an_end():
    """The policy's plan names the episode, the step at which it was made and the place in the plan."""
    envs, calls = Recorder(), []

    def act(obs):
        calls.append(obs.copy())
        plan = obs[..., :1] * 100 + obs[..., 1:] * 10 + np.arange(3)
        return plan[..., None]

    _, lengths = evaluation.run_episodes(envs, act, np.arange(4)[None], chunk=3)
    assert lengths.tolist() == [[4, 7, 2, 5]]
    for seed, step, action in envs.asked:
        assert action == seed * 100 + step // 3 * 3 * 10 + step % 3
    assert len(envs.asked) == 4 + 7 + 2 + 5


def test_a_deployed_policy_keeps_its_plan_until_it_ends_or_is_reset(hopper, tmp_path):
    run_dir = dtql_chunk.main(make_args(tmp_path, dtql_chunk, chunk=3, num_candidates=1, epochs=1))["run_dir"]
    obs = np.random.default_rng(0).standard_normal((5, 4, 11))
    load = lambda: dtql_chunk.load_policy(f"{run_dir}/checkpoint.pt")
    act, other = load(), load()
    first = [act(one) for one in obs]
    same = [other(one) for one in (obs[0], obs[4], obs[4])]  # what is seen within a chunk changes nothing
    for ours, theirs in zip(first, same):
        np.testing.assert_array_equal(ours, theirs)
    assert first[0].shape == (4, 3) and not np.array_equal(first[0], first[1])
    other.reset()
    other(obs[3])
    act, other = load(), load()
    act(obs[0])
    act.reset()
    other(obs[0]), other(obs[0]), other(obs[0])
    np.testing.assert_array_equal(act(obs[1]), other(obs[1]))


def test_too_few_rows(hopper, tmp_path):
    with pytest.raises(common.UserError, match="fewer than --chunk 900"):
        dtql_chunk.main(make_args(tmp_path, dtql_chunk, chunk=900))
