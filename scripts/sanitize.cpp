// Runs the kernels over many shapes, with the sanitizers that scripts/sanitize.py compiles in. Every
// buffer is exactly as large as its tensor, so that a step past its end is seen.

#include "../src/normlab/kernels/batch_norm.cpp"

#include <cstdio>
#include <random>

namespace {

std::mt19937 generator(0);

template <class T>
std::vector<T> values(int64_t n, float low, float high) {
  std::uniform_real_distribution<float> uniform(low, high);
  std::vector<T> out(n);
  for (T& value : out) narrow(arithmetic<T>(uniform(generator)), value);
  return out;
}

template <class T>
T* pointer(std::vector<T>& buffer, bool given = true) {
  return given ? buffer.data() : nullptr;
}

// One forward and backward pass; returns everything that was written.
template <class T>
std::vector<double> pass(int dtype, Shape s, int activation, bool extras, bool training) {
  using A = arithmetic<T>;
  generator.seed(1);
  const int64_t n = s.channels() * s.count(), channels = s.channels();
  const bool adds = extras && activation <= kReLU;
  auto x = values<T>(n, -1, 5), residual = values<T>(n, -1, 1), grad = values<T>(n, -1, 1);
  auto weight = values<A>(channels, 0.5, 2), bias = values<A>(channels, -1, 1);
  auto mean = values<A>(channels, 1, 3), var = values<A>(channels, 1, 3);
  std::vector<T> y(n), grad_x(n), grad_residual(n);
  std::vector<A> grad_weight(channels), grad_bias(channels);
  std::vector<double> statistics(2 * channels);
  normlab_forward_base(dtype, s.interleaved, s.R, s.N, s.C, s.S, x.data(),
                       pointer(residual, adds), pointer(weight, extras), pointer(bias, extras),
                       pointer(mean, extras || !training), pointer(var, extras || !training), 0.1,
                       1e-5, activation, 0.01, training, y.data(), statistics.data(), s.threads);
  normlab_backward_base(dtype, s.interleaved, s.R, s.N, s.C, s.S, grad.data(), x.data(),
                        pointer(y, adds), pointer(weight, extras), pointer(bias, extras),
                        statistics.data(), 1e-5, activation, 0.01, training, grad_x.data(),
                        pointer(grad_residual, adds), pointer(grad_weight, extras),
                        pointer(grad_bias, extras), s.threads);
  std::vector<double> written(statistics);
  for (const auto* each : {&y, &grad_x, &grad_residual})
    for (const T value : *each) written.push_back(widen(value));
  for (const auto* each : {&mean, &var, &grad_weight, &grad_bias})
    written.insert(written.end(), each->begin(), each->end());
  return written;
}

}  // namespace

int main() {
  const int64_t shapes[][4] = {{1, 2, 1, 1},    {1, 3, 5, 1},    {3, 4, 7, 1},    {1, 70, 65, 1},
                               {2, 33, 3, 63},  {1, 9, 6, 64},   {1, 40, 2, 900}, {1, 3, 1, 40000},
                               {1, 130, 17, 4}, {2, 5, 70, 130}, {1, 700, 64, 1}, {1, 2, 3, 1500}};
  int64_t passes = 0, differences = 0;
  for (const auto& [R, N, C, S] : shapes)
    for (const bool interleaved : {false, true})
      for (int activation = kIdentity; activation <= kSiLU; ++activation)
        for (const bool extras : {false, true})
          for (const bool training : {false, true})
            for (int dtype = kFloat32; dtype <= kFloat64; ++dtype) {
              std::vector<double> first;
              for (const int threads : {1, 2, 4}) {
                const Shape s{R, N, C, S, interleaved, threads};
                auto written = dtype == kFloat32 ? pass<float>(dtype, s, activation, extras, training)
                               : dtype == kBFloat16
                                   ? pass<bfloat16>(dtype, s, activation, extras, training)
                                   : pass<double>(dtype, s, activation, extras, training);
                if (threads == 1) first = written;
                differences += written != first;
                ++passes;
              }
            }
  std::printf("%lld passes, %lld that differ with the number of threads\n",
              static_cast<long long>(passes), static_cast<long long>(differences));
  return differences != 0;
}
