// What the kernels share. Each file is compiled once for each instruction set, with NORMLAB_SUFFIX
// naming it. No header of torch is included; callers hand over raw pointers.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifndef NORMLAB_SUFFIX
#define NORMLAB_SUFFIX base
#endif
#define NORMLAB_JOIN(name, suffix) name##_##suffix
#define NORMLAB_NAMED(name, suffix) NORMLAB_JOIN(name, suffix)
#define NORMLAB_NAME(name) NORMLAB_NAMED(name, NORMLAB_SUFFIX)

enum Dtype { kFloat32 = 0, kBFloat16 = 1, kFloat64 = 2 };
enum Activation { kIdentity = 0, kReLU = 1, kLeakyReLU = 2, kSigmoid = 3, kSiLU = 4 };

// Images (images, in, height, width) and a window (out, in, window_height, window_width), each in
// rows; `rim_*` are the zeros around an image. Neither rim is as wide as the window.
struct Convolution {
  std::int64_t images, in, height, width, out, window_height, window_width, rim_height, rim_width;
};

// C (m, n) = op(A) (m, k) op(B) (k, n), none of them empty; a turned one lies with its axes exchanged.
struct Product {
  std::int64_t m, n, k, a_turned, b_turned;
};

// Of images' channels, `planes` in all; the windows lie side by side. Otherwise than by the average it
// is by the largest.
struct Pooling {
  std::int64_t average, planes, height, width, window_height, window_width;
};

extern "C" {

// All of float, or of double if `wide`. Those of images and matrices allocate memory; if there is none,
// the process ends.

// `bias` is added to each row of C; it may be null, here and below.
void NORMLAB_NAME(normlab_product)(int wide, const Product* p, const void* bias, const void* a,
                                   const void* b, void* c);

void NORMLAB_NAME(normlab_convolve)(int wide, const Convolution* c, const void* x,
                                    const void* weight, const void* bias, void* y);

// `grad_x` and `grad_bias` may be null.
void NORMLAB_NAME(normlab_convolve_backward)(int wide, const Convolution* c, const void* grad,
                                             const void* x, const void* weight, void* grad_x,
                                             void* grad_weight, void* grad_bias);

void NORMLAB_NAME(normlab_pool)(int wide, const Pooling* p, const void* x, void* y);
// Where the average is taken, `x` is not looked at, and what no window has is left as it is.
void NORMLAB_NAME(normlab_pool_backward)(int wide, const Pooling* p, const void* grad,
                                         const void* x, void* grad_x);

// Pointers are null where their tensor is absent: residual, weight, bias, and in training the running
// statistics, which else move by `momentum`. `statistics` receives what was normalized by: R * C
// means, then as many biased variances.
void NORMLAB_NAME(normlab_forward)(
    int dtype, int interleaved, std::int64_t R, std::int64_t N, std::int64_t C, std::int64_t S,
    const void* x, const void* residual, const void* weight, const void* bias, void* running_mean,
    void* running_var, double momentum, double eps, int activation, double negative_slope,
    int training, void* y, double* statistics, int threads);

// `y` and `grad_residual` belong together: the output of a forward pass that had a residual.
// `grad_weight` and `grad_bias` may be null. In training the statistics are functions of x.
void NORMLAB_NAME(normlab_backward)(
    int dtype, int interleaved, std::int64_t R, std::int64_t N, std::int64_t C, std::int64_t S,
    const void* grad, const void* x, const void* y, const void* weight, const void* bias,
    const double* statistics, double eps, int activation, double negative_slope, int training,
    void* grad_x, void* grad_residual, void* grad_weight, void* grad_bias, int threads);

}  // extern "C"

namespace {  // Not `inline` across files: what each is compiled for differs.

inline double exponential(double x) { return std::exp(x); }
// The C library's expf cannot be vectorized; 2^n * polynomial can. Relative error below 2e-7.
inline float exponential(float x) {
  x = x > 89.0f ? 89.0f : x;  // Infinite from here on. Written so that NaN passes.
  x = x < -87.0f ? -87.0f : x;
  const float magic = 12582912.0f;  // Adding 1.5 * 2^23 rounds to a whole number.
  const float shifted = x * 1.44269504f + magic;
  const float n = shifted - magic;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  std::int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = static_cast<std::int32_t>(static_cast<std::uint32_t>(bits + 127) << 23);
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

}  // namespace
