// A whole beam search of the speller: the C++ backend of las_fast/ops/speller_search.py, which defines it.
//
// Each thread searches some utterances side by side, and takes the next one from a common queue when one has ended.
// Only live beams are computed, as rows of the matmuls. Beams with the same parent share the matmuls of the parent's
// states: the first cell's with context and hidden state, and the later cells' with their hidden states. The
// contribution of a token to the gates of the first cell is computed when the token first occurs.
//
// A row's sums do not depend on the other rows (matmul.h): an utterance gets the same result alone and in any batch,
// with any number of threads.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "arguments.h"
#include "memory.h"
#include "search_state.h"
#include "search_worker.h"
#include "speller.h"

namespace {

using las::check_weights;
using las::contiguous;
using las::pack_layer;
using las::PackBuffer;
using las::SpellerWeights;
using las::search::LaterCell;
using las::search::PackedSpeller;
using las::search::SearchArguments;
using las::search::SearchWorker;
using las::search::StepHistory;

constexpr int64_t MAX_ROWS = 128;  // live beams per thread (one utterance may exceed it): more are no faster

using Steps = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Stack the steps of all utterances, (L, B, K). Utterances that ended earlier repeat their last beams with eos.
Steps stack(const std::vector<StepHistory>& histories, int64_t K, int64_t eos, const at::TensorOptions& integers) {
  const int64_t B = int64_t(histories.size());
  int64_t L = 1;
  for (const StepHistory& history : histories) L = std::max(L, int64_t(history.tokens.size()) / K);
  const at::Tensor tokens = at::empty({L, B, K}, integers), parents = at::empty({L, B, K}, integers);
  const at::Tensor attended_frames = at::empty({L, B, K}, integers);
  const at::Tensor scores = at::empty({L, B, K}, integers.dtype(at::kFloat));
  int64_t *token = tokens.mutable_data_ptr<int64_t>(), *parent = parents.mutable_data_ptr<int64_t>();
  int64_t* frame = attended_frames.mutable_data_ptr<int64_t>();
  float* score = scores.mutable_data_ptr<float>();
  for (int64_t i = 0, t = 0; t < L; ++t)
    for (const StepHistory& from : histories) {
      const int64_t steps = int64_t(from.tokens.size()) / K;
      for (int64_t k = 0; k < K; ++k, ++i) {
        const int64_t at = std::min(t, steps - 1) * K + k;
        token[i] = t < steps ? from.tokens[at] : eos;
        parent[i] = t < steps ? from.parents[at] : k;
        frame[i] = t < steps ? from.attended_frames[at] : 0;
        score[i] = from.scores[at];
      }
    }
  return {tokens, parents, scores, attended_frames};
}

template <class T, class G>
Steps search(const PackedSpeller<T, G>& speller, const SearchArguments& arguments) {
  std::vector<StepHistory> histories(arguments.B);
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), arguments.B));
  const int64_t share = las::padded(arguments.B, workers) / workers;  // utterances per worker, at most
  const int64_t slots = std::min(share, std::max<int64_t>(1, MAX_ROWS / arguments.K));
  std::atomic<int64_t> queue{0};
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) SearchWorker<T, G>(speller, arguments, slots).run(queue, histories);
  });
  return stack(histories, arguments.K, arguments.eos, arguments.lengths.options());
}

// ----------------------------------------------------------------------------------------------------------- arguments

constexpr char NOT_PACKED[] = "packed must come from speller_pack, for weights of these sizes in this precision";

// Write the types and sizes at the start of the buffer, or check them if it is already packed: weights of other sizes
// or another precision can take as many bytes.
void label(PackBuffer& buffer, const std::vector<int64_t>& contents) {
  int64_t* to = reinterpret_cast<int64_t*>(buffer.take(int64_t(contents.size() * sizeof(int64_t))));
  if (to && !buffer.already_packed) std::copy(contents.begin(), contents.end(), to);
  TORCH_CHECK(!to || std::equal(contents.begin(), contents.end(), to), NOT_PACKED);
}

