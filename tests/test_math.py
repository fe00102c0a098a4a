"""The method's mathematics against closed forms."""

import copy
import math

import common
import dtql_continuous as dtql
import gymnasium as gym
import kl_distill
import numpy as np
import pytest
import torch
from conftest import TINY
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def make_agent(num_seeds: int = 1, obs_dim: int = 3, action_dim: int = 2, rows: int = 512, module=dtql, device="cpu",
               **changes):
    """An agent of `module` on random transitions."""

    class Env(gym.Env):
        observation_space = gym.spaces.Box(-np.inf, np.inf, (obs_dim,))
        action_space = gym.spaces.Box(-2.0, 4.0, (action_dim,))

    rng = np.random.default_rng(0)
    data = (rng.standard_normal((rows, obs_dim)), rng.uniform(-1, 1, (rows, action_dim)), rng.standard_normal(rows),
            rng.random(rows) < 0.1, rng.standard_normal((rows, obs_dim)))
    task = common.Task(*(np.asarray(x, np.float32) for x in data), Env, lambda x: x, "return", False, "test")
    agent = dtql.DTQL if module is dtql else module.KLDistill
    settings = {**TINY, "num_seeds": num_seeds, "cuda": device == "cuda", **changes}
    return agent(module.Args(**settings), task, torch.device(device))


def first(params: dict[str, Tensor], index: int = 0) -> dict[str, Tensor]:
    return {name: param[index] for name, param in params.items()}


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
    seen = {}

    class Spy(dtql.Denoiser):
        pass

    torch.manual_seed(0)
    for sigma in (0.01, 0.5, 5.0, 50.0):
        a, noise = 0.5 * torch.randn(100_000, 1), torch.randn(100_000, 1)
        level = torch.full((100_000, 1), sigma)
        net = Spy(0, 1)
        net.input.register_forward_pre_hook(lambda *_: None)
        # The input layer sees c_in * a_t: read it back through an identity weight
        with torch.no_grad():
            net.input.weight.zero_()
            net.input.weight[0, 0] = 1
            net.input.bias.zero_()
        net.net = torch.nn.Module()
        net.net.forward = lambda x: seen.setdefault("input", x)[..., :1] * 0
        seen.clear()
        skip = net(a + sigma * noise, level, torch.zeros(100_000, 0))  # the output is 0: only c_skip * a_t is left
        assert seen["input"][:, 0].var().item() == pytest.approx(1, rel=0.02)
        target = (a - skip) / dtql.c_out(level)
        assert target.var().item() == pytest.approx(1, rel=0.02)


def test_denoiser_learns_the_posterior_mean_of_gaussian_data():
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


