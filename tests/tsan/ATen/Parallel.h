// at::parallel_for for builds with ThreadSanitizer, which does not understand the synchronisation of OpenMP threads.
//
// This version uses std::thread, which it understands, and always splits the range between two threads, however small
// it is, so that every test of an op also tests its threading.

#pragma once

#include_next <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>

namespace at {

inline bool& within_threads() {
  static thread_local bool within = false;
  return within;
}

template <class Body>
void threaded_for(int64_t begin, int64_t end, int64_t, const Body& body) {
  if (begin >= end) return;
  if (within_threads() || end - begin < 2) return body(begin, end);
  const int64_t middle = begin + (end - begin) / 2;
  std::exception_ptr errors[2];
  const auto run = [&](int64_t from, int64_t to, std::exception_ptr& error) {
    within_threads() = true;
    try {
      body(from, to);
    } catch (...) {
      error = std::current_exception();
    }
    within_threads() = false;
  };
  std::thread other([&] { run(middle, end, errors[1]); });
  run(begin, middle, errors[0]);
  other.join();
  for (const std::exception_ptr& error : errors)
    if (error) std::rethrow_exception(error);
}

}  // namespace at

#define parallel_for threaded_for
