"""The volumes of a run, and what is recorded of them."""

import numpy as np
import pytest
from rich.console import Console

from spss_fast.data.dataset import load
from tests.data.writing import ball, settings_of, write_image

TURNED = (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, -1.0)  # by half about the axis to the back


@pytest.mark.parametrize("flags", [{}, {"body_crop": True}, {"resample": (32, 32, 20)}, {"resample": (32, 32, 60)}])
@pytest.mark.parametrize("plane", ["axial", "sagittal"])
def test_recorded_slices_of_the_files_are_those_that_annotations_take(tmp_path, plane, flags):
    """Of a scan that is prepared the other way round, cropped and resampled, the annotated slice, named in a CSV, is
    again the annotated slice, and has its number."""
    data = tmp_path / "data"
    for i, name in enumerate("abc"):
        image, label = np.zeros((2, 40, 40, 40), np.uint8)
        image[2:38, 2:38, 5:29], label[2:38, 2:38, 5:29] = ball((36, 36, 24), i)
        write_image(data / name / "imaging.nii.gz", image, direction=TURNED)
        write_image(data / name / "segmentation.nii.gz", label, direction=TURNED)
    given = {"data_dir": str(data), "n_labeled": 2, "n_test": 0, "batch_unlabeled": 1, "plane": plane,
             "patch": (16, 16, 16), **flags}

    def recorded(**more):
        return load(settings_of("folder", tmp_path, **given, **more), Console(quiet=True)).describe()

    drawn = recorded()
    assert drawn["annotated_in_file"] != drawn["annotated"]
    lines = [f"{name},{index}\n" for name, index in drawn["annotated_in_file"].items()]
    (tmp_path / "slices.csv").write_text("case,slice\n" + "".join(lines))
    named = recorded(annotations=str(tmp_path / "slices.csv"))
    assert named["annotated_in_file"] == drawn["annotated_in_file"]
    if flags.get("resample", (0, 0, 0))[2] <= 20:  # of more slices than the file has, some are the same one there
        assert named["annotated"] == drawn["annotated"]
