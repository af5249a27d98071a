// A whole beam search of the speller: the C++ twin of las_fast/ops/speller_search.py, which says what it means.
//
// Each thread searches some utterances side by side and takes the next one from a common queue when one has ended. Only
// living beams take part, as rows of the products. Where several continue one beam, what follows from the state before
// alone is computed once: the first cell's product with context and state, the later ones' with their states. What a
// token adds to the gates of the first cell is computed when it is first met.
//
// A row's sums do not depend on the rows beside it (product.h), so an utterance has one answer, alone and in any batch,
// for any number of threads.

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
#include <vector>

#include "beam_topk.h"
#include "ctc_prefix.h"
#include "lstm.h"
#include "product.h"
#include "softmax.h"
#include "speller.h"
#include "vector.h"

namespace {

using las::check_weights;
using las::convert;
using las::Float;
using las::get;
using las::Layer;
using las::layer;
using las::Matrix;
using las::padded;
using las::Panels;
using las::put;
using las::Weights;
using las::Zeros;
namespace ctc = las::ctc;
namespace topk = las::topk;

constexpr int64_t ROWS = 128;    // living beams of one thread, if one utterance has no more: beyond that nothing gains
constexpr float UNSEEN = 0.01f;  // least attention that a frame counts as having got, for a finite logarithm

// ------------------------------------------------------------------------------------------------------- what is read

template <class G>
struct LaterCell {
  int64_t size;
  Layer<G> input, recurrent;  // the bias is in `recurrent`
};

// Weights of the gates are of type G, all others and the memory of the utterances of type T.
template <class T, class G>
struct Speller {
  int64_t V, M, D, E, H;  // M of the embedding, H of the first cell
  const float* embedding;
  Layer<T> token;  // from the embedding to the gates of the first cell
  Layer<G> first;  // from [context, hidden]
  std::vector<LaterCell<G>> later;
  Layer<T> query, project, output;

  int64_t cells() const { return 1 + int64_t(later.size()); }
  int64_t size(int64_t cell) const { return cell == 0 ? H : later[cell - 1].size; }
};

struct Job {
  at::Tensor keys, values, lengths;
  std::optional<at::Tensor> minimum, table, frames_of_ctc;
  at::Tensor maximum;
  int64_t B, T, K, sos, eos;
  float length_penalty, eos_threshold, coverage_weight, ngram_weight, ctc_weight;

  int64_t frames(int64_t b) const { return std::clamp<int64_t>(lengths.const_data_ptr<int64_t>()[b], 0, T); }
};

// ------------------------------------------------------------------------------------------------------- what is kept

// All beams of one utterance.
struct Beams {
  explicit Beams(int64_t K) : scores(K), tokens(K), parents(K), lengths(K), ngram_states(K), ended(new bool[K]) {}

  topk::Outputs outputs() {
    return {scores.data(), tokens.data(), parents.data(), ended.get(), lengths.data(), ngram_states.data()};
  }
  bool living(int64_t k) const { return !ended[k] && scores[k] > -las::INFINITE; }

  std::vector<float> scores;
  std::vector<int64_t> tokens, parents, lengths, ngram_states;
  std::unique_ptr<bool[]> ended;
};

// All steps of one utterance, K values each.
struct History {
  void add(const Beams& beams, const std::vector<int64_t>& peaks) {
    tokens.insert(tokens.end(), beams.tokens.begin(), beams.tokens.end());
    parents.insert(parents.end(), beams.parents.begin(), beams.parents.end());
    scores.insert(scores.end(), beams.scores.begin(), beams.scores.end());
    frames.insert(frames.end(), peaks.begin(), peaks.end());
  }

  std::vector<int64_t> tokens, parents, frames;
  std::vector<float> scores;
};

// What hidden states and contexts are kept as: as products take them, where those do not need more of them.
template <class T, class G>
using Kept = std::conditional_t<std::is_same_v<G, int8_t>, float, T>;

// The states of all rows between two steps.
template <class S>
struct States {
  template <class T, class G>
  States(const Speller<T, G>& speller, int64_t rows) : first(rows, speller.E + speller.H + 1) {  // 1: what follows is 0
    for (int64_t i = 0; i < speller.cells(); ++i) {
      cell.emplace_back(rows, speller.size(i));
      hidden.emplace_back(i == 0 ? 0 : rows, speller.size(i) + 1);
    }
  }

