// How wide the vectors of all loops are: one switch, for tests of what older processors run.

#include "vector.h"

#include <torch/library.h>

#include <algorithm>
#include <utility>

namespace {

// Let vectors have at most `most` lanes from now on; return how many they had at most before.
int64_t limit_lanes(int64_t most) {
  TORCH_CHECK(most >= 4, "most must be at least 4; got ", most);
  return std::exchange(las::most_lanes, int(std::min<int64_t>(most, las::width_of_processor())));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(las_fast, m) { m.def("limit_lanes(int most) -> int", &limit_lanes); }
