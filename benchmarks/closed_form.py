"""Compares samplers and schedules of the joint loop where the composed distribution is known exactly.

    python benchmarks/closed_form.py [--out benchmarks/results/closed_form.json]

Columns have the prior N(0, A), rows N(0, B), both from smooth kernels; with the weight w of the frame model
in every view, the composed distribution is N(0, A^(1-w) ⊗ B^w).  The sampler is linear here, so it runs on
a basis of all noise it draws, and its covariance comes out without sampling error.  For each setting the
table gives the evaluations of both models together, the largest error of the covariance and the sampled
variance, both relative to the closed form with the weight of the last step.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from pathlib import Path

import torch
from torch import Tensor

from d2.denoiser import AnalyticDenoiser, Estimate, Lines
from d2.fileio import write_json
from d2.models.conditioner import Conditioning
from d2.sampler import Plan, SamplerConfig, State, plan, sample_matrix

V, F = 5, 4
FRAME_WEIGHT = 0.4  # of a constant schedule, the reference's where the view is the front
SETTINGS = [
    {"method": method, "vrs": "off", "steps": steps}
    for method, counts in (("euler", (25, 50, 100, 200)), ("heun", (25, 50)), ("dpmpp2m", (25, 50, 100)))
    for steps in counts
]
SETTINGS += [{"method": m, "vrs": v, "steps": 50} for m in ("euler", "heun") for v in ("reference", "exact")]
SETTINGS += [{"method": "heun", "vrs": "off", "steps": 50, "composition": c} for c in ("linear", "cosine", "logistic")]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Samplers and schedules against the exact composed distribution.")
    parser.add_argument("--out", type=Path, help="also writes the table as JSON")
    args = parser.parse_args(argv)
    rows = [measure(setting) for setting in SETTINGS]
    for row in rows:
        print(json.dumps(row))
    if args.out:
        machine = {"machine": platform.machine(), "torch": torch.__version__}
        write_json(args.out, machine | {"V": V, "F": F, "rows": rows})
    return 0


def measure(setting: dict) -> dict:
    """The covariance of one setting's result against the closed form."""
    config = SamplerConfig(scale=1 - FRAME_WEIGHT, **setting)
    azimuth = torch.linspace(0, 2 * math.pi, V + 1)[1:]
    ones = {"share": torch.ones(V), "view_guidance": torch.ones(V), "frame_guidance": torch.ones(F)}
    worked_out = plan(config, azimuth, F)._replace(**ones)
    covariance, evaluations = exact_covariance(worked_out)
    w = worked_out.weights(config.steps - 1).frame[0].item()
    expected = torch.kron(power(kernel(V, 1.5), 1 - w), power(0.5 * kernel(F, 1.0), w))
    error = (covariance - expected).abs().max() / expected.abs().max()
    variance = covariance.diag().sum() / expected.diag().sum()
    measured = {
        "evaluations": evaluations,
        "error": round(error.item(), 4),
        "variance": round(variance.item(), 4),
    }
    return setting | measured


def exact_covariance(plan: Plan) -> tuple[Tensor, int]:  # [V F, V F]
    """The covariance of the result, and how many evaluations it took."""
    draws = 1 + (plan.config.vrs_steps if plan.config.vrs != "off" else 0)
    width = V * F * draws
    noise = [n.reshape(V, F, 1, 1, width) for n in torch.eye(width).view(draws, V * F, width)]
    zero = torch.zeros(1, 1, 1, 1, width)
    views = Counted(Lines(AnalyticDenoiser(kernel(V, 1.5)), [still(zero, V)] * F, "columns"))
    frames = Counted(Lines(AnalyticDenoiser(0.5 * kernel(F, 1.0)), [still(zero, F)] * V, "rows"))
    start = plan.start(noise[-1], zero[0])
    result = sample_matrix(State(start.x), plan, views, frames, noise.__getitem__).reshape(V * F, width)
    return result @ result.T, views.calls + frames.calls


class Counted:
    """A model that counts how often it is evaluated."""

    def __init__(self, model: Lines) -> None:
        self.model, self.calls = model, 0

    def __call__(self, x: Tensor, sigma: float) -> Estimate:
        self.calls += 1
        return self.model(x, sigma)


def still(zero: Tensor, T: int) -> Conditioning:
    return Conditioning(torch.zeros(1, T, 1), zero.expand(1, T, -1, -1, -1), torch.zeros(1, T, 1))


def kernel(n: int, length: float) -> Tensor:  # [n, n]
    """A smooth covariance of n points with variances of 1.05."""
    t = torch.arange(n)
    return torch.exp(-((t[:, None] - t) ** 2) / (2 * length**2)) + 0.05 * torch.eye(n)


def power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values**exponent @ vectors.T


if __name__ == "__main__":
    sys.exit(main())
