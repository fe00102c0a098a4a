"""Flow-Anchored Noise-conditioned Q-learning (FAN): FQL with DTQL's kind of trust region and a distributional critic.

ICML 2026 (arXiv 2605.01663). A flow policy clones the data. The one-step policy, which is deployed, is anchored to it by the
flow's own loss at the policy's actions, as DTQL anchors it by the diffusion model's. Q sees a noise beside state and action, so
that it stands for a distribution of returns, and Z is an upper expectile of it.

It differs from `fql.py` in these points:

1. The one-step policy stays near the flow by the flow-matching loss at its own actions, without integrating the flow.
2. Q(s, a, n) is conditioned on noise: its target's action comes from that same noise. Z(s, a) is its expectile over n.
3. The target takes Z at the next action, minus a penalty for actions that are far from the flow.
4. The policy climbs Q, at fresh noise, and Z. `--critic q` is the ablation without noise and Z.

Shapes: K models with minibatches of B; obs (K, B, S), actions (K, B, A) in [-1, 1], noise (K, B, A), time (K, B, 1),
rewards, terminals (K, B), both Qs (K, 2, B).
"""

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

import common
import evaluation
import stacked
import tasks
from best_of import BestOf
from common import check
from run_folder import Run
from stacked import Batch, LayerNorm, Linear, Metrics, Transitions
from tasks import Task


