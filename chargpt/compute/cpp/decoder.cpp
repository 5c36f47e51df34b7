// A whole GPT-2 in float that reads a few tokens per call. Each token attends to the keys and values
// that its sequence has in the cache. One call here replaces about a hundred PyTorch calls.
//
// A row is a token with its slot (its sequence's place in the cache) and its position. The rows of a
// slot come in order, so one call can append a character to thirty texts or read a prompt. A row's
// logits have the same bits for any other rows in the call and any number of threads.
//
// Python calls the exported C functions through ctypes: see chargpt/engine/native_decoder.py.

#include <cstdlib>

#include "gelu.h"
#include "products.h"
#include "softmax.h"

namespace chargpt {
namespace {

constexpr Index MAX_ROWS = 64;  // rows per pass over the weights

// Zeros that use no memory until they are overwritten: most texts end before their cache is full.
struct FreeMemory {
  void operator()(float* p) const { std::free(p); }
};
typedef std::unique_ptr<float[], FreeMemory> Floats;
Floats zeros(Index n) {
  float* p = (float*)std::calloc(n, sizeof(float));
  if (!p) throw std::bad_alloc();
  return Floats(p);
}

struct Norm {
  std::vector<float> gain, bias;  // an empty gain means no norm

  bool on() const { return !gain.empty(); }
  // out = norm(x); out may be x.
  void apply(const float* x, float* out, Index c, float eps) const {
    Lanes total, squares;
    for_vectors(c, [&](Index j, int p) { total.part[p] += load<vec>(x + j); });
    const float mean = sum(total) / c;
    for_vectors(c, [&](Index j, int p) {
      const vec centred = load<vec>(x + j) - mean;
      squares.part[p] = fma(centred, centred, squares.part[p]);
    });
    const float inverse_std = 1.f / std::sqrt(sum(squares) / c + eps);
    for (Index j = 0; j < c; j += L) {
      vec y = (load<vec>(x + j) - mean) * inverse_std * load<vec>(&gain[j]);
      if (!bias.empty()) y += load<vec>(&bias[j]);
      store(out + j, y);
    }
  }
};

struct Linear {
  Packed weight;
  std::vector<float> bias;
  Index inputs, outputs;

  // Compute m rows of x Wᵀ + b and call done(row, column, vector). The threads share the columns.
  template <class Done>
  void apply(Index m, const float* x, Index stride, int strips, Done done) const {
    const Index panels = round_up(outputs, PANEL) / PANEL, width = (panels + strips - 1) / strips;
    parallel(strips, [&](Index strip, int) {
      constexpr Index WIDE = 4 * PANEL;
      alignas(64) float tile[MAX_ROWS * WIDE];
      const Index end = std::min(round_up(outputs, LANES), (strip + 1) * width * PANEL);
      for (Index first = strip * width * PANEL; first < end; first += WIDE) {
        const Index n = std::min(WIDE, end - first);
        multiply<Float>(m, n, inputs, rows_of<Float>(x, stride), weight.at(0, first), weight.depth,
                        tile, WIDE);
        for (Index i = 0; i < m; i++)
          for (Index j = 0; j < n; j += L) {
            vec y = load<vec>(tile + i * WIDE + j);
            if (!bias.empty()) y += load<vec>(&bias[first + j]);
            done(i, first + j, y);
          }
      }
    });
  }
};

// after(x + inside(f(before(x)))), where each norm is optional (see Residual in chargpt/model.py).
struct Sublayer {
  Norm before, inside, after;
  Linear first, second;  // qkv and projection, or expand and projection
};

struct Decoder {
  Index n_layer, heads, c, f, vocab, block, slots, d, wide;
  float eps;
  std::vector<float> token_embeddings, position_embeddings;
  std::vector<Sublayer> sublayers;  // attention, feed-forward, attention, …
  Norm final_norm;
  Linear head;
  // By layer, slot and head. Keys are packed as right factors over D, values over time.
  Floats keys, values;
  Array<float> x, normed, inner, update;  // MAX_ROWS rows of C, of C, of max(C, F), and of C
  Array<float> scores;                    // a row for each row and head
  int strips = 1;  // chunks of a pass over a weight: 1, or some for each thread

