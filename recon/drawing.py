"""Pictures of 4D Gaussians: single views, a turntable that loops, a labelled contact sheet; no files here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from d2 import images
from d2.camera import DEFAULT_FOV_DEG, Rig, viewmats
from d2.recon.gaussians import Gaussians3D, Gaussians4D
from d2.recon.raster import BackendName, Motion, rasterize

WHITE = (1.0, 1.0, 1.0)
DEFAULT_ELEVATION = math.radians(10.0)
DEFAULT_FOV = math.radians(DEFAULT_FOV_DEG)
TURN_SECONDS = 4.0  # about how long one turn takes
_MOMENTS = tuple(k / 8 for k in range(9))
_OPAQUE = 0.2  # what is fainter than this at a moment does not count as part of the object then
_QUANTILE = 0.005  # share of the opaque Gaussians that may lie outside on each side: floaters
_MARGIN = 1.05
_DIRECTIONS = 16  # that a distance must fit from
_MIN_RADIUS = 0.02  # world; keeps the near plane in front of a single tiny Gaussian
_MAX_SAMPLES = 20_000  # Gaussians looked at a moment
_INK, _LABEL_WIDTH, _LABEL_HEIGHT, _FONT_SIZE = (60, 60, 60), 44, 20, 12  # of the contact sheet, pixels


class Picture(NamedTuple):
    """What one camera sees; colours are display-referred and may exceed 1."""

    color: np.ndarray  # [H, W, 3] premultiplied
    alpha: np.ndarray  # [H, W, 1]
    depth: np.ndarray | None = None  # [H, W] world, expected along the optical axis where alpha > 0


class Framing(NamedTuple):
    """A sphere that holds the object at every moment."""

    center: np.ndarray  # [3] world
    radius: float  # world


class Distances(NamedTuple):
    """From what is looked at, world, for a square picture to hold the object."""

    above: float
    below: float
    beside: float


def draw(
    gaussians: Gaussians4D | Gaussians3D,
    c2w: np.ndarray,  # [n, 4, 4] OpenGL camera to world
    Ks: np.ndarray,  # [n, 3, 3] pixels
    width: int,
    height: int,
    times: Sequence[float] | np.ndarray,  # [n] in 0..1; a static set ignores them
    depth: bool = False,
    backend: BackendName = "auto",
) -> Iterator[Picture]:
    """Yields what each camera sees at its time.  Errors are those of `rasterize`."""
    device = gaussians.means.device
    views = torch.as_tensor(viewmats(np.asarray(c2w, float)), dtype=torch.float32, device=device)
    intrinsics = torch.as_tensor(Ks, dtype=torch.float32, device=device)
    drawn, motion = _drawn(gaussians)
    for view, K, time in zip(views, intrinsics, times, strict=True):
        moment = motion and motion._replace(t=torch.tensor([float(time)], device=device))
        with torch.no_grad():
            image, alpha, _ = rasterize(
                **drawn, viewmats=view[None], Ks=K[None], width=width, height=height, sh_degree=gaussians.sh_degree,
                motion=moment, backend=backend, render_mode="RGB+ED" if depth else "RGB",
            )  # fmt: skip
        pixels = image[0].cpu().numpy()
        yield Picture(pixels[..., :3], alpha[0].cpu().numpy(), pixels[..., 3] if depth else None)


def render_views(
    gaussians: Gaussians4D | Gaussians3D,
    c2w: np.ndarray,  # [n, 4, 4] OpenGL camera to world
    K: np.ndarray,  # [3, 3] pixels
    width: int,
    height: int,
    times: Sequence[float] | np.ndarray,  # [n] in 0..1; a static set ignores them
    background: tuple[float, float, float] | None = None,
    backend: BackendName = "auto",
) -> Iterator[np.ndarray]:
    """Yields float32 [height, width, 4] a camera: straight alpha, or opaque over `background` (0..1)."""
    Ks = np.broadcast_to(K, (len(c2w), 3, 3)).copy()
    for picture in draw(gaussians, c2w, Ks, width, height, times, backend=backend):
        yield over(picture, background)


def over(picture: Picture, background: tuple[float, float, float] | None) -> np.ndarray:  # float32 [H, W, 4]
    """Straight alpha, or opaque over a background in 0..1."""
    color, alpha, _ = picture
    if background is None:
        return np.concatenate([color / np.maximum(alpha, 1e-6), alpha], -1)
    behind = (1 - alpha) * np.asarray(background, np.float32)
    return np.concatenate([color + behind, np.ones_like(alpha)], -1)


def framing(
    gaussians: Gaussians4D,
    times: Sequence[float] | np.ndarray = _MOMENTS,  # [n] in 0..1
) -> Framing:
    """Where the object is over the given moments, from quantiles of what is opaque: floaters don't count."""
    means, sizes = _opaque(gaussians, times)
    center = np.quantile(means, [_QUANTILE, 1 - _QUANTILE], axis=0).mean(0)
    reach = np.linalg.norm(means - center, axis=1) + sizes
    return Framing(center, max(float(np.quantile(reach, 1 - _QUANTILE)), _MIN_RADIUS))


