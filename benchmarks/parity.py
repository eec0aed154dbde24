"""Replays recorded outputs of the reference implementation through d2's public modules.

    python benchmarks/parity.py DIR [DIR ...]

prints one JSON line for each check, `{"check": ..., "max_rel_err": ..., "ok": ...}`, and exits 1 if any is
off.  A recording is NAME.json, which says its configuration, and tensors beside it; sizes, the number of
views and frames and weights are free.  The error is max|ours - recorded| / max(1, max|recorded|), at most
1e-5; preprocessed pictures may differ by one grey level.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from d2.denoiser import Estimate, Lines, UNetDenoiser, scalings
from d2.errors import D2Error
from d2.fileio import read_json, read_tensors
from d2.models.blocks import Blend
from d2.models.clip import OpenCLIP, ViTConfig, preprocess
from d2.models.conditioner import Conditioning, sv3d_angles, sv3d_vector, svd_vector
from d2.models.unet import UNetConfig, VideoUNet
from d2.models.vae import FirstStage, KLAutoencoder, VAEConfig
from d2.noise import freeinit_noise, mix_frequencies, starting_point
from d2.preprocess import frame_picture
from d2.sampler import SamplerConfig, State, alone, plan, sample_matrix
from d2.schedule import composition_scale, edm_sigmas, linear_guidance, low_pass, progress, triangle_guidance

TOLERANCE = 1e-5
LEVEL = 1.0 / 255
Check = tuple[str, Tensor, Tensor]  # name, ours, recorded
Tensors = dict[str, Tensor]
NUMBER = r"[-+]?\d*\.?\d+(?:e[-+]?\d+)?"

SAME_NAMES = ("scale_min", "scale_max", "scale_k", "uc_type", "svd_cfg_warmup", "svd_only_from")
RENAMED = {"steps": "num_steps", "composition": "schedule", "scale": "sv3d_scale"}  # ours: the recording's

# What the names of the recorded triangle guiders stand for: periods of the wave, in turns.
TRIANGLES = {"p1": (2.0,), "p2": (1.0, 2.0)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Replays recorded outputs of the reference implementation.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    folders = parser.parse_args(argv).folders
    files = sorted(file for folder in folders for file in folder.rglob("*.json"))
    if not files:
        print(f"error: no recordings in {', '.join(map(str, folders))}", file=sys.stderr)
        return 1
    all_ok = True
    for file in files:
        try:
            for name, error, tolerance in replay(file):
                ok = error <= tolerance
                all_ok &= ok
                print(json.dumps({"check": f"{file.stem}/{name}", "max_rel_err": error, "ok": ok}), flush=True)
        except (D2Error, KeyError, ValueError, RuntimeError, AttributeError, TypeError) as error:
            all_ok = False
            reason = f"{type(error).__name__}: {error}"[:500]
            print(
                json.dumps({"check": file.stem, "max_rel_err": None, "ok": False, "reason": reason}),
                flush=True,
            )
    return 0 if all_ok else 1


@torch.no_grad()
def replay(file: Path) -> Iterator[tuple[str, float, float]]:
    """Name, error and tolerance of every check of one recording."""
    info = read_json(file)
    if "cases" in info:
        for name, ours, recorded in preprocess_checks(file.parent, info):
            yield name, (ours - recorded).abs().max().item() / 255, LEVEL
        return
    recorded, _ = read_tensors(file.with_name(f"{file.stem}.io.safetensors"))
    weights = file.with_name(f"{file.stem}.weights.safetensors")
    tensors = {k: v.float() for k, v in read_tensors(weights)[0].items()} if weights.exists() else {}
    for name, ours, reference in checks_for(info)(info, recorded, tensors):
        if ours.shape != reference.shape:
            raise ValueError(f"{name}: shape {tuple(ours.shape)}, recorded {tuple(reference.shape)}")
        difference = (ours.double() - reference.double()).abs().max().item()
        yield name, difference / max(1.0, reference.abs().max().item()), TOLERANCE


def checks_for(info: dict[str, Any]) -> Callable[[dict[str, Any], Tensors, Tensors], Iterator[Check]]:
    kind = str(info.get("kind", ""))
    for word, checks in (("VideoUNet", unet_checks), ("VAE", vae_checks), ("OpenCLIP", clip_checks)):
        if kind.startswith(word):
            return checks
    if "runs" in info:
        return joint_checks
    if "edm" in info:
        return pieces_checks
    raise ValueError("this kind of recording is not known")


def loaded(module: nn.Module, weights: Tensors) -> Any:
    """The module with these weights, nothing missing and nothing over."""
    module.load_state_dict(weights, strict=True, assign=True)
    return module.eval()


def under(prefix: str, weights: Tensors) -> Tensors:
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def split(crossattn: Tensor, concat: Tensor, vector: Tensor) -> list[Conditioning]:
    """One condition for each of B sequences."""
    rows = zip(crossattn.split(1), concat.split(1), vector.split(1), strict=True)
    return [Conditioning(*row) for row in rows]


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(NUMBER, text)]


# -- networks --------------------------------------------------------------------------------------------


def configured(cls: type, values: dict[str, Any]) -> Any:
    """A hyper-parameter dataclass from recorded values; the rest are switches that SVD and SV3D both set."""
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return cls(**{k: v for k, v in fields.items() if k in cls.__dataclass_fields__})


def unet_checks(info: dict[str, Any], io: Tensors, weights: Tensors) -> Iterator[Check]:
    """The network itself, then as a denoiser at each noise level, alone and guided."""
    B, T = info["B"], info["T"]
    unet = loaded(VideoUNet(configured(UNetConfig, info["config"])), weights)
    tokens = unet.project_context(io["unet_context"][:, 0], T)
    yield "raw", unet(io["unet_x"], io["unet_timesteps"], tokens, io["unet_y"], T), io["unet_out"]

    guide = info["guider"]
    guidance = linear_guidance if guide["type"] == "linear" else triangle_guidance
    scale = guidance(guide["min_scale"], guide["max_scale"], T)
    yield "guidance", scale[None], io["guider_scale"]

    clips = {k: rearrange(io[f"den_{k}"], "(b t) ... -> b t ...", b=B) for k in ("x", "c_concat", "c_vector")}
    crossattn = rearrange(io["den_c_crossattn"], "(b t) 1 d -> b t d", b=B)
    conditions = split(crossattn, clips["c_concat"], clips["c_vector"])
    rows = Lines(UNetDenoiser(unet), conditions, "rows", in_flight=B)
    for level, sigma in info["sigmas"].items():
        estimate = rows(starting_point(clips["x"], sigma), sigma)
        yield f"denoised_{level}", torch.cat(estimate).flatten(0, 1), io[f"den_{level}_out_uc"]
        guided = estimate.guided(scale[:, None, None, None])
        yield f"guided_{level}", guided.flatten(0, 1), io[f"den_{level}_out_cfg"]


def vae_checks(info: dict[str, Any], io: Tensors, weights: Tensors) -> Iterator[Check]:
    """The conditioner's autoencoder, the image decoder and the temporal decoder, whole and in chunks."""
    config = configured(VAEConfig, info["ddconfig"] | {"video_kernel_size": info["video_kernel_size"]})
    still = under("first_stage_image.", weights)  # the recorder gave both image decoders the same weights
    whole = loaded(KLAutoencoder(config), still | under("conditioner.encoder.", weights))
    encoder = {f"encoder.{k}": v for k, v in whole.encoder.state_dict().items()}
    image = loaded(FirstStage(config, video=False), still)
    video = loaded(FirstStage(config, video=True), encoder | under("first_stage_video.", weights))
    yield "encode", whole.encoder(io["img"]), io["enc_out"]
    yield "condition", whole.mode(io["img"]), io["cond_latent_out"]
    yield "decode", image.decoder(io["z"]), io["dec_out"]
    yield "decode_quantised", whole.decode(io["z"]), io["legacy_dec_out"]
    for name in sorted(n for n in io if n.startswith("vdec_out_t")):
        recorded = io[name]
        T = int(name.removeprefix("vdec_out_t"))
        yield f"decode_video_{T}", video.decoder(io["z"][: len(recorded)], T), recorded
    chunk = int(re.findall(r"a_time=(\d+)", info["calls"]["decode_first_stage_svd_out"])[0])
    yield "decode_chunked", video.decode(io["z"], chunk), io["decode_first_stage_svd_out"]


