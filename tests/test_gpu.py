"""On a GPU: captured, compiled and eager runs agree, and runs resume. Skipped without one."""

import functools

import pytest
import torch
from helpers import METHODS, VARIANTS, make_agent, make_args, params_of, rows_of, snapshot, updates, whole_and_resumed

import dtql_continuous as dtql
import stacked

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

MODES = [dict(compile=compiled, cudagraphs=graph) for compiled in (False, True) for graph in (False, True)]


@pytest.mark.parametrize(("module", "changes"), VARIANTS)
def test_captured_compiled_and_eager_updates_agree(module, changes, capsys):
    """The metrics of the first updates of every mode, from the same state and noise, and nearly the same parameters later."""
    first, last, start = [], [], None
    for mode in MODES:
        agent = make_agent(2, 11, 3, module=module, device="cuda", **changes, **mode)
        start = start or snapshot(agent)
        torch.manual_seed(7)
        metrics = {}
        for update in updates(agent):
            fast = stacked.fastest(update, agent, mode["compile"], mode["cudagraphs"])
            metrics |= {name: value.clone() for name, value in fast().items()}
            for _ in range(50):
                fast()
        first.append(metrics)
        last.append(snapshot(agent))
    assert "note:" not in capsys.readouterr().err
    for metrics, state in zip(first[1:], last[1:]):
        torch.testing.assert_close(metrics, first[0], rtol=2e-2, atol=2e-2)
        for name, param in agent.named_parameters():
            error, moved = (state[name] - last[0][name]).norm(), (last[0][name] - start[name]).norm()
            assert error <= 0.3 * moved + 1e-6, name  # rounding moves ReLUs and minima to their other side


@pytest.mark.parametrize("module", METHODS, ids=lambda module: module.__name__)
def test_acting_is_in_bounds_and_seeded(module):
    agent = make_agent(2, 11, 3, module=module, device="cuda", compile=True)
    obs = torch.randn(2, 5, 11, device="cuda")
    act = functools.partial(agent.act, obs)
    actions = [act(torch.Generator("cuda").manual_seed(3)) for _ in range(2)]
    assert torch.equal(*actions) and actions[0].abs().max() <= 1


def test_a_run_resumes_on_the_gpu_and_continues_on_the_cpu(hopper, tmp_path, monkeypatch):
    settings = dict(device="cuda")
    whole, resumed = whole_and_resumed(tmp_path, monkeypatch, **settings)
    assert len(rows_of(whole)) == len(rows_of(resumed)) == 1
    for name, param in params_of(whole).items():
        torch.testing.assert_close(params_of(resumed)[name].float(), param.float(), rtol=1e-2, atol=1e-2)
    assert dtql.main(make_args(tmp_path, resume=resumed))["rows"]  # on the CPU
