// A whole GPT-2 in float that reads a few tokens per call. Each token attends to the keys and values
// that its sequence has in the cache. One call here replaces about a hundred PyTorch calls.
//
// A row is a token with its slot (its sequence's place in the cache) and its position. The rows of a
// slot come in order, so one call can append a character to thirty texts or read a prompt. A row's
// logits have the same bits for any other rows in the call and any number of threads.
//
// Python calls the exported C functions through ctypes: see chargpt/engine/native_decoder.py.

#include "kernels.h"

#include <cstdlib>

namespace {

constexpr int MAX_ROWS = 64;  // rows per pass over the weights

// Zeros that use no memory until they are overwritten: most texts end before their cache is full.
struct FreeMemory {
  void operator()(float* p) const { std::free(p); }
};
typedef std::unique_ptr<float[], FreeMemory> Floats;
Floats zeros(long n) {
  float* p = (float*)std::calloc(n, sizeof(float));
  if (!p) throw std::bad_alloc();
  return Floats(p);
}

struct Norm {
  std::vector<float> gain, bias;  // an empty gain means no norm

  bool on() const { return !gain.empty(); }
  // out = norm(x); out may be x.
  void apply(const float* x, float* out, int c, float eps) const {
    vec total = {}, squares = {};
    for (int j = 0; j < c; j += L) total += load<vec>(x + j);
    const float mean = sum(total) / c;
    for (int j = 0; j < c; j += L) {
      const vec centred = load<vec>(x + j) - mean;
      squares += centred * centred;
    }
    const float inverse_std = 1.f / std::sqrt(sum(squares) / c + eps);
    for (int j = 0; j < c; j += L) {
      vec y = (load<vec>(x + j) - mean) * inverse_std * load<vec>(&gain[j]);
      if (!bias.empty()) y += load<vec>(&bias[j]);
      store(out + j, y);
    }
  }
};

struct Linear {
  Packed weight;
  std::vector<float> bias;
  int inputs, outputs;

  // Compute m rows of x Wᵀ + b and call done(row, column, vector). The threads share the columns.
  template <class Done>
  void apply(int m, const float* x, long stride, Done done) const {
#pragma omp for schedule(static)
    for (int first = 0; first < outputs; first += PANEL) {
      const int n = std::min(PANEL, round_up(outputs - first, L));
      multiply<Float>(m, n, inputs, x, stride, 1, weight.data() + first * weight.depth,
                      weight.depth, [&](int i, int j, auto& sums) {
                        for_each(i, first + j, sums, [&](int i, int j, vec v) {
                          if (!bias.empty()) v += load<vec>(&bias[j]);
                          done(i, j, v);
                        });
                      });
    }
  }
};

// after(x + inside(f(before(x)))), where each norm is optional (see Residual in chargpt/model.py).
struct Sublayer {
  Norm before, inside, after;
  Linear first, second;  // qkv and projection, or expand and projection
};

struct Decoder {
  int n_layer, heads, c, f, vocab, block, slots, d, wide;
  float eps;
  std::vector<float> token_embeddings, position_embeddings;
  std::vector<Sublayer> sublayers;  // attention, feed-forward, attention, …
  Norm final_norm;
  Linear head;
  // By layer, slot and head. Keys are packed as right factors over D, values over time.
  Floats keys, values;
  std::vector<float> x, inner, update;  // MAX_ROWS rows of C, of max(C, F), and of C
  std::vector<std::vector<float>> normed, scores;  // one per thread

  float* keys_of(int layer, int slot, int h) {
    return keys.get() + (((long)layer * slots + slot) * heads + h) * d * wide;
  }
  float* values_of(int layer, int slot, int h) {
    return values.get() + (((long)layer * slots + slot) * heads + h) * round_up(d, PANEL) * block;
  }

  const float* norm_rows(const Norm& norm, int m) {
    if (!norm.on()) return x.data();
    float* out = normed[thread()].data();  // each thread norms all rows: cheaper than waiting
    for (int i = 0; i < m; i++) norm.apply(&x[(long)i * c], out + (long)i * c, c, eps);
    return out;
  }

