// Muon's update of matrices (Jordan 2024): momentum, orthogonalisation, decay and step, in place.
//
// Python calls the exported functions through chargpt/compute/native.py; they return 0, or 1 if
// memory ran out.

#include <atomic>

#include "products.h"

namespace chargpt {
namespace {

// Replaces x (rows × columns) by a x + b (x xᵀ) x + c (x xᵀ)² x.
template <class T>
struct Orthogonalizer {
  typedef typename T::Value Value;
  Index rows, columns;
  Packed transposed, gram, right;
  Array<Value> products, polynomial;
  Array<float> result;  // of a block of rows

  Orthogonalizer(Index rows, Index columns)
      : rows(rows),
        columns(columns),
        transposed(Packed::of(T(), columns, rows)),
        gram(Packed::of(T(), rows, rows)),
        right(Packed::of(T(), rows, columns)),
        products(rows * rows),
        polynomial(rows * rows),
        result(BLOCK * columns) {}

  // Compute the first n columns of x × b, block by block, and call done(row, column, vector).
  // Of a symmetric product in float, only the blocks up to the diagonal are computed.
  template <class Done>
  void multiply_by(const Value* x, Index k, const Packed& b, Index n, bool symmetric,
                   Done done) const {
    for (Index first = 0; first < rows; first += BLOCK) {
      const Index m = std::min<Index>(BLOCK, rows - first);
      const Index columns = symmetric && T::G == 1 ? first + m : n;
      multiply<T>(m, columns, k / T::G, rows_of<T>(x + first * k, k), b.array.data(), b.depth,
                  result.data(), columns);
      for (Index i = 0; i < m; i++)
        for (Index j = 0; j < columns; j += L)
          done(first + i, j, load<vec>(result.data() + i * columns + j));
    }
  }

  // Copy what is left of the diagonal to its right.
  void mirror(const Array<Value>& square) const {
    if (T::G > 1) return;
    for (Index i = 0; i < rows; i += L)
      for (Index j = 0; j <= i; j += L) {
        words corner[L];
        for (int r = 0; r < L; r++) corner[r] = load<words>(&square[(i + r) * rows + j]);
        chargpt::transpose(corner);
        for (int r = 0; r < L; r++) store(&square[(j + r) * rows + i], corner[r]);
      }
  }

  void step(Value* x, float a, float b, float c) const {
    pack_transposed<T>(x, columns, columns, rows, transposed);
    multiply_by(x, columns, transposed, rows, true, [&](Index i, Index j, vec v) {
      T::write(&products[i * rows + j], v);
    });
    mirror(products);
    pack<T>(products.data(), rows, rows, rows, gram);
    multiply_by(products.data(), rows, gram, rows, true, [&](Index i, Index j, vec v) {
      const Index at = i * rows + j;
      T::write(&polynomial[at], fma(T::read(&products[at]), broadcast(b), v * c));
    });
    mirror(polynomial);
    pack<T>(x, columns, rows, columns, right);
    multiply_by(polynomial.data(), rows, right, columns, false, [&](Index i, Index j, vec v) {
      Value* at = x + i * columns + j;
      T::write(at, fma(T::read(at), broadcast(a), v));
    });
  }
};

void transpose(const float* x, Index rows, Index columns, float* out) {
  for (Index i = 0; i < rows; i += LANES)
    for (Index j = 0; j < columns; j++)
      for (Index r = i; r < i + LANES; r++) out[j * rows + r] = x[r * columns + j];
}

// Update one matrix. All memory is allocated before the first change.
template <class T>
void muon_matrix(float* weights, const float* gradient, float* momenta, Index rows, Index columns,
                 float scale, float momentum, float decay, const float* steps, int n_steps) {
  const Index low = std::min(rows, columns), high = std::max(rows, columns), size = rows * columns;
  const bool tall = rows > columns;
  const Array<float> update(size), turned(tall ? size : 0);
  const Array<typename T::Value> x(size);
  const Orthogonalizer<T> orthogonalizer(low, high);
  Lanes squares;
  for_vectors(size, [&](Index i, int p) {
    const vec g = load<vec>(gradient + i), old = load<vec>(momenta + i);
    const vec now = fma(g - old, 1 - momentum, old), ahead = fma(now - g, momentum, g);
    store(momenta + i, now);
    store(&update[i], ahead);
    squares.part[p] = fma(ahead, ahead, squares.part[p]);
  });
  const float inverse_norm = 1.f / std::max(std::sqrt(sum(squares)), 1e-7f);
  if (tall) transpose(update.data(), rows, columns, turned.data());
  const float* wide = tall ? turned.data() : update.data();
  for (Index i = 0; i < size; i += L) T::write(&x[i], load<vec>(wide + i) * inverse_norm);
  for (const float* step = steps; step < steps + 3 * n_steps; step += 3)
    orthogonalizer.step(x.data(), step[0], step[1], step[2]);
  for (Index i = 0; i < size; i += L) store(&update[i], T::read(&x[i]));
  if (tall) transpose(update.data(), columns, rows, turned.data());
  const float* direction = tall ? turned.data() : update.data();
  for (Index i = 0; i < size; i += L)
    store(weights + i, fma(load<vec>(direction + i), -scale, load<vec>(weights + i) * decay));
}

// Update n matrices. `shapes` holds the rows and columns of each, `scales` the length of each step.
template <class T>
void muon(float* const* weights, const float* const* gradients, float* const* momenta,
          const int* shapes, const float* scales, Index n, float momentum, float decay,
          const float* steps, int n_steps) {
  std::atomic<bool> failed{false};
  parallel(n, [&](Index i, int) {
    if (out_of_memory([&] {
          muon_matrix<T>(weights[i], gradients[i], momenta[i], shapes[2 * i], shapes[2 * i + 1],
                         scales[i], momentum, decay, steps, n_steps);
        }))
      failed = true;
  });
  if (failed) throw std::bad_alloc();
}

}  // namespace
}  // namespace chargpt

using namespace chargpt;

#define FUNCTIONS(T, suffix)                                                                   \
  EXPORT int muon_##suffix(float* const* weights, const float* const* gradients,               \
      float* const* momenta, const int* shapes, const float* scales, Index n, float momentum,  \
      float decay, const float* steps, int n_steps) {                                          \
    return out_of_memory([&] {                                                                 \
      muon<T>(weights, gradients, momenta, shapes, scales, n, momentum, decay, steps, n_steps); \
    });                                                                                        \
  }

FUNCTIONS(Float, fp32)
#ifdef CHARGPT_BF16
FUNCTIONS(Bfloat16, bf16)
#endif
