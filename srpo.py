"""Score Regularized Policy Optimization (SRPO): a deterministic policy climbs Q and the score of a diffusion model of the data.

Chen et al., 2024. Three phases: a diffusion model clones the data; IQL learns Q; a one-step policy follows the gradient of Q and,
weighted by noise level, the diffusion model's score at its own action, for which nothing is sampled and nothing differentiated
through the diffusion model.

It differs from `idql.py` in these points:

1. A deterministic one-step policy is trained and deployed: one action, no candidates. (`kl_distill.py` has the same idea with a
   generator, whose score a second diffusion model must learn.) It climbs the mean of the target Qs.
2. Diffusion model, Q and policy learn one after the other; V learns after Q; the diffusion model has no average.
3. Noise is a continuous variance-preserving process, not a chain of 5 steps, and nothing is sampled from it.
4. The diffusion model has Mish and fixed frequencies; the Qs and V have PyTorch's initial weights, V no LayerNorm.

Shapes, for one model: obs (B, S), actions (B, A) in [-1, 1], time (B, 1), noise (B, A), masks (3, B, 256).
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
from stacked import Batch, Mish, Net, Params


@dataclass
class Args(common.Args):
    """Score Regularized Policy Optimization (SRPO). The defaults shown are those of the given task."""

    sweep = ("beta", "expectile")

    # Algorithm specific arguments
    beta: float | tuple[float, ...] = 0.05
    """weight of Q in the policy's loss: large improves, 0 clones"""
    expectile: float | tuple[float, ...] = 0.9
    """of the value loss"""
    normalize_gradient: bool = True
    """scale Q's gradient at each action to one per dimension"""
    baseline: bool = False
    """subtract the noise from the predicted noise: less variance, the same expectation; the authors' code does not"""
    policy_layers: int = 2
    """hidden layers of the policy"""
    learning_rate: float = 3e-4
    """of all networks; the policy's falls to 0 along a cosine"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """step of the target Qs towards the online Qs"""
    diffusion_epochs: int = 6
    """epochs that train only the diffusion model"""
    diffusion_batch_size: int = 64
    """transitions per update and model there"""
    critic_epochs: int = 8
    """epochs that then train only Q and V"""
    batch_size: int = 64
    """transitions per update and model"""
    epochs: int = 4
    """training epochs of the policy"""

    @property
    def pretrain_steps(self) -> int:
        """Updates of the first two phases."""
        return (self.diffusion_epochs + self.critic_epochs) * self.steps_per_epoch


# beta: the authors' (for AntMaze v2, which the DTQL paper took for v0 too); there are none for pen and kitchen
BETA = {
    "halfcheetah-medium": 0.2,
    "halfcheetah-medium-replay": 0.2,
    "halfcheetah-medium-expert": 0.01,
    "hopper-medium": 0.05,
    "hopper-medium-replay": 0.2,
    "hopper-medium-expert": 0.01,
    "walker2d-medium": 0.05,
    "walker2d-medium-replay": 0.5,
    "walker2d-medium-expert": 0.1,
    "antmaze-umaze": 0.02,
    "antmaze-umaze-diverse": 0.04,
    "antmaze-medium-play": 0.08,
    "antmaze-medium-diverse": 0.05,
    "antmaze-large-play": 0.06,
    "antmaze-large-diverse": 0.05,
}


def task_defaults(env_id: str) -> dict[str, Any]:
    """The arguments in which a task's defaults differ from those of `Args`, which are the demo's."""
    if env_id in data.POINTMAZES:
        epochs = {"dtql/pointmaze-medium-v0": 8, "dtql/pointmaze-large-v0": 14}.get(env_id)
        return {} if epochs is None else dict(diffusion_epochs=6, critic_epochs=epochs, epochs=6, eval_every=2)
    domain, name = data.domain(env_id), data.d4rl_id(env_id) or ""
    return dict(
        beta=BETA.get(name.rpartition("-")[0], 0.05),
        expectile=0.9 if domain in ("antmaze", "ogbench") else 0.7,
        normalize_gradient=domain in ("antmaze", "ogbench"),
        policy_layers=4 if domain == "antmaze" else 2,
        diffusion_epochs=2000,
        diffusion_batch_size=2048,
        critic_epochs=1500,
        batch_size=256,
        epochs=1000,
        gamma=data.discount(env_id),
        eval_episodes=100 if domain in ("antmaze", "pen", "kitchen") else 10,
    ) | data.ogbench_defaults(env_id)


def check_args(args: Args) -> None:
    """Raise UserError for settings that cannot work."""
    common.check_args(args)
    common.check_range(
        args,
        beta="[0, inf)",
        expectile="(0, 1)",
        policy_layers="[1, 100]",
        learning_rate="(0, inf)",
        gamma="[0, 1]",
        tau="(0, 1]",
        diffusion_epochs="[0, 1e9]",
        diffusion_batch_size="[1, 1e6]",
        critic_epochs="[0, 1e9]",
    )


def transform_rewards(task: data.Task, env_id: str) -> np.ndarray:
    """Rewards (N,) to train on: sparse mazes r - 1, OGBench as they are, all others with returns over a range of 1000."""
    if task.sparse_goal:
        return task.rewards - 1
    if len(task.rewards) and not data.is_ogbench(env_id):
        return task.rewards * np.float32(1000 / data.return_range(task))
    return task.rewards


# ---- noise: a_t = alpha(t) a + sigma(t) noise, t in (0, 1) -----------------------------------------------------------

alpha = lambda time: torch.exp(-0.25 * time**2 * (20 - 0.1) - 0.5 * time * 0.1)
sigma = lambda time: torch.sqrt(1 - alpha(time) ** 2)


# ---- networks, each of one model -------------------------------------------------------------------------------------

HIDDEN, BLOCKS, DROPOUT = 256, 3, 0.1


def mlp(inputs: int, outputs: int, layers: int = 2) -> nn.Sequential:
    """Hidden layers of 256 with ReLU."""
    hidden = []
    for layer in range(layers):
        hidden += [nn.Linear(HIDDEN if layer else inputs, HIDDEN), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(HIDDEN, outputs))


class Critic(nn.Module):
    """Q(s, a): obs (B, S), actions (B, A) -> (B,)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim + action_dim, 1)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return self.net(torch.cat((obs, actions), -1)).squeeze(-1)


