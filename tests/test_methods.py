"""What every method promises, from the list of scripts in the folder: isolation, seeds, state, capture, acting, resuming."""

import copy
import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    FLAGS,
    METHODS,
    ROOT,
    VARIANTS,
    assert_same_end,
    make_agent,
    make_args,
    own,
    run_here,
    run_inside,
    snapshot,
    train,
    updates,
)
from torch.utils._python_dispatch import TorchDispatchMode

import common
import evaluation
import run_folder
import stacked
import tasks
import tools
from common import UserError

pytestmark = pytest.mark.usefixtures("tiny_networks")

AGENTS = pytest.mark.parametrize(
    ("module", "changes"), VARIANTS, ids=[f"{module.__name__}{'-'.join(['', *changes])}" for module, changes in VARIANTS]
)
EACH = pytest.mark.parametrize("module", METHODS, ids=lambda module: module.__name__)
NOT_IN_A_GRAPH = {"_local_scalar_dense", "nonzero", "_to_copy", "item", "is_nonzero", "masked_select", "unique"}


def test_every_script_beside_the_others_is_a_method():
    names = {module.__name__ for module in METHODS}
    assert names >= {"dtql_continuous", "kl_distill", "bc", "iql", "idql", "dql", "srpo", "fql"}
    assert not names & {"common", "stacked", "evaluation", "best_of", "toy_bandit"}


@AGENTS
def test_models_do_not_touch_each_other(module, changes):
    """Model 1's updates are identical whatever model 0's weights are."""
    results = []
    for scale in (1.0, 3.0):
        agent = make_agent(num_seeds=3, module=module, **changes)
        with torch.no_grad():
            for param in agent.parameters():
                param[0] = param[0] * scale + 0.1 * (scale - 1)
        torch.manual_seed(5)
        for _ in range(2):
            train(agent)
        results.append(dict(agent.named_parameters()))
    for name, param in results[0].items():
        assert torch.equal(param[1:], results[1][name][1:]), name
        assert not torch.equal(param[0], results[1][name][0]), name


@AGENTS
def test_model_i_starts_as_a_single_run_of_its_seed(module, changes):
    many, single = (make_agent(num_seeds=n, seed=seed, module=module, **changes) for n, seed in ((3, 4), (1, 6)))
    params = dict(many.named_parameters())
    assert all(torch.equal(params[name][2], param[0]) for name, param in single.named_parameters())


@AGENTS
def test_a_stack_trains_as_single_runs_do(module, changes):
    """From the same minibatches and noise: K = 2 models make the steps of one model, twice."""
    many = make_agent(num_seeds=2, module=module, seed=3, **changes)
    single = make_agent(module=module, seed=4, **changes)
    recorded = []

    def run(agent, replay: bool) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("rand", "randn", "randint"):
                original = getattr(torch, name)

                def drawn(*args, original=original, **kwargs):
                    if not replay:
                        recorded.append(original(*args, **kwargs))
                        return recorded[-1]
                    value, (size, *_) = recorded.pop(0), [arg for arg in args if isinstance(arg, tuple)] or [args]
                    axis = value.ndim - len(size) + [i for i, n in enumerate(size) if n == 1 and value.shape[i] == 2][0]
                    return value.narrow(axis, 1, 1).clone()

                patch.setattr(torch, name, drawn)
            train(agent)

    start = {name: param.detach().clone() for name, param in single.named_parameters()}
    run(many, replay=False)
    run(single, replay=True)
    params = dict(many.named_parameters())
    for name, param in single.named_parameters():
        error, moved = (params[name][1] - param[0]).norm(), (param - start[name]).norm()
        assert error <= 1e-2 * moved + 1e-7, name  # rounding may move a ReLU or a minimum to its other side


@AGENTS
def test_an_update_can_be_captured(module, changes):
    """Nothing in it waits for the device, its metrics have one value per model, and it changes nothing but the agent's state."""

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function._schema.name.removeprefix("aten::")
            assert name not in NOT_IN_A_GRAPH - {"_to_copy"}, name
            return function(*args, **(kwargs or {}))

    agent = make_agent(num_seeds=2, module=module, **changes)
    for update in updates(agent):
        rows, before = agent.data.rows.clone(), snapshot(agent)
        with Spy():
            metrics = update()
        assert metrics and all(value.shape == (2,) and not value.requires_grad for value in metrics.values())
        assert torch.equal(rows, agent.data.rows)
        state = stacked.state_of(agent)
        assert state.keys() == before.keys() and sum(not torch.equal(state[name], before[name]) for name in state) > 5


