"""Layers of K models, per-model clipping, compiling with fallbacks, and the choice among candidates."""

import functools

import numpy as np
import pytest
import torch
from helpers import make_agent, plain, snapshot
from torch import nn

import best_of
import dql
import dtql_continuous as dtql
import idql
import stacked


def test_layers_of_many_models_are_plain_layers_side_by_side():
    torch.manual_seed(0)
    plains = [[nn.Sequential(stacked.Linear(3, 4), stacked.LayerNorm(4)) for _ in range(2)] for _ in range(5)]
    for net in (net for pair in plains for net in pair):
        nn.init.normal_(net[1].weight)
    many, x = stacked.stack([stacked.stack(pair) for pair in plains]), torch.randn(5, 2, 7, 3)
    assert many[0].weight.shape == (5, 2, 4, 3)
    reference = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    for i, pair in enumerate(plains):
        for j, net in enumerate(pair):
            reference.load_state_dict(net.state_dict())
            torch.testing.assert_close(many(x)[i, j], reference(x[i, j]))


def test_mish_is_torchs_in_value_and_gradient():
    x = torch.linspace(-30, 30, 10_001, requires_grad=True)
    ours = stacked.Mish()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), nn.functional.mish(x), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(f(x).sum(), x)[0] for f in (ours, nn.functional.mish)))


def test_clipped_steps_are_those_of_plain_modules():
    """Two models, one with a gradient far above the bound and one far below, against torch's own clipping and Adam."""
    net = stacked.stack_seeds(lambda: stacked.Linear(3, 1), [0, 1])
    scales = torch.tensor([1e3, 1e-2])

    def loss(x):
        losses = scales * net(x).square().mean((-1, -2))
        return losses, {"loss": losses}

    plains = [plain(net, k) for k in range(2)]
    step = stacked.make_step(
        loss, torch.optim.Adam(net.parameters(), 0.1, fused=True), clip=lambda gradients: dql.clip_per_model(gradients, 0.5)
    )
    optimizers = [torch.optim.Adam(module.parameters(), 0.1) for module in plains]
    for _ in range(5):
        x = torch.randn(2, 8, 3)
        metrics = step(x)
        for k, (module, optimizer) in enumerate(zip(plains, optimizers)):
            optimizer.zero_grad()
            value = scales[k] * module(x[k]).square().mean()
            torch.testing.assert_close(metrics["loss"][k], value.detach(), rtol=1e-4, atol=1e-6)
            value.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
            optimizer.step()
    for k, module in enumerate(plains):
        for name, param in module.named_parameters():
            torch.testing.assert_close(net.get_parameter(name)[k], param)


def test_clipping_is_per_model():
    torch.manual_seed(0)
    scales = torch.tensor([0.01, 1.0, 100.0])
    gradients = [torch.randn(3, *shape) * scales.view(3, *[1] * len(shape)) for shape in ((2, 4, 5), (7,), ())]
    clipped = dql.clip_per_model(gradients, max_norm=1.5)
    for k in range(3):
        params = [torch.zeros_like(gradient[k], requires_grad=True) for gradient in gradients]
        for param, gradient in zip(params, gradients):
            param.grad = gradient[k].clone()
        torch.nn.utils.clip_grad_norm_(params, 1.5)
        for param, gradient in zip(params, clipped):
            torch.testing.assert_close(gradient[k], param.grad)


# ---- a compiler or a GPU that nobody has tried -----------------------------------------------------------------------


def prepared_and_eager(capsys, graph: bool) -> str:
    """Prepare an update, run it 3 times, compare with the eager one; returns what was printed."""
    agent, reference = make_agent(2, 11, 3, compile=True), make_agent(2, 11, 3)
    update = stacked.fastest(functools.partial(agent.update, True), agent, True, graph)
    for run in (update, functools.partial(reference.update, True)):
        torch.manual_seed(1)
        for _ in range(3):
            run()
    expected = snapshot(reference)
    assert all(torch.equal(value, expected[name]) for name, value in snapshot(agent).items())
    return capsys.readouterr().err


