"""Diffusion Q-Learning (DQL): a diffusion policy that clones and climbs Q through its own sampling chain.

Wang, Hunt and Zhou, 2023. The policy is a chain of 5 denoising steps; its loss is that of cloning plus -Q at an action sampled
with the whole chain, differentiated back through all of it. The method whose cost DTQL avoids.

It differs from `idql.py` in these points:

1. The diffusion policy itself is improved and deployed; its moving average makes the next actions in Q's target.
2. Q is learned from sampled next actions, without V; with `--max-q-backup` from the best of ten.
3. The chain clamps the predicted action, not its state; the network is a plain MLP, without dropout.
4. One of 50 candidates is taken with probability softmax(min(Q1', Q2')).
5. Gradients are clipped, each model's on its own.

Shapes: K models with minibatches of B; obs (K, B, S), actions (K, B, A) in [-1, 1], step (K, B, 1), noise (K, B, A),
z (K, B, 5 A), coin (K,), rewards, terminals (K, B), both Qs (K, 2, B).
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
from stacked import Batch, Linear, Metrics, Mish, Transitions
from tasks import Task


@dataclass
class Args(common.Args):
    """Diffusion Q-Learning (DQL). The defaults shown are those of the given task."""

    sweep = ("eta",)

    # Algorithm specific arguments
    eta: float | tuple[float, ...] = 2.0
    """weight of Q in the policy's loss: large improves, 0 clones"""
    max_q_backup: bool = False
    """learn Q from the best of ten next actions, not from one"""
    max_norm: float = 2.0
    """the gradients of policy and of Qs are clipped to this norm"""
    num_candidates: int = 50
    """actions sampled from the policy in each state, one of which is taken with probability softmax(Q)"""
    learning_rate: float = 3e-4
    """of the policy; the Qs always use 3e-4"""
    ema: float = 0.005
    """Polyak rate of the policy's average, updated every 5 updates from the 1000th on"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """Polyak rate of the target Qs"""
    batch_size: int = 64
    """minibatch size"""
    epochs: int = 8
    """training epochs"""

    def check(self) -> None:
        """Raise UserError for invalid settings."""
        super().check()
        check(all(0 <= eta < math.inf for eta in self.values("eta")), f"--eta must be at least 0, not {self.eta}")
        check(0 < self.max_norm < math.inf, f"--max-norm must be positive, not {self.max_norm}")
        check(1 <= self.num_candidates <= 1e6, f"--num-candidates must be at least 1, not {self.num_candidates}")
        check(0 < self.learning_rate < math.inf, f"--learning-rate must be positive, not {self.learning_rate}")
        check(0 < self.ema <= 1, f"--ema must lie in (0, 1], not {self.ema}")
        check(0 <= self.gamma <= 1, f"--gamma must lie in [0, 1], not {self.gamma}")
        check(0 < self.tau <= 1, f"--tau must lie in (0, 1], not {self.tau}")


# The authors': learning rate, eta, max_q_backup, epochs, max_norm. AntMaze v2 has no others than v0
SETTINGS = {
    "halfcheetah-medium-v2": (3e-4, 1, False, 2000, 9),
    "halfcheetah-medium-replay-v2": (3e-4, 1, False, 2000, 2),
    "halfcheetah-medium-expert-v2": (3e-4, 1, False, 2000, 7),
    "hopper-medium-v2": (3e-4, 1, False, 2000, 9),
    "hopper-medium-replay-v2": (3e-4, 1, False, 2000, 4),
    "hopper-medium-expert-v2": (3e-4, 1, False, 2000, 5),
    "walker2d-medium-v2": (3e-4, 1, False, 2000, 1),
    "walker2d-medium-replay-v2": (3e-4, 1, False, 2000, 4),
    "walker2d-medium-expert-v2": (3e-4, 1, False, 2000, 5),
    "antmaze-umaze-v0": (3e-4, 0.5, False, 1000, 2),
    "antmaze-umaze-diverse-v0": (3e-4, 2, True, 1000, 3),
    "antmaze-medium-play-v0": (1e-3, 2, True, 1000, 2),
    "antmaze-medium-diverse-v0": (3e-4, 3, True, 1000, 1),
    "antmaze-large-play-v0": (3e-4, 4.5, True, 1000, 10),
    "antmaze-large-diverse-v0": (3e-4, 3.5, True, 1000, 7),
    "pen-human-v1": (3e-5, 0.15, False, 1000, 7),
    "pen-cloned-v1": (3e-5, 0.1, False, 1000, 8),
    "kitchen-complete-v0": (3e-4, 0.005, False, 250, 9),
    "kitchen-partial-v0": (3e-4, 0.005, False, 1000, 10),
    "kitchen-mixed-v0": (3e-4, 0.005, False, 1000, 10),
}


def task_defaults(env_id: str) -> dict[str, Any]:
    """Defaults for `env_id` that override those of `Args` (the demo's)."""
    if env_id in tasks.POINTMAZES:
        epochs = {"dtql/pointmaze-medium-v0": 8, "dtql/pointmaze-large-v0": 14}.get(env_id)  # as many updates as DTQL's
        return {} if epochs is None else dict(epochs=epochs, eval_every=epochs // 4)
    ogbench, domain, name = tasks.is_ogbench(env_id), tasks.domain(env_id), tasks.d4rl_id(env_id) or ""
    if name.startswith("antmaze"):
        name = name.replace("-v2", "-v0")
    learning_rate, eta, max_q_backup, epochs, max_norm = SETTINGS.get(name, (3e-4, 1, False, 2000, 5))
    return dict(
        learning_rate=learning_rate,
        eta=float(eta),
        max_q_backup=max_q_backup,
        epochs=1000 if ogbench else epochs,
        max_norm=float(max_norm),
        batch_size=256,
        gamma=0.995 if ogbench and tasks.is_long(env_id) else 0.99,
        eval_every=100 if ogbench else 50,
        eval_episodes=50 if ogbench else 100 if domain in ("antmaze", "pen", "kitchen") else 10,
    )


def make_data(task: Task, args: Args, device: torch.device) -> Transitions:
    """The data on `device`. Rewards: sparse mazes 4 (r - 0.5), pen standardised, others as they are."""
    rewards = 4 * (task.rewards - 0.5) if task.sparse_goal else task.rewards
    if tasks.domain(args.env_id) == "pen":
        rewards = (rewards - rewards.mean()) / rewards.std(ddof=1)
    return Transitions(task.obs, task.actions, rewards, task.terminals, task.next_obs, device)


# ---- the chain: x_i = sqrt(ALPHA_BAR_i) a + sqrt(1 - ALPHA_BAR_i) noise, i = 0 ... 4 ----------------------------------

STEPS = 5
BETA = [1 - math.exp(-0.1 / STEPS - 0.5 * 9.9 * (2 * i + 1) / STEPS**2) for i in range(STEPS)]
ALPHA_BAR = [math.prod(1 - beta for beta in BETA[: i + 1]) for i in range(STEPS)]
# Posterior of x_(i-1) given x_i and the action: its variance, and the weights of the action and of x_i in its mean
_chain = list(zip(BETA, ALPHA_BAR, [1.0, *ALPHA_BAR]))
POSTERIOR_VARIANCE = [beta * (1 - before) / (1 - after) for beta, after, before in _chain]
POSTERIOR_ACTION = [beta * math.sqrt(before) / (1 - after) for beta, after, before in _chain]
POSTERIOR_X = [(1 - before) * math.sqrt(1 - beta) / (1 - after) for beta, after, before in _chain]


def add_noise(actions: Tensor, step: Tensor, noise: Tensor) -> Tensor:
    """x_i of actions (..., A) for steps (..., 1) and Gaussian noise (..., A)."""
    time = (step + 1) / STEPS
    alpha_bar = torch.exp(-0.1 * time - 0.5 * 9.9 * time**2)
    return alpha_bar.sqrt() * actions + (1 - alpha_bar).sqrt() * noise


def sample_chain(predict: Callable[[Tensor, int], Tensor], z: Tensor) -> Tensor:
    """Actions (..., A) from Gaussian z (..., STEPS A), with `predict(x, i)` the noise predicted in x_i.

    Each step samples the posterior of x_(i-1) given x_i and the predicted action, which is clamped to [-1, 1].
    """
    x, *noises = z.chunk(STEPS, -1)
    for i in reversed(range(STEPS)):
        alpha_bar = ALPHA_BAR[i]
        action = ((x - math.sqrt(1 - alpha_bar) * predict(x, i)) / math.sqrt(alpha_bar)).clamp(-1, 1)
        x = POSTERIOR_ACTION[i] * action + POSTERIOR_X[i] * x
        if i:
            x = x + math.sqrt(POSTERIOR_VARIANCE[i]) * noises[i - 1]
    return x.clamp(-1, 1)


# ---- networks, written for one model -------------------------------------------------------------------------------------

HIDDEN = 256


class Critic(nn.Module):
    """Q(s, a), of which there are two: obs (K, B, S), actions (K, B, A) -> (K, 2, B)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = nn.Sequential(
            Linear(obs_dim + action_dim, HIDDEN), Mish(),
            Linear(HIDDEN, HIDDEN), Mish(),
            Linear(HIDDEN, HIDDEN), Mish(),
            Linear(HIDDEN, 1),
        )  # fmt: skip

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return self.net(torch.cat((obs, actions), -1).unsqueeze(-3)).squeeze(-1)


class Denoiser(nn.Module):
    """The noise in x_i: noisy actions (K, B, A), step (K, B, 1), obs (K, B, S) -> (K, B, A)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.time = nn.Sequential(Linear(16, 32), Mish(), Linear(32, 16))
        self.net = nn.Sequential(
            Linear(action_dim + obs_dim + 16, HIDDEN), Mish(),
            Linear(HIDDEN, HIDDEN), Mish(),
            Linear(HIDDEN, HIDDEN), Mish(),
            Linear(HIDDEN, action_dim),
        )  # fmt: skip
        self.register_buffer("frequencies", 10000 ** (-torch.arange(8) / 7), persistent=False)

    def forward(self, noisy_actions: Tensor, step: Tensor, obs: Tensor) -> Tensor:
        angles = step * self.frequencies
        embedding = self.time(torch.cat((angles.sin(), angles.cos()), -1))
        return self.net(torch.cat((noisy_actions, embedding, obs), -1))


# ---- the agent ---------------------------------------------------------------------------------------------------------


class DQL(nn.Module):
    """Diffusion Q-Learning, for K models. Every loss returns (K,) and a dict of metrics (K,) to log."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device, data: Transitions | None = None):
        """Build networks and optimizers on `device`. A policy that is only deployed needs no `data`."""
        super().__init__()
        self.args, self.action_dim, self.device, self.data = args, action_dim, device, data

        def make_model() -> nn.ModuleDict:
            return nn.ModuleDict({
                "critic": stacked.stack([Critic(obs_dim, action_dim), Critic(obs_dim, action_dim)]),
                "denoiser": Denoiser(obs_dim, action_dim),
            })  # fmt: skip

        self.critic, self.denoiser = stacked.stack_seeds(make_model, args.model_seeds).to(device).values()
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.ema_denoiser = copy.deepcopy(self.denoiser).requires_grad_(False)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), 3e-4, fused=True)
        self.denoiser_optimizer = torch.optim.Adam(self.denoiser.parameters(), args.learning_rate, fused=True)
        self.register_buffer("train_step", torch.zeros((), device=device))

        self.eta = args.per_model("eta", device)
        clip = functools.partial(clip_per_model, max_norm=args.max_norm)
        self.step_critic = stacked.make_step(self.critic_loss, self.critic_optimizer, args.compile, clip)
        self.step_denoiser = stacked.make_step(self.denoiser_loss, self.denoiser_optimizer, args.compile, clip)
        judge = self.target_critic if args.num_candidates > 1 else None
        self.act = BestOf(self.sample, STEPS * action_dim, judge, args.num_candidates, compile=args.compile)

    def critic_loss(self, batch: Batch, z: Tensor) -> tuple[Tensor, Metrics]:
        """Both Qs on r + gamma min Q'(s', a'), a' of the policy's average; the largest of M next actions, z (K, M, B, 5 A)."""
        with torch.no_grad():
            candidates = z.shape[1]
            next_obs = batch.next_obs.unsqueeze(1).expand(-1, candidates, -1, -1).flatten(1, 2)
            next_actions = self.chain(self.ema_denoiser, next_obs, z.flatten(1, 2))
            next_q = self.target_critic(next_obs, next_actions).unflatten(2, (candidates, -1)).amax(2).amin(1)
            target = batch.rewards + self.args.gamma * (1 - batch.terminals) * next_q
        q = self.critic(batch.obs, batch.actions)
        loss = (q - target[:, None]).square().mean(-1).sum(1)
        return loss, {"critic": loss, "q": q.mean((-1, -2))}

    def denoiser_loss(self, batch: Batch, step: Tensor, noise: Tensor, z: Tensor, coin: Tensor) -> tuple[Tensor, Metrics]:
        """Cloning, minus eta times one of the Qs, which `coin` chooses, divided by the mean size of the other."""
        predicted = self.denoiser(add_noise(batch.actions, step, noise), step.to(noise), batch.obs)
        clone = (predicted - noise).square().mean((-1, -2))
        q = self.critic(batch.obs, self.chain(self.denoiser, batch.obs, z))
        mean, size = q.mean(-1), q.detach().abs().mean(-1) + 1e-6
        actor_q = torch.where(coin < 0.5, mean[:, 0] / size[:, 1], mean[:, 1] / size[:, 0])
        return clone - self.eta * actor_q, {"denoiser": clone, "actor_q": mean.mean(-1)}

    def chain(self, denoiser: nn.Module, obs: Tensor, z: Tensor) -> Tensor:
        """Actions (K, B, A) of a diffusion policy in obs (K, B, S), from z (K, B, 5 A); differentiable throughout."""
        return sample_chain(lambda x, i: denoiser(x, torch.full_like(x[..., :1], i), obs), z)

    def update(self) -> Metrics:
        """One update: Qs, policy, its average, target Qs, on one minibatch. Tensors only, with static shapes."""
        args, (num_models, batch_size) = self.args, (self.args.num_models, self.args.batch_size)
        batch, width = self.data.sample(num_models, batch_size), STEPS * self.action_dim
        step = torch.randint(STEPS, (num_models, batch_size, 1), device=self.device)
        noise = torch.randn(num_models, batch_size, self.action_dim, device=self.device)
        z = torch.randn(num_models, batch_size, width, device=self.device)
        next_z = torch.randn(num_models, 10 if args.max_q_backup else 1, batch_size, width, device=self.device)
        coin = torch.rand(num_models, device=self.device)

        metrics = self.step_critic(batch, next_z)
        metrics |= self.step_denoiser(batch, step, noise, z, coin)
        ema = args.ema * (self.train_step >= 1000) * (self.train_step % 5 == 0)  # a tensor: the host must not branch
        stacked.polyak_update(self.ema_denoiser, self.denoiser, ema)
        stacked.polyak_update(self.target_critic, self.critic, args.tau)
        self.train_step += 1
        return metrics

    def sample(self, obs: Tensor, z: Tensor) -> Tensor:
        """Candidates (K, n, N, A) of the diffusion policy in states (K, n, S), from noise z (K, n, N, 5 A)."""
        return self.chain(self.denoiser, repeat_states(obs, z.shape[2]), z.flatten(1, 2)).view(*z.shape[:3], -1)


def clip_per_model(gradients: list[Tensor], max_norm: float) -> list[Tensor]:
    """Gradients (K, ...) scaled so that no model's norm over all of them exceeds `max_norm`, as torch's clip_grad_norm_."""
    squares = [gradient.reshape(len(gradient), -1).square().sum(1) for gradient in gradients]
    scale = (max_norm / (torch.stack(squares).sum(0).sqrt() + 1e-6)).clamp(max=1)
    return [gradient * scale.view(-1, *[1] * (gradient.ndim - 1)) for gradient in gradients]


def load_policy(checkpoint: str, index: int = 0, device: str = "cpu", seed: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """The deployed policy of model `index` in a checkpoint.

    Returns a function from one observation (S,) or a batch (B, S) to actions (A,) or (B, A) in the environment's units.
    Raises UserError if the checkpoint cannot be read or has no such model.
    """
    return common.load_policy(checkpoint, __file__, DQL, Args, index, device, seed)


def main(args: Args) -> dict[str, Any]:
    """Train and evaluate. Returns the run's folder and the rows of its eval.csv; raises UserError for bad input."""
    args.check()
    device = common.find_device(args.device)
    task = tasks.load_task(args)
    envs = evaluation.make_envs(task, args)
    common.set_up_torch(args, device)
    data = make_data(task, args, device)
    agent = DQL(args, task.obs.shape[1], task.actions.shape[1], device, data)
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
