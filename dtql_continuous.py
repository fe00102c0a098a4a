"""Diffusion Trusted Q-Learning (DTQL): offline reinforcement learning with two policies.

A diffusion policy only clones behaviour; a one-step policy is deployed. The one-step policy maximises an IQL critic
and is held near the data by a diffusion trust-region loss. Equation, section and appendix numbers are those of Chen,
Wang and Zhou, "Diffusion Policies Creating a Trust Region for Offline Reinforcement Learning" (2024).

Shapes, for one model: obs (B, S), actions (B, A) in [-1, 1], sigma (B, 1), rewards, terminals, Q and V (B,).
"""

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

import common
from common import check

EXP_NAME = "dtql_continuous"


@dataclass
class Args:
    """Diffusion Trusted Q-Learning. The defaults shown are those of the given task (Table 4 of the paper)."""

    env_id: str = common.DEMO_ID
    """D4RL id (hopper-medium-v2) or Minari id (with a slash); the default is a demo that collects its own data"""
    seed: int = 0
    """seed of the first model; model i has seed + i"""
    num_seeds: int = 1
    """how many independent models to train at once"""
    cuda: bool = torch.cuda.is_available()
    """train on the GPU"""
    torch_deterministic: bool = True
    """use deterministic kernels, so that a run can be repeated bit by bit on the same machine"""
    compile: bool = False
    """compile losses and policy with torch.compile; it takes a minute, so runs of less than 10,000 updates default to no"""
    cudagraphs: bool = torch.cuda.is_available()
    """replay the whole update as a CUDA graph (not used with --no-cuda)"""
    resume: Annotated[str | None, tyro.conf.arg(metavar="RUN_DIR")] = None
    """folder of a run to continue as if it had never stopped"""
    run_dir: str = "runs"
    """parent folder of the runs' folders"""

    # Algorithm specific arguments
    alpha: float = 1.0
    """weight of the trust-region loss (Eq. 5)"""
    expectile: float = 0.9
    """expectile of the value loss, the paper's tau (Eq. 6)"""
    nll: bool = True
    """add the negative log-likelihood of the data's actions to the policy loss (Section 2.4)"""
    policy: Literal["gaussian", "implicit"] = "gaussian"
    """one-step policy: a tanh Gaussian, or a generator built like the diffusion policy"""
    learning_rate: float = 3e-4
    """of the diffusion policy and the one-step policy; Q and V always have 3e-4"""
    lr_decay: bool = False
    """decay all learning rates to 0 along a cosine over the training epochs"""
    batch_size: int = 256
    """transitions per update and model"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """step of the target Qs towards the online Qs, the paper's 1 - rho"""
    pretrain_epochs: int = 1
    """epochs that train only the critic and the diffusion policy, before the training epochs"""
    epochs: int = 2
    """training epochs"""
    steps_per_epoch: int = 1000
    """updates in an epoch"""
    eval_every: int = 50
    """training epochs between evaluations; the last one is always evaluated"""
    eval_episodes: int = 20
    """episodes per evaluation and model"""
    num_candidates: int = 1024
    """actions drawn from the policy in each state, of which one is taken with probability softmax(Q) (Appendix D)"""


