// Matrix products, on the calling thread.
//
// Some columns of one factor, as many as a few vectors hold, are laid together in a panel; its products
// with some rows of the other are sums that stay in registers. The vectors are as wide as the processor
// has them, where MKL, torch's BLAS on x86-64, takes half of that on processors that are not Intel's.

#include "vectors.h"

#include <algorithm>
#include <memory>

namespace {

using std::int64_t;

// So many products are added up, then their sums: fewer errors add up, and as much of a panel stays
// in a core's own caches.
constexpr int64_t kDepth = 256;

// Its element (i, j) is at[i * row + j * column].
template <class T>
struct Factor {
  const T* at;
  int64_t row, column;
};

// Columns of a matrix: k rows of some vectors, the last of which is perhaps not full.
template <class T>
struct Panel {
  static constexpr int64_t lanes = Vector<T>::lanes, most = kTogether * lanes;
  int64_t vectors, last;
  std::unique_ptr<Vector<T>[]> rows;

  explicit Panel(int64_t k) : rows(new Vector<T>[k * kTogether]) {}

  int64_t width(int64_t vector) const { return vector + 1 < vectors ? lanes : last; }

  void resize(int64_t columns) {
    vectors = (columns + lanes - 1) / lanes;
    last = columns - (vectors - 1) * lanes;
  }

  void take(const T* from, int64_t stride, int64_t k) {
    for (int64_t row = 0; row < k; ++row)
      for (int64_t vector = 0; vector < vectors; ++vector)
        rows[row * vectors + vector].of =
            load(from + row * stride + vector * lanes, width(vector));
  }

  void take_turned(const T* from, int64_t stride, int64_t k) {
    for (int64_t vector = 0; vector < vectors; ++vector)
      for (int64_t row = 0; row < k; row += lanes) {
        typename Vector<T>::Type square[lanes];
        const int64_t some = std::min(lanes, k - row);
        read_turned(from + vector * lanes * stride + row, stride, width(vector), some, square);
        for (int64_t i = 0; i < some; ++i) rows[(row + i) * vectors + vector].of = square[i];
      }
  }

  void give_turned(T* to, int64_t stride, int64_t k, const T* bias) const {
    for (int64_t vector = 0; vector < vectors; ++vector)
      for (int64_t row = 0; row < k; row += lanes) {
        typename Vector<T>::Type square[lanes] = {};
        const int64_t some = std::min(lanes, k - row);
        for (int64_t i = 0; i < some; ++i)
          square[i] = rows[(row + i) * vectors + vector].of + (bias ? bias[row + i] : T(0));
        write_turned(square, to + vector * lanes * stride + row, stride, width(vector), some);
      }
  }
};

// N rows of M vectors: sums of products, added to what is there or written over it.
template <class T, int N, int M>
void multiply(const Factor<T>& a, const Vector<T>* panel, int64_t depth, bool adds, T* c,
              int64_t stride, int64_t last) {
  constexpr int64_t lanes = Vector<T>::lanes;
  typename Vector<T>::Type sums[N][M] = {};
  const T* at = a.at;
  for (int64_t i = 0; i < depth; ++i, at += a.column, panel += M)
    NORMLAB_UNROLL
    for (int n = 0; n < N; ++n)
      NORMLAB_UNROLL
      for (int m = 0; m < M; ++m) sums[n][m] += at[n * a.row] * panel[m].of;
  NORMLAB_UNROLL
  for (int n = 0; n < N; ++n)
    NORMLAB_UNROLL
    for (int m = 0; m < M; ++m) {
      T* to = c + n * stride + m * lanes;
      const int64_t count = m + 1 < M ? lanes : last;
      store(adds ? load(to, count) + sums[n][m] : sums[n][m], to, count);
    }
}

template <class T, int M>
void multiply_by(const Panel<T>& panel, const Factor<T>& a, int64_t rows, int64_t k, bool adds, T* c,
                 int64_t stride, int64_t last) {
  for (int64_t start = 0; start < k; start += kDepth)
    in_parts(rows, [&](int64_t row, auto size) {
      const Factor<T> part{a.at + row * a.row + start * a.column, a.row, a.column};
      multiply<T, size, M>(part, panel.rows.get() + start * M, std::min(kDepth, k - start),
                           adds || start, c + row * stride, stride, last);
    });
}

template <class T>
void product(const Product& p, const T* bias, const T* a, const T* b, T* c) {
  // C is made turned where B is: its vectors go along whatever is not summed over.
  const int64_t rows = p.b_turned ? p.n : p.m, columns = p.b_turned ? p.m : p.n;
  const Factor<T> factor = p.b_turned   ? Factor<T>{b, p.k, 1}
                           : p.a_turned ? Factor<T>{a, 1, p.m}
                                        : Factor<T>{a, p.k, 1};
  Panel<T> panel(p.k), made(p.b_turned ? rows : 0);
  for (int64_t start = 0; start < columns; start += panel.most) {
    const int64_t width = std::min(panel.most, columns - start);
    panel.resize(width);
    made.resize(width);
    if (p.b_turned && !p.a_turned)
      panel.take_turned(a + start * p.k, p.k, p.k);
    else
      panel.take((p.b_turned ? a : b) + start, columns, p.k);
    if (!p.b_turned && bias)
      for (int64_t row = 0; row < rows; ++row)
        std::memcpy(c + row * p.n + start, bias + start, sizeof(T) * width);
    T* to = p.b_turned ? reinterpret_cast<T*>(made.rows.get()) : c + start;
    const int64_t stride = p.b_turned ? panel.vectors * panel.lanes : p.n;
    const int64_t last = p.b_turned ? panel.lanes : panel.last;
    const bool adds = !p.b_turned && bias;
    as_constant<kTogether>(panel.vectors, [&](auto vectors) {
      multiply_by<T, vectors>(panel, factor, rows, p.k, adds, to, stride, last);
    });
    if (p.b_turned) made.give_turned(c + start * p.n, p.n, rows, bias);
  }
}

}  // namespace

extern "C" {

void NORMLAB_NAME(normlab_product)(int wide, const Product* p, const void* bias, const void* a,
                                   const void* b, void* c) {
  auto run = [&](auto type) {
    using T = decltype(type);
    product(*p, static_cast<const T*>(bias), static_cast<const T*>(a), static_cast<const T*>(b),
            static_cast<T*>(c));
  };
  wide ? run(double{}) : run(float{});
}

}  // extern "C"
