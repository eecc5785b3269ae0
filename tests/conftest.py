"""What tests share: the folder of real scans and reference vectors beside the checkout, where there is one."""

import contextlib
import locale
import os
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: its kernels then run on CPU tensors

with contextlib.suppress(ImportError):  # the modules that use it say that it is missing
    import hypothesis

    # how fast a machine is, or an emulator, is nothing that a test should find
    hypothesis.settings.register_profile(
        "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("any machine")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Whichever tests ran before, so that one that fails does so on its own as well."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def locale_as_before():
    """Writing DICOM files, which only tests do, leaves the process in the locale C, where text files are ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


@pytest.fixture
def vectors():
    """Loads one file of reference vectors as a dictionary of tensors: ``vectors("warp")``."""

    def load(name: str) -> dict[str, torch.Tensor]:
        path = SHARED / "vectors" / f"{name}.npz"
        if not path.exists():
            pytest.skip(f"reference vectors are absent: {path.name} is not in ../shared/vectors")
        with np.load(path) as archive:
            return {key: torch.from_numpy(np.asarray(archive[key])) for key in archive.files
                    if archive[key].dtype.kind in "biuf"}

    return load


@pytest.fixture
def scans():
    """The folder of a real data set: ``scans("la_raw")``."""

    def find(name: str) -> Path:
        path = SHARED / "data" / name
        if not path.is_dir():
            pytest.skip(f"real scans are absent: ../shared/data/{name}")
        return path

    return find
