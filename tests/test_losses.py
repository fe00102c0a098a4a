"""Losses, samplers and updates of every method against closed forms and against plain modules with their own optimizers."""

import difflib
import math

import numpy as np
import pytest
import torch
from helpers import ROOT, changed_networks, make_agent, make_task, plain, snapshot
from torch import Tensor

import bc
import dql
import dtql_continuous as dtql
import fan
import fql
import idql
import iql
import kl_distill
import srpo
import stacked
import tasks
from common import UserError
from stacked import Batch


def one_batch(agent, rows: int = 64) -> tuple[Batch, Batch]:
    """The first rows as a minibatch of a single stacked model, and as a plain one."""
    batch = agent.data.columns(agent.data.rows[torch.arange(rows)[None]])
    return batch, Batch(*(column[0] for column in batch))


def twins(critic) -> list:
    """Both Qs of model 0, each (B, S), (B, A) -> (B,)."""
    nets = [plain(critic, 0, i) for i in (0, 1)]
    return [lambda *inputs, net=net: net(*inputs).squeeze(0) for net in nets]


def assert_step_trains(agent, step: str, network: str, *inputs: Tensor) -> None:
    """A step changes the parameters of its network and of no other."""
    before = snapshot(agent)
    getattr(agent, step)(*inputs)
    assert changed_networks(agent, before) == set(network.split())


# ---- DTQL --------------------------------------------------------------------------------------------------------------


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


def cloning_agent(actions: np.ndarray, module=dtql, updates: int = 1200, **settings):
    """An agent whose diffusion policy has cloned actions (N, 1) of a single state, with a decaying learning rate."""
    n = len(actions)
    zeros = np.zeros((n, 1), np.float32)
    data = stacked.Transitions(zeros, actions.astype(np.float32), zeros[:, 0], zeros[:, 0], zeros, torch.device("cpu"))
    args = module.Args(learning_rate=1e-3, batch_size=512, **settings)
    agent = (module.DTQL if module is dtql else module.KLDistill if module is kl_distill else module.BC)(
        args, 1, 1, torch.device("cpu"), data
    )
    optimizer = agent.actor_optimizer if module is bc else agent.denoiser_optimizer
    step = agent.step_actor if module is bc else agent.step_denoiser
    for update in range(updates):
        stacked.set_learning_rate(optimizer, torch.tensor(1 - update / updates))
        step(data.sample(1, 512), dtql.sample_sigma(torch.rand(1, 512, 1)), torch.randn(1, 512, 1))
    return agent


@pytest.mark.slow
def test_denoiser_learns_the_posterior_mean_of_gaussian_data(tiny_networks):
    """a ~ N(m, s^2), a_t = a + sigma eps: E[a | a_t] = (s^2 a_t + sigma^2 m) / (s^2 + sigma^2)."""
    mean, std = 0.2, 0.15
    agent = cloning_agent(mean + std * np.random.default_rng(0).standard_normal((20_000, 1)))
    for sigma in (0.1, 0.3, 1.0, 3.0):
        noisy = mean + math.sqrt(std**2 + sigma**2) * torch.linspace(-2, 2, 9)[None, :, None]
        with torch.no_grad():
            denoised = agent.denoiser(noisy, torch.full_like(noisy, sigma), torch.zeros(1, 9, 1))
        posterior = (std**2 * noisy + sigma**2 * mean) / (std**2 + sigma**2)
        assert (denoised - posterior).abs().max() < 0.04, sigma


@pytest.mark.slow
def test_trust_region_loss_prefers_the_modes(tiny_networks):
    """On a mixture of narrow Gaussians at -0.6 and 0.6, the loss is lower on the modes than between and beyond them."""
    rng = np.random.default_rng(0)
    agent = cloning_agent(
        0.6 * (2 * rng.integers(2, size=(20_000, 1)) - 1) + 0.03 * rng.standard_normal((20_000, 1)), updates=1000
    )

    def trust_region(action: float) -> float:
        sigma, noise = dtql.sample_sigma(torch.rand(1, 4096, 1)), torch.randn(1, 4096, 1)
        with torch.no_grad():
            return agent.denoising_loss(torch.full((1, 4096, 1), action), torch.zeros(1, 4096, 1), sigma, noise).item()

    modes, between = (trust_region(-0.6), trust_region(0.6)), (trust_region(0.0), trust_region(-0.3), trust_region(1.0))
    assert 2 * max(modes) < min(between)


def test_expectile_loss_has_the_known_minimiser():
    """For {0, 1} equally likely the expectile m solves tau (1 - m) = (1 - tau) m, so m = tau; one tau per model."""
    expectiles, v = torch.tensor([0.3, 0.5, 0.7, 0.9]), torch.linspace(0, 1, 1001)
    losses = torch.stack([dtql.expectile_loss((torch.tensor([0.0, 1.0]) - x).expand(4, 2), expectiles) for x in v])
    torch.testing.assert_close(v[losses.argmin(0)], expectiles, atol=1e-3, rtol=0)


def test_dtqls_critic_loss_is_equations_6_and_7():
    agent = make_agent(expectile=0.8)
    stacked_batch, batch = one_batch(agent)
    (q1, q2), v = twins(agent.critic), plain(agent.value, 0)
    with torch.no_grad():
        q_data = torch.minimum(q1(batch.obs, batch.actions), q2(batch.obs, batch.actions))
        target = batch.rewards + 0.99 * (1 - batch.terminals) * v(batch.next_obs)
    u = q_data - v(batch.obs)
    value_loss = (torch.where(u < 0, 0.2, 0.8) * u**2).mean()
    critic_loss = sum(((target - q(batch.obs, batch.actions)) ** 2).mean() for q in (q1, q2))
    loss, metrics = agent.critic_loss(stacked_batch)
    torch.testing.assert_close(loss[0], value_loss + critic_loss)
    torch.testing.assert_close(metrics, {"critic": critic_loss[None], "value": value_loss[None]})
    # V gets no gradient from Q's loss
    gradients = torch.autograd.grad(loss.sum(), list(agent.value.parameters()))
    for ours, expected in zip(gradients, torch.autograd.grad(value_loss, list(v.parameters()))):
        torch.testing.assert_close(ours[0], expected)
    assert_step_trains(agent, "step_critic", "critic value", stacked_batch)


