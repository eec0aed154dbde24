"""Every knob of stage 1, with its default, unit and range."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np

from d2 import asset, camera
from d2.config import config, option
from d2.errors import InputError
from d2.inputs import Pick, RembgModel
from d2.pair import Compile, PairConfig
from d2.sampler import SamplerConfig

TRAINED = {"views": 21, "frames": 25}  # what the official weights were trained at


@config
class GenerateConfig(SamplerConfig, PairConfig):
    """Input, cameras, conditioning and memory; how the matrix is sampled and with which networks is inherited."""

    seed: int = option(23, "seed of everything random", ge=0, lt=2**63)
    views: int = option(21, "views around the object, the last one the input's", ge=2, le=360)
    frames: int = option(25, "moments of the clip", ge=2, le=1000)
    size: int = option(576, "side of the pictures in pixels", ge=16, le=4096)
    fps: float | None = option(
        None, "frames a second at which the asset plays; default a video's own, or 24", gt=0, le=1000
    )

    elevation_deg: float = option(10.0, "elevation of every view above the horizon, degrees", ge=-90, le=90)
    elevations_deg: tuple[float, ...] = option((), "elevation of each view, degrees, instead", strict=False)
    radius: float = option(camera.DEFAULT_RADIUS, "distance of the cameras, scene units", gt=0, le=1e6)
    fov_deg: float = option(camera.DEFAULT_FOV_DEG, "horizontal field of view, degrees", gt=0, lt=180)
    clockwise: bool = option(False, "the views go round clockwise, seen from above")

    image_frame_ratio: float | None = option(0.9, "share of the square that the object takes up", gt=0, le=1)
    box: Literal["clip", "frame"] = option(
        "clip", "one box around the object for the whole clip, or one for each frame, which removes its motion"
    )
    rembg_model: RembgModel = option("u2net", "what removes a background; u2netp is 40 times smaller")
    asset_up: asset.Up = option("auto", "which axis of a 3D asset points up; auto is the custom of its format")
    asset_turn_deg: float = option(0.0, "turn of a 3D asset about the vertical, degrees", ge=-360, le=360)
    pick: Pick = option("even", "of more frames than needed: evenly spaced ones, or the first")

    fps_id: float = option(24.0, "frame rate that the frame model is told", ge=1, le=1000)
    motion: float = option(127.0, "motion bucket that the frame model is told; more moves more", ge=0, le=255)
    cond_aug_frame: float = option(0.02, "noise on the frame model's picture, standard deviation", ge=0, le=10)
    cond_aug_view: float = option(1e-5, "noise on the view model's picture, standard deviation", ge=0, le=10)

    columns_in_flight: int | None = option(
        None, "columns that one evaluation takes; default what a GPU's free memory holds, on a CPU 1", ge=1, le=1000
    )
    rows_in_flight: int | None = option(None, "rows that one evaluation takes; default likewise", ge=1, le=1000)
    decode_chunk: int = option(10, "frames that the decoder takes at a time; seams lie between", ge=1, le=1000)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "precision of the networks that denoise; auto is bfloat16 on a GPU, float32 elsewhere"
    )
    offload: bool = option(False, "keep a network on the GPU only while it runs")
    guidance_halves: bool = option(False, "evaluate the two halves of a guidance pair one after the other")
    feed_forward_chunk: int = option(0, "pixels that a feed-forward layer takes at a time; 0 is all", ge=0)
    channels_last: bool = option(False, "weights of convolutions in the order that some GPUs prefer")
    compile: Compile = option("off", "compile the networks, on a GPU only: fused kernels, or a CUDA graph of them")
    rank_timeout: float = option(60.0, "seconds without a sign of life after which a rank is lost", ge=1, le=86400)

    save_every: int = option(5, "steps between two saved states", ge=1, le=1000)
    preview_every: int = option(5, "steps between two previews of the matrix", ge=1, le=1000)
    preview_fps: float = option(6.0, "frames a second of preview.mp4", gt=0, le=1000)

    @property
    def latent(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        side = self.size // self.factor
        return self.latent_channels, side, side

    @property
    def rig(self) -> camera.Rig:
        """The cameras. Raises InputError for another number of elevations than views."""
        rig = camera.orbit(
            self.views, self.elevation_deg, self.radius, self.fov_deg, self.size, self.size, self.clockwise
        )
        if not self.elevations_deg:
            return rig
        if len(self.elevations_deg) != self.views or not all(abs(e) <= 90 for e in self.elevations_deg):
            raise InputError(f"elevations_deg: expected {self.views} angles of -90 to 90, one for each view")
        return dataclasses.replace(rig, elevation=np.array([math.radians(e) for e in self.elevations_deg]))
