"""What a CUDA graph would do, on the CPU and with numbers: the operations of one update, recorded with their tensors and the
host's numbers, and made again in place. Whatever else changes from one update to the next would stay as it was."""

import pytest
import torch
from helpers import VARIANTS, make_agent, snapshot, updates
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dtql_continuous as dtql
import stacked
from tools import import_method

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tiny_networks")]


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, schema = function(*args, **(kwargs or {})), function._schema
        if schema.is_mutable or not any(one.alias_info for one in schema.returns):  # views follow their memory
            self.calls.append((function, args, kwargs or {}, result, schema.is_mutable))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, result, in_place in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again)) if not in_place else ():
                if isinstance(old, Tensor):
                    old.copy_(new)


def capture(update):
    update()
    with Tape() as tape:
        metrics = update()
    return lambda: (tape.replay(), metrics)[1]


def trained(monkeypatch, graph: bool, module=dtql, change=lambda agent, update: update, **changes):
    """The state after four updates of each phase."""
    monkeypatch.setattr(stacked, "capture", capture)
    agent = make_agent(1, 5, 2, module=module, batch_size=16, **changes)
    if module.__name__ == "dql":
        agent.train_step.fill_(997)  # its average begins at update 1000
    torch.manual_seed(7)
    for update in updates(agent):
        fast = stacked.fastest(change(agent, update), agent, False, graph)
        for _ in range(4):
            fast()
    return snapshot(agent) | {"random state": torch.get_rng_state()}


@pytest.mark.parametrize(("module", "changes"), VARIANTS, ids=str)
def test_replayed_and_eager_updates_are_the_same_to_the_bit(module, changes, monkeypatch, capsys):
    ends = [trained(monkeypatch, graph, module, **changes) for graph in (False, True)]
    assert "note:" not in capsys.readouterr().err  # not a fallback
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=0)


def test_the_online_phase_can_be_captured(monkeypatch, capsys):
    def start_online(agent, update):
        agent.replay.rows[:, :20] = agent.data.rows[:20]
        agent.replay.size.fill_(20)
        agent.start_online()
        return update

    module = import_method("dtql_online")
    ends = [trained(monkeypatch, graph, module, start_online, critic="td", offline_ratio=0.5) for graph in (False, True)]
    assert "note:" not in capsys.readouterr().err
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=0)


def test_a_number_of_the_host_that_changes_is_found(monkeypatch):
    def counting(agent, update):
        calls = []

        def counted():
            metrics = update()
            agent.train_step.fill_(len(calls))
            calls.append(1)
            return metrics

        return counted

    ends = [trained(monkeypatch, graph, change=counting, lr_decay=True) for graph in (False, True)]
    assert ends[0]["train_step"] == 3 != ends[1]["train_step"]
