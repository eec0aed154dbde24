"""A 3D asset as input: where it stands, which way it faces, what it looks like."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from d2 import camera
from d2.asset import Mesh, views
from d2.errors import InputError
from d2.images import open_image
from d2.run import Run

RED, GREEN = (255, 0, 0), (0, 255, 0)


class Dots:
    """Two points, drawn as single pixels by the pinhole formula: the camera's slow twin."""

    path = Path("dots")
    up: Literal["y", "z"] = "z"

    def __init__(self, points: list[list[float]]) -> None:
        self.points = np.array(points, float)

    def draw(self, c2w: np.ndarray, K: np.ndarray, size: int, turn: np.ndarray) -> np.ndarray:
        seen = (self.points - c2w[:3, 3]) @ c2w[:3, :3]
        pixels = (seen[:, :2] * (1, -1) / -seen[:, 2:]) * K[0, 0] + size / 2
        picture = np.zeros((size, size, 4), np.uint8)
        for (x, y), ink in zip(pixels, (RED, GREEN), strict=True):
            picture[min(int(y), size - 1), min(int(x), size - 1)] = (*ink, 255)
        return picture


def where(picture: Any, ink: tuple[int, int, int]) -> np.ndarray:
    """Centre (x, y), in shares of the picture, of what is mostly of one colour."""
    rgba = np.asarray(picture).astype(int)
    channel = ink.index(255)
    others = [i for i in range(3) if i != channel]
    y, x = np.nonzero((rgba[..., 3] > 128) & (rgba[..., channel] > 60 + rgba[..., others].max(-1)))
    return np.array([x.mean(), y.mean()]) / len(rgba)


def box_obj(path: Path, colours: bool = True) -> Path:
    """A beam along x, red on the right half, in OBJ's custom (y up)."""
    lines, faces, count = [], [], 0
    for x0, x1, ink in ((-5, 0, "0 1 0"), (0, 5, "1 0 0")):
        corners = [(x, y, z) for x in (x0, x1) for y in (0, 2) for z in (-1, 1)]
        lines += [f"v {x} {y} {z}" + f" {ink}" * colours for x, y, z in corners]
        quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
        faces += [f"f {' '.join(str(count + i + 1) for i in quad)}" for quad in quads]
        count += 8
    path.write_text("\n".join(lines + faces) + "\n")
    return path


def test_it_fills_its_share_where_it_looks_largest_and_stands_in_the_middle() -> None:
    asset = Dots([[100, 40, 7], [120, 40, 7]])  # 20 wide, seen whole from the front
    drawn = list(views(asset, camera.orbit(4, elevation_deg=0, width=200, height=200), 0.8))
    front = [where(drawn[3], ink) for ink in (RED, GREEN)]
    assert np.allclose(front, [[0.1, 0.5], [0.9, 0.5]], atol=0.011)
    # The camera at azimuth 90 degrees, on +x, looks along the line: the nearer point is the second.
    assert np.allclose(where(drawn[0], GREEN), 0.5, atol=0.01)


@pytest.mark.parametrize(("up", "turn", "expected"), [("y", 0, (0.1, 0.5)), ("z", 180, (0.9, 0.5))])
def test_it_is_turned_before_it_is_drawn(up: Literal["y", "z"], turn: float, expected: tuple[float, float]) -> None:
    rig = camera.orbit(4, elevation_deg=0, width=200, height=200)
    front = list(views(Dots([[-1, 0, 0], [1, 0, 0]]), rig, 0.8, up, turn))[3]
    assert np.allclose(where(front, RED), expected, atol=0.011)


def test_points_without_extent_are_refused() -> None:
    rig = camera.orbit(2, width=32, height=32)
    for points in ([[1, 1, 1], [1, 1, 1]], [[0, 0, np.inf], [1, 0, 0]]):
        with pytest.raises(InputError, match="extent"):
            list(views(Dots(points), rig))  # type: ignore[arg-type]


