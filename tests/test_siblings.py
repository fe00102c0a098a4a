"""IDQL, DQL and FQL against closed forms: chains, samplers, losses, what a gradient reaches, settings."""

import difflib
import inspect
import math

import numpy as np
import pytest
import torch
from helpers import ROOT, first, make_agent, make_task, run_script

import dql
import dtql_continuous
import fql
import idql
import iql
import kl_distill
import srpo
from stacked import detach

MODULES = (dtql_continuous, kl_distill, iql, idql, dql, srpo, fql)


def losses_of(agent, network):
    """Model 0's parameters as leaves; `given(...)` lets only `network` have a gradient."""
    params = {
        net: {name: param[0].detach().clone().requires_grad_() for name, param in values.items()}
        for net, values in agent.models.params.items()
    }
    return params, {net: values if net == network else detach(values) for net, values in params.items()}


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


def test_idql_takes_the_best_candidate_and_with_one_clones():
    obs = np.random.default_rng(0).standard_normal((1, 4, 3)).astype(np.float32)
    for candidates in (1, 8):
        agent = make_agent(module=idql, num_candidates=candidates)
        params = agent.models.params
        seen = []
        for sign in (1, -1):
            with torch.no_grad():
                for name, param in params["target_critic"].items():
                    if name == "net.4.weight":
                        param *= sign
            seen.append(agent.best_of(params, obs, torch.Generator().manual_seed(3)))
        assert np.array_equal(*seen) == (candidates == 1)
    # The larger min(Q1, Q2) wins, whatever the order of the candidates
    p = {net: first(params[net]) for net in ("ema_denoiser", "target_critic")}
    z = torch.randn(1, 4, 8, 10)
    with torch.no_grad():
        chosen = agent.best_of.choose({net: params[net].copy() for net in p}, torch.from_numpy(obs), z, torch.zeros(1, 4, 8))
        candidates = agent.sample(p, torch.from_numpy(obs)[0][:, None], z[0])
        q = agent.critic(p["target_critic"], torch.from_numpy(obs)[0][:, None].expand(-1, 8, -1), candidates).amin(0)
    torch.testing.assert_close(chosen[0], candidates[torch.arange(4), q.argmax(1)])


def test_idqls_losses_and_what_they_reach():
    agent = make_agent(module=idql, expectile=0.8)
    batch, step, noise = agent.data.batch(torch.arange(64)), torch.randint(5, (64, 1)), torch.randn(64, 2)
    masks = (torch.rand(3, 64, 256) > 0.1) / 0.9
    params, _ = losses_of(agent, "")
    with torch.no_grad():
        p = {net: detach(values) for net, values in params.items()}
        alpha_bar = torch.tensor(idql.ALPHA_BAR, dtype=torch.float32)[step]
        noisy = alpha_bar.sqrt() * batch.actions + (1 - alpha_bar).sqrt() * noise
        error = agent.denoiser(p["denoiser"], noisy, step.float(), batch.obs, masks) - noise
        u = agent.critic(p["target_critic"], batch.obs, batch.actions).amin(0) - agent.value(p["value"], batch.obs)
        target = batch.rewards + 0.99 * (1 - batch.terminals) * agent.value(p["value"], batch.next_obs)
        expected = {
            "denoiser": (error**2).sum(1).mean(),
            "value": (torch.where(u < 0, 0.2, 0.8) * u**2).mean(),
            "critic": ((agent.critic(p["critic"], batch.obs, batch.actions) - target) ** 2).mean(),
        }
    inputs = {"denoiser": (agent.denoiser_loss, step, noise, masks), "value": (agent.value_loss,), "critic": (agent.critic_loss,)}
    for network, (loss_function, *rest) in inputs.items():
        params, given = losses_of(agent, network)
        loss, _ = loss_function(given, batch, *rest)
        torch.testing.assert_close(loss, expected[network], rtol=1e-4, atol=1e-5)
        loss.backward()
        reached = {net for net, values in params.items() if any(param.grad is not None for param in values.values())}
        assert reached == {network}


