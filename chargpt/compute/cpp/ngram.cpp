// What an n-gram expects at each position of a batch; chargpt/training/ngram_targets.py has the
// same in numpy, and says what the arrays hold.

#include <algorithm>

#include "products.h"

namespace chargpt {
namespace {

constexpr Index ROWS = 32, LOOKUPS = 256;  // per chunk of work

// For each of n contexts and the token after it, the index of this gram among ascending keys, or -1.
void find(const Index* keys, Index n_keys, const Index* contexts, const Index* tokens, Index* grams,
          Index n, Index v) {
  parallel((n + LOOKUPS - 1) / LOOKUPS, [&](Index chunk, int) {
    for (Index i = chunk * LOOKUPS; i < std::min(n, (chunk + 1) * LOOKUPS); i++) {
      const Index wanted = contexts[i] * v + tokens[i];
      const Index* place = std::lower_bound(keys, keys + n_keys, wanted);
      const bool known = contexts[i] >= 0 && tokens[i] >= 0;
      grams[i] = known && place < keys + n_keys && *place == wanted ? place - keys : -1;
    }
  });
}

// Mix what shorter contexts expect, n rows of v, with what one level's contexts were followed by. A
// row that the level has counted leaves out its own target.
void interpolate(const Index* keys, const float* counts, const Index* firsts, const float* totals,
                 const Index* contexts, const Index* targets, const Index* counted,
                 float* expected, Index n, Index v) {
  parallel((n + ROWS - 1) / ROWS, [&](Index chunk, int) {
    for (Index i = chunk * ROWS; i < std::min(n, (chunk + 1) * ROWS); i++) {
      const Index context = contexts[i];
      if (context < 0) continue;
      const Index first = firsts[context], end = firsts[context + 1];
      const Index target = counted[i] ? context * v + targets[i] : -1;
      Index distinct = end - first;
      for (Index e = first; e < end; e++) distinct -= keys[e] == target && counts[e] == 1;
      const float total = totals[context] - (float)counted[i] + (float)distinct;
      if (total <= 0) continue;
      float* row = expected + i * v;
      const float share = (float)distinct / total;
      for (Index j = 0; j < v; j++) row[j] *= share;
      for (Index e = first; e < end; e++)
        row[keys[e] - context * v] += (counts[e] - (float)(keys[e] == target)) / total;
    }
  });
}

}  // namespace
}  // namespace chargpt

using namespace chargpt;

EXPORT int ngram_find_fp32(const Index* keys, Index n_keys, const Index* contexts,
                           const Index* tokens, Index* grams, Index n, Index v) {
  return out_of_memory([&] { find(keys, n_keys, contexts, tokens, grams, n, v); });
}
EXPORT int ngram_mix_fp32(const Index* keys, const float* counts, const Index* firsts,
                      const float* totals, const Index* contexts, const Index* targets,
                      const Index* counted, float* expected, Index n, Index v) {
  return out_of_memory([&] {
    interpolate(keys, counts, firsts, totals, contexts, targets, counted, expected, n, v);
  });
}