  float* keys_of(Index layer, Index slot, Index h) {
    return keys.get() + ((layer * slots + slot) * heads + h) * d * wide;
  }
  float* values_of(Index layer, Index slot, Index h) {
    return values.get() + ((layer * slots + slot) * heads + h) * round_up(d, PANEL) * block;
  }

  const float* norm_rows(const Norm& norm, Index m) {
    if (!norm.on()) return x.data();
    for (Index i = 0; i < m; i++) norm.apply(&x[i * c], &normed[i * c], c, eps);
    return normed.data();
  }

  // Add m rows of the second layer's output to the residual stream.
  void add(const Sublayer& sublayer, Index m, const float* input, Index stride) {
    const bool has_inside = sublayer.inside.on();
    sublayer.second.apply(m, input, stride, strips, [&](Index i, Index j, vec v) {
      float* at = &(has_inside ? update : x)[i * c + j];
      store(at, has_inside ? v : load<vec>(at) + v);
    });
    if (!has_inside && !sublayer.after.on()) return;
    for (Index i = 0; i < m; i++) {
      float *row = &x[i * c], *u = &update[i * c];
      if (has_inside) {
        sublayer.inside.apply(u, u, c, eps);
        for (Index j = 0; j < c; j += L) store(row + j, load<vec>(row + j) + load<vec>(u + j));
      }
      if (sublayer.after.on()) sublayer.after.apply(row, row, c, eps);
    }
  }

  void attend(Index layer, Index m, const int* row_slots, const int* positions) {
    const Sublayer& sublayer = sublayers[2 * layer];
    float* q = inner.data();
    sublayer.first.apply(m, norm_rows(sublayer.before, m), c, strips, [&](Index i, Index j, vec v) {
      const Index slot = row_slots[i], p = positions[i], h = j % c / d, at = j % d;
      if (j < c) {
        store(q + i * c + j, v);
      } else if (j < 2 * c) {
        float* key = keys_of(layer, slot, h) + p / PANEL * PANEL * d + p % PANEL;
        for (int r = 0; r < L; r++) key[(at + r) * PANEL] = v[r];
      } else {
        float* panel = values_of(layer, slot, h) + at / PANEL * PANEL * block;
        store(panel + p * PANEL + at % PANEL, v);
      }
    });
    const float scale = 1.f / std::sqrt((float)d);
    const Index chunks = strips == 1 ? 1 : m;
    parallel(chunks, [&](Index chunk, int) {
      for (Index i = chunk * m / chunks; i < (chunk + 1) * m / chunks; i++)
        for (Index h = 0; h < heads; h++) {
          const Index query_at = positions[i], seen = query_at + 1, slot = row_slots[i];
          float *query = q + i * c + h * d, *row = &scores[i * wide];
          multiply<Float>(1, round_up(seen, LANES), d, rows_of<Float>(query, d),
                          (const uint32_t*)keys_of(layer, slot, h), d, row, wide);
          const float norm = 1.f / exponentials(row, query_at, scale).total;
          // The output overwrites the query, which is no longer needed.
          multiply<Float>(1, d, seen, rows_of<Float>(row, wide),
                          (const uint32_t*)values_of(layer, slot, h), block, query, d);
          for (Index j = 0; j < d; j += L) store(query + j, load<vec>(query + j) * norm);
        }
    });
    add(sublayer, m, q, c);
  }

  void feed_forward(Index layer, Index m) {
    const Sublayer& sublayer = sublayers[2 * layer + 1];
    sublayer.first.apply(m, norm_rows(sublayer.before, m), c, strips, [&](Index i, Index j, vec v) {
      store(&inner[i * f + j], gelu<Float>(v));
    });
    add(sublayer, m, inner.data(), f);
  }

  // Read m ≤ MAX_ROWS rows and write the logits (n_wanted × vocab) of the rows `wanted`. It allocates
  // nothing, so nothing can throw.
  void rows(Index m, const int* ids, const int* row_slots, const int* positions, Index n_wanted,
            const int* wanted, float* logits) {
    for (Index i = 0; i < m; i++)
      for (Index j = 0; j < c; j += L)
        store(&x[i * c + j], load<vec>(&token_embeddings[ids[i] * c + j]) +
                                 load<vec>(&position_embeddings[positions[i] * c + j]));
    for (Index layer = 0; layer < n_layer; layer++) {
      attend(layer, m, row_slots, positions);
      feed_forward(layer, m);
    }
    if (!n_wanted) return;
    for (Index i = 0; i < n_wanted; i++)
      final_norm.apply(&x[wanted[i] * c], &normed[i * c], c, eps);
    head.apply(n_wanted, normed.data(), c, strips, [&](Index i, Index j, vec v) {
      for (Index r = 0; r < std::min<Index>(L, vocab - j); r++) logits[i * vocab + j + r] = v[r];
    });
  }
};

// Reads the tensors that Python passes, in order.
struct Tensors {
  const float* const* next;