  Zeros<S> first;  // the context, and the hidden state of the first cell
  std::vector<Zeros<S>> hidden;
  std::vector<Zeros<>> cell;
};

// One living beam.
struct Living {
  int64_t slot, beam, token;
  int64_t before;  // row of the state that it continues
  int64_t source;  // that state's index among those that are continued
};

// What CTC says of the beams of one utterance.
struct Prefixes {
  void begin(const Job& job, int64_t b, int64_t V) {
    const int64_t T = job.frames_of_ctc->size(1), K = job.K;
    heard = std::make_unique<ctc::Frames>(job.frames_of_ctc->const_data_ptr<float>() + b * T * V, T, V);
    alphas.resize(K * stride());
    next_alphas.resize(K * stride());
    gains.resize(K * V);
    next_gains.resize(K * V);
    prefixes.assign(K, 0.0f);
    scorer.start(*heard, {nullptr, alphas.data(), job.sos, job.sos, 0.0f, gains.data()}, job.eos);
  }

  int64_t stride() const { return heard->T + 1; }

  // Let the living beams of `after` continue those of `before`.
  void follow(const Beams& before, const Beams& after, int64_t eos) {
    const std::vector<float> old = prefixes;
    living.clear();
    for (int64_t k = 0; k < int64_t(old.size()); ++k) {
      if (!after.living(k)) continue;
      const int64_t parent = after.parents[k], token = after.tokens[k], V = heard->V;
      prefixes[k] = old[parent] + gains[parent * V + token];
      living.push_back({alphas.data() + parent * stride(), next_alphas.data() + k * stride(), before.tokens[parent],
                        token, prefixes[k], next_gains.data() + k * V});
    }
    scorer.advance(*heard, living, eos);
    std::swap(alphas, next_alphas);
    std::swap(gains, next_gains);
  }

  std::unique_ptr<ctc::Frames> heard;
  std::vector<float> alphas, next_alphas, gains, next_gains, prefixes;  // (K, T' + 1), (K, V) and (K,)
  std::vector<ctc::Hypothesis> living;
  ctc::Scorer scorer;
};

// An utterance that is being searched.
template <class T>
struct Slot {
  explicit Slot(int64_t K) : beams(K), next(K), rows(K), peaks(K), coverage(K) {}

  int64_t b = -1;  // -1: none
  int64_t frames = 0;
  las::Memory<T> key_memory, value_memory;
  Panels<T> keys, values;
  Beams beams, next;
  std::vector<int64_t> rows;  // of the state that each beam continues
  std::vector<int64_t> peaks;
  std::vector<float> coverage, attention;  // attention (K, frames): got by each frame from all tokens
  Prefixes prefixes;
};

// --------------------------------------------------------------------------------------------------------- the search

template <class T, class G>
class Worker {
  using S = Kept<T, G>;

 public:
  Worker(const Speller<T, G>& speller, const Job& job, int64_t slots)
      : speller_(speller), job_(job), most_(slots * job.K), before_(speller, most_ + 1), after_(speller, most_ + 1),
        best_(job.K), index_(most_ + 1), token_gates_(speller.V) {
    for (int64_t i = 0; i < slots; ++i) slots_.emplace_back(job.K);
    make_room();
  }

  // Search utterances until the queue, whose next is `queue`, is empty.
  void run(std::atomic<int64_t>& queue, std::vector<History>& found) {
    for (;;) {
      for (Slot<T>& slot : slots_)
        if (slot.b < 0) {
          const int64_t b = queue++;
          if (b >= job_.B) break;
          begin(slot, b);
        }
      list();
      if (rows_.empty()) return;
      meet();
      recur();
      for (int64_t i = 0; i < speller_.cells(); ++i) advance(i);
      attend();
      spell();
      for (size_t i = 0; i < slots_.size(); ++i)
        if (slots_[i].b >= 0) prune(int64_t(i), found[slots_[i].b]);
      std::swap(before_, after_);
    }
  }

 private:
  int64_t silence() const { return most_; }  // row of the state before the first token: always zeros

