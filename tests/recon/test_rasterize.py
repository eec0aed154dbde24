"""The CPU kernels against the dense float64 twin and finite differences; poison values; shapes of gsplat."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scenes import camera, gaussians, motion

from d2.errors import NumericalError, SetupError
from d2.recon.raster import Motion, choose_backend, rasterize
from d2.recon.raster import project as kernels
from d2.recon.raster.tiles import _exp_negative

W, H = 40, 44
INPUTS = (
    "means",
    "quats",
    "scales",
    "opacities",
    "colors",
    "velocities",
    "times",
    "durations",
    "viewmats",
    "backgrounds",
)


def draw(backend: str, dtype: torch.dtype, *, mode="RGB+ED", kind="classic", sh_degree=None, count=60, size=(W, H)):
    """One backward pass: (image, alpha, {name: gradient}) with the same random weights for every backend."""
    leaves = {k: v.clone().to(dtype).requires_grad_() for k, v in gaussians(count).items()}
    if sh_degree is not None:
        g = torch.Generator().manual_seed(7)
        leaves["colors"] = (0.4 * torch.randn(count, (sh_degree + 1) ** 2, 3, generator=g, dtype=torch.float64)).to(
            dtype
        )
        leaves["colors"].requires_grad_()
    move = motion(count, [0.3, 0.8])
    moving = {k: getattr(move, k).clone().to(dtype).requires_grad_() for k in ("velocities", "times", "durations")}
    viewmat, K = camera(*size)
    views = {
        "viewmats": torch.stack([viewmat, torch.eye(4).double() + 0]).to(dtype),
        "backgrounds": torch.tensor([[0.1, 0.5, 0.9], [1, 0, 0.3]], dtype=dtype),
    }
    views["viewmats"][1, 2, 3] = 2.5
    views = {k: v.clone().requires_grad_() for k, v in views.items()}
    image, alpha, meta = rasterize(
        **leaves, **views, Ks=torch.stack([K, K]).to(dtype), width=size[0], height=size[1], sh_degree=sh_degree,
        render_mode=mode, rasterize_mode=kind, motion=Motion(**moving, t=move.t.to(dtype)), backend=backend,
    )  # fmt: skip
    g = torch.Generator().manual_seed(5)
    weight = torch.rand(image.shape, generator=g, dtype=torch.float64).to(dtype)
    # Expected depth divides by alpha: where there is next to none, rounding is all there is.
    solid = (alpha > 0.02).to(dtype)
    (image * weight * solid).sum().add((alpha * weight[..., :1]).sum()).backward()
    gradients = {k: v.grad for k, v in (leaves | moving | views).items()} | {"means2d": meta["means2d"].grad}
    return image.detach() * solid, alpha.detach(), gradients


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    error = float((actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    assert error < tolerance, f"{what}: relative error {error:.2e}"


@pytest.mark.parametrize(
    ("mode", "kind", "sh_degree", "size"),
    [("RGB+ED", "classic", None, (W, H)), ("RGB", "antialiased", None, (W, H)), ("RGB", "classic", 3, (37, 21))],
)
def test_kernels_equal_the_dense_twin_in_image_alpha_and_every_gradient(mode, kind, sh_degree, size):
    arguments = {"mode": mode, "kind": kind, "sh_degree": sh_degree, "size": size}
    image, alpha, gradients = draw("cpu", torch.float32, **arguments)
    expected_image, expected_alpha, expected = draw("reference", torch.float64, **arguments)
    assert_close(image, expected_image, 1e-4, "image")
    assert_close(alpha, expected_alpha, 1e-4, "alpha")
    for name in (*INPUTS, "means2d"):
        assert gradients[name].abs().max() > 0, name
        assert_close(gradients[name], expected[name], 2e-4, f"gradient of {name}")


@pytest.mark.parametrize(
    "name", ["means", "quats", "scales", "opacities", "velocities", "times", "durations", "viewmats"]
)
def test_gradients_of_the_twin_equal_finite_differences(name):
    move = motion(6, [0.4])
    viewmat, K = camera(20, 18)
    values = gaussians(6, seed=3) | {"velocities": move.velocities, "times": move.times, "durations": move.durations}
    values |= {"viewmats": viewmat[None]}
    weight = torch.rand(1, 18, 20, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def loss(value):
        v = values | {name: value}
        image, alpha, _ = rasterize(
            *(v[k] for k in ("means", "quats", "scales", "opacities", "colors", "viewmats")), K[None], 20, 18,
            motion=Motion(v["velocities"], v["times"], v["durations"], move.t), backend="reference",
        )  # fmt: skip
        return (image * weight).sum() + alpha.mean()

    leaf = values[name].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    direction = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    if name == "viewmats":
        direction[:, 3] = 0
    step = 1e-6
    numeric = float((loss(values[name] + step * direction) - loss(values[name] - step * direction)) / (2 * step))
    assert float((gradient * direction).sum()) == pytest.approx(numeric, rel=2e-3, abs=1e-5)


def test_batched_gaussians_and_cameras_follow_gsplat_shapes():
    sets = [gaussians(20, seed=k, dtype=torch.float32) for k in range(2)]
    batch = {k: torch.stack([s[k] for s in sets]) for k in sets[0]}
    viewmat, K = (x.float() for x in camera(16, 12))
    viewmats, Ks = viewmat.expand(2, 3, 4, 4), K.expand(2, 3, 3, 3)
    image, alpha, meta = rasterize(**batch, viewmats=viewmats, Ks=Ks, width=16, height=12)
    assert image.shape == (2, 3, 12, 16, 3) and alpha.shape == (2, 3, 12, 16, 1)
    assert meta["means2d"].shape == (2, 3, 20, 2) and meta["backend"] == "cpu"
    single, _, _ = rasterize(**sets[1], viewmats=viewmat[None], Ks=K[None], width=16, height=12)
    assert torch.equal(single[0], image[1, 2])


def test_more_than_three_channels_are_drawn_in_groups():
    scene = gaussians(30, dtype=torch.float32)
    scene["colors"] = torch.rand(30, 7, generator=torch.Generator().manual_seed(0))
    viewmat, K = (x.float() for x in camera(W, H))
    image, _, _ = rasterize(**scene, viewmats=viewmat[None], Ks=K[None], width=W, height=H)
    twin, _, _ = rasterize(
        **{k: v.double() for k, v in scene.items()}, viewmats=viewmat[None].double(), Ks=K[None].double(),
        width=W, height=H, backend="reference",
    )  # fmt: skip
    assert image.shape[-1] == 7
    assert_close(image, twin, 1e-4, "image")


def test_the_picture_does_not_depend_on_the_thread_count():
    import numba

    first = draw("cpu", torch.float32)
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
        second = draw("cpu", torch.float32)
    finally:
        numba.set_num_threads(before)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[2][k], second[2][k]) for k in first[2])


def test_binning_gives_every_tile_its_gaussians_front_to_back():
    from d2.recon.raster import tiles

    rng = np.random.default_rng(0)
    x0, y0 = rng.integers(0, 40, 200), rng.integers(0, 30, 200)
    rects = np.stack([x0, x0 + rng.integers(1, 20, 200), y0, y0 + rng.integers(1, 20, 200)], 1).astype(np.int32)
    rects[:, 1], rects[:, 3] = np.minimum(rects[:, 1], 47), np.minimum(rects[:, 3], 37)
    keys = np.arange(200, dtype=np.uint64)
    keys[::7] = kernels.INVISIBLE
    order = rng.permutation(np.nonzero(keys != kernels.INVISIBLE)[0])
    results = [tiles.bin_splats(order, rects, keys, 6, 5, chunks) for chunks in (1, 3)]
    for a, b in zip(*results, strict=True):
        assert np.array_equal(a, b)
    offsets, ids, slots, starts = results[0]
    for t in range(30):
        left, top = 8 * (t % 6), 8 * (t // 6)
        reach = (rects[:, 0] < left + 8) & (rects[:, 1] > left) & (rects[:, 2] < top + 8) & (rects[:, 3] > top)
        assert ids[offsets[t] : offsets[t + 1]].tolist() == [i for i in order if reach[i]]
    assert sorted(slots.tolist()) == list(range(len(ids)))
    assert all(starts[i] <= s < starts[i + 1] for i, s in zip(ids, slots, strict=True))


def test_polynomial_exponential_is_good_to_single_precision():
    s = np.linspace(0, 6, 10001).astype(np.float32)
    ours = np.array([_exp_negative(v) for v in s[::50]])
    assert np.abs(ours / np.exp(-s[::50]) - 1).max() < 4e-6


@pytest.mark.row(54)
def test_nothing_visible_gives_an_empty_picture_and_zero_gradients():
    scene = gaussians(5, dtype=torch.float32)
    scene["means"] = (scene["means"] + torch.tensor([0, 0, -50.0])).requires_grad_()
    viewmat, K = (x.float() for x in camera(16, 16))
    image, alpha, _ = rasterize(**scene, viewmats=viewmat[None], Ks=K[None], width=16, height=16)
    (image.sum() + alpha.sum()).backward()
    assert image.abs().max() == 0 and alpha.abs().max() == 0 and scene["means"].grad.abs().max() == 0


POISON = [0.0, -0.0, 1e-38, 1e-45, 1e30, 3e38, -1e30]


@pytest.mark.row(54)
@pytest.mark.parametrize("name", ["means", "quats", "scales", "opacities", "colors"])
@pytest.mark.parametrize("value", POISON)
def test_extreme_values_leave_a_finite_picture_and_finite_gradients(name, value):
    scene = gaussians(8, dtype=torch.float32)
    scene[name][3] = value
    scene[name].requires_grad_()
    viewmat, K = (x.float() for x in camera(16, 16))
    image, alpha, _ = rasterize(**scene, viewmats=viewmat[None], Ks=K[None], width=16, height=16)
    assert torch.isfinite(image).all() and torch.isfinite(alpha).all()
    alpha.sum().backward()
    if name == "colors":
        assert scene["colors"].grad is None or torch.isfinite(scene["colors"].grad).all()
    else:
        assert torch.isfinite(scene[name].grad).all()


@pytest.mark.row(54)
@pytest.mark.parametrize("name", ["means", "quats", "scales", "opacities", "colors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused_with_name_and_index(name, value):
    scene = gaussians(8, dtype=torch.float32)
    scene[name][3] = value
    viewmat, K = (x.float() for x in camera(16, 16))
    with pytest.raises(NumericalError, match=rf"{name}\[3\] is not finite"):
        rasterize(**scene, viewmats=viewmat[None], Ks=K[None], width=16, height=16)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_duration_that_is_not_positive_is_refused(value):
    scene, move = gaussians(8, dtype=torch.float32), motion(8, [0.5], dtype=torch.float32)
    move.durations[2] = value
    viewmat, K = (x.float() for x in camera(16, 16))
    with pytest.raises(NumericalError, match=r"durations\[2\] is .*, not above 0"):
        rasterize(**scene, viewmats=viewmat[None], Ks=K[None], width=16, height=16, motion=move)


def test_a_camera_that_is_not_finite_is_refused():
    scene = gaussians(8, dtype=torch.float32)
    viewmat, K = (x.float() for x in camera(16, 16))
    viewmat[1, 3] = float("nan")
    with pytest.raises(NumericalError, match="the camera"):
        rasterize(**scene, viewmats=viewmat[None], Ks=K[None], width=16, height=16)


def test_backend_is_named_with_its_reason():
    backend = choose_backend("cpu")
    assert backend.name == "cpu" and "CUDA kernels only" in backend.reason
    with pytest.raises(SetupError, match="no rasterizer for device meta"):
        choose_backend("meta")