def test_what_cannot_be_compiled_runs_eagerly_with_one_note(capsys, monkeypatch, uncompiled):
    def broken(function, **_):
        def call(*args):
            if torch._dynamo.eval_frame._stance.stance == "force_eager":
                return function(*args)
            raise RuntimeError("no\ntriton")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    said = prepared_and_eager(capsys, graph=False)
    assert said.count("note:") == 1 and "no triton" in said


def test_what_cannot_be_captured_runs_eagerly_with_one_note(capsys, monkeypatch, uncompiled):
    def broken(update):
        update()  # as in the middle of a capture: the state must be restored
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(stacked, "capture", broken)
    said = prepared_and_eager(capsys, graph=True)
    assert said.count("note:") == 1 and "--cudagraphs" in said and "not permitted" in said


@pytest.mark.parametrize("fault", ["other noise", "no optimizer"])
def test_a_graph_that_computes_something_else_is_given_up_with_one_note(capsys, monkeypatch, uncompiled, fault):
    def stale(update):
        def replay():
            if fault == "other noise":
                torch.randn(3)
                return update()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.optim.Adam, "step", lambda self: None)
                return update()

        return replay

    monkeypatch.setattr(stacked, "capture", stale)
    said = prepared_and_eager(capsys, graph=True)
    assert said.count("note:") == 1 and "differ from the eager update" in said


def test_a_good_graph_is_used_and_preparing_changes_nothing(capsys, monkeypatch, uncompiled):
    replays = []
    monkeypatch.setattr(stacked, "capture", lambda update: lambda: (replays.append(1), update())[1])
    assert "note:" not in prepared_and_eager(capsys, graph=True)
    assert len(replays) == 5  # the two that are compared, and three


def test_an_error_of_the_update_itself_is_not_swallowed(uncompiled):
    agent = make_agent(compile=True)
    wrong = functools.partial(agent.step_denoiser, agent.data.sample(1, 8), torch.ones(1, 8, 1), torch.ones(1, 8, 5))
    with pytest.raises(RuntimeError, match="size"):
        stacked.fastest(wrong, agent, True, False)


