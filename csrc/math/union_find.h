// Union-find over names 0, 1, ... for a team of threads that unite and look up at once. `parent` holds a lower name of the
// same set for every name but the lowest, which holds its own: the root.
#pragma once

#include "math/common.h"

namespace spss {

// Halves the way for those who follow. Whatever others do meanwhile, what is written is a name of the same set, and lower
// than the one it is written to.
SPSS_HD int find_root(volatile int* parent, int name) {
  for (;;) {
    const int up = parent[name];
    if (up == name) return name;
    const int above = parent[up];
    if (above == up) return up;
    parent[name] = above;
    name = above;
  }
}

// Only roots are relinked, and always downwards; team.minimum(address, value) is an atomic minimum that returns what was
// there.
template <typename Team>
SPSS_HD void unite(const Team& team, int* parent, int a, int b) {
  for (;;) {
    a = find_root(parent, a);
    b = find_root(parent, b);
    if (a == b) return;
    const int high = a > b ? a : b, low = a > b ? b : a;
    const int old = team.minimum(parent + high, low);
    if (old == high) return;
    a = old;
    b = low;
  }
}

}  // namespace spss
