// The layers of GPT-2 but attention, forward and backward: linear, feed-forward, LayerNorm, and
// dropout with residual sum. Each makes one pass over blocks that fit the cache.
//
// Python calls the exported C functions through ctypes; chargpt/compute/native.py names each pointer.
// They return 0, or 1 if memory ran out: all of it is allocated before the parallel parts. n rows.

#include "dropout.h"
#include "gelu.h"
#include "products.h"

namespace chargpt {
namespace {

constexpr Index STRIP = 64;           // columns of a product at a time: they stay in the first cache
constexpr Index STRETCH = 20 * BLOCK;  // rows whose packed values are kept for the weights' gradients
constexpr Index SHARD = 128;          // columns of a weight's gradient per chunk of work

// Compute a product of m ≤ BLOCK rows in strips of columns, and pass each to done(j, columns, strip);
// its rows are STRIP apart.
template <class T, class Done>
INLINE void in_strips(Index m, Index n, Index k, Left a, const Packed& b, Done done) {
  alignas(64) float strip[BLOCK * STRIP];
  for (Index j = 0; j < n; j += STRIP) {
    const Index columns = std::min(STRIP, n - j);
    multiply<T>(m, columns, k, a, b.at(0, j), b.depth, strip, STRIP);
    done(j, columns, strip);
  }
}

// Call f(i, j, x, v) for each vector x of a strip: i is its row, j its column in the matrix.
template <class F>
INLINE void for_strip(Index m, Index first, Index columns, const float* strip, F f) {
  for (Index i = 0; i < m; i++)
    for (Index j = 0; j < columns; j += L) f(i, first + j, load<vec>(strip + i * STRIP + j));
}

// Write the first `count` values of a vector, if they are fewer than L.
template <class T>
void write_some(typename T::Value* p, vec x, Index count) {
  typename T::Value all[L];
  T::write(all, x);
  std::memcpy(p, all, count * sizeof all[0]);
}

Index blocks(Index n) { return (n + BLOCK - 1) / BLOCK; }

// The gradient of a weight and a bias, summed token by token, a stretch of tokens at a time.
// Everybody may compute a shard: no sum depends on the cut.
template <class T>
struct Gradient {
  const Packed &up, &x;  // over the tokens of the stretch: the upstream gradient, the inputs
  Index outputs, inputs;
  float *weight, *bias;

  Index shards() const { return down() * across(); }
  void add(Index shard, Index rows, bool first) const {
    const Index o = shard / across() * PANEL, i = shard % across() * SHARD;
    const Index groups = (rows + T::G - 1) / T::G, here = std::min<Index>(PANEL, outputs - o);
    multiply<T>(here, std::min(SHARD, inputs - i), groups, up.panel(o), x.at(0, i), x.depth,
                weight + o * inputs + i, inputs, !first);
    if (!bias || i > 0) return;
    for (Index j = 0; j < here; j += L) {
      vec total = first ? vec{} : load<vec>(bias + o + j);
      for (Index group = 0; group < groups; group++)
        for (int g = 0; g < T::G; g++) total += T::unpack(load<words>(up.at(group, o + j)), g);
      store(bias + o + j, total);
    }
  }