def test_trust_region_loss_prefers_the_modes():
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
    rows = agent.data[:64]
    obs, actions, rewards, terminals, next_obs = rows.split(agent.widths, 1)
    rewards, terminals = rewards.squeeze(1), terminals.squeeze(1)
    qs, v = [dtql.Critic(3, 2), dtql.Critic(3, 2)], dtql.Value(3)
    for i, q in enumerate(qs):
        q.load_state_dict(first(first(agent.params["critic"]), i), strict=True)
    v.load_state_dict(first(agent.params["value"]))

    critic = {name: param[0].detach().requires_grad_() for name, param in agent.params["critic"].items()}
    value = {name: param[0].detach().requires_grad_() for name, param in agent.params["value"].items()}
    loss, metrics = agent.critic_loss(critic, value, dtql.Batch(obs, actions, rewards, terminals, next_obs))
    loss.backward()

    with torch.no_grad():
        q_data = torch.minimum(qs[0](obs, actions), qs[1](obs, actions))
        target = rewards + 0.99 * (1 - terminals) * v(next_obs)
    u = q_data - v(obs)
    value_loss = (torch.where(u < 0, 1 - agent.args.expectile, agent.args.expectile) * u**2).mean()
    critic_loss = sum(((target - q(obs, actions)) ** 2).mean() for q in qs)
    (value_loss + critic_loss).backward()
    torch.testing.assert_close(metrics, torch.stack((critic_loss, value_loss)).detach())
    for name, param in v.named_parameters():
        torch.testing.assert_close(value[name].grad, param.grad)
    for i, q in enumerate(qs):
        for name, param in q.named_parameters():
            torch.testing.assert_close(critic[name].grad[i], param.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("policy", ["gaussian", "implicit"])
def test_policy_loss_is_equation_5_and_reaches_theta_only(policy):
    agent = make_agent(policy=policy, nll=policy == "gaussian", alpha=3.0)
    params = {net: {name: param[0].detach().requires_grad_() for name, param in agent.params[net].items()}
              for net in ("actor", "denoiser", "critic")}
    obs, actions, rewards, terminals, next_obs = agent.data[:64].split(agent.widths, 1)
    batch = dtql.Batch(obs, actions, rewards[:, 0], terminals[:, 0], next_obs)
    torch.manual_seed(1)
    z, noise, sigma = torch.randn(64, 2), torch.randn(64, 2), dtql.sample_sigma(torch.rand(64, 1))
    frozen = (dtql.detach(params["denoiser"]), dtql.detach(params["critic"]))
    loss, metrics = agent.actor_loss(params["actor"], *frozen, batch, z, sigma, noise)
    loss.backward()
    assert all(param.grad is not None and param.grad.abs().sum() > 0 for param in params["actor"].values())
    assert all(param.grad is None for net in ("denoiser", "critic") for param in params[net].values())

    qs, denoiser = [dtql.Critic(3, 2), dtql.Critic(3, 2)], dtql.Denoiser(3, 2)
    actor = dtql.GaussianActor(3, 2) if policy == "gaussian" else dtql.ImplicitActor(3, 2)
    actor.load_state_dict(dtql.detach(params["actor"]))
    denoiser.load_state_dict(dtql.detach(params["denoiser"]))
    for i, q in enumerate(qs):
        q.load_state_dict(first(dtql.detach(params["critic"]), i))
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
    # No activation after the denoiser's first layer, and the time embedding is sin then cos of 10000^(-i/7) c_noise
    torch.testing.assert_close(denoiser.frequencies, torch.tensor([10000 ** (-i / 7) for i in range(8)]))


def test_first_layer_is_that_of_the_concatenation():
    layer, x, y = torch.nn.Linear(5, 4), torch.randn(6, 1, 3), torch.randn(6, 10, 2)
    expected = layer(torch.cat((x.expand(6, 10, 3), y), -1))
    torch.testing.assert_close(dtql.linear_of_cat(layer, x, y), expected)


def test_candidates_are_chosen_with_softmax_of_the_smaller_target_q():
    agent = make_agent()
    policy = agent.policy
    torch.manual_seed(0)
    actor, critic = first(agent.params["actor"]), first(agent.params["target_critic"])
    critic = {name: param * (40 if name == "net.8.weight" else 1) for name, param in critic.items()}
    obs, candidates = torch.randn(1, 3), 6
    z = torch.randn(1, candidates, 2)
    with torch.no_grad():
        actions = policy.sample(actor, obs[:, None], z)
        q = policy.q(critic, obs[:, None], actions)
        probabilities = torch.softmax(q.amin(0)[0], 0)
        draws = 40_000
        gumbel = -torch.log(torch.empty(draws, candidates).exponential_())
        models = ({name: param[None] for name, param in net.items()} for net in (actor, critic))
        (chosen,) = policy.choose(*models, obs.expand(1, draws, 3), z.expand(1, draws, candidates, 2), gumbel[None])
    which = (chosen[:, None] - actions).abs().sum(-1).argmin(1)
    frequencies = torch.bincount(which, minlength=candidates) / draws
    assert probabilities.max() < 0.9 and probabilities.max() - probabilities.min() > 0.1  # a test that can fail
    assert (frequencies - probabilities).abs().max() < 0.015


@pytest.mark.parametrize(("excess", "spread", "blocks"), [(0, 1, {1}), (0, 300, {2, 3, 4, 5}), (40, 1, {16})])
def test_the_second_q_is_asked_until_nothing_that_is_left_can_win(monkeypatch, excess, spread, blocks):
    """The choice is that of all 1024 minima, whether the Qs agree, disagree widely or one is far above the other."""
    agent = make_agent(num_seeds=2)
    policy, critic, asked = agent.policy, agent.params["target_critic"], []
    second = policy.second_all
    monkeypatch.setattr(policy, "second_all", lambda *args: (asked.append(1), second(*args))[1])
    torch.manual_seed(0)
    obs, z = torch.randn(2, 5, 3), torch.randn(2, 5, 1024, 2)
    gumbel = -torch.log(torch.empty(2, 5, 1024).exponential_())
    with torch.no_grad():
        critic["net.8.weight"] *= spread
        critic["net.8.bias"][:, 0] += excess
        chosen = policy.choose(agent.params["actor"], critic, obs, z, gumbel)
        for model in range(2):
            actor, twins = first(agent.params["actor"], model), first(critic, model)
            candidates = policy.sample(actor, obs[model, :, None], z[model])
            scores = policy.q(twins, obs[model, :, None], candidates).amin(0) + gumbel[model]
            torch.testing.assert_close(chosen[model], candidates[torch.arange(5), scores.argmax(1)])
    assert len(asked) in blocks


def test_actions_are_in_the_environments_units():
    agent = make_agent(num_seeds=2)  # actions of this environment lie in [-2, 4]
    with torch.no_grad():
        agent.params["actor"]["net.6.bias"][0, :2] = 100.0  # model 0 always takes the upper bound
        agent.params["actor"]["net.6.bias"][1, :2] = -100.0
    generator = torch.Generator().manual_seed(0)
    actions = agent.policy.act(agent.params["actor"], agent.params["target_critic"], np.zeros((2, 5, 3)), generator)
    assert actions.shape == (2, 5, 2)
    np.testing.assert_allclose(actions[0], 4.0, atol=1e-4)
    np.testing.assert_allclose(actions[1], -2.0, atol=1e-4)


def assert_learning_rates_follow_the_cosine(**settings) -> None:
    agent = make_agent(lr_decay=True, epochs=2, steps_per_epoch=5, learning_rate=1e-4, **settings)
    rates = lambda: [optimizer.param_groups[0]["lr"].item() for optimizer in agent.optimizers.values()]
    agent.make_update(training=False)()
    assert rates() == pytest.approx([3e-4, 1e-4, 1e-4])
    update = agent.make_update(training=True)
    for step in range(10):
        update()
        factor = (1 + math.cos(math.pi * step / 10)) / 2
        assert rates() == pytest.approx([3e-4 * factor, 1e-4 * factor, 1e-4 * factor], rel=1e-5)


def test_learning_rates_follow_the_cosine_after_pretraining():
    assert_learning_rates_follow_the_cosine()


def test_targets_follow_only_in_training():
    agent = make_agent(tau=0.25)
    before = agent.params["target_critic"]["input.weight"].clone()
    agent.update(training=False)
    torch.testing.assert_close(agent.params["target_critic"]["input.weight"], before, rtol=0, atol=0)
    agent.start_training()
    online = agent.params["critic"]["input.weight"].detach().clone()
    torch.testing.assert_close(agent.params["target_critic"]["input.weight"], online, rtol=0, atol=0)
    agent.update(training=True)
    moved = agent.params["critic"]["input.weight"].detach()
    torch.testing.assert_close(agent.params["target_critic"]["input.weight"], 0.75 * online + 0.25 * moved)


def test_models_do_not_touch_each_other():
    """Model 1's updates are the same to the bit whatever model 0's weights are."""
    results = []
    for scale in (1.0, 3.0):
        agent = make_agent(num_seeds=3)
        with torch.no_grad():
            for network in agent.params.values():
                for param in network.values():
                    param[0] *= scale
        torch.manual_seed(5)
        for _ in range(3):
            agent.update(training=True)
        results.append(agent.params)
    for network in results[0]:
        for name in results[0][network]:
            assert torch.equal(results[0][network][name][1:], results[1][network][name][1:]), (network, name)
            assert not torch.equal(results[0][network][name][0], results[1][network][name][0]), (network, name)


def test_model_i_starts_as_a_single_run_of_its_seed():
    many, single = make_agent(num_seeds=3, seed=4), make_agent(num_seeds=1, seed=6)
    for network, params in single.params.items():
        for name, param in params.items():
            assert torch.equal(many.params[network][name][2], param[0]), (network, name)


def test_stacked_update_is_the_plain_modules_update():
    """One stacked critic step against torch.nn modules and their own Adam, on the same batch."""
    agent = make_agent(num_seeds=2, batch_size=16)
    plain = []
    for k in range(2):
        qs = [dtql.Critic(3, 2), dtql.Critic(3, 2)]
        for i, q in enumerate(qs):
            q.load_state_dict(first(first(agent.params["critic"], k), i))
        v = dtql.Value(3)
        v.load_state_dict(first(agent.params["value"], k))
        plain.append((qs, v))
    torch.manual_seed(3)
    indices = torch.randint(len(agent.data), (2, 16))
    torch.manual_seed(3)
    agent.update(training=False)
    for k, (qs, v) in enumerate(plain):
        obs, actions, rewards, terminals, next_obs = agent.data[indices[k]].split(agent.widths, 1)
        optimizer = torch.optim.Adam([p for net in (*qs, v) for p in net.parameters()], 3e-4)
        with torch.no_grad():
            target = rewards[:, 0] + 0.99 * (1 - terminals[:, 0]) * v(next_obs)
            q_data = torch.minimum(qs[0](obs, actions), qs[1](obs, actions))
        loss = dtql.expectile_loss(q_data - v(obs), 0.9) + sum(((target - q(obs, actions)) ** 2).mean() for q in qs)
        loss.backward()
        optimizer.step()
        for name, param in v.named_parameters():
            torch.testing.assert_close(agent.params["value"][name][k].detach(), param.detach(), rtol=1e-4, atol=2e-5)


def run_updates(agent, each: int) -> dict[str, dict[str, Tensor]]:
    """Pretraining and training as `main` does them, with the same random numbers for every agent. Returns where it began."""
    before = copy.deepcopy(agent.params)
    torch.manual_seed(7)
    for training in (False, True):
        update = agent.make_update(training)
        if training:
            agent.start_training()
        for _ in range(each):
            update()
    return before


def assert_updates_agree(agent, reference, before) -> None:
    """Losses are equal up to rounding. Parameters nearly so: now and then rounding moves a ReLU or a minimum to its other side."""
    torch.testing.assert_close(agent.sums, reference.sums, rtol=2e-3, atol=2e-3)
    for network, params in reference.params.items():
        for name, param in params.items():
            error, moved = agent.params[network][name] - param, param - before[network][name]
            assert error.norm() <= 0.1 * moved.norm(), f"{network}.{name}"


def test_compiled_and_eager_updates_agree():
    agents = [make_agent(2, 11, 3, compile=compiled, lr_decay=True, epochs=10) for compiled in (False, True)]
    for agent in agents:
        run_updates(agent, each=2)
    for network, params in agents[0].params.items():
        for name, param in params.items():
            torch.testing.assert_close(agents[1].params[network][name], param, rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(agents[0].sums, agents[1].sums, rtol=1e-3, atol=1e-3)
    before = [run_updates(agent, each=100) for agent in agents]
    assert_updates_agree(agents[1], agents[0], before[0])


# What a CUDA graph cannot hold: the host reading a tensor or making one from its own numbers, shapes that depend on values
NOT_IN_A_GRAPH = {"_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}


@pytest.mark.parametrize("module, changes", [
    (dtql, {}), (dtql, dict(policy="implicit", nll=False)), (dtql, dict(lr_decay=True, num_seeds=3)),
    (kl_distill, dict(lr_decay=True)),
])
def test_an_update_can_be_captured(module, changes):
    """Nothing in it waits for the device, and all that it changes is put back after the warm-up: the agent's state."""

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function._schema.name.removeprefix("aten::") not in NOT_IN_A_GRAPH
            return function(*args, **(kwargs or {}))

    agent = make_agent(module=module, **changes)
    tensors, state = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in (vars(agent), agent.state_dict()))
    for training in (False, True):
        before = [x.clone() for x in tensors]
        with Spy():
            agent.update(training)
        changed = [x for x, old in zip(tensors, before) if not torch.equal(x, old)]
        assert len(changed) > 10 and {x.data_ptr() for x in changed} <= {x.data_ptr() for x in state}
