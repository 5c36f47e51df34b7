// The layers of GPT-2, forward and backward: causal attention, linear, feed-forward, LayerNorm,
// dropout with residual sum; and Muon's update. Each makes one pass over blocks that fit the cache.
//
// Python calls the exported C functions through ctypes; chargpt/compute/native.py names each pointer.
// They return 0, or 1 if memory ran out. Shapes: B batch, T time, H heads, D head size, C = H × D;
// n rows.

#include "kernels.h"

namespace {

constexpr int CACHE_LINE = 64;   // bytes
constexpr int TOKENS = 128;      // rows of a linear layer per block
constexpr int QUERIES = 32;      // rows of the attention matrix per block, which fits the cache

// --- dropout: a hash of (key, index) decides, so forward and backward drop the same values

struct Dropout {
  uint32_t key;
  uint32_t dropped;  // how many of 2^31 hashes drop a value
  float scale;
  bool on() const { return dropped > 0; }

  Dropout(double p, uint64_t seed, uint32_t stream)
      : key((uint32_t)(seed * 0x9E3779B97F4A7C15ull >> 32) ^ (stream * 0x85EBCA6Bu)),
        dropped((uint32_t)std::min(std::round(p * 2147483648.0), 2147483647.0)),
        scale(1.f / (1.f - (float)p)) {}

  // Return scale or 0 for each of L indices, starting with `first`.
  vec mask(uint32_t first) const {
    words x = (words)lanes() + first;  // lowbias32 (Wellons 2018)
    x = x * 0x9E3779B9u + key;
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    x = x ^ (x >> 16);
    const ints keep = (ints)(x >> 1) >= (int32_t)dropped;
    return (vec)((ints)broadcast(scale) & keep);
  }
};

// --- attention

// One head of one sequence in (B, T, 3, H, D).
template <class T>
struct Head {
  typedef typename T::Value Value;
  int t, d, wide;  // wide: t rounded up to whole panels
  long row;        // distance between two positions, in values
  const Value *q, *k, *v;

  Head(const Value* qkv, long index, int t, int heads, int d)
      : t(t), d(d), wide(round_up(t, PANEL)), row(3l * heads * d) {
    q = qkv + index / heads * t * row + index % heads * d;
    k = q + heads * d;
    v = k + heads * d;
  }

  // Prefetch the next head of this sequence: the processor does not predict strides this large.
  void prefetch_next(long index, int heads) const {
    if (index % heads + 1 == heads) return;
    for (const Value* first : {q, k, v}) prefetch(first + d, row);
  }
  void prefetch(const Value* first, long stride) const {
    for (int i = 0; i < t; i++)
      for (int j = 0; j < d; j += CACHE_LINE / (int)sizeof(Value))
        __builtin_prefetch(first + i * stride + j);
  }

  // Keys that the positions before `last` see, rounded up to whole panels; the same in words.
  int seen(int last) const { return std::min(wide, round_up(last, PANEL)); }
  int seen_words(int last) const { return std::min(seen(last), round_up(t, T::G)) / T::G; }