def clip_checks(info: dict[str, Any], io: Tensors, weights: Tensors) -> Iterator[Check]:
    """The embedding of a picture, and its preprocessing with and without blur."""
    config = configured(ViTConfig, info["vision"])
    clip = loaded(OpenCLIP(config), {f"visual.{k.removeprefix('visual.')}": v for k, v in weights.items()})
    phase, *small = re.findall(rf"(?:(\d+)x(\d+) with )?s=({NUMBER})", info["image_formula"])
    stride = int(re.findall(r"::(\d+)", info["call"])[0])
    height, width = info["image_size_in"]
    image = waves(height, width, float(phase[2]))
    yield "embed", clip(image), io["embed_out"]
    yield "preprocess", preprocess(image, config.image_size)[..., ::stride, ::stride], io["pre_sub_out"]
    for height, width, s in small:
        prepared = preprocess(waves(int(height), int(width), float(s)), config.image_size)
        yield "preprocess_small", prepared[..., ::stride, ::stride], io["pre_small_sub_out"]


def waves(H: int, W: int, s: float) -> Tensor:  # [1, 3, H, W] in -1..1
    """The recorder's test picture."""
    i, j = torch.arange(H, dtype=torch.float32)[:, None], torch.arange(W, dtype=torch.float32)[None]
    channels = [
        torch.sin(0.05 * (c + 1) * i + s) * torch.cos(0.031 * (2 * c + 1) * j - 0.7 * s)
        + 0.3 * torch.sin(0.9 * (i + (c + 2) * j))
        for c in range(3)
    ]
    return torch.stack(channels)[None].clamp(-1, 1)


