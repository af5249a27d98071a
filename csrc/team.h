// Threads that compute a recurrence together. Each has some rows for the work per row. A matmul by large weights is
// shared: each thread takes some columns for all rows, so that the weights are read once instead of once per thread.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "matmul.h"
#include "memory.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace las {

constexpr int64_t MIN_SHARED_PANELS = 4;  // per thread; with fewer, waiting takes longer than reading the weights

// A thread of a team, and its rows [begin, begin + count) of all.
struct TeamMember {
  int64_t rank, size, rows;
  bool shares;  // the matmuls

  int64_t begin() const { return rows * rank / size; }
  int64_t count() const { return rows * (rank + 1) / size - begin(); }

  // Wait until all members are here. All must call it equally often.
  void wait() const {
    if (!shares) return;
#pragma omp barrier
  }

  // The rows of a matmul in which this member takes part: all if they are shared, else its own.
  int64_t first_row() const { return shares ? 0 : begin(); }
  int64_t row_count() const { return shares ? rows : count(); }

  // Compute this member's columns of matmul(rows, weights, initial, out).
  template <class T>
  void multiply(const Matrix<T>& all, const Panels<std::remove_const_t<T>>& weights, InitialSums initial,
                const Matrix<float>& out) const {
    const int64_t panels = padded(weights.columns) / COLUMNS;
    const int64_t first = shares ? panels * rank / size * COLUMNS : 0;
    const int64_t end = shares ? panels * (rank + 1) / size * COLUMNS : panels * COLUMNS;
    if (first == end) return;
    std::vector<const float*> sums(initial ? all.count : 0);
    for (size_t i = 0; i < sums.size(); ++i) sums[i] = initial[i] + first;
    const Panels<std::remove_const_t<T>> columns{weights.at(first), std::min(end, weights.columns) - first,
                                                 weights.depth};
    matmul(all, columns, initial ? sums.data() : nullptr, {out.at(0, first), out.stride, out.count});
  }
};

// Run body(member) in a team with a member per thread. `columns`: of the matmuls that may be shared.
template <class Body>
void run_team(int64_t rows, int64_t columns, const Body& body) {
#ifdef _OPENMP
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      const int64_t size = omp_get_num_threads(), panels = padded(columns) / COLUMNS;
      body(TeamMember{omp_get_thread_num(), size, rows, size > 1 && panels >= size * MIN_SHARED_PANELS});
    }
    return;
  }
#endif
  body(TeamMember{0, 1, rows, false});
}

}  // namespace las
