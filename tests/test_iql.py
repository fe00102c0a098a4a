"""IQL: its losses, weights and reward transform against closed forms; settings; kinship with bc.py."""

import math
import re

import numpy as np
import pytest
import torch
from helpers import ROOT, first, make_agent, make_args, make_task, run_script

import data
import iql
from common import UserError
from stacked import detach


def plain_modules(agent):
    """Model 0 of an agent as plain modules: Qs, target Qs, V, policy."""
    params = agent.models.params
    twins = [[iql.Critic(3, 2), iql.Critic(3, 2)] for _ in range(2)]
    for qs, network in zip(twins, ("critic", "target_critic")):
        for i, q in enumerate(qs):
            q.load_state_dict(first(first(params[network]), i))
    v, actor = iql.Value(3), iql.GaussianActor(3, 2)
    v.load_state_dict(first(params["value"]))
    actor.load_state_dict(first(params["actor"]))
    return *twins, v, actor


def test_advantage_weights_have_their_ceiling():
    weights = iql.advantage_weights(torch.tensor([-1.0, 0.0, 0.5, math.log(100) / 3, 2.0, 1000.0]), beta=3.0)
    torch.testing.assert_close(weights, torch.tensor([math.exp(-3), 1.0, math.exp(1.5), 100.0, 100.0, 100.0]))


def test_log_prob_is_that_of_a_gaussian_around_a_tanh_mean():
    """No correction for the tanh; the std does not depend on the state and stays in [e^-5, e^2]."""
    torch.manual_seed(0)
    actor, obs, actions = iql.GaussianActor(3, 2), torch.randn(10, 3), torch.rand(10, 2) * 2 - 1
    mean, log_std = actor(obs)
    torch.testing.assert_close(mean, torch.tanh(actor.net(obs)))
    assert log_std.tolist() == [0, 0]
    normal = torch.distributions.Normal(mean, log_std.exp())
    torch.testing.assert_close(iql.gaussian_log_prob(mean, log_std, actions), normal.log_prob(actions).sum(1))
    with torch.no_grad():
        actor.log_std.copy_(torch.tensor([9.0, -9.0]))
    assert actor(obs)[1].tolist() == [2, -5]


def test_every_layer_starts_orthogonal_with_gain_sqrt_2():
    for net in (iql.Critic(3, 2).net, iql.Value(3).net, iql.GaussianActor(3, 2).net):
        for layer in net:
            if isinstance(layer, torch.nn.Linear):
                weight = layer.weight if layer.weight.shape[0] <= layer.weight.shape[1] else layer.weight.T
                torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(len(weight)), atol=1e-4, rtol=0)
                assert (layer.bias == 0).all()


def test_losses_are_the_papers_and_reach_only_their_networks():
    agent = make_agent(module=iql, expectile=0.8, beta=2.0)
    with torch.no_grad():  # targets that differ from the online Qs, so that a mix-up shows
        for param in agent.models.params["target_critic"].values():
            param.mul_(1.3)
    qs, targets, v, actor = plain_modules(agent)
    batch = agent.data.batch(torch.arange(64))
    params = {
        net: {name: param[0].detach().requires_grad_() for name, param in values.items()}
        for net, values in agent.models.params.items()
    }
    given = lambda trained: {net: values if net == trained else detach(values) for net, values in params.items()}
    with torch.no_grad():
        q = torch.minimum(*(q(batch.obs, batch.actions) for q in targets))
        advantage = q - v(batch.obs)
        log_prob = torch.distributions.Normal(actor(batch.obs)[0], actor(batch.obs)[1].exp()).log_prob(batch.actions).sum(1)
        expected = {
            "value": (torch.where(advantage < 0, 0.2, 0.8) * advantage**2).mean(),
            "actor": -(torch.exp(2 * advantage).clamp(max=100) * log_prob).mean(),
            "critic": sum(
                ((batch.rewards + 0.99 * (1 - batch.terminals) * v(batch.next_obs) - q(batch.obs, batch.actions)) ** 2).mean()
                for q in qs
            ),
        }
    for network, loss_function in (("value", agent.value_loss), ("actor", agent.actor_loss), ("critic", agent.critic_loss)):
        loss, metrics = loss_function(given(network), batch)
        torch.testing.assert_close(loss, expected[network], rtol=1e-4, atol=1e-5)
        assert metrics[network] is loss
        loss.backward()
        reached = {net for net, values in params.items() if any(param.grad is not None for param in values.values())}
        assert reached == {network}
        for param in params[network].values():
            assert param.grad is not None
            param.grad = None