def test_idqls_average_and_weight_decay():
    """One update against torch's AdamW on a plain module, and the average of what comes out."""
    agent = make_agent(module=idql, batch_size=16, dropout=0.0, weight_decay=0.3, ema=0.25, epochs=1, steps_per_epoch=4)
    plain, average = idql.Denoiser(3, 2), idql.Denoiser(3, 2)
    for module in (plain, average):
        module.load_state_dict(first(agent.models.params["denoiser"]))
    optimizer = torch.optim.AdamW(plain.parameters(), 3e-4, weight_decay=0.3)
    for update in range(3):
        torch.manual_seed(update)
        batch = agent.data.batch(torch.randint(512, (1, 16))[0])
        step, noise = torch.randint(5, (1, 16, 1))[0], torch.randn(1, 16, 2)[0]
        torch.manual_seed(update)
        agent.update()
        optimizer.param_groups[0]["lr"] = 3e-4 * (1 + math.cos(math.pi * update / 4)) / 2
        optimizer.zero_grad()
        idql.denoising_loss(plain, batch.actions, batch.obs, step, noise).backward()
        optimizer.step()
        with torch.no_grad():
            for moving, own in zip(average.parameters(), plain.parameters()):
                moving.lerp_(own, 0.25)
    for network, module in (("denoiser", plain), ("ema_denoiser", average)):
        for name, param in module.named_parameters():
            torch.testing.assert_close(agent.models.params[network][name][0], param, rtol=1e-3, atol=2e-5)


# ---- DQL ---------------------------------------------------------------------------------------------------------------


def test_dql_without_q_is_cloning():
    """With eta = 0 the gradient is that of the denoising loss, and one candidate does not look at Q."""
    agent = make_agent(module=dql, eta=0.0, num_candidates=1)
    batch, step, noise = agent.data.batch(torch.arange(64)), torch.randint(5, (64, 1)), torch.randn(64, 2)
    params, given = losses_of(agent, "denoiser")
    loss, _ = agent.denoiser_loss(given, batch, step, noise, torch.randn(64, 10), torch.tensor(0.2))
    gradients = torch.autograd.grad(loss, list(params["denoiser"].values()))
    plain = dql.Denoiser(3, 2)
    plain.load_state_dict(first(agent.models.params["denoiser"]))
    clone = dql.denoising_loss(plain, batch.actions, batch.obs, step, noise)
    for ours, expected in zip(gradients, torch.autograd.grad(clone, list(plain.parameters()))):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    assert agent.best_of.q is None


@pytest.mark.parametrize(("coin", "up", "other"), [(0.3, 0, 1), (0.7, 1, 0)])
def test_dqls_policy_climbs_one_q_over_the_size_of_the_other(coin, up, other):
    agent = make_agent(module=dql, eta=3.0)
    batch, step, noise = agent.data.batch(torch.arange(64)), torch.randint(5, (64, 1)), torch.randn(64, 2)
    z = torch.randn(64, 10)
    params, given = losses_of(agent, "denoiser")
    loss, _ = agent.denoiser_loss(given, batch, step, noise, z, torch.tensor(coin))
    clone = dql.denoising_loss(lambda *x: agent.denoiser(params["denoiser"], *x), batch.actions, batch.obs, step, noise)
    q = agent.critic(detach(params["critic"]), batch.obs, agent.chain(params["denoiser"], batch.obs, z))
    expected = clone - 3 * q[up].mean() / q[other].abs().mean().detach()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    names = list(params["denoiser"])
    ours = torch.autograd.grad(loss, [params["denoiser"][name] for name in names], retain_graph=True)
    theirs = torch.autograd.grad(expected, [params["denoiser"][name] for name in names])
    for one, two in zip(ours, theirs):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("samples", [1, 10])
def test_dqls_target_is_the_smaller_q_of_the_best_next_action(samples):
    agent = make_agent(module=dql)
    batch, z = agent.data.batch(torch.arange(32)), torch.randn(samples, 32, 10)
    params, given = losses_of(agent, "critic")
    loss, _ = agent.critic_loss(given, batch, z)
    with torch.no_grad():
        p = {net: detach(values) for net, values in params.items()}
        values = []
        for one in z:
            actions = agent.chain(p["ema_denoiser"], batch.next_obs, one)
            values.append(agent.critic(p["target_critic"], batch.next_obs, actions))
        next_q = torch.stack(values).amax(0).amin(0)
        target = batch.rewards + 0.99 * (1 - batch.terminals) * next_q
        q = agent.critic(p["critic"], batch.obs, batch.actions)
    torch.testing.assert_close(loss, ((q[0] - target) ** 2).mean() + ((q[1] - target) ** 2).mean(), rtol=1e-4, atol=1e-5)
    loss.backward()
    assert {net for net, values in params.items() if any(x.grad is not None for x in values.values())} == {"critic"}