  void make_room() {
    int64_t widest = speller_.E + speller_.H, gates = 0;
    for (int64_t i = 0; i < speller_.cells(); ++i) {
      widest = std::max(widest, speller_.size(i) + speller_.E);
      gates = std::max(gates, 4 * speller_.size(i));
      recurrent_.emplace_back(most_ + 1, 4 * speller_.size(i));
    }
    widest = std::max({widest, speller_.D, speller_.E, job_.T, speller_.M});
    operand_ = Zeros<T>(most_ + 1, widest);
    if constexpr (std::is_same_v<G, int8_t>) numbers_ = Zeros<uint8_t>(most_ + 1, widest);
    scales_.resize(most_ + 1);
    sums_ = Zeros<>(most_ + 1, std::max({gates, speller_.M, speller_.V}));
    queries_ = Zeros<>(most_ + 1, speller_.D);
    weights_ = Zeros<>(job_.K, job_.T);
    contexts_ = Zeros<>(job_.K, speller_.E);
    logits_.resize(job_.K * speller_.V);
    summaries_.resize(job_.K);
    block_maxima_.resize(job_.K * blocks());
    starts_.resize(most_ + 1);
  }

  int64_t blocks() const { return (speller_.V + topk::BLOCK - 1) / topk::BLOCK; }

  void begin(Slot<T>& slot, int64_t b) {
    const int64_t n = job_.frames(b), K = job_.K, D = speller_.D, E = speller_.E;
    slot.b = b;
    slot.frames = n;
    slot.keys = las::pack<T>(job_.keys.const_data_ptr<float>() + b * job_.T * D, D, 1, n, D, slot.key_memory);
    slot.values = las::pack<T>(job_.values.const_data_ptr<float>() + b * job_.T * E, 1, E, E, n, slot.value_memory);
    Beams& beams = slot.beams;
    std::fill_n(beams.scores.begin(), K, -las::INFINITE);  // only one beam exists so far
    beams.scores[0] = 0.0f;
    std::fill_n(beams.tokens.begin(), K, job_.sos);
    std::fill_n(beams.lengths.begin(), K, 0);
    std::fill_n(beams.ended.get(), K, false);
    std::fill_n(beams.ngram_states.begin(), K, job_.table ? first_ngram_state() : 0);
    std::fill_n(slot.rows.begin(), K, silence());
    if (job_.coverage_weight != 0.0f) slot.attention.assign(K * n, 0.0f);
    if (job_.frames_of_ctc) slot.prefixes.begin(job_, b, speller_.V);
  }

  // <sos> all through, as digits to the base V.
  int64_t first_ngram_state() const {
    const int64_t states = job_.table->size(0);
    return speller_.V > 1 ? job_.sos * (states - 1) / (speller_.V - 1) : 0;
  }

  // List the living beams and the states that they continue.
  void list() {
    rows_.clear();
    sources_.clear();
    std::fill(index_.begin(), index_.end(), -1);
    for (size_t s = 0; s < slots_.size(); ++s) {
      const Slot<T>& slot = slots_[s];
      for (int64_t k = 0; slot.b >= 0 && k < job_.K; ++k) {
        if (!slot.beams.living(k)) continue;
        const int64_t before = slot.rows[k];
        if (index_[before] < 0) {
          index_[before] = int64_t(sources_.size());
          sources_.push_back(before);
        }
        rows_.push_back({int64_t(s), k, slot.beams.tokens[k], before, index_[before]});
      }
    }
  }

  int64_t count() const { return int64_t(rows_.size()); }

  // The first `n` values of rows from(i) as operands of the next product.
  template <class From>
  Matrix<const T> operand(int64_t count, int64_t depth, int64_t n, From from) {
    for (int64_t i = 0; i < count; ++i) {
      T* to = operand_.at(i);
      convert(from(i), n, to);
      std::fill(to + n, to + depth, T(0.0f));
    }
    return operand_.rows(count);
  }

  // The same as whole numbers.
  template <class From>
  las::Int8Rows numbers(int64_t count, int64_t depth, int64_t n, From from) {
    las::widest([&](auto width) __attribute__((always_inline)) {
      for (int64_t i = 0; i < count; ++i) scales_[i] = las::quantise<width>(from(i), n, depth, numbers_.at(i));
    });
    return {numbers_.at(0), numbers_.stride, count, scales_.data()};
  }

  // What the first `n` values of rows from(i) add to gates.
  template <class From>
  void gates(const Layer<G>& layer, int64_t count, int64_t n, From from, las::Starts starts, const Matrix<float>& out) {
    const int64_t depth = layer.weights.depth;
    if constexpr (std::is_same_v<G, int8_t>)
      las::product(numbers(count, depth, n, from), layer.weights, starts, out);
    else
      las::product(operand(count, depth, n, from), layer.weights, starts, out);
  }