template <class T, class G = T>
PackedSpeller<T, G> pack_speller(const SpellerWeights& w, int64_t D, int64_t E, PackBuffer& buffer) {
  const int64_t V = w.embedding.size(0), M = w.embedding.size(1), H = w.gate_biases[0].numel() / 4;
  const at::Tensor no_bias;
  PackedSpeller<T, G> speller{V, M, D, E, H, w.embedding.const_data_ptr<float>(), {}, {}, {}, {}, {}, {}};
  std::vector<int64_t> contents{sizeof(T), sizeof(G), V, M, D, E};
  for (const at::Tensor& bias : w.gate_biases) contents.push_back(bias.numel());
  label(buffer, contents);
  speller.token = pack_layer<T>(w.gates[0], 0, M, w.gate_biases[0], buffer);
  speller.first = pack_layer<G>(w.gates[0], M, E + H, no_bias, buffer);
  int64_t below = H;
  for (size_t i = 1; i < w.gates.size(); ++i) {
    const int64_t size = w.gate_biases[i].numel() / 4;
    LaterCell<G> cell{size, pack_layer<G>(w.gates[i], 0, below, no_bias, buffer),
                      pack_layer<G>(w.gates[i], below, size, w.gate_biases[i], buffer)};
    speller.later.push_back(std::move(cell));
    below = size;
  }
  // The packed query layer includes the attention's scale.
  speller.query = pack_layer<T>(w.query, 0, below, w.query_bias, buffer, 1.0f / std::sqrt(float(D)));
  speller.project = pack_layer<T>(w.project, 0, below + E, w.project_bias, buffer);
  speller.output = pack_layer<T>(w.embedding, 0, M, w.bias, buffer);
  return speller;
}

template <class T, class G>
Steps search_packed(const SpellerWeights& w, int64_t D, int64_t E, const std::optional<at::Tensor>& packed,
                    const SearchArguments& arguments) {
  const auto pack = [&](PackBuffer& buffer) { return pack_speller<T, G>(w, D, E, buffer); };
  las::AlignedArray<uint8_t> memory;
  if (!packed) return search(las::packed_in(memory, pack), arguments);
  PackBuffer counted;
  pack(counted);
  TORCH_CHECK(packed->scalar_type() == at::kByte && packed->is_contiguous() && packed->numel() == counted.used,
              NOT_PACKED, "; got ", packed->sizes(), " ", packed->scalar_type(), " instead of ", counted.used,
              " bytes");
  PackBuffer buffer{const_cast<uint8_t*>(packed->const_data_ptr<uint8_t>()), true};  // nothing is written to it
  return search(pack(buffer), arguments);
}

// Call body(T(), G()) with the types of PackedSpeller for a precision.
template <class Body>
auto dispatch_precision(c10::string_view precision, const Body& body) {
  if (precision == "int8") return body(at::BFloat16(), int8_t());
  if (precision == "bf16") return body(at::BFloat16(), at::BFloat16());
  TORCH_CHECK(precision == "fp32", "precision must be fp32, bf16 or int8; got ", precision);
  return body(float(), float());
}

void check(int64_t V, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& lengths, int64_t beam,
           int64_t sos, int64_t eos, const std::optional<at::Tensor>& minimum, const at::Tensor& maximum,
           const std::optional<at::Tensor>& ngram_rows, const std::optional<at::Tensor>& ngram_arcs,
           int64_t ngram_order, int64_t ngram_start, const std::optional<at::Tensor>& ctc_log_probs) {
  las::check_memory(keys, values, lengths);
  const int64_t B = keys.size(0);
  las::check_lengths("minimum", minimum, B);
  las::check_lengths("maximum", maximum, B);
  TORCH_CHECK(beam >= 1, "beam must be at least 1; got ", beam);
  las::check_token("sos", sos, V);
  las::check_token("eos", eos, V);
  TORCH_CHECK(ngram_rows.has_value() == ngram_arcs.has_value(), "ngram_rows and ngram_arcs must be given together");
  if (ngram_rows) {
    las::check_ngram_model(*ngram_rows, *ngram_arcs, V, ngram_order);
    const int64_t states = ngram_rows->size(0);
    TORCH_CHECK(ngram_start >= 0 && ngram_start < states, "ngram_start must be from 0 to ", states - 1, "; got ",
                ngram_start);
  }
  TORCH_CHECK(!ctc_log_probs || (ctc_log_probs->dim() == 3 && ctc_log_probs->size(0) == B &&
                                 ctc_log_probs->size(2) == V && ctc_log_probs->scalar_type() == at::kFloat),
              "ctc_log_probs must be (B, T', V) float32 with B=", B, ", V=", V, "; got ", ctc_log_probs->sizes(), " ",
              ctc_log_probs->scalar_type());
}