# Table 4: alpha, expectile, NLL, training epochs, learning rate, lr decay
TABLE_4 = {
    "halfcheetah-medium-v2": (1, 0.7, False, 1000, 3e-4, False),
    "halfcheetah-medium-replay-v2": (5, 0.7, False, 1000, 3e-4, False),
    "halfcheetah-medium-expert-v2": (50, 0.7, False, 1000, 3e-4, False),
    "hopper-medium-v2": (5, 0.7, False, 1000, 1e-4, True),
    "hopper-medium-replay-v2": (5, 0.7, False, 1000, 3e-4, False),
    "hopper-medium-expert-v2": (20, 0.7, False, 1000, 3e-4, False),
    "walker2d-medium-v2": (5, 0.7, False, 1000, 3e-4, True),
    "walker2d-medium-replay-v2": (5, 0.7, False, 1000, 3e-4, True),
    "walker2d-medium-expert-v2": (5, 0.7, False, 1000, 3e-4, True),
    "antmaze-umaze-v0": (1, 0.9, True, 500, 3e-4, False),
    "antmaze-umaze-diverse-v0": (1, 0.9, True, 500, 3e-5, True),
    "antmaze-medium-play-v0": (1, 0.9, True, 400, 3e-4, False),
    "antmaze-medium-diverse-v0": (1, 0.9, True, 400, 3e-4, False),
    "antmaze-large-play-v0": (1, 0.9, True, 350, 3e-4, False),
    "antmaze-large-diverse-v0": (0.5, 0.9, True, 300, 3e-4, False),
    "antmaze-umaze-v2": (1, 0.9, True, 500, 3e-4, False),
    "antmaze-umaze-diverse-v2": (1, 0.9, True, 500, 3e-5, True),
    "antmaze-medium-play-v2": (1, 0.9, True, 500, 3e-4, False),
    "antmaze-medium-diverse-v2": (1, 0.9, True, 500, 3e-4, False),
    "antmaze-large-play-v2": (1, 0.9, True, 500, 3e-4, False),
    "antmaze-large-diverse-v2": (0.5, 0.9, True, 500, 3e-4, False),
    "pen-human-v1": (1500, 0.9, False, 300, 3e-5, True),
    "pen-cloned-v1": (1500, 0.7, False, 200, 1e-5, False),
    "kitchen-complete-v0": (200, 0.7, False, 500, 1e-4, True),
    "kitchen-partial-v0": (100, 0.7, False, 1000, 1e-4, True),
    "kitchen-mixed-v0": (200, 0.7, False, 500, 3e-4, True),
}


def task_defaults(env_id: str) -> dict[str, Any]:
    """The arguments in which a task's defaults differ from those of `Args`, which are the demo's."""
    if env_id == common.DEMO_ID:
        return {}
    name = common.d4rl_id(env_id) or ""  # Minari's data of the same task takes the same row
    alpha, expectile, nll, epochs, learning_rate, lr_decay = TABLE_4.get(name, (5, 0.7, False, 1000, 3e-4, False))
    return dict(
        alpha=float(alpha), expectile=expectile, nll=nll, epochs=epochs, learning_rate=learning_rate, lr_decay=lr_decay,
        pretrain_epochs=50, batch_size=2048 if name.startswith("antmaze") else 256,
        eval_episodes=100 if name.startswith(("antmaze", "pen", "kitchen")) else 10,
    )


def run_defaults(args: Args) -> dict[str, Any]:
    """The defaults that depend on other arguments."""
    return {"compile": (args.pretrain_epochs + args.epochs) * args.steps_per_epoch >= 10_000}


