// Vectors of W floats, and the choice of the widest vectors that the processor has, at run time.
//
// A loop is a template over W. Each width is compiled with its own instruction set, and dispatch_width calls the widest
// one. A single width for all processors would be slow: 64-byte vectors on a processor that lacks them take about ten
// times as long as vectors of its own width.

#pragma once

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 11
#error "las_fast needs GCC 11 or newer; name one with CXX, such as CXX=g++-11"
#endif

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#define LAS_INLINE inline __attribute__((always_inline))

namespace las {

constexpr float INFINITE = std::numeric_limits<float>::infinity();

template <int W>
struct Lanes {
  typedef float Float __attribute__((vector_size(4 * W)));
  typedef int32_t Int __attribute__((vector_size(4 * W)));
  typedef uint32_t Bits __attribute__((vector_size(4 * W)));
  typedef uint16_t Short __attribute__((vector_size(2 * W)));
  typedef uint8_t Bytes __attribute__((vector_size(W)));
};
template <int W>
using Float = typename Lanes<W>::Float;
template <int W>
using Int = typename Lanes<W>::Int;
template <int W>
using Bits = typename Lanes<W>::Bits;
template <int W>
using Short = typename Lanes<W>::Short;
template <int W>
using Bytes = typename Lanes<W>::Bytes;

template <class To, class From>
LAS_INLINE To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

template <int W>
LAS_INLINE Float<W> broadcast(float x) {
  return x - Float<W>{};  // x - 0 keeps the sign of -0; x + 0 does not
}

template <int W>
LAS_INLINE Float<W> load(const float* p) {
  Float<W> x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

template <int W>
LAS_INLINE Float<W> load(const c10::BFloat16* p) {  // a bfloat16 is the upper half of a float32
  Short<W> x;
  std::memcpy(&x, p, sizeof x);
  return bits_as<Float<W>>(__builtin_convertvector(x, Bits<W>) << 16);
}

template <int W>
LAS_INLINE void store(float* p, Float<W> x) {
  std::memcpy(p, &x, sizeof x);
}

// Round x to bfloat16, ties to even. The result is the upper half of each lane; the lower half is arbitrary. NaN stays
// NaN.
template <int W>
LAS_INLINE Bits<W> round_to_bf16(Float<W> x) {
  const Bits<W> bits = bits_as<Bits<W>>(x);
  return x == x ? bits + 0x7FFF + ((bits >> 16) & 1) : Bits<W>{} + 0x7FC00000u;
}

template <int W>
LAS_INLINE void store(c10::BFloat16* p, Float<W> x) {
  const Short<W> y = __builtin_convertvector(round_to_bf16<W>(x) >> 16, Short<W>);
  std::memcpy(p, &y, sizeof y);
}

// Load n < W values; the other lanes are `fill`. Nothing past p + n is read.
template <int W, class T>
LAS_INLINE Float<W> load_partial(const T* p, int64_t n, float fill = 0.0f) {
  T x[W];
  for (int i = 0; i < W; ++i) x[i] = T(fill);
  for (int i = 0; i < W && i < n; ++i) x[i] = p[i];
  return load<W>(x);
}

template <int W, class T>
LAS_INLINE void store_partial(T* p, Float<W> x, int64_t n) {
  T y[W];
  store<W>(y, x);
  for (int i = 0; i < W && i < n; ++i) p[i] = y[i];
}

// Load or store a vector of which `lanes` lanes exist: W, or fewer at the end of a row. Loaded, the others are `fill`.
template <int W, class T>
LAS_INLINE Float<W> load(const T* p, int64_t lanes, float fill = 0.0f) {
  return lanes == W ? load<W>(p) : load_partial<W>(p, lanes, fill);
}

template <int W, class T>
LAS_INLINE void store(T* p, Float<W> x, int64_t lanes) {
  if (lanes == W) store<W>(p, x);
  else store_partial<W>(p, x, lanes);
}

template <int W>
LAS_INLINE Float<W> max(Float<W> a, Float<W> b) {
  return a > b ? a : b;
}

template <int W, int... lane>
LAS_INLINE Int<W> lane_numbers(std::integer_sequence<int, lane...>) {
  return Int<W>{lane...};
}

template <int W>
LAS_INLINE Int<W> lane_numbers() {  // 0, 1, 2, ...
  return lane_numbers<W>(std::make_integer_sequence<int, W>{});
}

template <int W>
LAS_INLINE float largest(Float<W> x) {
  if constexpr (W > 4) {
    Float<W / 2> half[2];
    std::memcpy(half, &x, sizeof x);
    return largest<W / 2>(max<W / 2>(half[0], half[1]));
  } else {
    const float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
    return a > b ? a : b;
  }
}

// Shuffle: lane i of the result is lane[i] of (a, b), where the lanes of b are numbered from W.
template <int W, int... lane>
LAS_INLINE Float<W> shuffle(Float<W> a, Float<W> b, std::integer_sequence<int, lane...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, lane...);
#else
  return __builtin_shuffle(a, b, Int<W>{lane...});
#endif
}

// Interleave the lanes of a and b: those of their lower halves (PART 0) or of their upper halves (PART 1).
template <int W, int PART, int... i>
LAS_INLINE Float<W> zip(Float<W> a, Float<W> b, std::integer_sequence<int, i...>) {
  return shuffle<W>(a, b, std::integer_sequence<int, (i / 2 + PART * W / 2 + i % 2 * W)...>{});
}

// Lane i of vector k becomes lane k of vector i. Each round rotates the bits of (k, i) by one.
template <int W>
LAS_INLINE void transpose(Float<W> (&x)[W]) {
  constexpr auto all = std::make_integer_sequence<int, W>{};
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
    Float<W> y[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      y[2 * i] = zip<W, 0>(x[i], x[i + W / 2], all);
      y[2 * i + 1] = zip<W, 1>(x[i], x[i + W / 2], all);
    }
    std::memcpy(x, y, sizeof x);
  }
}

