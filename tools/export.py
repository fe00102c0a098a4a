"""Write a trained policy as one file that needs neither this project nor, as ONNX, torch: python -m tools.export RUN_DIR

`--format policy` writes a small folder for `load_policy` and `tools.watch` instead: one model, and only what acting needs.

The file maps observations in the environment's units (B, S) to actions in its units (B, A); clamping and scaling are inside.

    --mode mean     no noise: the Gaussian's mean through tanh, or what a generator makes of z = 0
    --mode best     a second input, standard Gaussian noise (B, N, Z), gives N candidates, of which the one with the largest
                    min(Q1, Q2) is taken (argmax; `load_policy` of DTQL draws by softmax)
"""

import dataclasses
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn as nn
import tyro
from torch import Tensor

import common
from common import UserError, check, line
from tools import import_method

ROWS = 256  # observations on which the file is compared with the policy


@dataclass
class Args:
    """Write a trained policy as one file, or as a small run folder."""

    run_dir: tyro.conf.Positional[str]
    """folder of a run"""
    index: int = 0
    """model of the run"""
    format: Literal["onnx", "torch", "policy"] = "onnx"
    """ONNX, torch.export's .pt2, or a folder with config.json and a checkpoint.pt of the policy alone"""
    mode: Literal["mean", "best"] = "mean"
    """without noise, or the best of several candidates by Q"""
    num_candidates: int = 1
    """with --mode best: candidates, of which those of a method that does not choose count as one"""
    checkpoint: str = "checkpoint.pt"
    """file in the run's folder: checkpoint.pt or best.pt"""
    out: str | None = None
    """default: policy.onnx, policy.pt2 or policy/ in the run's folder"""