  // out[i][j] = scale × q_(first + i) · k_j for m rows and every key that the last row sees.
  void scores(int first, int m, const Packed& keys, float scale, float* out) const {
    multiply<T>(m, seen(first + m), d / T::G, q + first * row, row / T::G, 1, keys.data(),
                keys.depth, [&](int i, int j, auto& sums) {
                  for_each(i, j, sums, [&](int i, int j, vec x) { store(out + i * wide + j, x * scale); });
                });
  }
};

template <class T>
void attention_forward(const typename T::Value* qkv, typename T::Value* out, float* log_sums, int B,
                       int t, int heads, int d, double p, uint64_t seed) {
  typedef typename T::Value Value;
  const float scale = 1.f / std::sqrt((float)d);
  Allocations allocations;
#pragma omp parallel
  {
    const int wide = round_up(t, PANEL);
    Packed keys, values;
    std::vector<float> scores;
    std::vector<Value> weights;
    const bool ready = allocations.succeed([&] {
      keys = Packed::of(T(), d, wide), values = Packed::of(T(), t, d);
      scores.resize((long)QUERIES * wide);
      weights.resize((long)QUERIES * wide);
    });
    if (ready)
#pragma omp for schedule(dynamic, heads)
    for (long index = 0; index < (long)B * heads; index++) {
      const Head<T> head(qkv, index, t, heads, d);
      head.prefetch_next(index, heads);
      const Dropout dropout(p, seed, (uint32_t)index);
      pack_transposed<T>(head.k, head.row, d, t, keys);
      pack<T>(head.v, head.row, t, d, values);
      Value* y = out + (index / heads * t * heads + index % heads) * d;
      for (int first = 0; first < t; first += QUERIES) {
        const int m = std::min(QUERIES, t - first), seen = head.seen(first + m);
        float norms[QUERIES];
        head.scores(first, m, keys, scale, scores.data());
        for (int i = 0; i < m; i++) {
          float* row = scores.data() + i * wide;
          const RowSum sums = exponentials(row, first + i, seen);
          norms[i] = 1.f / sums.total;
          log_sums[index * t + first + i] = sums.top + std::log(sums.total);
          for (int j = 0; j < seen; j += L) {
            vec x = load<vec>(row + j);
            if (dropout.on()) x *= dropout.mask((uint32_t)((first + i) * wide + j));
            T::write(weights.data() + i * wide + j, x);
          }
        }
        multiply<T>(m, d, head.seen_words(first + m), weights.data(), wide / T::G, 1, values.data(),
                    values.depth, [&](int i, int j, auto& sums) {
                      for_each(i, j, sums, [&](int i, int j, vec x) {
                        T::write(y + (long)(first + i) * heads * d + j, x * norms[i]);
                      });
                    });
      }
    }
  }
  allocations.check();
}

// With weights P, dropout mask M, output O = (P M) V and upstream gradient dO:
//   dV = (P M)ᵀ dO,  dP = (dO Vᵀ) M,  dS = P (dP - rowsum(dO O)) scale,  dQ = dS K,  dK = dSᵀ Q
template <class T>
void attention_backward(const typename T::Value* qkv, const typename T::Value* out,
                        const float* log_sums, const typename T::Value* d_out,
                        typename T::Value* d_qkv, int B, int t, int heads, int d, double p,
                        uint64_t seed) {
  typedef typename T::Value Value;
  const float scale = 1.f / std::sqrt((float)d);
  const long c = (long)heads * d;
  Allocations allocations;
#pragma omp parallel
  {
    const int wide = round_up(t, PANEL);
    Packed keys_t, values_t, keys, queries, d_outs;
    std::vector<float> scores, d_weights, d_k, d_v;
    std::vector<Value> d_scores;
    // The left factors of products over queries: word (i / G, j) for key j.
    std::vector<uint32_t> weights_by_key, d_scores_by_key;
    const bool ready = allocations.succeed([&] {
      keys_t = Packed::of(T(), d, wide), values_t = Packed::of(T(), d, wide);
      keys = Packed::of(T(), t, d), queries = Packed::of(T(), t, d), d_outs = Packed::of(T(), t, d);
      const long size = (long)QUERIES * wide;
      scores.resize(size), d_weights.resize(size), d_scores.resize(size);
      weights_by_key.resize(size / T::G), d_scores_by_key.resize(size / T::G);
      d_k.resize((long)wide * d), d_v.resize((long)wide * d);
    });
    if (ready)
#pragma omp for schedule(dynamic, heads)
    for (long index = 0; index < (long)B * heads; index++) {
      const Head<T> head(qkv, index, t, heads, d);
      head.prefetch_next(index, heads);
      const Dropout dropout(p, seed, (uint32_t)index);
      const long place = index / heads * t * c + index % heads * d;
      const Value *dy = d_out + place, *y = out + place;
      if (index % heads + 1 < heads) head.prefetch(dy + d, c), head.prefetch(y + d, c);
      pack_transposed<T>(head.k, head.row, d, t, keys_t);
      pack_transposed<T>(head.v, head.row, d, t, values_t);
      pack<T>(head.k, head.row, t, d, keys);
      pack<T>(head.q, head.row, t, d, queries);
      pack<T>(dy, c, t, d, d_outs);
      std::fill(d_k.begin(), d_k.end(), 0.f);
      std::fill(d_v.begin(), d_v.end(), 0.f);
      Value* d_q = d_qkv + (head.q - qkv);
      for (int first = 0; first < t; first += QUERIES) {
        const int m = std::min(QUERIES, t - first), seen = head.seen(first + m);
        head.scores(first, m, keys_t, scale, scores.data());
        multiply<T>(m, seen, d / T::G, dy + first * c, c / T::G, 1, values_t.data(), values_t.depth,
                    [&](int i, int j, auto& sums) {
                      for_each(i, j, sums, [&](int i, int j, vec x) {
                        store(d_weights.data() + i * wide + j, x);
                      });
                    });
        for (int i0 = 0; i0 < m; i0 += T::G) {
          float delta[2] = {}, log_sum[2] = {};
          const int here = std::min(T::G, m - i0);
          for (int r = 0; r < here; r++) {
            const long at = first + i0 + r;
            vec total = {};
            for (int j = 0; j < d; j += L)
              total += T::read(dy + at * c + j) * T::read(y + at * c + j);
            delta[r] = sum(total);
            log_sum[r] = log_sums[index * t + at];
          }
          for (int j = 0; j < seen; j += L) {
            vec weight[2] = {}, d_score[2] = {};
            for (int r = 0; r < here; r++) {
              const int i = i0 + r, query = first + i;
              const vec s = load<vec>(scores.data() + i * wide + j);
              const vec w = visible(exponential(s - log_sum[r]), query, j, 0.f);
              vec dw = load<vec>(d_weights.data() + i * wide + j);
              weight[r] = w;
              if (dropout.on()) {
                const vec mask = dropout.mask((uint32_t)(query * wide + j));
                weight[r] *= mask;
                dw *= mask;
              }
              d_score[r] = w * (dw - delta[r]) * scale;
              T::write(d_scores.data() + i * wide + j, d_score[r]);
            }
            store(weights_by_key.data() + (long)(i0 / T::G) * wide + j, T::pack(weight));
            store(d_scores_by_key.data() + (long)(i0 / T::G) * wide + j, T::pack(d_score));
          }
        }
        multiply<T>(m, d, head.seen_words(first + m), d_scores.data(), wide / T::G, 1, keys.data(),
                    keys.depth, [&](int i, int j, auto& sums) {
                      for_each(i, j, sums, [&](int i, int j, vec x) {
                        T::write(d_q + (first + i) * head.row + j, x);
                      });
                    });
        auto add_by_key = [&](const std::vector<uint32_t>& left, Packed& right, float* out) {
          multiply<T>(std::min(seen, t), d, (m + T::G - 1) / T::G, left.data(), 1, wide,
                      right.at(first / T::G, 0), right.depth, [&](int i, int j, auto& sums) {
                        for_each(i, j, sums, [&](int i, int j, vec x) {
                          float* at = out + (long)i * d + j;
                          store(at, load<vec>(at) + x);
                        });
                      });
        };
        add_by_key(weights_by_key, d_outs, d_v.data());
        add_by_key(d_scores_by_key, queries, d_k.data());
      }
      for (int i = 0; i < t; i++)
        for (int j = 0; j < d; j += L) {
          T::write(d_q + i * head.row + c + j, load<vec>(d_k.data() + (long)i * d + j));
          T::write(d_q + i * head.row + 2 * c + j, load<vec>(d_v.data() + (long)i * d + j));
        }
    }
  }
  allocations.check();
}

// --- linear layers: out = x Wᵀ + b, with W (outputs × inputs) and b float

// The gradients of a weight and a bias, summed by one thread over its tokens.
struct Gradient {
  int outputs, inputs;
  std::vector<float> weight, bias;

