// A back-off automaton of n-grams, for ngram_scores.cpp and speller_search.cpp. las_fast/ops/ngram_scores.py has the
// layout of its rows and arcs.

#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

namespace las::ngram {

constexpr int64_t MASK_BITS = 32;  // tokens per mask

struct Model {
  const int32_t* rows = nullptr;  // (states, 2 * masks + 2)
  const int32_t* arcs = nullptr;  // (arcs, 2)
  int64_t V = 0, order = 0;

  int64_t masks() const { return (V + MASK_BITS - 1) / MASK_BITS; }
  const int32_t* row(int64_t state) const { return rows + state * (2 * masks() + 2); }
  int64_t lower(const int32_t* row) const { return row[2 * masks()]; }
  float backoff(const int32_t* row) const { return std::bit_cast<float>(row[2 * masks() + 1]); }
  float log_prob(int64_t arc) const { return std::bit_cast<float>(arcs[2 * arc]); }
  int64_t next(int64_t arc) const { return arcs[2 * arc + 1]; }
};

inline uint32_t mask(const int32_t* row, int64_t index) { return uint32_t(row[2 * index]); }

// The arc of the token at a set bit of a mask.
inline int64_t arc_of(const int32_t* row, int64_t index, int bit) {
  return row[2 * index + 1] + std::popcount(mask(row, index) & ((uint32_t(1) << bit) - 1));
}

// The state after token v.
inline int64_t follow(const Model& model, int64_t state, int64_t v) {
  const int64_t index = v / MASK_BITS;
  const int bit = int(v % MASK_BITS);
  for (int64_t i = 0; i < model.order; ++i) {
    const int32_t* row = model.row(state);
    if (mask(row, index) >> bit & 1) return model.next(arc_of(row, index, bit));
    state = model.lower(row);
  }
  return 0;
}

// Computes the log-probabilities of all tokens after a state.
class Scorer {
 public:
  void score(const Model& model, int64_t state, float* log_probs) {
    missing_.assign(model.masks(), ~uint32_t(0));
    if (model.V % MASK_BITS) missing_.back() = (uint32_t(1) << model.V % MASK_BITS) - 1;
    float total = 0.0f;  // of the back-off weights
    for (int64_t i = 0; i < model.order; ++i) {
      const int32_t* row = model.row(state);
      if (!take_arcs(model, row, total, log_probs)) return;
      total += model.backoff(row);
      state = model.lower(row);
    }
  }

 private:
  // Write the log-probabilities of the missing tokens that the row has arcs of. Return whether tokens are still missing.
  bool take_arcs(const Model& model, const int32_t* row, float total, float* log_probs) {
    uint32_t left = 0;
    for (int64_t index = 0; index < model.masks(); ++index) {
      for (uint32_t found = mask(row, index) & missing_[index]; found; found &= found - 1) {
        const int bit = std::countr_zero(found);
        log_probs[index * MASK_BITS + bit] = total + model.log_prob(arc_of(row, index, bit));
      }
      left |= missing_[index] &= ~mask(row, index);
    }
    return left;
  }

  std::vector<uint32_t> missing_;  // (masks,): masks of the tokens without a log-probability
};

}  // namespace las::ngram
