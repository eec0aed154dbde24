"""`d2 import` of 3DGS PLY sequences: the same Gaussians where they match, else pictures to fit."""

from __future__ import annotations

import numpy as np
import torch
from faults.assertions import expect_fault
from test_importers import SIZE, rig

from d2.recon import dataset, drawing
from d2.recon.exports import export
from d2.recon.formats import ply
from d2.recon.gaussians import Gaussians3D, Gaussians4D
from d2.recon.importers import splats
from d2.recon.importers.bring import bring
from d2.recon.importers.tracks import aligned
from d2.recon.metrics import psnr
from d2.run import Run


def moving(count: int = 300) -> Gaussians4D:
    g = torch.Generator().manual_seed(3)
    return Gaussians4D(
        means=0.4 * torch.randn(count, 3, generator=g),
        velocities=0.3 * torch.randn(count, 3, generator=g),
        times=torch.rand(count, generator=g),
        log_durations=torch.log(0.2 + torch.rand(count, generator=g)),
        quats=torch.randn(count, 4, generator=g),
        log_scales=0.4 * torch.randn(count, 3, generator=g) - 2.5,
        opacity_logits=torch.randn(count, generator=g) + 1,
        sh=0.3 * torch.randn(count, 4, 3, generator=g),
    )


def test_a_sequence_that_d2_wrote_comes_back_as_the_same_gaussians(tmp_path):
    original = moving()
    times = np.linspace(0, 1, 9)
    ply.write_sequence(original, tmp_path / "ply", "x", times, 12.0)
    made = bring(tmp_path / "ply", tmp_path / "run")
    assert (made.kind, made.gaussians, made.fps) == ("ply", len(original), 12)
    back = Gaussians4D.load(tmp_path / "run" / "recon" / "main" / "gaussians.safetensors")
    for time in times:
        a, b = original.at(float(time)), back.at(float(time))
        seen = a.opacities > 0.05
        assert torch.allclose(a.opacities, b.opacities, atol=2e-3)
        assert torch.allclose(a.means[seen], b.means[seen], atol=2e-3)
    written = export(tmp_path / "run", ["ply"])["ply"]
    assert len(list(written.glob("*.ply"))) == 9


def test_an_import_that_died_is_repeated_and_leaves_nothing_behind(tmp_path):
    ply.write_sequence(moving(20), tmp_path / "ply", "x", np.linspace(0, 1, 4), 12.0)
    folder = tmp_path / "run" / "recon" / "main"
    Run.create(tmp_path / "run")
    folder.mkdir(parents=True)
    left = (tmp_path / "run" / ".run.abcd1234.json", folder / ".gaussians.abcd1234.safetensors")
    for path in left:
        path.write_bytes(b"half")
    bring(tmp_path / "ply", tmp_path / "run")
    assert not any(path.exists() for path in left)


def turning(frames: int, count: int = 400) -> list[Gaussians3D]:
    """A ring of coloured discs that turns by a third, which no single even motion describes."""
    rng = np.random.default_rng(5)
    around, height = rng.uniform(0, 2 * np.pi, count), rng.uniform(-0.5, 0.5, count)
    colours = torch.from_numpy(rng.uniform(-1, 1, (count, 1, 3))).float()
    moments = []
    for f in range(frames):
        a = around + 2 * np.pi / 3 * f / (frames - 1)
        means = torch.from_numpy(np.stack([np.cos(a), np.sin(a), height], -1)).float()
        quats = torch.from_numpy(np.stack([np.cos(a / 2), 0 * a, 0 * a, np.sin(a / 2)], -1)).float()
        scales = torch.tensor([0.03, 0.12, 0.12]).expand(count, 3).contiguous()
        moments.append(Gaussians3D(means, quats, scales, torch.full((count,), 0.95), colours))
    return moments


def test_motion_that_is_not_even_becomes_pieces_that_look_the_same(tmp_path):
    moments = turning(13)
    for f, moment in enumerate(moments):
        ply.write(moment, tmp_path / "ply" / f"m{f}.ply")
    made = bring(tmp_path / "ply", tmp_path / "run", fps=8)
    assert made.gaussians > 2 * 400 and made.fps == 8
    model = Gaussians4D.load(tmp_path / "run" / "recon" / "main" / "gaussians.safetensors")
    view = rig([30], 15)
    for f in (0, 5, 12):
        pair = [
            next(drawing.render_views(what, view.c2w, view.K, SIZE, SIZE, [f / 12])) for what in (moments[f], model)
        ]
        a, b = (torch.from_numpy(p[..., :3] * p[..., 3:] + 1 - p[..., 3:]) for p in pair)
        assert psnr(a, b) > 27