  Gradient(int outputs, int inputs)
      : outputs(outputs), inputs(inputs), weight((long)outputs * inputs), bias(outputs) {}

  // weight += upᵀ x; both are packed over the same m tokens.
  template <class T>
  void add(int m, const Packed& up, const Packed& x) {
    const int k = (m + T::G - 1) / T::G;
    for (int o = 0; o < outputs; o += PANEL)
      multiply<T>(std::min(PANEL, outputs - o), inputs, k, up.data() + o * up.depth, 1, PANEL,
                  x.data(), x.depth, [&](int i, int j, auto& sums) {
                    for_each(i, j, sums, [&](int i, int j, vec v) {
                      float* at = weight.data() + (long)(o + i) * inputs + j;
                      store(at, load<vec>(at) + v);
                    });
                  });
  }
  // bias += column sums of up (m × outputs).
  template <class T>
  void add_bias(int m, const typename T::Value* up) {
    for (int j = 0; j < outputs; j += L) {
      vec total = load<vec>(&bias[j]);
      for (int i = 0; i < m; i++) total += T::read(up + (long)i * outputs + j);
      store(&bias[j], total);
    }
  }
};

// The gradients of all threads, summed in the order of the threads, so the sums are reproducible.
struct Gradients {
  std::vector<std::unique_ptr<Gradient>> parts;