@pytest.mark.parametrize("policy", ["gaussian", "implicit"])
def test_dtqls_policy_loss_is_equation_5_and_trains_theta_only(policy):
    agent = make_agent(policy=policy, nll=policy == "gaussian", alpha=3.0)
    stacked_batch, batch = one_batch(agent)
    z, noise, sigma = torch.randn(1, 64, 2), torch.randn(1, 64, 2), dtql.sample_sigma(torch.rand(1, 64, 1))
    loss, metrics = agent.actor_loss(stacked_batch, z, sigma, noise)
    denoiser, actor, s = plain(agent.denoiser, 0), plain(agent.actor, 0), sigma[0]
    if policy == "gaussian":
        mean, log_std = actor(batch.obs)
        a = torch.tanh(mean + log_std.exp() * z[0])
        normal = torch.distributions.Normal(mean, log_std.exp())
        nll = -normal.log_prob(torch.atanh(batch.actions / 1.001)).sum(1).mean()
        torch.testing.assert_close(metrics["entropy"][0], normal.entropy().sum(1).mean())
    else:
        a, nll = actor(batch.obs, z[0]), 0
    error = denoiser(a + s * noise[0], s, batch.obs).clamp(-1, 1) - a
    trust_region = (error**2 * (s**2 + 0.25) / (0.25 * s**2)).mean()
    q = torch.minimum(*(q(batch.obs, a.clamp(-1, 1)) for q in twins(agent.critic))).mean()
    torch.testing.assert_close(loss[0], 3 * trust_region - q + nll, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(metrics["trust_region"][0], trust_region, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(metrics["q"][0], q, rtol=1e-4, atol=1e-4)
    assert_step_trains(agent, "step_actor", "actor", stacked_batch, z, sigma, noise)


def test_log_density_is_finite_at_the_bounds():
    mean = torch.zeros(1, 2, 3, requires_grad=True)
    loss = dtql.gaussian_nll(mean, torch.full((1, 2, 3), -5.0), torch.tensor([[[1.0, -1.0, 0.0], [1.0, 1.0, -1.0]]]))
    loss.sum().backward()
    assert loss.isfinite().all() and mean.grad.isfinite().all()


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
    agent = make_agent(lr_decay=True, epochs=2, steps_per_epoch=5, learning_rate=1e-4)
    optimizers = agent.critic_optimizer, agent.denoiser_optimizer, agent.actor_optimizer
    rates = lambda: [optimizer.param_groups[0]["lr"].item() for optimizer in optimizers]
    agent.update(training=False)
    assert rates() == pytest.approx([3e-4, 1e-4, 1e-4])
    for step in range(10):
        agent.update(training=True)
        factor = (1 + math.cos(math.pi * step / 10)) / 2
        assert rates() == pytest.approx([3e-4 * factor, 1e-4 * factor, 1e-4 * factor], rel=1e-5)


def test_target_qs_follow_only_in_training():
    agent = make_agent(tau=0.25)
    before = snapshot(agent)
    agent.update(training=False)
    assert changed_networks(agent, before) == {"critic", "value", "denoiser"}
    agent.start_training()
    online, before = agent.critic.net[0].weight.detach().clone(), snapshot(agent)
    assert torch.equal(agent.target_critic.net[0].weight, online)
    agent.update(training=True)
    torch.testing.assert_close(agent.target_critic.net[0].weight, 0.75 * online + 0.25 * agent.critic.net[0].weight.detach())
    assert changed_networks(agent, before) == {"critic", "value", "denoiser", "actor", "target_critic"}


# ---- KL ----------------------------------------------------------------------------------------------------------------


def gaussian_denoiser(mean: float, std: float):
    """E[a | a_t] where a ~ N(mean, std^2), and the score of a_t's density."""
    posterior = lambda noisy, sigma, obs: (std**2 * noisy + sigma**2 * mean) / (std**2 + sigma**2)
    score = lambda noisy, sigma: -(noisy - mean) / (std**2 + sigma**2)
    return posterior, score


def test_kls_gradient_is_the_weighted_difference_of_scores(monkeypatch):
    agent = make_agent(module=kl_distill)
    real, real_score = gaussian_denoiser(0.3, 0.2)
    fake, fake_score = gaussian_denoiser(-0.1, 0.4)
    agent.denoise, agent.fake.forward = real, fake
    torch.manual_seed(0)
    actions = torch.randn(1, 500, 3).double().mul(0.5).requires_grad_()
    sigma, noise = kl_distill.sample_sigma(torch.rand(1, 500, 1)).double(), torch.randn(1, 500, 3).double()
    agent.kl_loss(actions, None, sigma, noise).sum().backward()
    noisy = actions.detach() + sigma * noise
    distance = (real(noisy, sigma, None) - actions.detach()).abs().sum(-1, keepdim=True)  # the L1 norm, A = 3
    assert (distance / 3 > kl_distill.WEIGHT_FLOOR).float().mean() > 0.9
    weight = sigma**2 / (distance / 3).clamp(min=kl_distill.WEIGHT_FLOOR)  # w_t of Appendix C, alpha_t = 1
    expected = weight * (fake_score(noisy, sigma) - real_score(noisy, sigma)) / actions.numel()
    torch.testing.assert_close(actions.grad, expected)


def test_kls_weight_has_a_floor():
    """On the data, at little noise, the prediction is the action itself: the step must stay bounded."""
    agent = make_agent(module=kl_distill)
    agent.denoise = lambda noisy, sigma, obs: torch.zeros_like(noisy)
    agent.fake.forward = lambda noisy, sigma, obs: torch.ones_like(noisy)
    actions = torch.zeros(1, 4, 2, requires_grad=True)
    agent.kl_loss(actions, None, torch.full((1, 4, 1), 0.002), torch.zeros(1, 4, 2)).sum().backward()
    torch.testing.assert_close(actions.grad, torch.full((1, 4, 2), 1 / kl_distill.WEIGHT_FLOOR / 8))


@pytest.mark.slow
def test_distillation_without_q_recovers_both_modes_in_proportion(tiny_networks):
    """Data at -0.6 (30 %) and 0.5 (70 %); the learning rate decays, so that the proportion comes to rest."""
    rng = np.random.default_rng(0)
    actions = np.where(rng.random(4000) < 0.3, -0.6, 0.5)[:, None] + 0.03 * rng.standard_normal((4000, 1))
    agent = cloning_agent(actions, kl_distill, 800, q=False, epochs=1, steps_per_epoch=800, lr_decay=True)
    agent.start_training()
    for _ in range(800):
        agent.update(training=True)
    with torch.no_grad():
        sample = agent.act(torch.zeros(1, 5000, 1), torch.Generator().manual_seed(0)).numpy()
    left, right = np.abs(sample + 0.6) < 0.15, np.abs(sample - 0.5) < 0.15
    assert (left | right).mean() > 0.75
    assert left.mean() / (left | right).mean() == pytest.approx(0.3, abs=0.1)


def test_kls_training_starts_from_the_diffusion_model_and_no_q_trains_no_critic():
    agent = make_agent(module=kl_distill)
    agent.update(training=False)
    agent.start_training()
    for name, param in agent.denoiser.named_parameters():
        assert torch.equal(agent.actor.get_parameter(name), param) and torch.equal(agent.fake.get_parameter(name), param)
    before = snapshot(agent)
    agent.update(training=True)
    assert changed_networks(agent, before) == {"critic", "value", "target_critic", "actor", "fake"}
    agent = make_agent(module=kl_distill, q=False)
    before = snapshot(agent)
    agent.update(training=False)
    assert changed_networks(agent, before) == {"denoiser"}


def test_the_diff_shows_the_two_methods_and_nothing_else():
    files = [(ROOT / name).read_text().splitlines() for name in ("dtql_continuous.py", "kl_distill.py")]
    diff = [line for line in difflib.unified_diff(*files, n=0) if line[0] in "+-" and line[:3] not in ("+++", "---")]
    assert len(diff) < 160


# ---- BC ----------------------------------------------------------------------------------------------------------------


def test_bcs_losses():
    for policy in ("deterministic", "gaussian", "diffusion"):
        agent = make_agent(module=bc, policy=policy)
        stacked_batch, batch = one_batch(agent)
        actor, sigma, noise = plain(agent.actor, 0), torch.rand(1, 64, 1) + 0.1, torch.randn(1, 64, 2)
        loss, metrics = agent.actor_loss(stacked_batch, sigma, noise)
        if policy == "deterministic":
            expected = torch.nn.functional.mse_loss(actor(batch.obs), batch.actions)
        elif policy == "gaussian":
            mean, log_std = actor(batch.obs)
            normal = torch.distributions.Normal(mean, log_std.exp())
            expected = -normal.log_prob(torch.atanh(batch.actions / 1.001)).sum(1).mean()
            torch.testing.assert_close(metrics["entropy"][0], normal.entropy().sum(1).mean())
        else:
            s = sigma[0]
            error = actor(batch.actions + s * noise[0], s, batch.obs).clamp(-1, 1) - batch.actions
            expected = (error**2 * (s**2 + 0.25) / (0.25 * s**2)).mean()
        torch.testing.assert_close(loss[0], expected)


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


@pytest.mark.slow
def test_diffusion_policy_clones_two_modes_and_a_deterministic_one_takes_the_mean(tiny_networks):
    rng = np.random.default_rng(0)
    actions = np.where(rng.random(4000) < 0.3, -0.6, 0.5)[:, None] + 0.03 * rng.standard_normal((4000, 1))
    taken = {}
    for policy, updates in (("diffusion", 1500), ("deterministic", 200)):
        agent = cloning_agent(actions, bc, updates, policy=policy)
        taken[policy] = agent.act(torch.zeros(1, 3000, 1), torch.Generator().manual_seed(0)).numpy()[0, :, 0]
    left, right = np.abs(taken["diffusion"] + 0.6) < 0.15, np.abs(taken["diffusion"] - 0.5) < 0.15
    assert (left | right).mean() > 0.95 and left.mean() == pytest.approx(0.3, abs=0.06)
    np.testing.assert_allclose(taken["deterministic"], actions.mean(), atol=0.15)


# ---- IQL ---------------------------------------------------------------------------------------------------------------


def test_log_prob_is_that_of_a_gaussian_around_a_tanh_mean():
    """No correction for the tanh; the std does not depend on the state and stays in [e^-5, e^2]."""
    torch.manual_seed(0)
    actor, obs, actions = iql.GaussianActor(3, 2, iql.Args()), torch.randn(10, 3), torch.rand(10, 2) * 2 - 1
    mean, log_std = actor(obs)
    torch.testing.assert_close(mean, torch.tanh(actor.net(obs)))
    assert log_std.tolist() == [[0, 0]]
    normal = torch.distributions.Normal(mean, log_std.exp())
    torch.testing.assert_close(iql.gaussian_log_prob(mean, log_std, actions), normal.log_prob(actions).sum(1))
    with torch.no_grad():
        actor.log_std.copy_(torch.tensor([9.0, -9.0]))
    assert actor(obs)[1].tolist() == [[2, -5]]


def test_every_layer_starts_orthogonal_with_gain_sqrt_2():
    args = iql.Args(layer_norm=True)
    for net in (iql.Critic(3, 2, args).net, iql.Value(3, args).net, iql.GaussianActor(3, 2, args).net):
        for layer in net:
            if isinstance(layer, torch.nn.Linear):
                weight = layer.weight if layer.weight.shape[0] <= layer.weight.shape[1] else layer.weight.T
                torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(len(weight)), atol=1e-4, rtol=0)
                assert (layer.bias == 0).all()


def test_iqls_losses_are_the_papers_and_reach_only_their_networks():
    agent = make_agent(module=iql, expectile=0.8, beta=2.0)
    with torch.no_grad():  # target Qs that differ from the online Qs, so that a mix-up shows
        for param in agent.target_critic.parameters():
            param.mul_(1.3)
    stacked_batch, batch = one_batch(agent)
    v, actor = plain(agent.value, 0), plain(agent.actor, 0)
    with torch.no_grad():
        advantage = torch.minimum(*(q(batch.obs, batch.actions) for q in twins(agent.target_critic))) - v(batch.obs)
        mean, log_std = actor(batch.obs)
        log_prob = torch.distributions.Normal(mean, log_std.exp()).log_prob(batch.actions).sum(1)
        target = batch.rewards + 0.99 * (1 - batch.terminals) * v(batch.next_obs)
        expected = {
            "value": (torch.where(advantage < 0, 0.2, 0.8) * advantage**2).mean(),
            "actor": -(torch.exp(2 * advantage).clamp(max=100) * log_prob).mean(),
            "critic": sum(((target - q(batch.obs, batch.actions)) ** 2).mean() for q in twins(agent.critic)),
        }
    for network, value in expected.items():
        loss, metrics = getattr(agent, f"{network}_loss")(stacked_batch)
        torch.testing.assert_close(loss[0], value, rtol=1e-4, atol=1e-5)
        assert metrics[network] is loss
    for network in expected:
        assert_step_trains(agent, f"step_{network}", network, stacked_batch)


def test_iqls_advantage_weights_have_their_ceiling():
    agent = make_agent(module=iql, beta=3.0)
    stacked_batch, _ = one_batch(agent)
    agent.advantage = lambda batch: torch.full((1, 64), 50.0)
    assert agent.actor_loss(stacked_batch)[1]["weight"].item() == 100


def test_iqls_order_is_value_policy_critic_targets_on_one_minibatch():
    """Updates against plain modules and their own optimizers."""
    agent = make_agent(module=iql, batch_size=16, tau=0.1, epochs=1, steps_per_epoch=4)
    qs, targets = ([plain(net, 0, i) for i in (0, 1)] for net in (agent.critic, agent.target_critic))
    v, actor = plain(agent.value, 0), plain(agent.actor, 0)
    params = v.parameters(), actor.parameters(), [p for q in qs for p in q.parameters()]
    optimizers = [torch.optim.Adam(each, 3e-4) for each in params]
    for step in range(3):
        torch.manual_seed(step)
        batch = agent.data.columns(agent.data.rows[torch.randint(512, (1, 16))[0]])
        torch.manual_seed(step)
        agent.update()
        optimizers[1].param_groups[0]["lr"] = 3e-4 * (1 + math.cos(math.pi * step / 4)) / 2
        for number, optimizer in enumerate(optimizers):
            with torch.no_grad():
                q = torch.minimum(*(q(batch.obs, batch.actions)[0] for q in targets))
                target = batch.rewards + 0.99 * (1 - batch.terminals) * v(batch.next_obs)
                weights = torch.exp(10 * (q - v(batch.obs))).clamp(max=100)
            u = q - v(batch.obs)
            if number == 0:
                loss = (torch.where(u < 0, 0.1, 0.9) * u**2).mean()
            elif number == 1:
                loss = -(weights * iql.gaussian_log_prob(*actor(batch.obs), batch.actions)).mean()
            else:
                loss = sum(((target - net(batch.obs, batch.actions)[0]) ** 2).mean() for net in qs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            for net, moving in zip(qs, targets):
                for own, param in zip(net.parameters(), moving.parameters()):
                    param.lerp_(own, 0.1)
    for ours, module in ((agent.value, v), (agent.actor, actor)):
        for name, param in module.named_parameters():
            torch.testing.assert_close(ours.get_parameter(name)[0], param, rtol=1e-3, atol=2e-5)
    for ours, pair in ((agent.critic, qs), (agent.target_critic, targets)):
        for i, module in enumerate(pair):
            for name, param in module.named_parameters():
                torch.testing.assert_close(ours.get_parameter(name)[0, i], param, rtol=1e-3, atol=2e-5)


def test_iqls_dropout_masks_are_arguments_and_are_not_used_when_acting():
    agent = make_agent(module=iql, dropout=0.25)
    actor, obs, masks = plain(agent.actor, 0), torch.randn(5, 3), (torch.rand(2, 5, agent.args.width) > 0.25) / 0.75
    hidden = torch.relu(actor.net[0](obs)) * masks[0]
    hidden = torch.relu(actor.net[2](hidden)) * masks[1]
    torch.testing.assert_close(actor(obs, masks)[0], torch.tanh(actor.net[4](hidden)))
    torch.testing.assert_close(agent.act(obs[None], torch.Generator())[0], actor(obs)[0].detach())


def test_return_range_counts_episodes_as_iql_does():
    """Episodes end at a terminal, at a jump of the observation, and at the last row, where an incomplete one counts."""
    obs = np.array([0, 1, 2, 10, 11, 20, 21, 22.0])[:, None]
    next_obs = np.array([1, 2, 3, 11, 12, 21, 22, 23.0])[:, None]
    terminals = np.array([0, 0, 1, 0, 0, 0, 0, 0])  # rows 0-2 end at a terminal, 3-4 at a jump, 5-7 at the end of the file
    rewards = np.array([1, 1, 1, 5, 5, -2, 0, 1.0])
    task = make_task(obs, np.zeros((8, 1)), rewards, terminals, next_obs)
    assert tasks.return_range(task) == 10 - -1
    with pytest.raises(UserError, match="same return"):
        tasks.return_range(make_task(obs, np.zeros((8, 1)), np.zeros(8), terminals, next_obs))


def test_rewards_and_actions_are_transformed_as_each_method_does():
    device = torch.device("cpu")
    columns = [[0.0], [5.0], [0.0]], [[-1.0], [1.0], [0.5]], [1.0, 5.0, 3.0], [0, 0, 0], [[1.0], [6.0], [1.0]]
    task = make_task(*(np.array(column) for column in columns))
    rewards = lambda module, env_id, task=task: module.make_data(task, module.Args(env_id=env_id), device).rows[:, 2]
    sparse = task._replace(rewards=np.array([0, 1, 0], np.float32), sparse_goal=True)
    for module in (iql, idql):
        np.testing.assert_allclose(rewards(module, "hopper-medium-v2"), [250, 1250, 750])
        np.testing.assert_allclose(rewards(module, "pen-human-v1"), [1, 5, 3])
        np.testing.assert_allclose(rewards(module, "antmaze-umaze-v0", sparse), [-1, 0, -1])
    for module in (iql, idql, fql):
        clipped = module.make_data(task, module.Args(env_id="pen-human-v1"), device).rows[:, 1]
        np.testing.assert_allclose(clipped, [-1 + 1e-5, 1 - 1e-5, 0.5], rtol=1e-7)
    np.testing.assert_allclose(rewards(dql, "antmaze-umaze-v0", sparse), [-2, 2, -2])
    np.testing.assert_allclose(rewards(dql, "pen-human-v1"), [-1, 1, 0])
    np.testing.assert_allclose(rewards(dql, "hopper-medium-v2"), [1, 5, 3])
    np.testing.assert_allclose(rewards(srpo, "pen-human-v1"), [250, 1250, 750])
    np.testing.assert_allclose(rewards(fql, "antmaze-umaze-v0", sparse), [-1, 0, -1])


def test_srpos_return_range_cuts_after_1000_rows():
    rewards, terminals = np.arange(2500.0), np.arange(2500) == 99
    task = make_task(np.arange(2500)[:, None], np.zeros((2500, 1)), rewards, terminals, np.arange(1, 2501)[:, None])
    returns = [rewards[:100].sum(), rewards[100:1100].sum(), rewards[1100:2100].sum()]  # the last 400 rows do not count
    assert srpo.return_range(task) == returns[2] - returns[0]


# ---- the chain of DQL and IDQL -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [idql, dql])
def test_the_chains_constants(module):
    np.testing.assert_allclose(module.BETA, [0.1959, 0.4588, 0.6358, 0.7549, 0.8350], atol=5e-5)
    np.testing.assert_allclose(module.ALPHA_BAR, [0.8041, 0.4352, 0.1585, 0.0389, 0.0064], atol=5e-5)
    noisy = module.add_noise(torch.ones(5, 1), torch.arange(5)[:, None], torch.zeros(5, 1))
    np.testing.assert_allclose(noisy[:, 0], np.sqrt(module.ALPHA_BAR), rtol=1e-6)
    noisy = module.add_noise(torch.zeros(5, 1), torch.arange(5)[:, None], torch.ones(5, 1))
    np.testing.assert_allclose(noisy[:, 0], np.sqrt(1 - np.array(module.ALPHA_BAR)), rtol=1e-6)


def test_dqls_posterior():
    np.testing.assert_allclose(dql.POSTERIOR_VARIANCE, [0, 0.1591, 0.4267, 0.6609, 0.8078], atol=5e-5)
    np.testing.assert_allclose(dql.POSTERIOR_ACTION, [1, 0.7284, 0.4984, 0.3127, 0.1657], atol=5e-5)
    np.testing.assert_allclose(dql.POSTERIOR_X, [0, 0.2551, 0.4051, 0.4335, 0.3929], atol=5e-5)
    np.testing.assert_allclose(np.sqrt(idql.BETA[1:]), [0.6774, 0.7974, 0.8688, 0.9138], atol=5e-5)


def exact_noise(mean: float, std: float):
    """E[noise | x_i] for actions ~ N(mean, std^2)."""

    def predict(x: torch.Tensor, i: int) -> torch.Tensor:
        alpha_bar = idql.ALPHA_BAR[i]
        variance = alpha_bar * std**2 + 1 - alpha_bar
        return math.sqrt(1 - alpha_bar) * (x - math.sqrt(alpha_bar) * mean) / variance

    return predict


def test_dqls_sampler_on_gaussian_data():
    """Where nothing is clamped the chain is linear: its mean and variance follow from its coefficients."""
    mean, std = 0.1, 0.05
    chain_mean, variance = 0.0, 1.0
    for i in reversed(range(5)):
        alpha_bar = dql.ALPHA_BAR[i]
        # The predicted action is E[a | x_i] = mean + gain (x_i - sqrt(alpha_bar) mean)
        gain = math.sqrt(alpha_bar) * std**2 / (alpha_bar * std**2 + 1 - alpha_bar)
        slope = dql.POSTERIOR_X[i] + dql.POSTERIOR_ACTION[i] * gain
        chain_mean = slope * chain_mean + dql.POSTERIOR_ACTION[i] * mean * (1 - gain * math.sqrt(alpha_bar))
        variance = slope**2 * variance + dql.POSTERIOR_VARIANCE[i]
    torch.manual_seed(0)
    sample = dql.sample_chain(exact_noise(mean, std), torch.randn(200_000, 5))
    assert sample.mean().item() == pytest.approx(chain_mean, abs=1e-3)
    assert sample.std().item() == pytest.approx(math.sqrt(variance), rel=0.01)
    assert chain_mean == pytest.approx(mean, abs=2e-3) and math.sqrt(variance) < 1.2 * std


@pytest.mark.slow
def test_idqls_sampler_on_gaussian_data():
    """The density of x_i, clamped to [-1, 1], is carried over a grid from step to step."""
    mean, predict = 0.3, exact_noise(0.3, 0.1)
    grid = np.linspace(-1, 1, 2001)
    inner = (grid[1:] + grid[:-1]) / 2  # bounds of the cells; the outer cells take what is clamped
    cdf = np.vectorize(lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2))))
    wide = np.linspace(-6, 6, 4001)  # x_4 starts as N(0, 1), not clamped
    weights, points = np.exp(-(wide**2) / 2), wide
    for i in reversed(range(5)):
        beta, alpha_bar = idql.BETA[i], idql.ALPHA_BAR[i]
        noise = predict(torch.from_numpy(points), i).numpy()
        center = (points - beta / math.sqrt(1 - alpha_bar) * noise) / math.sqrt(1 - beta)
        weights = weights / weights.sum()
        if i == 0:
            points = center.clip(-1, 1)
            break
        below = cdf((inner[None] - center[:, None]) / math.sqrt(beta))
        cells = np.diff(np.concatenate((np.zeros((len(center), 1)), below, np.ones((len(center), 1))), 1))
        weights, points = weights @ cells, grid
    expected = (weights * points).sum()
    spread = math.sqrt((weights * (points - expected) ** 2).sum())
    torch.manual_seed(0)
    sample = idql.sample_chain(predict, torch.randn(400_000, 5))
    assert sample.mean().item() == pytest.approx(expected, abs=2e-3)
    assert sample.std().item() == pytest.approx(spread, rel=0.01)
    assert abs(expected - mean) < 0.05  # which is the data's, nearly


