// Training steps of small networks: a list of instructions, run again and again.
//
// Where a layer has some thousand values, a step costs more in getting from one operation to the
// next than in the operations. Here they stand in a list, with the places of what they read and
// write in a table of pointers, and a span of steps is one call. All is done on the calling thread.

#include "group_norm.h"
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

using std::int64_t;

// In the order of `OPERATIONS` in training/steps.py; training/lowering says what each reads and
// writes.
enum class Operation : int64_t {
  kGather, kLabels, kProduct, kColumnSums,
  kConvolution, kConvolutionBackward, kPool, kPoolBackward,
  kBatchNorm, kBatchNormBackward, kGroupNorm, kGroupNormBackward,
  kReLU, kReLUBackward, kLeakyReLU, kLeakyReLUBackward, kSigmoid, kSigmoidBackward,
  kTanh, kTanhBackward, kSiLU, kSiLUBackward, kMultiply, kAdd,
  kLogSoftmax, kLogSoftmaxBackward, kNLL, kNLLBackward,
  kArgmax, kEqual, kCountEqual, kCount, kNarrow, kScale, kLerp, kCopy,
};

struct Instruction {
  Operation operation;
  int64_t operands[8];  // Places in the table of pointers; a negative one stands for nothing.
  int64_t sizes[9];
  double numbers[3];
};

// A pointer that moves on with every step.
struct Feed {
  int64_t place;
  int64_t bytes;
};

struct Update {
  int64_t adam;  // Otherwise SGD.
  double lr, momentum, beta1, beta2, eps, weight_decay;
  int64_t count;         // Of parameters.
  const int64_t* sizes;  // Values in each.
  const int64_t* gradients;  // Their places.
  void* const* parameters;
  void* const* first;   // Velocities, or means of gradients; null for SGD without momentum.
  void* const* second;  // Means of squared gradients.
  float* step;          // How many were taken.
};

template <class T>
constexpr int dtype_of() { return sizeof(T) == sizeof(double) ? kFloat64 : kFloat32; }

template <class T>
inline T logistic(T z) { return T(1) / (T(1) + exponential(-z)); }

inline double hyperbolic_tangent(double x) { return std::tanh(x); }
// In a form that can be vectorized. Near zero, where the exponentials' digits cancel, a series.
inline float hyperbolic_tangent(float x) {
  const float size = x < 0 ? -x : x, square = x * x;
  const float far = 1.0f - 2.0f / (exponential(2.0f * size) + 1.0f);
  const float near = x + x * square * (-1.0f / 3 + square * (2.0f / 15 - square * (17.0f / 315)));
  return size < 0.2f ? near : x < 0 ? -far : far;
}

template <class T, class Each>
inline void map(int64_t count, const T* __restrict a, T* __restrict out, Each each) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = each(a[i]);
}

template <class T, class Each>
inline void map(int64_t count, const T* __restrict a, const T* __restrict b, T* __restrict out,
                Each each) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = each(a[i], b[i]);
}

// Rows of `images`, scaled. In float, whatever T: so are the data for every other engine.
template <class T>
void gather(int64_t batch, int64_t pixels, const std::uint8_t* images, const int64_t* indices,
            float factor, float offset, T* out) {
  for (int64_t n = 0; n < batch; ++n) {
    const std::uint8_t* __restrict image = images + indices[n] * pixels;
    T* __restrict row = out + n * pixels;
#pragma omp simd
    for (int64_t i = 0; i < pixels; ++i) row[i] = T(float(image[i]) * factor + offset);
  }
}

template <class T>
void column_sums(int64_t rows, int64_t columns, const T* x, T* __restrict out) {
  std::fill_n(out, columns, T(0));
  for (int64_t row = 0; row < rows; ++row) {
    const T* __restrict at = x + row * columns;
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) out[i] += at[i];
  }
}