def test_dqls_order_clipping_and_average():
    """Updates 998 to 1005 against plain modules: Qs, policy with the new Qs, average at 1000 and 1005, targets."""
    agent = make_agent(module=dql, batch_size=16, tau=0.1, ema=0.3, max_norm=0.5, eta=1.0)
    agent.train_step.fill_(998)
    params = agent.models.params
    before = {net: {name: param.detach().clone() for name, param in values.items()} for net, values in params.items()}
    policy, average = dql.Denoiser(3, 2), dql.Denoiser(3, 2)
    policy.load_state_dict(first(params["denoiser"]))
    average.load_state_dict(first(params["ema_denoiser"]))
    qs, targets = ([dql.Critic(3, 2) for _ in range(2)] for _ in range(2))
    for i in range(2):
        qs[i].load_state_dict(first(first(params["critic"]), i))
        targets[i].load_state_dict(first(first(params["target_critic"]), i))
    both = [param for q in qs for param in q.parameters()]
    optimizers = torch.optim.Adam(both, 3e-4), torch.optim.Adam(policy.parameters(), 3e-4)
    chain = lambda net, obs, z: dql.sample_chain(lambda x, i: net(x, torch.full_like(x[..., :1], i), obs), z)
    for update in range(998, 1006):
        torch.manual_seed(update)
        batch = agent.data.batch(torch.randint(512, (1, 16))[0])
        step, noise, z = torch.randint(5, (1, 16, 1))[0], torch.randn(1, 16, 2)[0], torch.randn(1, 16, 10)[0]
        next_z, coin = torch.randn(1, 1, 16, 10)[0, 0], torch.rand(1)[0]
        torch.manual_seed(update)
        agent.update()
        with torch.no_grad():
            next_actions = chain(average, batch.next_obs, next_z)
            next_q = torch.minimum(*(q(batch.next_obs, next_actions) for q in targets))
            target = batch.rewards + 0.99 * (1 - batch.terminals) * next_q
        optimizers[0].zero_grad()
        sum(((q(batch.obs, batch.actions) - target) ** 2).mean() for q in qs).backward()
        torch.nn.utils.clip_grad_norm_(both, 0.5)
        optimizers[0].step()
        optimizers[1].zero_grad()
        q = [net(batch.obs, chain(policy, batch.obs, z)) for net in qs]
        one, other = q if coin < 0.5 else q[::-1]
        clone = dql.denoising_loss(policy, batch.actions, batch.obs, step, noise)
        (clone - one.mean() / other.abs().mean().detach()).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
        optimizers[1].step()
        with torch.no_grad():
            if update in (1000, 1005):
                for moving, own in zip(average.parameters(), policy.parameters()):
                    moving.lerp_(own, 0.3)
            for net, moving in zip(qs, targets):
                for own, param in zip(net.parameters(), moving.parameters()):
                    param.lerp_(own, 0.1)
    for network, module in (("denoiser", policy), ("ema_denoiser", average)):
        for name, param in module.named_parameters():
            error, moved = params[network][name][0] - param, param - before[network][name][0]
            assert error.norm() < 0.01 * moved.norm(), f"{network}.{name}"
    for i in range(2):
        for name, param in targets[i].named_parameters():
            torch.testing.assert_close(params["target_critic"][name][0, i], param, rtol=1e-3, atol=3e-5, check_layout=False)


def test_dqls_rewards():
    task = make_task(np.zeros((3, 1)), np.zeros((3, 1)), np.array([0.0, 1.0, 2.0]), np.zeros(3), np.zeros((3, 1)))
    np.testing.assert_allclose(dql.transform_rewards(task._replace(sparse_goal=True), "antmaze-umaze-v0"), [-2, 2, 6])
    np.testing.assert_allclose(dql.transform_rewards(task, "pen-human-v1"), [-1, 0, 1])
    np.testing.assert_allclose(dql.transform_rewards(task, "hopper-medium-v2"), [0, 1, 2])


# ---- FQL ---------------------------------------------------------------------------------------------------------------