def test_the_chain_stays_among_the_actions():
    torch.manual_seed(0)
    for module in (idql, dql):
        sample = module.sample_chain(lambda x, i: 5 * torch.randn_like(x), torch.randn(1000, 10))
        assert sample.shape == (1000, 2) and sample.abs().max() <= 1


# ---- IDQL --------------------------------------------------------------------------------------------------------------


def test_idqls_losses_and_what_they_reach():
    agent = make_agent(module=idql, expectile=0.8)
    stacked_batch, batch = one_batch(agent)
    step, noise, masks = torch.randint(5, (1, 64, 1)), torch.randn(1, 64, 2), (torch.rand(3, 1, 64, 256) > 0.1) / 0.9
    denoiser, v = plain(agent.denoiser, 0), plain(agent.value, 0)
    with torch.no_grad():
        alpha_bar = torch.tensor(idql.ALPHA_BAR, dtype=torch.float32)[step[0]]
        noisy = alpha_bar.sqrt() * batch.actions + (1 - alpha_bar).sqrt() * noise[0]
        error = denoiser(noisy, step[0].float(), batch.obs, masks[:, 0]) - noise[0]
        u = torch.minimum(*(q(batch.obs, batch.actions) for q in twins(agent.target_critic))) - v(batch.obs)
        target = batch.rewards + 0.99 * (1 - batch.terminals) * v(batch.next_obs)
        expected = {
            "denoiser": (error**2).sum(1).mean(),
            "value": (torch.where(u < 0, 0.2, 0.8) * u**2).mean(),
            "critic": sum(((q(batch.obs, batch.actions) - target) ** 2).mean() for q in twins(agent.critic)) / 2,
        }
    inputs = {"denoiser": (step, noise, masks), "value": (), "critic": ()}
    for network, value in expected.items():
        loss, _ = getattr(agent, f"{network}_loss")(stacked_batch, *inputs[network])
        torch.testing.assert_close(loss[0], value, rtol=1e-4, atol=1e-5)
    for network in expected:
        assert_step_trains(agent, f"step_{network}", network, stacked_batch, *inputs[network])


