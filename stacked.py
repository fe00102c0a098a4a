"""Train K models in parallel: networks, losses and actions have a leading dimension of models.

    Linear(in, out)    one nn.Linear per model: weight (K, out, in), input (K, B, in) -> (K, B, out); twin Qs have (K, 2, out, in)
    a loss             returns (K,), {name: (K,)}: means over the minibatch, one value per model

The models share nothing, so the gradient of the sum of their losses is each model's own gradient, and Adam is elementwise.
(A loss that is averaged over the models as well only scales their gradients, which Adam does not notice.)
"""

import copy
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

Metrics = dict[str, Tensor]


# ---- networks ----------------------------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """nn.Linear, also with leading model dimensions: weight (*models, out, in), x (*models, B, in) -> (*models, B, out)."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT + self.bias.unsqueeze(-2)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the last dimension, also with leading model dimensions: weight (*models, width)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * self.weight.unsqueeze(-2) + self.bias.unsqueeze(-2)


class Mish(nn.Mish):
    """x tanh(softplus(x)) as x n / (2 - n) with n = s (2 - s), s = sigmoid(x).

    exp, log1p and tanh take a CPU as long as the matrix product beside them. Eager training keeps torch's fused kernel.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or x.is_cuda):
            return F.mish(x)
        s = torch.sigmoid(x)
        n = s * (2 - s)
        return x * n / (2 - n)


def with_parameters(module: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """A copy of `module` whose parameters are `values`, by name, which are not copied; nor are its buffers."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    clone = copy.deepcopy(module, shared)
    for name, value in values.items():
        path, _, leaf = name.rpartition(".")
        setattr(clone.get_submodule(path), leaf, nn.Parameter(value))
    return clone


def stack(modules: Sequence[nn.Module]) -> nn.Module:
    """One module that holds the parameters of equal `modules` along a new first dimension."""
    each = [dict(module.named_parameters()) for module in modules]
    return with_parameters(modules[0], {name: torch.stack([params[name].detach() for params in each]) for name in each[0]})


def stack_seeds(make: Callable[[], nn.Module], seeds: Sequence[int]) -> nn.Module:
    """One model per seed, stacked. Model i starts with the parameters that a single run of seeds[i] starts with."""
    models = []
    for seed in seeds:
        torch.manual_seed(seed)
        models.append(make())
    torch.manual_seed(seeds[0])
    return stack(models)


# ---- data ----------------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """A minibatch per model: obs, next_obs (K, B, S), actions (K, B, A) in [-1, 1], rewards, terminals (K, B)."""

    obs: Tensor
    actions: Tensor
    rewards: Tensor
    terminals: Tensor
    next_obs: Tensor


class Transitions:
    """N transitions on the device as one matrix, so that a minibatch is a single gather."""

    def __init__(self, obs: Any, actions: Any, rewards: Any, terminals: Any, next_obs: Any, device: torch.device):
        """Arrays as in `Batch`, of shapes (N, ...)."""
        columns = [torch.as_tensor(column) for column in (obs, actions, rewards[:, None], terminals[:, None], next_obs)]
        self.rows = torch.cat(columns, 1).to(device)
        self.widths = [column.shape[1] for column in columns]

    def columns(self, rows: Tensor) -> Batch:
        """Rows (..., W) of the matrix as a minibatch."""
        obs, actions, rewards, terminals, next_obs = rows.split(self.widths, -1)
        return Batch(obs, actions, rewards.squeeze(-1), terminals.squeeze(-1), next_obs)

    def sample(self, *shape: int) -> Batch:
        """Uniformly sampled transitions: `sample(K, B)` gives each model its own minibatch."""
        return self.columns(self.rows[torch.randint(len(self.rows), shape, device=self.rows.device)])


# ---- one update ----------------------------------------------------------------------------------------------------------


def make_step(
    loss: Callable[..., tuple[Tensor, Metrics]],
    optimizer: torch.optim.Optimizer,
    compile: bool = False,
    clip: Callable[[list[Tensor]], list[Tensor]] = list,
) -> Callable[..., Metrics]:
    """A function `step(*inputs)` that takes one optimizer step on `loss(*inputs)` and returns the loss's metrics, detached.

    `clip` changes the gradients (K, ...) before the step. Loss and gradient are compiled as one function, which is faster than
    compiling the loss alone.
    """
    _make_capturable(optimizer)
    params = [param for group in optimizer.param_groups for param in group["params"]]

    def gradient(*inputs: Any) -> tuple[list[Tensor], Metrics]:
        losses, metrics = loss(*inputs)
        # Fused Adam reads a gradient as if its strides were those of its parameter
        gradients = clip([gradient.contiguous() for gradient in torch.autograd.grad(losses.sum(), params)])
        return gradients, {name: value.detach() for name, value in metrics.items()}

    if compile:
        gradient = compiled(gradient)

    def step(*inputs: Any) -> Metrics:
        gradients, metrics = gradient(*inputs)
        for param, grad in zip(params, gradients, strict=True):
            param.grad = grad
        optimizer.step()
        return metrics

    return step