  las::Starts same(const std::vector<float>& bias, int64_t count) {
    std::fill_n(starts_.begin(), count, bias.data());
    return starts_.data();
  }

  // Compute what tokens that have not been met yet add to the gates of the first cell.
  void meet() {
    std::vector<int64_t> fresh;
    for (const Living& row : rows_) {
      las::Memory<float>& gates = token_gates_[row.token];
      if (gates.data()) continue;
      gates = las::Memory<float>(4 * speller_.H);
      fresh.push_back(row.token);
    }
    const int64_t n = int64_t(fresh.size());
    const Layer<T>& layer = speller_.token;
    const auto embedded = [&](int64_t i) { return speller_.embedding + fresh[i] * speller_.M; };
    las::product(operand(n, layer.weights.depth, speller_.M, embedded), layer.weights, same(layer.bias, n),
                 sums_.rows(n));
    for (int64_t i = 0; i < n; ++i) std::copy_n(sums_.at(i), 4 * speller_.H, token_gates_[fresh[i]].data());
  }

  // What the gates gain from the states before, once for each state.
  void recur() {
    const int64_t n = int64_t(sources_.size());
    const auto first = [&](int64_t i) { return before_.first.at(sources_[i]); };
    gates(speller_.first, n, speller_.E + speller_.H, first, nullptr, recurrent_[0].rows(n));
    for (int64_t c = 1; c < speller_.cells(); ++c) {
      const Layer<G>& layer = speller_.later[c - 1].recurrent;
      const auto hidden = [&](int64_t i) { return before_.hidden[c].at(sources_[i]); };
      gates(layer, n, speller_.size(c), hidden, same(layer.bias, n), recurrent_[c].rows(n));
    }
  }

  S* hidden(int64_t cell, int64_t row) {
    return cell == 0 ? after_.first.at(row) + speller_.E : after_.hidden[cell].at(row);
  }

  // The `n` new hidden values of all rows as operands, as they lie if they can: a 0 follows them in their buffers.
  Matrix<const T> state(int64_t cell, int64_t depth, int64_t n) {
    if constexpr (std::is_same_v<S, T>)
      return {hidden(cell, 0), (cell == 0 ? after_.first : after_.hidden[cell]).stride, count()};
    else
      return operand(count(), depth, n, [&](int64_t i) { return hidden(cell, i); });
  }

  // Take cell c to its next state.
  void advance(int64_t c) {
    const int64_t size = speller_.size(c);
    if (c > 0) input(c, speller_.later[c - 1].input);
    las::widest([&](auto width) __attribute__((always_inline)) {
      constexpr int W = width;
      for (int64_t i = 0; i < count(); ++i) {
        const float* gates = c == 0 ? recurrent_[0].at(rows_[i].source) : sums_.at(i);
        const float* token = c == 0 ? token_gates_[rows_[i].token].data() : nullptr;
        const auto gate = [&](int64_t g, int64_t j, int64_t lanes) __attribute__((always_inline)) {
          const Float<W> sum = get<W>(gates + g * size + j, lanes, 0.0f);
          return token ? sum + get<W>(token + g * size + j, lanes, 0.0f) : sum;
        };
        las::lstm_step_unsaved<W>(size, before_.cell[c].at(rows_[i].before), after_.cell[c].at(i), hidden(c, i), gate);
      }
    });
  }

  // Add to the gates of cell c what the new values of the cell below say.
  void input(int64_t c, const Layer<G>& layer) {
    const int64_t n = speller_.size(c - 1);
    for (int64_t i = 0; i < count(); ++i) starts_[i] = recurrent_[c].at(rows_[i].source);
    const las::Starts starts = starts_.data();
    if constexpr (std::is_same_v<G, int8_t>)
      gates(layer, count(), n, [&](int64_t i) { return hidden(c - 1, i); }, starts, sums_.rows(count()));
    else
      las::product(state(c - 1, layer.weights.depth, n), layer.weights, starts, sums_.rows(count()));
  }

  void attend() {
    const int64_t last = speller_.cells() - 1;
    const Layer<T>& query = speller_.query;
    las::product(state(last, query.weights.depth, speller_.size(last)), query.weights, same(query.bias, count()),
                 queries_.rows(count()));
    for (int64_t i = 0; i < count();) {
      int64_t end = i;
      while (end < count() && rows_[end].slot == rows_[i].slot) ++end;
      attend(slots_[rows_[i].slot], i, end - i);
      i = end;
    }
  }

