"""Every method on a CUDA device that exists in shapes only: nothing meets a tensor of the CPU, and the host waits for nothing.

No GPU is needed: torch's FakeTensorMode knows shapes, strides and devices, and computes nothing. A CUDA graph asks for both: it
would keep a number of the host as it was, and waiting is forbidden in it. What only a GPU can tell is in test_gpu.py.
"""

import ctypes
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import VARIANTS, make_agent, updates
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dtql_continuous as dtql
import stacked

pytestmark = pytest.mark.slow

# The host reads a tensor, or a shape depends on values
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "bincount"}
COPIES = {"_to_copy", "lift_fresh", "copy_"}  # what acting may do once each way


def tensors(tree: object) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def on_device(x: Tensor) -> bool:
    return str(x.device) == "cuda:0"


class OnDevice(TorchDispatchMode):
    """Everything that an operation reads or makes is on the GPU, but for numbers written in the program."""

    def __init__(self, acting: bool = False):
        super().__init__()
        self.acting, self.operations, self.copies, self.numbers = acting, 0, 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        space, _, name = function._schema.name.partition("::")
        kwargs = kwargs or {}
        if space != "aten":  # a question for the device, or the profiler's
            return function(*args, **kwargs)
        self.operations += 1
        assert name not in WAITS, f"{name} waits for the device"
        # torch knows no shapes for fused Adam with a learning rate on the device; it returns nothing
        result = None if name in ("_fused_adamw_", "_fused_adam_") else function(*args, **kwargs)
        inputs, outputs = tensors((args, kwargs)), tensors(result)
        if not inputs:
            self.numbers += [x for x in outputs if not on_device(x)]
        elif self.acting and name in COPIES:
            self.copies += any(map(on_device, inputs)) and not all(map(on_device, outputs))
        else:
            places = [str(x.device) for x in inputs + outputs if not on_device(x) and not any(x is one for one in self.numbers)]
            assert self.acting or not places, f"{name} with a tensor on {places[0]}"
        return result


def move(module: nn.Module, function, recurse: bool = True) -> nn.Module:
    """`Module._apply`, which cannot change the device of fake parameters."""
    for child in module.children():
        move(child, function)
    module._parameters.update({name: nn.Parameter(function(x.detach())) for name, x in module._parameters.items()})
    module._buffers.update({name: function(x) for name, x in module._buffers.items()})
    return module


@pytest.fixture(autouse=True)
def fake_cuda(monkeypatch):
    """Tensors made from here on are fake. Four things that torch does with real ones only are left out or done here."""
    guards = (ctypes.c_void_p * 20).in_dll(
        ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so")), "_ZN3c104impl26device_guard_impl_registryE"
    )
    before = guards[1]
    guards[1] = before or guards[14]  # a build without CUDA has no guard of its devices; that of "meta" does nothing
    monkeypatch.setattr(nn.Module, "_apply", move)
    for initialise in ("orthogonal_", "trunc_normal_"):  # slow, and not what is asked here
        monkeypatch.setattr(nn.init, initialise, lambda tensor, *args, **kwargs: tensor)
    # Gradients need the device's thread. They are made by the operations of the losses, where those are
    monkeypatch.setattr(torch.autograd, "grad", lambda outputs, inputs, *args, **kwargs: tuple(map(torch.zeros_like, inputs)))
    copied = lambda self, memo: nn.Parameter(self.detach().clone()) if isinstance(self, nn.Parameter) else self.detach().clone()
    monkeypatch.setattr(Tensor, "__deepcopy__", lambda self, memo: memo.setdefault(id(self), copied(self, memo)))
    with FakeTensorMode():
        yield
    guards[1] = before


@pytest.fixture
def make(monkeypatch):
    def make(module, num_seeds: int = 1, **changes):
        with monkeypatch.context() as patch:  # Adam's constructor asks whether the learning rate is positive
            patch.setattr(Tensor, "__bool__", lambda self: True)
            return make_agent(num_seeds, 11, 3, module=module, device="cuda:0", **changes)

    return make