template <class T>
void log_softmax(int64_t rows, int64_t columns, const T* x, T* y) {
  for (int64_t row = 0; row < rows; ++row, x += columns, y += columns) {
    T largest = x[0], sum = 0;
    for (int64_t i = 1; i < columns; ++i) largest = x[i] > largest ? x[i] : largest;
    for (int64_t i = 0; i < columns; ++i) sum += exponential(x[i] - largest);
    const T shift = largest + std::log(sum);
    for (int64_t i = 0; i < columns; ++i) y[i] = x[i] - shift;
  }
}

template <class T>
void log_softmax_backward(int64_t rows, int64_t columns, const T* grad, const T* y, T* grad_x) {
  for (int64_t row = 0; row < rows; ++row, grad += columns, y += columns, grad_x += columns) {
    T sum = 0;
    for (int64_t i = 0; i < columns; ++i) sum += grad[i];
    for (int64_t i = 0; i < columns; ++i) grad_x[i] = grad[i] - exponential(y[i]) * sum;
  }
}

// The place of each row's largest value: of several the first, or the first that is no number.
template <class T>
void argmax(int64_t rows, int64_t columns, const T* x, int64_t* out) {
  for (int64_t row = 0; row < rows; ++row, x += columns) {
    int64_t largest = 0;
    for (int64_t i = 1; i < columns; ++i)
      if (x[i] > x[largest] || (x[i] != x[i] && x[largest] == x[largest])) largest = i;
    out[row] = largest;
  }
}

