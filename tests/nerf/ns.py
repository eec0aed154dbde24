"""`python ns.py train …` is `ns-train …`, also beside a CPU build of torch that torchvision was not built for."""

import sys

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:  # its compiled operators are missing; nothing here calls them, they only have to have a name
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

if __name__ == "__main__":
    import importlib

    name = sys.argv.pop(1)
    module = importlib.import_module(
        {"viewer": "nerfstudio.scripts.viewer.run_viewer"}.get(name, f"nerfstudio.scripts.{name}")
    )
    module.entrypoint()