  // Add m rows of the second layer's output to the residual stream.
  void add(const Sublayer& sublayer, int m, const float* input, long stride) {
    const bool has_inside = sublayer.inside.on();
    sublayer.second.apply(m, input, stride, [&](int i, int j, vec v) {
      float* at = &(has_inside ? update : x)[(long)i * c + j];
      store(at, has_inside ? v : load<vec>(at) + v);
    });
    if (!has_inside && !sublayer.after.on()) return;
#pragma omp for schedule(static)
    for (int i = 0; i < m; i++) {
      float *row = &x[(long)i * c], *u = &update[(long)i * c];
      if (has_inside) {
        sublayer.inside.apply(u, u, c, eps);
        for (int j = 0; j < c; j += L) store(row + j, load<vec>(row + j) + load<vec>(u + j));
      }
      if (sublayer.after.on()) sublayer.after.apply(row, row, c, eps);
    }
  }

  void attend(int layer, int m, const int* row_slots, const int* positions) {
    const Sublayer& sublayer = sublayers[2 * layer];
    float* q = inner.data();
    sublayer.first.apply(m, norm_rows(sublayer.before, m), c, [&](int i, int j, vec v) {
      const int slot = row_slots[i], p = positions[i], h = j % c / d, at = j % d;
      if (j < c) {
        store(q + (long)i * c + j, v);
      } else if (j < 2 * c) {
        float* key = keys_of(layer, slot, h) + (long)(p / PANEL * PANEL) * d + p % PANEL;
        for (int r = 0; r < L; r++) key[(at + r) * PANEL] = v[r];
      } else {
        float* panel = values_of(layer, slot, h) + (long)(at / PANEL * PANEL) * block;
        store(panel + (long)p * PANEL + at % PANEL, v);
      }
    });
    const float scale = 1.f / std::sqrt((float)d);
#pragma omp for schedule(static) collapse(2)
    for (int h = 0; h < heads; h++)
      for (int i = 0; i < m; i++) {
        const int seen = positions[i] + 1, slot = row_slots[i];
        float *query = q + (long)i * c + h * d, *row = scores[thread()].data();
        multiply<Float>(1, round_up(seen, L), d, query, d, 1,
                        (const uint32_t*)keys_of(layer, slot, h), d, [&](int, int j, auto& sums) {
                          for_each(0, j, sums, [&](int, int j, vec s) { store(row + j, s * scale); });
                        });
        const float norm = 1.f / exponentials(row, seen - 1, round_up(seen, L)).total;
        // The output overwrites the query, which is no longer needed.
        multiply<Float>(1, d, seen, row, wide, 1, (const uint32_t*)values_of(layer, slot, h), block,
                        [&](int, int j, auto& sums) {
                          for_each(0, j, sums, [&](int, int j, vec y) { store(query + j, y * norm); });
                        });
      }
    add(sublayer, m, q, c);
  }

  void feed_forward(int layer, int m) {
    const Sublayer& sublayer = sublayers[2 * layer + 1];
    sublayer.first.apply(m, norm_rows(sublayer.before, m), c, [&](int i, int j, vec v) {
      store(&inner[(long)i * f + j], v * sigmoid_2u<Float>(v));
    });
    add(sublayer, m, inner.data(), f);
  }

  // Read m ≤ MAX_ROWS rows and write the logits (n_wanted × vocab) of the rows `wanted`. It allocates
  // nothing, so nothing can throw.
  void rows(int m, const int* ids, const int* row_slots, const int* positions, int n_wanted,
            const int* wanted, float* logits, int n_threads) {
#pragma omp parallel num_threads(n_threads)
    {
#pragma omp for schedule(static)
      for (int i = 0; i < m; i++)
        for (int j = 0; j < c; j += L)
          store(&x[(long)i * c + j], load<vec>(&token_embeddings[(long)ids[i] * c + j]) +
                                         load<vec>(&position_embeddings[(long)positions[i] * c + j]));
      for (int layer = 0; layer < n_layer; layer++) {
        attend(layer, m, row_slots, positions);
        feed_forward(layer, m);
      }
      if (n_wanted) {
        float* out = normed[thread()].data();
        for (int i = 0; i < n_wanted; i++)
          final_norm.apply(&x[(long)wanted[i] * c], out + (long)i * c, c, eps);
        head.apply(n_wanted, out, c, [&](int i, int j, vec v) {
          for (int r = 0; r < std::min(L, vocab - j); r++) logits[(long)i * vocab + j + r] = v[r];
        });
      }
    }
  }
};

// Reads the tensors that Python passes, in order.
struct Tensors {
  const float* const* next;

