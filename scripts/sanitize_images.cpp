// Calls the convolutions and poolings of a few hundred shapes, with the sanitizers that
// scripts/sanitize.py compiles in. Every buffer is exactly as large as its tensor.

#include "../src/normlab/kernels/kernels.h"

#include <cstdint>
#include <cstdio>
#include <vector>

namespace {

template <class T>
std::vector<T> values(std::int64_t count) {
  std::vector<T> made(count);
  for (std::int64_t i = 0; i < count; ++i) made[i] = T(0.01) * static_cast<T>(i % 11) - T(0.05);
  return made;
}

template <class T>
bool is_finite(const std::vector<T>& all) {
  for (const T each : all)
    if (!(each > T(-1e6) && each < T(1e6))) return false;
  return true;
}

template <class T>
bool convolve(const Convolution& c) {
  const int wide = sizeof(T) == sizeof(double);
  const std::int64_t out_height = c.height + 2 * c.rim_height - c.window_height + 1;
  const std::int64_t out_width = c.width + 2 * c.rim_width - c.window_width + 1;
  const std::vector<T> x = values<T>(c.images * c.in * c.height * c.width), bias = values<T>(c.out);
  const std::vector<T> weight = values<T>(c.out * c.in * c.window_height * c.window_width);
  std::vector<T> y = values<T>(c.images * c.out * out_height * out_width), grad = y;
  std::vector<T> by_x(x.size()), by_weight(weight.size()), by_bias(bias.size());
  normlab_convolve_base(wide, &c, x.data(), weight.data(), bias.data(), y.data());
  normlab_convolve_backward_base(wide, &c, grad.data(), x.data(), weight.data(), by_x.data(),
                                 by_weight.data(), by_bias.data());
  return is_finite(y) && is_finite(by_x) && is_finite(by_weight) && is_finite(by_bias);
}

template <class T>
bool pool(const Pooling& p) {
  const int wide = sizeof(T) == sizeof(double);
  const std::int64_t windows = p.height / p.window_height * (p.width / p.window_width);
  const std::vector<T> x = values<T>(p.planes * p.height * p.width);
  std::vector<T> y(p.planes * windows), by_x(x.size());
  normlab_pool_base(wide, &p, x.data(), y.data());
  normlab_pool_backward_base(wide, &p, y.data(), x.data(), by_x.data());
  return is_finite(y) && is_finite(by_x);
}

template <class T>
bool all_are_finite() {
  for (const std::int64_t channels : {1, 2, 7})
    for (const std::int64_t out : {1, 3, 8})
      for (const std::int64_t window : {1, 2, 5})
        for (std::int64_t rim = 0; rim < window; ++rim)
          for (const std::int64_t width : {5, 8, 12})
            if (!convolve<T>({33, channels, 6, width, out, window, (window + 1) / 2, rim,
                              rim < (window + 1) / 2 ? rim : 0}))
              return std::puts("a convolution has a value that is no number"), false;
  for (const std::int64_t average : {0, 1})
    for (const std::int64_t width : {2, 3, 9})
      for (const std::int64_t window : {1, 2})
        if (!pool<T>({average, 3, 7, width, 3, window}))
          return std::puts("a pooling has a value that is no number"), false;
  return true;
}

}  // namespace

int main() { return all_are_finite<float>() && all_are_finite<double>() ? 0 : 1; }