@AGENTS
def test_state_is_loaded_by_name_and_in_place(module, changes):
    agent, other = make_agent(module=module, **changes), make_agent(module=module, seed=9, **changes)
    for _ in range(2):
        train(agent)
    places = {name: value.data_ptr() for name, value in stacked.state_of(other).items()}
    saved = copy.deepcopy(stacked.state_of(agent))
    stacked.load_state(other, dict(reversed(saved.items())))
    loaded = stacked.state_of(other)
    assert all(torch.equal(loaded[name], saved[name]) and loaded[name].data_ptr() == places[name] for name in saved)
    for change in (
        lambda s: s.pop(next(iter(s))),
        lambda s: s.update(more=torch.zeros(1)),
        lambda s: s.update({next(iter(s)): torch.zeros(7)}),
    ):
        foreign = copy.deepcopy(stacked.state_of(make_agent(module=module, seed=3, **changes)))
        change(foreign)
        with pytest.raises(ValueError, match="state differs"):
            stacked.load_state(other, foreign)
        assert all(torch.equal(stacked.state_of(other)[name], saved[name]) for name in saved)


@AGENTS
def test_actions_do_not_depend_on_how_many_states_are_given(module, changes):
    agent = make_agent(num_seeds=2, module=module, **changes)
    obs = torch.randn(2, 70, 3)
    act = lambda obs: agent.act(obs, torch.Generator().manual_seed(1))
    actions = act(obs)
    assert (
        actions.shape == (2, 70, 2 * getattr(agent.args, "chunk", 1)) and actions.abs().max() <= 1 and not actions.requires_grad
    )
    torch.testing.assert_close(act(obs[:, :40]), actions[:, :40])


class Killed(BaseException):
    pass


@EACH
@pytest.mark.slow
def test_a_killed_run_resumes_bit_identically(hopper, tmp_path, monkeypatch, module):
    """An end without a word in mid-run, then --resume: parameters and evaluations are those of an undisturbed run."""
    flags = ["--env-id=hopper-medium-v2", *FLAGS, "--epochs=4", "--eval-every=2"]
    flags += [f"--{name.replace('_', '-')}={value}" for name, value in own(module).items()]
    whole = run_here(module, *flags, "--run-dir", tmp_path / "whole")
    (total,), advance = {common.open_checkpoint(whole / "checkpoint.pt")["step"]}, run_folder.Run.advance

    def killed(run, metrics):
        if run.step == total - 30:
            raise Killed
        advance(run, metrics)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run_folder.Run, "advance", killed)
        run_here(module, *flags, "--run-dir", tmp_path / "runs")
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert common.open_checkpoint(run_dir / "checkpoint.pt")["step"] < total - 30
    run_here(module, "--resume", run_dir)
    assert_same_end(whole, run_dir)


@EACH
@pytest.mark.slow
def test_a_run_is_deployed_as_it_was_trained(hopper, tmp_path, module):
    """load_policy of model 1 acts on raw observations as the agent of the run on normalised ones, in the environment's units."""
    args = make_args(tmp_path, module, num_seeds=2, epochs=1, normalize=True)
    run_dir = Path(module.main(args)["run_dir"])
    act = module.load_policy(str(run_dir / "checkpoint.pt"), index=1)
    assert act.about["seed"] == 1
    task, raw = tasks.load_task(args), tasks.load_task(dataclasses.replace(args, normalize=False))
    np.testing.assert_allclose(task.obs, (raw.obs - raw.obs.mean(0)) / (raw.obs.std(0) + 1e-3), rtol=1e-4, atol=1e-4)
    actions = act(raw.obs[:7])
    assert actions.shape == (7, 3) and act(raw.obs[0]).shape == (3,) and np.abs(actions).max() <= 1
    agent = make_agent(num_seeds=2, obs_dim=11, action_dim=3, module=module)
    stacked.load_state(agent, common.open_checkpoint(run_dir / "checkpoint.pt")["agent"])
    if agent.act.num_candidates == 1 and module.__name__ in ("bc", "iql", "srpo"):  # no noise in the action
        both = agent.act(torch.as_tensor(task.obs[None, :7]).expand(2, -1, -1), torch.Generator())
        np.testing.assert_allclose(actions, both[1], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="NaN"):
        act(np.full(11, np.nan))
    with pytest.raises(UserError, match="shape"):
        act(np.zeros(5))
    with pytest.raises(UserError, match="there is no 2"):
        module.load_policy(str(run_dir / "checkpoint.pt"), index=2)


