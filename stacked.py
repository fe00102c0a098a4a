"""K models that train at once: all that a script has to know of the dimension K.

A network is a plain `nn.Module` of one model. A `Learner` holds the parameters of K models, stacked along a new first
dimension; a `Net` with copies (the twin Qs) has them along a second one:

    params["critic"]["net.0.weight"]: (K, 2, 256, S + A)
    params["actor"]["net.0.weight"]:  (K, 256, S)

A loss is a function of one model, `loss(p, *inputs) -> (what is minimised, {name: what is logged})`. `p` holds that model's
parameters by network, p["actor"]["net.0.weight"]: (256, S); the inputs are its minibatch and its noise. Losses are mapped over
the models, their sum is differentiated once, and Adam is elementwise: each model gets exactly its own gradient.
"""

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

import common
from common import check

Params = dict[str, Tensor]  # the parameters of one network, by name


class Mish(nn.Mish):
    """x tanh(softplus(x)), without exp, log1p and tanh, which take a CPU as long as the matrix product beside them:
    x n / (2 - n) with n = s (2 - s), s = sigmoid(x). Where this is not fused, torch's own has the cheaper gradient."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or x.is_cuda):
            return F.mish(x)
        s = torch.sigmoid(x)
        n = s * (2 - s)
        return x * n / (2 - n)


def detach(params: Params) -> Params:
    """The same tensors, of which no gradient is taken."""
    return {name: param.detach() for name, param in params.items()}


def stack(models: Sequence[Params]) -> Params:
    """The parameters of equal networks along a new first dimension."""
    return {name: torch.stack([model[name].detach() for model in models]) for name in models[0]}


class Net:
    """A network that is called with its parameters: `net(p["actor"], obs)`."""

    def __init__(self, make: Callable[[], nn.Module], device: torch.device, copies: int | None = None):
        """`make()` builds the plain module. With `copies` there are that many of it, each with its own parameters."""
        self.make, self.copies, self.module = make, copies, make().to(device)

    def initial(self) -> Params:
        """Fresh parameters of one model, (copies, *shape) with copies."""
        fresh = [dict(self.make().named_parameters()) for _ in range(self.copies or 1)]
        return stack(fresh) if self.copies else detach(fresh[0])

    def __call__(self, params: Params, *inputs: Tensor, copy: int | None = None) -> Any:
        """The module's output for one model's `params`; with copies (copies, ...), or that of one `copy`."""
        if copy is not None:
            params = {name: param[copy] for name, param in params.items()}
        if self.copies is None or copy is not None:
            return functional_call(self.module, params, inputs)
        return torch.vmap(lambda one: functional_call(self.module, one, inputs))(params)


class Batch(NamedTuple):
    """B transitions: obs, next_obs (B, S), actions (B, A) in [-1, 1], rewards, terminals (B,); of K models (K, B, ...)."""

    obs: Tensor
    actions: Tensor
    rewards: Tensor
    terminals: Tensor
    next_obs: Tensor


class Transitions:
    """N transitions on the device, as one matrix `rows`, so that a minibatch is one gather."""

    def __init__(
        self,
        obs: np.ndarray,
        actions: np.ndarray,
        rewards: np.ndarray,
        terminals: np.ndarray,
        next_obs: np.ndarray,
        device: torch.device,
    ):
        columns = (obs, actions, rewards[:, None], terminals[:, None], next_obs)
        self.rows = torch.as_tensor(np.concatenate(columns, 1), device=device)
        self.widths = [column.shape[1] for column in columns]

    def batch(self, indices: Tensor) -> Batch:
        """The transitions at `indices`, of any shape."""
        obs, actions, rewards, terminals, next_obs = self.rows[indices].split(self.widths, -1)
        return Batch(obs, actions, rewards.squeeze(-1), terminals.squeeze(-1), next_obs)

    def sample(self, *shape: int) -> Batch:
        """Uniformly drawn transitions: `sample(K, B)` gives each model its own minibatch."""
        return self.batch(torch.randint(len(self.rows), shape, device=self.rows.device))


# ---- learning ----------------------------------------------------------------------------------------------------------


class _Objective(NamedTuple):
    networks: tuple[str, ...]  # that the loss trains
    learning_rate: float
    adam: torch.optim.AdamW
    state: dict[str, Params]  # Adam's, by network and parameter
    eager: Callable[..., tuple[list[Tensor], Params]]
    fast: Callable[..., tuple[list[Tensor], Params]]  # compiled, where that is asked for


class Learner:
    """Parameters, targets, optimizers and logged metrics of K models, and their state by name.

    Attributes:
        params: by network and name, (K, *shape); see the head of this file.
        sums: the metrics since the last log, by name, (K,).
        buffers: whatever else belongs to the state, by name; set it before training and change it in place.
    """

    def __init__(
        self,
        nets: dict[str, Net],
        seeds: Sequence[int],
        metrics: Sequence[str],
        device: torch.device,
        compile: bool = False,
        settings: Mapping[str, Sequence[float]] = MappingProxyType({}),
    ):
        """One model for each of `seeds`, which starts as it would alone. Losses may log the names in `metrics`.

        `settings`: numbers in which models differ, K by name; a loss finds its model's in p["settings"].
        """
        self.device, self.compile, self.num_models = device, compile, len(seeds)
        models: dict[str, list[Params]] = {name: [] for name in nets}
        for seed in seeds:
            torch.manual_seed(seed)
            for name, net in nets.items():
                models[name].append(net.initial())
        torch.manual_seed(seeds[0])
        self.params = {
            network: {name: param.to(device).requires_grad_() for name, param in stack(params).items()}
            for network, params in models.items()
        }
        # Models with different settings take turns on a CPU, where that costs nothing: then each is to the bit the one that
        # trains alone, while a stack sums in another order
        self.apart = device.type == "cpu" and any(len(set(values)) > 1 for values in settings.values())
        if settings:
            self.params["settings"] = {name: torch.tensor(values, device=device) for name, values in settings.items()}
        self.sums = {name: torch.zeros(len(seeds), device=device) for name in metrics}
        self.buffers: Params = {}
        self._objectives: dict[str, _Objective] = {}

    # Targets

    def add_target(self, target: str, source: str) -> None:
        """A network `target` that starts as `source` and that no loss trains."""
        self.params[target] = {name: param.detach().clone() for name, param in self.params[source].items()}

    @torch.no_grad()
    def copy(self, source: str, *targets: str) -> None:
        """Set the parameters of `targets` to those of `source`."""
        for target in targets:
            torch._foreach_copy_(list(self.params[target].values()), list(self.params[source].values()))

    @torch.no_grad()
    def average(self, target: str, source: str, rate: float | Tensor) -> None:
        """Move `target` the share `rate` of the way to `source`."""
        ours, theirs = (self._each(self.params[network].values()) for network in (target, source))
        # As many weights as tensors, or the host would read the one
        torch._foreach_lerp_(ours, theirs, [rate] * len(ours) if isinstance(rate, Tensor) else rate)

    def _each(self, params: Iterable[Tensor]) -> list[Tensor]:
        """The tensors that are changed: those of all models, or with `apart` each model's own."""
        return [one for param in params for one in (param.detach().unbind() if self.apart else (param,))]

    # Losses

    def optimize(
        self,
        loss: Callable[..., tuple[Tensor, Params]],
        *networks: str,
        lr: float,
        max_norm: float | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        """Let `step(loss, ...)` train `networks` and nothing else, with Adam at the rate `lr`.

        `max_norm`: clip each model's gradient to this norm, over all of `networks`. `weight_decay`: AdamW's, of all parameters.
        """
        params = {f"{network}.{name}": param for network in networks for name, param in self.params[network].items()}
        # The learning rate is a tensor, and the state exists from the start, because a CUDA graph keeps addresses
        rate, capturable = torch.tensor(lr, device=self.device), self.device.type == "cuda"
        adam = torch.optim.AdamW(self._each(params.values()), rate, weight_decay=weight_decay, fused=True, capturable=capturable)
        state = {
            name: {
                "step": torch.zeros(self.num_models if self.apart else (), device=self.device),
                "exp_avg": torch.zeros_like(param),
                "exp_avg_sq": torch.zeros_like(param),
            }
            for name, param in params.items()
        }
        moments = {key: self._each(one[key] for one in state.values()) for key in ("step", "exp_avg", "exp_avg_sq")}
        for param, *values in zip(adam.param_groups[0]["params"], *moments.values(), strict=True):
            adam.state[param] = dict(zip(moments, values))

        def gradient(trained: dict[str, Params], fixed: dict[str, Params], *inputs: Any) -> tuple[list[Tensor], Params]:
            losses, metrics = torch.vmap(lambda trained, fixed, *inputs: loss({**fixed, **trained}, *inputs))(
                trained, fixed, *inputs
            )
            leaves = [param for network in networks for param in trained[network].values()]
            # Fused Adam reads a gradient as if it were laid out like its parameter
            gradients = [gradient.contiguous() for gradient in torch.autograd.grad(losses.sum(), leaves)]
            if max_norm is not None:
                gradients = clip_per_model(gradients, max_norm)
            return gradients, detach(metrics)

        fast = compiled(gradient) if self.compile else gradient
        self._objectives[loss.__name__] = _Objective(networks, lr, adam, state, gradient, fast)

    def step(self, loss: Callable[..., tuple[Tensor, Params]], *inputs: Any, decay: Tensor | None = None) -> None:
        """One step of Adam down the gradient of `loss(p, *inputs)`, at its learning rate times `decay`."""
        objective = self._objectives[loss.__name__]
        trained = {network: self.params[network] for network in objective.networks}
        fixed = {network: detach(params) for network, params in self.params.items() if network not in trained}
        gradient = objective.fast if self.compile else objective.eager
        if self.apart:
            each = [gradient(*tree_map(lambda x: x[i : i + 1], (trained, fixed, *inputs))) for i in range(self.num_models)]
            gradients = [one[0] for parts in zip(*(gradients for gradients, _ in each)) for one in parts]
            metrics = {name: torch.cat([metrics[name] for _, metrics in each]) for name in each[0][1]}
        else:
            gradients, metrics = gradient(trained, fixed, *inputs)
        group = objective.adam.param_groups[0]
        if decay is not None:
            group["lr"].copy_(decay * objective.learning_rate)
        for param, gradient in zip(group["params"], gradients, strict=True):
            param.grad = gradient
        objective.adam.step()
        torch._foreach_add_([self.sums[name] for name in metrics], list(metrics.values()))

    def learning_rate(self, loss: Callable[..., Any]) -> Tensor:
        """The present learning rate of `loss`, a scalar."""
        return self._objectives[loss.__name__].adam.param_groups[0]["lr"]

    # State

    def state_dict(self) -> dict[str, Any]:
        """All that training changes, by name; the tensors themselves, not copies."""
        optimizers = {}
        for name, objective in self._objectives.items():
            optimizers[name] = {"lr": objective.adam.param_groups[0]["lr"], "state": objective.state}
        return {
            "params": {network: detach(params) for network, params in self.params.items()},
            "optimizers": optimizers,
            "sums": self.sums,
            "buffers": self.buffers,
        }

    @torch.no_grad()
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Copy `saved` in place, because a CUDA graph keeps addresses, and by name.

        Raises UserError, with nothing changed, if names or shapes are not those of this learner.
        """
        pairs = list(_pairs("the checkpoint", self.state_dict(), saved))
        for own, value in pairs:
            own.copy_(value)

    def prepare(self, update: Callable[[], None], graph: bool) -> Callable[[], None]:
        """`update` as it runs fastest: compiled if the learner compiles, and with `graph` replayed from a CUDA graph.

        `update` takes and returns nothing, works on tensors of static shape and changes nothing but the state and the
        random state. It runs a few times here; both are put back. What fails to compile or to be captured, or then gives
        other losses than the eager update, is given up with one note on stderr.
        """
        if not (self.compile or graph):
            return update
        started, cuda = time.perf_counter(), self.device.type == "cuda"
        generator = torch.cuda.default_generators[torch.cuda.current_device()] if cuda else torch.default_generator
        state = [tensor for tensor in tree_leaves(self.state_dict()) if isinstance(tensor, Tensor)]
        saved, random_state = [tensor.clone() for tensor in state], generator.get_state()

        def put_back() -> None:
            with torch.no_grad():
                torch._foreach_copy_(state, saved)
            generator.set_state(random_state)

        def losses_after(update: Callable[[], None]) -> Tensor:
            put_back()
            update()
            return torch.stack(list(self.sums.values())).cpu()

        fast, compile = update, self.compile
        self.compile = False
        reference = losses_after(update)
        self.compile = compile
        try:
            losses_after(update)  # compiles; what cannot be compiled says so itself and goes on without
            if graph:
                put_back()
                fast = capture(update)
            losses = losses_after(fast)
            if not torch.allclose(losses, reference, rtol=1e-2, atol=1e-3, equal_nan=True):
                error = (losses - reference).abs().max().item()
                raise RuntimeError(f"its first losses differ from the eager update's by up to {error:.2g}")
        except Exception as error:
            flags = " and ".join(flag for flag, used in (("--compile", compile), ("--cudagraphs", graph)) if used)
            note(f"going on without {flags}: the update made ready does not work here ({common.line(error)[:300]})")
            fast, self.compile = update, False
        finally:
            put_back()
        tqdm.write(f"update made ready in {time.perf_counter() - started:.0f} s", file=sys.stderr)
        return fast


def clip_per_model(gradients: Sequence[Tensor], max_norm: float) -> list[Tensor]:
    """Gradients (K, ...) scaled so that no model's norm over all of them exceeds `max_norm`, as torch's clip_grad_norm_."""
    squares = [gradient.reshape(len(gradient), -1).square().sum(1) for gradient in gradients]
    scale = (max_norm / (torch.stack(squares).sum(0).sqrt() + 1e-6)).clamp(max=1)
    return [gradient * scale.view(-1, *[1] * (gradient.ndim - 1)) for gradient in gradients]


def _pairs(place: str, own: Any, saved: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The tensors of two nested dictionaries, by name."""
    if isinstance(own, dict):
        check(isinstance(saved, dict), f"{place} is {type(saved).__name__}, not a dictionary: it is of another script or version")
        missing, unknown = own.keys() - saved.keys(), saved.keys() - own.keys()
        check(
            not missing and not unknown,
            f"{place} lacks {sorted(map(str, missing))} and has {sorted(map(str, unknown))} too many: "
            "it is of other settings, another script or another version",
        )
        for name, value in own.items():
            yield from _pairs(f"{place}'s {name}", value, saved[name])
    else:
        check(
            isinstance(saved, Tensor) and saved.shape == own.shape,
            f"{place} is {list(saved.shape) if isinstance(saved, Tensor) else type(saved).__name__}, not a tensor of shape "
            f"{list(own.shape)}: it is of other settings or another script",
        )
        yield own, saved


# ---- compiling and capturing -----------------------------------------------------------------------------------------


def note(message: str) -> None:
    """Tell of something that costs speed, not results."""
    tqdm.write(f"note: {message}", file=sys.stderr)


_compiler_failed = False


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which is pure and works on tensors of static shape, through torch.compile.

    That needs a C++ compiler, on a GPU also triton: where it fails, one note is printed and `function` itself runs.
    """
    torch._dynamo.config.trace_autograd_ops = True  # a function may contain torch.autograd.grad
    warnings.filterwarnings("ignore", "TensorFloat32")  # advice for a GPU: plain float32 is what is meant
    fast, works = torch.compile(function, dynamic=False), None

    def call(*inputs: Any) -> Any:
        global _compiler_failed
        nonlocal works
        if works or works is None and not _compiler_failed:
            if works is None:
                common.check_stop()  # compiling takes a while
            try:
                result = fast(*inputs)
                works = True
                return result
            except Exception as error:
                common.check_stop()  # Ctrl-C also ends the compiler
                if not _compiler_failed:
                    note(f"going on without --compile, torch.compile does not work here: {common.line(error)[:300]}")
                works, _compiler_failed = False, True
        return function(*inputs)

    return call


def capture(update: Callable[[], None]) -> Callable[[], None]:
    """`update` as a CUDA graph; what it changes is changed by a few warm-up runs. Noise differs from replay to replay."""
    stream = torch.cuda.Stream()  # capturing asks for a stream of its own, which waits for no other
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(3):
            update()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        update()
    return graph.replay


# ---- acting ------------------------------------------------------------------------------------------------------------

BLOCK = 64  # candidates that the second Q judges at a time
ROWS = 256  # candidates that a CPU judges at a time: enough for an efficient product, few enough for its cache


class BestOf:
    """The deployed policies of K models: of N candidates in each state one, with probability softmax(min(Q1, Q2)) (App. D).

    The maximum of min(Q1, Q2) plus Gumbel noise is a draw from that softmax. It cannot exceed Q1 plus that noise, so Q2 is
    asked in falling order of the latter, and no more when no other candidate can win: the same action at half the cost.
    """

    def __init__(
        self,
        sample: Callable[[dict[str, Params], Tensor, Tensor], Tensor],
        q: Callable[..., Tensor] | None,
        networks: Sequence[str],
        num_candidates: int,
        action_low: np.ndarray,
        action_high: np.ndarray,
        device: torch.device,
        compile: bool = False,
        draws: int = 1,
        greedy: bool = False,
    ):
        """Both functions are of one model, with the parameters of `networks`.

        sample: (p, obs (n, 1, S), z (n, N, draws A) Gaussian) -> candidates (n, N, A), which are then clamped to [-1, 1].
        q: (p, obs (n, m, S), actions (n, m, A), copy) -> (n, m), the Q of that number; None takes the first candidate.
        action_low, action_high: (A,) bounds of the environment.
        draws: Gaussian vectors that a candidate is made of.
        greedy: take the candidate of the largest min(Q1, Q2), not a draw from the softmax.
        """
        self.draws, self.greedy = draws, greedy
        self.sample, self.q, self.networks, self.num_candidates = sample, q, networks, num_candidates
        self.low, self.high = (torch.as_tensor(bound, dtype=torch.float32, device=device) for bound in (action_low, action_high))
        wrap = compiled if compile else lambda function: function
        self._first_all, self._second_all, self._sample_all = (
            wrap(torch.vmap(function)) for function in (self._first, self._second, self._one)
        )

    def _one(self, p: dict[str, Params], obs: Tensor, z: Tensor) -> Tensor:
        """One candidate (n, A) in each state (n, S)."""
        return self.sample(p, obs[:, None], z).clamp(-1, 1)[:, 0]

    def _first(self, p: dict[str, Params], obs: Tensor, z: Tensor, gumbel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Candidates (n, N, A), their Q1 + gumbel (n, N) in falling order, and that order's indices (n, N)."""
        candidates = self.sample(p, obs[:, None], z).clamp(-1, 1)
        q = self.q(p, obs[:, None].expand(-1, z.shape[1], -1), candidates, 0)
        return candidates, *(q + gumbel).sort(1, descending=True)

    def _second(self, p: dict[str, Params], obs: Tensor, candidates: Tensor, gumbel: Tensor, some: Tensor) -> Tensor:
        """Q2 + gumbel (n, m) for the candidates `some` (n, m)."""
        actions = candidates.take_along_dim(some[:, :, None], 1)
        return self.q(p, obs[:, None].expand(-1, some.shape[1], -1), actions, 1) + gumbel.take_along_dim(some, 1)

    def choose(self, p: dict[str, Params], obs: Tensor, z: Tensor, gumbel: Tensor) -> Tensor:
        """Actions (K, n, A) in states (K, n, S), with Gaussian z (K, n, N, A) and Gumbel noise (K, n, N)."""
        candidates, bounds, order = self._first_all(p, obs, z, gumbel)
        scores = torch.full_like(bounds, -math.inf)
        for bound, some, score in zip(*(tensor.split(BLOCK, 2) for tensor in (bounds, order, scores))):
            if (bound[:, :, 0] <= scores.amax(2)).all():
                break
            score.copy_(torch.minimum(bound, self._second_all(p, obs, candidates, gumbel, some)))
        chosen = order.take_along_dim(scores.argmax(2, keepdim=True), 2)
        return candidates.take_along_dim(chosen[..., None], 2)[:, :, 0]

    @torch.no_grad()
    def __call__(
        self, params: dict[str, Params], obs: np.ndarray, generator: torch.Generator, size: int | None = None
    ) -> np.ndarray:
        """Actions (K, n, A) of K models in the environment's units for observations (K, n, S), `size` states at a time."""
        device, n = self.low.device, obs.shape[1]
        p = {network: detach(params[network]) for network in self.networks}
        if size is None:  # one shape, compiled once: all copies of the environment, on a CPU as many as make ROWS candidates
            size = -(-common.MAX_COPIES // len(obs))
            if self.q is not None and device.type == "cpu":
                size = max(1, min(size, ROWS // self.num_candidates))
        padded = F.pad(torch.as_tensor(obs, dtype=torch.float32, device=device), (0, 0, 0, -n % size))
        chosen = []
        for part in padded.split(size, 1):
            shape = (*part.shape[:2], self.num_candidates)
            z = torch.randn(*shape, self.draws * len(self.low), device=device, generator=generator)
            part = part.clone(memory_format=torch.contiguous_format)  # n must not show in its strides either
            if self.q is None:
                chosen.append(self._sample_all(p, part, z))
            else:
                gumbel = torch.zeros(shape, device=device)
                if not self.greedy:
                    gumbel = -torch.log(gumbel.exponential_(generator=generator))
                chosen.append(self.choose(p, part, z, gumbel))
        return (self.low + (torch.cat(chosen, 1)[:, :n] + 1) / 2 * (self.high - self.low)).cpu().numpy()

    def of_one(
        self, params: dict[str, Params], index: int, obs_dim: int, seed: int, about: dict[str, float]
    ) -> Callable[[np.ndarray], np.ndarray]:
        """The policy of model `index`: one observation (S,) or a batch (B, S) to actions (A,) or (B, A); it has `about`."""
        params = {network: {name: param[index][None] for name, param in params[network].items()} for network in self.networks}
        generator = torch.Generator(self.low.device).manual_seed(seed)

        def act(obs: np.ndarray) -> np.ndarray:
            obs = np.asarray(obs, np.float32)
            check(
                obs.ndim in (1, 2) and obs.shape[-1] == obs_dim,
                f"observations must have shape ({obs_dim},) or (B, {obs_dim}), not {obs.shape}",
            )
            check(bool(np.isfinite(obs).all()), "observations must be finite: there is NaN or infinity among them")
            actions = self(params, np.atleast_2d(obs)[None], generator, size=None if obs.ndim == 2 else 1)[0]
            return actions if obs.ndim == 2 else actions[0]

        act.about = about
        return act
