// Limits on the instructions in use, for tests of what other processors run.

#include "vector.h"

#include <torch/library.h>

#include <algorithm>
#include <utility>

#include "amx.h"

namespace {

// Limit vectors to `max_lanes` lanes from now on; return the previous limit.
int64_t limit_lanes(int64_t max_lanes) {
  TORCH_CHECK(max_lanes >= 4, "max_lanes must be at least 4; got ", max_lanes);
  return std::exchange(las::max_lanes, int(std::min<int64_t>(max_lanes, las::processor_lanes())));
}

// Allow AMX or not from now on; return whether it was allowed.
bool allow_tiles(bool allowed) { return std::exchange(las::tiles_allowed, allowed); }

}  // namespace

TORCH_LIBRARY_FRAGMENT(las_fast, m) {
  m.def("limit_lanes(int max_lanes) -> int", &limit_lanes);
  m.def("allow_tiles(bool allowed) -> bool", &allow_tiles);
  m.def("has_tiles() -> bool", &las::has_tiles);
}
