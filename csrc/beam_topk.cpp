// One step of beam search: the C++ twin of las_fast/ops/beam_topk.py, which says what it means.
//
// First every row of logits is summarised, by threads that share nothing: its maximum, the log of its sum, and the
// maximum of each block. Then each utterance takes its best candidates. A rank only grows with the logit, so a block
// whose maximum would not enter is passed over: with thousands of tokens that is nearly all of them, and it is exact.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "vector.h"

namespace {

using las::Float;
using las::INFINITE;
using las::Int;

constexpr int64_t GRAIN = 1 << 14;  // logits that make a thread worth starting
constexpr int64_t BLOCK = 64;       // tokens

// What a row of logits comes to. With NaN or +inf among them, or nothing but -inf, log_sum is NaN, and so are the ranks
// of all its candidates: Best takes none of them.
struct Row {
  float maximum, log_sum;

  float log_probability(float logit) const { return (logit - maximum) - log_sum; }
};

// The logits from v on, W of them, with -inf past the end of the row.
template <int W>
LAS_INLINE Float<W> load_logits(const float* row, int64_t v, int64_t V) {
  if (v + W <= V) return las::load<W>(row + v);
  if (V < W) return las::load_part<W>(row, V, -INFINITE);
  // The last W of the row, without those before v: their order does not matter here.
  Int<W> lane = {};
  for (int i = 0; i < W; ++i) lane[i] = i;
  return lane < int32_t(v + W - V) ? las::broadcast<W>(-INFINITE) : las::load<W>(row + V - W);
}

template <int W>
LAS_INLINE float block_maximum(const float* row, int64_t begin, int64_t V) {
  Float<W> most = las::broadcast<W>(-INFINITE);
  for (int64_t v = begin; v < std::min(begin + BLOCK, V); v += W)
    most = las::larger<W>(most, load_logits<W>(row, v, V));
  return las::largest<W>(most);
}

template <int W>
LAS_INLINE float block_sum(const float* row, int64_t begin, int64_t V, float maximum) {
  Float<W> total = {};
  for (int64_t v = begin; v < std::min(begin + BLOCK, V); v += W)
    total += las::exp<W>(load_logits<W>(row, v, V) - maximum);
  return las::sum<W>(total);
}

Row summarise(const float* logits, int64_t V, float* block_maxima) {
  Row row{-INFINITE, 0.0f};
  las::widest([&](auto width) __attribute__((always_inline)) {
    constexpr int W = width;
    for (int64_t v = 0; v < V; v += BLOCK) {
      const float most = block_maximum<W>(logits, v, V);
      block_maxima[v / BLOCK] = most;
      row.maximum = most > row.maximum ? most : row.maximum;
    }
    double total = 0.0;
    for (int64_t v = 0; v < V; v += BLOCK) total += block_sum<W>(logits, v, V, row.maximum);
    row.log_sum = std::log(float(total));
  });
  return row;
}

struct Candidate {
  float rank, score;
  int64_t index;  // k * V + v
};

// The best candidates so far, best first. Equal ranks go to the lower index.
class Best {
 public:
  explicit Best(int64_t size) : found_(size), size_(size) {}

  void clear() { count_ = 0; }
  int64_t count() const { return count_; }
  const Candidate& operator[](int64_t i) const { return found_[i]; }

  // Whether a candidate of that rank and an index above all others so far would enter; one of NaN never does.
  bool takes(float rank) const { return count_ < size_ ? rank > -INFINITE : rank > found_[size_ - 1].rank; }

  void offer(const Candidate& candidate) {
    if (!takes(candidate.rank)) return;
    int64_t i = count_ < size_ ? count_++ : size_ - 1;
    for (; i > 0 && candidate.rank > found_[i - 1].rank; --i) found_[i] = found_[i - 1];
    found_[i] = candidate;
  }

  // Candidates of rank -inf come last, by index: those not yet taken, from the lowest.
  void fill() {
    const int64_t taken = count_;
    for (int64_t index = 0; count_ < size_; ++index) {
      const auto same = [&](const Candidate& x) { return x.index == index; };
      if (std::none_of(found_.begin(), found_.begin() + taken, same)) found_[count_++] = {-INFINITE, -INFINITE, index};
    }
  }

 private:
  std::vector<Candidate> found_;
  int64_t size_, count_ = 0;
};

struct Options {
  int64_t eos;
  const int64_t *minimum, *maximum;  // (B,) or null
  double length_penalty;
  float eos_threshold;
  const float *coverage, *table;  // (B, K) and (states, V), or null
  const int64_t* states;
  int64_t state_count;
  float weight;
};

struct Inputs {
  const float *logits, *scores;
  const bool* finished;
  const int64_t* lengths;
  int64_t B, K, V, blocks;
};

// How the candidates of one beam are ranked.
struct Beam {
  const float* logits;
  const float* block_maxima;
  Row row;
  float score, factor, coverage;  // rank = score of the candidate * factor + coverage
  const float* ngram;  // its row of the table, or null
  float weight;

