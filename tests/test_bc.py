"""Behaviour cloning: each loss against its closed form, the sampler on Gaussian data, observation statistics, deployment."""

import numpy as np
import pytest
import torch
from helpers import first, make_agent, make_args, make_task, run_script

import bc
import common
import data
from common import UserError


def test_deterministic_loss_is_the_mean_squared_error_of_standardised_observations():
    agent = make_agent(module=bc, obs_dim=3)
    agent.mean += 2.0  # what is trained on was standardised at the start; what is acted on is standardised now
    actor = bc.DeterministicActor(3, 2)
    actor.load_state_dict(first(agent.models.params["actor"]))
    batch = agent.data.batch(torch.arange(50))
    loss, metrics = agent.actor_loss({"actor": dict(actor.named_parameters())}, batch, None, None)
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(actor(batch.obs), batch.actions))
    assert metrics.keys() == {"actor"}
    raw = torch.randn(1, 1, 3)
    p = {"actor": dict(actor.named_parameters())}
    torch.testing.assert_close(agent.sample(p, raw, None), actor((raw - agent.mean) / agent.std))


def test_observations_are_standardised_with_the_datas_statistics():
    rng = np.random.default_rng(0)
    obs = rng.normal([5.0, -100.0, 0.0], [2.0, 0.01, 0.0], (4000, 3))
    task = make_task(obs, rng.uniform(-1, 1, (4000, 1)), np.zeros(4000), np.zeros(4000), obs)
    args = bc.Args(cuda=False, cudagraphs=False)
    agent = bc.BC(args, task, torch.device("cpu"))
    rows = agent.data.batch(torch.arange(4000)).obs.double()
    np.testing.assert_allclose(rows.mean(0), 0, atol=2e-2)
    np.testing.assert_allclose(rows.std(0), np.array([2 / 2.001, 0.01 / 0.011, 0]), rtol=0.05, atol=1e-6)  # std + 1e-3
    args.normalize = False
    plain = bc.BC(args, task, torch.device("cpu"))
    torch.testing.assert_close(plain.data.rows[:, :3], torch.as_tensor(task.obs))


def test_gaussian_loss_is_the_likelihood_before_the_tanh():
    agent = make_agent(module=bc, policy="gaussian")
    actor = bc.GaussianActor(3, 2)
    actor.load_state_dict(first(agent.models.params["actor"]))
    batch = agent.data.batch(torch.arange(50))
    loss, metrics = agent.actor_loss({"actor": dict(actor.named_parameters())}, batch, None, None)
    normal = torch.distributions.Normal(*(f(x) for f, x in zip((lambda x: x, torch.exp), actor(batch.obs))))
    torch.testing.assert_close(loss, -normal.log_prob(torch.atanh(batch.actions / 1.001)).sum(1).mean())
    torch.testing.assert_close(metrics["entropy"], normal.entropy().sum(1).mean())


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.5), (0.3, 0.1), (-0.6, 0.02)])
def test_sampler_reaches_the_mean_and_variance_of_gaussian_data(mean, std):
    """With the exact denoiser of N(mean, std^2) the ODE's solution is affine in the noise."""
    denoise = lambda noisy, sigma: (std**2 * noisy + sigma**2 * mean) / (std**2 + sigma**2)
    torch.manual_seed(0)
    z = torch.randn(20_000, 2).double()
    z = (z - z.mean()) / z.std()
    mean_of, std_of = (
        (lambda steps: bc.heun_sampler(denoise, z, steps).mean().item()),
        (lambda steps: bc.heun_sampler(denoise, z, steps).std().item()),
    )
    assert mean_of(40) == pytest.approx(mean, abs=1e-3) and std_of(40) == pytest.approx(std, rel=0.03)
    errors = [std_of(steps) - std for steps in (20, 40, 80)]
    assert 3 < errors[0] / errors[1] < 7 and abs(errors[2]) < 0.005 * std  # second order


def test_diffusion_policy_clones_two_modes(monkeypatch):
    """Of data at -0.6 (30 %) and 0.5 (70 %) its samples keep the shares; a deterministic policy takes the mean."""
    monkeypatch.setattr(bc, "HIDDEN", 128)  # enough here, and faster
    rng = np.random.default_rng(0)
    actions = np.where(rng.random(4000) < 0.3, -0.6, 0.5)[:, None] + 0.03 * rng.standard_normal((4000, 1))
    task = make_task(np.zeros((4000, 1)), actions, np.zeros(4000), np.zeros(4000), np.zeros((4000, 1)))
    taken = {}
    for policy in ("diffusion", "deterministic"):
        agent = bc.BC(bc.Args(policy=policy, learning_rate=1e-3, cuda=False, cudagraphs=False), task, torch.device("cpu"))
        for _ in range(1500 if policy == "diffusion" else 200):
            agent.update()
        taken[policy] = agent.best_of(agent.models.params, np.zeros((1, 3000, 1)), torch.Generator().manual_seed(0))[0, :, 0]
    left, right = np.abs(taken["diffusion"] + 0.6) < 0.15, np.abs(taken["diffusion"] - 0.5) < 0.15
    assert (left | right).mean() > 0.95 and left.mean() == pytest.approx(0.3, abs=0.06)
    np.testing.assert_allclose(taken["deterministic"], actions.mean(), atol=0.15)


@pytest.mark.parametrize("policy", ["deterministic", "gaussian", "diffusion"])
def test_a_deployed_policy_takes_raw_observations(hopper, tmp_path, policy):
    run_dir = bc.main(make_args(tmp_path, bc, policy=policy, num_seeds=2))["run_dir"]
    saved = common.open_checkpoint(f"{run_dir}/checkpoint.pt")["learner"]
    task = data.load_task("hopper-medium-v2")
    np.testing.assert_allclose(saved["buffers"]["obs_mean"], task.obs.mean(0), rtol=1e-5)
    act = bc.load_policy(f"{run_dir}/checkpoint.pt", index=1)
    actions = act(task.obs[:7])
    assert actions.shape == (7, 3) and np.abs(actions).max() <= 1 and act(task.obs[0]).shape == (3,)
    if policy == "deterministic":
        actor = bc.DeterministicActor(11, 3)
        actor.load_state_dict(first(saved["params"]["actor"], 1))
        with torch.no_grad():
            expected = actor((torch.as_tensor(task.obs[:7]) - saved["buffers"]["obs_mean"]) / saved["buffers"]["obs_std"])
        np.testing.assert_allclose(actions, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="NaN"):
        act(np.full(11, np.nan))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--policy", "implicit"], "implicit"),
        (["--sampling-steps", "0"], "--sampling-steps"),
        (["--learning-rate", "0"], "--learning-rate"),
        (["--alpha", "1"], "alpha"),
    ],
)
def test_bad_input(flags, message):
    result = run_script(*flags, script="bc.py")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and message in result.stderr
