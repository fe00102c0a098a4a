"""DTQL's mathematics against closed forms."""

import math

import numpy as np
import pytest
import torch
from helpers import assert_learning_rates_follow_the_cosine, first, make_agent

import dtql_continuous as dtql
from stacked import detach


def test_noise_levels_follow_the_truncated_logistic():
    u = torch.linspace(0, 1, 100_001)[:-1]
    sigma = dtql.sample_sigma(u).double()
    assert sigma.min() >= 0.002 and sigma.max() <= 80
    cdf = lambda s: 1 / (1 + math.exp(-(math.log(s) - math.log(0.5)) / 0.5))
    low, high = cdf(0.002), cdf(80)
    for q in (0.01, 0.1, 0.5, 0.9, 0.99):
        p = low + q * (high - low)
        exact = 0.5 * (p / (1 - p)) ** 0.5  # inverse of the logistic's CDF in log sigma
        assert np.quantile(sigma, q) == pytest.approx(exact, rel=2e-3)


def test_edm_scalings_give_unit_variance():
    """With Var[a] = sigma_data^2 the network's input and its target have variance 1 at every noise level."""
    torch.manual_seed(0)
    net, seen = dtql.Denoiser(0, 1), {}
    # In place of the network: it sees c_in * a_t first, and answers 0, so that c_skip * a_t alone is left
    net.net = torch.nn.Module()
    net.net.forward = lambda x: seen.setdefault("input", x)[..., :1] * 0
    for sigma in (0.01, 0.5, 5.0, 50.0):
        a, noise = 0.5 * torch.randn(100_000, 1), torch.randn(100_000, 1)
        level = torch.full((100_000, 1), sigma)
        seen.clear()
        skip = net(a + sigma * noise, level, torch.zeros(100_000, 0))
        assert seen["input"][:, 0].var().item() == pytest.approx(1, rel=0.02)
        target = (a - skip) / dtql.c_out(level)
        assert target.var().item() == pytest.approx(1, rel=0.02)


@pytest.fixture
def narrow(monkeypatch):
    """Networks of half the width: enough for one action, and faster."""
    monkeypatch.setattr(dtql, "HIDDEN", 128)


