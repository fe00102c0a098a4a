"""Implicit Diffusion Q-Learning (IDQL): IQL's critic judges the samples of a diffusion policy that only clones.

Hansen-Estruch et al., 2023, as in the authors' last code. No policy is improved: in each state N actions are sampled from
the diffusion policy, and the one with the largest Q is taken.

It differs from `dtql_continuous.py` in these points:

1. There is no one-step policy: what is deployed is the diffusion policy (its moving average), sampled in 5 steps.
2. The diffusion policy predicts the noise of a chain of 5 steps (variance preserving) with a residual network, dropout and AdamW.
3. Q is IQL's: it learns from V(s'), V by expectile regression on the smaller target Q; there is no pretraining.
4. Of the candidates the best by min(Q1', Q2') is taken, not a sample of the softmax.

Shapes: K models with minibatches of B; obs (K, B, S), actions (K, B, A) in [-1, 1], step (K, B, 1), noise (K, B, A),
masks (3, K, B, 256), rewards, terminals and V (K, B), both Qs (K, 2, B).
"""

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

import common
import evaluation
import stacked
import tasks
from best_of import BestOf, repeat_states
from common import check
from run_folder import Run
from stacked import Batch, LayerNorm, Linear, Metrics, Transitions
from tasks import Task, return_range


