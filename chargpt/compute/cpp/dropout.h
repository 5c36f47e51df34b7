// Dropout masks. A hash of (key, index) decides, so the forward and the backward pass drop the same
// values, on any number of threads.

#pragma once

#include "vectors.h"

namespace chargpt {

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
  INLINE vec mask(uint32_t first) const {
    words x = (words)lanes() + first;  // lowbias32 (Wellons 2018)
    x = x * 0x9E3779B9u + key;
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    x = x ^ (x >> 16);
    const ints keep = (ints)(x >> 1) >= (int32_t)dropped;
    return (vec)((ints)broadcast(scale) & keep);
  }
  INLINE vec apply(vec x, Index first) const { return on() ? x * mask((uint32_t)first) : x; }
};

}  // namespace chargpt