def fitting_distances(
    gaussians: Gaussians4D,
    center: np.ndarray,  # [3] world, that the cameras look at
    elevation: float = DEFAULT_ELEVATION,  # rad
    fov: float = DEFAULT_FOV,  # rad, of a square picture
    times: Sequence[float] | np.ndarray = _MOMENTS,  # [n] in 0..1
) -> Distances:
    """How far from `center` orbit cameras must be so that what `framing` sees fits on each side, from everywhere."""
    means, sizes = _opaque(gaussians, times)
    slope, (x, y, z) = math.tan(0.5 * fov), (means - center).T
    cos, sin = math.cos(elevation), math.sin(elevation)
    needed = []
    for azimuth in 2 * np.pi * np.arange(_DIRECTIONS) / _DIRECTIONS:
        right = x * math.cos(azimuth) + y * math.sin(azimuth)
        front = x * math.sin(azimuth) - y * math.cos(azimuth)
        up, near = z * cos - front * sin, z * sin + front * cos
        across = np.array([up, -up, np.abs(right)]) + sizes
        needed.append(np.quantile(near + across / slope, 1 - _QUANTILE, axis=1))
    return Distances(*(max(float(_MARGIN * distance), _MIN_RADIUS) for distance in np.max(needed, axis=0)))


def _opaque(gaussians: Gaussians4D, times: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means [n, 3] and sizes [n] of what is opaque at the given moments, one after the other."""
    step = -(-len(gaussians) // _MAX_SAMPLES)
    some = gaussians.map(lambda tensor: tensor.detach()[::step].cpu())
    moments = [some.at(float(time)) for time in times]
    means = np.concatenate([moment.means.double().numpy() for moment in moments])
    sizes = np.concatenate([moment.scales.double().amax(-1).numpy() for moment in moments])
    opacities = np.concatenate([moment.opacities.numpy() for moment in moments])
    opaque = opacities >= min(_OPAQUE, 0.5 * float(opacities.max()))
    return means[opaque], sizes[opaque]


def bounds(
    gaussians: Gaussians4D,
    times: Sequence[float] | np.ndarray = _MOMENTS,  # [n] in 0..1
) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest corner [3] of the object over the given moments, as `framing` looks at it."""
    means, sizes = _opaque(gaussians, times)
    low = np.quantile(means - sizes[:, None], _QUANTILE, axis=0)
    return low, np.quantile(means + sizes[:, None], 1 - _QUANTILE, axis=0)


def orbit_rig(
    radius: float,  # world, of the sphere to be seen
    azimuths: np.ndarray,  # [n] rad
    width: int,
    height: int,
    elevation: float = DEFAULT_ELEVATION,
    fov: float = DEFAULT_FOV,
) -> Rig:
    """Cameras around the origin from which a sphere of `radius` just fits; angles in rad, fov horizontal."""
    half = math.atan(math.tan(0.5 * fov) * min(1.0, height / width))
    distance = _MARGIN * radius / math.sin(half)
    azimuths = np.asarray(azimuths, float)
    return Rig(azimuths, np.full_like(azimuths, elevation), distance, fov, width, height)


def around(rig: Rig, center: np.ndarray) -> np.ndarray:
    """The rig's cameras [n, 4, 4], moved to look at `center` [3] instead of the origin."""
    c2w = rig.c2w
    c2w[:, :3, 3] += center
    return c2w


def loop_times(
    times: Sequence[float] | np.ndarray,  # [F] in 0..1, the frames of the clip
    fps: float,
    seconds: float = TURN_SECONDS,
) -> np.ndarray:  # [n] in 0..1, n a multiple of F
    """Moments of a turntable that loops: whole plays of the clip, about `seconds` in all."""
    return np.tile(np.asarray(times, float), max(1, round(seconds * fps / len(times))))


def turntable(
    gaussians: Gaussians4D,
    times: Sequence[float] | np.ndarray,  # [n] in 0..1, one a picture: see loop_times
    width: int = 512,
    height: int = 512,
    *,
    elevation: float = DEFAULT_ELEVATION,
    fov: float = DEFAULT_FOV,
    framed: Framing | None = None,
    background: tuple[float, float, float] = WHITE,
    backend: BackendName = "auto",
) -> Iterator[np.ndarray]:
    """Yields uint8 [height, width, 3]: one full turn from the front while time advances.

    Picture n would be picture 0 again.  `framed` is by default what `framing` finds.  Angles in rad.
    """
    center, radius = framed or framing(gaussians)
    azimuths = 2 * np.pi * np.arange(len(times)) / len(times)
    rig = orbit_rig(radius, azimuths, width, height, elevation, fov)
    c2w = around(rig, center)
    for picture in render_views(gaussians, c2w, rig.K, width, height, times, background, backend):
        yield images.to_uint8(picture[..., :3])


def contact_sheet(
    gaussians: Gaussians4D,
    times: Sequence[float] | np.ndarray,  # [columns] in 0..1
    azimuths: np.ndarray | None = None,  # [rows] rad; four by default
    tile: int = 160,
    *,
    elevation: float = DEFAULT_ELEVATION,
    fov: float = DEFAULT_FOV,
    framed: Framing | None = None,
    backend: BackendName = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """uint8 [height, width, 3]: a row an azimuth, a column a moment, labelled, on white; tiles in pixels."""
    azimuths = np.arange(4) * np.pi / 2 if azimuths is None else np.asarray(azimuths, float)
    center, radius = framed or framing(gaussians)
    rig = orbit_rig(radius, np.repeat(azimuths, len(times)), tile, tile, elevation, fov)
    every = np.tile(np.asarray(times, float), len(azimuths))
    size = (_LABEL_WIDTH + tile * len(times), _LABEL_HEIGHT + tile * len(azimuths))
    sheet = Image.new("RGB", size, "white")
    pictures = render_views(gaussians, around(rig, center), rig.K, tile, tile, every, WHITE, backend)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, len(times))
        corner = (_LABEL_WIDTH + column * tile, _LABEL_HEIGHT + row * tile)
        sheet.paste(Image.fromarray(images.to_uint8(picture[..., :3])), corner)
        progress(index + 1, len(every))
    _label(sheet, times, azimuths, tile)
    return np.asarray(sheet)


def _drawn(gaussians: Gaussians4D | Gaussians3D) -> tuple[dict[str, Any], Motion | None]:
    """Arguments of `rasterize`, with the motion of a moving set apart."""
    if isinstance(gaussians, Gaussians4D):
        return gaussians.activated(torch.zeros(1, device=gaussians.means.device))
    g = gaussians
    static = {
        "means": g.means,
        "quats": g.quats,
        "scales": g.scales,
        "opacities": g.opacities,
        "colors": g.sh,
    }
    return static, None


def _label(sheet: Image.Image, times: Sequence[float] | np.ndarray, azimuths: np.ndarray, tile: int) -> None:
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    for column, time in enumerate(times):
        x = _LABEL_WIDTH + column * tile + tile // 2
        draw.text((x, _LABEL_HEIGHT // 2), f"t = {time:.2f}", _INK, font, "mm")
    for row, azimuth in enumerate(azimuths):
        y = _LABEL_HEIGHT + row * tile + tile // 2
        draw.text((_LABEL_WIDTH // 2, y), f"{math.degrees(azimuth):.0f}°", _INK, font, "mm")
