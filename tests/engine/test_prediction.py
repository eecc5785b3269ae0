"""From probabilities to label maps on the file's grid, and whole scans with a network whose answer is known."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from spss_fast.config import resolve
from spss_fast.data.geometry import Grid, oriented, resample, to_image
from spss_fast.data.layouts import Case
from spss_fast.engine import prediction
from spss_fast.engine.prediction import Options, decide, keep_largest_components, segment
from spss_fast.engine.weights import build_network
from tests.data.test_preparation import dice, read_file_order, synthetic_ct
from tests.data.writing import KITS, write_h5, write_image
from tests.engine.thresholding import thresholding_weights


def _probabilities(shape, classes, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(classes, *shape, generator=generator).mul(2).softmax(0)


@pytest.mark.parametrize("classes", [2, 4])
def test_on_the_same_grid_it_is_argmax(classes):
    probability, grid = _probabilities((7, 6, 5), classes), Grid((7, 6, 5))
    result = decide(probability, grid, grid, True, True)
    np.testing.assert_array_equal(result.label, probability.argmax(0).numpy())
    assert result.label.dtype == np.uint8 and sorted(result.probabilities) == list(range(1, classes))
    np.testing.assert_array_equal(result.probabilities[1], probability[1].numpy())
    expected = -(probability.double() * probability.double().log()).sum(0).numpy()
    np.testing.assert_allclose(result.entropy, expected, atol=1e-5)
    assert result.entropy.dtype == np.float32


def test_beyond_the_crop_it_is_certain_background():
    source = Grid((10, 10, 10), (0.5, 2.0, 3.0))
    grid = source.cropped((2, 3, 4), (4, 4, 4))
    result = decide(torch.stack([torch.full((4, 4, 4), 0.2), torch.full((4, 4, 4), 0.8)]), grid, source, True, True)
    inside = np.zeros(source.size, bool)
    inside[2:6, 3:7, 4:8] = True
    np.testing.assert_array_equal(result.label, inside)
    assert (result.entropy[~inside] == 0).all() and (result.probabilities[1][~inside] == 0).all()
    assert result.entropy[inside] == pytest.approx(0.5004, abs=1e-4)
    assert result.volume_ml() == pytest.approx(64 * 3 / 1000)  # a voxel has 3 mm3


def test_borders_are_smooth_between_the_coarse_voxels():
    """A ball known at 4 mm by its soft edge: at 1 mm its labels are rounder than enlarged 4 mm labels could be."""
    fine, coarse = Grid((64, 64, 64)), Grid((64, 64, 64)).resized((16, 16, 16))

    def ball(grid):
        axes = np.meshgrid(*map(np.arange, grid.size), indexing="ij")
        points = [axis * grid.spacing[0] + grid.origin[0] - 31.5 for axis in axes]
        return np.sqrt(sum(point**2 for point in points)) - 20

    probability = torch.from_numpy(1 / (1 + np.exp(ball(coarse) / 4))).float()
    result = decide(torch.stack([1 - probability, probability]), coarse, fine)
    blocky = resample((probability > 0.5).numpy().astype(np.uint8), coarse, fine, linear=False)
    truth = ball(fine) < 0
    assert dice(result.label, truth) > 0.985 > 0.95 > dice(blocky, truth)


def test_a_file_with_coarse_first_axis_averages_along_the_right_one():
    """The file's slices come first, 6 mm apart; the prepared grid has them last, 2 mm apart."""
    source = Grid.of(to_image(np.zeros((5, 12, 12), np.uint8), Grid((5, 12, 12), (6.0, 2.0, 2.0), (0, 0, 0), KITS)))
    _, turned = oriented(np.zeros(source.size, np.uint8), source)
    grid = turned.resized((12, 12, 15))
    checkers = torch.zeros(12, 12, 15)
    checkers[::2] = 1  # stripes of 2 mm within a slice, which averaging in plane would blur away
    result = decide(torch.stack([1 - checkers, checkers]), grid, source)
    expected = np.zeros(turned.size, np.uint8)
    expected[::2] = 1
    back, _ = oriented(result.label, source)
    np.testing.assert_array_equal(back, expected)


def test_largest_component_of_each_class():
    label = np.zeros((12, 6, 6), np.uint8)
    label[:3, :3, :3], label[5:7, :2, :2], label[9:, 4:, 4:] = 1, 1, 2
    label[3, 3, 3] = 1  # touches by a corner only
    label[8, 0, 0] = 2
    kept = np.zeros_like(label)
    kept[:3, :3, :3], kept[9:, 4:, 4:] = 1, 2
    keep_largest_components(label)
    np.testing.assert_array_equal(label, kept)
    empty = np.zeros((3, 3, 3), np.uint8)
    keep_largest_components(empty)
    assert not empty.any()


def test_components_of_a_class_are_not_joined_by_another():
    label = np.array([1, 1, 2, 1, 2, 2], np.uint8)[:, None, None]
    keep_largest_components(label)
    assert label.ravel().tolist() == [1, 1, 0, 0, 2, 2]


