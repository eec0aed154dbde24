import numpy as np
import pytest

from d2 import images
from d2.errors import InputError
from d2.matrix import ImageMatrix, cell_path


@pytest.fixture
def folder(tmp_path):
    for v in range(2):
        for f in range(3):
            images.write_png(tmp_path / cell_path(v, f), np.full((4, 6, 4), (100, 0, 50 * v, 128 * (f > 0)), np.uint8))
    return tmp_path


def test_cells_are_rgba_of_one_size(folder):
    matrix = ImageMatrix(folder, 2, 3)
    assert (matrix.width, matrix.height) == (6, 4)
    assert matrix[1, 2].shape == (4, 6, 4) and tuple(matrix[1, 2][0, 0]) == (100, 0, 50, 128)


def test_tensor_composites_on_a_grey_level_in_the_order_asked_for(folder):
    tensor = ImageMatrix(folder, 2, 3).tensor([1, 0], [2, 0], background=0.5)
    assert tuple(tensor.shape) == (2, 2, 3, 4, 6)
    a = 128 / 255
    expected = np.array([100, 0, 50]) / 255 * a + 0.5 * (1 - a)
    np.testing.assert_allclose(tensor[0, 0, :, 0, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(tensor[1, 1], 0.5)


def test_opening_names_the_first_three_cells_that_are_missing(folder):
    for f in range(3):
        (folder / cell_path(1, f)).unlink()
    (folder / cell_path(0, 2)).unlink()
    with pytest.raises(InputError, match=r"4 of 6 .* view 0 frame 2, view 1 frame 0, view 1 frame 1$"):
        ImageMatrix(folder, 2, 3)


def test_opening_names_a_cell_of_another_size(folder):
    images.write_png(folder / cell_path(1, 1), np.zeros((6, 4, 3), np.uint8))
    with pytest.raises(InputError, match=r"1 of 6 images are not 6×4 .* view 1 frame 1"):
        ImageMatrix(folder, 2, 3)


def test_a_damaged_cell_is_named_when_it_is_read(folder):
    path = folder / cell_path(0, 1)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"v00/f001\.png"):
        ImageMatrix(folder, 2, 3)[0, 1]


def test_a_matrix_without_cells_is_refused(tmp_path):
    with pytest.raises(InputError, match="0 views"):
        ImageMatrix(tmp_path, 0, 3)