  // Rows first to first + n, which are those of one utterance.
  void attend(Slot<T>& slot, int64_t first, int64_t n) {
    const auto query = [&](int64_t i) { return queries_.at(first + i); };
    las::product(operand(n, slot.keys.depth, speller_.D, query), slot.keys, nullptr, weights_.rows(n));
    std::fill(slot.peaks.begin(), slot.peaks.end(), 0);
    las::widest([&](auto width) __attribute__((always_inline)) {
      for (int64_t i = 0; i < n; ++i)
        slot.peaks[rows_[first + i].beam] = las::softmax<width>(weights_.at(i), slot.frames).peak;
    });
    if (job_.coverage_weight != 0.0f) cover(slot, first, n);
    const auto weights = [&](int64_t i) { return weights_.at(i); };
    las::product(operand(n, slot.values.depth, slot.frames, weights), slot.values, nullptr, contexts_.rows(n));
    for (int64_t i = 0; i < n; ++i) convert(contexts_.at(i), speller_.E, after_.first.at(first + i));
  }

  void cover(Slot<T>& slot, int64_t first, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      float* got = slot.attention.data() + rows_[first + i].beam * slot.frames;
      double sum = 0.0;
      for (int64_t t = 0; t < slot.frames; ++t) {
        got[t] += weights_.at(i)[t];
        sum += std::log(std::clamp(got[t], UNSEEN, 1.0f));
      }
      slot.coverage[rows_[first + i].beam] = job_.coverage_weight * float(sum / std::max<int64_t>(1, slot.frames));
    }
  }

  // The logits of every row, in sums_.
  void spell() {
    const int64_t last = speller_.cells() - 1, n = count();
    const Layer<T>& project = speller_.project;
    const int64_t H = speller_.size(last), E = speller_.E;
    for (int64_t i = 0; i < n; ++i) {
      T* to = operand_.at(i);
      convert(hidden(last, i), H, to);
      convert(after_.first.at(i), E, to + H);
      std::fill(to + H + E, to + project.weights.depth, T(0.0f));
    }
    las::product(Matrix<const T>(operand_.rows(n)), project.weights, same(project.bias, n), sums_.rows(n));
    bend();
    const Layer<T>& output = speller_.output;
    const auto features = [&](int64_t i) { return sums_.at(i); };
    const Matrix<const T> rows = operand(n, output.weights.depth, speller_.M, features);
    las::product(rows, output.weights, same(output.bias, n), sums_.rows(n));
  }