@dataclass
class Args(common.Args):
    """Implicit Diffusion Q-Learning (IDQL). The defaults shown are those of the given task."""

    sweep = ("expectile",)

    # Algorithm specific arguments
    expectile: float | tuple[float, ...] = 0.9
    """expectile of the value loss"""
    num_candidates: int = 16
    """actions sampled from the diffusion policy in each state, of which the one with the largest Q is taken"""
    learning_rate: float = 3e-4
    """of all networks; the diffusion policy's falls to 0 along a cosine"""
    weight_decay: float = 1e-4
    """of the diffusion policy"""
    dropout: float = 0.1
    """of the diffusion policy"""
    ema: float = 0.001
    """Polyak rate of the deployed diffusion policy"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """Polyak rate of the target Qs"""
    critic_width: int = 256
    """units of the hidden layers of Q and V"""
    batch_size: int = 64
    """minibatch size"""
    epochs: int = 12
    """training epochs"""

    def check(self) -> None:
        """Raise UserError for invalid settings."""
        super().check()
        check(all(0 < tau < 1 for tau in self.values("expectile")), f"--expectile must lie in (0, 1), not {self.expectile}")
        check(1 <= self.critic_width <= 100_000, f"--critic-width must lie in [1, 100000], not {self.critic_width}")
        check(1 <= self.num_candidates <= 1e6, f"--num-candidates must be at least 1, not {self.num_candidates}")
        check(0 < self.learning_rate < math.inf, f"--learning-rate must be positive, not {self.learning_rate}")
        check(0 <= self.weight_decay < math.inf, f"--weight-decay must be at least 0, not {self.weight_decay}")
        check(0 <= self.dropout < 1, f"--dropout must lie in [0, 1), not {self.dropout}")
        check(0 < self.ema <= 1, f"--ema must lie in (0, 1], not {self.ema}")
        check(0 <= self.gamma <= 1, f"--gamma must lie in [0, 1], not {self.gamma}")
        check(0 < self.tau <= 1, f"--tau must lie in (0, 1], not {self.tau}")


def task_defaults(env_id: str) -> dict[str, Any]:
    """Defaults for `env_id` that override those of `Args` (the demo's)."""
    if env_id in tasks.POINTMAZES:
        epochs = {"dtql/pointmaze-medium-v0": 8, "dtql/pointmaze-large-v0": 14}.get(env_id)  # as many updates as DTQL's
        return {} if epochs is None else dict(epochs=epochs, eval_every=epochs // 4)
    domain, ogbench = tasks.domain(env_id), tasks.is_ogbench(env_id)
    return dict(
        # On OGBench those of FQL's authors
        expectile=0.9 if domain == "antmaze" or env_id.startswith(tasks.MANIPULATION) else 0.7,
        num_candidates=32 if ogbench else 64,
        critic_width=512 if ogbench and not env_id.startswith(tasks.MANIPULATION) else 256,
        batch_size=512,
        epochs=3000,
        gamma=0.995 if ogbench and tasks.is_long(env_id) else 0.99,
        eval_every=250 if ogbench else 50,
        eval_episodes=50 if ogbench else 100 if domain in ("antmaze", "pen", "kitchen") else 10,
    )


def make_data(task: Task, args: Args, device: torch.device) -> Transitions:
    """The data on `device`. Rewards: sparse mazes r - 1, locomotion divided by the range of returns / 1000, others raw."""
    rewards = task.rewards - 1 if task.sparse_goal else task.rewards
    if tasks.domain(args.env_id) == "locomotion":
        rewards = rewards * np.float32(1000 / return_range(task))
    actions = task.actions.clip(-1 + 1e-5, 1 - 1e-5)
    return Transitions(task.obs, actions, rewards, task.terminals, task.next_obs, device)


# ---- the chain: x_i = sqrt(ALPHA_BAR_i) a + sqrt(1 - ALPHA_BAR_i) noise, i = 0 ... 4 ----------------------------------

STEPS = 5
BETA = [1 - math.exp(-0.1 / STEPS - 0.5 * 9.9 * (2 * i + 1) / STEPS**2) for i in range(STEPS)]
ALPHA_BAR = [math.prod(1 - beta for beta in BETA[: i + 1]) for i in range(STEPS)]


def add_noise(actions: Tensor, step: Tensor, noise: Tensor) -> Tensor:
    """x_i of actions (..., A) for steps (..., 1) and Gaussian noise (..., A)."""
    time = (step + 1) / STEPS
    alpha_bar = torch.exp(-0.1 * time - 0.5 * 9.9 * time**2)
    return alpha_bar.sqrt() * actions + (1 - alpha_bar).sqrt() * noise


def sample_chain(predict: Callable[[Tensor, int], Tensor], z: Tensor) -> Tensor:
    """Actions (..., A) from Gaussian z (..., STEPS A), with `predict(x, i)` the noise predicted in x_i.

    Steps add noise of variance beta, and x itself is clamped to [-1, 1] after each.
    """
    x, *noises = z.chunk(STEPS, -1)
    for i in reversed(range(STEPS)):
        beta, alpha_bar = BETA[i], ALPHA_BAR[i]
        x = (x - beta / math.sqrt(1 - alpha_bar) * predict(x, i)) / math.sqrt(1 - beta)
        if i:
            x = x + math.sqrt(beta) * noises[i - 1]
        x = x.clamp(-1, 1)
    return x


# ---- networks, written for one model -------------------------------------------------------------------------------------

HIDDEN, BLOCKS = 256, 3


def xavier(net: nn.Module) -> nn.Module:
    """All linear layers with Xavier-uniform weights and zero biases."""
    for layer in net.modules():
        if isinstance(layer, Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return net


class Critic(nn.Module):
    """Q(s, a), of which there are two: obs (K, B, S), actions (K, B, A) -> (K, 2, B)."""

    def __init__(self, obs_dim: int, action_dim: int, width: int):
        super().__init__()
        self.net = xavier(
            nn.Sequential(
                Linear(obs_dim + action_dim, width), nn.ReLU(),
                Linear(width, width), nn.ReLU(),
                Linear(width, 1),
            )
        )  # fmt: skip

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return self.net(torch.cat((obs, actions), -1).unsqueeze(-3)).squeeze(-1)


class Value(nn.Module):
    """V(s), of the observation after LayerNorm: obs (K, B, S) -> (K, B)."""

    def __init__(self, obs_dim: int, width: int):
        super().__init__()
        self.net = xavier(
            nn.Sequential(
                LayerNorm(obs_dim, eps=1e-6),
                Linear(obs_dim, width), nn.ReLU(),
                Linear(width, width), nn.ReLU(),
                Linear(width, 1),
            )
        )  # fmt: skip

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs).squeeze(-1)


class Block(nn.Module):
    """x + MLP(LayerNorm(dropout(x))): (K, B, 256) -> (K, B, 256)."""

    def __init__(self):
        super().__init__()
        self.norm = LayerNorm(HIDDEN, eps=1e-6)
        self.wide, self.narrow = Linear(HIDDEN, 4 * HIDDEN), Linear(4 * HIDDEN, HIDDEN)
        for layer in (self.wide, self.narrow):  # LeCun normal; truncation at two standard deviations shrinks them by 0.88
            std = layer.in_features**-0.5 / 0.87962566
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = self.norm(x if mask is None else x * mask)
        return x + self.narrow(nn.functional.silu(self.wide(hidden)))


class Denoiser(nn.Module):
    """The noise in x_i: noisy actions (K, B, A), step (K, B, 1), obs (K, B, S) -> (K, B, A)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.frequencies = nn.Parameter(0.2 * torch.randn(64))
        self.time = xavier(nn.Sequential(Linear(128, HIDDEN), nn.SiLU(), Linear(HIDDEN, HIDDEN)))
        self.first = xavier(Linear(action_dim + obs_dim + HIDDEN, HIDDEN))
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.last = xavier(Linear(HIDDEN, action_dim))

    def forward(self, noisy_actions: Tensor, step: Tensor, obs: Tensor, masks: Tensor | None = None) -> Tensor:
        """`masks` (3, K, B, 256): dropout before each block, 0 or 1 / (1 - p); None where there is none."""
        angles = 2 * math.pi * step * self.frequencies.unsqueeze(-2)
        x = self.first(torch.cat((noisy_actions, obs, self.time(torch.cat((angles.cos(), angles.sin()), -1))), -1))
        for i, block in enumerate(self.blocks):
            x = block(x, None if masks is None else masks[i])
        return self.last(nn.functional.silu(x))


# ---- the agent ---------------------------------------------------------------------------------------------------------


class IDQL(nn.Module):
    """Implicit Diffusion Q-Learning, for K models. Every loss returns (K,) and a dict of metrics (K,) to log."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device, data: Transitions | None = None):
        """Build networks and optimizers on `device`. A policy that is only deployed needs no `data`."""
        super().__init__()
        self.args, self.action_dim, self.device, self.data = args, action_dim, device, data

        def make_model() -> nn.ModuleDict:
            return nn.ModuleDict({
                "critic": stacked.stack([Critic(obs_dim, action_dim, args.critic_width) for _ in range(2)]),
                "value": Value(obs_dim, args.critic_width),
                "denoiser": Denoiser(obs_dim, action_dim),
            })  # fmt: skip

        self.critic, self.value, self.denoiser = stacked.stack_seeds(make_model, args.model_seeds).to(device).values()
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.ema_denoiser = copy.deepcopy(self.denoiser).requires_grad_(False)
        self.denoiser_optimizer = torch.optim.AdamW(
            self.denoiser.parameters(), args.learning_rate, weight_decay=args.weight_decay, fused=True
        )
        self.value_optimizer = torch.optim.Adam(self.value.parameters(), args.learning_rate, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), args.learning_rate, fused=True)
        self.register_buffer("train_step", torch.zeros((), device=device))

        self.expectile = args.per_model("expectile", device)
        self.step_denoiser = stacked.make_step(self.denoiser_loss, self.denoiser_optimizer, args.compile)
        self.step_value = stacked.make_step(self.value_loss, self.value_optimizer, args.compile)
        self.step_critic = stacked.make_step(self.critic_loss, self.critic_optimizer, args.compile)
        judge = self.target_critic if args.num_candidates > 1 else None
        self.act = BestOf(self.sample, STEPS * action_dim, judge, args.num_candidates, greedy=True, compile=args.compile)

    def denoiser_loss(self, batch: Batch, step: Tensor, noise: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Metrics]:
        """Squared error of the predicted noise, summed over dimensions: the diffusion policy clones the data."""
        noisy = add_noise(batch.actions, step, noise)
        loss = (self.denoiser(noisy, step.to(noise), batch.obs, masks) - noise).square().sum(-1).mean(-1)
        return loss, {"denoiser": loss}

    def value_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Expectile regression of V on the smaller target Q."""
        q = self.target_critic(batch.obs, batch.actions).amin(1)
        loss = expectile_loss(q - self.value(batch.obs), self.expectile)
        return loss, {"value": loss}

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Both Qs on r + gamma V(s'), also averaged over the two."""
        q = self.critic(batch.obs, batch.actions)
        with torch.no_grad():
            target = batch.rewards + self.args.gamma * (1 - batch.terminals) * self.value(batch.next_obs)
        loss = (target[:, None] - q).square().mean((-1, -2))
        return loss, {"critic": loss, "q": q.mean((-1, -2))}

    def update(self) -> Metrics:
        """One update: diffusion policy and its average, V, Q, target Qs, on one minibatch. Tensors only, with static shapes."""
        args, shape = self.args, (self.args.num_models, self.args.batch_size)
        batch, masks = self.data.sample(*shape), None
        step = torch.randint(STEPS, (*shape, 1), device=self.device)
        noise = torch.randn(*shape, self.action_dim, device=self.device)
        if args.dropout:
            keep = torch.rand(shape[0], BLOCKS, shape[1], HIDDEN, device=self.device) >= args.dropout
            masks = (keep / (1 - args.dropout)).transpose(0, 1)
        factor = (1 + torch.cos(math.pi * self.train_step / args.total_steps)) / 2
        stacked.set_learning_rate(self.denoiser_optimizer, factor)

        metrics = self.step_denoiser(batch, step, noise, masks)
        stacked.polyak_update(self.ema_denoiser, self.denoiser, args.ema)
        metrics |= self.step_value(batch)
        metrics |= self.step_critic(batch)
        stacked.polyak_update(self.target_critic, self.critic, args.tau)
        self.train_step += 1
        return metrics

    def sample(self, obs: Tensor, z: Tensor) -> Tensor:
        """Candidates (K, n, N, A) of the averaged diffusion policy in states (K, n, S), from noise z (K, n, N, 5 A)."""
        states = repeat_states(obs, z.shape[2])
        predict = lambda x, i: self.ema_denoiser(x, torch.full_like(x[..., :1], i), states)
        return sample_chain(predict, z.flatten(1, 2)).view(*z.shape[:3], -1)


def expectile_loss(u: Tensor, expectile: Tensor) -> Tensor:
    """Mean of |expectile - 1(u < 0)| u^2; u (K, B), expectile (K,) -> (K,)."""
    return ((expectile[:, None] - (u < 0).float()).abs() * u**2).mean(-1)


def load_policy(checkpoint: str, index: int = 0, device: str = "cpu", seed: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """The deployed policy of model `index` in a checkpoint.

    Returns a function from one observation (S,) or a batch (B, S) to actions (A,) or (B, A) in the environment's units.
    Raises UserError if the checkpoint cannot be read or has no such model.
    """
    return common.load_policy(checkpoint, __file__, IDQL, Args, index, device, seed)


def main(args: Args) -> dict[str, Any]:
    """Train and evaluate. Returns the run's folder and the rows of its eval.csv; raises UserError for bad input."""
    args.check()
    device = common.find_device(args.device)
    task = tasks.load_task(args)
    envs = evaluation.make_envs(task, args)
    common.set_up_torch(args, device)
    data = make_data(task, args, device)
    agent = IDQL(args, task.obs.shape[1], task.actions.shape[1], device, data)
    fastest = functools.cache(
        lambda: stacked.fastest(agent.update, agent, args.compile, args.cudagraphs and device.type == "cuda")
    )

    with Run(__file__, args, task, envs, agent) as run:
        while True:
            if run.evaluation_due():
                run.evaluate(agent.act)
            if run.ended:
                break
            update = fastest()
            for _ in range(run.until_log()):
                run.advance(update())
            run.log()
        run.save()
    return run.summary()


if __name__ == "__main__":
    common.run(main, lambda: common.parse_args(Args, task_defaults))