def test_idqls_average_and_weight_decay():
    """Updates against torch's AdamW on a plain module, and the average of what comes out."""
    agent = make_agent(module=idql, batch_size=16, dropout=0.0, weight_decay=0.3, ema=0.25, epochs=1, steps_per_epoch=4)
    model, average = plain(agent.denoiser, 0), plain(agent.denoiser, 0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, weight_decay=0.3)
    for update in range(3):
        torch.manual_seed(update)
        batch = agent.data.columns(agent.data.rows[torch.randint(512, (1, 16))[0]])
        step, noise = torch.randint(5, (1, 16, 1))[0], torch.randn(1, 16, 2)[0]
        torch.manual_seed(update)
        agent.update()
        optimizer.param_groups[0]["lr"] = 3e-4 * (1 + math.cos(math.pi * update / 4)) / 2
        optimizer.zero_grad()
        (model(idql.add_noise(batch.actions, step, noise), step.float(), batch.obs) - noise).square().sum(1).mean().backward()
        optimizer.step()
        with torch.no_grad():
            for moving, own in zip(average.parameters(), model.parameters()):
                moving.lerp_(own, 0.25)
    for ours, module in ((agent.denoiser, model), (agent.ema_denoiser, average)):
        for name, param in module.named_parameters():
            torch.testing.assert_close(ours.get_parameter(name)[0], param, rtol=1e-3, atol=2e-5)