@pytest.mark.slow
def test_compiled_updates_agree_with_eager_ones():
    agents = [make_agent(2, 11, 3, compile=compiled, lr_decay=True) for compiled in (False, True)]
    torch._dynamo.utils.counters.clear()
    for agent in agents:
        torch.manual_seed(7)
        for training in (False, True):
            for _ in range(2):
                agent.update(training)
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["ok"] == frames["total"] >= 3  # each loss
    reference = snapshot(agents[0])
    for name, value in snapshot(agents[1]).items():
        torch.testing.assert_close(value, reference[name], rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_every_loss_of_a_process_is_compiled():
    """Dynamo would stop after 8 versions of a function, without a word, and the losses share one."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for width in range(1, 11):
        net = stacked.stack([stacked.Linear(width, 1)])
        loss = lambda x, net=net: (net(x).square().mean((-1, -2)), {})
        stacked.make_step(loss, torch.optim.Adam(net.parameters()), compile=True)(torch.ones(1, 4, width))
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["ok"] == frames["total"] >= 10


# ---- the choice among candidates (Appendix D) ------------------------------------------------------------------------


@pytest.mark.slow
def test_candidates_are_taken_with_probability_softmax_of_the_smaller_target_q():
    agent, candidates, draws = make_agent(), 6, 15_000
    torch.manual_seed(0)
    obs, z = torch.randn(1, 1, 3), torch.randn(1, 1, candidates, 2)
    with torch.no_grad():
        for param in agent.target_critic.parameters():
            param *= 1.5  # Qs that differ, so that the test can fail
        actions = agent.sample(obs, z)[0, 0]
        q = agent.target_critic(obs.expand(1, candidates, 3), actions[None]).amin(1)[0]
        probabilities = torch.softmax(q, 0)
        gumbel = -torch.log(torch.empty(1, draws, candidates).exponential_())
        (chosen,) = agent.act.choose(obs.expand(1, draws, 3), z.expand(1, draws, candidates, 2), gumbel)
    which = (chosen[:, None] - actions).abs().sum(-1).argmin(1)
    frequencies = torch.bincount(which, minlength=candidates) / draws
    assert probabilities.max() < 0.95 and probabilities.max() - probabilities.min() > 0.05
    assert (frequencies - probabilities).abs().max() < 0.015


@pytest.mark.parametrize(("candidates", "sizes"), [(64, [4, 4, 4]), (100, [2] * 5), (1024, [1] * 10)])
def test_a_cpu_acts_in_as_many_states_at_a_time_as_make_256_candidates(monkeypatch, candidates, sizes):
    agent, seen = make_agent(num_candidates=candidates), []
    choose = agent.act.choose
    monkeypatch.setattr(agent.act, "choose", lambda obs, *noise: (seen.append(obs.shape[1]), choose(obs, *noise))[1])
    assert agent.act(torch.randn(1, 10, 3), torch.Generator()).shape == (1, 10, 2) and seen == sizes
    agent.act(torch.randn(1, 1, 3), torch.Generator())
    assert seen[len(sizes) :] == [1]  # nothing is computed beside a single observation


@pytest.mark.parametrize(("excess", "spread", "blocks"), [(0, 1, {1}), (0, 300, {2, 3, 4, 5}), (40, 1, {16})])
def test_the_second_q_is_evaluated_until_nothing_that_remains_can_win(monkeypatch, excess, spread, blocks):
    """The choice is that of all 1024 minima, whether the Qs agree, disagree widely or one is far above the other."""
    agent, asked = make_agent(num_seeds=2), []
    second = agent.act._second
    monkeypatch.setattr(agent.act, "_second", lambda *args: (asked.append(1), second(*args))[1])
    torch.manual_seed(0)
    obs, z = torch.randn(2, 5, 3), torch.randn(2, 5, 1024, 2)
    gumbel = -torch.log(torch.empty(2, 5, 1024).exponential_())
    with torch.no_grad():
        agent.target_critic.net[9].weight *= spread
        agent.target_critic.net[9].bias[:, 0] += excess
        chosen = agent.act.choose(obs, z, gumbel)
        candidates = agent.sample(obs, z)
        q = agent.target_critic(best_of.repeat_states(obs, 1024), candidates.flatten(1, 2)).amin(1).view(2, 5, 1024)
        best = (q + gumbel).argmax(2)
        torch.testing.assert_close(chosen, candidates.take_along_dim(best[..., None, None], 2)[:, :, 0])
    assert len(asked) in blocks


def test_greedy_takes_the_largest_smaller_q_and_one_candidate_ignores_q():
    obs = torch.randn(1, 4, 3)
    for candidates in (1, 8):
        agent, taken = make_agent(module=idql, num_candidates=candidates), []
        for sign in (1, -1):
            with torch.no_grad():
                agent.target_critic.net[4].weight *= sign
            taken.append(agent.act(obs, torch.Generator().manual_seed(3)))
        assert torch.equal(*taken) == (candidates == 1)
    z = torch.randn(1, 4, 8, 10)
    with torch.no_grad():
        chosen, candidates = agent.act.choose(obs, z, torch.zeros(1, 4, 8)), agent.sample(obs, z)
        q = agent.target_critic(best_of.repeat_states(obs, 8), candidates.flatten(1, 2)).amin(1).view(1, 4, 8)
    torch.testing.assert_close(chosen, candidates.take_along_dim(q.argmax(2)[..., None, None], 2)[:, :, 0])


@pytest.mark.parametrize("policy", ["gaussian", "implicit"])
def test_compiled_acting_agrees_with_eager_acting(policy):
    agents = [make_agent(2, policy=policy, nll=False, num_candidates=70, compile=compiled) for compiled in (False, True)]
    obs = torch.as_tensor(np.random.default_rng(0).standard_normal((2, 5, 3)), dtype=torch.float32)
    eager, compiled = (agent.act(obs, torch.Generator().manual_seed(0)) for agent in agents)
    torch.testing.assert_close(eager, compiled, rtol=1e-4, atol=1e-5)
    assert isinstance(agents[0], dtql.DTQL)