def gaussian_velocity(mean: float, std: float):
    """E[a - x_0 | x_t] for a ~ N(mean, std^2), x_0 ~ N(0, 1) independent, x_t = (1 - t) x_0 + t a."""
    return lambda x, t: mean + (t * std**2 - (1 - t)) / (t**2 * std**2 + (1 - t) ** 2) * (x - t * mean)


def test_fqls_flow_of_a_gaussian_is_the_known_map():
    """x_0 = z goes to mean + std z, for ever smaller Euler steps."""
    z, exact = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None], gaussian_velocity(0.3, 0.2)
    errors = [(fql.euler(exact, z, steps) - (0.3 + 0.2 * z)).abs().max().item() for steps in (10, 100, 1000)]
    assert errors[0] < 0.2 and errors[1] < errors[0] / 5 and errors[2] < 2e-3


def test_flow_matching_is_least_at_the_conditional_velocity():
    torch.manual_seed(0)
    actions, noise, time = 0.3 + 0.2 * torch.randn(100_000, 1), torch.randn(100_000, 1), torch.rand(100_000, 1)
    exact = gaussian_velocity(0.3, 0.2)
    best = fql.flow_loss(exact, actions, noise, time)
    for change in (lambda x, t: 0.05 + 0 * x, lambda x, t: 0.1 * x, lambda x, t: 0.1 * t * x, lambda x, t: -0.1 * x):
        for sign in (1, -1):
            assert fql.flow_loss(lambda x, t: exact(x, t) + sign * change(x, t), actions, noise, time) > best


