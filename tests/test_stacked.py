"""K models at once: each gets its own gradient, its state goes by name, and what is compiled or captured is checked."""

import copy
import functools

import numpy as np
import pytest
import torch
from helpers import assert_updates_agree, first, make_agent, run_updates, train, updates
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bc
import dql
import dtql_continuous as dtql
import fql
import idql
import iql
import kl_distill
import srpo
import stacked
from common import UserError
from stacked import detach

AGENTS = [
    (dtql, {}),
    (dtql, dict(policy="implicit", nll=False)),
    (dtql, dict(lr_decay=True)),
    (kl_distill, dict(lr_decay=True)),
    (bc, {}),
    (bc, dict(policy="gaussian")),
    (bc, dict(policy="diffusion")),
    (iql, {}),
    (iql, dict(dropout=0.1)),
    (idql, {}),
    (dql, {}),
    (dql, dict(max_q_backup=True)),
    (fql, {}),
    (srpo, {}),
]

# What a CUDA graph cannot hold: the host reading a tensor or making one from its own numbers, shapes that depend on values
NOT_IN_A_GRAPH = {"_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}


def test_candidates_are_chosen_with_softmax_of_the_smaller_target_q():
    agent = make_agent()
    torch.manual_seed(0)
    p = {net: first(agent.models.params[net]) for net in ("actor", "target_critic")}
    p["target_critic"] = {name: param * (40 if name == "net.9.weight" else 1) for name, param in p["target_critic"].items()}
    obs, candidates = torch.randn(1, 3), 6
    z = torch.randn(1, candidates, 2)
    with torch.no_grad():
        actions = agent.sample(p, obs[:, None], z)
        q = agent.critic(p["target_critic"], obs[:, None].expand(1, candidates, 3), actions)
        probabilities = torch.softmax(q.amin(0)[0], 0)
        draws = 15_000
        gumbel = -torch.log(torch.empty(draws, candidates).exponential_())
        models = {net: {name: param[None] for name, param in params.items()} for net, params in p.items()}
        (chosen,) = agent.best_of.choose(models, obs.expand(1, draws, 3), z.expand(1, draws, candidates, 2), gumbel[None])
    which = (chosen[:, None] - actions).abs().sum(-1).argmin(1)
    frequencies = torch.bincount(which, minlength=candidates) / draws
    assert probabilities.max() < 0.9 and probabilities.max() - probabilities.min() > 0.1  # a test that can fail
    assert (frequencies - probabilities).abs().max() < 0.015


@pytest.mark.parametrize(("candidates", "sizes"), [(64, [4, 4, 4]), (100, [2] * 5), (1024, [1] * 10)])
def test_a_cpu_acts_in_as_many_states_at_a_time_as_make_256_candidates(monkeypatch, candidates, sizes):
    agent, seen = make_agent(num_candidates=candidates), []
    best_of, choose = agent.best_of, agent.best_of.choose
    monkeypatch.setattr(best_of, "choose", lambda p, obs, *noise: (seen.append(obs.shape[1]), choose(p, obs, *noise))[1])
    obs = np.random.default_rng(0).standard_normal((1, 10, 3))
    assert best_of(agent.models.params, obs, torch.Generator()).shape == (1, 10, 2) and seen == sizes
    best_of.of_one(agent.models.params, 0, 3, seed=0, about={})(obs[0, 0])
    assert seen[len(sizes) :] == [1]  # nothing is computed beside a single observation


@pytest.mark.parametrize(("excess", "spread", "blocks"), [(0, 1, {1}), (0, 300, {2, 3, 4, 5}), (40, 1, {16})])
def test_the_second_q_is_asked_until_nothing_that_is_left_can_win(monkeypatch, excess, spread, blocks):
    """The choice is that of all 1024 minima, whether the Qs agree, disagree widely or one is far above the other."""
    agent, asked = make_agent(num_seeds=2), []
    p = {net: detach(agent.models.params[net]) for net in ("actor", "target_critic")}
    second = agent.best_of._second_all
    monkeypatch.setattr(agent.best_of, "_second_all", lambda *args: (asked.append(1), second(*args))[1])
    torch.manual_seed(0)
    obs, z = torch.randn(2, 5, 3), torch.randn(2, 5, 1024, 2)
    gumbel = -torch.log(torch.empty(2, 5, 1024).exponential_())
    with torch.no_grad():
        p["target_critic"]["net.9.weight"] *= spread
        p["target_critic"]["net.9.bias"][:, 0] += excess
        chosen = agent.best_of.choose(p, obs, z, gumbel)
        for model in range(2):
            one = {net: first(params, model) for net, params in p.items()}
            states = obs[model, :, None].expand(5, 1024, 3)
            candidates = agent.sample(one, obs[model, :, None], z[model])
            scores = agent.critic(one["target_critic"], states, candidates).amin(0) + gumbel[model]
            torch.testing.assert_close(chosen[model], candidates[torch.arange(5), scores.argmax(1)])
    assert len(asked) in blocks


def test_actions_are_in_the_environments_units():
    agent = make_agent(num_seeds=2)  # actions of this environment lie in [-2, 4]
    with torch.no_grad():
        agent.models.params["actor"]["net.6.bias"][0, :2] = 100.0  # model 0 always takes the upper bound
        agent.models.params["actor"]["net.6.bias"][1, :2] = -100.0
    generator = torch.Generator().manual_seed(0)
    actions = agent.best_of(agent.models.params, np.zeros((2, 5, 3)), generator)
    assert actions.shape == (2, 5, 2)
    np.testing.assert_allclose(actions[0], 4.0, atol=1e-4)
    np.testing.assert_allclose(actions[1], -2.0, atol=1e-4)


@pytest.mark.parametrize(("module", "changes"), AGENTS)
def test_models_do_not_touch_each_other(module, changes):
    """Model 1's updates are the same to the bit whatever model 0's weights are."""
    results = []
    for scale in (1.0, 3.0):
        agent = make_agent(num_seeds=3, module=module, **changes)
        with torch.no_grad():
            for network in agent.models.params.values():
                for param in network.values():
                    param[0] *= scale
                    param[0] += 0.1 * (scale - 1)
        torch.manual_seed(5)
        for _ in range(3):
            train(agent)
        results.append(agent.models.params)
    for network in results[0]:
        for name in results[0][network]:
            assert torch.equal(results[0][network][name][1:], results[1][network][name][1:]), (network, name)
            assert not torch.equal(results[0][network][name][0], results[1][network][name][0]), (network, name)


@pytest.mark.parametrize(("module", "changes"), AGENTS)
def test_model_i_starts_as_a_single_run_of_its_seed(module, changes):
    many, single = (make_agent(num_seeds=n, seed=seed, module=module, **changes) for n, seed in ((3, 4), (1, 6)))
    for network, params in single.models.params.items():
        for name, param in params.items():
            assert torch.equal(many.models.params[network][name][2], param[0]), (network, name)


def test_stacked_update_is_the_plain_modules_update():
    """One stacked critic step against torch.nn modules and their own Adam, on the same batch."""
    agent = make_agent(num_seeds=2, batch_size=16)
    plain = []
    for k in range(2):
        qs = [dtql.Critic(3, 2), dtql.Critic(3, 2)]
        for i, q in enumerate(qs):
            q.load_state_dict(first(first(agent.models.params["critic"], k), i))
        v = dtql.Value(3)
        v.load_state_dict(first(agent.models.params["value"], k))
        plain.append((qs, v))
    torch.manual_seed(3)
    indices = torch.randint(len(agent.data.rows), (2, 16))
    torch.manual_seed(3)
    agent.update(training=False)
    for k, (qs, v) in enumerate(plain):
        obs, actions, rewards, terminals, next_obs = agent.data.batch(indices[k])
        optimizer = torch.optim.Adam([p for net in (*qs, v) for p in net.parameters()], 3e-4)
        with torch.no_grad():
            target = rewards + 0.99 * (1 - terminals) * v(next_obs)
            q_data = torch.minimum(qs[0](obs, actions), qs[1](obs, actions))
        loss = dtql.expectile_loss(q_data - v(obs), 0.9) + sum(((target - q(obs, actions)) ** 2).mean() for q in qs)
        loss.backward()
        optimizer.step()
        for name, param in v.named_parameters():
            torch.testing.assert_close(agent.models.params["value"][name][k].detach(), param.detach(), rtol=1e-4, atol=2e-5)


def test_compiled_and_eager_updates_agree():
    agents = [make_agent(2, 11, 3, compile=compiled, lr_decay=True, epochs=10) for compiled in (False, True)]
    for agent in agents:
        run_updates(agent, each=2)
    for network, params in agents[0].models.params.items():
        for name, param in params.items():
            torch.testing.assert_close(agents[1].models.params[network][name], param, rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(agents[0].models.sums, agents[1].models.sums, rtol=1e-3, atol=1e-3)
    before = [run_updates(agent, each=100) for agent in agents]
    assert_updates_agree(agents[1], agents[0], before[0])


@pytest.mark.parametrize(("module", "changes"), AGENTS)
def test_an_update_can_be_captured(module, changes):
    """Nothing in it waits for the device, and all that it changes is put back after the warm-up: the learner's state."""

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function._schema.name.removeprefix("aten::") not in NOT_IN_A_GRAPH
            return function(*args, **(kwargs or {}))

    agent = make_agent(module=module, **changes)
    held = [vars(agent), vars(agent.models), vars(agent.data)]
    tensors, state = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in (held, agent.models.state_dict()))
    for update in updates(agent):
        before = [x.clone() for x in tensors]
        with Spy():
            update()
        changed = [x for x, old in zip(tensors, before) if not torch.equal(x, old)]
        assert len(changed) > 5 and {x.data_ptr() for x in changed} <= {x.data_ptr() for x in state}


def test_clipping_is_per_model_and_torchs_own():
    torch.manual_seed(0)
    scales = torch.tensor([0.01, 1.0, 100.0])
    gradients = [torch.randn(3, *shape) * scales.view(3, *[1] * len(shape)) for shape in ((2, 4, 5), (7,), ())]
    clipped = stacked.clip_per_model(gradients, max_norm=1.5)
    for k in range(3):
        params = [torch.zeros_like(gradient[k], requires_grad=True) for gradient in gradients]
        for param, gradient in zip(params, gradients):
            param.grad = gradient[k].clone()
        torch.nn.utils.clip_grad_norm_(params, 1.5)
        for param, gradient in zip(params, clipped):
            torch.testing.assert_close(gradient[k], param.grad)
    torch.testing.assert_close(clipped[0][0], gradients[0][0])  # the small one is left alone


def test_clipped_steps_are_those_of_plain_modules():
    """Two models, one with a gradient far above the bound and one far below, against torch's own clipping and Adam."""
    net = stacked.Net(lambda: torch.nn.Linear(3, 1), torch.device("cpu"))
    models = stacked.Learner({"net": net}, [0, 1], ["loss"], torch.device("cpu"))

    def loss(p, x, scale):
        value = scale * net(p["net"], x).square().mean()
        return value, {"loss": value}

    models.optimize(loss, "net", lr=0.1, max_norm=0.5)
    plain = [torch.nn.Linear(3, 1) for _ in range(2)]
    for k, module in enumerate(plain):
        module.load_state_dict(first(models.params["net"], k))
    optimizers = [torch.optim.Adam(module.parameters(), 0.1) for module in plain]
    scales = torch.tensor([1e3, 1e-2])
    for _ in range(5):
        x = torch.randn(2, 8, 3)
        models.step(loss, x, scales)
        for k, (module, optimizer) in enumerate(zip(plain, optimizers)):
            optimizer.zero_grad()
            (scales[k] * module(x[k]).square().mean()).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
            optimizer.step()
    for k, module in enumerate(plain):
        for name, param in module.named_parameters():
            torch.testing.assert_close(models.params["net"][name][k], param)


def shuffled(tree):
    """The same nested dictionary with its keys in reverse order."""
    return {name: shuffled(tree[name]) for name in reversed(list(tree))} if isinstance(tree, dict) else tree


@pytest.mark.parametrize(("module", "changes"), AGENTS)
def test_state_goes_by_name(module, changes):
    """Whatever the order of its keys: a fake score must never land in the policy."""
    agent, other = make_agent(module=module, **changes), make_agent(module=module, seed=9, **changes)
    for _ in range(2):
        train(agent)
    other.models.load_state_dict(shuffled(copy.deepcopy(agent.models.state_dict())))
    torch.testing.assert_close(other.models.state_dict(), agent.models.state_dict(), rtol=0, atol=0)


def test_foreign_state_is_refused_and_changes_nothing():
    agent, before = make_agent(), None
    before = copy.deepcopy(agent.models.state_dict())
    for change, message in (
        (lambda s: s["params"].pop("value"), "lacks"),
        (lambda s: s["params"]["value"].update(more=torch.zeros(1)), "too many"),
        (lambda s: s["params"]["actor"].update({"net.0.weight": torch.zeros(1, 256, 4)}), "not a tensor of shape"),
        (lambda s: s["params"].update(actor=None), "not a dictionary"),
        (lambda s: s["sums"].update(q="much"), "not a tensor"),
        (lambda s: s["optimizers"]["actor_loss"]["state"].popitem(), "lacks"),
    ):
        saved = copy.deepcopy(make_agent(seed=3).models.state_dict())
        change(saved)
        with pytest.raises(UserError, match=message) as error:
            agent.models.load_state_dict(saved)
        assert "\n" not in str(error.value)
        torch.testing.assert_close(agent.models.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(UserError, match="lacks"):
        agent.models.load_state_dict(make_agent(module=kl_distill).models.state_dict())


# ---- a GPU or a compiler that nobody has tried -----------------------------------------------------------------------


def prepared_and_eager(capsys, **changes) -> str:
    """Prepare an update, run it 3 times, compare with the eager one to the bit; returns what was said."""
    agent, reference = make_agent(compile=True, num_seeds=2, obs_dim=11, action_dim=3), make_agent(2, 11, 3)
    update = agent.models.prepare(functools.partial(agent.update, True), **changes)
    for run in (update, functools.partial(reference.update, True)):
        torch.manual_seed(1)
        for _ in range(3):
            run()
    torch.testing.assert_close(agent.models.state_dict(), reference.models.state_dict(), rtol=0, atol=0)
    return capsys.readouterr().err


def test_what_cannot_be_compiled_runs_eagerly_with_one_note(capsys, monkeypatch, uncompiled):
    def broken(function, **_):
        def call(*args):
            raise RuntimeError("no\ntriton")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    said = prepared_and_eager(capsys, graph=False)
    assert said.count("note:") == 1 and "no triton" in said


def test_what_cannot_be_captured_runs_eagerly_with_one_note(capsys, monkeypatch, uncompiled):
    def broken(update):
        update()  # as in the middle of a capture: the state must be put back
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(stacked, "capture", broken)
    said = prepared_and_eager(capsys, graph=True)
    assert said.count("note:") == 1 and "--cudagraphs" in said and "not permitted" in said


def test_a_graph_that_computes_something_else_is_given_up_with_one_note(capsys, monkeypatch, uncompiled):
    def stale(update):
        def replay():
            torch.randn(3)  # other noise than the eager update's
            update()

        return replay

    monkeypatch.setattr(stacked, "capture", stale)
    said = prepared_and_eager(capsys, graph=True)
    assert said.count("note:") == 1 and "differ from the eager update" in said


def test_a_good_graph_is_used_and_nothing_is_changed_by_preparing(capsys, monkeypatch, uncompiled):
    replays = []
    monkeypatch.setattr(stacked, "capture", lambda update: lambda: (replays.append(1), update()))
    assert "note:" not in prepared_and_eager(capsys, graph=True)
    assert len(replays) == 4  # the one that is compared, and three


def test_an_error_of_the_update_itself_is_not_swallowed(uncompiled):
    agent = make_agent(compile=True)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied|size"):
        agent.models.prepare(
            lambda: agent.models.step(agent.denoiser_loss, agent.data.sample(1, 8), torch.ones(1, 8, 1), torch.ones(1, 8, 5)),
            graph=False,
        )