# ---- DQL ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("coin", "up", "other", "eta"), [(0.3, 0, 1, 3.0), (0.7, 1, 0, 3.0), (0.2, 0, 1, 0.0)])
def test_dqls_policy_clones_and_climbs_one_q_over_the_size_of_the_other(coin, up, other, eta):
    agent = make_agent(module=dql, eta=eta)
    stacked_batch, batch = one_batch(agent)
    step, noise, z = torch.randint(5, (1, 64, 1)), torch.randn(1, 64, 2), torch.randn(1, 64, 10)
    loss, _ = agent.denoiser_loss(stacked_batch, step, noise, z, torch.tensor([coin]))
    policy = plain(agent.denoiser, 0)
    predicted = policy(dql.add_noise(batch.actions, step[0], noise[0]), step[0].float(), batch.obs)
    actions = dql.sample_chain(lambda x, i: policy(x, torch.full_like(x[..., :1], i), batch.obs), z[0])
    q = [q(batch.obs, actions) for q in twins(agent.critic)]
    expected = (predicted - noise[0]).square().mean() - eta * q[up].mean() / q[other].abs().mean().detach()
    torch.testing.assert_close(loss[0], expected, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(loss.sum(), list(agent.denoiser.parameters()))
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, list(policy.parameters()))):
        torch.testing.assert_close(ours[0], theirs, rtol=1e-3, atol=1e-6)
    assert_step_trains(agent, "step_denoiser", "denoiser", stacked_batch, step, noise, z, torch.tensor([coin]))