def _config(preset="la", **flags):
    return resolve(preset, {"patch": (48, 48, 32), "amp": "off", "device": "cpu"} | flags)


def test_a_real_mr_scan_is_thresholded_voxel_by_voxel(scans):
    """No crop, no resampling, identity orientation: what the network says is what the file gets."""
    path = scans("la_raw") / "06SR5RBREL16DQ6M8LWS" / "lgemri.nrrd"
    network = build_network(thresholding_weights(0.5, 1.5), "here")
    result = segment(network, Case("x", path, None, "la_raw"), _config().data, Options(0), entropy=True)
    image = read_file_order(path).astype(np.float64)
    z = (image - image.mean()) / image.std()
    clear = np.minimum(abs(z - 0.5), abs(z - 1.5)) > 1e-3
    np.testing.assert_array_equal(result.label[clear], np.digitize(z, (0.5, 1.5))[clear])
    # most uncertain at the thresholds
    assert result.entropy[abs(z - 0.5) < 0.05].min() > 0.6 > 0.1 > result.entropy[z < 0].max()


def test_odd_orientation_of_kits(scans, tmp_path):
    """A real KiTS19 label map, slices first, with a synthesised CT: kidneys are found where they are in the file."""
    source = scans("kits19") / "case_00017" / "segmentation.nii.gz"
    thinned = sitk.ReadImage(str(source))[:, ::2, ::2]  # for speed; its geometry stays as odd
    sitk.WriteImage(thinned, str(tmp_path / "label.nii"))
    label = read_file_order(tmp_path / "label.nii")
    image = sitk.GetImageFromArray(synthetic_ct(label).transpose(2, 1, 0))
    image.CopyInformation(thinned)
    sitk.WriteImage(image, str(tmp_path / "ct.nii"))
    # between a body of 40 HU and kidneys of 150 HU; the z-score of either depends on how much air there is
    config = _config("kits", resample=(96, 96, 32))
    network = build_network(thresholding_weights(1.3), "here")
    result = segment(network, Case("x", tmp_path / "ct.nii", None, "image"), config.data, Options(0.25))
    assert result.label.shape == label.shape == (97, 256, 256)
    assert result.grid == Grid.of(image)
    assert dice(result.label, (label == 1).astype(np.uint8)) > 0.9


def test_hdf5_scans_are_taken_as_prepared(tmp_path):
    image = np.random.default_rng(0).normal(size=(20, 24, 10)).astype(np.float32)
    write_h5(tmp_path / "x.h5", image=image)
    network = build_network(thresholding_weights(0.5), "here")
    config = _config("kits", resample="none")  # a window would clip everything
    result = segment(network, Case("x", tmp_path / "x.h5", None, "h5"), config.data, Options())
    z = (image - image.mean()) / image.std()
    clear = abs(z - 0.5) > 1e-3
    np.testing.assert_array_equal(result.label[clear], (z > 0.5)[clear])


def test_mirroring_and_the_largest_component_reach_the_scan(tmp_path):
    image = np.zeros((40, 40, 20), np.int16)
    image[4:20, 4:20, 4:16], image[30:34, 30:34, 8:12] = 100, 100
    write_image(tmp_path / "x.mha", image)
    network = build_network(thresholding_weights(1.0), "here")
    options = Options(mirror=True, largest_component=True)
    result = segment(network, Case("x", tmp_path / "x.mha", None, "image"), _config().data, options)
    expected = np.zeros_like(image)
    expected[4:20, 4:20, 4:16] = 1
    np.testing.assert_array_equal(result.label, expected)


def test_classes_get_the_label_values_that_name_them(tmp_path):
    image = np.zeros((40, 40, 20), np.int16)
    image[4:20, 4:20, 4:16], image[24:36, 24:36, 4:16] = 60, 200
    write_image(tmp_path / "x.mha", image)
    network = build_network(thresholding_weights(0.5, 2.0), "here")
    result = segment(network, Case("x", tmp_path / "x.mha", None, "image"), _config(classes="7,3").data, Options(0))
    np.testing.assert_array_equal(result.label, np.select([image == 60, image == 200], [7, 3]))


def test_options_and_the_plane_reach_the_windows(tmp_path, monkeypatch):
    write_image(tmp_path / "x.mha", np.random.default_rng(0).normal(size=(20, 22, 10)))
    given, window = {}, prediction.sliding_window

    def watched(network, image, patch, stride, amp, tiles, **options):
        given.update(options, shape=tuple(image.shape), stride=stride, amp=amp, tiles=tiles)
        return window(network, image, patch, stride, amp, tiles, **options)

    monkeypatch.setattr(prediction, "sliding_window", watched)
    network = build_network(thresholding_weights(1.0), "here")
    options = Options(0.75, tiles=2, amp=torch.bfloat16, statistics="case")
    segment(network, Case("x", tmp_path / "x.mha", None, "image"), _config(plane="coronal").data, options)
    assert given == {"shape": (20, 10, 22), "stride": (12, 12, 8), "amp": torch.bfloat16, "tiles": 2, "gaussian": True,
                     "mirror": False, "statistics": "case"}