class Value(nn.Module):
    """V(s): obs (B, S) -> (B,)."""

    def __init__(self, obs_dim: int):
        super().__init__()
        self.net = mlp(obs_dim, 1)

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs).squeeze(-1)


class Actor(nn.Module):
    """a = tanh(MLP(s)): obs (B, S) -> (B, A)."""

    def __init__(self, obs_dim: int, action_dim: int, layers: int):
        super().__init__()
        self.net = mlp(obs_dim, action_dim, layers)

    def forward(self, obs: Tensor) -> Tensor:
        return torch.tanh(self.net(obs))


class Block(nn.Module):
    """x + MLP(LayerNorm(dropout(x))): (B, 256) -> (B, 256)."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.net = nn.Sequential(nn.Linear(HIDDEN, 4 * HIDDEN), Mish(), nn.Linear(4 * HIDDEN, HIDDEN))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + self.net(self.norm(x if mask is None else x * mask))


class Denoiser(nn.Module):
    """The noise in a_t: noisy actions (B, A), time (B, 1), obs (B, S) -> (B, A)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        frequencies = 30 * torch.randn(32, generator=torch.Generator().manual_seed(0))  # not trained, alike in all models
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.time = nn.Sequential(nn.Linear(64, 128), Mish(), nn.Linear(128, 128))
        self.first = nn.Linear(action_dim + obs_dim + 128, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.last = nn.Sequential(Mish(), nn.Linear(HIDDEN, action_dim))

    def forward(self, noisy_actions: Tensor, time: Tensor, obs: Tensor, masks: Tensor | None = None) -> Tensor:
        """`masks` (3, B, 256): dropout before each block, 0 or 1 / (1 - share); None where there is none."""
        angles = 2 * math.pi * time * self.frequencies
        x = self.first(torch.cat((noisy_actions, obs, self.time(torch.cat((angles.sin(), angles.cos()), -1))), -1))
        for i, block in enumerate(self.blocks):
            x = block(x, None if masks is None else masks[i])
        return self.last(x)


# ---- losses of one model ---------------------------------------------------------------------------------------------


def denoising_loss(denoise: Any, actions: Tensor, obs: Tensor, time: Tensor, noise: Tensor, *masks: Tensor) -> Tensor:
    """Mean over the batch of the squared error of the predicted noise, summed over dimensions."""
    return (denoise(alpha(time) * actions + sigma(time) * noise, time, obs, *masks) - noise).square().sum(-1).mean()


def expectile_loss(u: Tensor, expectile: float | Tensor) -> Tensor:
    """Mean of |expectile - 1(u < 0)| u^2."""
    return ((expectile - (u < 0).float()).abs() * u**2).mean()


def q_target(rewards: Tensor, terminals: Tensor, next_v: Tensor, gamma: float) -> Tensor:
    """r + gamma V(s'), without V(s') where the episode ended."""
    return rewards + gamma * (1 - terminals) * next_v


def surrogate(actions: Tensor, score: Tensor, q_gradient: Tensor, time: Tensor, beta: float | Tensor) -> Tensor:
    """What has the gradient sigma^2 `score` - beta `q_gradient` at each action, mean over the batch; all (B, A), time (B, 1)."""
    direction = sigma(time) ** 2 * score - beta * q_gradient
    return (direction.detach() * actions).sum(-1).mean()


# ---- the agent ---------------------------------------------------------------------------------------------------------


class SRPO:
    """SRPO, for K models at once. A loss is that of one model, whose parameters by network are `p`."""

    def __init__(self, args: Args, task: data.Task, device: torch.device):
        """The models on `device`, with the data beside them."""
        self.args, self.device = args, device
        rewards = transform_rewards(task, args.env_id)
        self.data = stacked.Transitions(task.obs, task.actions, rewards, task.terminals, task.next_obs, device)
        self.action_dim = task.actions.shape[1]
        dims = task.obs.shape[1], self.action_dim
        self.critic = Net(lambda: Critic(*dims), device, copies=2)
        self.value = Net(lambda: Value(dims[0]), device)
        self.denoiser = Net(lambda: Denoiser(*dims), device)
        self.actor = Net(lambda: Actor(*dims, args.policy_layers), device)

        nets = {"critic": self.critic, "value": self.value, "denoiser": self.denoiser, "actor": self.actor}
        metrics = ["denoiser", "critic", "value", "q", "actor", "actor_q"]
        self.models = stacked.Learner(nets, args.model_seeds, metrics, device, args.compile, args.model_settings)
        self.models.add_target("target_critic", "critic")
        self.models.optimize(self.denoiser_loss, "denoiser", lr=args.learning_rate, weight_decay=0.01)
        self.models.optimize(self.critic_loss, "critic", lr=args.learning_rate)
        self.models.optimize(self.value_loss, "value", lr=args.learning_rate)
        self.models.optimize(self.actor_loss, "actor", lr=args.learning_rate)
        self.train_step = self.models.buffers["train_step"] = torch.zeros((), device=device)
        self.best_of = stacked.BestOf(self.sample, None, ("actor",), 1, task.action_low, task.action_high, device, args.compile)
        # The phases: what an update does, and for how many epochs
        self.phases = [
            (self.update_denoiser, args.diffusion_epochs),
            (self.update_critic, args.critic_epochs),
            (self.update_actor, args.epochs),
        ]

    def phase(self, epoch: int) -> int:
        """The number of the phase that an epoch belongs to, counted from the start of the run."""
        ends = np.cumsum([epochs for _, epochs in self.phases])
        return int((epoch >= ends).sum())

    def denoiser_loss(
        self, p: dict[str, Params], batch: Batch, time: Tensor, noise: Tensor, masks: Tensor
    ) -> tuple[Tensor, Params]:
        """The diffusion model clones the data."""
        denoise = functools.partial(self.denoiser, p["denoiser"])
        loss = denoising_loss(denoise, batch.actions, batch.obs, time, noise, masks)
        return loss, {"denoiser": loss}

    def critic_loss(self, p: dict[str, Params], batch: Batch) -> tuple[Tensor, Params]:
        """Both Qs on r + gamma V(s'), mean over them too; V is fixed."""
        q = self.critic(p["critic"], batch.obs, batch.actions)
        target = q_target(batch.rewards, batch.terminals, self.value(p["value"], batch.next_obs), self.args.gamma)
        loss = (target - q).square().mean()
        return loss, {"critic": loss, "q": q.mean()}

    def value_loss(self, p: dict[str, Params], batch: Batch) -> tuple[Tensor, Params]:
        """Expectile regression of V on the smaller target Q."""
        q = self.critic(p["target_critic"], batch.obs, batch.actions).amin(0)
        loss = expectile_loss(q - self.value(p["value"], batch.obs), p["settings"]["expectile"])
        return loss, {"value": loss}

    def actor_loss(self, p: dict[str, Params], batch: Batch, time: Tensor, noise: Tensor) -> tuple[Tensor, Params]:
        """Up the mean of the target Qs and the diffusion model's score; both are fixed."""
        actions = self.actor(p["actor"], batch.obs)
        fixed = actions.detach()
        with torch.no_grad():
            score = self.denoiser(p["denoiser"], alpha(time) * fixed + sigma(time) * noise, time, batch.obs)
            score = score - noise if self.args.baseline else score
        mean_q = lambda actions: self.critic(p["target_critic"], batch.obs, actions).mean(0)
        gradient = torch.func.grad(lambda actions: mean_q(actions).sum())(fixed)
        if self.args.normalize_gradient:
            gradient = gradient / (gradient.square().mean(-1, keepdim=True).sqrt() + 1e-8)
        loss = surrogate(actions, score, gradient, time, p["settings"]["beta"])
        return loss, {"actor": loss, "actor_q": mean_q(fixed).mean()}

    # The updates of the three phases. Tensors only, of static shapes

    def noise(self, batch_size: int, low: float, high: float) -> tuple[Tensor, Tensor]:
        """Uniform times in [low, high) and Gaussian noise, (K, B, 1) and (K, B, A)."""
        shape = self.models.num_models, batch_size
        time = low + (high - low) * torch.rand(*shape, 1, device=self.device)
        return time, torch.randn(*shape, self.action_dim, device=self.device)

    def update_denoiser(self) -> None:
        """The diffusion model."""
        batch_size = self.args.diffusion_batch_size
        batch, inputs = self.data.sample(self.models.num_models, batch_size), self.noise(batch_size, 0.001, 1.0)
        keep = torch.rand(self.models.num_models, BLOCKS, batch_size, HIDDEN, device=self.device) >= DROPOUT
        self.models.step(self.denoiser_loss, batch, *inputs, keep / (1 - DROPOUT))

    def update_critic(self) -> None:
        """Q, with V as it was; V; targets."""
        batch = self.data.sample(self.models.num_models, self.args.batch_size)
        self.models.step(self.critic_loss, batch)
        self.models.step(self.value_loss, batch)
        self.models.average("target_critic", "critic", self.args.tau)

    def update_actor(self) -> None:
        """The policy."""
        args = self.args
        batch, inputs = self.data.sample(self.models.num_models, args.batch_size), self.noise(args.batch_size, 0.02, 0.98)
        decay = (1 + torch.cos(math.pi * self.train_step / (args.epochs * args.steps_per_epoch))) / 2
        self.models.step(self.actor_loss, batch, *inputs, decay=decay)
        self.train_step += 1

    # The choice of an action

    def sample(self, p: dict[str, Params], obs: Tensor, z: Tensor) -> Tensor:
        """The policy's action (..., A) in observations (..., S); the noise is not used."""
        return self.actor(p["actor"], obs)


def load_policy(checkpoint: str, index: int = 0, device: str = "cpu", seed: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """The deployed policy of model `index` in a checkpoint.

    Returns a callable from one observation (S,) or a batch (B, S) to actions (A,) or (B, A) in the environment's own
    units. Raises UserError if the checkpoint cannot be read or has no such model.
    """
    args, spaces, learner = common.open_policy(checkpoint, __file__, Args, index, device)
    agent = SRPO(args, data.Task.without_data(**spaces), torch.device(device))
    agent.models.load_state_dict(learner)
    return agent.best_of.of_one(agent.models.params, index, spaces["obs_dim"], seed, args.about(index))


def evaluate(agent: SRPO, task: data.Task, envs: common.LockstepEnvs, epoch: int) -> common.Evaluation:
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
    agent = SRPO(args, task, device)
    prepare = functools.cache(lambda phase: agent.models.prepare(agent.phases[phase][0], args.cudagraphs and args.cuda))

    with contextlib.closing(envs), common.Run(__file__, args, task, agent.models, device) as run:
        while True:
            if run.evaluation_due():
                run.add_evaluation(evaluate(agent, task, envs, run.epoch))
            if run.step == args.total_steps:
                break
            update = prepare(agent.phase(run.step // args.steps_per_epoch))
            for _ in range(run.until_log()):
                update()
                run.advance()
            run.log()
        run.save()
    return run.summary()


if __name__ == "__main__":
    common.run(main, lambda: common.parse_args(Args, task_defaults))