# -- the joint loop --------------------------------------------------------------------------------------


class RecordedNetwork(nn.Module):
    """The closed-form network of the joint recording, called as UNetDenoiser calls a VideoUNet."""

    def __init__(self, coefficients: dict[str, float]) -> None:
        super().__init__()
        self.coefficients = coefficients
        self.precision = nn.Parameter(torch.zeros(1))  # float32

    def project_context(self, context: Tensor, T: int) -> Any:
        return [[(context, context)]]

    def forward(
        self, inputs: Tensor, c_noise: Tensor, tokens: Any, vector: Tensor, T: int, blend: Any, deep: None
    ) -> Tensor:
        k = self.coefficients
        x, concat = inputs.chunk(2, dim=1)
        clips = rearrange(x, "(b t) c h w -> b t c h w", t=T)
        along = k["m"] * clips.mean(1, keepdim=True) + k["d"] * clips.roll(1, dims=1)
        level = k["v"] * vector.mean(1) + k["c"] * tokens[0][0][0].mean(1) + k["n"] * c_noise
        return k["a"] * x + along.flatten(0, 1) + k["p"] * concat + level[:, None, None, None]


def joint_checks(info: dict[str, Any], io: Tensors, weights: Tensors) -> Iterator[Check]:
    """Every recorded state of every run of the joint loop, and of phase 1 with FreeInit."""
    for name, run in info["runs"].items():
        yield from run_checks(name, run, info["coef"], under(f"{name}.", io))
    if "phase1" in info:
        yield from phase1_checks(info["phase1"], info["coef"], under("phase1.", io))


def run_checks(name: str, run: dict[str, Any], coef: dict[str, Any], io: Tensors) -> Iterator[Check]:
    V, F = run["V"], run["F"]
    guidance = {
        f"{model}_guidance_{bound}": run[guider][bound]
        for model, guider in (("view", "sv3d_guider"), ("frame", "svd_guider"))
        for bound in ("min", "max")
    }
    same = {k: run[k] for k in SAME_NAMES}
    renamed = {ours: run[theirs] for ours, theirs in RENAMED.items()}
    config = SamplerConfig(vrs_steps=len(io["noise"]), **same, **renamed, **guidance)
    worked_out = plan(config, orbit(V), F)
    yield f"{name}/sigmas", worked_out.sigmas, io["sigmas"]
    views = lines(coef["sv3d"], io, "sv3d_", "columns", F)
    frames = lines(coef["svd"], io, "svd_", "rows", V)
    states: list[Tensor] = []
    start = State(io["x0"])
    sample_matrix(start, worked_out, views, frames, io["noise"].__getitem__, lambda s: states.append(s.x))
    for index, reference in zip(run["trace_indices"], io["trace"], strict=True):
        yield f"{name}/state_{index}", states[index], reference


