"""The 2-D bandits: data, rewards, losses and what is counted; and each figure, much shortened."""

import csv

import matplotlib.image
import pytest
import torch
from helpers import run_inside

import toy_bandit
from toy_bandit import GRID, PROBLEMS

pytestmark = pytest.mark.slow


def test_data_and_rewards():
    torch.manual_seed(0)
    points = toy_bandit.gaussians(20_000)
    near = torch.cdist(points, GRID)
    assert near.amin(1).mean() == pytest.approx(0.3 * (torch.pi / 2) ** 0.5, rel=0.02)  # Rayleigh
    assert torch.bincount(near.argmin(1)).float().std() < 50
    roll = toy_bandit.swiss_roll(20_000)
    radius = roll.norm(dim=1)
    assert 1.4 * torch.pi < radius.min() < 1.5 * torch.pi and 4.5 * torch.pi < radius.max() < 4.6 * torch.pi
    best = [GRID[problem.reward(GRID) > problem.reward(GRID).max() - 1e-4] for problem in PROBLEMS[:3]]
    assert len(best[0]) == 4 and best[1].tolist() == [[-10, 10]] and best[2].tolist() == [[0, 0]]
    ends = [roll[problem.reward(roll).argmax()].norm() for problem in PROBLEMS[3:]]
    assert ends[0] > 4.45 * torch.pi and ends[1] < 1.55 * torch.pi


def test_what_is_counted():
    torch.manual_seed(0)
    data = toy_bandit.gaussians()
    everywhere = toy_bandit.count(PROBLEMS[0], data, GRID.repeat(40, 1))
    assert (everywhere["on data"], everywhere["modes"], everywhere["corners"]) == (100, 25, 4)
    corner = toy_bandit.count(PROBLEMS[0], data, torch.tensor([[10.0, -10.0]]).repeat(50, 1))
    assert (corner["modes"], corner["corners"], corner["in the best mode"]) == (1, 1, 100)
    between = toy_bandit.count(PROBLEMS[0], data, torch.full((50, 2), 2.5))
    assert (between["on data"], between["modes"]) == (0, 0)
    roll = toy_bandit.swiss_roll()
    assert toy_bandit.count(PROBLEMS[3], roll, roll[:1000])["tenths of the roll"] == 10


def test_kl_gradient_is_the_weighted_difference_of_scores():
    torch.manual_seed(0)
    gaussian = lambda mean, std: lambda noisy, sigma: (std**2 * noisy + sigma**2 * mean) / (std**2 + sigma**2)
    score = lambda mean, std, noisy, sigma: -(noisy - mean) / (std**2 + sigma**2)
    actions, sigma = (3 * torch.randn(200, 2)).requires_grad_(), toy_bandit.sample_sigma(200)
    torch.manual_seed(1)
    toy_bandit.kl_loss(gaussian(1.0, 2.0), gaussian(-1.0, 1.0), actions, sigma).backward()
    torch.manual_seed(1)
    noisy = actions.detach() + sigma * torch.randn(200, 2)
    distance = (actions.detach() - gaussian(1.0, 2.0)(noisy, sigma)).abs().mean(1, keepdim=True)
    weight = sigma**2 / distance.clamp(min=toy_bandit.KL_FLOOR)
    expected = weight * (score(-1.0, 1.0, noisy, sigma) - score(1.0, 2.0, noisy, sigma)) / 400
    torch.testing.assert_close(actions.grad, expected, rtol=1e-3, atol=1e-5)


def test_the_anchor_of_the_flows_own_actions_is_its_loss_on_the_data():
    """Between two Gaussians the best velocity is known; an action off the data costs more, and the policy's own z is used."""
    std, n = 0.5, 20_000
    torch.manual_seed(0)

    def velocity(x, time):  # E[a - noise | x] for a ~ N(3, std^2), noise ~ N(0, FLOW_STD^2)
        start, end = (1 - time) ** 2 * toy_bandit.FLOW_STD**2, time**2 * std**2
        posterior = (end / time - start / (1 - time)) / (start + end)
        return 3 + posterior * (x - 3 * time)

    actions = 3 + std * torch.randn(n, 2)
    on_data = toy_bandit.anchor_loss(velocity, actions)
    time = torch.rand(n, 1)
    start, end = (1 - time) ** 2 * toy_bandit.FLOW_STD**2, time**2 * std**2
    variance = toy_bandit.FLOW_STD**2 + std**2 - (end / time - start / (1 - time)) ** 2 / (start + end)
    assert on_data.item() == pytest.approx(variance.mean().item(), rel=0.05)
    z = torch.randn(n, 2)
    own = toy_bandit.anchor_loss(velocity, 3 + std * z, z)
    assert own < on_data < toy_bandit.anchor_loss(velocity, actions + 4)  # the flow takes z there along its own path


def test_noise_levels_are_the_truncated_logistic():
    torch.manual_seed(0)
    sigma = toy_bandit.sample_sigma(100_000)
    assert 0.002 <= sigma.min() and sigma.max() <= 80.1
    assert sigma.median().item() == pytest.approx(0.5, rel=0.02)
    assert (sigma > 2).float().mean().item() == pytest.approx(1 / (1 + 4**2), abs=0.003)


@pytest.mark.parametrize(("number", "rows"), [(1, 10), (2, 2), (3, 4), (6, 15)])
def test_each_figure_leaves_a_picture_and_a_table(number, rows, tmp_path, monkeypatch, capfd):
    for name in ("ITERATIONS", "PRETRAINING", "DRAWS"):
        monkeypatch.setattr(toy_bandit, name, 3)
    for problem in PROBLEMS:
        monkeypatch.setattr(problem, "kl_iterations", 3)
    result = toy_bandit.main(toy_bandit.Args(figure=number, seed=1, out_dir=str(tmp_path)))
    with open(tmp_path / f"figure{number}_seed1.csv") as file:
        assert len(list(csv.DictReader(file))) == len(result) == rows
    assert matplotlib.image.imread(tmp_path / f"figure{number}_seed1.png").std() > 0.05  # not blank
    assert str(result[0]["problem"]) in capfd.readouterr().out


def test_the_trust_region_settles_on_one_corner(monkeypatch):
    """Column 1 of Figure 6, the paper's point: one of four equal modes, on the data."""
    monkeypatch.setattr(toy_bandit, "PRETRAINING", 1000)
    data, samples = toy_bandit.sampled((0, "trust region", 0))
    numbers = toy_bandit.count(PROBLEMS[0], data, samples)
    assert numbers["on data"] >= 95 and numbers["modes"] == 1 and numbers["in the best mode"] >= 95


@pytest.mark.parametrize(
    "flags", [["--figure", "4"], ["--out-dir", "/proc/none"], ["--seed", "x"], ["--seed", "18446744073709551616"]]
)
def test_bad_input_is_one_line(flags):
    result = run_inside(*flags, script="toy_bandit.py")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and "error:" in result.stderr