@pytest.mark.parametrize("samples", [1, 10])
def test_dqls_target_is_the_smaller_q_of_the_best_next_action(samples):
    agent = make_agent(module=dql)
    stacked_batch, batch = one_batch(agent, 32)
    z, policy = torch.randn(1, samples, 32, 10), plain(agent.ema_denoiser, 0)
    loss, _ = agent.critic_loss(stacked_batch, z)
    with torch.no_grad():
        values = []
        for one in z[0]:
            actions = dql.sample_chain(lambda x, i: policy(x, torch.full_like(x[..., :1], i), batch.next_obs), one)
            values.append(torch.stack([q(batch.next_obs, actions) for q in twins(agent.target_critic)]))
        target = batch.rewards + 0.99 * (1 - batch.terminals) * torch.stack(values).amax(0).amin(0)
        expected = sum(((q(batch.obs, batch.actions) - target) ** 2).mean() for q in twins(agent.critic))
    torch.testing.assert_close(loss[0], expected, rtol=1e-4, atol=1e-5)
    assert_step_trains(agent, "step_critic", "critic", stacked_batch, z)


def test_dqls_average_follows_every_fifth_update_from_the_1000th_on():
    agent = make_agent(module=dql, batch_size=16, ema=0.3)
    agent.train_step.fill_(998)
    moved = []
    for update in range(998, 1007):
        before = snapshot(agent)
        agent.update()
        if "ema_denoiser" in changed_networks(agent, before):
            moved.append(update)
            name = "ema_denoiser.net.0.weight"
            expected = before[name].lerp(agent.denoiser.net[0].weight.detach(), 0.3)
            torch.testing.assert_close(agent.ema_denoiser.net[0].weight.detach(), expected)
    assert moved == [1000, 1005]


# ---- FQL ---------------------------------------------------------------------------------------------------------------


def gaussian_velocity(mean: float, std: float):
    """E[a - x_0 | x_t] for a ~ N(mean, std^2), x_0 ~ N(0, 1) independent, x_t = (1 - t) x_0 + t a."""
    return lambda x, t: mean + (t * std**2 - (1 - t)) / (t**2 * std**2 + (1 - t) ** 2) * (x - t * mean)


def test_fqls_flow_of_a_gaussian_is_the_known_map():
    """x_0 = z goes to mean + std z, with ever smaller Euler steps."""
    z, exact, errors = torch.linspace(-2, 2, 9, dtype=torch.float64)[None, :, None], gaussian_velocity(0.3, 0.2), []
    for steps in (10, 100, 1000):
        agent = make_agent(module=fql, flow_steps=steps, action_dim=1)
        agent.flow.forward = lambda obs, x, time: exact(x, time)
        errors.append((agent.integrate(None, z) - (0.3 + 0.2 * z)).abs().max().item())
    assert errors[0] < 0.2 and errors[1] < errors[0] / 5 and errors[2] < 2e-3


def test_flow_matching_is_least_at_the_conditional_velocity():
    torch.manual_seed(0)
    agent, exact = make_agent(module=fql, action_dim=1), gaussian_velocity(0.3, 0.2)
    actions, noise, time = 0.3 + 0.2 * torch.randn(1, 100_000, 1), torch.randn(1, 100_000, 1), torch.rand(1, 100_000, 1)
    batch = Batch(None, actions, None, None, None)

    def loss(change) -> float:
        agent.flow.forward = lambda obs, x, t: exact(x, t) + change(x, t)
        return agent.flow_loss(batch, noise, time)[0].item()

    best = loss(lambda x, t: 0 * x)
    for change in (lambda x, t: 0.05 + 0 * x, lambda x, t: 0.1 * x, lambda x, t: 0.1 * t * x, lambda x, t: -0.1 * x):
        assert loss(change) > best and loss(lambda x, t: -change(x, t)) > best


@pytest.mark.slow
def test_fqls_one_step_policy_follows_the_flow_when_alpha_is_large():
    agent = make_agent(module=fql, alpha=1e6)
    with torch.no_grad():
        for name, param in agent.flow.named_parameters():
            param *= 0.5 if name.endswith("weight") else 1  # a flow that leaves room inside [-1, 1]
    optimizer = torch.optim.Adam(agent.actor.parameters(), 1e-3, fused=True)
    step, (batch, _) = stacked.make_step(agent.actor_loss, optimizer), one_batch(agent)
    for update in range(300):
        stacked.set_learning_rate(optimizer, torch.tensor(1 - update / 300))
        step(batch, torch.randn(1, 64, 2))
    noise = torch.randn(1, 64, 2)
    with torch.no_grad():
        flow = agent.integrate(batch.obs, noise).clamp(-1, 1)
        error = agent.actor(batch.obs, noise) - flow
    assert error.square().mean() < 0.02 * flow.var()