def test_denoiser_learns_the_posterior_mean_of_gaussian_data(narrow):
    """a ~ N(m, s^2), a_t = a + sigma eps: E[a | a_t] = (s^2 a_t + sigma^2 m) / (s^2 + sigma^2)."""
    torch.manual_seed(0)
    mean, std = 0.2, 0.15
    net = dtql.Denoiser(1, 1)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    obs = torch.zeros(1024, 1)
    for step in range(1200):
        actions = mean + std * torch.randn(1024, 1)
        loss = dtql.denoising_loss(net, actions, obs, dtql.sample_sigma(torch.rand(1024, 1)), torch.randn(1024, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 1200)
        optimizer.step()
    for sigma in (0.1, 0.3, 1.0, 3.0):
        noisy = mean + math.sqrt(std**2 + sigma**2) * torch.linspace(-2, 2, 9)[:, None]
        with torch.no_grad():
            denoised = net(noisy, torch.full_like(noisy, sigma), torch.zeros(9, 1))
        posterior = (std**2 * noisy + sigma**2 * mean) / (std**2 + sigma**2)
        assert (denoised - posterior).abs().max() < 0.03, sigma


def test_trust_region_loss_prefers_the_modes(narrow):
    """On a mixture of narrow Gaussians at -0.6 and 0.6, the loss is lower on the modes than between and beyond them."""
    torch.manual_seed(0)
    net = dtql.Denoiser(1, 1)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    obs = torch.zeros(512, 1)
    for _ in range(1000):
        actions = 0.6 * (2 * torch.randint(2, (512, 1)) - 1) + 0.03 * torch.randn(512, 1)
        loss = dtql.denoising_loss(net, actions, obs, dtql.sample_sigma(torch.rand(512, 1)), torch.randn(512, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def trust_region(action: float) -> float:
        u, noise = torch.rand(4096, 1), torch.randn(4096, 1)
        with torch.no_grad():
            actions = torch.full((4096, 1), action)
            return dtql.denoising_loss(net, actions, torch.zeros(4096, 1), dtql.sample_sigma(u), noise).item()

    modes, between = (trust_region(-0.6), trust_region(0.6)), (trust_region(0.0), trust_region(-0.3), trust_region(1.0))
    assert 2 * max(modes) < min(between)


def test_expectile_loss_has_the_known_minimiser():
    """For {0, 1} equally likely the expectile m solves tau (1 - m) = (1 - tau) m, so m = tau."""
    sample = torch.tensor([0.0, 1.0])
    for expectile in (0.3, 0.5, 0.7, 0.9):
        v = torch.linspace(0, 1, 1001)
        losses = torch.stack([dtql.expectile_loss(sample - x, expectile) for x in v])
        assert v[losses.argmin()].item() == pytest.approx(expectile, abs=1e-3)


def test_q_target_stops_at_terminals():
    target = dtql.q_target(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1.0]), torch.tensor([10.0, 10.0]), 0.99)
    torch.testing.assert_close(target, torch.tensor([10.9, 1.0]))


def test_critic_loss_is_equations_6_and_7():
    """By hand, with separate plain networks; V gets no gradient from Q's loss and Q none from V's."""
    agent = make_agent()
    batch = agent.data.batch(torch.arange(64))
    qs, v = [dtql.Critic(3, 2), dtql.Critic(3, 2)], dtql.Value(3)
    for i, q in enumerate(qs):
        q.load_state_dict(first(first(agent.models.params["critic"]), i), strict=True)
    v.load_state_dict(first(agent.models.params["value"]))

    p = {
        net: {name: param[0].detach().requires_grad_() for name, param in agent.models.params[net].items()}
        for net in ("critic", "value", "settings")
    }
    loss, metrics = agent.critic_loss(p, batch)
    loss.backward()

    with torch.no_grad():
        q_data = torch.minimum(qs[0](batch.obs, batch.actions), qs[1](batch.obs, batch.actions))
        target = batch.rewards + 0.99 * (1 - batch.terminals) * v(batch.next_obs)
    u = q_data - v(batch.obs)
    value_loss = (torch.where(u < 0, 1 - agent.args.expectile, agent.args.expectile) * u**2).mean()
    critic_loss = sum(((target - q(batch.obs, batch.actions)) ** 2).mean() for q in qs)
    (value_loss + critic_loss).backward()
    torch.testing.assert_close(metrics, {"critic": critic_loss, "value": value_loss})
    for name, param in v.named_parameters():
        torch.testing.assert_close(p["value"][name].grad, param.grad)
    for i, q in enumerate(qs):
        for name, param in q.named_parameters():
            torch.testing.assert_close(p["critic"][name].grad[i], param.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("policy", ["gaussian", "implicit"])
def test_policy_loss_is_equation_5_and_reaches_theta_only(policy):
    agent = make_agent(policy=policy, nll=policy == "gaussian", alpha=3.0)
    params = {
        net: {name: param[0].detach().requires_grad_() for name, param in agent.models.params[net].items()}
        for net in ("actor", "denoiser", "critic")
    }
    batch = agent.data.batch(torch.arange(64))
    obs, actions = batch.obs, batch.actions
    torch.manual_seed(1)
    z, noise, sigma = torch.randn(64, 2), torch.randn(64, 2), dtql.sample_sigma(torch.rand(64, 1))
    p = {net: values if net == "actor" else detach(values) for net, values in params.items()}
    p["settings"] = first(agent.models.params["settings"])
    loss, metrics = agent.actor_loss(p, batch, z, sigma, noise)
    loss.backward()
    assert all(param.grad is not None and param.grad.abs().sum() > 0 for param in params["actor"].values())
    assert all(param.grad is None for net in ("denoiser", "critic") for param in params[net].values())

    qs, denoiser = [dtql.Critic(3, 2), dtql.Critic(3, 2)], dtql.Denoiser(3, 2)
    actor = dtql.GaussianActor(3, 2) if policy == "gaussian" else dtql.ImplicitActor(3, 2)
    actor.load_state_dict(detach(params["actor"]))
    denoiser.load_state_dict(detach(params["denoiser"]))
    for i, q in enumerate(qs):
        q.load_state_dict(first(detach(params["critic"]), i))
    if policy == "gaussian":
        mean, log_std = actor(obs)
        a = torch.tanh(mean + log_std.exp() * z)
        normal = torch.distributions.Normal(mean, log_std.exp())
        nll = -normal.log_prob(torch.atanh(actions / 1.001)).sum(1).mean()
    else:
        a, nll = actor(obs, z), 0
    error = denoiser(a + sigma * noise, sigma, obs).clamp(-1, 1) - a
    trust_region = (error**2 * (sigma**2 + 0.25) / (0.25 * sigma**2)).mean()
    q = torch.minimum(*(q(obs, a.clamp(-1, 1)) for q in qs)).mean()
    torch.testing.assert_close(loss, 3 * trust_region - q + nll, rtol=1e-4, atol=1e-4)
    assert metrics["actor"] is loss
    torch.testing.assert_close(metrics["trust_region"], trust_region, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(metrics["q"], q, rtol=1e-4, atol=1e-4)


def test_log_density_is_finite_at_the_bounds():
    mean = torch.zeros(2, 3, requires_grad=True)
    loss = dtql.gaussian_nll(mean, torch.full((2, 3), -5.0), torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, -1.0]]))
    loss.backward()
    assert loss.isfinite() and mean.grad.isfinite().all()


