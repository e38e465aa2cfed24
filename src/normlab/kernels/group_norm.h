// Group norm, and layer norm as its case of one group, of samples that lie in rows.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

namespace {

using std::int64_t;

// Calls `run` with runs of a part's values: where each starts, how many values and which channel it
// has, and how far a channel is from the next value's: 1, or 0 where a channel has several.
template <class Run>
void in_runs(int64_t channel, int64_t width, int64_t spatial, Run run) {
  if (spatial == 1) return run(0, width, channel, std::integral_constant<int, 1>{});
  for (int64_t start = 0; start < width; start += spatial, ++channel)
    run(start, spatial, channel, std::integral_constant<int, 0>{});
}

// Normalizes each of `groups` parts of every sample. `statistics`: their means, then 1/deviations.
template <class T>
void group_norm(int64_t samples, int64_t channels, int64_t groups, int64_t spatial, double eps,
                const T* x, const T* weight, const T* bias, T* y, T* statistics) {
  const int64_t width = channels / groups * spatial;
  for (int64_t part = 0; part < samples * groups; ++part) {
    const T* __restrict from = x + part * width;
    T* __restrict to = y + part * width;
    T sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; ++i) sum += from[i];
    const T mean = sum / T(width);
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; ++i) squares += (from[i] - mean) * (from[i] - mean);
    const T rstd = T(1) / std::sqrt(squares / T(width) + T(eps));
    in_runs(part % groups * (channels / groups), width, spatial,
            [&](int64_t start, int64_t count, int64_t channel, auto step) {
#pragma omp simd
              for (int64_t i = 0; i < count; ++i)
                to[start + i] = (from[start + i] - mean) * rstd *
                                    (weight ? weight[channel + i * step] : T(1)) +
                                (bias ? bias[channel + i * step] : T(0));
            });
    statistics[part] = mean;
    statistics[samples * groups + part] = rstd;
  }
}

template <class T>
void group_norm_backward(int64_t samples, int64_t channels, int64_t groups, int64_t spatial,
                         const T* grad, const T* x, const T* weight, const T* statistics,
                         T* grad_x, T* grad_weight, T* grad_bias) {
  const int64_t width = channels / groups * spatial;
  std::fill_n(grad_weight, channels, T(0));
  std::fill_n(grad_bias, channels, T(0));
  for (int64_t part = 0; part < samples * groups; ++part) {
    const T* __restrict g = grad + part * width;
    const T* __restrict from = x + part * width;
    T* __restrict to = grad_x + part * width;
    const T mean = statistics[part], rstd = statistics[samples * groups + part];
    const int64_t first = part % groups * (channels / groups);
    T sum = 0, product = 0;
    in_runs(first, width, spatial, [&](int64_t start, int64_t count, int64_t channel, auto step) {
      T by_weight = 0, by_bias = 0;  // Of the run's only channel.
#pragma omp simd reduction(+ : sum, product, by_weight, by_bias)
      for (int64_t i = 0; i < count; ++i) {
        const T value = (from[start + i] - mean) * rstd;
        const T scale = weight ? weight[channel + i * step] : T(1);
        sum += g[start + i] * scale;
        product += g[start + i] * scale * value;
        if (step) {
          grad_weight[channel + i * step] += g[start + i] * value;
          grad_bias[channel + i * step] += g[start + i];
        } else {
          by_weight += g[start + i] * value;
          by_bias += g[start + i];
        }
      }
      grad_weight[channel] += by_weight;
      grad_bias[channel] += by_bias;
    });
    sum /= T(width);
    product /= T(width);
    in_runs(first, width, spatial, [&](int64_t start, int64_t count, int64_t channel, auto step) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const T h = weight ? g[start + i] * weight[channel + i * step] : g[start + i];
        to[start + i] = rstd * (h - sum - (from[start + i] - mean) * rstd * product);
      }
    });
  }
}

}  // namespace
