// What the two passes of bilstm.cpp share: the valid frames, groups of utterances and the weights.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace las::bilstm {

constexpr int64_t DIRECTIONS = 2;
constexpr int64_t SAVED = 5;      // saved values per frame, direction and unit: the four gates and the cell state
constexpr int64_t CHUNK = 128;    // rows per matmul of inputs: their gates stay in the second-level cache
constexpr int64_t MIN_GROUP = 8;  // utterances per group: with fewer rows, reading the weights takes most of the time

struct BiLstmShape {
  int64_t B, T, I, H;
};

// The valid frames, numbered in two ways: a position is b * T + t, as in tensors; an index does not count padding.
struct ValidFrames {
  ValidFrames(const at::Tensor& lengths_in, int64_t B, int64_t T) : lengths(B), first(B + 1, 0) {
    for (int64_t b = 0; b < B; ++b) {
      lengths[b] = std::clamp<int64_t>(lengths_in.const_data_ptr<int64_t>()[b], 0, T);
      first[b + 1] = first[b] + lengths[b];
      for (int64_t t = 0; t < lengths[b]; ++t) positions.push_back(b * T + t);
    }
  }
  int64_t count() const { return int64_t(positions.size()); }

  // Distribute the utterances in order of length, so that the groups have about the same work. Each group is sorted
  // from the longest to the shortest.
  std::vector<std::vector<int64_t>> grouped(int64_t count) const {
    std::vector<int64_t> order(lengths.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
    std::vector<std::vector<int64_t>> groups(count);
    for (size_t i = 0; i < order.size(); ++i) groups[i % count].push_back(order[i]);
    return groups;
  }
  // The index of the frame that a direction of utterance b reads at a step.
  int64_t index(int64_t direction, int64_t b, int64_t step) const {
    return first[b] + (direction == 0 ? step : lengths[b] - 1 - step);
  }

  std::vector<int64_t> lengths;    // (B,)
  std::vector<int64_t> first;      // (B + 1,): index of the first frame of each utterance
  std::vector<int64_t> positions;  // (frames,)
};

template <class Each>
void for_each_direction(const Each& each) {
  at::parallel_for(0, DIRECTIONS, 1, [&](int64_t begin, int64_t end) {
    for (int64_t d = begin; d < end; ++d) each(d);
  });
}

// The number of groups of utterances, none of which is empty.
inline int64_t group_count(int64_t B) {
  return std::min(B, std::max<int64_t>(1, std::min((at::get_num_threads() + 1) / DIRECTIONS, B / MIN_GROUP)));
}

// In the order of the schema: weight_ih (4H, I), weight_hh (4H, H), bias_ih (4H,), bias_hh (4H,) per direction.
struct BiLstmWeights {
  explicit BiLstmWeights(at::TensorList list) {
    for (const at::Tensor& x : list) tensors.push_back(x.contiguous());
  }
  const float* input(int64_t direction) const { return tensors[4 * direction].const_data_ptr<float>(); }
  const float* recurrent(int64_t direction) const { return tensors[4 * direction + 1].const_data_ptr<float>(); }
  float bias(int64_t direction, int64_t i) const {
    const at::Tensor &bias_ih = tensors[4 * direction + 2], &bias_hh = tensors[4 * direction + 3];
    return bias_ih.const_data_ptr<float>()[i] + bias_hh.const_data_ptr<float>()[i];
  }

  std::vector<at::Tensor> tensors;
};

}  // namespace las::bilstm
