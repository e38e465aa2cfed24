// Makes some hundred matrix products, with the sanitizers that scripts/sanitize.py compiles in. Every
// buffer is exactly as large as its matrix.

#include "../src/normlab/kernels/kernels.h"

#include <cstdint>
#include <cstdio>
#include <vector>

namespace {

template <class T>
bool multiply(const Product& p, bool has_bias) {
  const std::vector<T> a(p.m * p.k, 1), b(p.k * p.n, 2), bias(p.n, 3);
  std::vector<T> c(p.m * p.n);
  normlab_product_base(sizeof(T) == sizeof(double), &p, has_bias ? bias.data() : nullptr, a.data(),
                       b.data(), c.data());
  for (const T each : c)
    if (each != 2 * static_cast<T>(p.k) + (has_bias ? 3 : 0)) return false;
  return true;
}

}  // namespace

int main() {
  for (const std::int64_t m : {1, 7, 19, 70})
    for (const std::int64_t n : {1, 10, 16, 67})
      for (const std::int64_t k : {1, 5, 16, 300})
        for (const bool a_turned : {false, true})
          for (const bool b_turned : {false, true})
            for (const bool has_bias : {false, true}) {
              const Product p{m, n, k, a_turned, b_turned};
              if (!multiply<float>(p, has_bias) || !multiply<double>(p, has_bias))
                return std::puts("a product is wrong"), 1;
            }
  return 0;
}