def lines(coef: dict[str, float], io: Tensors, prefix: str, axis: Any, count: int) -> Lines:
    """The recorded network over all rows or columns with their recorded conditions."""
    crossattn = rearrange(io[f"{prefix}crossattn"], "(n t) 1 d -> n t d", n=count)
    concat = rearrange(io[f"{prefix}concat"], "(n t) ... -> n t ...", n=count)
    conditions = split(crossattn, concat, rearrange(io[f"{prefix}vector"], "(n t) a -> n t a", n=count))
    network: Any = RecordedNetwork(coef)
    return Lines(UNetDenoiser(network), conditions, axis)


def phase1_checks(info: dict[str, Any], coef: dict[str, Any], io: Tensors) -> Iterator[Check]:
    """One sequence on its own is a matrix of one row, or of one column."""
    T, frame = info["T"], info["net"] == "svd"
    guide = {f"{'frame' if frame else 'view'}_guidance_{k}": info["guider"][k] for k in ("min", "max")}
    config = alone(SamplerConfig(steps=info["steps"], **guide), "frame" if frame else "view")
    worked_out = plan(config, orbit(1 if frame else T), T if frame else 1)
    model = lines(coef[info["net"]], io, "c_", "rows" if frame else "columns", 1)
    models = (None, model) if frame else (model, None)
    sigma = worked_out.sigmas[0].item()

    def sample(noise: Tensor) -> Tensor:
        state = State(starting_point(noise, sigma).unsqueeze(0 if frame else 1))
        return sample_matrix(state, worked_out, *models, noise=lambda step: noise).squeeze(0 if frame else 1)

    first = sample(io["noise"])
    yield "phase1/sample_1", first, io["out_iter1"]
    order, d = re.findall(rf"n=(\d+).*d_t=({NUMBER})", info["text"])[0]
    mask = low_pass((T, *first.shape[-2:]), order=int(order), spatial=float(d), temporal=float(d))
    again = freeinit_noise(first, io["noise"], io["z_rand"], sigma, mask)
    yield "phase1/freeinit_noise", again, io["reinit_noise"]
    yield "phase1/sample_2", sample(again), io["out_iter2"]


def orbit(V: int) -> Tensor:  # [V] rad, the last one the input view
    return torch.linspace(0, 2 * math.pi, V + 1, dtype=torch.float64)[1:]


# -- pieces ----------------------------------------------------------------------------------------------


def pieces_checks(info: dict[str, Any], io: Tensors, weights: Tensors) -> Iterator[Check]:
    yield from embedding_checks(info, io)
    yield from schedule_checks(info, io)
    yield from guidance_checks(info, io)
    yield from filter_checks(info, io)
    blend = info["conv_blend"]
    T = len(io["blend_x"]) // (2 * blend["frames"])
    ours = Blend(blend["blend_weight"], sets=2, padding="reference")(io["blend_x"], T)
    yield "conv_blend", ours, io["blend_out"]