def check_args(args: Args) -> None:
    """Raise UserError for settings that cannot work."""
    for name in ("num_seeds", "batch_size", "steps_per_epoch", "eval_every", "eval_episodes", "num_candidates"):
        check(getattr(args, name) >= 1, f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    for name in ("seed", "pretrain_epochs", "epochs"):
        check(getattr(args, name) >= 0, f"--{name.replace('_', '-')} must not be negative: {getattr(args, name)}")
    check(0 < args.expectile < 1, f"--expectile must lie between 0 and 1, not {args.expectile}")
    check(0 <= args.gamma <= 1, f"--gamma must lie in [0, 1], not {args.gamma}")
    check(0 < args.tau <= 1, f"--tau must lie in (0, 1], not {args.tau}")
    check(0 <= args.alpha < math.inf, f"--alpha must be a number not below 0, not {args.alpha}")
    check(0 < args.learning_rate < math.inf, f"--learning-rate must be a number above 0, not {args.learning_rate}")
    check(not (args.nll and args.policy == "implicit"),
          "--policy implicit has no likelihood, which the NLL term needs: add --no-nll")


# ---- EDM schedule (Appendix B; Karras et al. 2022) -------------------------------------------------------------------

SIGMA_DATA, SIGMA_MIN, SIGMA_MAX = 0.5, 0.002, 80.0
SIGMA_GEN = 2.5  # noise level at which the implicit policy generates an action in one step


def sample_sigma(u: Tensor) -> Tensor:
    """Noise levels from uniform u in [0, 1): log sigma ~ logistic(log sigma_data, 0.5), truncated by inverse CDF."""
    low, high = (1 / (1 + math.exp(-math.log(sigma / SIGMA_DATA) / 0.5)) for sigma in (SIGMA_MIN, SIGMA_MAX))
    return (SIGMA_DATA * torch.exp(0.5 * torch.logit(low + (high - low) * u))).clamp(SIGMA_MIN, SIGMA_MAX)


def c_out(sigma: Tensor) -> Tensor:
    """Scale of the network's output (Appendix B)."""
    return sigma * SIGMA_DATA * torch.rsqrt(sigma**2 + SIGMA_DATA**2)


# ---- networks (Appendix D), each of one model ------------------------------------------------------------------------

HIDDEN = 256


class Mish(nn.Mish):
    """x tanh(softplus(x)), without exp, log1p and tanh, which take a CPU as long as the matrix product beside them:
    x n / (2 - n) with n = s (2 - s), s = sigmoid(x). Where this is not fused, torch's own has the cheaper gradient."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or x.is_cuda):
            return F.mish(x)
        s = torch.sigmoid(x)
        n = s * (2 - s)
        return x * n / (2 - n)


def linear_of_cat(layer: nn.Linear, *inputs: Tensor) -> Tensor:
    """layer(cat(inputs)), also where the inputs must broadcast: with obs (n, 1, S) and actions (n, N, A) the state's share
    is computed once, not N times."""
    if len({x.shape[:-1] for x in inputs}) == 1:
        return layer(torch.cat(inputs, -1))
    weights = layer.weight.split([x.shape[-1] for x in inputs], dim=1)
    first, *rest = (F.linear(x, weight) for x, weight in zip(inputs, weights))
    return sum(rest, first + layer.bias)


class Denoiser(nn.Module):
    """The diffusion policy mu_phi(a_t, t | s) (Appendix B): noisy actions (B, A), sigma (B, 1), obs (B, S) -> (B, A)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 32), Mish(), nn.Linear(32, 16))
        self.input = nn.Linear(action_dim + obs_dim + 16, HIDDEN)
        self.net = nn.Sequential(
            nn.Linear(HIDDEN, HIDDEN), Mish(),
            nn.Linear(HIDDEN, HIDDEN), Mish(),
            nn.Linear(HIDDEN, HIDDEN), Mish(),
            nn.Linear(HIDDEN, action_dim),
        )
        self.register_buffer("frequencies", 10000 ** (-torch.arange(8) / 7), persistent=False)

    def forward(self, noisy_actions: Tensor, sigma: Tensor, obs: Tensor) -> Tensor:
        variance = sigma**2 + SIGMA_DATA**2
        c_skip, c_in, c_noise = SIGMA_DATA**2 / variance, torch.rsqrt(variance), torch.log(sigma) / 4
        angles = c_noise * self.frequencies
        embedding = self.time(torch.cat((angles.sin(), angles.cos()), -1))
        output = self.net(linear_of_cat(self.input, c_in * noisy_actions, obs, embedding))
        return c_skip * noisy_actions + c_out(sigma) * output


class Critic(nn.Module):
    """Q(s, a): obs (B, S), actions (B, A) -> (B,)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.input = nn.Linear(obs_dim + action_dim, HIDDEN)
        self.net = nn.Sequential(
            nn.LayerNorm(HIDDEN), Mish(),
            nn.Linear(HIDDEN, HIDDEN), nn.LayerNorm(HIDDEN), Mish(),
            nn.Linear(HIDDEN, HIDDEN), nn.LayerNorm(HIDDEN), Mish(),
            nn.Linear(HIDDEN, 1),
        )

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return self.net(linear_of_cat(self.input, obs, actions)).squeeze(-1)


class Value(nn.Module):
    """V(s): obs (B, S) -> (B,)."""

    def __init__(self, obs_dim: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(obs_dim, HIDDEN), Mish(),
            nn.Linear(HIDDEN, HIDDEN), Mish(),
            nn.Linear(HIDDEN, HIDDEN), Mish(),
            nn.Linear(HIDDEN, 1),
        )

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs).squeeze(-1)


class GaussianActor(nn.Module):
    """The one-step policy a = tanh(mean + std z): obs (B, S) -> mean, log_std (B, A), both before the tanh."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(obs_dim, HIDDEN), nn.ReLU(),
            nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
            nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
            nn.Linear(HIDDEN, 2 * action_dim),
        )
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.net(obs).chunk(2, -1)
        return mean, log_std.clamp(-5, 2)