@pytest.mark.parametrize("settings", [{}, {"q_target": "min", "normalize_q": True}])
def test_fqls_losses_and_what_they_reach(settings):
    agent = make_agent(module=fql, alpha=2.0, **settings)
    stacked_batch, batch = one_batch(agent)
    noise, time = torch.randn(1, 3, 64, 2), torch.rand(1, 64, 1)
    actor, flow, (n0, n1, n2) = plain(agent.actor, 0), plain(agent.flow, 0), noise[0]
    with torch.no_grad():
        next_actions = actor(batch.next_obs, n0).clamp(-1, 1)
        next_q = torch.stack([q(batch.next_obs, next_actions) for q in twins(agent.target_critic)])
        target = batch.rewards + 0.99 * (1 - batch.terminals) * (next_q.amin(0) if settings else next_q.mean(0))
        critic = sum(((q(batch.obs, batch.actions) - target) ** 2).mean() for q in twins(agent.critic)) / 2
        x = (1 - time[0]) * n1 + time[0] * batch.actions
        clone = ((flow(batch.obs, x, time[0]) - (batch.actions - n1)) ** 2).mean()
        goal = n2
        for i in range(10):
            goal = goal + flow(batch.obs, goal, torch.full((64, 1), i / 10)) / 10
        actions = actor(batch.obs, n2)
        distillation = ((actions - goal.clamp(-1, 1)) ** 2).mean()
        q = torch.stack([q(batch.obs, actions.clamp(-1, 1)) for q in twins(agent.critic)]).mean(0)
        scale = q.abs().mean() + 1e-6 if settings else 1
    loss, _ = agent.loss(stacked_batch, noise, time)
    torch.testing.assert_close(loss[0], critic + clone + 2 * distillation - q.mean() / scale, rtol=1e-4, atol=1e-5)
    parts = {
        "critic": agent.critic_loss(stacked_batch, noise[:, 0]),
        "flow": agent.flow_loss(stacked_batch, noise[:, 1], time),
        "actor": agent.actor_loss(stacked_batch, noise[:, 2]),
    }
    for network, (part, _) in parts.items():
        params = dict(agent.named_parameters())
        trained = [name for name, param in params.items() if param.requires_grad]
        gradients = torch.autograd.grad(part.sum(), [params[name] for name in trained], allow_unused=True)
        assert {name.split(".")[0] for name, gradient in zip(trained, gradients) if gradient is not None} == {network}


def test_fqls_targets_follow_the_qs_from_before_the_step():
    agent = make_agent(module=fql, tau=0.25)
    agent.update()
    before = snapshot(agent)
    agent.update()
    for name, param in agent.critic.named_parameters():
        old, target = before[f"critic.{name}"], before[f"target_critic.{name}"]
        assert not torch.equal(param, old)
        torch.testing.assert_close(agent.target_critic.get_parameter(name).data, target.lerp(old, 0.25))


# ---- FAN ---------------------------------------------------------------------------------------------------------------


