import numpy as np
import torch

from d2.recon import dataset


def test_tiny_dataset_loads_with_its_views_times_and_masks(tiny_dataset):
    train, test = dataset.load(tiny_dataset), dataset.load(tiny_dataset, "test")
    assert (len(train), len(train.views.unique()), train.frames, train.has_alpha) == (24, 6, 4, True)
    assert (len(test), len(test.views.unique()), test.frames) == (3, 3, 1)


def test_pictures_agree_with_cameras_and_times(tiny_dataset):
    """The centre of either ball projects into an opaque pixel whose colour is that of the normal facing the camera."""
    data = dataset.load(tiny_dataset)
    for k in range(len(data)):
        for centre in ([0.0, 0.0, -0.2], [0.8 * float(data.times[k]) - 0.4, 0.0, 0.4]):
            seen = data.viewmats[k] @ torch.tensor([*centre, 1.0])
            x, y, _ = (data.Ks[k] @ seen[:3] / seen[2]).tolist()
            assert data.images[k, int(y), int(x), 3] == 255
    facing = data.images[data.times == 0][:, 18, 16, :3].float() / 255  # the still ball is near every centre
    back = -data.viewmats[data.times == 0][:, 2, :3]
    assert np.abs((facing - (0.5 + 0.4 * back)).numpy()).max() < 0.25