def picked(moment: Gaussians3D, index: torch.Tensor) -> Gaussians3D:
    return Gaussians3D(*(x[index] for x in (moment.means, moment.quats, moment.scales, moment.opacities, moment.sh)))


def test_gaussians_in_another_order_in_every_file_are_found_again(tmp_path):
    original, g = moving(120), torch.Generator().manual_seed(1)
    times = np.linspace(0, 1, 19)
    for f, time in enumerate(times):
        moment = original.at(float(time))
        ply.write(moment, tmp_path / "in" / f"m{f}.ply")
        ply.write(picked(moment, torch.randperm(120, generator=g)), tmp_path / "out" / f"m{f}.ply")
    models = [splats.matched(splats.read(tmp_path / name, lambda *words: None)) for name in ("in", "out")]
    assert models[0] is not None and models[1] is not None and len(models[0]) == 120
    assert len(models[1]) < 1.05 * 120
    assert difference(*models, times) < 0.002


def difference(a: Gaussians4D, b: Gaussians4D, times: np.ndarray) -> float:
    """Mean over pixels and moments, of 1."""
    view = rig([30], 15)
    pictures = [
        np.stack([next(drawing.render_views(x, view.c2w, view.K, SIZE, SIZE, [float(t)])) for t in times[::6]])
        for x in (a, b)
    ]
    return float(np.abs(pictures[0] - pictures[1]).mean())


def test_a_gaussian_that_some_files_lack_is_hidden_there_and_one_again_after(tmp_path):
    moments = turning(25, 100)
    last = torch.arange(100) != 7
    for f, moment in enumerate(moments):
        here = last if f in (10, 11) else torch.ones(100, dtype=torch.bool)
        ply.write(picked(moment, here.nonzero()[:, 0]), tmp_path / "ply" / f"m{f}.ply")
    sequence = splats.read(tmp_path / "ply", lambda *words: None)
    stack = aligned(sequence.moments, 3.0)
    assert stack is not None and stack.means.shape == (25, 100, 3)
    for f in range(25):
        assert (stack.opacities[f] == 0).nonzero().flatten().tolist() == ([7] if f in (10, 11) else [])
        assert (stack.means[f] - moments[f].means).norm(dim=-1).max() < 0.03
    assert bring(tmp_path / "ply", tmp_path / "run").gaussians > 100


def test_gaussians_that_jump_too_far_to_be_found_again_are_drawn_for_a_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(splats, "DRAWN_SIZE", 32)
    monkeypatch.setattr(splats, "DRAWN_VIEWS", 6)
    moments = turning(3, 90)
    shuffled = torch.randperm(90, generator=torch.Generator().manual_seed(1))
    for f, moment in enumerate(moments):
        index = shuffled if f == 1 else torch.arange(90)
        fields = (moment.means, moment.quats, moment.scales, moment.opacities, moment.sh)
        ply.write(Gaussians3D(*(x[index] for x in fields)), tmp_path / "order" / f"m{f}.ply")
        ply.write(Gaussians3D(*(x[f:] for x in fields)), tmp_path / "number" / f"m{f}.ply")
    for name in ("order", "number"):
        told: list[str] = []
        made = bring(tmp_path / name, tmp_path / f"run-{name}", message=told.append)
        assert made.pictures == 18 and any("do not hold the same Gaussians" in text for text in told)
        data = dataset.load(tmp_path / f"run-{name}")
        assert data.has_alpha and data.frames == 3 and len(data.views.unique()) == 6
        assert (data.images[..., 3] > 128).float().mean() > 0.05


def test_a_sequence_that_is_none_is_one_line(tmp_path):
    ply.write(turning(2, 9)[0], tmp_path / "one" / "a.ply")
    expect_fault(lambda: bring(tmp_path / "one", tmp_path / "run"), 3, "two PLY files or more")
    (tmp_path / "one" / "b.ply").write_bytes(b"ply\n")
    expect_fault(lambda: bring(tmp_path / "one", tmp_path / "run"), 3, "b.ply")
    ply.write(turning(2, 9)[0], tmp_path / "one" / "b.ply")
    for text in ('{"fps": 24}', '{"fps": 24, "frames": [{"file": "a.ply", "time": 1}, {"file": "b.ply", "time": 0}]}'):
        (tmp_path / "one" / "frames.json").write_text(text)
        expect_fault(lambda: bring(tmp_path / "one", tmp_path / "run"), 3, "frames.json")
