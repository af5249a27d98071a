// A limit on the width of all vectors, for tests of what older processors run.

#include "vector.h"

#include <torch/library.h>

#include <algorithm>
#include <utility>

namespace {

// Limit vectors to `most` lanes from now on; return the previous limit.
int64_t limit_lanes(int64_t most) {
  TORCH_CHECK(most >= 4, "most must be at least 4; got ", most);
  return std::exchange(las::max_lanes, int(std::min<int64_t>(most, las::processor_lanes())));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(las_fast, m) { m.def("limit_lanes(int most) -> int", &limit_lanes); }