class TestMesh:
    @pytest.fixture(autouse=True)
    def _open3d(self) -> None:
        try:
            pytest.importorskip("open3d", exc_type=ImportError)
        except OSError as error:  # a system library is missing
            pytest.skip(str(error))

    def test_colours_sides_and_lamp(self, tmp_path: Path) -> None:
        rig = camera.orbit(4, elevation_deg=0, width=96, height=96)
        drawn = list(views(Mesh(box_obj(tmp_path / "beam.obj")), rig, 0.9))
        front, back, right = drawn[3], drawn[1], drawn[0]
        assert where(front, RED)[0] > 0.5 > where(front, GREEN)[0]
        assert where(back, RED)[0] < 0.5 < where(back, GREEN)[0]
        assert abs(where(right, RED)[0] - 0.5) < 0.02  # seen along its length: only the red end
        alpha = np.asarray(front)[..., 3]
        columns = np.nonzero(alpha.max(0) > 128)[0]
        assert (columns[-1] + 1 - columns[0]) / 96 == pytest.approx(0.9, abs=0.03)

    def test_without_material_it_is_grey(self, tmp_path: Path) -> None:
        (drawn, _) = views(Mesh(box_obj(tmp_path / "beam.obj", colours=False)), camera.orbit(2, width=32, height=32))
        rgba = np.asarray(drawn)
        inside = rgba[rgba[..., 3] == 255][:, :3].astype(int)
        assert np.ptp(inside, axis=1).max() <= 1 and 90 < inside.mean() < 230

    def test_a_texture_is_laid_the_right_way_up(self, tmp_path: Path) -> None:
        from PIL import Image

        texture = np.zeros((8, 8, 3), np.uint8)
        texture[:4], texture[4:] = RED, GREEN  # red is the top of the picture: v near 1
        Image.fromarray(texture).save(tmp_path / "t.png")
        (tmp_path / "m.mtl").write_text("newmtl m\nKd 1 1 1\nmap_Kd t.png\n")
        corners = "v -1 0 0\nv 1 0 0\nv 1 2 0\nv -1 2 0\nvt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\n"
        (tmp_path / "q.obj").write_text(f"mtllib m.mtl\n{corners}usemtl m\nf 1/1 2/2 3/3\nf 1/1 3/3 4/4\n")
        front = list(views(Mesh(tmp_path / "q.obj"), camera.orbit(2, elevation_deg=0, width=64, height=64)))[1]
        assert where(front, RED)[1] < 0.4 < 0.6 < where(front, GREEN)[1]

    @pytest.mark.parametrize("text", ["", "v 0 0 0\n", "\x00\x01 not a mesh"])
    def test_what_is_no_mesh_is_one_line(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "bad.obj").write_text(text)
        with pytest.raises(InputError, match=r"bad\.obj.* holds no triangles"):
            Mesh(tmp_path / "bad.obj")
        with pytest.raises(InputError, match="does not exist"):
            Mesh(tmp_path / "absent.obj")

    def test_a_run_from_a_mesh(self, tmp_path: Path) -> None:
        from d2.generation import generate

        made = generate(Mesh(box_obj(tmp_path / "beam.obj")), tmp_path / "run", preset="tiny", sets=("steps=2",))
        matrix = Run.open(made.folder).matrix()
        assert (matrix.views, matrix.frames) == (8, 8)
        given = np.asarray(open_image(made.folder / "generate/reference_views/v07.png").convert("RGB"))
        first = np.asarray(open_image(made.folder / "generate/input/f000.png"))
        assert np.abs(given.astype(int) - np.where(first[..., 3:] == 0, 255, given)).max() <= 1


def test_a_splat_is_drawn_by_our_rasterizer(tmp_path: Path) -> None:
    from d2.cli.assets import open_asset
    from d2.recon.formats import ply
    from d2.recon.gaussians import Gaussians3D

    means = torch.tensor([[-1.0, 0, 0], [1.0, 0, 0]])
    colours = (torch.tensor([RED, GREEN]) / 255 - 0.5) / 0.28209479177387814
    still = Gaussians3D(
        means, torch.tensor([[1.0, 0, 0, 0]] * 2), torch.full((2, 3), 0.1), torch.tensor([0.99, 0.99]), colours[:, None]
    )
    ply.write(still, tmp_path / "two.ply")
    drawn = list(views(open_asset(tmp_path / "two.ply"), camera.orbit(4, elevation_deg=0, width=64, height=64), 0.6))
    assert where(drawn[3], RED)[0] == pytest.approx(0.2, abs=0.03)
    assert where(drawn[3], GREEN)[0] == pytest.approx(0.8, abs=0.03)
    assert where(drawn[1], GREEN)[0] == pytest.approx(0.2, abs=0.03)