  std::vector<float> vector(Index size) {
    const float* p = *next++;
    return p ? std::vector<float>(p, p + size) : std::vector<float>();
  }
  Norm norm(Index c) {
    Norm norm;
    norm.gain = vector(c);
    norm.bias = vector(c);
    return norm;
  }
  Linear linear(Index outputs, Index inputs) {
    Linear linear{pack_weight<Float>(*next++, outputs, inputs, true), {}, inputs, outputs};
    linear.bias = vector(outputs);
    if (!linear.bias.empty()) linear.bias.resize(round_up(outputs, PANEL));
    return linear;
  }
};

Decoder* make(const int* sizes, float eps, const float* const* tensors) {
  auto decoder = std::make_unique<Decoder>();
  Decoder& it = *decoder;
  Index* const fields[] = {&it.n_layer, &it.heads, &it.c, &it.f, &it.vocab, &it.block, &it.slots};
  for (Index* field : fields) *field = *sizes++;
  it.eps = eps;
  it.d = it.c / it.heads;
  it.wide = round_up(it.block, PANEL);
  Tensors take{tensors};
  it.token_embeddings = take.vector(it.vocab * it.c);
  it.position_embeddings = take.vector(it.block * it.c);
  for (int i = 0; i < 2 * it.n_layer; i++) {
    const Index hidden = i % 2 ? it.f : it.c;
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
  const Index caches = it.n_layer * it.slots * it.heads;
  it.keys = zeros(caches * it.d * it.wide);
  it.values = zeros(caches * round_up(it.d, PANEL) * it.block);
  it.x = Array<float>(MAX_ROWS * it.c);
  it.normed = Array<float>(MAX_ROWS * it.c);
  it.update = Array<float>(MAX_ROWS * it.c);
  it.inner = Array<float>(MAX_ROWS * std::max(it.c, it.f));
  it.scores = Array<float>(MAX_ROWS * it.wide);
  return decoder.release();
}

}  // namespace
}  // namespace chargpt

using namespace chargpt;

// Return null if memory runs out.
EXPORT void* decoder_new(const int* sizes, float eps, const float* const* tensors) {
  Decoder* decoder = nullptr;
  out_of_memory([&] { decoder = make(sizes, eps, tensors); });
  return decoder;
}

EXPORT void decoder_free(void* decoder) { delete (Decoder*)decoder; }

// Read n rows. `wanted` holds the ascending indices of the rows whose logits to return. `strips`: 1,
// or into how many chunks to cut each pass over a weight.
EXPORT void decoder_forward(void* decoder, Index n, const int* ids, const int* slots,
                            const int* positions, Index n_wanted, const int* wanted, float* logits,
                            int strips) {
  Decoder& it = *(Decoder*)decoder;
  it.strips = strips;
  for (Index first = 0; first < n; first += MAX_ROWS) {
    const Index m = std::min(MAX_ROWS, n - first);
    int here[MAX_ROWS], n_here = 0;
    while (n_wanted && *wanted < first + m) here[n_here++] = *wanted++ - (int)first, n_wanted--;
    it.rows(m, ids + first, slots + first, positions + first, n_here, here, logits);
    logits += n_here * it.vocab;
  }
}

// Copy the first `length` positions of slot `from` to slot `to`.
EXPORT void decoder_copy(void* decoder, int from, int to, int length) {
  Decoder& it = *(Decoder*)decoder;
  for (Index layer = 0; layer < it.n_layer; layer++)
    for (Index h = 0; h < it.heads; h++) {
      std::memcpy(it.keys_of(layer, to, h), it.keys_of(layer, from, h),
                  round_up(length, PANEL) * it.d * sizeof(float));
      for (Index j = 0; j < it.d; j += PANEL)
        std::memcpy(it.values_of(layer, to, h) + j * it.block,
                    it.values_of(layer, from, h) + j * it.block, length * PANEL * sizeof(float));
    }
}
