"""The rows of the operator test matrix, one module an operator; a new operator adds its module here."""

from operator_cases import contrastive, holes, losses, norm, propagate, uncertainty, warp
from operator_cases.case import LAYOUTS, TOLERANCE, Case, differentiate, spread

CASES = [*warp.CASES, *propagate.CASES, *holes.CASES, *uncertainty.CASES, *contrastive.CASES, *losses.CASES, *norm.CASES]

__all__ = ["CASES", "LAYOUTS", "TOLERANCE", "Case", "differentiate", "spread"]
