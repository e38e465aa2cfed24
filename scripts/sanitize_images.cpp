// Calls the convolutions and poolings of a few hundred shapes, with the sanitizers that
// scripts/sanitize.py compiles in. Every buffer is exactly as large as its tensor.

#include "../src/normlab/kernels/kernels.h"

#include <cstdint>
#include <cstdio>
#include <vector>

namespace {

using Values = std::vector<float>;

Values values(std::int64_t count) {
  Values made(count);
  for (std::int64_t i = 0; i < count; ++i) made[i] = 0.01f * static_cast<float>(i % 11) - 0.05f;
  return made;
}

bool is_finite(const Values& all) {
  for (const float each : all)
    if (!(each > -1e6f && each < 1e6f)) return false;
  return true;
}

bool convolve(const Convolution& c) {
  const std::int64_t out_height = c.height + 2 * c.rim_height - c.window_height + 1;
  const std::int64_t out_width = c.width + 2 * c.rim_width - c.window_width + 1;
  const Values x = values(c.images * c.in * c.height * c.width), bias = values(c.out);
  const Values weight = values(c.out * c.in * c.window_height * c.window_width);
  Values y = values(c.images * c.out * out_height * out_width), grad = y;
  Values by_x(x.size()), by_weight(weight.size()), by_bias(bias.size());
  normlab_convolve_base(0, &c, x.data(), weight.data(), bias.data(), y.data());
  normlab_convolve_backward_base(0, &c, grad.data(), x.data(), weight.data(), by_x.data(),
                                 by_weight.data(), by_bias.data());
  return is_finite(y) && is_finite(by_x) && is_finite(by_weight) && is_finite(by_bias);
}

bool pool(const Pooling& p) {
  const std::int64_t windows = p.height / p.window_height * (p.width / p.window_width);
  const Values x = values(p.planes * p.height * p.width);
  Values y(p.planes * windows), by_x(x.size());
  normlab_pool_base(0, &p, x.data(), y.data());
  normlab_pool_backward_base(0, &p, y.data(), x.data(), by_x.data());
  return is_finite(y) && is_finite(by_x);
}

}  // namespace

int main() {
  for (const std::int64_t channels : {1, 2, 7})
    for (const std::int64_t out : {1, 3, 8})
      for (const std::int64_t window : {1, 2, 5})
        for (std::int64_t rim = 0; rim < window; ++rim)
          for (const std::int64_t width : {5, 8, 12})
            if (!convolve({33, channels, 6, width, out, window, (window + 1) / 2, rim,
                           rim < (window + 1) / 2 ? rim : 0}))
              return std::puts("a convolution has a value that is no number"), 1;
  for (const std::int64_t average : {0, 1})
    for (const std::int64_t width : {2, 3, 9})
      for (const std::int64_t window : {1, 2})
        if (!pool({average, 3, 7, width, 3, window}))
          return std::puts("a pooling has a value that is no number"), 1;
  return 0;
}
