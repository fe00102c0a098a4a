"""Implicit Diffusion Q-Learning (IDQL): IQL's critic judges the samples of a diffusion policy that only clones.

Hansen-Estruch et al., 2023, as in the authors' last code. No policy is improved: in each state N actions are drawn from the
diffusion policy, and the one with the largest Q is taken.

It differs from `dtql_continuous.py` in these points:

1. There is no one-step policy: what is deployed is the diffusion policy (its moving average), sampled in 5 steps.
2. The diffusion policy predicts the noise of a chain of 5 steps (variance preserving) with a residual network, dropout and AdamW.
3. Q is IQL's: it learns from V(s'), V by expectile regression on the smaller target Q; there is no pretraining.
4. Of the candidates the best by min(Q1', Q2') is taken, not a draw from the softmax.

Shapes, for one model: obs (B, S), actions (B, A) in [-1, 1], step (B, 1), noise (B, A), masks (3, B, 256).
"""

import contextlib
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
import data
import stacked
from stacked import Batch, Net, Params


@dataclass
class Args(common.Args):
    """Implicit Diffusion Q-Learning (IDQL). The defaults shown are those of the given task."""

    sweep = ("expectile",)

    # Algorithm specific arguments
    expectile: float | tuple[float, ...] = 0.9
    """of the value loss"""
    num_candidates: int = 16
    """actions drawn from the diffusion policy in each state, of which the one with the largest Q is taken"""
    learning_rate: float = 3e-4
    """of all networks; the diffusion policy's falls to 0 along a cosine"""
    weight_decay: float = 1e-4
    """of the diffusion policy"""
    dropout: float = 0.1
    """of the diffusion policy"""
    ema: float = 0.001
    """step of the deployed diffusion policy towards the trained one"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """step of the target Qs towards the online Qs"""
    batch_size: int = 64
    """transitions per update and model"""
    epochs: int = 12
    """training epochs"""


def task_defaults(env_id: str) -> dict[str, Any]:
    """The arguments in which a task's defaults differ from those of `Args`, which are the demo's."""
    if env_id in data.POINTMAZES:
        epochs = {"dtql/pointmaze-medium-v0": 8, "dtql/pointmaze-large-v0": 14}.get(env_id)  # as many updates as DTQL's
        return {} if epochs is None else dict(epochs=epochs, eval_every=epochs // 4)
    domain = data.domain(env_id)
    return dict(
        expectile=0.9 if domain in ("antmaze", "ogbench") else 0.7,
        num_candidates=64,
        batch_size=512,
        epochs=3000,
        gamma=data.discount(env_id),
        eval_episodes=100 if domain in ("antmaze", "pen", "kitchen") else 10,
    ) | data.ogbench_defaults(env_id)


def check_args(args: Args) -> None:
    """Raise UserError for settings that cannot work."""
    common.check_args(args)
    common.check_range(
        args,
        expectile="(0, 1)",
        num_candidates="[1, 1e6]",
        learning_rate="(0, inf)",
        weight_decay="[0, inf)",
        dropout="[0, 1)",
        ema="(0, 1]",
        gamma="[0, 1]",
        tau="(0, 1]",
    )


def transform_rewards(task: data.Task, env_id: str) -> np.ndarray:
    """Rewards (N,) to train on: sparse mazes r - 1, locomotion with returns over a range of 1000, others as they are."""
    if task.sparse_goal:
        return task.rewards - 1
    if data.domain(env_id) == "locomotion" and len(task.rewards):
        return task.rewards * np.float32(1000 / data.return_range(task))
    return task.rewards


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
    """Actions (..., A) from Gaussian z (..., STEPS A), with the noise that `predict(x, i)` sees in x_i.

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


# ---- networks, each of one model -------------------------------------------------------------------------------------

HIDDEN, BLOCKS = 256, 3


def xavier(net: nn.Module) -> nn.Module:
    """All linear layers with Xavier-uniform weights and zero biases."""
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return net


