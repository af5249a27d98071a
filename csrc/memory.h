// Memory for matrices: aligned to cache lines, on huge pages if it is large, with rows padded to whole panels.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

namespace las {

constexpr int64_t COLUMNS = 32;                          // columns per panel of packed weights, see matmul.h
constexpr int64_t CACHE_LINE = 64, HUGE_PAGE = 1 << 21;  // bytes

// n rounded up to a multiple.
inline int64_t padded(int64_t n, int64_t multiple = COLUMNS) { return (n + multiple - 1) / multiple * multiple; }

// An uninitialised array, aligned to a cache line. A large one asks the system for huge pages, which cost one page
// fault each instead of hundreds and take fewer entries of the TLB.
template <class T>
class AlignedArray {
 public:
  AlignedArray() = default;
  explicit AlignedArray(int64_t count) {
    const size_t bytes = std::max<size_t>(count * sizeof(T), 1), align = bytes < HUGE_PAGE ? CACHE_LINE : HUGE_PAGE;
    const size_t whole = padded(bytes, align);
    data_.reset(static_cast<T*>(std::aligned_alloc(align, whole)));
    if (!data_) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (align == HUGE_PAGE) madvise(data_.get(), whole, MADV_HUGEPAGE);
#endif
  }
  T* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T[], Free> data_;
};

// A view of `count` rows, `stride` values apart.
template <class T>
struct Matrix {
  T* data;
  int64_t stride, count;

  T* at(int64_t row, int64_t k = 0) const { return data + row * stride + k; }
  operator Matrix<const T>() const { return {data, stride, count}; }
};

// A matrix (count, stride) that owns its memory. Each row has room for whole panels. The stride is an odd multiple of
// two cache lines: with a power of two, all rows of a tile would map to the same few sets of the cache.
template <class T = float>
struct RowBuffer {
  static constexpr int64_t PAIR = 128 / sizeof(T);  // values in two cache lines

  RowBuffer() = default;
  RowBuffer(int64_t rows, int64_t size)
      : count(rows), stride((padded(size, PAIR) / PAIR | 1) * PAIR), memory(rows * stride) {}

  T* at(int64_t row) const { return memory.data() + row * stride; }
  Matrix<T> rows(int64_t count, int64_t from = 0) const { return {at(from), stride, count}; }
  void clear() const { std::fill_n(memory.data(), count * stride, T(0.0f)); }

  int64_t count = 0, stride = 0;
  AlignedArray<T> memory;
};

}  // namespace las