  void bend() {
    las::widest([&](auto width) __attribute__((always_inline)) {
      constexpr int W = width;
      for (int64_t i = 0; i < count(); ++i)
        las::each_vector<W>(speller_.M, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
          put<W>(sums_.at(i) + j, las::gelu<W>(get<W>(sums_.at(i) + j, lanes, 0.0f)), lanes);
        });
    });
  }

  // Replace the beams of an utterance by the best continuations; keep the step in `history`.
  void prune(int64_t s, History& history) {
    Slot<T>& slot = slots_[s];
    const int64_t K = job_.K, V = speller_.V;
    for (int64_t i = first_row(s); i < count() && rows_[i].slot == s; ++i) {
      const int64_t k = rows_[i].beam;
      std::copy_n(sums_.at(i), V, logits_.data() + k * V);
      summaries_[k] = topk::summarise(logits_.data() + k * V, V, block_maxima_.data() + k * blocks());
      slot.rows[k] = i;
    }
    const Beams& beams = slot.beams;
    const topk::Inputs in{logits_.data(),       beams.scores.data(), beams.ended.get(),
                          beams.lengths.data(), 1, K, V, blocks()};
    const topk::Options options = options_of(slot);
    best_.clear();
    for (int64_t k = 0; k < K; ++k)
      topk::offer_beam(in, options, summaries_.data(), block_maxima_.data(), 0, k, best_);
    best_.fill();
    topk::write(in, options, 0, best_, slot.next.outputs());
    follow(slot, history);
  }

  int64_t first_row(int64_t s) const {
    const auto before = [](const Living& row, int64_t s) { return row.slot < s; };
    return std::lower_bound(rows_.begin(), rows_.end(), s, before) - rows_.begin();
  }

  topk::Options options_of(const Slot<T>& slot) const {
    const auto limit = [&](const at::Tensor& x) { return x.const_data_ptr<int64_t>() + slot.b; };
    return {job_.eos,
            job_.minimum ? limit(*job_.minimum) : nullptr,
            limit(job_.maximum),
            job_.length_penalty,
            job_.eos_threshold,
            job_.coverage_weight != 0.0f ? slot.coverage.data() : nullptr,
            job_.table ? job_.table->const_data_ptr<float>() : nullptr,
            slot.beams.ngram_states.data(),
            job_.table ? job_.table->size(0) : 0,
            job_.ngram_weight,
            job_.frames_of_ctc ? slot.prefixes.gains.data() : nullptr,
            job_.ctc_weight};
  }

  // Let everything else of the beams follow their parents, and give the slot free if all have ended.
  void follow(Slot<T>& slot, History& history) {
    const std::vector<int64_t>& parents = slot.next.parents;
    history.add(slot.next, slot.peaks);
    const std::vector<int64_t> rows = slot.rows;
    for (int64_t k = 0; k < job_.K; ++k) slot.rows[k] = rows[parents[k]];
    if (job_.coverage_weight != 0.0f) move_attention(slot, parents);
    if (job_.frames_of_ctc) slot.prefixes.follow(slot.beams, slot.next, job_.eos);
    std::swap(slot.beams, slot.next);
    bool living = false;
    for (int64_t k = 0; k < job_.K; ++k) living |= slot.beams.living(k);
    if (!living) slot.b = -1;
  }

  void move_attention(Slot<T>& slot, const std::vector<int64_t>& parents) {
    const int64_t n = slot.frames;
    const std::vector<float> attention = slot.attention, coverage = slot.coverage;
    for (int64_t k = 0; k < job_.K; ++k) {
      std::copy_n(attention.begin() + parents[k] * n, n, slot.attention.begin() + k * n);
      slot.coverage[k] = coverage[parents[k]];
    }
  }

  const Speller<T, G>& speller_;
  const Job& job_;
  int64_t most_;  // living beams
  std::vector<Slot<T>> slots_;
  States<S> before_, after_;
  std::vector<Living> rows_;
  std::vector<int64_t> sources_;  // rows of the states that are continued
  Zeros<T> operand_;
  Zeros<uint8_t> numbers_;    // rows of products in whole numbers
  std::vector<float> scales_;  // of them
  std::vector<Zeros<>> recurrent_;
  Zeros<> sums_, queries_, weights_, contexts_;
  std::vector<const float*> starts_;
  std::vector<float> logits_, block_maxima_;
  std::vector<topk::Row> summaries_;
  topk::Best best_;
  std::vector<int64_t> index_;  // of each row before among sources_, or -1
  std::vector<las::Memory<float>> token_gates_;  // (4 * H) of each token met so far
};

using Steps = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Lay the steps of all utterances side by side, (L, B, K): those that ended sooner go on as they are.
Steps stack(const std::vector<History>& found, int64_t K, int64_t eos, const at::TensorOptions& integers) {
  const int64_t B = int64_t(found.size());
  int64_t L = 1;
  for (const History& history : found) L = std::max(L, int64_t(history.tokens.size()) / K);
  const at::Tensor tokens = at::empty({L, B, K}, integers), parents = at::empty({L, B, K}, integers);
  const at::Tensor frames = at::empty({L, B, K}, integers);
  const at::Tensor scores = at::empty({L, B, K}, integers.dtype(at::kFloat));
  int64_t *token = tokens.mutable_data_ptr<int64_t>(), *parent = parents.mutable_data_ptr<int64_t>();
  int64_t* frame = frames.mutable_data_ptr<int64_t>();
  float* score = scores.mutable_data_ptr<float>();
  for (int64_t i = 0, t = 0; t < L; ++t)
    for (const History& from : found) {
      const int64_t steps = int64_t(from.tokens.size()) / K;
      for (int64_t k = 0; k < K; ++k, ++i) {
        const int64_t at = std::min(t, steps - 1) * K + k;
        token[i] = t < steps ? from.tokens[at] : eos;
        parent[i] = t < steps ? from.parents[at] : k;
        frame[i] = t < steps ? from.frames[at] : 0;
        score[i] = from.scores[at];
      }
    }
  return {tokens, parents, scores, frames};
}

template <class T, class G>
Steps search(const Speller<T, G>& speller, const Job& job) {
  std::vector<History> found(job.B);
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), job.B));
  const int64_t slots = std::min((job.B + workers - 1) / workers, std::max<int64_t>(1, ROWS / job.K));
  std::atomic<int64_t> queue{0};
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) Worker<T, G>(speller, job, slots).run(queue, found);
  });
  return stack(found, job.K, job.eos, job.lengths.options());
}

