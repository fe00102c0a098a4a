"""Several seeds and values of a method's weight in one process: each model is the one that trains alone."""

import copy
import itertools

import numpy as np
import pytest
import torch
from helpers import FLAGS, make_agent, make_args, rows_of, run_script, updates
from torch.utils._pytree import tree_map

import bc
import dql
import dtql_continuous as dtql
import fql
import idql
import iql
import kl_distill
import report
import srpo
from common import UserError

SWEEPS = [
    (dtql, dict(alpha=(1.0, 5.0), expectile=(0.6, 0.9))),
    (kl_distill, dict(alpha=(0.1, 3.0))),
    (iql, dict(beta=(1.0, 3.0), expectile=(0.7, 0.8))),
    (idql, dict(expectile=(0.6, 0.9))),
    (dql, dict(eta=(0.15, 2.0))),
    (srpo, dict(beta=(0.02, 0.5))),
    (fql, dict(alpha=(3.0, 300.0))),
]


@pytest.mark.parametrize(("module", "values"), [*SWEEPS, *((module, {}) for module in (bc, *(module for module, _ in SWEEPS)))])
def test_each_model_is_the_one_that_trains_alone(module, values):
    """With the same minibatches and noise: to the bit if the models differ in a setting, else up to rounding."""
    together, calls = make_agent(2, module=module, **values), []
    before = copy.deepcopy(together.models.params)
    step, average = together.models.step, together.models.average
    together.models.step = lambda loss, *inputs, **more: (
        calls.append((loss.__name__, inputs, more)),
        step(loss, *inputs, **more),
    )
    together.models.average = lambda *inputs: (calls.append((None, inputs, {})), average(*inputs))
    for _ in range(2):
        for update in updates(together):
            update()
    number = 2 * int(np.prod([len(each) for each in values.values()]))
    assert together.args.num_models == number == len(together.args.model_seeds)
    for index in range(number):
        about = together.args.about(index)
        alone = make_agent(1, module=module, seed=about["seed"], **{name: about[name] for name in values})
        for loss, inputs, more in calls:
            if loss is None:
                alone.models.average(*inputs)
            else:
                alone.models.step(getattr(alone, loss), *tree_map(lambda x: x[index : index + 1], inputs), **more)
        for network, params in alone.models.params.items():
            for name, param in params.items():
                ours, moved = together.models.params[network][name][index], param[0] - before[network][name][index]
                bound = 0 if values else 0.02 * moved.norm()
                assert (ours - param[0]).norm() <= bound, (about, network, name)
    given = {tuple(together.args.about(index)[name] for name in values) for index in range(number)}
    assert given == set(itertools.product(*values.values()))


@pytest.mark.parametrize(("module", "name"), [(dtql, "alpha"), (dql, "eta"), (iql, "beta"), (srpo, "beta"), (fql, "alpha")])
def test_the_setting_matters(module, name):
    one, other = (make_agent(1, module=module, **{name: value}) for value in (0.1, 3.0))
    for agent in (one, other):
        torch.manual_seed(0)
        for update in updates(agent):
            update()
    network = "denoiser" if module is dql else "actor"
    assert not all(torch.equal(param, other.models.params[network][key]) for key, param in one.models.params[network].items())


def test_one_value_is_no_sweep():
    one, plain = make_agent(2, alpha=(5.0,)), make_agent(2, alpha=5.0)
    assert one.args.labels == plain.args.labels == ["", ""]
    for agent in (one, plain):
        torch.manual_seed(0)
        agent.update(training=True)
    assert all(torch.equal(param, one.models.params["actor"][name]) for name, param in plain.models.params["actor"].items())


def test_a_run_says_which_is_which(hopper, tmp_path):
    """The command line: tables, TensorBoard, the policy, the report and a resumed run name the settings."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = [
        "--env-id",
        "hopper-medium-v2",
        "--alpha",
        "1",
        "5",
        "--num-seeds",
        "2",
        *FLAGS,
        "--pretrain-epochs=1",
        "--num-candidates=8",
        "--run-dir",
        tmp_path / "runs",
    ]
    result = run_script(*flags)
    assert result.returncode == 0, result.stderr
    assert "alpha=1: " in result.stdout and "alpha=5: " in result.stdout and "4 model(s)" in result.stdout
    (run_dir,) = (tmp_path / "runs").iterdir()
    rows, episodes = rows_of(run_dir), rows_of(run_dir, "episodes.csv")
    expected = [("alpha=1", "0"), ("alpha=1", "1"), ("alpha=5", "0"), ("alpha=5", "1")]
    assert [(row["setting"], row["seed"]) for row in rows[-4:]] == expected
    assert {(row["setting"], row["seed"]) for row in episodes} == set(expected)
    events = EventAccumulator(str(run_dir)).Reload()
    assert "eval/score_mean_alpha=5_seed1" in events.Tags()["scalars"] and "losses_alpha=5/actor" in events.Tags()["scalars"]
    policy = dtql.load_policy(str(run_dir / "checkpoint.pt"), 2)
    assert policy.about["alpha"] == 5 and policy.about["seed"] == 0
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)["learner"]["params"]["settings"]
    assert saved["alpha"].tolist() == [1, 1, 5, 5]
    with pytest.raises(UserError, match=r"4 model\(s\): there is no 4"):
        dtql.load_policy(str(run_dir / "checkpoint.pt"), 4)
    again = run_script("--resume", run_dir)
    assert again.returncode == 0, again.stderr
    assert rows_of(run_dir) == rows
    runs = report.read_runs(tmp_path / "runs")
    assert sorted((run.method, run.seed) for run in runs) == [(f"dtql_continuous {label}", int(seed)) for label, seed in expected]
    text = report.write_report(tmp_path / "runs", [("hopper-medium-v2", "dtql_continuous")]).read_text()
    assert "dtql_continuous alpha=1, last" in text and "missing" not in text.split("paper")[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [((1.0, 1.0), "give each value once"), ((1.0, -1.0), "must lie in"), ((), "give each value once"), ((1.0,) * 0, "once")],
)
def test_bad_values(tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        dtql.main(make_args(tmp_path, alpha=values))
    assert not (tmp_path / "runs").exists()


def test_too_many_models(tmp_path):
    with pytest.raises(UserError, match="too many"):
        dtql.main(make_args(tmp_path, num_seeds=6000, alpha=(1.0, 2.0)))