class Policy(nn.Module):
    """One model's policy as a function of observations and, where candidates are compared, noise."""

    def __init__(self, act: Any, num_candidates: int):
        super().__init__()
        self.agent, self.num_candidates, self.noise_dim = act.agent, num_candidates, act.agent.act.noise_dim
        for name in ("low", "high", "obs_mean", "obs_std"):
            self.register_buffer(name, torch.as_tensor(np.asarray(getattr(act, name), np.float32)))

    def forward(self, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        obs = (obs - self.obs_mean) / self.obs_std
        if noise is None:
            noise = torch.zeros_like(obs[:, :1, None]).expand(-1, 1, self.noise_dim)
        actions = self.agent.sample(obs[None], noise[None]).clamp(-1, 1)[0]  # (B, N, A)
        if self.num_candidates > 1:
            states = obs[:, None].expand(-1, self.num_candidates, -1).flatten(0, 1)
            q = self.agent.act.critic(states[None], actions.flatten(0, 1)[None]).amin(1).view(-1, self.num_candidates)
            chosen = q.argmax(1)[:, None, None].expand(-1, 1, actions.shape[-1])
            actions = actions.gather(1, chosen)
        actions = actions[:, 0].unflatten(-1, (-1, len(self.low)))  # chunks of actions have more than one
        actions = self.low + (actions + 1) / 2 * (self.high - self.low)
        actions = torch.minimum(torch.maximum(actions, self.low), self.high)
        return actions[:, 0] if actions.shape[1] == 1 else actions


def main(args: Args) -> float:
    """Write the file and return its largest error on ROWS observations, as a share of the actions' range. Raises UserError."""
    check(1 <= args.num_candidates <= 1e6, f"--num-candidates must be at least 1, not {args.num_candidates}")
    check(args.mode == "best" or args.num_candidates == 1, "--num-candidates needs --mode best")
    config = common.read_config(args.run_dir)
    module, checkpoint = import_method(config["exp_name"]), Path(args.run_dir) / args.checkpoint
    act = module.load_policy(str(checkpoint), args.index)
    check(args.format != "policy" or args.mode == "mean", "--mode is for --format onnx and torch: leave it out")
    if args.format == "policy":
        return write_policy(act, config, Path(args.out or Path(args.run_dir) / "policy"))
    chooses = act.agent.act.critic is not None
    policy = Policy(act, args.num_candidates if chooses else 1).eval().requires_grad_(False)
    out = Path(args.out or Path(args.run_dir) / f"policy.{'onnx' if args.format == 'onnx' else 'pt2'}")
    common.check_writable(out, "--out")
    about = {
        "task": config["args"]["env_id"], "method": config["exp_name"], "mode": args.mode, "obs_dim": act.obs_dim,
        "action_low": act.low.tolist(), "action_high": act.high.tolist(), **act.about,
    }  # fmt: skip
    torch.manual_seed(0)
    inputs = [torch.randn(ROWS, act.obs_dim)]
    if args.mode == "best":
        inputs.append(torch.randn(ROWS, policy.num_candidates, policy.noise_dim))
    outputs = export(policy, tuple(inputs), out, args.format, about)
    error = float((np.abs(outputs - reference(act, policy, *inputs)) / (act.high - act.low)).max())
    what = f"largest difference to load_policy on {ROWS} observations {error:.1e} of the actions' range"
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB, {what}")
    return error


def write_policy(act: Any, config: dict[str, Any], folder: Path) -> float:
    """Write a run folder of one model that can act but not train. Returns the largest difference of its actions, 0."""
    common.check_writable(folder / "checkpoint.pt", "--out")
    agent, networks = act.agent, dict(act.agent.named_children())
    used = {name for name, network in networks.items() if network is agent.act.critic}  # it is called by way of views
    for name, network in networks.items():
        for module in network.modules():
            module.register_forward_hook(lambda *_, name=name: used.add(name))
    obs = np.random.default_rng(0).standard_normal((ROWS, act.obs_dim), np.float32)
    actions, left_out = act(obs), sorted(networks.keys() - used)
    settings = dataclasses.asdict(agent.args) | {"run_dir": "runs", "resume": None}  # not the paths of this machine
    saved = {
        "format": common.FORMAT, "exp_name": config["exp_name"], "args": settings, "obs_dim": act.obs_dim, "left_out": left_out,
        "agent": {name: value for name, value in agent.state_dict().items() if name.split(".")[0] not in left_out},
        "action_low": torch.as_tensor(act.low), "action_high": torch.as_tensor(act.high),
        "obs_mean": torch.as_tensor(act.obs_mean), "obs_std": torch.as_tensor(act.obs_std),
    }  # fmt: skip
    content = io.BytesIO()
    torch.save(saved, content)
    common.write_atomically(folder / "checkpoint.pt", content.getvalue())
    common.write_atomically(folder / "config.json", json.dumps({**config, "args": settings}, indent=2).encode())
    again = import_method(config["exp_name"]).load_policy(str(folder / "checkpoint.pt"))
    print(f"{folder}: {len(content.getvalue()) / 1e6:.2f} MB, without {', '.join(left_out) or 'nothing'}")
    return float(np.abs(again(obs) - actions).max())


def reference(act: Any, policy: Policy, obs: Tensor, noise: Tensor | None = None) -> np.ndarray:
    """What `load_policy` answers with this noise and the best of the candidates, by its own code."""
    choose, z = act.agent.act, torch.zeros(len(obs), 1, policy.noise_dim) if noise is None else noise
    obs = (obs - policy.obs_mean) / policy.obs_std
    with torch.no_grad():
        if policy.num_candidates > 1:
            actions = choose.choose(obs[None], z[None], torch.zeros(1, *z.shape[:2]))[0]
        else:
            actions = choose._one(obs[None], z[None])[0]
    units = common.evaluation.to_env_units(actions.numpy().reshape(len(obs), -1, len(act.low)), act.low, act.high)
    return units[:, 0] if units.shape[1] == 1 else units


def export(policy: Policy, inputs: tuple[Tensor, ...], out: Path, format: str, about: dict[str, Any]) -> np.ndarray:
    """Write the file, read it again and return its outputs. Raises UserError if a package is missing or the export fails."""
    names, batch = ["observations", "noise"][: len(inputs)], torch.export.Dim("batch", min=1)
    shapes = tuple({0: batch} for _ in inputs)
    temporary = out.with_name(f"{out.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # it may be a link to another file
        if format == "torch":
            program = torch.export.export(policy, inputs, dynamic_shapes=shapes)
            torch.export.save(program, temporary, extra_files={"about.json": json.dumps(about)})
            temporary.replace(out)
            return torch.export.load(out).module()(*inputs).numpy()
        import onnxruntime

        model = torch.onnx.export(
            policy, inputs, dynamo=True, input_names=names, output_names=["actions"], dynamic_shapes=shapes, verbose=False
        )
        model.model.metadata_props.update({name: json.dumps(value) for name, value in about.items()})
        model.save(temporary, external_data=False)
        temporary.replace(out)
        session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
        return session.run(None, {name: value.numpy() for name, value in zip(names, inputs)})[0]
    except ImportError as error:
        raise UserError(f"--format onnx needs packages ({line(error)}): pip install -r requirements-dev.txt") from None
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror or line(error)}): choose another --out") from None
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    common.run(main, lambda: common.cli(Args))