 private:
  Index down() const { return (outputs + PANEL - 1) / PANEL; }
  Index across() const { return (inputs + SHARD - 1) / SHARD; }
};

// --- linear: out = x Wᵀ + b, with W (outputs × inputs) and b float; outputs may be any number

template <class T>
void linear_forward(const typename T::Value* x, const float* w, const float* b,
                    typename T::Value* out, Index n, Index inputs, Index outputs) {
  const Packed weight = pack_weight<T>(w, outputs, inputs, true);
  parallel(blocks(n), [&](Index block, int) {
    const Index first = block * BLOCK, m = std::min<Index>(BLOCK, n - first);
    in_strips<T>(m, round_up(outputs, LANES), inputs / T::G, rows_of<T>(x + first * inputs, inputs),
                 weight, [&](Index j, Index columns, const float* strip) {
                   for_strip(m, j, columns, strip, [&](Index i, Index j, vec y) {
                     typename T::Value* at = out + (first + i) * outputs + j;
                     if (b) y += load<vec>(b + j);
                     if (j + L <= outputs)
                       T::write(at, y);
                     else if (j < outputs)
                       write_some<T>(at, y, outputs - j);
                   });
                 });
  });
}

template <class T>
void linear_backward(const typename T::Value* x, const float* w, const typename T::Value* d_out,
                     typename T::Value* d_x, float* d_w, float* d_b, Index n, Index inputs,
                     Index outputs) {
  typedef typename T::Value Value;
  const Packed weight = pack_weight<T>(w, outputs, inputs, false);
  const Packed xs = Packed::of(T(), STRETCH, inputs), ups = Packed::of(T(), STRETCH, outputs);
  const Index wide = round_up(outputs, LANES);
  const Array<Value> padded(wide == outputs ? 0 : pool::threads() * BLOCK * wide);
  const Gradient<T> gradient{ups, xs, outputs, inputs, d_w, d_b};
  for (Index start = 0; start < n; start += STRETCH) {
    const Index rows = std::min(STRETCH, n - start);
    parallel(blocks(rows), [&](Index block, int slot) {
      const Index first = block * BLOCK, m = std::min<Index>(BLOCK, rows - first);
      const Value* up = d_out + (start + first) * outputs;
      if (wide != outputs) {
        Value* copy = padded.data() + slot * BLOCK * wide;
        std::memset(copy, 0, m * wide * sizeof(Value));
        for (Index i = 0; i < m; i++)
          std::memcpy(copy + i * wide, up + i * outputs, outputs * sizeof(Value));
        up = copy;
      }
      pack<T>(x + (start + first) * inputs, inputs, m, inputs, xs, first / T::G);
      pack<T>(up, wide, m, wide, ups, first / T::G);
      in_strips<T>(m, inputs, weight.depth, rows_of<T>(up, wide), weight,
                   [&](Index j, Index columns, const float* strip) {
                     for_strip(m, j, columns, strip, [&](Index i, Index j, vec y) {
                       T::write(d_x + (start + first + i) * inputs + j, y);
                     });
                   });
    });
    parallel(gradient.shards(),
             [&](Index shard, int) { gradient.add(shard, rows, start == 0); });
  }
}

// --- feed-forward: out = GELU(x W1ᵀ + b1) W2ᵀ + b2, hidden size f

// `before` (n × f) keeps the input of GELU for the backward pass.
template <class T>
void feed_forward_forward(const typename T::Value* x, const float* w1, const float* b1,
                          const float* w2, const float* b2, typename T::Value* before,
                          typename T::Value* out, Index n, Index c, Index f) {
  typedef typename T::Value Value;
  const Packed expand = pack_weight<T>(w1, f, c, true), project = pack_weight<T>(w2, c, f, true);
  const Array<Value> hiddens(pool::threads() * BLOCK * f);
  parallel(blocks(n), [&](Index block, int slot) {
    const Index first = block * BLOCK, m = std::min<Index>(BLOCK, n - first);
    Value* hidden = hiddens.data() + slot * BLOCK * f;
    in_strips<T>(m, f, c / T::G, rows_of<T>(x + first * c, c), expand,
                 [&](Index j, Index columns, const float* strip) {
                   for_strip(m, j, columns, strip, [&](Index i, Index j, vec v) {
                     if (b1) v += load<vec>(b1 + j);
                     T::write(before + (first + i) * f + j, v);
                     T::write(hidden + i * f + j, gelu<T>(v));
                   });
                 });
    in_strips<T>(m, c, f / T::G, rows_of<T>(hidden, f), project,
                 [&](Index j, Index columns, const float* strip) {
                   for_strip(m, j, columns, strip, [&](Index i, Index j, vec y) {
                     if (b2) y += load<vec>(b2 + j);
                     T::write(out + (first + i) * c + j, y);
                   });
                 });
  });
}

template <class T>
void feed_forward_backward(const typename T::Value* x, const float* w1, const float* w2,
                           const typename T::Value* before, const typename T::Value* d_out,
                           typename T::Value* d_x, float* d_w1, float* d_b1, float* d_w2,
                           float* d_b2, Index n, Index c, Index f) {
  typedef typename T::Value Value;
  const Packed expand = pack_weight<T>(w1, f, c, false), project = pack_weight<T>(w2, c, f, false);
  const Packed xs = Packed::of(T(), STRETCH, c), ups = Packed::of(T(), STRETCH, c);
  const Packed hiddens = Packed::of(T(), STRETCH, f), d_hiddens = Packed::of(T(), STRETCH, f);
  const Array<Value> buffers(pool::threads() * BLOCK * f);
  const Gradient<T> first_layer{d_hiddens, xs, f, c, d_w1, d_b1};
  const Gradient<T> second_layer{ups, hiddens, c, f, d_w2, d_b2};
  for (Index start = 0; start < n; start += STRETCH) {
    const Index rows = std::min(STRETCH, n - start);
    parallel(blocks(rows), [&](Index block, int slot) {
      const Index first = block * BLOCK, m = std::min<Index>(BLOCK, rows - first);
      const Value *here = x + (start + first) * c, *up = d_out + (start + first) * c;
      Value* d_hidden = buffers.data() + slot * BLOCK * f;
      const Value* in = before + (start + first) * f;
      prefetch(in, f, m, STRIP);
      pack<T>(here, c, m, c, xs, first / T::G);
      pack<T>(up, c, m, c, ups, first / T::G);
      in_strips<T>(m, f, project.depth, rows_of<T>(up, c), project,
                   [&](Index j, Index columns, const float* strip) {
        prefetch(in + j + STRIP, f, m, std::min(STRIP, f - j - STRIP));
        for (Index i = 0; i < m; i += T::G)
          for (Index v = 0; v < columns; v += L) {
            vec hidden[2] = {}, d_before[2] = {};
            for_group<T>(i, m, [&](int g) {
              const vec h = T::read(in + (i + g) * f + j + v);
              const Gate its = gate<T>(h);
              hidden[g] = h * its.s;
              d_before[g] = load<vec>(strip + (i + g) * STRIP + v) * gelu_slope(h, its);
              T::write(d_hidden + (i + g) * f + j + v, d_before[g]);
            });
            store(hiddens.at((first + i) / T::G, j + v), T::pack(hidden));
            store(d_hiddens.at((first + i) / T::G, j + v), T::pack(d_before));
          }
      });
      in_strips<T>(m, c, expand.depth, rows_of<T>(d_hidden, f), expand,
                   [&](Index j, Index columns, const float* strip) {
                     for_strip(m, j, columns, strip, [&](Index i, Index j, vec y) {
                       T::write(d_x + (start + first + i) * c + j, y);
                     });
                   });
    });
    const Index firsts = first_layer.shards();
    parallel(firsts + second_layer.shards(), [&](Index shard, int) {
      if (shard < firsts)
        first_layer.add(shard, rows, start == 0);
      else
        second_layer.add(shard - firsts, rows, start == 0);
    });
  }
}

// --- LayerNorm: float in, T out

template <class T>
void layer_norm_forward(const float* x, const float* gain, const float* bias,
                        typename T::Value* out, float* means, float* inverse_stds, Index n, Index c,
                        float eps) {
  parallel(blocks(n), [&](Index block, int) {
    for (Index i = block * BLOCK; i < std::min(n, (block + 1) * BLOCK); i++) {
      const float* row = x + i * c;
      Lanes total, squares;
      for_vectors(c, [&](Index j, int p) { total.part[p] += load<vec>(row + j); });
      const float mean = sum(total) / c;
      for_vectors(c, [&](Index j, int p) {
        const vec centred = load<vec>(row + j) - mean;
        squares.part[p] = fma(centred, centred, squares.part[p]);
      });
      const float inverse_std = 1.f / std::sqrt(sum(squares) / c + eps);
      means[i] = mean;
      inverse_stds[i] = inverse_std;
      for (Index j = 0; j < c; j += L) {
        vec y = (load<vec>(row + j) - mean) * inverse_std * load<vec>(gain + j);
        if (bias) y += load<vec>(bias + j);
        T::write(out + i * c + j, y);
      }
    }
  });
}

// With z the normalised x and g = upstream × gain: dx = (g - mean(g) - z mean(g z)) / std, plus the
// gradient `skipped` (or null) that reaches x around the layer.
template <class T>
void layer_norm_backward(const float* x, const float* gain, const float* means,
                         const float* inverse_stds, const typename T::Value* d_out,
                         const float* skipped, float* d_x, float* d_gain, float* d_bias, Index n,
                         Index c) {
  const Index n_blocks = blocks(n);
  const Array<float> partial(n_blocks * 2 * c);  // a block's share of the two gradients
  parallel(n_blocks, [&](Index block, int) {
    float *gains = partial.data() + block * 2 * c, *biases = gains + c;
    std::memset(gains, 0, 2 * c * sizeof(float));
    for (Index i = block * BLOCK; i < std::min(n, (block + 1) * BLOCK); i++) {
      const float *row = x + i * c, mean = means[i], inverse_std = inverse_stds[i];
      const typename T::Value* dy = d_out + i * c;
      Lanes total, along;
      for_vectors(c, [&](Index j, int p) {
        const vec z = (load<vec>(row + j) - mean) * inverse_std, up = T::read(dy + j);
        const vec g = up * load<vec>(gain + j);
        total.part[p] += g;
        along.part[p] = fma(g, z, along.part[p]);
        store(gains + j, fma(up, z, load<vec>(gains + j)));
        store(biases + j, load<vec>(biases + j) + up);
      });
      const float mean_g = sum(total) / c, mean_gz = sum(along) / c;
      for (Index j = 0; j < c; j += L) {
        const vec z = (load<vec>(row + j) - mean) * inverse_std;
        const vec g = T::read(dy + j) * load<vec>(gain + j);
        vec dx = fma(z, -mean_gz, g - mean_g) * inverse_std;
        if (skipped) dx += load<vec>(skipped + i * c + j);
        store(d_x + i * c + j, dx);
      }
    }
  });
  parallel(c / LANES, [&](Index column, int) {
    for (Index j = column * LANES; j < (column + 1) * LANES; j += L) {
      vec gains = {}, biases = {};
      for (Index block = 0; block < n_blocks; block++) {
        gains += load<vec>(partial.data() + block * 2 * c + j);
        biases += load<vec>(partial.data() + (block * 2 + 1) * c + j);
      }
      store(d_gain + j, gains);
      if (d_bias) store(d_bias + j, biases);
    }
  });
}

// --- residual sum: float x plus dropout of T

constexpr Index STEP = 4096;  // values per chunk of work

template <class T>
void residual_forward(const float* x, const typename T::Value* update, float* out, Index n, double p,
                      uint64_t seed) {
  const Dropout dropout(p, seed, 0);
  parallel((n + STEP - 1) / STEP, [&](Index step, int) {
    for (Index i = step * STEP; i < std::min(n, (step + 1) * STEP); i += L) {
      vec u = T::read(update + i);
      if (dropout.on()) u *= dropout.mask((uint32_t)i);
      store(out + i, load<vec>(x + i) + u);
    }
  });
}

template <class T>
void residual_backward(const float* d_out, typename T::Value* d_update, Index n, double p,
                       uint64_t seed) {
  const Dropout dropout(p, seed, 0);
  parallel((n + STEP - 1) / STEP, [&](Index step, int) {
    for (Index i = step * STEP; i < std::min(n, (step + 1) * STEP); i += L) {
      vec u = load<vec>(d_out + i);
      if (dropout.on()) u *= dropout.mask((uint32_t)i);
      T::write(d_update + i, u);
    }
  });
}

}  // namespace
}  // namespace chargpt