def lasting(agent) -> list[Tensor]:
    """What stays from one update to the next, wherever it is held."""
    optimizers = [value for value in vars(agent).values() if isinstance(value, torch.optim.Optimizer)]
    groups = [[adam.param_groups, list(adam.state), list(adam.state.values())] for adam in optimizers]
    return tensors(
        [vars(agent), list(agent.parameters()), list(agent.buffers()), vars(agent.data), stacked.state_of(agent), groups]
    )


AGENTS = [*VARIANTS, (dtql, dict(nll=False, alpha=(1.0, 5.0)))]


@pytest.mark.parametrize("num_seeds", [1, 3])
@pytest.mark.parametrize(("module", "changes"), AGENTS)
def test_an_update_stays_on_the_device(module, changes, num_seeds, make):
    agent = make(module, num_seeds, **changes)
    assert len(lasting(agent)) > 30 and all(map(on_device, lasting(agent)))
    for update in updates(agent):
        with OnDevice() as seen:
            update()
        assert seen.operations > 40
    if hasattr(agent, "start_training"):
        with OnDevice():
            agent.start_training()
    assert all(map(on_device, lasting(agent)))


@pytest.mark.parametrize(("module", "changes"), AGENTS)
def test_acting_copies_observations_there_and_actions_back(module, changes, make, monkeypatch):
    """But for the question whether another candidate can win: here always, so that all blocks of candidates are judged."""
    agent = make(module, 2, **changes, **(dict(num_candidates=130) if hasattr(module.Args, "num_candidates") else {}))
    monkeypatch.setattr(Tensor, "__bool__", lambda self: False)
    with OnDevice(acting=True) as seen:
        obs = torch.as_tensor(np.zeros((agent.args.num_models, 5, 11), np.float32), device=agent.device)
        actions = agent.act(obs, None).cpu()
    assert actions.shape == (agent.args.num_models, 5, 3 * getattr(agent.args, "chunk", 1)) and seen.copies == 1


def test_an_update_is_prepared_on_the_device(make, monkeypatch, capsys):
    agent, captured = make(dtql, 2, lr_decay=True), []
    monkeypatch.setattr(torch.cuda, "default_generators", (torch.default_generator,))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "allclose", lambda *args, **kwargs: True)
    monkeypatch.setattr(stacked, "capture", lambda update: (update(), captured.append(update), update)[-1])
    with OnDevice(acting=True) as seen:
        stacked.fastest(functools.partial(agent.update, True), agent, compile=False, graph=True)
    assert captured and seen.copies == 3  # the metrics: eager, compiled, captured
    assert all(map(on_device, lasting(agent))) and "note:" not in capsys.readouterr().err


# ---- that the tests above can fail ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda agent, host, number: agent.train_step.item(), "_local_scalar_dense waits"),
        (lambda agent, host, number: bool(agent.train_step > 3), "_local_scalar_dense waits"),
        (lambda agent, host, number: agent.data.rows[agent.data.rows[:, 0] > 0], "nonzero"),
        (lambda agent, host, number: agent.train_step * number, "mul with a tensor on cpu"),  # torch allows that
        (lambda agent, host, number: agent.data.rows[:3, 0] + host, "device"),
        (lambda agent, host, number: agent.data.rows[host.long()], "cpu"),
        (lambda agent, host, number: agent.train_step.copy_(number), "copy_ with a tensor on cpu"),
        (lambda agent, host, number: stacked.polyak_update(agent.target_critic, agent.critic, number), "cpu"),
        (lambda agent, host, number: torch.tensor(3e-4, device=agent.device), "cpu"),
        (lambda agent, host, number: agent.train_step.to("cpu"), "_to_copy with a tensor on cpu"),
    ],
)
def test_a_fault_in_an_update_is_found(fault, message, make):
    agent, host, number = make(dtql), torch.ones(3), torch.ones(())
    with pytest.raises((AssertionError, RuntimeError), match=message), OnDevice():
        agent.update(training=True)
        fault(agent, host, number)


def test_a_fault_in_a_loss_is_found(make, monkeypatch):
    agent, host = make(dtql), torch.ones(())
    monkeypatch.setattr(dtql, "c_out", lambda sigma: sigma * host)
    with pytest.raises((AssertionError, RuntimeError), match="cpu"), OnDevice():
        agent.update(training=True)