@dataclass
class Args(common.Args):
    """Flow-Anchored Noise-conditioned Q-learning (FAN). The defaults shown are those of the given task."""

    sweep = ("alpha1", "alpha2")

    # Algorithm specific arguments
    alpha1: float | tuple[float, ...] = 3.0
    """weight of the anchor in the policy's loss: large clones, small improves"""
    alpha2: float | tuple[float, ...] = 0.03
    """weight of the anchor in the critic's target"""
    critic: Literal["distributional", "q"] = "distributional"
    """Q with noise and its expectile Z, or a plain Q"""
    kappa: float = 0.9
    """expectile of Z"""
    q_target: Literal["mean", "min"] = "mean"
    """whether the critic's target takes the mean or the minimum of the two networks"""
    normalize_q: bool = False
    """divide the terms of Q and Z in the policy's loss by their mean size"""
    learning_rate: float = 3e-4
    """of all networks"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """Polyak rate of the target Qs"""
    batch_size: int = 64
    """minibatch size"""
    epochs: int = 4
    """training epochs"""

    def check(self) -> None:
        """Raise UserError for invalid settings."""
        super().check()
        for name in self.sweep:
            check(all(0 <= value < math.inf for value in self.values(name)), f"--{name} must be at least 0")
        check(0 < self.kappa < 1, f"--kappa must lie in (0, 1), not {self.kappa}")
        check(0 < self.learning_rate < math.inf, f"--learning-rate must be positive, not {self.learning_rate}")
        check(0 <= self.gamma <= 1, f"--gamma must lie in [0, 1], not {self.gamma}")
        check(0 < self.tau <= 1, f"--tau must lie in (0, 1], not {self.tau}")


# By the beginning of the id, the authors' alpha1 and alpha2; AntMaze's, with the smaller target, elsewhere
ALPHA = {
    "cube": (100, 0),
    "scene": (100, 3),
    "puzzle": (100, 3),
    "antsoccer": (10, 0.1),
    "pen": (1000, 1),
}


def task_defaults(env_id: str) -> dict[str, Any]:
    """Defaults for `env_id` that override those of `Args` (the demo's)."""
    if env_id in tasks.POINTMAZES:
        epochs = {"dtql/pointmaze-medium-v0": 8, "dtql/pointmaze-large-v0": 14}.get(env_id)  # as many updates as DTQL's
        return {} if epochs is None else dict(epochs=epochs, eval_every=epochs // 4)
    ogbench, domain, name = tasks.is_ogbench(env_id), tasks.domain(env_id), tasks.d4rl_id(env_id) or env_id
    alpha1, alpha2 = next((alphas for start, alphas in ALPHA.items() if name.startswith(start)), (3, 0.03))
    return dict(
        alpha1=float(alpha1),
        alpha2=float(alpha2),
        q_target="min" if domain == "antmaze" else "mean",
        batch_size=256,
        epochs=1000 if ogbench else 500,
        gamma=0.995 if name.startswith((*tasks.MANIPULATION, "antsoccer")) else 0.99,
        eval_every=100 if ogbench else 50,
        eval_episodes=50 if ogbench else 100 if domain in ("antmaze", "pen", "kitchen") else 10,
    )


def make_data(task: Task, args: Args, device: torch.device) -> Transitions:
    """The data on `device`, in sparse mazes with rewards r - 1."""
    rewards = task.rewards - 1 if task.sparse_goal else task.rewards
    actions = task.actions.clip(-1 + 1e-5, 1 - 1e-5)
    return Transitions(task.obs, actions, rewards, task.terminals, task.next_obs, device)


# ---- networks, written for one model -------------------------------------------------------------------------------------

HIDDEN = 512


def mlp(inputs: int, outputs: int, norm: bool = False) -> nn.Sequential:
    """Four hidden layers with GELU, each with LayerNorm after the activation if `norm`; Xavier-uniform weights, zero biases."""
    layers, width = [], inputs
    for _ in range(4):
        layers += [Linear(width, HIDDEN), nn.GELU(approximate="tanh"), *([LayerNorm(HIDDEN, eps=1e-6)] if norm else [])]
        width = HIDDEN
    net = nn.Sequential(*layers, Linear(HIDDEN, outputs))
    for layer in net:
        if isinstance(layer, Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return net


class Critic(nn.Module):
    """Q(s, a, n) or Z(s, a), of which there are two: obs (K, B, S), actions and noise (K, B, A) -> (K, 2, B)."""

    def __init__(self, obs_dim: int, action_dim: int, noise_dim: int = 0):
        super().__init__()
        self.net = mlp(obs_dim + action_dim + noise_dim, 1, norm=True)

    def forward(self, obs: Tensor, actions: Tensor, noise: Tensor | None = None) -> Tensor:
        inputs = (obs, actions) if noise is None else (obs, actions, noise)
        return self.net(torch.cat(inputs, -1).unsqueeze(-3)).squeeze(-1)


class Velocity(nn.Module):
    """The flow policy's v(s, x_t, t): obs (K, B, S), actions on their way (K, B, A), time (K, B, 1) -> (K, B, A)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim + action_dim + 1, action_dim)

    def forward(self, obs: Tensor, x: Tensor, time: Tensor) -> Tensor:
        return self.net(torch.cat((obs, x, time), -1))


class Actor(nn.Module):
    """The one-step policy mu(s, z): obs (K, B, S), noise (K, B, A) -> (K, B, A), not clamped."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim + action_dim, action_dim)

    def forward(self, obs: Tensor, noise: Tensor) -> Tensor:
        return self.net(torch.cat((obs, noise), -1))


# ---- the agent ---------------------------------------------------------------------------------------------------------


class FAN(nn.Module):
    """FAN, for K models. Every loss returns (K,) and a dict of metrics (K,) to log."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device, data: Transitions | None = None):
        """Build networks and optimizers on `device`. A policy that is only deployed needs no `data`."""
        super().__init__()
        self.args, self.action_dim, self.device, self.data = args, action_dim, device, data
        self.noisy = args.critic == "distributional"

        def make_model() -> nn.ModuleDict:
            return nn.ModuleDict({
                "critic": stacked.stack([Critic(obs_dim, action_dim, self.noisy * action_dim) for _ in range(2)]),
                "upper": stacked.stack([Critic(obs_dim, action_dim) for _ in range(2)]),
                "flow": Velocity(obs_dim, action_dim),
                "actor": Actor(obs_dim, action_dim),
            })  # fmt: skip

        self.critic, self.upper, self.flow, self.actor = stacked.stack_seeds(make_model, args.model_seeds).to(device).values()
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        used = [self.critic, self.flow, self.actor, *([self.upper] if self.noisy else [])]
        self.optimizer = torch.optim.Adam([param for net in used for param in net.parameters()], args.learning_rate, fused=True)

        self.alpha1, self.alpha2 = args.per_model("alpha1", device), args.per_model("alpha2", device)
        self.step = stacked.make_step(self.loss, self.optimizer, args.compile)
        self.act = BestOf(self.sample, action_dim, compile=args.compile)

    def flow_loss(self, batch: Batch, noise: Tensor, time: Tensor) -> tuple[Tensor, Metrics]:
        """Flow matching along straight lines, (v((1 - t) x_0 + t a, t) - (a - x_0))^2; trains the flow policy."""
        loss = self.anchor(self.flow, batch.obs, batch.actions, noise, time).mean((-1, -2))
        return loss, {"flow": loss}

    @staticmethod
    def anchor(flow: Callable, obs: Tensor, actions: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """The flow-matching loss of `actions` that started at `noise`, (K, B, A)."""
        return (flow(obs, (1 - time) * noise + time * actions, time) - (actions - noise)).square()

    def critic_loss(self, batch: Batch, noise: Tensor, time: Tensor) -> tuple[Tensor, Metrics]:
        """Both Qs on r + gamma (Z(s', a') - alpha2 anchor), with a' from `noise`, which Q sees too; trains Q."""
        args = self.args
        with torch.no_grad():
            next_actions = self.actor(batch.next_obs, noise).clamp(-1, 1)
            next_z = (self.upper if self.noisy else self.target_critic)(batch.next_obs, next_actions)
            next_z = next_z.mean(1) if args.q_target == "mean" else next_z.amin(1)
            penalty = self.anchor(self.flow, batch.next_obs, next_actions, noise, time).sum(-1)
            next_value = next_z - self.alpha2[:, None] * penalty
            target = batch.rewards + args.gamma * (1 - batch.terminals) * next_value
        q = self.critic(batch.obs, batch.actions, noise if self.noisy else None)
        loss = (q - target[:, None]).square().mean((-1, -2))
        return loss, {"critic": loss, "q": q.mean((-1, -2)), "penalty": penalty.mean(-1)}

    def upper_loss(self, batch: Batch, noise: Tensor) -> tuple[Tensor, Metrics]:
        """Expectile regression of both Zs on the mean target Q at fresh noise; trains Z."""
        with torch.no_grad():
            q = self.target_critic(batch.obs, batch.actions, noise).mean(1, keepdim=True)
        u = q - self.upper(batch.obs, batch.actions)
        loss = ((self.args.kappa - (u < 0).float()).abs() * u.square()).mean((-1, -2))
        return loss, {"upper": loss}

    def actor_loss(self, batch: Batch, noise: Tensor, time: Tensor, q_noise: Tensor) -> tuple[Tensor, Metrics]:
        """alpha1 times the anchor at the policy's own actions, minus Q and Z; trains the one-step policy."""
        actions = self.actor(batch.obs, noise)
        # The anchor's gradient also passes through the flow's input, and the losses share one backward pass
        anchor = self.anchor(frozen(self.flow), batch.obs, actions, noise, time).mean((-1, -2))
        terms = {"actor_q": frozen(self.critic)(batch.obs, actions.clamp(-1, 1), q_noise if self.noisy else None).mean(1)}
        if self.noisy:
            terms["actor_z"] = frozen(self.upper)(batch.obs, actions.clamp(-1, 1)).mean(1)
        loss = self.alpha1 * anchor
        for value in terms.values():
            scale = value.detach().abs().mean(-1) + 1e-6 if self.args.normalize_q else 1.0
            loss = loss - value.mean(-1) / scale
        return loss, {"anchor": anchor, **{name: value.mean(-1) for name, value in terms.items()}}

    def loss(self, batch: Batch, noise: Tensor, time: Tensor) -> tuple[Tensor, Metrics]:
        """The sum of all, each of which trains its own network; `noise` (K, 5, B, A), `time` (K, 3, B, 1)."""
        parts = [
            self.critic_loss(batch, noise[:, 0], time[:, 0]),
            self.flow_loss(batch, noise[:, 1], time[:, 1]),
            self.actor_loss(batch, noise[:, 2], time[:, 2], noise[:, 3]),
            *([self.upper_loss(batch, noise[:, 4])] if self.noisy else []),
        ]
        return sum(loss for loss, _ in parts), {name: value for _, metrics in parts for name, value in metrics.items()}

    def update(self) -> Metrics:
        """One step of Adam for all networks, then the target Qs. Tensors only, with static shapes."""
        args, (k, b) = self.args, (self.args.num_models, self.args.batch_size)
        batch = self.data.sample(k, b)
        noise = torch.randn(k, 5, b, self.action_dim, device=self.device)
        time = torch.rand(k, 3, b, 1, device=self.device)
        before = copy.deepcopy(self.critic)
        metrics = self.step(batch, noise, time)
        stacked.polyak_update(self.target_critic, before, args.tau)  # as the authors: toward the Qs of before the step
        return metrics

    def sample(self, obs: Tensor, z: Tensor) -> Tensor:
        """An action (K, n, 1, A) of the one-step policy in states (K, n, S), from noise z (K, n, 1, A)."""
        return self.actor(obs, z.squeeze(2)).unsqueeze(2)


def frozen(net: nn.Module) -> Callable[..., Tensor]:
    """`net` with its parameters detached."""
    params = {name: param.detach() for name, param in net.named_parameters()}
    return lambda *inputs: torch.func.functional_call(net, params, inputs)


def load_policy(checkpoint: str, index: int = 0, device: str = "cpu", seed: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """The deployed policy of model `index` in a checkpoint.

    Returns a function from one observation (S,) or a batch (B, S) to actions (A,) or (B, A) in the environment's units.
    Raises UserError if the checkpoint cannot be read or has no such model.
    """
    return common.load_policy(checkpoint, __file__, FAN, Args, index, device, seed)


def main(args: Args) -> dict[str, Any]:
    """Train and evaluate. Returns the run's folder and the rows of its eval.csv; raises UserError for bad input."""
    args.check()
    device = common.find_device(args.device)
    task = tasks.load_task(args)
    envs = evaluation.make_envs(task, args)
    common.set_up_torch(args, device)
    data = make_data(task, args, device)
    agent = FAN(args, task.obs.shape[1], task.actions.shape[1], device, data)
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