  // What token v adds to the score.
  float step(int64_t v) const {
    const float model = row.log_probability(logits[v]);
    return ngram ? model + weight * ngram[v] : model;
  }
  float rank(float total) const { return total * factor + coverage; }
  Candidate candidate(float step, int64_t index) const { return {rank(score + step), score + step, index}; }
};

// Whether eos is too improbable beside the best other token.
bool below_threshold(const Beam& beam, const Inputs& in, int64_t eos, float threshold) {
  float other = -INFINITE;
  for (int64_t block = 0; block < in.blocks; ++block) {
    if (block != eos / BLOCK) {
      other = std::max(other, beam.block_maxima[block]);
      continue;
    }
    for (int64_t v = block * BLOCK; v < std::min(in.V, (block + 1) * BLOCK); ++v)
      if (v != eos) other = std::max(other, beam.logits[v]);
  }
  return beam.row.log_probability(beam.logits[eos]) <= threshold * beam.row.log_probability(other);
}

void offer_all(const Beam& beam, int64_t first, const Inputs& in, int64_t excluded, Best& best) {
  for (int64_t block = 0; block < in.blocks; ++block) {
    const float most = beam.score + beam.row.log_probability(beam.block_maxima[block]);
    if (beam.ngram == nullptr && !best.takes(beam.rank(most))) continue;
    const int64_t begin = block * BLOCK, n = std::min(BLOCK, in.V - begin);
    float totals[BLOCK], ranks[BLOCK];
    for (int64_t i = 0; i < n; ++i) totals[i] = beam.score + beam.step(begin + i);
    for (int64_t i = 0; i < n; ++i) ranks[i] = beam.rank(totals[i]);
    for (int64_t i = 0; i < n; ++i)
      if (best.takes(ranks[i]) && begin + i != excluded) best.offer({ranks[i], totals[i], first + begin + i});
  }
}

// Offer the candidates of beam k of utterance b, in the order of their indices.
void offer_beam(const Inputs& in, const Options& options, const Row* rows, const float* block_maxima, int64_t b,
                int64_t k, Best& best) {
  const int64_t at = b * in.K + k, first = k * in.V, eos = options.eos;
  const bool finished = in.finished[at];
  const float tokens = float(std::max<int64_t>(1, in.lengths[at] + !finished));
  const Beam beam{in.logits + at * in.V,
                  block_maxima + at * in.blocks,
                  rows[at],
                  in.scores[at],
                  options.length_penalty == 0.0 ? 1.0f : 1.0f / std::pow(tokens, float(options.length_penalty)),
                  options.coverage ? options.coverage[at] : 0.0f,
                  options.table ? options.table + options.states[at] * in.V : nullptr,
                  options.weight};
  if (finished) return best.offer(beam.candidate(0.0f, first + eos));
  if (beam.score == -INFINITE) return;
  if (options.maximum && in.lengths[at] >= options.maximum[b])
    return best.offer(beam.candidate(beam.step(eos), first + eos));
  const bool denied =
      (options.eos_threshold != 0.0f && below_threshold(beam, in, eos, options.eos_threshold)) ||
      (options.minimum && in.lengths[at] < options.minimum[b]);
  offer_all(beam, first, in, denied ? eos : -1, best);
}

struct Outputs {
  float* scores;
  int64_t *tokens, *parents;
  bool* finished;
  int64_t *lengths, *states;
};

void write(const Inputs& in, const Options& options, int64_t b, const Best& best, const Outputs& out) {
  for (int64_t k = 0; k < in.K; ++k) {
    const int64_t to = b * in.K + k, parent = best[k].index / in.V, token = best[k].index % in.V;
    const int64_t from = b * in.K + parent;
    const bool ended = in.finished[from];
    out.scores[to] = best[k].score;
    out.tokens[to] = token;
    out.parents[to] = parent;
    out.finished[to] = ended || token == options.eos;
    out.lengths[to] = in.lengths[from] + !ended;
    if (options.table == nullptr) continue;
    const int64_t state = options.states[from];
    out.states[to] = ended ? state : (state * in.V + token) % options.state_count;
  }
}

using Optional = std::optional<at::Tensor>;

void check_like(const char* name, const Optional& x, at::IntArrayRef shape, at::ScalarType dtype) {
  TORCH_CHECK(!x || (x->sizes() == shape && x->scalar_type() == dtype), name, " must be ", shape, " ", dtype,
              " like logits; got ", x->sizes(), " ", x->scalar_type());
}

void check(const at::Tensor& logits, const at::Tensor& scores, const at::Tensor& finished, const at::Tensor& lengths,
           int64_t eos, const Optional& minimum, const Optional& maximum, const Optional& coverage,
           const Optional& table, const Optional& states) {
  const auto type = logits.scalar_type();
  TORCH_CHECK(logits.dim() == 3 && (type == at::kFloat || type == at::kBFloat16 || type == at::kHalf),
              "logits must be (B, K, V) float32, bfloat16 or float16; got ", logits.sizes(), " ", type);
  const int64_t B = logits.size(0), K = logits.size(1), V = logits.size(2);
  check_like("scores", scores, {B, K}, at::kFloat);
  check_like("finished", finished, {B, K}, at::kBool);
  check_like("lengths", lengths, {B, K}, at::kLong);
  check_like("minimum", minimum, {B}, at::kLong);
  check_like("maximum", maximum, {B}, at::kLong);
  check_like("coverage", coverage, {B, K}, at::kFloat);
  check_like("states", states, {B, K}, at::kLong);
  TORCH_CHECK(table.has_value() == states.has_value(), "table and states must be given together");
  TORCH_CHECK(!table || (table->dim() == 2 && table->size(0) > 0 && table->size(1) == V &&
                         table->scalar_type() == at::kFloat),
              "table must be (states, V) float32 with V=", V, "; got ", table->sizes(), " ", table->scalar_type());
  TORCH_CHECK(eos >= 0 && eos < V, "eos must be a token from 0 to ", V - 1, "; got ", eos);
}

Optional contiguous(const Optional& x) { return x ? Optional(x->contiguous()) : Optional(); }

template <class T>
const T* pointer(const Optional& x) {
  return x ? x->const_data_ptr<T>() : nullptr;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> beam_topk(
    const at::Tensor& logits_in, const at::Tensor& scores_in, const at::Tensor& finished_in,
    const at::Tensor& lengths_in, int64_t eos, const Optional& minimum_in, const Optional& maximum_in,
    double length_penalty, double eos_threshold, const Optional& coverage_in, const Optional& table_in,
    const Optional& states_in, double weight) {
  check(logits_in, scores_in, finished_in, lengths_in, eos, minimum_in, maximum_in, coverage_in, table_in, states_in);
  const at::Tensor logits = logits_in.to(at::kFloat).contiguous(), scores = scores_in.contiguous();
  const at::Tensor finished = finished_in.contiguous(), lengths = lengths_in.contiguous();
  const Optional minimum = contiguous(minimum_in), maximum = contiguous(maximum_in);
  const Optional coverage = contiguous(coverage_in), table = contiguous(table_in), states = contiguous(states_in);
  const int64_t B = logits.size(0), K = logits.size(1), V = logits.size(2);
  const Inputs in{logits.const_data_ptr<float>(), scores.const_data_ptr<float>(), finished.const_data_ptr<bool>(),
                  lengths.const_data_ptr<int64_t>(), B, K, V, (V + BLOCK - 1) / BLOCK};
  const Options options{eos, pointer<int64_t>(minimum), pointer<int64_t>(maximum), length_penalty, float(eos_threshold),
                        pointer<float>(coverage), pointer<float>(table), pointer<int64_t>(states),
                        table ? table->size(0) : 0, float(weight)};
  for (int64_t i = 0; table && i < B * K; ++i)
    TORCH_CHECK(options.states[i] >= 0 && options.states[i] < options.state_count, "states must be from 0 to ",
                options.state_count - 1, "; got ", options.states[i]);

  std::vector<Row> rows(B * K);
  std::vector<float> block_maxima(B * K * in.blocks);
  at::parallel_for(0, B * K, std::max<int64_t>(1, GRAIN / V), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (!in.finished[i]) rows[i] = summarise(in.logits + i * V, V, block_maxima.data() + i * in.blocks);
  });

  const at::IntArrayRef shape = scores.sizes();
  const at::Tensor total = at::empty(shape, scores.options()), ended = at::empty(shape, finished.options());
  const at::Tensor tokens = at::empty(shape, lengths.options()), parents = at::empty(shape, lengths.options());
  const at::Tensor after = at::empty(shape, lengths.options());
  const at::Tensor led = table ? at::empty(shape, lengths.options()) : at::empty({0, 0}, lengths.options());
  const Outputs out{total.mutable_data_ptr<float>(),     tokens.mutable_data_ptr<int64_t>(),
                    parents.mutable_data_ptr<int64_t>(), ended.mutable_data_ptr<bool>(),
                    after.mutable_data_ptr<int64_t>(),   led.mutable_data_ptr<int64_t>()};
  at::parallel_for(0, B, std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, K * V)), [&](int64_t begin, int64_t end) {
    Best best(K);
    for (int64_t b = begin; b < end; ++b) {
      best.clear();
      for (int64_t k = 0; k < K; ++k) offer_beam(in, options, rows.data(), block_maxima.data(), b, k, best);
      best.fill();
      write(in, options, b, best, out);
    }
  });
  return {total, tokens, parents, ended, after, led};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(las_fast, m) {
  m.def("beam_topk_cpp(Tensor logits, Tensor scores, Tensor finished, Tensor lengths, int eos, Tensor? minimum,"
        " Tensor? maximum, float length_penalty, float eos_threshold, Tensor? coverage, Tensor? table, Tensor? states,"
        " float weight)"
        " -> (Tensor scores, Tensor tokens, Tensor parents, Tensor finished, Tensor lengths, Tensor states)");
}

TORCH_LIBRARY_IMPL(las_fast, CPU, m) { m.impl("beam_topk_cpp", &beam_topk); }