// --- the exported functions, once per value type; `_bf16` only where the processor supports it

using namespace chargpt;

#define CHECKED(...) return out_of_memory([&] { __VA_ARGS__; });
#define FUNCTIONS(T, suffix)                                                                       \
  EXPORT int layer_norm_forward_##suffix(const float* x, const float* gain, const float* bias,     \
      T::Value* out, float* means, float* inverse_stds, Index n, Index c, float eps) {             \
    CHECKED(layer_norm_forward<T>(x, gain, bias, out, means, inverse_stds, n, c, eps))             \
  }                                                                                                \
  EXPORT int layer_norm_backward_##suffix(const float* x, const float* gain, const float* means,   \
      const float* inverse_stds, const T::Value* d_out, const float* skipped, float* d_x,          \
      float* d_gain, float* d_bias, Index n, Index c) {                                            \
    CHECKED(layer_norm_backward<T>(x, gain, means, inverse_stds, d_out, skipped, d_x, d_gain,      \
      d_bias, n, c))                                                                               \
  }                                                                                                \
  EXPORT int linear_forward_##suffix(const T::Value* x, const float* w, const float* b,            \
      T::Value* out, Index n, Index inputs, Index outputs) {                                       \
    CHECKED(linear_forward<T>(x, w, b, out, n, inputs, outputs))                                   \
  }                                                                                                \
  EXPORT int linear_backward_##suffix(const T::Value* x, const float* w, const T::Value* d_out,    \
      T::Value* d_x, float* d_w, float* d_b, Index n, Index inputs, Index outputs) {               \
    CHECKED(linear_backward<T>(x, w, d_out, d_x, d_w, d_b, n, inputs, outputs))                    \
  }                                                                                                \
  EXPORT int feed_forward_forward_##suffix(const T::Value* x, const float* w1, const float* b1,    \
      const float* w2, const float* b2, T::Value* before, T::Value* out, Index n, Index c,         \
      Index f) {                                                                                   \
    CHECKED(feed_forward_forward<T>(x, w1, b1, w2, b2, before, out, n, c, f))                      \
  }                                                                                                \
  EXPORT int feed_forward_backward_##suffix(const T::Value* x, const float* w1, const float* w2,   \
      const T::Value* before, const T::Value* d_out, T::Value* d_x, float* d_w1, float* d_b1,      \
      float* d_w2, float* d_b2, Index n, Index c, Index f) {                                       \
    CHECKED(feed_forward_backward<T>(x, w1, w2, before, d_out, d_x, d_w1, d_b1, d_w2, d_b2, n, c,  \
      f))                                                                                          \
  }                                                                                                \
  EXPORT int residual_forward_##suffix(const float* x, const T::Value* update, float* out,         \
      Index n, double p, uint64_t seed) {                                                          \
    CHECKED(residual_forward<T>(x, update, out, n, p, seed))                                       \
  }                                                                                                \
  EXPORT int residual_backward_##suffix(const float* d_out, T::Value* d_update, Index n, double p, \
      uint64_t seed) {                                                                             \
    CHECKED(residual_backward<T>(d_out, d_update, n, p, seed))                                     \
  }

FUNCTIONS(Float, fp32)
#ifdef CHARGPT_BF16
FUNCTIONS(Bfloat16, bf16)
#endif