@EACH
def test_help_shows_the_tasks_values_and_bad_flags_are_one_line(module):
    script = f"{module.__name__}.py"
    assert run_inside("--help", script=script).returncode == 0
    for flags, message in (
        (["--batch-size=0"], "--batch-size"),
        (["--learning-rate=nan"], "--learning-rate"),
        (["--no-such"], "no-such"),
    ):
        result = run_inside(*flags, script=script)
        assert result.returncode == 2 and message in result.stderr and len(result.stderr.strip().splitlines()) == 1


HACK = [  # a flag, a loss term that draws noise and uses dropout, and a print
    ("    num_candidates: int = 1024\n",
     '    bonus: float = 0.1\n    """weight of the entropy"""\n    num_candidates: int = 1024\n'),
    ("            actions = torch.tanh(mean + torch.exp(log_std) * z)\n",
     "            actions = torch.tanh(mean + torch.exp(log_std) * torch.randn_like(z))\n            print(end='')\n"),
    ("        if self.args.nll:\n",
     "        bonus = nn.functional.dropout(metrics['entropy'], 0.1)\n        loss = loss - self.args.bonus * bonus\n"
     "        if self.args.nll:\n"),
]  # fmt: skip


@pytest.mark.slow
def test_a_copied_script_with_a_flag_and_a_loss_term_more_is_a_method(hopper, tmp_path):
    """It trains, resumes, loads its policy, is watched and benchmarked, without a change to another file."""
    text = (ROOT / "dtql_continuous.py").read_text()
    for old, new in HACK:
        assert text.count(old) == 1
        text = text.replace(old, new)
    script = ROOT / f"my_variant_{tmp_path.name.replace('-', '_')}.py"
    script.write_text(text)
    tools.methods.cache_clear()
    try:
        flags = [*FLAGS, "--pretrain-epochs=1", "--num-candidates=8", "--no-compile"]
        trained = run_inside(
            "--env-id=hopper-medium-v2", "--bonus=0.2", *flags, "--run-dir", tmp_path / "runs", script=script.name
        )
        assert trained.returncode == 0, trained.stderr
        (run_dir,) = (tmp_path / "runs").iterdir()
        assert run_inside("--resume", run_dir, script=script.name).returncode == 0
        loaded = f"import {script.stem} as v; print(v.load_policy('{run_dir}/checkpoint.pt')([0] * 11).shape)"
        assert "(3,)" in run_python(loaded)
        watched = run_inside(run_dir, "--episodes=0", script="tools.watch")
        assert watched.returncode == 0, watched.stderr
        command = ["--methods", script.stem, "--tasks", "hopper-medium-v2", "--num-seeds=1", "--out-dir", tmp_path / "bench"]
        assert script.stem in run_inside(*command, "--print-commands", script="tools.benchmark").stdout
        # A checkpoint from before a flag was added loads after it
        script.write_text(re.sub(r"(    num_candidates: int = 1024\n)", '    later: int = 3\n    """a new flag"""\n\\1', text))
        assert "(3,)" in run_python(loaded)
        assert run_inside("--resume", run_dir, script=script.name).returncode == 0
    finally:
        script.unlink()
        tools.methods.cache_clear()


def run_python(code: str) -> str:
    import subprocess
    import sys

    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_copies_of_the_environment_are_as_many_as_states_are_acted_in():
    from best_of import STATES

    assert STATES == evaluation.MAX_COPIES


def test_stacked_imports_torch_alone():
    modules = run_python(
        "import stacked, sys; print(*[m for m in ('tyro', 'tensorboard', 'gymnasium', 'common', 'ray') if m in sys.modules])"
    )
    assert modules.strip() == ""
