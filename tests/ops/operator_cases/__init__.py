"""The rows of the operator test matrix, one module an operator; a new operator adds its module here."""

from operator_cases import activation, contrastive, convolution, holes, losses, norm, propagate, uncertainty, warp
from operator_cases.case import LAYOUTS, TOLERANCE, Case, differentiate, spread

MODULES = (warp, propagate, holes, uncertainty, contrastive, losses, norm, activation, convolution)
CASES = [case for module in MODULES for case in module.CASES]

__all__ = ["CASES", "LAYOUTS", "TOLERANCE", "Case", "differentiate", "spread"]