template <class T>
void run(const Instruction& at, void* const* table) {
  const int64_t* size = at.sizes;
  const double* number = at.numbers;
  auto bytes = [&](int i) { return at.operands[i] < 0 ? nullptr : table[at.operands[i]]; };
  auto value = [&](int i) { return static_cast<T*>(bytes(i)); };
  auto index = [&](int i) { return static_cast<int64_t*>(bytes(i)); };
  auto wide = [&](int i) { return static_cast<double*>(bytes(i)); };
  const int activation = static_cast<int>(size[3]);  // Of a batch norm.
  const int apart = size[2] == 1;                    // Its channels are the last axis.
  const int is_wide = sizeof(T) == sizeof(double);
  auto convolution = [&] {
    return Convolution{size[0], size[1], size[2], size[3], size[4],
                       size[5], size[6], size[7], size[8]};
  };
  auto pooling = [&] { return Pooling{size[0], size[1], size[2], size[3], size[4], size[5]}; };
  using O = Operation;
  switch (at.operation) {
    case O::kGather:
      return gather(size[0], size[1], static_cast<const std::uint8_t*>(bytes(0)), index(1),
                    static_cast<float>(number[0]), static_cast<float>(number[1]), value(2));
    case O::kLabels:
      for (int64_t n = 0; n < size[0]; ++n) index(2)[n] = index(0)[index(1)[n]];
      return;
    case O::kProduct: {
      const Product p{size[0], size[1], size[2], size[3], size[4]};
      return NORMLAB_NAME(normlab_product)(is_wide, &p, bytes(0), bytes(1), bytes(2), bytes(3));
    }
    case O::kColumnSums:
      return column_sums(size[0], size[1], value(0), value(1));
    case O::kConvolution: {
      const Convolution c = convolution();
      return NORMLAB_NAME(normlab_convolve)(is_wide, &c, bytes(0), bytes(1), bytes(2), bytes(3));
    }
    case O::kConvolutionBackward: {
      const Convolution c = convolution();
      return NORMLAB_NAME(normlab_convolve_backward)(is_wide, &c, bytes(0), bytes(1), bytes(2),
                                                     bytes(3), bytes(4), bytes(5));
    }
    case O::kPool: {
      const Pooling p = pooling();
      return NORMLAB_NAME(normlab_pool)(is_wide, &p, bytes(0), bytes(1));
    }
    case O::kPoolBackward: {
      const Pooling p = pooling();
      return NORMLAB_NAME(normlab_pool_backward)(is_wide, &p, bytes(0), bytes(1), bytes(2));
    }
    case O::kBatchNorm:
      return NORMLAB_NAME(normlab_forward)(
          dtype_of<T>(), apart, 1, size[0], size[1], size[2], bytes(0), nullptr, bytes(1), bytes(2), bytes(3),
          bytes(4), number[0], number[1], activation, number[2], 1, bytes(5), wide(6), 1);
    case O::kBatchNormBackward:
      return NORMLAB_NAME(normlab_backward)(
          dtype_of<T>(), apart, 1, size[0], size[1], size[2], bytes(0), bytes(1), nullptr, bytes(2), bytes(3),
          wide(4), number[1], activation, number[2], 1, bytes(5), nullptr, bytes(6), bytes(7), 1);
    case O::kGroupNorm:
      return group_norm(size[0], size[1], size[2], size[3], number[1], value(0), value(1), value(2),
                        value(3), value(4));
    case O::kGroupNormBackward:
      return group_norm_backward(size[0], size[1], size[2], size[3], value(0), value(1), value(2),
                                 value(3), value(4), value(5), value(6));
    case O::kReLU:
      return map(size[0], value(0), value(1), [](T x) { return x < 0 ? T(0) : x; });
    case O::kReLUBackward:
      return map(size[0], value(0), value(1), value(2),
                 [](T grad, T y) { return y <= 0 ? T(0) : grad; });
    case O::kLeakyReLU:
      return map(size[0], value(0), value(1),
                 [slope = T(number[0])](T x) { return x > 0 ? x : x * slope; });
    case O::kLeakyReLUBackward:
      return map(size[0], value(0), value(1), value(2),
                 [slope = T(number[0])](T grad, T x) { return x > 0 ? grad : grad * slope; });
    case O::kSigmoid:
      return map(size[0], value(0), value(1), [](T x) { return logistic(x); });
    case O::kSigmoidBackward:
      return map(size[0], value(0), value(1), value(2),
                 [](T grad, T y) { return grad * (T(1) - y) * y; });
    case O::kTanh:
      return map(size[0], value(0), value(1), [](T x) { return hyperbolic_tangent(x); });
    case O::kTanhBackward:
      return map(size[0], value(0), value(1), value(2),
                 [](T grad, T y) { return grad * (T(1) - y * y); });
    case O::kSiLU:
      return map(size[0], value(0), value(1), [](T x) { return x * logistic(x); });
    case O::kSiLUBackward:
      return map(size[0], value(0), value(1), value(2), [](T grad, T x) {
        const T y = logistic(x);
        return grad * y * (T(1) + x * (T(1) - y));
      });
    case O::kMultiply:
      return map(size[0], value(0), value(1), value(2), [](T a, T b) { return a * b; });
    case O::kAdd:
      return map(size[0], value(0), value(1), value(2), [](T a, T b) { return a + b; });
    case O::kLogSoftmax:
      return log_softmax(size[0], size[1], value(0), value(1));
    case O::kLogSoftmaxBackward:
      return log_softmax_backward(size[0], size[1], value(0), value(1), value(2));
    case O::kNLL: {
      T total = 0;
      for (int64_t n = 0; n < size[0]; ++n) total -= value(0)[n * size[1] + index(1)[n]];
      *value(2) = total / T(size[0]);
      return;
    }
    case O::kNLLBackward:
      std::fill_n(value(2), size[0] * size[1], T(0));
      for (int64_t n = 0; n < size[0]; ++n)
        value(2)[n * size[1] + index(1)[n]] = -*value(0) / T(size[0]);
      return;
    case O::kArgmax:
      return argmax(size[0], size[1], value(0), index(1));
    case O::kEqual:
      for (int64_t i = 0; i < size[0]; ++i)
        static_cast<bool*>(bytes(2))[i] = index(0)[i] == index(1)[i];
      return;
    case O::kCountEqual:
      *index(1) = std::count(static_cast<bool*>(bytes(0)), static_cast<bool*>(bytes(0)) + size[0],
                             true);
      return;
    case O::kCount:
      *index(0) += 1;
      return;
    case O::kNarrow:
      for (int64_t i = 0; i < size[0]; ++i) value(1)[i] = static_cast<T>(wide(0)[i]);
      return;
    case O::kScale:
      for (int64_t i = 0; i < size[0]; ++i) wide(1)[i] = wide(0)[i] * number[0];
      return;
    case O::kLerp:
      return map(size[0], value(0), value(1), value(2),
                 [weight = T(number[0])](T a, T b) { return a + weight * (b - a); });
    case O::kCopy:
      std::memcpy(bytes(1), bytes(0), sizeof(T) * size[0]);
      return;
  }
}