def test_fqls_one_step_policy_follows_the_flow_when_alpha_is_large():
    """Trained with nothing but its loss, at alpha = 1e6, beside a fixed flow."""
    agent = make_agent(module=fql, alpha=1e6)
    with torch.no_grad():
        for name, param in agent.models.params["flow"].items():
            param *= 0.5 if name.endswith("weight") else 1  # a flow that leaves room inside [-1, 1]
    params, given = losses_of(agent, "actor")
    optimizer = torch.optim.Adam(params["actor"].values(), 1e-3)
    batch = agent.data.batch(torch.arange(64))
    for step in range(300):
        loss, metrics = agent.actor_loss(given, batch, torch.randn(64, 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 300)
        optimizer.step()
    noise = torch.randn(64, 2)
    with torch.no_grad():
        flow = fql.euler(agent.velocity(detach(params["flow"]), batch.obs), noise, 10).clamp(-1, 1)
        error = agent.actor(detach(params["actor"]), batch.obs, noise) - flow
    assert error.square().mean() < 0.02 * flow.var()


def test_fqls_losses_and_what_they_reach():
    agent = make_agent(module=fql, alpha=2.0)
    batch, noise, time = agent.data.batch(torch.arange(64)), torch.randn(3, 64, 2), torch.rand(64, 1)
    params, _ = losses_of(agent, "")
    with torch.no_grad():
        p = {net: detach(values) for net, values in params.items()}
        next_actions = agent.actor(p["actor"], batch.next_obs, noise[0]).clamp(-1, 1)
        target = batch.rewards + 0.99 * (1 - batch.terminals) * agent.critic(
            p["target_critic"], batch.next_obs, next_actions
        ).mean(0)
        critic = ((agent.critic(p["critic"], batch.obs, batch.actions) - target) ** 2).mean()
        x = (1 - time) * noise[1] + time * batch.actions
        flow = ((agent.flow(p["flow"], batch.obs, x, time) - (batch.actions - noise[1])) ** 2).mean()
        goal = noise[2]
        for i in range(10):
            goal = goal + agent.flow(p["flow"], batch.obs, goal, torch.full((64, 1), i / 10)) / 10
        actions = agent.actor(p["actor"], batch.obs, noise[2])
        distillation = ((actions - goal.clamp(-1, 1)) ** 2).mean()
        q = agent.critic(p["critic"], batch.obs, actions.clamp(-1, 1)).mean()
    expected = critic + flow + 2 * distillation - q
    loss, _ = agent.loss(params, batch, noise, time)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    reach = {"critic": agent.critic_loss, "flow": agent.clone_loss, "actor": agent.actor_loss}
    arguments = {"critic": (noise[0],), "flow": (noise[1], time), "actor": (noise[2],)}
    for network, part in reach.items():
        params, _ = losses_of(agent, "")
        part(params | {"target_critic": detach(params["target_critic"])}, batch, *arguments[network])[0].backward()
        assert {net for net, values in params.items() if any(x.grad is not None for x in values.values())} - {"settings"} == {
            network
        }


def test_fqls_target_and_normalisation():
    for settings, check in (({"q_target": "min"}, "min"), ({"normalize_q": True}, "scale")):
        agent, plain = make_agent(module=fql, **settings), make_agent(module=fql)
        batch, noise = agent.data.batch(torch.arange(64)), torch.randn(64, 2)
        params, _ = losses_of(agent, "")
        p = {net: detach(values) for net, values in params.items()}
        if check == "min":
            next_actions = agent.actor(p["actor"], batch.next_obs, noise).clamp(-1, 1)
            next_q = agent.critic(p["target_critic"], batch.next_obs, next_actions).amin(0)
            target = batch.rewards + 0.99 * (1 - batch.terminals) * next_q
            expected = ((agent.critic(p["critic"], batch.obs, batch.actions) - target) ** 2).mean()
            torch.testing.assert_close(agent.critic_loss(p, batch, noise)[0], expected)
        else:
            actions = agent.actor(p["actor"], batch.obs, noise).clamp(-1, 1)
            q = agent.critic(p["critic"], batch.obs, actions).mean(0)
            difference = agent.actor_loss(p, batch, noise)[0] - plain.actor_loss(p, batch, noise)[0]
            torch.testing.assert_close(difference, q.mean() - q.mean() / q.abs().mean(), rtol=1e-3, atol=1e-4)


# ---- SRPO --------------------------------------------------------------------------------------------------------------


def test_srpos_schedule():
    time = torch.tensor([0.02, 0.5, 0.98], dtype=torch.float64)
    np.testing.assert_allclose(srpo.alpha(time), [0.99701, 0.28118, 0.00801], atol=5e-6)
    np.testing.assert_allclose(srpo.sigma(time), [0.07721, 0.95965, 0.99997], atol=5e-6)


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_srpos_gradient_is_the_weighted_score_minus_that_of_q(baseline, normalize):
    agent = make_agent(module=srpo, beta=0.7, baseline=baseline, normalize_gradient=normalize)
    batch, (time, noise) = agent.data.batch(torch.arange(64)), (x[0] for x in agent.noise(64, 0.02, 0.98))
    params, given = losses_of(agent, "actor")
    loss, _ = agent.actor_loss(given, batch, time, noise)
    names = list(params["actor"])
    ours = torch.autograd.grad(loss, [params["actor"][name] for name in names])
    actions = agent.actor(params["actor"], batch.obs)
    leaf = actions.detach().requires_grad_()
    q = agent.critic(detach(params["target_critic"]), batch.obs, leaf)
    (gradient,) = torch.autograd.grad((0.5 * (q[0] + q[1])).sum(), leaf)
    if normalize:
        gradient = gradient / gradient.square().mean(1, keepdim=True).sqrt()
    with torch.no_grad():
        noisy = srpo.alpha(time) * leaf + srpo.sigma(time) * noise
        score = agent.denoiser(detach(params["denoiser"]), noisy, time, batch.obs) - baseline * noise
    direction = (srpo.sigma(time) ** 2 * score - 0.7 * gradient) / 64
    for one, two in zip(ours, torch.autograd.grad(actions, [params["actor"][name] for name in names], direction)):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)


def test_srpo_without_q_climbs_a_known_density():
    """With beta = 0 and the exact noise of a ~ N(0.3, 0.2^2), an action comes to rest at the mode."""
    torch.manual_seed(0)
    action = torch.tensor([[-0.8]], requires_grad=True)
    optimizer = torch.optim.Adam([action], 0.02)
    for step in range(400):
        time, noise = 0.02 + 0.96 * torch.rand(256, 1), torch.randn(256, 1)
        a, s = srpo.alpha(time), srpo.sigma(time)
        predicted = s * (a * action.detach() + s * noise - a * 0.3) / (a**2 * 0.2**2 + s**2)
        loss = srpo.surrogate(action.expand(256, 1), predicted, torch.zeros(256, 1), time, 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 400)
        optimizer.step()
    assert action.item() == pytest.approx(0.3, abs=0.05)


