// The per-voxel arithmetic of softmax, entropy and Dice.
#pragma once

#include "math/explog.h"

namespace spss {

constexpr double kEntropyEpsilon = 1e-6;
constexpr double kDiceSmooth = 1e-5;

// Softmax of two logits: the larger one has exponential 1. Infinite logits give NaN, as in the plain formula.
template <class T>
SPSS_HD void softmax_of_two(T a, T b, T& p, T& q, T& top, T& sum) {
  const bool first = a >= b;
  top = first ? a : b;
  const T small = fast_exp((first ? b : a) - top + (top - top));
  sum = T(1) + small;
  const T p_top = T(1) / sum, p_small = small * p_top;
  p = first ? p_top : p_small;
  q = first ? p_small : p_top;
}

// One class's term of the entropy -sum_c p_c log(p_c + 1e-6).
template <class T>
SPSS_HD T entropy_term(T p) {
  return -(p * fast_log(p + T(kEntropyEpsilon)));
}

// 1 - Dice of one class, and its two slopes: d(1 - Dice)/dp = hit [voxel is of the class] + size p.
struct DiceSlope {
  double hit, size;
};

SPSS_HD double dice_loss(double intersection, double total) {
  return 1 - (2 * intersection + kDiceSmooth) / (total + kDiceSmooth);
}

SPSS_HD DiceSlope dice_slope(double intersection, double total, double upstream) {
  const double whole = total + kDiceSmooth;
  return {-2 / whole * upstream, 2 * (2 * intersection + kDiceSmooth) / (whole * whole) * upstream};
}

}  // namespace spss
