"""Velocity form: equivalence with the two-quaternion form, the slice, saving and loading."""

from __future__ import annotations

import pytest
import torch
from scenes import gaussians_4d

from d2.errors import InputError
from d2.recon.gaussians import (
    Gaussians4D,
    from_two_quaternions,
    left_isoclinic,
    quaternions,
    right_isoclinic,
)
from d2.recon.raster import sh
from d2.recon.raster.reference import rotation_matrices

F64 = torch.float64


def random_two_quaternion(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "means": torch.randn(count, 4, generator=g, dtype=F64),
        "left": torch.randn(count, 4, generator=g, dtype=F64),
        "right": torch.randn(count, 4, generator=g, dtype=F64),
        "scales": torch.exp(0.5 * torch.randn(count, 4, generator=g, dtype=F64)),
        "opacities": 0.1 + 0.8 * torch.rand(count, generator=g, dtype=F64),
    }


def test_velocity_form_is_the_conditional_of_the_two_quaternion_form():
    """Against the density itself: -ln N4(x, t) + ln N4(mean(t), t) must be the 3D Gaussian's form, for any x and t."""
    native = random_two_quaternion(50)
    form = from_two_quaternions(**native, coefficients=torch.zeros(50, 1, 3, dtype=F64))
    R = left_isoclinic(native["left"]) @ right_isoclinic(native["right"])
    S = torch.diag_embed(native["scales"])
    precision = torch.linalg.inv(R @ S @ S @ R.mT)
    g = torch.Generator().manual_seed(9)
    for t in (-0.3, 0.5, 1.4):
        now = form.at(t)
        x = now.means + torch.randn(50, 3, generator=g, dtype=F64)
        d4 = torch.cat([x, torch.full((50, 1), t, dtype=F64)], 1) - native["means"]
        whole = 0.5 * torch.einsum("ni,nij,nj->n", d4, precision, d4)
        M = rotation_matrices(now.quats) * now.scales[:, None]
        d3 = x - now.means
        spatial = 0.5 * torch.einsum("ni,nij,nj->n", d3, torch.linalg.inv(M @ M.mT), d3)
        temporal = -torch.log(now.opacities / native["opacities"])
        torch.testing.assert_close(spatial + temporal, whole, rtol=1e-6, atol=1e-6)


def test_every_velocity_and_duration_is_reachable_and_the_map_is_one_to_one():
    a = from_two_quaternions(**random_two_quaternion(200), coefficients=torch.zeros(200, 1, 3, dtype=F64))
    assert a.velocities.norm(dim=-1).max() > 1 and a.log_durations.std() > 0.1
    negated = random_two_quaternion(200)
    negated["left"], negated["right"] = -negated["left"], -negated["right"]
    b = from_two_quaternions(**negated, coefficients=torch.zeros(200, 1, 3, dtype=F64))
    torch.testing.assert_close(a.velocities, b.velocities)
    torch.testing.assert_close(a.log_scales, b.log_scales)


def test_isoclinic_matrices_are_rotations_that_commute():
    g = torch.Generator().manual_seed(0)
    L = left_isoclinic(torch.randn(20, 4, generator=g, dtype=F64))
    M = right_isoclinic(torch.randn(20, 4, generator=g, dtype=F64))
    torch.testing.assert_close(L @ L.mT, torch.eye(4, dtype=F64).expand(20, 4, 4))
    torch.testing.assert_close(L @ M, M @ L)
    torch.testing.assert_close(torch.linalg.det(L @ M), torch.ones(20, dtype=F64))


def test_quaternions_invert_rotation_matrices_also_at_half_turns():
    q = torch.randn(500, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    q = torch.cat([q, torch.eye(4, dtype=F64), torch.tensor([[1e-9, 1, 1, 0]], dtype=F64)])
    R = rotation_matrices(q)
    torch.testing.assert_close(rotation_matrices(quaternions(R)), R)


def test_slice_agrees_with_finite_differences_in_time():
    g = gaussians_4d(40).map(torch.Tensor.double)
    t, h = 0.37, 1e-6
    before, after = g.at(t - h), g.at(t + h)
    torch.testing.assert_close((after.means - before.means) / (2 * h), g.velocities, rtol=1e-6, atol=1e-8)
    slope = -(t - g.times) / g.log_durations.exp() ** 2
    torch.testing.assert_close(
        (after.opacities - before.opacities) / (2 * h), g.at(t).opacities * slope, rtol=1e-5, atol=1e-9
    )
    assert torch.equal(before.scales, after.scales) and torch.equal(before.quats, after.quats)


@pytest.mark.parametrize(
    "name", ["means", "velocities", "times", "log_durations", "opacity_logits", "log_scales", "quats"]
)
def test_gradients_of_the_slice_agree_with_finite_differences(name):
    g = gaussians_4d(5).map(torch.Tensor.double)
    weights = torch.randn(5, 11, generator=torch.Generator().manual_seed(1), dtype=F64)

    def loss(value):
        now = Gaussians4D(**(g.tensors() | {name: value})).at(0.6)
        return (torch.cat([now.means, now.quats, now.scales, now.opacities[:, None]], 1) * weights).sum()

    assert torch.autograd.gradcheck(loss, g.tensors()[name].clone().requires_grad_())


def test_count_and_order_are_the_same_at_every_time():
    g = gaussians_4d(30)
    assert {len(g.at(t)) for t in (0.0, 0.5, 1.0, 7.0)} == {30}
    assert torch.equal(g.at(0.0).sh, g.at(1.0).sh)


def test_saved_gaussians_come_back_bit_for_bit(tmp_path):
    g = gaussians_4d(25, sh_degree=2)
    g.save(tmp_path / "g.safetensors", {"fps": "12"})
    loaded = Gaussians4D.load(tmp_path / "g.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(g.tensors().values(), loaded.tensors().values(), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"means": torch.zeros(25, 2)}, "means must be float of shape"),
        ({"times": torch.zeros(24)}, "times must be float of shape"),
        ({"sh": torch.zeros(25, 5, 3)}, "sh"),
        ({"quats": torch.full((25, 4), float("nan"))}, "quats holds NaN"),
        ({"means": torch.zeros(0, 3)}, "means has shape"),
        ({"extra": torch.zeros(1)}, "expected tensors"),
        ({"times": torch.zeros(25, dtype=torch.int32)}, "times must be float"),
    ],
)
def test_wrong_tensors_are_refused_by_name(change, message):
    with pytest.raises(InputError, match=message):
        Gaussians4D.checked(gaussians_4d(25).tensors() | change, "file")


def test_spherical_harmonics_are_orthonormal_over_the_sphere():
    n = 20000
    k = torch.arange(n, dtype=F64) + 0.5
    z, angle = 1 - 2 * k / n, torch.pi * (1 + 5**0.5) * k
    r = torch.sqrt(1 - z * z)
    directions = torch.stack([r * angle.cos(), r * angle.sin(), z], -1)
    basis = torch.cat([torch.full((n, 1), sh.C0, dtype=F64), sh._basis(3, directions)], 1)
    gram = 4 * torch.pi * basis.T @ basis / n
    torch.testing.assert_close(gram, torch.eye(16, dtype=F64), rtol=0, atol=2e-3)


def test_degree_zero_shows_its_colour_from_everywhere():
    rgb = torch.rand(10, 3)
    seen = sh.evaluate(0, torch.randn(10, 3), sh.rgb_to_sh0(rgb)[:, None])
    torch.testing.assert_close(seen, rgb)