Steps speller_search(at::TensorList list, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& lengths,
                     int64_t beam, int64_t sos, int64_t eos, const std::optional<at::Tensor>& minimum,
                     const at::Tensor& maximum, double length_penalty, double eos_threshold,
                     double coverage_weight, const std::optional<at::Tensor>& ngram_rows,
                     const std::optional<at::Tensor>& ngram_arcs, int64_t ngram_order, int64_t ngram_start,
                     double ngram_weight, const std::optional<at::Tensor>& ctc_log_probs, double ctc_weight,
                     double beam_threshold, c10::string_view precision, const std::optional<at::Tensor>& packed) {
  const SpellerWeights weights(list);
  check(weights.bias.numel(), keys, values, lengths, beam, sos, eos, minimum, maximum, ngram_rows,
        ngram_arcs, ngram_order, ngram_start, ctc_log_probs);
  const SearchArguments arguments{keys.contiguous(),
                                  values.contiguous(),
                                  lengths.contiguous(),
                                  contiguous(minimum),
                                  contiguous(ngram_rows),
                                  contiguous(ngram_arcs),
                                  contiguous(ctc_log_probs),
                                  maximum.contiguous(),
                                  keys.size(0),
                                  keys.size(1),
                                  beam,
                                  sos,
                                  eos,
                                  ngram_order,
                                  ngram_start,
                                  float(length_penalty),
                                  float(eos_threshold),
                                  float(coverage_weight),
                                  float(ngram_weight),
                                  float(ctc_weight),
                                  float(beam_threshold)};
  const int64_t D = keys.size(2), E = values.size(2);
  check_weights(weights, D, E);
  return dispatch_precision(precision, [&](auto T, auto G) {
    return search_packed<decltype(T), decltype(G)>(weights, D, E, packed, arguments);
  });
}

// Pack the weights once for many searches.
at::Tensor speller_pack(at::TensorList list, c10::string_view precision) {
  const SpellerWeights weights(list);
  TORCH_CHECK(weights.query.dim() == 2 && weights.project.dim() == 2,
              "weights: query must be (D, H) and project (M, H + E); got ", weights.query.sizes(), " and ",
              weights.project.sizes());
  const int64_t D = weights.query.size(0), E = weights.project.size(1) - weights.query.size(1);
  TORCH_CHECK(D > 0 && E > 0, "weights: query must be (D, H) and project (M, H + E), D and E at least 1; got ",
              weights.query.sizes(), " and ", weights.project.sizes());
  check_weights(weights, D, E);
  return dispatch_precision(precision, [&](auto T, auto G) {
    const auto memory = std::make_shared<las::AlignedArray<uint8_t>>();
    int64_t bytes = 0;
    las::packed_in(*memory, [&](PackBuffer& buffer) {
      auto speller = pack_speller<decltype(T), decltype(G)>(weights, D, E, buffer);
      bytes = buffer.used;
      return speller;
    });
    return at::from_blob(memory->data(), {bytes}, [memory](void*) {}, at::kByte);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(las_fast, CPU, m) {
  m.impl("speller_search_cpp", &speller_search);
  m.impl("speller_pack_cpp", &speller_pack);
}
