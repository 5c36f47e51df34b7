// GELU in its tanh form (Hendrycks & Gimpel 2016): x sigmoid(2u), u = sqrt(2 / π) (x + 0.044715 x³).

#pragma once

#include "products.h"

namespace chargpt {

constexpr float TWICE_ROOT = 1.5957691216f, CUBIC = 0.044715f;

// s = sigmoid(2u), and the rest 1 - s, which rounding must not lose: x³ multiplies it.
struct Gate {
  vec s, rest;
};
template <class T>
INLINE Gate gate(vec x) {
  const vec slope = fma(x * x, -TWICE_ROOT * CUBIC, broadcast(-TWICE_ROOT));
  const vec e = exponential(x * slope), s = T::inverse(1.f + e);
  return {s, e * s};
}
template <class T>
INLINE vec gelu(vec x) {
  return x * gate<T>(x).s;
}
INLINE vec gelu_slope(vec x, Gate gate) {
  const vec inner = fma(x * x, 3 * TWICE_ROOT * CUBIC, broadcast(TWICE_ROOT));  // d(2u) / dx
  return fma(x * gate.s * gate.rest, inner, gate.s);
}

}  // namespace chargpt