def _make_capturable(optimizer: torch.optim.Optimizer) -> None:
    """CUDA graphs need fixed addresses: make the learning rate a tensor and allocate Adam's state up front."""
    for group in optimizer.param_groups:
        device = group["params"][0].device
        group["initial_lr"] = group["lr"]
        group["lr"] = torch.tensor(group["lr"], device=device)
        group["capturable"] = device.type == "cuda"
        for param in group["params"]:
            moments = {"exp_avg": torch.zeros_like(param.detach()), "exp_avg_sq": torch.zeros_like(param.detach())}
            optimizer.state[param] = {"step": torch.zeros((), device=device), **moments}


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: Tensor) -> None:
    """Set the learning rate to its initial value times `factor`."""
    for group in optimizer.param_groups:
        group["lr"].copy_(factor * group["initial_lr"])


@torch.no_grad()
def polyak_update(target: nn.Module, source: nn.Module, rate: float | Tensor) -> None:
    """target += rate * (source - target)."""
    targets, sources = list(target.parameters()), list(source.parameters())
    # One weight per tensor: a single tensor as weight would force a sync with the host
    torch._foreach_lerp_(targets, sources, [rate] * len(targets) if isinstance(rate, Tensor) else rate)


# ---- state ---------------------------------------------------------------------------------------------------------------


def state_of(agent: nn.Module) -> dict[str, Tensor]:
    """All that training changes, by name: parameters, buffers and the state of every optimizer; not copies."""
    state = agent.state_dict()
    for name, optimizer in vars(agent).items():
        if isinstance(optimizer, torch.optim.Optimizer):
            for i, group in enumerate(optimizer.param_groups):
                state[f"{name}.{i}.lr"] = group["lr"]
                for j, param in enumerate(group["params"]):
                    state |= {f"{name}.{i}.{j}.{key}": value for key, value in optimizer.state[param].items()}
    return state


@torch.no_grad()
def load_state(agent: nn.Module, saved: dict[str, Tensor]) -> None:
    """Copy `saved` in place and by name. Raises ValueError, with nothing changed, if names or shapes differ."""
    state = state_of(agent)
    different = sorted(state.keys() ^ saved.keys())
    different += [name for name in state.keys() & saved.keys() if state[name].shape != saved[name].shape]
    if different:
        raise ValueError(f"its state differs from this script's in {len(different)} entries, first {different[0]}")
    for name, value in state.items():
        value.copy_(saved[name])


# ---- compiling and capturing -----------------------------------------------------------------------------------------


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which must be pure and have static shapes, through torch.compile."""
    torch._dynamo.config.trace_autograd_ops = True  # a function may contain torch.autograd.grad
    torch._dynamo.config.recompile_limit = 256  # per code object, and all losses share `gradient`
    warnings.filterwarnings("ignore", "TensorFloat32")  # plain float32 is intended
    return torch.compile(function, dynamic=False)


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that draws on `device` unless another one is given."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index]
    return torch.mps._get_default_mps_generator() if device.type == "mps" else torch.default_generator


def fastest(update: Callable[[], Metrics], agent: nn.Module, compile: bool, graph: bool) -> Callable[[], Metrics]:
    """The fastest version of `update` that works: compiled if the agent compiles its losses, captured if `graph`.

    `update` must have static shapes and change nothing but the agent's state and the random state; both are restored after the
    trial runs. Falls back to eager execution, with a note, if capturing fails or if the metrics of two updates change.
    """
    if not (compile or graph):
        return update
    started, generator = time.perf_counter(), default_generator(next(agent.parameters()).device)
    state = list(state_of(agent).values())
    saved, random_state = [tensor.clone() for tensor in state], generator.get_state()

    @torch.no_grad()
    def restore() -> None:
        torch._foreach_copy_(state, saved)
        generator.set_state(random_state)

    def second_metrics(update: Callable[[], Metrics]) -> Tensor:
        restore()  # two updates, because an optimizer that does nothing shows in the second
        update()
        return torch.stack([value.float().mean() for value in update().values()]).cpu()

    fast = update
    with torch.compiler.set_stance("force_eager"):
        reference = second_metrics(update)
    try:
        second_metrics(update)  # compiles
        if graph:
            restore()
            fast = capture(update)
        metrics = second_metrics(fast)
        if not torch.allclose(metrics, reference, rtol=1e-2, atol=1e-3, equal_nan=True):
            raise RuntimeError(f"metrics differ from the eager update's by up to {(metrics - reference).abs().max():.2g}")
    except Exception as error:
        flags = " and ".join(flag for flag, used in (("--compile", compile), ("--cudagraphs", graph)) if used)
        reason = " ".join(str(error.__context__ or error).split())[:300]
        print(f"note: going on without {flags}, which fails here: {reason}", file=sys.stderr)
        torch.compiler.set_stance("force_eager")
        fast = update
    finally:
        restore()
    print(f"update prepared in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return fast


def capture(update: Callable[[], Metrics]) -> Callable[[], Metrics]:
    """`update` as a CUDA graph; the warm-up runs change its state. Each replay draws new noise and overwrites the metrics."""
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(3):
            update()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            metrics = update()
    except BaseException:
        torch.cuda.set_stream(before)  # torch leaves its own stream current if a capture fails
        fresh = torch.Generator("cuda")  # and, up to 2.12, a generator that goes on capturing
        torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(fresh.graphsafe_get_state())
        raise

    def replay() -> Metrics:
        graph.replay()
        return metrics

    return replay