def test_srpos_q_is_iqls_with_v_from_before_the_step():
    agent = make_agent(module=srpo, batch_size=16, tau=0.1, expectile=0.8)
    params = agent.models.params
    qs, targets = ([srpo.Critic(3, 2) for _ in range(2)] for _ in range(2))
    for i in range(2):
        qs[i].load_state_dict(first(first(params["critic"]), i))
        targets[i].load_state_dict(first(first(params["target_critic"]), i))
    v = srpo.Value(3)
    v.load_state_dict(first(params["value"]))
    optimizers = torch.optim.Adam(v.parameters(), 3e-4), torch.optim.Adam([x for q in qs for x in q.parameters()], 3e-4)
    for update in range(3):
        torch.manual_seed(update)
        batch = agent.data.batch(torch.randint(512, (1, 16))[0])
        torch.manual_seed(update)
        agent.update_critic()
        with torch.no_grad():
            next_v = v(batch.next_obs)
            q = torch.minimum(*(target(batch.obs, batch.actions) for target in targets))
        target = batch.rewards + 0.99 * (1 - batch.terminals) * next_v
        errors = [((target - net(batch.obs, batch.actions)) ** 2).mean() for net in qs]
        losses = srpo.expectile_loss(q - v(batch.obs), 0.8), sum(errors) / 2
        for optimizer, loss in zip(optimizers, losses):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            for net, target in zip(qs, targets):
                for own, moving in zip(net.parameters(), target.parameters()):
                    moving.lerp_(own, 0.1)
    for name, param in v.named_parameters():
        torch.testing.assert_close(params["value"][name][0], param, rtol=1e-3, atol=3e-5)
    for i in range(2):
        for name, param in targets[i].named_parameters():
            torch.testing.assert_close(params["target_critic"][name][0, i], param, rtol=1e-3, atol=3e-5, check_layout=False)


def test_srpos_phases_train_their_own_networks():
    agent = make_agent(module=srpo, diffusion_epochs=2, critic_epochs=3, epochs=4)
    assert [agent.phase(epoch) for epoch in range(9)] == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert (
        agent.args.pretrain_steps == 5 * agent.args.steps_per_epoch and agent.args.total_steps == 9 * agent.args.steps_per_epoch
    )
    for (update, _), trained in zip(agent.phases, ({"denoiser"}, {"critic", "value", "target_critic"}, {"actor"})):
        before = {
            net: {name: param.detach().clone() for name, param in values.items()} for net, values in agent.models.params.items()
        }
        update()
        changed = {
            net
            for net, values in agent.models.params.items()
            if any((values[name] != before[net][name]).any() for name in values)
        }
        assert changed == trained


# ---- all of them -------------------------------------------------------------------------------------------------------


def test_settings_are_the_official_ones():
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


@pytest.mark.parametrize(
    ("one", "other", "most"),
    [("idql", "dql", 325), ("iql", "idql", 290), ("idql", "srpo", 385), ("dtql_continuous", "fql", 500)],
)
def test_neighbours_differ_in_what_their_heads_say(one, other, most):
    """`diff` of two neighbours shows their samplers, losses and uses of Q, not the rest: what they share is the same text."""
    files = [(ROOT / f"{name}.py").read_text().splitlines() for name in (one, other)]
    diff = [line for line in difflib.unified_diff(*files, n=0) if line[0] in "+-" and line[:3] not in ("+++", "---")]
    assert len(diff) < most
    for name in ("expectile_loss", "add_noise", "xavier"):  # q_target takes the next V or the next Q
        functions = [inspect.getsource(getattr(module, name)) for module in MODULES if hasattr(module, name)]
        bodies = {function.partition('"""')[2].partition('"""')[2] for function in functions}
        assert len(bodies) == 1 or not functions, name


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("idql.py", ["--dropout", "1"], "--dropout"),
        ("dql.py", ["--eta", "-1"], "--eta"),
        ("dql.py", ["--max-norm", "0"], "--max-norm"),
        ("srpo.py", ["--beta", "-1"], "--beta"),
        ("srpo.py", ["--critic-epochs", "-1"], "--critic-epochs"),
        ("fql.py", ["--alpha", "nan"], "--alpha"),
        ("fql.py", ["--flow-steps", "0"], "--flow-steps"),
    ],
)
def test_bad_input(script, flags, message):
    result = run_script(*flags, script=script)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and message in result.stderr
