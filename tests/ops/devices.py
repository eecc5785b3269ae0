"""Where the operators are tested: on the GPU where there is one; the matrix of all operators on the CPU beside it."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DEVICES = ["cpu"] if DEVICE == "cpu" else ["cpu", DEVICE]
