"""The preview's picture: what its rows and pictures are called."""

import torch

from spss_fast.data.sampling import Batch
from spss_fast.engine import preview
from spss_fast.engine.step import Outputs


def test_every_row_names_its_case_and_slice(tmp_path, monkeypatch):
    figures = []

    class Figure(preview.Figure):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            figures.append(self)

    monkeypatch.setattr(preview, "Figure", Figure)
    image, label = torch.rand(3, 1, 16, 16, 16), torch.zeros(2, 16, 16, 16, dtype=torch.uint8)
    batch = Batch(["a_$1", "b$", "c"], image, image, image, label[..., 0], torch.tensor([4, 8]), None)
    outputs = Outputs({}, label, label, label, image, torch.zeros(3, 16, 16, 16, dtype=torch.bool))
    preview.save_preview(tmp_path / "1.png", batch, outputs, 1, (0, 1))
    named = [[text.get_text() for text in axis.texts] for axis in figures[0].axes]
    assert named[::4] == [["a_$1"]] * 3 + [["b$"]] * 3 and not any(names for names in named if names not in named[::4])
    titles = [axis.get_title() for axis in figures[0].axes[::4]]
    assert titles[:3] == [f"registration, patch slice {z}" for z in ("2", "4 (annotated)", "9")]
    assert (tmp_path / "1.png").stat().st_size > 0