def test_order_is_value_policy_critic_targets_on_one_minibatch():
    """One update against plain modules and their own optimizers."""
    agent = make_agent(module=iql, batch_size=16, tau=0.1, epochs=1, steps_per_epoch=4)
    qs, targets, v, actor = plain_modules(agent)
    optimizers = [
        torch.optim.Adam(params, 3e-4) for params in (v.parameters(), actor.parameters(), [p for q in qs for p in q.parameters()])
    ]
    for step in range(3):
        torch.manual_seed(step)
        batch = agent.data.batch(torch.randint(512, (1, 16))[0])
        torch.manual_seed(step)
        agent.update()
        with torch.no_grad():
            q = torch.minimum(*(q(batch.obs, batch.actions) for q in targets))
        losses = [
            lambda: iql.expectile_loss(q - v(batch.obs), 0.9),
            lambda: (
                -(
                    iql.advantage_weights(q - v(batch.obs).detach(), 10.0)
                    * iql.gaussian_log_prob(*actor(batch.obs), batch.actions)
                ).mean()
            ),
            lambda: sum(
                (
                    (batch.rewards + 0.99 * (1 - batch.terminals) * v(batch.next_obs).detach() - net(batch.obs, batch.actions))
                    ** 2
                ).mean()
                for net in qs
            ),
        ]
        optimizers[1].param_groups[0]["lr"] = 3e-4 * (1 + math.cos(math.pi * step / 4)) / 2
        for optimizer, loss in zip(optimizers, losses):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        with torch.no_grad():
            for net, target in zip(qs, targets):
                for own, moving in zip(net.parameters(), target.parameters()):
                    moving.lerp_(own, 0.1)
    ours = agent.models.params
    for network, module in (("value", v), ("actor", actor)):
        for name, param in module.named_parameters():
            torch.testing.assert_close(ours[network][name][0], param, rtol=1e-3, atol=2e-5)
    for network, twins in (("critic", qs), ("target_critic", targets)):
        for i, module in enumerate(twins):
            for name, param in module.named_parameters():
                torch.testing.assert_close(ours[network][name][0, i], param, rtol=1e-3, atol=2e-5, check_layout=False)


def test_dropout_masks_are_arguments_and_are_not_used_when_acting():
    agent = make_agent(module=iql, dropout=0.25)
    actor = plain_modules(agent)[3]
    obs, masks = torch.randn(5, 3), (torch.rand(2, 5, 256) > 0.25) / 0.75
    hidden = torch.relu(actor.net[0](obs)) * masks[0]
    hidden = torch.relu(actor.net[2](hidden)) * masks[1]
    torch.testing.assert_close(actor(obs, masks)[0], torch.tanh(actor.net[4](hidden)))
    acted = agent.best_of(agent.models.params, obs[None].numpy(), torch.Generator())
    np.testing.assert_allclose(acted[0], 1 + 3 * actor(obs)[0].detach().numpy(), rtol=1e-4, atol=1e-4)  # bounds -2 and 4


def test_return_range_counts_episodes_as_iql_does():
    """Episodes end at a terminal, at a jump of the observation, and at the last row, where an incomplete one counts."""
    obs = np.array([0, 1, 2, 10, 11, 20, 21, 22.0])[:, None]
    next_obs = np.array([1, 2, 3, 11, 12, 21, 22, 23.0])[:, None]
    terminals = np.array([0, 0, 1, 0, 0, 0, 0, 0])  # rows 0-2 end at a terminal, 3-4 at a jump, 5-7 at the end of the file
    rewards = np.array([1, 1, 1, 5, 5, -2, 0, 1.0])
    task = make_task(obs, np.zeros((8, 1)), rewards, terminals, next_obs)
    assert data.return_range(task) == 10 - -1
    with pytest.raises(UserError, match="same return"):
        data.return_range(make_task(obs, np.zeros((8, 1)), np.zeros(8), terminals, next_obs))


def test_rewards_are_transformed_by_domain():
    task = make_task(np.array([[0.0], [5.0]]), np.zeros((2, 1)), np.array([1.0, 5.0]), np.zeros(2), np.array([[1.0], [6.0]]))
    np.testing.assert_allclose(iql.transform_rewards(task, "hopper-medium-v2"), [250, 1250])
    np.testing.assert_allclose(iql.transform_rewards(task, "pen-human-v1"), [1, 5])
    np.testing.assert_allclose(iql.transform_rewards(task._replace(sparse_goal=True), "antmaze-umaze-v0"), [0, 4])


def test_settings_are_the_official_ones():
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


def test_actions_are_clipped_below_the_bounds(hopper, tmp_path):
    agent = make_agent(module=iql)
    assert agent.data.rows[:, 3:5].abs().max() <= 1 - 1e-5 + 1e-7
    task = make_task(np.zeros((4, 1)), np.array([[-1.0], [1.0], [0.5], [-0.5]]), np.zeros(4), np.zeros(4), np.zeros((4, 1)))
    agent = iql.IQL(iql.Args(cuda=False, cudagraphs=False), task, torch.device("cpu"))
    np.testing.assert_allclose(agent.data.rows[:, 1], [-1 + 1e-5, 1 - 1e-5, 0.5, -0.5], rtol=1e-7)


def test_a_deployed_policy_is_the_mean(hopper, tmp_path):
    run_dir = iql.main(make_args(tmp_path, iql, dropout=0.1))["run_dir"]
    act, obs = iql.load_policy(f"{run_dir}/checkpoint.pt"), np.random.default_rng(0).standard_normal((4, 11))
    np.testing.assert_array_equal(act(obs), act(obs))
    assert act(obs).shape == (4, 3) and np.abs(act(obs)).max() <= 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--beta", "-1"], "--beta"),
        (["--dropout", "1"], "--dropout"),
        (["--expectile", "1"], "--expectile"),
        (["--tau", "0"], "--tau"),
    ],
)
def test_bad_input(flags, message):
    result = run_script(*flags, script="iql.py")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and message in result.stderr


def test_what_every_script_does_alike_is_the_same_text():
    """`load_policy`, `evaluate` and `main` of the siblings without pretraining differ in the agent's name alone."""
    tails = {
        re.sub(r"\b(BC|IQL|IDQL|DQL|FQL)\b", "AGENT", (ROOT / f"{name}.py").read_text().split("\ndef load_policy")[1])
        for name in ("bc", "iql", "idql", "dql", "fql")
    }
    assert len(tails) == 1