  Gradients() : parts(threads()) {}
  Gradient& mine(int outputs, int inputs) {
    parts[thread()] = std::make_unique<Gradient>(outputs, inputs);
    return *parts[thread()];
  }
  void add_up(float* weight, float* bias, int outputs, int inputs) const {
#pragma omp parallel for
    for (int o = 0; o < outputs; o++) {
      float* row = weight + (long)o * inputs;
      std::fill(row, row + inputs, 0.f);
      if (bias) bias[o] = 0;
      for (const auto& part : parts) {
        if (!part) continue;
        const float* other = part->weight.data() + (long)o * inputs;
        for (int i = 0; i < inputs; i++) row[i] += other[i];
        if (bias) bias[o] += part->bias[o];
      }
    }
  }
};

template <class T>
void linear_forward(const typename T::Value* x, const float* w, const float* b,
                    typename T::Value* out, long n, int inputs, int outputs) {
  const Packed weight = pack_weight<T>(w, outputs, inputs, true);
#pragma omp parallel for
  for (long first = 0; first < n; first += TOKENS) {
    const int m = (int)std::min((long)TOKENS, n - first);
    multiply<T>(m, outputs, inputs / T::G, x + first * inputs, inputs / T::G, 1, weight.data(),
                weight.depth, [&](int i, int j, auto& sums) {
                  for_each(i, j, sums, [&](int i, int j, vec v) {
                    if (b) v += load<vec>(b + j);
                    T::write(out + (first + i) * outputs + j, v);
                  });
                });
  }
}

template <class T>
void linear_backward(const typename T::Value* x, const float* w, const typename T::Value* d_out,
                     typename T::Value* d_x, float* d_w, float* d_b, long n, int inputs,
                     int outputs) {
  const Packed weight = pack_weight<T>(w, outputs, inputs, false);
  Gradients gradients;
  Allocations allocations;
#pragma omp parallel
  {
    Gradient* gradient = nullptr;
    Packed xs, ups;
    const bool ready = allocations.succeed([&] {
      gradient = &gradients.mine(outputs, inputs);
      xs = Packed::of(T(), TOKENS, inputs), ups = Packed::of(T(), TOKENS, outputs);
    });
    if (ready)
#pragma omp for
    for (long first = 0; first < n; first += TOKENS) {
      const int m = (int)std::min((long)TOKENS, n - first);
      const typename T::Value *here = x + first * inputs, *up = d_out + first * outputs;
      pack<T>(here, inputs, m, inputs, xs);
      pack<T>(up, outputs, m, outputs, ups);
      gradient->add<T>(m, ups, xs);
      if (d_b) gradient->add_bias<T>(m, up);
      multiply<T>(m, inputs, outputs / T::G, up, outputs / T::G, 1, weight.data(), weight.depth,
                  [&](int i, int j, auto& sums) {
                    for_each(i, j, sums, [&](int i, int j, vec v) {
                      T::write(d_x + (first + i) * inputs + j, v);
                    });
                  });
    }
  }
  allocations.check();
  gradients.add_up(d_w, d_b, outputs, inputs);
}

// --- feed-forward: out = GELU(x W1ᵀ + b1) W2ᵀ + b2, hidden size f

// `before` (n × f) keeps the input of GELU for the backward pass.
template <class T>
void feed_forward_forward(const typename T::Value* x, const float* w1, const float* b1,
                          const float* w2, const float* b2, typename T::Value* before,
                          typename T::Value* out, long n, int c, int f) {
  const Packed expand = pack_weight<T>(w1, f, c, true), project = pack_weight<T>(w2, c, f, true);
  Allocations allocations;
#pragma omp parallel
  {
    std::vector<typename T::Value> hidden;
    const bool ready = allocations.succeed([&] { hidden.resize((long)TOKENS * f); });
    if (ready)
#pragma omp for
    for (long first = 0; first < n; first += TOKENS) {
      const int m = (int)std::min((long)TOKENS, n - first);
      multiply<T>(m, f, c / T::G, x + first * c, c / T::G, 1, expand.data(), expand.depth,
                  [&](int i, int j, auto& sums) {
                    for_each(i, j, sums, [&](int i, int j, vec v) {
                      if (b1) v += load<vec>(b1 + j);
                      T::write(before + (first + i) * f + j, v);
                      T::write(hidden.data() + (long)i * f + j, v * sigmoid_2u<T>(v));
                    });
                  });
      multiply<T>(m, c, f / T::G, hidden.data(), f / T::G, 1, project.data(), project.depth,
                  [&](int i, int j, auto& sums) {
                    for_each(i, j, sums, [&](int i, int j, vec v) {
                      if (b2) v += load<vec>(b2 + j);
                      T::write(out + (first + i) * c + j, v);
                    });
                  });
    }
  }
  allocations.check();
}

template <class T>
void feed_forward_backward(const typename T::Value* x, const float* w1, const float* w2,
                           const typename T::Value* before, const typename T::Value* d_out,
                           typename T::Value* d_x, float* d_w1, float* d_b1, float* d_w2,
                           float* d_b2, long n, int c, int f) {
  const Packed expand = pack_weight<T>(w1, f, c, false), project = pack_weight<T>(w2, c, f, false);
  Gradients firsts, seconds;
  Allocations allocations;
#pragma omp parallel
  {
    Gradient *first_layer = nullptr, *second_layer = nullptr;
    Packed xs, ups, hiddens, d_hiddens;
    std::vector<typename T::Value> d_hidden;
    const bool ready = allocations.succeed([&] {
      first_layer = &firsts.mine(f, c), second_layer = &seconds.mine(c, f);
      xs = Packed::of(T(), TOKENS, c), ups = Packed::of(T(), TOKENS, c);
      hiddens = Packed::of(T(), TOKENS, f), d_hiddens = Packed::of(T(), TOKENS, f);
      d_hidden.resize((long)TOKENS * f);
    });
    if (ready)
#pragma omp for
    for (long first = 0; first < n; first += TOKENS) {
      const int m = (int)std::min((long)TOKENS, n - first);
      const typename T::Value *here = x + first * c, *up = d_out + first * c;
      pack<T>(here, c, m, c, xs);
      pack<T>(up, c, m, c, ups);
      multiply<T>(m, f, c / T::G, up, c / T::G, 1, project.data(), project.depth,
                  [&](int i, int j, auto& sums) {
                    for_each_group<T>(i, j, sums, [&](int i, int j, vec* group, int count) {
                      vec hidden[2] = {};
                      for (int r = 0; r < count; r++) {
                        const vec v = T::read(before + (first + i + r) * f + j), s = sigmoid_2u<T>(v);
                        hidden[r] = v * s;
                        group[r] *= s + hidden[r] * (1.f - s) * TWICE_ROOT * (1.f + 3 * CUBIC * v * v);
                        T::write(d_hidden.data() + (long)(i + r) * f + j, group[r]);
                      }
                      store(hiddens.at(i / T::G, j), T::pack(hidden));
                      store(d_hiddens.at(i / T::G, j), T::pack(group));
                    });
                  });
      second_layer->add<T>(m, ups, hiddens);
      first_layer->add<T>(m, d_hiddens, xs);
      if (d_b1) first_layer->add_bias<T>(m, d_hidden.data());
      if (d_b2) second_layer->add_bias<T>(m, up);
      multiply<T>(m, c, f / T::G, d_hidden.data(), f / T::G, 1, expand.data(), expand.depth,
                  [&](int i, int j, auto& sums) {
                    for_each(i, j, sums,
                         [&](int i, int j, vec v) { T::write(d_x + (first + i) * c + j, v); });
                  });
    }
  }
  allocations.check();
  firsts.add_up(d_w1, d_b1, f, c);
  seconds.add_up(d_w2, d_b2, c, f);
}

// --- Muon

// Replaces x by a x + b (x xᵀ) x + c (x xᵀ)² x.
template <class T>
struct Orthogonalizer {
  typedef typename T::Value Value;
  int rows, columns;
  Packed transposed, gram, right;
  std::vector<Value> products, polynomial;