def embedding_checks(info: dict[str, Any], io: Tensors) -> Iterator[Check]:
    svd, sv3d = info["svd"], info["sv3d"]
    T, width = io["svd_vector_out"].shape
    ours = svd_vector(svd["fps_id"], svd["motion_bucket_id"], svd["cond_aug"], T, width // 3)
    yield "svd_vector", ours, io["svd_vector_out"]
    V, width = io["sv3d_vector_out"].shape
    elevation = torch.as_tensor(sv3d["elevation"], dtype=torch.float64).expand(V)
    polar, azimuth = sv3d_angles(torch.deg2rad(elevation), orbit(V))
    yield "polar", polar, io["polars_rad"]
    yield "azimuth", azimuth, io["azimuths_rad"]
    yield "sv3d_vector", sv3d_vector(sv3d["cond_aug"], polar, azimuth, width // 5), io["sv3d_vector_out"]


def schedule_checks(info: dict[str, Any], io: Tensors) -> Iterator[Check]:
    low, high, rho, *_, alt_low, alt_high, alt_rho, alt_steps = numbers(info["edm"])
    for name in (n for n in io if n.startswith("edm_sigmas_")):
        yield name, edm_sigmas(len(io[name]) - 1, low, high, rho), io[name]
    yield "edm_alt", edm_sigmas(int(alt_steps), alt_low, alt_high, alt_rho), io["edm_alt_out"]
    for name, ours in scalings(io["sc_sigma"])._asdict().items():
        yield f"scaling_{name}", ours, io[f"scaling_out_{name}"]
    s = info["scale_scheduler"]
    for name in (n for n in io if n.startswith("scale_")):
        kind: Any = name.removeprefix("scale_").removesuffix("_out")
        bounds = s["scale"], s["scale_min"], s["scale_max"], s["scale_k"]
        values = [composition_scale(kind, progress(i, s["num_steps"]), *bounds) for i in range(s["num_steps"])]
        yield name, torch.tensor(values, dtype=torch.float64), io[name]


def guidance_checks(info: dict[str, Any], io: Tensors) -> Iterator[Check]:
    """The recording names no bounds: the first two scales give them, all others are checked."""
    for name in (n for n in io if n.startswith("guider_linear_")):
        (recorded,) = io[name]
        yield name, linear_guidance(recorded[0].item(), recorded[-1].item(), len(recorded))[None], io[name]
    for name in (n for n in io if n.startswith("guider_triangle_")):
        (recorded,) = io[name]
        periods = TRIANGLES.get(name.split("_")[2], (1.0,))
        rise = triangle_guidance(0, 1, len(recorded), periods)[1].item()
        low = recorded[0].item()
        high = low + (recorded[1].item() - low) / (rise or 1)
        yield name, triangle_guidance(low, high, len(recorded), periods)[None], io[name]
    high, low, T = numbers(info["guider_apply"])[:3]
    uncond, cond = rearrange(io["guider_x"], "(u b t) ... -> u b t ...", u=2, t=int(T))
    scale = linear_guidance(low, high, int(T))[:, None, None, None]
    yield "guider_apply", Estimate(uncond, cond).guided(scale).flatten(0, 1), io["guider_apply_out"]


def filter_checks(info: dict[str, Any], io: Tensors) -> Iterator[Check]:
    freq = info["freq"]
    order, spatial, temporal = freq["n"], freq["d_s"], freq["d_t"]
    shape3, shape4 = freq["shape3"][2:], freq["shape4"][2:]
    for name in (n for n in io if n.startswith("lpf_")):
        kind: Any = name.split("_")[1]
        if name == "lpf_butterworth_aniso_out":
            n, d_s, d_t = numbers(freq["aniso"])
            ours = low_pass(shape3, kind, int(n), d_s, d_t)
        elif kind == "4d":
            ours = low_pass(shape4, "butterworth", order, spatial, temporal)
        else:
            ours = low_pass(shape3, kind, order, spatial, temporal)
        yield name, ours, io[name]
    for name, shape in (("mix3", shape3), ("mix4", shape4)):
        mask = low_pass(shape, "butterworth", order, spatial, temporal)
        ours = mix_frequencies(io[f"{name}_x"], io[f"{name}_noise"], mask, range(-len(shape), 0))
        yield name, ours, io[f"{name}_out"]


# -- preprocessing ---------------------------------------------------------------------------------------


def preprocess_checks(folder: Path, info: dict[str, Any]) -> Iterator[Check]:
    for name, case in info["cases"].items():
        with Image.open(folder / f"{name}_in.png") as given, Image.open(folder / f"{name}_out.png") as made:
            recorded = torch.from_numpy(np.asarray(made.convert("RGB")).astype(np.float32))
            ours = frame_picture(given.convert("RGBA"), case["image_frame_ratio"], case["video"], len(recorded))
        yield name, torch.from_numpy(ours.astype(np.float32)), recorded


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