class Critic(nn.Module):
    """Q(s, a): obs (B, S), actions (B, A) -> (B,)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = xavier(
            nn.Sequential(
                nn.Linear(obs_dim + action_dim, HIDDEN), nn.ReLU(),
                nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
                nn.Linear(HIDDEN, 1),
            )
        )  # fmt: skip

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return self.net(torch.cat((obs, actions), -1)).squeeze(-1)


class Value(nn.Module):
    """V(s), of the observation after LayerNorm: obs (B, S) -> (B,)."""

    def __init__(self, obs_dim: int):
        super().__init__()
        self.net = xavier(
            nn.Sequential(
                nn.LayerNorm(obs_dim, eps=1e-6),
                nn.Linear(obs_dim, HIDDEN), nn.ReLU(),
                nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
                nn.Linear(HIDDEN, 1),
            )
        )  # fmt: skip

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs).squeeze(-1)


class Block(nn.Module):
    """x + MLP(LayerNorm(dropout(x))): (B, 256) -> (B, 256)."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN, eps=1e-6)
        self.wide, self.narrow = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)
        for layer in (self.wide, self.narrow):  # LeCun normal: a normal of this std before it is cut at two of its own
            nn.init.trunc_normal_(layer.weight, std=(std := layer.in_features**-0.5 / 0.87962566), a=-2 * std, b=2 * std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = self.norm(x if mask is None else x * mask)
        return x + self.narrow(nn.functional.silu(self.wide(hidden)))


class Denoiser(nn.Module):
    """The noise in x_i: noisy actions (B, A), step (B, 1), obs (B, S) -> (B, A)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.frequencies = nn.Parameter(0.2 * torch.randn(64))
        self.time = xavier(nn.Sequential(nn.Linear(128, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN)))
        self.first = xavier(nn.Linear(action_dim + obs_dim + HIDDEN, HIDDEN))
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.last = xavier(nn.Linear(HIDDEN, action_dim))

    def forward(self, noisy_actions: Tensor, step: Tensor, obs: Tensor, masks: Tensor | None = None) -> Tensor:
        """`masks` (3, B, 256): dropout before each block, 0 or 1 / (1 - share); None where there is none."""
        angles = 2 * math.pi * step * self.frequencies
        x = self.first(torch.cat((noisy_actions, obs, self.time(torch.cat((angles.cos(), angles.sin()), -1))), -1))
        for i, block in enumerate(self.blocks):
            x = block(x, None if masks is None else masks[i])
        return self.last(nn.functional.silu(x))


# ---- losses of one model ---------------------------------------------------------------------------------------------


def denoising_loss(denoise: Any, actions: Tensor, obs: Tensor, step: Tensor, noise: Tensor, *masks: Tensor) -> Tensor:
    """Mean over the batch of the squared error of the predicted noise, summed over dimensions."""
    return (denoise(add_noise(actions, step, noise), step.to(actions), obs, *masks) - noise).square().sum(-1).mean()


def expectile_loss(u: Tensor, expectile: float | Tensor) -> Tensor:
    """Mean of |expectile - 1(u < 0)| u^2."""
    return ((expectile - (u < 0).float()).abs() * u**2).mean()


def q_target(rewards: Tensor, terminals: Tensor, next_v: Tensor, gamma: float) -> Tensor:
    """r + gamma V(s'), without V(s') where the episode ended."""
    return rewards + gamma * (1 - terminals) * next_v


# ---- the agent ---------------------------------------------------------------------------------------------------------


class IDQL:
    """Implicit Diffusion Q-Learning, for K models at once. A loss is that of one model, whose parameters by network are `p`."""

    def __init__(self, args: Args, task: data.Task, device: torch.device):
        """The models on `device`, with the data beside them."""
        self.args, self.device = args, device
        actions = task.actions.clip(-1 + 1e-5, 1 - 1e-5)
        rewards = transform_rewards(task, args.env_id)
        self.data = stacked.Transitions(task.obs, actions, rewards, task.terminals, task.next_obs, device)
        self.action_dim = task.actions.shape[1]
        dims = task.obs.shape[1], self.action_dim
        self.critic = Net(lambda: Critic(*dims), device, copies=2)
        self.value = Net(lambda: Value(dims[0]), device)
        self.denoiser = Net(lambda: Denoiser(*dims), device)

        nets = {"critic": self.critic, "value": self.value, "denoiser": self.denoiser}
        metrics = ["critic", "value", "denoiser", "q"]
        self.models = stacked.Learner(nets, args.model_seeds, metrics, device, args.compile, args.model_settings)
        self.models.add_target("target_critic", "critic")
        self.models.add_target("ema_denoiser", "denoiser")
        self.models.optimize(self.denoiser_loss, "denoiser", lr=args.learning_rate, weight_decay=args.weight_decay)
        self.models.optimize(self.value_loss, "value", lr=args.learning_rate)
        self.models.optimize(self.critic_loss, "critic", lr=args.learning_rate)
        self.train_step = self.models.buffers["train_step"] = torch.zeros((), device=device)
        self.best_of = stacked.BestOf(
            self.sample,
            self.target_q if args.num_candidates > 1 else None,
            ("ema_denoiser", "target_critic"),
            args.num_candidates,
            task.action_low,
            task.action_high,
            device,
            args.compile,
            draws=STEPS,
            greedy=True,
        )

    def denoiser_loss(
        self, p: dict[str, Params], batch: Batch, step: Tensor, noise: Tensor, *masks: Tensor
    ) -> tuple[Tensor, Params]:
        """The diffusion policy clones the data."""
        denoise = functools.partial(self.denoiser, p["denoiser"])
        loss = denoising_loss(denoise, batch.actions, batch.obs, step, noise, *masks)
        return loss, {"denoiser": loss}

    def value_loss(self, p: dict[str, Params], batch: Batch) -> tuple[Tensor, Params]:
        """Expectile regression of V on the smaller target Q."""
        q = self.critic(p["target_critic"], batch.obs, batch.actions).amin(0)
        loss = expectile_loss(q - self.value(p["value"], batch.obs), p["settings"]["expectile"])
        return loss, {"value": loss}

    def critic_loss(self, p: dict[str, Params], batch: Batch) -> tuple[Tensor, Params]:
        """Both Qs on r + gamma V(s'), mean over them too; V is fixed."""
        q = self.critic(p["critic"], batch.obs, batch.actions)
        target = q_target(batch.rewards, batch.terminals, self.value(p["value"], batch.next_obs), self.args.gamma)
        loss = (target - q).square().mean()
        return loss, {"critic": loss, "q": q.mean()}

    def update(self) -> None:
        """One update: diffusion policy and its average, V, Q, targets, on one minibatch. Tensors only, of static shapes."""
        args, models, shape = self.args, self.models, (self.models.num_models, self.args.batch_size)
        batch, masks = self.data.sample(*shape), ()
        step = torch.randint(STEPS, (*shape, 1), device=self.device)
        noise = torch.randn(*shape, self.action_dim, device=self.device)
        if args.dropout:
            keep = torch.rand(models.num_models, BLOCKS, args.batch_size, HIDDEN, device=self.device) >= args.dropout
            masks = (keep / (1 - args.dropout),)
        decay = (1 + torch.cos(math.pi * self.train_step / args.total_steps)) / 2

        models.step(self.denoiser_loss, batch, step, noise, *masks, decay=decay)
        models.average("ema_denoiser", "denoiser", args.ema)
        models.step(self.value_loss, batch)
        models.step(self.critic_loss, batch)
        models.average("target_critic", "critic", args.tau)
        self.train_step += 1

    # The choice of an action

    def sample(self, p: dict[str, Params], obs: Tensor, z: Tensor) -> Tensor:
        """Actions (..., A) of the deployed diffusion policy in observations (..., S), from noise z (..., 5 A)."""
        obs = obs.expand(*z.shape[:-1], -1)
        return sample_chain(lambda x, i: self.denoiser(p["ema_denoiser"], x, torch.full_like(x[..., :1], i), obs), z)

    def target_q(self, p: dict[str, Params], obs: Tensor, actions: Tensor, copy: int) -> Tensor:
        """One of the target Qs (...,) of actions (..., A) in states (..., S)."""
        return self.critic(p["target_critic"], obs, actions, copy=copy)


def load_policy(checkpoint: str, index: int = 0, device: str = "cpu", seed: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """The deployed policy of model `index` in a checkpoint.

    Returns a callable from one observation (S,) or a batch (B, S) to actions (A,) or (B, A) in the environment's own
    units. Raises UserError if the checkpoint cannot be read or has no such model.
    """
    args, spaces, learner = common.open_policy(checkpoint, __file__, Args, index, device)
    agent = IDQL(args, data.Task.without_data(**spaces), torch.device(device))
    agent.models.load_state_dict(learner)
    return agent.best_of.of_one(agent.models.params, index, spaces["obs_dim"], seed, args.about(index))


def evaluate(agent: IDQL, task: data.Task, envs: common.LockstepEnvs, epoch: int) -> common.Evaluation:
    """Episodes of all models in lock-step."""
    act = lambda obs, generator: agent.best_of(agent.models.params, obs, generator)
    return common.evaluate(task, envs, act, agent.args, epoch, agent.device)


def main(args: Args) -> dict[str, Any]:
    """Train and evaluate. Returns the run's folder and the rows of its eval.csv; raises UserError for bad input."""
    check_args(args)
    device = common.find_device(args)
    task = data.task_of(args)
    envs = common.make_lockstep_envs(task, args)
    common.seed_everything(args.seed, args.torch_deterministic)
    agent = IDQL(args, task, device)
    prepare = functools.cache(lambda: agent.models.prepare(agent.update, args.cudagraphs and args.cuda))

    with contextlib.closing(envs), common.Run(__file__, args, task, agent.models, device) as run:
        while True:
            if run.evaluation_due():
                run.add_evaluation(evaluate(agent, task, envs, run.epoch))
            if run.step == args.total_steps:
                break
            update = prepare()
            for _ in range(run.until_log()):
                update()
                run.advance()
            run.log()
        run.save()
    return run.summary()


if __name__ == "__main__":
    common.run(main, lambda: common.parse_args(Args, task_defaults))