  Orthogonalizer(int rows, int columns)
      : rows(rows),
        columns(columns),
        transposed(Packed::of(T(), columns, rows)),
        gram(Packed::of(T(), rows, rows)),
        right(Packed::of(T(), rows, columns)),
        products((long)rows * rows),
        polynomial(products.size()) {}

  void step(Value* x, float a, float b, float c) {
    pack_transposed<T>(x, columns, columns, rows, transposed);
    multiply<T>(rows, rows, columns / T::G, x, columns / T::G, 1, transposed.data(),
                transposed.depth, [&](int i, int j, auto& sums) {
                  for_each(i, j, sums, [&](int i, int j, vec v) {
                    T::write(products.data() + (long)i * rows + j, v);
                  });
                });
    pack<T>(products.data(), rows, rows, rows, gram);
    multiply<T>(rows, rows, rows / T::G, products.data(), rows / T::G, 1, gram.data(), gram.depth,
                [&](int i, int j, auto& sums) {
                  for_each(i, j, sums, [&](int i, int j, vec v) {
                    const long at = (long)i * rows + j;
                    T::write(polynomial.data() + at, T::read(products.data() + at) * b + v * c);
                  });
                });
    pack<T>(x, columns, rows, columns, right);
    multiply<T>(rows, columns, rows / T::G, polynomial.data(), rows / T::G, 1, right.data(),
                right.depth, [&](int i, int j, auto& sums) {
                  for_each(i, j, sums, [&](int i, int j, vec v) {
                    Value* at = x + (long)i * columns + j;
                    T::write(at, T::read(at) * a + v);
                  });
                });
  }
};

void transpose(const float* x, int rows, int columns, float* out) {
  for (int i = 0; i < rows; i += L)
    for (int j = 0; j < columns; j++)
      for (int r = i; r < i + L; r++) out[(long)j * rows + r] = x[(long)r * columns + j];
}

// Update one matrix: momentum, orthogonalisation, decay and step, in place. All memory is allocated
// before the first change.
template <class T>
void muon_matrix(float* weights, const float* gradient, float* momenta, int rows, int columns,
                 float scale, float momentum, float decay, const float* steps, int n_steps) {
  const int low = std::min(rows, columns), high = std::max(rows, columns);
  const bool tall = rows > columns;
  const long size = (long)rows * columns;
  std::vector<float> update(size), turned(tall ? size : 0);
  std::vector<typename T::Value> x(size);
  Orthogonalizer<T> orthogonalizer(low, high);
  vec squares = {};
  for (long i = 0; i < size; i += L) {
    float* memory = momenta + i;
    const vec g = load<vec>(gradient + i), old = load<vec>(memory);
    const vec now = old + (g - old) * (1 - momentum), ahead = g + (now - g) * momentum;
    store(memory, now);
    store(&update[i], ahead);
    squares += ahead * ahead;
  }
  const float inverse_norm = 1.f / std::max(std::sqrt(sum(squares)), 1e-7f);
  if (tall) transpose(update.data(), rows, columns, turned.data());
  const float* wide = tall ? turned.data() : update.data();
  for (long i = 0; i < size; i += L) T::write(&x[i], load<vec>(wide + i) * inverse_norm);
  for (const float* step = steps; step < steps + 3 * n_steps; step += 3)
    orthogonalizer.step(x.data(), step[0], step[1], step[2]);
  for (long i = 0; i < size; i += L) store(&update[i], T::read(&x[i]));
  if (tall) transpose(update.data(), columns, rows, turned.data());
  const float* direction = tall ? turned.data() : update.data();
  for (long i = 0; i < size; i += L) {
    float* at = weights + i;
    store(at, load<vec>(at) * decay - load<vec>(direction + i) * scale);
  }
}

// Update n matrices. `shapes` holds the rows and columns of each, `scales` the length of each step.
template <class T>
void muon(float* const* weights, const float* const* gradients, float* const* momenta,
          const int* shapes, const float* scales, int n, float momentum, float decay,
          const float* steps, int n_steps) {
  Allocations allocations;
#pragma omp parallel for schedule(dynamic)
  for (int i = 0; i < n; i++)
    if (out_of_memory([&] {
          muon_matrix<T>(weights[i], gradients[i], momenta[i], shapes[2 * i], shapes[2 * i + 1],
                         scales[i], momentum, decay, steps, n_steps);
        }))
      allocations.failed = true;
  allocations.check();
}

// --- LayerNorm: float in, T out

template <class T>
void layer_norm_forward(const float* x, const float* gain, const float* bias,
                        typename T::Value* out, float* means, float* inverse_stds, long n, int c,
                        float eps) {
#pragma omp parallel for
  for (long i = 0; i < n; i++) {
    const float* row = x + i * c;
    vec total = {}, squares = {};
    for (int j = 0; j < c; j += L) total += load<vec>(row + j);
    const float mean = sum(total) / c;
    for (int j = 0; j < c; j += L) {
      const vec centred = load<vec>(row + j) - mean;
      squares += centred * centred;
    }
    const float inverse_std = 1.f / std::sqrt(sum(squares) / c + eps);
    means[i] = mean;
    inverse_stds[i] = inverse_std;
    for (int j = 0; j < c; j += L) {
      vec y = (load<vec>(row + j) - mean) * inverse_std * load<vec>(gain + j);
      if (bias) y += load<vec>(bias + j);
      T::write(out + i * c + j, y);
    }
  }
}

// With z the normalised x and g = upstream × gain: dx = (g - mean(g) - z mean(g z)) / std.
template <class T>
void layer_norm_backward(const float* x, const float* gain, const float* means,
                         const float* inverse_stds, const typename T::Value* d_out, float* d_x,
                         float* d_gain, float* d_bias, long n, int c) {
  Gradients gradients;
  Allocations allocations;
#pragma omp parallel
  {
    float *gains = nullptr, *biases = nullptr;
    const bool ready = allocations.succeed([&] {
      Gradient& gradient = gradients.mine(c, 1);  // a gain is a weight with one input
      gains = gradient.weight.data(), biases = gradient.bias.data();
    });
    if (ready)
#pragma omp for
    for (long i = 0; i < n; i++) {
      const float *row = x + i * c, mean = means[i], inverse_std = inverse_stds[i];
      const typename T::Value* dy = d_out + i * c;
      vec total = {}, along = {};
      for (int j = 0; j < c; j += L) {
        const vec z = (load<vec>(row + j) - mean) * inverse_std, up = T::read(dy + j);
        const vec g = up * load<vec>(gain + j);
        total += g;
        along += g * z;
        store(&gains[j], load<vec>(&gains[j]) + up * z);
        store(&biases[j], load<vec>(&biases[j]) + up);
      }
      const float mean_g = sum(total) / c, mean_gz = sum(along) / c;
      for (int j = 0; j < c; j += L) {
        const vec z = (load<vec>(row + j) - mean) * inverse_std;
        const vec g = T::read(dy + j) * load<vec>(gain + j);
        store(d_x + i * c + j, (g - mean_g - z * mean_gz) * inverse_std);
      }
    }
  }
  allocations.check();
  gradients.add_up(d_gain, d_bias, c, 1);
}

// --- residual sum: float x plus dropout of T

template <class T>
void residual_forward(const float* x, const typename T::Value* update, float* out, long n, double p,
                      uint64_t seed) {
  const Dropout dropout(p, seed, 0);
#pragma omp parallel for
  for (long i = 0; i < n / L; i++) {
    vec u = T::read(update + i * L);
    if (dropout.on()) u *= dropout.mask((uint32_t)(i * L));
    store(out + i * L, load<vec>(x + i * L) + u);
  }
}

template <class T>
void residual_backward(const float* d_out, typename T::Value* d_update, long n, double p,
                       uint64_t seed) {
  const Dropout dropout(p, seed, 0);
#pragma omp parallel for
  for (long i = 0; i < n / L; i++) {
    vec u = load<vec>(d_out + i * L);
    if (dropout.on()) u *= dropout.mask((uint32_t)(i * L));
    T::write(d_update + i * L, u);
  }
}

}  // namespace

