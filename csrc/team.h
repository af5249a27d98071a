// Threads that compute a recurrence together. Each has some rows for the work per row. A matmul by large weights is
// shared: each thread takes some columns for all rows, so that the weights are read once instead of once per thread.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <type_traits>
#include <vector>

#include "matmul.h"
#include "memory.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace las {

constexpr int64_t MIN_SHARED_PANELS = 4;  // per thread; with fewer, waiting takes longer than reading the weights

// How a team ends when members fail. A member that fails still goes to its next barrier, so that none waits forever; it
// first stores the number of that barrier. Every member reads the number after each barrier, and stops once it has
// passed that one. Members are never more than one barrier apart, so all that fail store the same number. run_team has
// a barrier after the body's last.
struct TeamFailure {
  std::atomic_flag is_set;
  std::exception_ptr error;                      // of the first to fail
  std::atomic<int64_t> last_barrier{INT64_MAX};  // the number of the barrier at which the team ends, from 1
};

struct TeamStopped {};  // thrown in members when another one has failed

// A thread of a team, and its rows [begin, begin + count) of all.
struct TeamMember {
  int64_t rank, size, rows;
  bool shares;  // the matmuls; otherwise there are no barriers
  TeamFailure* failure;
  mutable int64_t barriers = 0;  // passed

  int64_t begin() const { return rows * rank / size; }
  int64_t count() const { return rows * (rank + 1) / size - begin(); }

  // Wait until all members are here. All must call it equally often.
  void wait() const {
    if (shares && !pass_barrier()) throw TeamStopped();
  }

  // Returns whether the team goes on.
  bool pass_barrier() const {
#pragma omp barrier
    return ++barriers < failure->last_barrier.load(std::memory_order_relaxed);
  }

  // End the team with the exception that is being handled.
  void fail() const {
    if (!failure->is_set.test_and_set()) failure->error = std::current_exception();
    failure->last_barrier.store(barriers + 1, std::memory_order_relaxed);  // the barrier makes it visible
    if (shares) pass_barrier();
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

// Run body(member) in a team with a member per thread. `columns`: of the matmuls that may be shared. If members throw,
// throws the exception of the first.
template <class Body>
void run_team(int64_t rows, int64_t columns, const Body& body) {
#ifdef _OPENMP
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  if (threads > 1) {
    TeamFailure failure;
#pragma omp parallel num_threads(threads)
    {
      const int64_t size = omp_get_num_threads(), panels = padded(columns) / COLUMNS;
      const bool shares = size > 1 && panels >= size * MIN_SHARED_PANELS;
      const TeamMember member{omp_get_thread_num(), size, rows, shares, &failure};
      try {
        body(member);
        member.wait();
      } catch (const TeamStopped&) {
      } catch (...) {
        member.fail();
      }
    }
    if (failure.error) std::rethrow_exception(failure.error);
    return;
  }
#endif
  body(TeamMember{0, 1, rows, false, nullptr});
}

}  // namespace las
