"""On a GPU: captured, compiled and eager runs are one and the same. Skipped where there is none."""

import copy
import subprocess

import numpy as np
import pytest
import torch
from helpers import (
    assert_learning_rates_follow_the_cosine,
    assert_updates_agree,
    command,
    make_agent,
    make_args,
    params_of,
    prepared,
    rows_of,
    run_updates,
    updates,
    whole_and_resumed,
)

import bc
import common
import dql
import dtql_continuous as dtql
import fql
import idql
import iql
import kl_distill
import srpo

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

MODES = [dict(compile=compiled, cudagraphs=graph) for compiled in (False, True) for graph in (False, True)]


@pytest.mark.parametrize(
    "module, changes",
    [
        (dtql, {}),
        (dtql, dict(num_seeds=3, nll=False)),
        (dtql, dict(policy="implicit", nll=False)),
        (kl_distill, {}),
    ],
)
def test_captured_compiled_and_eager_updates_agree(module, changes):
    """200 updates of every mode, and the random state after them."""
    settings = dict(obs_dim=11, action_dim=3, module=module, device="cuda", lr_decay=True, epochs=10, **changes)
    agents, random_states = [], []
    for mode in MODES:
        agents.append(make_agent(**settings, **mode))
        before = run_updates(agents[-1], each=100)
        random_states.append(torch.cuda.get_rng_state())
    for agent, random_state in zip(agents[1:], random_states[1:]):
        assert_updates_agree(agent, agents[0], before)
        assert torch.equal(random_state, random_states[0])


@pytest.mark.parametrize("module", [bc, iql, idql, dql, srpo, fql])
def test_the_siblings_captured_compiled_and_eager_updates_agree(module):
    """Every phase, 50 updates each."""
    agents, random_states = [], []
    for mode in MODES:
        agent = make_agent(2, 11, 3, module=module, device="cuda", **mode)
        before = copy.deepcopy(agent.models.params)
        torch.manual_seed(7)
        for update in updates(agent):
            fast = agent.models.prepare(update, mode["cudagraphs"])
            for _ in range(50):
                fast()
        agents.append(agent)
        random_states.append(torch.cuda.get_rng_state())
    for agent, random_state in zip(agents[1:], random_states[1:]):
        assert_updates_agree(agent, agents[0], before)
        assert torch.equal(random_state, random_states[0])


@pytest.mark.parametrize("compiled", [False, True])
def test_noise_differs_from_replay_to_replay(compiled):
    agent = make_agent(device="cuda", compile=compiled, cudagraphs=True)
    update, state = prepared(agent, training=True), copy.deepcopy(agent.models.state_dict())
    losses = []
    for _ in range(3):
        agent.models.load_state_dict(state)
        update()
        losses.append(torch.stack(list(agent.models.sums.values())[:-2]).clone())
    assert not any(torch.isclose(losses[i], losses[j], rtol=1e-4).any() for i, j in ((0, 1), (0, 2), (1, 2)))


def test_the_graph_follows_the_learning_rate():
    assert_learning_rates_follow_the_cosine(device="cuda", cudagraphs=True)


def test_making_an_update_ready_changes_nothing():
    agent = make_agent(2, device="cuda", cudagraphs=True)
    before, random_state = copy.deepcopy(agent.models.state_dict()), torch.cuda.get_rng_state()
    prepared(agent, training=True)
    torch.testing.assert_close(agent.models.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.cuda.get_rng_state(), random_state)


def test_an_update_never_waits_for_the_device():
    agent = make_agent(device="cuda", lr_decay=True)
    agent.update(training=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        agent.update(training=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", MODES)
def test_resumed_run_goes_on(hopper, tmp_path, monkeypatch, mode):
    settings = dict(cuda=True, lr_decay=True, num_seeds=2, **mode)
    resume = lambda run_dir: dtql.main(make_args(tmp_path, **settings, resume=run_dir))
    whole, resumed = map(params_of, whole_and_resumed(tmp_path, monkeypatch, resume, **settings))
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name], rtol=1e-3, atol=1e-3, msg=name)


def test_a_run_goes_on_without_the_gpu(hopper, tmp_path, monkeypatch):
    """Other noise, but the same run: it ends, evaluated, and its checkpoint can be deployed on a CPU."""
    resume = lambda run_dir: subprocess.run(command("--resume", run_dir, "--no-cuda"), check=True, timeout=300)
    whole, resumed = whole_and_resumed(tmp_path, monkeypatch, resume, cuda=True, cudagraphs=True)
    assert len(rows_of(resumed)) == len(rows_of(whole))
    for run_dir in (whole, resumed):
        action = dtql.load_policy(f"{run_dir}/checkpoint.pt")(np.zeros(11))
        assert action.shape == (3,) and np.abs(action).max() <= 1


@pytest.mark.parametrize("policy", ["gaussian", "implicit"])
@pytest.mark.parametrize("compiled", [False, True])
def test_gpu_and_cpu_choose_alike(policy, compiled):
    settings = dict(num_seeds=2, obs_dim=11, action_dim=3, policy=policy, nll=False)
    cpu = make_agent(**settings)
    gpu = make_agent(**settings, device="cuda", compile=compiled)
    gpu.models.load_state_dict(cpu.models.state_dict())
    torch.manual_seed(0)
    arguments = torch.randn(2, 5, 11), torch.randn(2, 5, 256, 3), -torch.log(torch.empty(2, 5, 256).exponential_())
    actions = []
    for agent in (cpu, gpu):
        inputs = [x.to(agent.device) for x in arguments]
        with torch.no_grad():
            p = {network: agent.models.params[network] for network in agent.best_of.networks}
            actions.append(agent.best_of.choose(p, *inputs).cpu())
    torch.testing.assert_close(actions[1], actions[0], rtol=1e-3, atol=1e-4)


def test_a_run_says_nothing_but_its_own(hopper, tmp_path):
    """Warnings of torch about the GPU are for us, not for those who train."""
    result = subprocess.run(
        command(
            "--env-id",
            "hopper-medium-v2",
            "--pretrain-epochs=1",
            "--epochs=1",
            "--steps-per-epoch=100",
            "--eval-episodes=2",
            "--compile",
            "--cudagraphs",
            "--run-dir",
            tmp_path / "runs",
        ),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr, result.stderr
    assert common.open_checkpoint(next((tmp_path / "runs").iterdir()) / "checkpoint.pt")["step"] == 200