template <class T>
void move_by_sgd(const Update& by, int64_t count, T* __restrict p, const T* __restrict grad,
                 T* __restrict velocity) {
  const T lr = T(by.lr), momentum = T(by.momentum), decay = T(by.weight_decay);
  if (velocity) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      velocity[i] = momentum * velocity[i] + (grad[i] + decay * p[i]);
      p[i] -= lr * velocity[i];
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) p[i] -= lr * (grad[i] + decay * p[i]);
  }
}

template <class T>
void move_by_adam(const Update& by, int64_t count, T* __restrict p, const T* __restrict grad,
                  T* __restrict mean, T* __restrict square) {
  const double steps = *by.step;
  const T step = T(by.lr / (1 - std::pow(by.beta1, steps)));
  const T correction = T(std::sqrt(1 - std::pow(by.beta2, steps)));
  const T decay = T(by.weight_decay), eps = T(by.eps), kept = T(by.beta2);
  const T share = T(1 - by.beta1), squares_share = T(1 - by.beta2);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const T g = grad[i] + decay * p[i];
    mean[i] += share * (g - mean[i]);
    square[i] = kept * square[i] + squares_share * g * g;
    p[i] -= step * mean[i] / (std::sqrt(square[i]) / correction + eps);
  }
}

template <class T>
void move(const Update& by, void* const* table) {
  *by.step += 1;
  for (int64_t i = 0; i < by.count; ++i) {
    T* p = static_cast<T*>(by.parameters[i]);
    const T* grad = static_cast<const T*>(table[by.gradients[i]]);
    T* first = by.first ? static_cast<T*>(by.first[i]) : nullptr;
    if (by.adam)
      move_by_adam(by, by.sizes[i], p, grad, first, static_cast<T*>(by.second[i]));
    else
      move_by_sgd(by, by.sizes[i], p, grad, first);
  }
}

template <class T>
void take(const Instruction* program, int64_t count, void** table, const Feed* feeds, int64_t fed,
          int64_t steps, int64_t loss, int64_t hits, const Update* update, double* losses,
          int64_t* all_hits) {
  for (int64_t step = 0; step < steps; ++step) {
    for (int64_t i = 0; i < count; ++i) run<T>(program[i], table);
    *losses += *static_cast<const T*>(table[loss]);
    *all_hits += *static_cast<const int64_t*>(table[hits]);
    if (update) move<T>(*update, table);
    for (int64_t i = 0; i < fed; ++i)
      table[feeds[i].place] = static_cast<char*>(table[feeds[i].place]) + feeds[i].bytes;
  }
}

}  // namespace

extern "C" {

// The rows of `images` that `indices` names, scaled.
void NORMLAB_NAME(normlab_gather)(int64_t count, int64_t pixels, const std::uint8_t* images,
                                  const int64_t* indices, double factor, double offset,
                                  float* out) {
  gather(count, pixels, images, indices, static_cast<float>(factor), static_cast<float>(offset),
         out);
}

// Takes steps; adds up their losses and how many samples they got right. `loss` and `hits` are the
// places of one step's. Without an update the parameters stay.
void NORMLAB_NAME(normlab_take_steps)(const Instruction* program, int64_t count, void** table,
                                      const Feed* feeds, int64_t fed, int64_t steps, int64_t loss,
                                      int64_t hits, const Update* update, int wide, double* losses,
                                      int64_t* all_hits) {
  (wide ? take<double> : take<float>)(program, count, table, feeds, fed, steps, loss, hits, update,
                                      losses, all_hits);
}

}  // extern "C"