class ImplicitActor(Denoiser):
    """The one-step policy a = D_theta(sigma_gen z, sigma_gen | s), built like the diffusion policy."""

    def forward(self, obs: Tensor, z: Tensor) -> Tensor:
        return super().forward(SIGMA_GEN * z, z.new_full((1,), SIGMA_GEN).expand(*z.shape[:-1], 1), obs)


# ---- losses of one model ---------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """B transitions: obs, next_obs (B, S), actions (B, A), rewards, terminals (B,)."""

    obs: Tensor
    actions: Tensor
    rewards: Tensor
    terminals: Tensor
    next_obs: Tensor


def expectile_loss(u: Tensor, expectile: float) -> Tensor:
    """Eq. 6: mean of |expectile - 1(u < 0)| u^2."""
    return ((expectile - (u < 0).float()).abs() * u**2).mean()


def q_target(rewards: Tensor, terminals: Tensor, next_v: Tensor, gamma: float) -> Tensor:
    """Eq. 7's target r + gamma V(s'), without V(s') where the episode ended."""
    return rewards + gamma * (1 - terminals) * next_v


def denoising_loss(denoise: Any, actions: Tensor, obs: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Eq. 2 (actions from the data) and Eq. 4 (actions of the policy) with w = 1 / c_out^2, mean over dimensions too."""
    return ((denoise(actions + sigma * noise, sigma, obs) - actions) / c_out(sigma)).square().mean()


def gaussian_nll(mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
    """-E log pi(a | s) of the Gaussian before the tanh; the tanh's Jacobian does not depend on theta."""
    z = (torch.atanh(actions / (1 + 1e-3)) - mean) * torch.exp(-log_std)
    return (0.5 * z**2 + log_std + 0.5 * math.log(2 * math.pi)).sum(-1).mean()


# ---- K models ----------------------------------------------------------------------------------------------------------

Params = dict[str, Tensor]


def stack(models: list[Params]) -> Params:
    """Stack the parameters of equal networks along a new leading dimension."""
    return {name: torch.stack([model[name].detach() for model in models]) for name in models[0]}


def detach(params: Params) -> Params:
    return {name: param.detach() for name, param in params.items()}


BLOCK = 64  # candidates that the second Q judges at a time


class Policy:
    """The deployed policies of K models with Appendix D's choice among candidates."""

    def __init__(self, args: Args, obs_dim: int, action_low: Tensor, action_high: Tensor):
        self.args, self.low, self.high = args, action_low, action_high
        self.critic = Critic(obs_dim, len(action_low)).to(action_low.device)
        actor = GaussianActor if args.policy == "gaussian" else ImplicitActor
        self.actor = actor(obs_dim, len(action_low)).to(action_low.device)
        self.first_all, self.second_all = (
            common.compile(function, action_low.device) if args.compile else function
            for function in (torch.vmap(self.first), torch.vmap(self.second)))

    def q(self, params: Params, obs: Tensor, actions: Tensor) -> Tensor:
        """The Qs in `params` of one model, (Qs, B)."""
        return torch.vmap(lambda twin: functional_call(self.critic, twin, (obs, actions)))(params)

    def sample(self, params: Params, obs: Tensor, z: Tensor) -> Tensor:
        """Actions of one model's one-step policy from Gaussian noise z (B, A)."""
        if self.args.policy == "implicit":
            return functional_call(self.actor, params, (obs, z))
        mean, log_std = functional_call(self.actor, params, (obs,))
        return torch.tanh(mean + torch.exp(log_std) * z)

    def choose(self, actor: Params, critic: Params, obs: Tensor, z: Tensor, gumbel: Tensor) -> Tensor:
        """Actions (K, n, A) of K models in n states: of N candidates one, with probability softmax(min(Q1', Q2')).

        z (K, n, N, A) is Gaussian and gumbel (K, n, N) Gumbel noise: the maximum of Q + gumbel is a draw from the softmax.
        It cannot exceed Q1' + gumbel, so Q2' is asked in falling order of that, and no more when what is left cannot win.
        """
        candidates, bounds, order = self.first_all(actor, critic, obs, z, gumbel)
        scores = torch.full_like(bounds, -math.inf)
        for bound, some, score in zip(*(tensor.split(BLOCK, 2) for tensor in (bounds, order, scores))):
            if (bound[:, :, 0] <= scores.amax(2)).all():
                break
            score.copy_(torch.minimum(bound, self.second_all(critic, obs, candidates, gumbel, some)))
        chosen = order.take_along_dim(scores.argmax(2, keepdim=True), 2)
        return candidates.take_along_dim(chosen[..., None], 2)[:, :, 0]

    def first(self, actor: Params, critic: Params, obs: Tensor, z: Tensor, gumbel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One model's candidates (n, N, A), their Q1' + gumbel (n, N) in falling order, and that order's indices (n, N).

        A Gaussian policy's mean and std are computed once per state.
        """
        candidates = self.sample(actor, obs[:, None], z).clamp(-1, 1)
        twin = {name: param[:1] for name, param in critic.items()}
        return candidates, *(self.q(twin, obs[:, None], candidates)[0] + gumbel).sort(1, descending=True)

    def second(self, critic: Params, obs: Tensor, candidates: Tensor, gumbel: Tensor, some: Tensor) -> Tensor:
        """One model's Q2' + gumbel (n, m) for the candidates `some` (n, m)."""
        twin = {name: param[1:] for name, param in critic.items()}
        actions = candidates.take_along_dim(some[:, :, None], 1)
        return self.q(twin, obs[:, None], actions)[0] + gumbel.take_along_dim(some, 1)

    @torch.no_grad()
    def act(self, actor: Params, critic: Params, obs: np.ndarray, generator: torch.Generator) -> np.ndarray:
        """Actions (K, n, A) of K models in the environment's units for observations (K, n, S)."""
        device, n = self.low.device, obs.shape[1]
        # One shape, compiled once: on a GPU all copies of the environment, on a CPU one state, which stays in its cache
        size = -(-common.MAX_COPIES // len(obs)) if device.type == "cuda" else 1
        padded = F.pad(torch.as_tensor(obs, dtype=torch.float32, device=device), (0, 0, 0, -n % size))
        chosen = []
        for part in padded.split(size, 1):
            shape = (*part.shape[:2], self.args.num_candidates)
            z = torch.randn(*shape, len(self.low), device=device, generator=generator)
            gumbel = -torch.log(torch.empty(shape, device=device).exponential_(generator=generator))
            part = part.clone(memory_format=torch.contiguous_format)  # n must not show in its strides either
            chosen.append(self.choose(actor, critic, part, z, gumbel))
        return (self.low + (torch.cat(chosen, 1)[:, :n] + 1) / 2 * (self.high - self.low)).cpu().numpy()


class DTQL:
    """K models that train at once: every parameter carries a leading dimension K, and no model sees another.

    The K losses are summed and differentiated once, so each model gets exactly its own gradient; Adam is elementwise.
    """

    def __init__(self, args: Args, task: common.Task, device: torch.device):
        """The models on `device`, with the data beside them."""
        self.args, self.device = args, device
        rewards = task.rewards - 1 if task.sparse_goal else task.rewards  # AntMaze: -1 on the way, 0 at the goal
        columns = (task.obs, task.actions, rewards[:, None], task.terminals[:, None], task.next_obs)
        self.data = torch.as_tensor(np.concatenate(columns, 1), device=device)
        self.widths = [column.shape[1] for column in columns]
        obs_dim, action_dim = task.obs.shape[1], task.actions.shape[1]
        env = task.make_env()
        bounds = (torch.as_tensor(bound, device=device, dtype=torch.float32)
                  for bound in (env.action_space.low, env.action_space.high))
        env.close()
        self.policy = Policy(args, obs_dim, *bounds)
        self.value, self.denoiser = Value(obs_dim).to(device), Denoiser(obs_dim, action_dim).to(device)

        models: dict[str, list[Params]] = {"critic": [], "value": [], "denoiser": [], "actor": []}
        for i in range(args.num_seeds):
            torch.manual_seed(args.seed + i)
            models["critic"].append(stack([dict(Critic(obs_dim, action_dim).named_parameters()) for _ in range(2)]))
            models["value"].append(dict(Value(obs_dim).named_parameters()))
            models["denoiser"].append(dict(Denoiser(obs_dim, action_dim).named_parameters()))
            models["actor"].append(dict(type(self.policy.actor)(obs_dim, action_dim).named_parameters()))
        torch.manual_seed(args.seed)
        self.params = {net: {name: param.to(device).requires_grad_() for name, param in stack(stacked).items()}
                       for net, stacked in models.items()}
        self.params["target_critic"] = {name: param.detach().clone() for name, param in self.params["critic"].items()}
        self.learning_rates = {"critic": 3e-4, "denoiser": args.learning_rate, "actor": args.learning_rate}
        self.optimizers = {
            "critic": self._adam("critic", self.params["critic"], self.params["value"]),
            "denoiser": self._adam("denoiser", self.params["denoiser"]),
            "actor": self._adam("actor", self.params["actor"]),
        }
        self.train_step = torch.zeros((), device=device)  # updates since pretraining, for the learning rate

        self.metrics = ["critic", "value", "denoiser", "actor", "trust_region", "q"]
        self.metrics += ["entropy"] if args.policy == "gaussian" else []
        self.metrics += ["nll"] if args.nll else []
        self.sums = torch.zeros(len(self.metrics), args.num_seeds, device=device)  # since the last log
        losses = {"critic": self.critic_loss, "denoiser": self.denoiser_loss, "actor": self.actor_loss}
        self.gradients = {network: self._gradient(loss) for network, loss in losses.items()}

    def _adam(self, name: str, *networks: Params) -> torch.optim.Adam:
        params = [param for network in networks for param in network.values()]
        cuda = self.device.type == "cuda"
        # The learning rate is a tensor, and the state exists from the start, because a CUDA graph keeps addresses
        learning_rate = torch.tensor(self.learning_rates[name], device=self.device)
        optimizer = torch.optim.Adam(params, learning_rate, fused=True, capturable=cuda)
        for param in params:
            zeros = [torch.zeros_like(param) for _ in range(2)]
            step = torch.zeros((), device=self.device)
            optimizer.state[param] = {"step": step, "exp_avg": zeros[0], "exp_avg_sq": zeros[1]}
        return optimizer

    def _gradient(self, loss: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[list[Tensor], Tensor]]:
        """The gradients of `loss`, in those of its arguments that ask for them, and its metrics, of all models."""
        def gradient(*arguments: Any) -> tuple[list[Tensor], Tensor]:
            losses, metrics = torch.vmap(loss, out_dims=(0, 1))(*arguments)
            params = [leaf for leaf in tree_leaves(arguments) if leaf.requires_grad]
            # Fused Adam reads a gradient as if it were laid out like its parameter
            return [grad.contiguous() for grad in torch.autograd.grad(losses.sum(), params)], metrics

        return common.compile(gradient, self.device) if self.args.compile else gradient

    def denoise(self, params: Params) -> Callable[..., Tensor]:
        """One model's diffusion policy; what it predicts is clamped to the actions there are."""
        return lambda *inputs: functional_call(self.denoiser, params, inputs).clamp(-1, 1)

    # The losses of one model. Each returns what is minimised and the metrics to log.

    def critic_loss(self, critic: Params, value: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        """Eqs. 6 and 7: no gradient reaches Q through V's loss, nor V(s') through Q's."""
        q = self.policy.q(critic, batch.obs, batch.actions)
        v = functional_call(self.value, value, (batch.obs,))
        next_v = functional_call(self.value, detach(value), (batch.next_obs,))
        value_loss = expectile_loss(q.detach().amin(0) - v, self.args.expectile)
        target = q_target(batch.rewards, batch.terminals, next_v, self.args.gamma)
        critic_loss = (target - q).square().mean(1).sum()
        return critic_loss + value_loss, torch.stack((critic_loss, value_loss)).detach()

    def denoiser_loss(self, denoiser: Params, batch: Batch, sigma: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 2."""
        loss = denoising_loss(self.denoise(denoiser), batch.actions, batch.obs, sigma, noise)
        return loss, loss.detach()[None]

    def actor_loss(self, actor: Params, denoiser: Params, critic: Params, batch: Batch, z: Tensor, sigma: Tensor,
                   noise: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 5, with the NLL term of Section 2.4. The diffusion policy and the critic are fixed."""
        metrics = []
        if self.args.policy == "gaussian":
            mean, log_std = functional_call(self.policy.actor, actor, (batch.obs,))
            actions = torch.tanh(mean + torch.exp(log_std) * z)
            metrics.append(log_std.sum(-1).mean() + 0.5 * mean.shape[-1] * math.log(2 * math.pi * math.e))
        else:
            actions = self.policy.sample(actor, batch.obs, z)
        trust_region = denoising_loss(self.denoise(denoiser), actions, batch.obs, sigma, noise)
        # Q knows only [-1, 1]; what lies outside (implicit policy) is left to the trust region to bring back
        q = self.policy.q(critic, batch.obs, actions.clamp(-1, 1)).amin(0).mean()
        loss = self.args.alpha * trust_region - q
        if self.args.nll:
            metrics.append(gaussian_nll(mean, log_std, batch.actions))
            loss = loss + metrics[-1]
        return loss, torch.stack((loss, trust_region, q, *metrics)).detach()

    # One iteration of Algorithm 1

    def minimise(self, network: str, *arguments: Any) -> Tensor:
        """One step of Adam on the loss of `network`, given the loss's arguments. Returns the metrics."""
        gradients, metrics = self.gradients[network](*arguments)
        optimizer = self.optimizers[network]
        for param, gradient in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
            param.grad = gradient
        optimizer.step()
        return metrics

    def update(self, training: bool) -> None:
        """One iteration of Algorithm 1; pretraining ends after the diffusion policy. Tensors only, of static shapes."""
        args, params = self.args, self.params
        shape = (args.num_seeds, args.batch_size)
        rows = self.data[torch.randint(len(self.data), shape, device=self.device)]
        obs, actions, rewards, terminals, next_obs = rows.split(self.widths, -1)
        batch = Batch(obs, actions, rewards.squeeze(-1), terminals.squeeze(-1), next_obs)
        sigma = sample_sigma(torch.rand(2, *shape, 1, device=self.device))
        noise = torch.randn(3, *shape, self.widths[1], device=self.device)
        if training and args.lr_decay:
            decay = (1 + torch.cos(math.pi * self.train_step / (args.epochs * args.steps_per_epoch))) / 2
            for network, optimizer in self.optimizers.items():
                optimizer.param_groups[0]["lr"].copy_(decay * self.learning_rates[network])

        self.sums[:2] += self.minimise("critic", params["critic"], params["value"], batch)
        self.sums[2:3] += self.minimise("denoiser", params["denoiser"], batch, sigma[0], noise[0])
        if not training:
            return
        fixed = detach(params["denoiser"]), detach(params["critic"])
        self.sums[3:] += self.minimise("actor", params["actor"], *fixed, batch, noise[1], sigma[1], noise[2])

        with torch.no_grad():
            targets, online = params["target_critic"].values(), params["critic"].values()
            torch._foreach_lerp_(list(targets), list(online), args.tau)
            self.train_step += 1

    def make_update(self, training: bool) -> Callable[[], None]:
        """`update` as it runs fastest: compiled, and on a GPU replayed from a CUDA graph."""
        update, graph = functools.partial(self.update, training), self.args.cudagraphs and self.device.type == "cuda"
        if not (self.args.compile or graph):
            return update
        state = [x for x in tree_leaves(self.state_dict()) if isinstance(x, Tensor)]
        return common.warm_up(update, state, self.device, graph)

    @torch.no_grad()
    def start_training(self) -> None:
        """The end of pretraining: the target Qs begin as the online ones."""
        for name, param in self.params["critic"].items():
            self.params["target_critic"][name].copy_(param)

    def state_dict(self) -> dict[str, Any]:
        optimizers = {name: {"lr": optimizer.param_groups[0]["lr"], "state": list(optimizer.state.values())}
                      for name, optimizer in self.optimizers.items()}
        return {
            "params": {network: detach(params) for network, params in self.params.items()}, "optimizers": optimizers,
            "sums": self.sums, "train_step": self.train_step, "obs_dim": self.widths[0],
            "action_low": self.policy.low, "action_high": self.policy.high,
        }

    @torch.no_grad()
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """In place, because a CUDA graph keeps addresses."""
        own = tree_leaves(self.state_dict())
        for tensor, value in zip(own, tree_leaves(saved), strict=True):
            if isinstance(tensor, Tensor):
                tensor.copy_(value)


def load_policy(checkpoint: str, index: int = 0, num_candidates: int | None = None, device: str = "cpu", seed: int = 0):
    """The deployed policy of model `index` in a checkpoint.

    Returns a callable from one observation (S,) or a batch (B, S) to actions (A,) or (B, A) in the environment's own
    units. `num_candidates`: as trained if None; 1 takes a plain sample of the policy.
    Raises UserError if the checkpoint cannot be read or has no such model.
    """
    state = common.load_checkpoint(checkpoint, device)
    args = Args(**state["args"])
    check(-args.num_seeds <= index < args.num_seeds, f"{checkpoint} holds {args.num_seeds} model(s): there is no {index}")
    args = replace(args, num_candidates=num_candidates or args.num_candidates, compile=False)
    agent = state["agent"]
    policy = Policy(args, agent["obs_dim"], agent["action_low"], agent["action_high"])
    actor, critic = ({name: param[index][None] for name, param in agent["params"][network].items()}
                     for network in ("actor", "target_critic"))
    generator = torch.Generator(device).manual_seed(seed)

    def act(obs: np.ndarray) -> np.ndarray:
        obs = np.asarray(obs, np.float32)
        check(obs.ndim in (1, 2) and obs.shape[-1] == agent["obs_dim"],
              f"observations must have shape ({agent['obs_dim']},) or (B, {agent['obs_dim']}), not {obs.shape}")
        actions = policy.act(actor, critic, np.atleast_2d(obs)[None], generator)[0]
        return actions if obs.ndim == 2 else actions[0]

    return act


def evaluate(agent: DTQL, task: common.Task, envs: common.LockstepEnvs, epoch: int, run: common.Run) -> list[dict]:
    """One row of eval.csv per model. It has its own random state: training goes on as if it had not happened."""
    args = agent.args
    generator = torch.Generator(agent.device).manual_seed(args.seed * 1_000_003 + epoch)

    def act(obs: np.ndarray) -> np.ndarray:
        run.check_stop()
        return agent.policy.act(agent.params["actor"], agent.params["target_critic"], obs, generator)

    seeds = range(args.seed, args.seed + args.num_seeds)
    return common.evaluate(task, envs, act, seeds, epoch, args.eval_episodes)


LOG_EVERY = 100  # updates between readings of the losses, which make the host wait for the device


def main(args: Args) -> dict[str, Any]:
    """Train and evaluate. Returns the run's folder and the rows of its eval.csv; raises UserError for bad input."""
    check_args(args)
    device = common.find_device(args.cuda, args.cudagraphs)
    task = common.load_task(args.env_id)
    envs = common.make_lockstep_envs(task, args.seed, args.num_seeds, args.eval_episodes)
    common.seed_everything(args.seed, args.torch_deterministic)
    agent = DTQL(args, task, device)
    pretrain_steps = args.pretrain_epochs * args.steps_per_epoch
    total_steps = pretrain_steps + args.epochs * args.steps_per_epoch

    make_update = functools.cache(agent.make_update)

    with contextlib.closing(envs), common.Run(EXP_NAME, args, task, agent, device, total_steps) as run:
        while True:
            epoch, within = divmod(run.step, args.steps_per_epoch)
            epoch -= args.pretrain_epochs
            due = within == 0 and epoch >= 0 and (run.step == total_steps or epoch > 0 and epoch % args.eval_every == 0)
            if due and not run.evaluated(epoch):
                run.add_evaluation(evaluate(agent, task, envs, epoch, run))
                run.resume_clock()
            if run.step == total_steps:
                break
            if run.step == pretrain_steps:
                agent.start_training()
            update = make_update(training=run.step >= pretrain_steps)
            for _ in range(min(args.steps_per_epoch - within, LOG_EVERY - within % LOG_EVERY)):
                update()
                run.advance(1)
                run.check_stop()
            run.log()
            run.save_now_and_then()
        run.save()
    return run.summary()


if __name__ == "__main__":
    common.run(main, lambda: common.parse_args(Args, task_defaults, run_defaults))
