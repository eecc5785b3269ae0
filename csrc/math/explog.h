// exp and log as plain arithmetic: unlike the C library's, loops over them become vector code on every machine.
//
// float: within 2 units in the last place. double uses the C library.
#pragma once

#include <bit>
#include <limits>

#include "math/common.h"

namespace spss {

// For x <= 88; below -87, where results would be denormal, 0. NaN stays NaN.
SPSS_HD float fast_exp(float x) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer in the lowest bits
  const float biased = x * 1.44269504f + kRound, n = biased - kRound;
  const float r = x - n * 0.693359375f - n * -2.12194440e-4f;  // ln 2 in two parts: the first product is exact
  float y = 1.f / 5040;
  y = y * r + 1.f / 720;
  y = y * r + 1.f / 120;
  y = y * r + 1.f / 24;
  y = y * r + 1.f / 6;
  y = y * r + 0.5f;
  y = y * (r * r) + r + 1.f;
  const uint32_t exponent = std::bit_cast<uint32_t>(biased) - std::bit_cast<uint32_t>(kRound) + 127u;
  y *= std::bit_cast<float>(exponent << 23);
  return x < -87.f ? 0.f : y;
}

// For positive normal x; NaN for all x that are not positive.
SPSS_HD float fast_log(float x) {
  constexpr uint32_t kSqrtHalf = 0x3f3504f3u;
  const uint32_t bits = std::bit_cast<uint32_t>(x), above = bits - kSqrtHalf;
  const int32_t exponent = static_cast<int32_t>(above) >> 23;
  const float m = std::bit_cast<float>((above & 0x007fffffu) + kSqrtHalf);  // in [sqrt(1/2), sqrt(2))
  const float e = static_cast<float>(exponent), f = m - 1.f;
  const float s = f / (2.f + f), z = s * s;  // log m = 2 atanh s
  float y = 2.f / 11;
  y = y * z + 2.f / 9;
  y = y * z + 2.f / 7;
  y = y * z + 2.f / 5;
  y = y * z + 2.f / 3;
  const float h = 0.5f * f * f;  // 2 s = f - s f, and so on, keeps the leading term f exact
  y = e * -2.12194440e-4f + (s * (h + z * y) - h) + f;
  y += e * 0.693359375f;
  return x > 0.f ? y : std::numeric_limits<float>::quiet_NaN();
}

SPSS_HD double fast_exp(double x) { return ::exp(x); }
SPSS_HD double fast_log(double x) { return ::log(x); }

}  // namespace spss