// ----------------------------------------------------------------------------------------------------------- arguments

constexpr char NOT_PACKED[] = "packed must be what speller_pack makes of weights of these sizes in this precision";

// What weights are on the shelf: bytes of others, or of these in another precision, can be as many.
void label(las::Shelf& shelf, const std::vector<int64_t>& kind) {
  int64_t* place = reinterpret_cast<int64_t*>(shelf.take(int64_t(kind.size() * sizeof(int64_t))));
  if (place && !shelf.full) std::copy(kind.begin(), kind.end(), place);
  TORCH_CHECK(!place || std::equal(kind.begin(), kind.end(), place), NOT_PACKED);
}

template <class T, class G = T>
Speller<T, G> speller_of(const Weights& w, int64_t D, int64_t E, las::Shelf& shelf) {
  const int64_t V = w.embedding.size(0), M = w.embedding.size(1), H = w.gate_biases[0].numel() / 4;
  const at::Tensor none;
  Speller<T, G> speller{V, M, D, E, H, w.embedding.const_data_ptr<float>(), {}, {}, {}, {}, {}, {}};
  std::vector<int64_t> kind{sizeof(T), sizeof(G), V, M, D, E};
  for (const at::Tensor& bias : w.gate_biases) kind.push_back(bias.numel());
  label(shelf, kind);
  speller.token = layer<T>(w.gates[0], 0, M, w.gate_biases[0], shelf);
  speller.first = layer<G>(w.gates[0], M, E + H, none, shelf);
  int64_t below = H;
  for (size_t i = 1; i < w.gates.size(); ++i) {
    const int64_t size = w.gate_biases[i].numel() / 4;
    LaterCell<G> cell{size, layer<G>(w.gates[i], 0, below, none, shelf),
                      layer<G>(w.gates[i], below, size, w.gate_biases[i], shelf)};
    speller.later.push_back(std::move(cell));
    below = size;
  }
  // The attention's scale is in its query.
  speller.query = layer<T>(w.query, 0, below, w.query_bias, shelf, 1.0f / std::sqrt(float(D)));
  speller.project = layer<T>(w.project, 0, below + E, w.project_bias, shelf);
  speller.output = layer<T>(w.embedding, 0, M, w.bias, shelf);
  return speller;
}

template <class T, class G>
Steps search_packed(const Weights& w, int64_t D, int64_t E, const std::optional<at::Tensor>& packed, const Job& job) {
  const auto make = [&](las::Shelf& shelf) { return speller_of<T, G>(w, D, E, shelf); };
  las::Memory<uint8_t> memory;
  if (!packed) return search(las::shelved(memory, make), job);
  las::Shelf counted;
  make(counted);
  TORCH_CHECK(packed->scalar_type() == at::kByte && packed->is_contiguous() && packed->numel() == counted.used,
              NOT_PACKED, "; got ", packed->sizes(), " ", packed->scalar_type(), " instead of ", counted.used, " bytes");
  las::Shelf full{const_cast<uint8_t*>(packed->const_data_ptr<uint8_t>()), true};  // nothing is written where it is full
  return search(make(full), job);
}

// body(T, G) with values of the types that the precision names; see Speller.
template <class Body>
auto in_precision(c10::string_view precision, const Body& body) {
  if (precision == "int8") return body(at::BFloat16(), int8_t());
  if (precision == "bf16") return body(at::BFloat16(), at::BFloat16());
  TORCH_CHECK(precision == "fp32", "precision must be fp32, bf16 or int8; got ", precision);
  return body(float(), float());
}

void check_limit(const char* name, const std::optional<at::Tensor>& x, int64_t B) {
  TORCH_CHECK(!x || (x->dim() == 1 && x->size(0) == B && x->scalar_type() == at::kLong), name, " must be (", B,
              ",) int64; got ", x->sizes(), " ", x->scalar_type());
}

