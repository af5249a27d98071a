// A limit on the width of all vectors, for tests of what older processors run.

#include "vector.h"

#include <torch/library.h>

#include <algorithm>
#include <utility>

namespace {

// Limit vectors to `max_lanes` lanes from now on; return the previous limit.
int64_t limit_lanes(int64_t max_lanes) {
  TORCH_CHECK(max_lanes >= 4, "max_lanes must be at least 4; got ", max_lanes);
  return std::exchange(las::max_lanes, int(std::min<int64_t>(max_lanes, las::processor_lanes())));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(las_fast, m) { m.def("limit_lanes(int max_lanes) -> int", &limit_lanes); }