// In each group of four lanes: a0 b0 a1 b1 (PART 0) or a2 b2 a3 b3 (PART 1).
template <int W, int PART, int... i>
LAS_INLINE Float<W> interleave(Float<W> a, Float<W> b, std::integer_sequence<int, i...>) {
  return shuffle<W>(a, b, std::integer_sequence<int, (i / 4 * 4 + 2 * PART + i % 4 / 2 + i % 2 * W)...>{});
}

// In each group of four lanes: a0 a1 b0 b1 (PART 0) or a2 a3 b2 b3 (PART 1).
template <int W, int PART, int... i>
LAS_INLINE Float<W> pairs(Float<W> a, Float<W> b, std::integer_sequence<int, i...>) {
  return shuffle<W>(a, b, std::integer_sequence<int, (i / 4 * 4 + 2 * PART + i % 2 + i % 4 / 2 * W)...>{});
}

template <int W>
LAS_INLINE Float<4> fold(Float<W> x) {  // result lane i is the sum of lanes i, i + 4, i + 8, ...
  if constexpr (W == 4) {
    return x;
  } else {
    Float<W / 2> half[2];
    std::memcpy(half, &x, sizeof x);
    return fold<W / 2>(half[0] + half[1]);
  }
}

// The sum of the lanes of each of four vectors. All four are added up in the same order.
template <int W>
LAS_INLINE Float<4> sums(Float<W> a, Float<W> b, Float<W> c, Float<W> d) {
  constexpr auto all = std::make_integer_sequence<int, W>{};
  const Float<W> ab = interleave<W, 0>(a, b, all) + interleave<W, 1>(a, b, all);
  const Float<W> cd = interleave<W, 0>(c, d, all) + interleave<W, 1>(c, d, all);
  return fold<W>(pairs<W, 0>(ab, cd, all) + pairs<W, 1>(ab, cd, all));
}

template <int W>
LAS_INLINE float sum(Float<W> x) {
  return sums<W>(x, x, x, x)[0];
}

// exp(x) for x <= 0, relative error about 1e-7: 2^n times a polynomial in the remainder (Cephes). 0 below -87.3; NaN
// stays NaN.
template <int W>
LAS_INLINE Float<W> exp(Float<W> x) {
  const float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Float<W> shifted = x * 1.44269504f + ROUND;
  const Float<W> n = shifted - ROUND;
  const Float<W> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Float<W> p = broadcast<W>(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Float<W> power = bits_as<Float<W>>((bits_as<Bits<W>>(shifted) << 23) + 0x3F800000u);
  return x < -87.3f ? Float<W>{} : p * power;
}

// log(1 + x) for x from 0 to 1, error about 1e-7 (Cephes).
template <int W>
LAS_INLINE Float<W> log1p(Float<W> x) {
  const auto halve = x > 0.41421356f;
  const Float<W> z = halve ? (x - 1.0f) * 0.5f : x, square = z * z;  // 1 + z is 1 + x, or half of it
  Float<W> p = broadcast<W>(7.0376836292e-2f);
  p = p * z - 1.1514610310e-1f;
  p = p * z + 1.1676998740e-1f;
  p = p * z - 1.2420140846e-1f;
  p = p * z + 1.4249322787e-1f;
  p = p * z - 1.6668057665e-1f;
  p = p * z + 2.0000714765e-1f;
  p = p * z - 2.4999993993e-1f;
  p = p * z + 3.3333331174e-1f;
  const Float<W> log = z + (p * z * square - 0.5f * square);
  return halve ? log + 0.69314718f : log;
}

// log(exp(a) + exp(b)). The arguments may be -inf, but not +inf.
template <int W>
LAS_INLINE Float<W> logaddexp(Float<W> a, Float<W> b) {
  const auto a_is_larger = a > b;
  const Float<W> upper = a_is_larger ? a : b, lower = a_is_larger ? b : a;
  const Float<W> difference = lower == upper ? Float<W>{} : lower - upper;  // -inf minus itself would be NaN
  return upper + log1p<W>(exp<W>(difference));
}

template <int N>
using Constant = std::integral_constant<int, N>;

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
template <class Body>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) void with_avx512(const Body& body) {
  body(Constant<16>{});
}

template <class Body>
__attribute__((target("avx2,fma"))) void with_avx2(const Body& body) {
  body(Constant<8>{});
}

inline int processor_lanes() {
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx2 && avx512 ? 16 : avx2 ? 8 : 4;
}

// Lanes of the widest vectors in use: those of this processor, or fewer in tests of older processors.
inline int max_lanes = processor_lanes();

// Call body(Constant<W>{}) with the widest W in use. The body and everything that it calls must be LAS_INLINE: a
// function that is not inlined is compiled without the instruction set of W.
template <class Body>
void dispatch_width(const Body& body) {
  if (max_lanes >= 16) return with_avx512(body);
  if (max_lanes >= 8) return with_avx2(body);
  body(Constant<4>{});
}
#else
inline int processor_lanes() { return 4; }

inline int max_lanes = processor_lanes();

template <class Body>
void dispatch_width(const Body& body) {
  body(Constant<4>{});
}
#endif

}  // namespace las
