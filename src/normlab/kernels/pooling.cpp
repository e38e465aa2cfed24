// Pooling of images, on the calling thread.
//
// Windows lie side by side; what is left over at the right and at the bottom belongs to none. `W` is
// their width, for loops that are unrolled, or 0 for any.

#include "kernels.h"

#include <algorithm>
#include <vector>

namespace {

using std::int64_t;

// What lies in a plane's windows, their rows added up, and then all of it in one loop: rows alone are
// too short for one.
template <class T, int W>
void average(const Pooling& p, const T* x, T* y) {
  const int64_t width = W ? W : p.window_width;
  const int64_t rows = p.height / p.window_height, columns = p.width / width;
  const int64_t used = columns * width, count = rows * columns;
  const T share = T(1) / T(p.window_height * width);
  std::vector<T> sums(rows * used);
  for (int64_t plane = 0; plane < p.planes; ++plane, x += p.height * p.width, y += count) {
    for (int64_t row = 0; row < rows; ++row) {
      T* __restrict to = sums.data() + row * used;
      const T* __restrict from = x + row * p.window_height * p.width;
      std::copy_n(from, used, to);
      for (int64_t i = 1; i < p.window_height; ++i)
        for (int64_t column = 0; column < used; ++column) to[column] += from[i * p.width + column];
    }
    const T* __restrict from = sums.data();
    T* __restrict to = y;
    for (int64_t i = 0; i < count; ++i) {
      T sum = 0;
      for (int64_t j = 0; j < width; ++j) sum += from[i * width + j];
      to[i] = sum * share;
    }
  }
}

template <class T, int W>
void average_backward(const Pooling& p, const T* grad, T* grad_x) {
  const int64_t width = W ? W : p.window_width;
  const int64_t rows = p.height / p.window_height, columns = p.width / width;
  const int64_t used = columns * width;
  const T share = T(1) / T(p.window_height * width);
  for (int64_t plane = 0; plane < p.planes; ++plane, grad_x += p.height * p.width)
    for (int64_t row = 0; row < rows; ++row, grad += columns) {
      const T* __restrict from = grad;
      T* __restrict to = grad_x + row * p.window_height * p.width;
      for (int64_t column = 0; column < columns; ++column)
        for (int64_t j = 0; j < width; ++j) to[column * width + j] = from[column] * share;
      for (int64_t i = 1; i < p.window_height; ++i) std::copy_n(to, used, to + i * p.width);
    }
}

// Calls `run` with each window and the place of its largest value: of several the first, but of
// values that are no number the last, as torch does.
template <class T, int W, class Run>
void for_largest(const Pooling& p, const T* x, Run run) {
  const int64_t width = W ? W : p.window_width;
  const int64_t rows = p.height / p.window_height, columns = p.width / width;
  int64_t window = 0;
  for (int64_t plane = 0; plane < p.planes; ++plane)
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = 0; column < columns; ++column, ++window) {
        const int64_t corner =
            (plane * p.height + row * p.window_height) * p.width + column * width;
        int64_t largest = corner;
        for (int64_t i = 0; i < p.window_height; ++i)
          for (int64_t j = 0; j < width; ++j) {
            const int64_t place = corner + i * p.width + j;
            if (x[place] > x[largest] || x[place] != x[place]) largest = place;
          }
        run(window, largest);
      }
}

template <class T, int W>
void pool(const Pooling& p, const T* x, T* y) {
  if (p.average) return average<T, W>(p, x, y);
  for_largest<T, W>(p, x, [&](int64_t window, int64_t largest) { y[window] = x[largest]; });
}

template <class T, int W>
void pool_backward(const Pooling& p, const T* grad, const T* x, T* grad_x) {
  if (p.average) return average_backward<T, W>(p, grad, grad_x);
  std::fill_n(grad_x, p.planes * p.height * p.width, T(0));
  for_largest<T, W>(p, x, [&](int64_t window, int64_t largest) { grad_x[largest] = grad[window]; });
}

}  // namespace

extern "C" {

void NORMLAB_NAME(normlab_pool)(int wide, const Pooling* p, const void* x, void* y) {
  auto run = [&](auto type) {
    using T = decltype(type);
    auto pass = p->window_width == 2 ? pool<T, 2> : pool<T, 0>;
    pass(*p, static_cast<const T*>(x), static_cast<T*>(y));
  };
  wide ? run(double{}) : run(float{});
}

void NORMLAB_NAME(normlab_pool_backward)(int wide, const Pooling* p, const void* grad,
                                         const void* x, void* grad_x) {
  auto run = [&](auto type) {
    using T = decltype(type);
    auto pass = p->window_width == 2 ? pool_backward<T, 2> : pool_backward<T, 0>;
    pass(*p, static_cast<const T*>(grad), static_cast<const T*>(x), static_cast<T*>(grad_x));
  };
  wide ? run(double{}) : run(float{});
}

}  // extern "C"
