"""benchmarks/parity.py on the recordings of the reference, and on recordings of other sizes made here."""

import importlib.util
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from einops import rearrange

from d2.fileio import read_json, read_tensors, write_json, write_tensors
from d2.models.unet import UNetConfig, VideoUNet
from d2.schedule import edm_sigmas

ROOT = Path(__file__).parents[1]


@pytest.fixture
def fixtures():
    folder = Path(os.environ.get("D2_SHARED", ROOT.parent / "shared")) / "fixtures"
    if not folder.is_dir():
        pytest.skip(f"no recordings in {folder} (set D2_SHARED)")
    return folder


@pytest.fixture(scope="module")
def parity():
    spec = importlib.util.spec_from_file_location("parity", ROOT / "benchmarks" / "parity.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_recorded_output_of_the_reference_is_met(fixtures, parity, capsys):
    assert parity.main([str(fixtures / "stage1"), str(fixtures / "preprocess")]) == 0
    checks = lines(capsys)
    assert all(check["ok"] for check in checks)
    assert all(check["max_rel_err"] <= 1e-5 for check in checks if not check["check"].startswith("preprocess"))
    for part in (
        "unet_svd/raw",
        "unet_sv3d/guided_hi",
        "vae/decode_chunked",
        "clip_image/embed",
        "pieces/mix4",
    ):
        assert part in {check["check"] for check in checks}
    assert sum("/state_" in check["check"] for check in checks) == 75


@pytest.mark.parametrize("name", ["unet_svd", "vae", "clip_image", "pieces", "joint"])
def test_a_recording_that_is_off_is_found(fixtures, parity, capsys, tmp_path, name):
    for file in (fixtures / "stage1").glob(f"{name}.*"):
        shutil.copyfile(file, tmp_path / file.name)
    path = tmp_path / f"{name}.io.safetensors"
    tensors, _ = read_tensors(path)
    outputs = [k for k in tensors if k.endswith(("out", "out_cfg", "out_iter2"))]
    tensors[outputs[-1]] = tensors[outputs[-1]] + 1e-3 * tensors[outputs[-1]].abs().max().clamp(min=1)
    write_tensors(path, tensors)
    assert parity.main([str(tmp_path)]) == 1
    assert sum(not check["ok"] for check in lines(capsys)) == 1


def test_an_unknown_recording_and_an_empty_folder_are_not_passed_over(parity, capsys, tmp_path):
    assert parity.main([str(tmp_path)]) == 1
    write_json(tmp_path / "strange.json", {"kind": "Something"})
    write_tensors(tmp_path / "strange.io.safetensors", {"a": torch.zeros(1)})
    assert parity.main([str(tmp_path)]) == 1
    (check,) = lines(capsys)
    assert check["ok"] is False


def recorded_joint(V, F, steps):
    """The joint loop of the reference written out for one run, with the closed-form network."""
    coef = {
        "sv3d": {"a": 0.5, "m": -0.2, "d": 0.1, "p": 0.3, "v": 0.4, "c": -0.5, "n": 0.03},
        "svd": {"a": 0.4, "m": 0.1, "d": -0.2, "p": -0.2, "v": -0.3, "c": 0.6, "n": -0.05},
    }
    shape = 4, 2, 3
    io = {"x0": torch.randn(V, F, *shape) * 700, "noise": torch.randn(min(10, steps), V, F, *shape)}
    for net, width, T, N in (("sv3d", 5, V, F), ("svd", 6, F, V)):
        io[f"{net}_concat"] = torch.randn(N * T, *shape)
        io[f"{net}_crossattn"] = torch.randn(N * T, 1, 3)
        io[f"{net}_vector"] = torch.randn(N * T, width)
    io["sigmas"] = edm_sigmas(steps)

    def estimate(net, lines_, sigma, conditional):  # lines_ [N, T, C, h, w]
        k, T = coef[net], lines_.shape[1]
        x = lines_ / math.sqrt(1 + sigma**2)
        on = float(conditional)
        concat, token, vector = (
            rearrange(io[f"{net}_{name}"], "(n t) ... -> n t ...", t=T) for name in ("concat", "crossattn", "vector")
        )
        level = k["v"] * vector.mean(-1) + on * k["c"] * token.mean((-2, -1)) + k["n"] * 0.25 * math.log(sigma)
        out = k["a"] * x + k["m"] * x.mean(1, keepdim=True) + k["d"] * x.roll(1, 1) + on * k["p"] * concat
        out = out + level[..., None, None, None]
        return lines_ / (1 + sigma**2) - sigma / math.sqrt(1 + sigma**2) * out

    azimuth = torch.linspace(0, 2 * math.pi, V + 1)[1:]
    vw = (1 - 0.75 * azimuth.sin() ** 2)[:, None, None, None, None]
    scale = torch.linspace(1.2, 2.8, F)[None, :, None, None, None]
    x, states = io["x0"], []
    for i in range(steps):
        sigma, after = io["sigmas"][i].item(), io["sigmas"][i + 1].item()
        s = 0.2 + (math.cos(math.pi * i / (steps - 1)) + 1) / 2 * (0.9 - 0.2)
        for j in range(2 if i < 10 else 1):
            columns = x.transpose(0, 1)
            u3, c3 = (estimate("sv3d", columns, sigma, on).transpose(0, 1) for on in (False, True))
            cs = estimate("svd", x, sigma, True)  # its unconditional estimate is replaced by the view model's
            d3, ds = u3 + 2.0 * (c3 - u3), u3 + scale * (cs - u3)
            D = (1 - vw + vw * s) * d3 + vw * (1 - s) * ds
            x = x + (after - sigma) * (x - D) / sigma
            if j == 0 and i < 10:
                x = x - (after - sigma) * io["noise"][i]
            states.append(x)
    io["trace"] = torch.stack(states)
    run = {
        "V": V, "F": F, "num_steps": steps, "sv3d_scale": 0.6, "scale_min": 0.2, "scale_max": 0.9,
        "schedule": "cosine", "scale_k": 15.0, "uc_type": "sv3d", "svd_cfg_warmup": False,
        "svd_only_from": None,
        "svd_guider": {"min": 1.2, "max": 2.8}, "sv3d_guider": {"min": 2.0, "max": 2.0},
        "trace_indices": list(range(len(states))),
    }  # fmt: skip
    return {"coef": coef, "runs": {"other": run}}, {f"other.{k}": v for k, v in io.items()}


@pytest.mark.parametrize(("V", "F", "steps"), [(3, 2, 14), (7, 5, 6), (2, 9, 12)])
def test_the_joint_loop_equals_the_loop_written_out_at_any_size(parity, capsys, tmp_path, V, F, steps):
    torch.manual_seed(V)
    info, io = recorded_joint(V, F, steps)
    write_json(tmp_path / "joint.json", info)
    write_tensors(tmp_path / "joint.io.safetensors", io)
    assert parity.main([str(tmp_path)]) == 0
    assert len(lines(capsys)) == 1 + steps + min(10, steps)


def test_a_network_of_another_size_is_replayed_from_its_description(fixtures, parity, capsys, tmp_path):
    info = read_json(fixtures / "stage1" / "unet_svd.json")
    config = {
        "model_channels": 64,
        "channel_mult": [1, 2, 2],
        "attention_resolutions": [2],
        "context_dim": 20,
    }
    info["config"] |= config | {"num_res_blocks": 2, "num_head_channels": 32, "adm_in_channels": 12}
    B, T, size = 1, 3, (8, 4)
    info |= {"B": B, "T": T, "H": size[0], "W": size[1], "sigmas": {"only": 2.0}}
    torch.manual_seed(0)
    unet = VideoUNet(parity.configured(UNetConfig, info["config"])).eval().requires_grad_(False)
    x, context, y = torch.randn(2 * T, 8, *size), torch.randn(2 * T, 1, 20), torch.randn(2 * T, 12)
    steps = torch.linspace(0, 1, 2 * T)
    io = {"unet_x": x, "unet_timesteps": steps, "unet_context": context, "unet_y": y}
    io["unet_out"] = unet(x, steps, unet.project_context(context[:, 0], T), y, T)
    io["guider_scale"] = torch.linspace(1.5, 3.0, T)[None]
    io |= {
        "den_x": x[:T, :4],
        "den_c_concat": x[T:, :4],
        "den_c_crossattn": context[:T],
        "den_c_vector": y[:T],
    }
    sigma = 2.0
    scaled, c_noise = io["den_x"] * math.sqrt(1 + sigma**2), torch.full((T,), math.log(sigma) / 4)
    halves = []
    for on in (0.0, 1.0):
        inputs = torch.cat([scaled / math.sqrt(1 + sigma**2), on * io["den_c_concat"]], 1)
        tokens = unet.project_context(on * context[:T, 0], T)
        out = unet(inputs, c_noise, tokens, y[:T], T)
        halves.append(scaled / (1 + sigma**2) - sigma / math.sqrt(1 + sigma**2) * out)
    io["den_only_out_uc"] = torch.cat(halves)
    io["den_only_out_cfg"] = halves[0] + io["guider_scale"][0][:, None, None, None] * (halves[1] - halves[0])
    write_json(tmp_path / "unet_svd.json", info)
    write_tensors(tmp_path / "unet_svd.io.safetensors", {k: v.clone() for k, v in io.items()})
    write_tensors(tmp_path / "unet_svd.weights.safetensors", unet.state_dict())
    assert parity.main([str(tmp_path)]) == 0
    assert [check["check"] for check in lines(capsys)] == [
        f"unet_svd/{name}" for name in ("raw", "guidance", "denoised_only", "guided_only")
    ]