  std::vector<float> vector(long size) {
    const float* p = *next++;
    return p ? std::vector<float>(p, p + size) : std::vector<float>();
  }
  Norm norm(int c) {
    Norm norm;
    norm.gain = vector(c);
    norm.bias = vector(c);
    return norm;
  }
  Linear linear(int outputs, int inputs) {
    Linear linear{pack_weight<Float>(*next++, outputs, inputs, true), {}, inputs, outputs};
    linear.bias = vector(outputs);
    if (!linear.bias.empty()) linear.bias.resize(round_up(outputs, L));
    return linear;
  }
};

Decoder* make(const int* sizes, float eps, const float* const* tensors) {
  auto decoder = std::make_unique<Decoder>();
  Decoder& it = *decoder;
  int* const fields[] = {&it.n_layer, &it.heads, &it.c, &it.f, &it.vocab, &it.block, &it.slots};
  for (int* field : fields) *field = *sizes++;
  it.eps = eps;
  it.d = it.c / it.heads;
  it.wide = round_up(it.block, PANEL);
  Tensors take{tensors};
  it.token_embeddings = take.vector((long)it.vocab * it.c);
  it.position_embeddings = take.vector((long)it.block * it.c);
  for (int i = 0; i < 2 * it.n_layer; i++) {
    const int hidden = i % 2 ? it.f : it.c;
    Sublayer sublayer;
    sublayer.before = take.norm(it.c);
    sublayer.inside = take.norm(it.c);
    sublayer.after = take.norm(it.c);
    sublayer.first = take.linear(i % 2 ? it.f : 3 * it.c, it.c);
    sublayer.second = take.linear(it.c, hidden);
    it.sublayers.push_back(std::move(sublayer));
  }
  it.final_norm = take.norm(it.c);
  it.head = take.linear(it.vocab, it.c);
  const long caches = (long)it.n_layer * it.slots * it.heads;
  it.keys = zeros(caches * it.d * it.wide);
  it.values = zeros(caches * round_up(it.d, PANEL) * it.block);
  it.x.resize((long)MAX_ROWS * it.c);
  it.update.resize(it.x.size());
  it.inner.resize((long)MAX_ROWS * std::max(it.c, it.f));
  it.normed.assign(threads(), std::vector<float>((long)MAX_ROWS * it.c));
  it.scores.assign(threads(), std::vector<float>(it.wide));
  return decoder.release();
}

}  // namespace

// Return null if memory runs out.
EXPORT void* decoder_new(const int* sizes, float eps, const float* const* tensors) {
  Decoder* decoder = nullptr;
  out_of_memory([&] { decoder = make(sizes, eps, tensors); });
  return decoder;
}

EXPORT void decoder_free(void* decoder) { delete (Decoder*)decoder; }

// Read n rows. `wanted` holds the ascending indices of the rows whose logits to return.
EXPORT void decoder_forward(void* decoder, int n, const int* ids, const int* slots,
                            const int* positions, int n_wanted, const int* wanted, float* logits,
                            int n_threads) {
  Decoder& it = *(Decoder*)decoder;
  for (int first = 0; first < n; first += MAX_ROWS) {
    const int m = std::min(MAX_ROWS, n - first);
    int here[MAX_ROWS], n_here = 0;
    while (n_wanted && *wanted < first + m) here[n_here++] = *wanted++ - first, n_wanted--;
    it.rows(m, ids + first, slots + first, positions + first, n_here, here, logits,
            std::min(n_threads, (int)it.normed.size()));
    logits += (long)n_here * it.vocab;
  }
}

// Copy the first `length` positions of slot `from` to slot `to`.
EXPORT void decoder_copy(void* decoder, int from, int to, int length) {
  Decoder& it = *(Decoder*)decoder;
  for (int layer = 0; layer < it.n_layer; layer++)
    for (int h = 0; h < it.heads; h++) {
      std::memcpy(it.keys_of(layer, to, h), it.keys_of(layer, from, h),
                  (long)round_up(length, PANEL) * it.d * sizeof(float));
      for (int j = 0; j < it.d; j += PANEL)
        std::memcpy(it.values_of(layer, to, h) + (long)j * it.block,
                    it.values_of(layer, from, h) + (long)j * it.block,
                    (long)length * PANEL * sizeof(float));
    }
}
