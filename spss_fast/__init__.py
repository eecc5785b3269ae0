"""spss_fast: self-paced sample selection for barely-supervised 3-D medical image segmentation, fast."""

__version__ = "0.1.0"