def test_fans_anchor_is_least_where_the_flow_goes():
    """A flow whose data are N(m, s^2) has a known velocity; the anchor of actions m + s z from noise z is 0, of others more."""
    mean, std = 0.2, 0.5

    def velocity(obs: torch.Tensor, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """The velocity along x_t = (1 - t) z + t (m + s z)."""
        z = (x - time * mean) / (1 - time + time * std)
        return mean + (std - 1) * z

    noise, time = torch.randn(1, 1000, 2), torch.rand(1, 1000, 1)
    on, off = (fan.FAN.anchor(velocity, None, mean + std * noise + shift, noise, time) for shift in (0, 0.3))
    torch.testing.assert_close(on, torch.zeros_like(on), atol=1e-6, rtol=0)
    slope = (std - 1) / (1 - time + time * std)  # of the velocity in x, which moves by t times the shift
    torch.testing.assert_close(off, (0.3 * (1 - time * slope)).square().expand_as(off), atol=1e-5, rtol=1e-4)


def test_fans_z_is_the_expectile_of_a_two_point_distribution(monkeypatch):
    """Targets 0 and 1 with equal chance: the 0.9-expectile is 0.9."""
    agent = make_agent(module=fan, kappa=0.9)
    monkeypatch.setattr(
        agent.target_critic, "forward", lambda obs, actions, noise: (noise[..., 0] > 0).float()[:, None].expand(-1, 2, -1)
    )
    z = torch.full((1, 2, 4000), 0.9, requires_grad=True)
    monkeypatch.setattr(agent.upper, "forward", lambda *_: z)
    batch = agent.data.columns(agent.data.rows[torch.zeros(1, 4000, dtype=torch.long)])
    noise = torch.cat((torch.ones(1, 2000, 2), -torch.ones(1, 2000, 2)), 1)
    agent.upper_loss(batch, noise)[0].sum().backward()
    assert abs(float(z.grad.sum())) < 1e-6 and float(z.grad.abs().sum()) > 0.01


@pytest.mark.parametrize("settings", [{}, {"critic": "q", "q_target": "min", "normalize_q": True}])
def test_fans_losses_and_what_they_reach(settings):
    agent = make_agent(module=fan, alpha1=2.0, alpha2=0.5, **settings)
    stacked_batch, batch = one_batch(agent)
    noise, time = torch.randn(1, 5, 64, 2), torch.rand(1, 3, 64, 1)
    actor, flow, (n0, n1, n2, n3, n4), (t0, t1, t2) = plain(agent.actor, 0), plain(agent.flow, 0), noise[0], time[0]
    qs, targets, zs = (twins(getattr(agent, name)) for name in ("critic", "target_critic", "upper"))
    noisy, anchor = not settings, lambda obs, a, z, t: (flow(obs, (1 - t) * z + t * a, t) - (a - z)) ** 2
    with torch.no_grad():
        next_actions = actor(batch.next_obs, n0).clamp(-1, 1)
        next_z = torch.stack([z(batch.next_obs, next_actions) for z in (zs if noisy else targets)])
        penalty = anchor(batch.next_obs, next_actions, n0, t0).sum(-1)
        target = batch.rewards + 0.99 * (1 - batch.terminals) * ((next_z.mean(0) if noisy else next_z.amin(0)) - 0.5 * penalty)
        see = lambda n: (n,) if noisy else ()
        critic = sum(((q(batch.obs, batch.actions, *see(n0)) - target) ** 2).mean() for q in qs) / 2  # the noise of a'
        clone = anchor(batch.obs, batch.actions, n1, t1).mean()
        actions = actor(batch.obs, n2)
        terms = [torch.stack([q(batch.obs, actions.clamp(-1, 1), *see(n3)) for q in qs]).mean(0)]
        terms += [torch.stack([z(batch.obs, actions.clamp(-1, 1)) for z in zs]).mean(0)] if noisy else []
        climb = sum(term.mean() / (1 if noisy else term.abs().mean() + 1e-6) for term in terms)
        expected = critic + clone + 2 * anchor(batch.obs, actions, n2, t2).mean() - climb
        if noisy:
            q = torch.stack([q(batch.obs, batch.actions, n4) for q in targets]).mean(0)
            u = torch.stack([q - z(batch.obs, batch.actions) for z in zs])
            expected += ((0.9 - (u < 0).float()).abs() * u**2).mean()
    loss, _ = agent.loss(stacked_batch, noise, time)
    torch.testing.assert_close(loss[0], expected, rtol=1e-4, atol=1e-5)
    parts = {
        "critic": agent.critic_loss(stacked_batch, noise[:, 0], time[:, 0]),
        "flow": agent.flow_loss(stacked_batch, noise[:, 1], time[:, 1]),
        "actor": agent.actor_loss(stacked_batch, noise[:, 2], time[:, 2], noise[:, 3]),
        **({"upper": agent.upper_loss(stacked_batch, noise[:, 4])} if noisy else {}),
    }
    for network, (part, _) in parts.items():
        trained = {name: param for name, param in agent.named_parameters() if param.requires_grad}
        gradients = torch.autograd.grad(part.sum(), list(trained.values()), allow_unused=True)
        assert {name.split(".")[0] for name, gradient in zip(trained, gradients) if gradient is not None} == {network}


# ---- SRPO --------------------------------------------------------------------------------------------------------------


def test_srpos_schedule():
    time = torch.tensor([0.02, 0.5, 0.98], dtype=torch.float64)
    np.testing.assert_allclose(srpo.c_data(time), [0.99701, 0.28118, 0.00801], atol=5e-6)
    np.testing.assert_allclose(srpo.c_noise(time), [0.07721, 0.95965, 0.99997], atol=5e-6)


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_srpos_gradient_is_the_weighted_score_minus_that_of_q(baseline, normalize):
    agent = make_agent(module=srpo, beta=0.7, baseline=baseline, normalize_gradient=normalize)
    (stacked_batch, batch), (time, noise) = one_batch(agent), agent.sample_noise(64, 0.02, 0.98)
    loss, _ = agent.actor_loss(stacked_batch, time, noise)
    ours = torch.autograd.grad(loss.sum(), list(agent.actor.parameters()))
    actor, denoiser = plain(agent.actor, 0), plain(agent.denoiser, 0)
    actions = actor(batch.obs)
    leaf = actions.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(sum(q(batch.obs, leaf) for q in twins(agent.target_critic)).sum() / 2, leaf)
    if normalize:
        gradient = gradient / gradient.square().mean(1, keepdim=True).sqrt()
    with torch.no_grad():
        score = denoiser(srpo.c_data(time[0]) * leaf + srpo.c_noise(time[0]) * noise[0], time[0], batch.obs) - baseline * noise[0]
    direction = (srpo.c_noise(time[0]) ** 2 * score - 0.7 * gradient) / 64
    for one, two in zip(ours, torch.autograd.grad(actions, list(actor.parameters()), direction)):
        torch.testing.assert_close(one[0], two, rtol=1e-3, atol=1e-6)
    assert_step_trains(agent, "step_actor", "actor", stacked_batch, time, noise)


def test_srpos_q_is_iqls_with_v_from_before_the_step():
    agent = make_agent(module=srpo, batch_size=16, tau=0.1, expectile=0.8)
    qs, targets = ([plain(net, 0, i) for i in (0, 1)] for net in (agent.critic, agent.target_critic))
    v = plain(agent.value, 0)
    optimizers = torch.optim.Adam(v.parameters(), 3e-4), torch.optim.Adam([x for q in qs for x in q.parameters()], 3e-4)
    for update in range(3):
        torch.manual_seed(update)
        batch = agent.data.columns(agent.data.rows[torch.randint(512, (1, 16))[0]])
        torch.manual_seed(update)
        agent.update_critic()
        with torch.no_grad():
            q = torch.minimum(*(target(batch.obs, batch.actions)[0] for target in targets))
            target = batch.rewards + 0.99 * (1 - batch.terminals) * v(batch.next_obs)
        u, errors = q - v(batch.obs), [((target - net(batch.obs, batch.actions)[0]) ** 2).mean() for net in qs]
        for optimizer, loss in zip(optimizers, ((torch.where(u < 0, 0.2, 0.8) * u**2).mean(), sum(errors) / 2)):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            for net, moving in zip(qs, targets):
                for own, param in zip(net.parameters(), moving.parameters()):
                    param.lerp_(own, 0.1)
    for name, param in v.named_parameters():
        torch.testing.assert_close(agent.value.get_parameter(name)[0], param, rtol=1e-3, atol=3e-5)
    for i in range(2):
        for name, param in targets[i].named_parameters():
            torch.testing.assert_close(agent.target_critic.get_parameter(name)[0, i], param, rtol=1e-3, atol=3e-5)


def test_srpos_phases_train_their_own_networks():
    agent = make_agent(module=srpo, diffusion_epochs=2, critic_epochs=3, epochs=4)
    assert [agent.phase(epoch) for epoch in range(9)] == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert agent.args.pretrain_steps == 5 * agent.args.steps_per_epoch
    assert agent.args.total_steps == 9 * agent.args.steps_per_epoch
    for (update, _), trained in zip(agent.phases, ({"denoiser"}, {"critic", "value", "target_critic"}, {"actor"})):
        before = snapshot(agent)
        update()
        assert changed_networks(agent, before) == trained


# ---- settings ----------------------------------------------------------------------------------------------------------


def test_siblings_settings_are_the_official_ones():
    assert dql.task_defaults("antmaze-large-play-v2")["eta"] == 4.5
    assert dql.task_defaults("antmaze-large-play-v0")["max_norm"] == 10
    assert dql.task_defaults("pen-cloned-v1")["learning_rate"] == 3e-5
    assert dql.task_defaults("kitchen-complete-v0")["epochs"] == 250
    assert idql.task_defaults("antmaze-umaze-v0")["expectile"] == 0.9 and idql.task_defaults("pen-human-v1")["expectile"] == 0.7
    assert idql.task_defaults("hopper-medium-v2")["batch_size"] == 512
    assert fql.task_defaults("antmaze-large-play-v2")["alpha"] == 3 and fql.task_defaults("antmaze-medium-play-v0")["alpha"] == 10
    assert (
        srpo.task_defaults("antmaze-medium-play-v0")["beta"] == 0.08 and srpo.task_defaults("walker2d-medium-v2")["beta"] == 0.05
    )
    assert (
        srpo.task_defaults("antmaze-umaze-v2")["policy_layers"] == 4 and srpo.task_defaults("pen-human-v1")["policy_layers"] == 2
    )
    assert fql.task_defaults("pen-human-v1")["alpha"] == 10_000 and fql.task_defaults("pen-human-v1")["q_target"] == "min"


def test_iqls_settings_are_the_official_ones():
    got = {
        name: tuple(iql.task_defaults(name)[key] for key in ("expectile", "beta", "dropout", "epochs"))
        for name in (
            "halfcheetah-medium-v2",
            "hopper-medium-expert-v2",
            "antmaze-large-play-v2",
            "pen-human-v1",
            "kitchen-mixed-v0",
            "D4RL/pen/human-v2",
        )
    }
    assert got == {
        "halfcheetah-medium-v2": (0.7, 3, 0, 1000),
        "hopper-medium-expert-v2": (0.5, 6, 0, 1000),
        "antmaze-large-play-v2": (0.9, 10, 0, 1000),
        "pen-human-v1": (0.7, 0.5, 0.1, 1000),
        "kitchen-mixed-v0": (0.7, 0.5, 0.1, 1000),
        "D4RL/pen/human-v2": (0.7, 0.5, 0.1, 1000),
    }
