// Softmax over the keys that a query sees, for training and for the decoder.

#pragma once

#include "vectors.h"

namespace chargpt {

constexpr float MASKED = -1e30f;  // a masked score; finite, so that arithmetic cannot make it NaN

INLINE vec visible(vec x, Index query, Index first_key, float other) {
  return lanes() + (int32_t)first_key > (int32_t)query ? broadcast(other) : x;
}

// Replace the scores of the keys [0, query] by e^(scale × score - top), and those up to the next
// multiple of LANES by 0. Return top, the largest scaled score, and the sum.
struct RowSum {
  float top, total;
};
INLINE RowSum exponentials(float* scores, Index query, float scale) {
  const Index full = (query + 1) / LANES * LANES, end = round_up(query + 1, LANES);
  Lanes most, total;
  for (vec& part : most.part) part = broadcast(MASKED);
  for_vectors(full, [&](Index j, int p) {
    most.part[p] = max_of(most.part[p], load<vec>(scores + j));
  });
  for (Index j = full; j < end; j += L)
    most.part[0] = max_of(most.part[0], visible(load<vec>(scores + j), query, j, MASKED));
  const float top = scale * maximum(most) + 0.f;  // never -0: which zero is larger depends on L
  for_vectors(full, [&](Index j, int p) {
    const vec x = exponential(fma(load<vec>(scores + j), scale, broadcast(-top)));
    store(scores + j, x);
    total.part[p] += x;
  });
  for_vectors(end - full, [&](Index j, int p) {
    float* at = scores + full + j;
    vec x = exponential(fma(load<vec>(at), scale, broadcast(-top)));
    x = visible(x, query, full + j, 0.f);
    store(at, x);
    total.part[p] += x;
  });
  return {top, sum(total)};
}

}  // namespace chargpt