// --- the exported functions, once per value type; `_bf16` only where the processor supports it

EXPORT int chargpt_lanes() { return L; }

#define CHECKED(...) return out_of_memory([&] { __VA_ARGS__; });
#define FUNCTIONS(T, suffix)                                                                       \
  EXPORT int attention_forward_##suffix(const T::Value* qkv, T::Value* out, float* log_sums,       \
      int B, int t, int heads, int d, double p, uint64_t seed) {                                   \
    CHECKED(attention_forward<T>(qkv, out, log_sums, B, t, heads, d, p, seed))                     \
  }                                                                                                \
  EXPORT int attention_backward_##suffix(const T::Value* qkv, const T::Value* out,                 \
      const float* log_sums, const T::Value* d_out, T::Value* d_qkv, int B, int t, int heads,      \
      int d, double p, uint64_t seed) {                                                            \
    CHECKED(attention_backward<T>(qkv, out, log_sums, d_out, d_qkv, B, t, heads, d, p, seed))      \
  }                                                                                                \
  EXPORT int layer_norm_forward_##suffix(const float* x, const float* gain, const float* bias,     \
      T::Value* out, float* means, float* inverse_stds, long n, int c, float eps) {                \
    CHECKED(layer_norm_forward<T>(x, gain, bias, out, means, inverse_stds, n, c, eps))             \
  }                                                                                                \
  EXPORT int layer_norm_backward_##suffix(const float* x, const float* gain, const float* means,   \
      const float* inverse_stds, const T::Value* d_out, float* d_x, float* d_gain, float* d_bias,  \
      long n, int c) {                                                                             \
    CHECKED(layer_norm_backward<T>(x, gain, means, inverse_stds, d_out, d_x, d_gain, d_bias, n,    \
      c))                                                                                          \
  }                                                                                                \
  EXPORT int linear_forward_##suffix(const T::Value* x, const float* w, const float* b,            \
      T::Value* out, long n, int inputs, int outputs) {                                            \
    CHECKED(linear_forward<T>(x, w, b, out, n, inputs, outputs))                                   \
  }                                                                                                \
  EXPORT int linear_backward_##suffix(const T::Value* x, const float* w, const T::Value* d_out,    \
      T::Value* d_x, float* d_w, float* d_b, long n, int inputs, int outputs) {                    \
    CHECKED(linear_backward<T>(x, w, d_out, d_x, d_w, d_b, n, inputs, outputs))                    \
  }                                                                                                \
  EXPORT int feed_forward_forward_##suffix(const T::Value* x, const float* w1, const float* b1,    \
      const float* w2, const float* b2, T::Value* before, T::Value* out, long n, int c, int f) {   \
    CHECKED(feed_forward_forward<T>(x, w1, b1, w2, b2, before, out, n, c, f))                      \
  }                                                                                                \
  EXPORT int feed_forward_backward_##suffix(const T::Value* x, const float* w1, const float* w2,   \
      const T::Value* before, const T::Value* d_out, T::Value* d_x, float* d_w1, float* d_b1,      \
      float* d_w2, float* d_b2, long n, int c, int f) {                                            \
    CHECKED(feed_forward_backward<T>(x, w1, w2, before, d_out, d_x, d_w1, d_b1, d_w2, d_b2, n, c,  \
      f))                                                                                          \
  }                                                                                                \
  EXPORT int muon_##suffix(float* const* weights, const float* const* gradients,                   \
      float* const* momenta, const int* shapes, const float* scales, int n, float momentum,        \
      float decay, const float* steps, int n_steps) {                                              \
    CHECKED(muon<T>(weights, gradients, momenta, shapes, scales, n, momentum, decay, steps,        \
      n_steps))                                                                                    \
  }                                                                                                \
  EXPORT int residual_forward_##suffix(const float* x, const T::Value* update, float* out,         \
      long n, double p, uint64_t seed) {                                                           \
    CHECKED(residual_forward<T>(x, update, out, n, p, seed))                                       \
  }                                                                                                \
  EXPORT int residual_backward_##suffix(const float* d_out, T::Value* d_update, long n, double p,  \
      uint64_t seed) {                                                                             \
    CHECKED(residual_backward<T>(d_out, d_update, n, p, seed))                                     \
  }

FUNCTIONS(Float, fp32)
#ifdef __AVX512BF16__
FUNCTIONS(Bfloat16, bf16)
#endif