def test_gaussian_actor_starts_orthogonal_and_stays_in_its_limits():
    actor = dtql.GaussianActor(5, 2)
    weight = actor.net[2].weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(256), atol=1e-5, rtol=0)
    assert all((layer.bias == 0).all() for layer in actor.net if isinstance(layer, torch.nn.Linear))
    with torch.no_grad():
        actor.net[-1].bias[2:] = torch.tensor([100.0, -100.0])
    _, log_std = actor(torch.zeros(1, 5))
    assert log_std.tolist() == [[2.0, -5.0]]


def test_network_shapes_follow_appendix_d():
    count = lambda module, kind: sum(isinstance(layer, kind) for layer in module.modules())
    denoiser, critic, value, actor = dtql.Denoiser(7, 3), dtql.Critic(7, 3), dtql.Value(7), dtql.GaussianActor(7, 3)
    assert (count(denoiser, torch.nn.Linear), count(denoiser.net, torch.nn.Mish)) == (5 + 2, 3)
    assert (count(critic, torch.nn.Linear), count(critic, torch.nn.Mish), count(critic, torch.nn.LayerNorm)) == (4, 3, 3)
    assert (count(value, torch.nn.Linear), count(value, torch.nn.Mish), count(value, torch.nn.LayerNorm)) == (4, 3, 0)
    assert (count(actor, torch.nn.Linear), count(actor, torch.nn.ReLU)) == (4, 3)
    assert [type(layer).__name__ for layer in denoiser.net[:3]] == ["Linear", "Linear", "Mish"]
    # No activation after the denoiser's first layer, and the time embedding is sin then cos of 10000^(-i/7) c_noise
    torch.testing.assert_close(denoiser.frequencies, torch.tensor([10000 ** (-i / 7) for i in range(8)]))


def test_learning_rates_follow_the_cosine_after_pretraining():
    assert_learning_rates_follow_the_cosine()


def test_targets_follow_only_in_training():
    agent = make_agent(tau=0.25)
    before = agent.models.params["target_critic"]["net.0.weight"].clone()
    agent.update(training=False)
    torch.testing.assert_close(agent.models.params["target_critic"]["net.0.weight"], before, rtol=0, atol=0)
    agent.start_training()
    online = agent.models.params["critic"]["net.0.weight"].detach().clone()
    torch.testing.assert_close(agent.models.params["target_critic"]["net.0.weight"], online, rtol=0, atol=0)
    agent.update(training=True)
    moved = agent.models.params["critic"]["net.0.weight"].detach()
    torch.testing.assert_close(agent.models.params["target_critic"]["net.0.weight"], 0.75 * online + 0.25 * moved)