void check(int64_t V, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& lengths,
           int64_t beam, int64_t sos, int64_t eos, const std::optional<at::Tensor>& minimum, const at::Tensor& maximum,
           const std::optional<at::Tensor>& table, const std::optional<at::Tensor>& frames) {
  las::check_memory(keys, values, lengths);
  const int64_t B = keys.size(0);
  check_limit("minimum", minimum, B);
  check_limit("maximum", maximum, B);
  TORCH_CHECK(beam >= 1, "beam must be at least 1; got ", beam);
  TORCH_CHECK(sos >= 0 && sos < V, "sos must be a token from 0 to ", V - 1, "; got ", sos);
  TORCH_CHECK(eos >= 0 && eos < V, "eos must be a token from 0 to ", V - 1, "; got ", eos);
  TORCH_CHECK(!table || (table->dim() == 2 && table->size(0) > 0 && table->size(1) == V &&
                         table->scalar_type() == at::kFloat),
              "table must be (states, V) float32 with V=", V, "; got ", table->sizes(), " ", table->scalar_type());
  TORCH_CHECK(!frames || (frames->dim() == 3 && frames->size(0) == B && frames->size(2) == V &&
                          frames->scalar_type() == at::kFloat),
              "frames must be (B, T', V) float32 with B=", B, ", V=", V, "; got ", frames->sizes(), " ",
              frames->scalar_type());
}

Steps speller_search(at::TensorList list, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& lengths,
                     int64_t beam, int64_t sos, int64_t eos,
                     const std::optional<at::Tensor>& minimum, const at::Tensor& maximum, double length_penalty,
                     double eos_threshold, double coverage_weight, const std::optional<at::Tensor>& table,
                     double ngram_weight, const std::optional<at::Tensor>& frames, double ctc_weight,
                     c10::string_view precision, const std::optional<at::Tensor>& packed) {
  const Weights weights(list);
  check(weights.bias.numel(), keys, values, lengths, beam, sos, eos, minimum, maximum, table, frames);
  const auto contiguous = [](const std::optional<at::Tensor>& x) {
    return x ? std::optional(x->contiguous()) : std::nullopt;
  };
  const Job job{keys.contiguous(),   values.contiguous(),  lengths.contiguous(),   contiguous(minimum),
                contiguous(table),   contiguous(frames),   maximum.contiguous(),   keys.size(0),
                keys.size(1),        beam,                 sos,                    eos,
                float(length_penalty), float(eos_threshold), float(coverage_weight), float(ngram_weight),
                float(ctc_weight)};
  const int64_t D = keys.size(2), E = values.size(2);
  check_weights(weights, D, E);
  return in_precision(precision, [&](auto T, auto G) {
    return search_packed<decltype(T), decltype(G)>(weights, D, E, packed, job);
  });
}

// The matrices of the weights, packed: for many searches, which would each do it.
at::Tensor speller_pack(at::TensorList list, c10::string_view precision) {
  const Weights weights(list);
  TORCH_CHECK(weights.query.dim() == 2 && weights.project.dim() == 2,
              "weights: query must be (D, H) and project (M, H + E); got ", weights.query.sizes(), " and ",
              weights.project.sizes());
  const int64_t D = weights.query.size(0), E = weights.project.size(1) - weights.query.size(1);
  TORCH_CHECK(D > 0 && E > 0, "weights: query must be (D, H) and project (M, H + E), D and E at least 1; got ",
              weights.query.sizes(), " and ", weights.project.sizes());
  check_weights(weights, D, E);
  return in_precision(precision, [&](auto T, auto G) {
    const auto memory = std::make_shared<las::Memory<uint8_t>>();
    int64_t bytes = 0;
    las::shelved(*memory, [&](las::Shelf& shelf) {
      auto speller = speller_of<decltype(T), decltype(G)>(weights, D, E, shelf);
      bytes = shelf.used;
      return speller;
    });
    return at::from_blob(memory->data(), {bytes}, [memory](void*) {}, at::kByte);
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(las_fast, m) {
  m.def("speller_search_cpp(Tensor[] weights, Tensor keys, Tensor values, Tensor lengths, int beam, int sos, int eos,"
        " Tensor? minimum, Tensor maximum, float length_penalty, float eos_threshold, float coverage_weight,"
        " Tensor? table, float ngram_weight, Tensor? frames, float ctc_weight, str precision, Tensor? packed)"
        " -> (Tensor tokens, Tensor parents, Tensor scores, Tensor frames)");
  m.def("speller_pack_cpp(Tensor[] weights, str precision) -> Tensor packed");
}

TORCH_LIBRARY_IMPL(las_fast, CPU, m) {
  m.impl("speller_search_cpp", &speller_search);
  m.impl("speller_pack_cpp", &speller_pack);
}
