// Convolutions of small images, on the calling thread.
//
// Libraries that are made for hundreds of channels leave most of a vector empty where there are six.
// Here the lanes of a vector are neighbours in an image's row: a `Cell`. Two cells and up to six
// channels are worked on at a time, whose sums stay in registers. Stride and dilation are 1.

#include "kernels.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#ifdef __clang__
#define NORMLAB_UNROLL _Pragma("unroll")
#else
#define NORMLAB_UNROLL _Pragma("GCC unroll 8")
#endif

namespace {

using std::int64_t;

#ifdef __AVX__
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kMostChannels = 6;  // With two cells they fill twelve of sixteen registers.

template <class T>
struct Vector {
  static constexpr int64_t lanes = kVectorBytes / sizeof(T);
  typedef T Type __attribute__((vector_size(kVectorBytes)));
  static Type load(const T* from) {
    Type value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  // The first `count` lanes, and zeros.
  static Type load(const T* from, int64_t count) {
    if (count == lanes) return load(from);
    Type value{};
    std::memcpy(&value, from, sizeof(T) * count);
    return value;
  }
  static void store(Type value, T* to, int64_t count = lanes) {
    if (count == lanes)
      std::memcpy(to, &value, sizeof value);
    else
      std::memcpy(to, &value, sizeof(T) * count);
  }
};

// What a sum over a window goes through: images, a rim of zeros around them, the window.
struct Shape {
  int64_t channels, height, width;
  int64_t rim_height, rim_width;
  int64_t window_height, window_width;

  int64_t out_height() const { return height + 2 * rim_height - window_height + 1; }
  int64_t out_width() const { return width + 2 * rim_width - window_width + 1; }
  int64_t taps() const { return channels * window_height * window_width; }
};

struct Cell {
  int64_t from;   // Its first value in the images with their rim, at the window's first tap.
  int64_t to;     // The same in a channel of the result.
  int64_t width;  // How many lanes count.
  int64_t first_row, last_row;  // Those of the window that meet the image; the others meet zeros.
};

// Some images with their rim, and the cells of what is made of them.
template <class T>
class Padded {
 public:
  const Shape shape;
  const int64_t pitch, plane, size;  // Of a row, a channel, an image, in values.
  std::vector<Cell> cells;           // Of one image.

  Padded(const Shape& shape, int64_t images)
      : shape(shape), pitch(round_up(shape.out_width()) + shape.window_width - 1),
        plane(pitch * (shape.height + 2 * shape.rim_height)), size(plane * shape.channels),
        values_(size * images) {
    for (int64_t row = 0; row < shape.out_height(); ++row)
      for (int64_t column = 0; column < shape.out_width(); column += Vector<T>::lanes)
        cells.push_back({row * pitch + column, row * shape.out_width() + column,
                         std::min(Vector<T>::lanes, shape.out_width() - column),
                         std::max<int64_t>(0, shape.rim_height - row),
                         std::min(shape.window_height, shape.rim_height + shape.height - row)});
  }

  static int64_t round_up(int64_t width) {
    return (width + Vector<T>::lanes - 1) / Vector<T>::lanes * Vector<T>::lanes;
  }

  const T* values() const { return values_.data(); }

  void put(int64_t image, const T* x) {
    T* to = values_.data() + image * size + shape.rim_height * pitch + shape.rim_width;
    for (int64_t channel = 0; channel < shape.channels; ++channel, to += plane)
      for (int64_t row = 0; row < shape.height; ++row, x += shape.width)
        std::memcpy(to + row * pitch, x, sizeof(T) * shape.width);
  }

 private:
  std::vector<T> values_;
};

// Calls `run` with parts of about equal size, none above `kMostChannels`; their size as a constant.
template <class Run>
void in_parts(int64_t channels, Run run) {
  const int64_t parts = (channels + kMostChannels - 1) / kMostChannels;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t start = channels * part / parts;
    switch (channels * (part + 1) / parts - start) {
      case 1: run(start, std::integral_constant<int, 1>{}); break;
      case 2: run(start, std::integral_constant<int, 2>{}); break;
      case 3: run(start, std::integral_constant<int, 3>{}); break;
      case 4: run(start, std::integral_constant<int, 4>{}); break;
      case 5: run(start, std::integral_constant<int, 5>{}); break;
      default: run(start, std::integral_constant<int, 6>{}); break;
    }
  }
}

// `N` channels of two cells. `weights` has the N of each tap together.
template <class T, int N>
void correlate(const Padded<T>& x, const T* weights, const T* bias, const Cell& a, const Cell& b,
               T* y, int64_t y_plane) {
  using V = Vector<T>;
  typename V::Type sums[N][2];
  NORMLAB_UNROLL
  for (int n = 0; n < N; ++n) sums[n][0] = sums[n][1] = (bias ? bias[n] : T(0)) - typename V::Type{};
  const int64_t window = x.shape.window_width;
  const int64_t first = std::min(a.first_row, b.first_row), last = std::max(a.last_row, b.last_row);
  for (int64_t channel = 0; channel < x.shape.channels; ++channel)
    for (int64_t row = first; row < last; ++row) {
      const T* at = x.values() + channel * x.plane + row * x.pitch;
      const T* weight = weights + (channel * x.shape.window_height + row) * window * N;
      for (int64_t column = 0; column < window; ++column, ++at, weight += N) {
        const auto left = V::load(at + a.from), right = V::load(at + b.from);
        NORMLAB_UNROLL
        for (int n = 0; n < N; ++n) {
          sums[n][0] += weight[n] * left;
          sums[n][1] += weight[n] * right;
        }
      }
    }
  NORMLAB_UNROLL
  for (int n = 0; n < N; ++n) {
    V::store(sums[n][0], y + n * y_plane + a.to, a.width);
    V::store(sums[n][1], y + n * y_plane + b.to, b.width);
  }
}

// y[o] = bias[o] + the sum over taps of weight(o, tap) * x, for each of some images.
template <class T, class Weight>
void correlate_all(const Shape& shape, int64_t images, int64_t outputs, const T* x, const T* bias,
                   T* y, Weight weight) {
  Padded<T> padded(shape, 1);
  const int64_t taps = shape.taps(), y_plane = shape.out_height() * shape.out_width();
  const int64_t cells = static_cast<int64_t>(padded.cells.size());
  std::vector<T> weights(outputs * taps);
  in_parts(outputs, [&](int64_t start, auto size) {
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int n = 0; n < size; ++n)
        weights[start * taps + tap * size + n] = weight(start + n, tap);
  });
  for (int64_t image = 0; image < images; ++image) {
    padded.put(0, x + image * shape.channels * shape.height * shape.width);
    T* to = y + image * outputs * y_plane;
    in_parts(outputs, [&](int64_t start, auto size) {
      for (int64_t cell = 0; cell < cells; cell += 2)
        correlate<T, size>(padded, weights.data() + start * taps, bias ? bias + start : nullptr,
                           padded.cells[cell], padded.cells[std::min(cell + 1, cells - 1)],
                           to + start * y_plane, y_plane);
    });
  }
}

// Adds to `sums`, which have a vector for each output and tap, those of N outputs and two taps.
// `grad` has the outputs of each cell together, and zeros in lanes that do not count.
template <class T, int N>
void add_products(const T* x, const std::vector<int64_t>& cells, const T* grad, int64_t grad_step,
                  int64_t tap, int64_t other_tap, T* sums, T* other_sums, int64_t sums_step) {
  using V = Vector<T>;
  typename V::Type products[N][2] = {};
  for (size_t cell = 0; cell < cells.size(); ++cell, grad += grad_step) {
    const auto left = V::load(x + cells[cell] + tap), right = V::load(x + cells[cell] + other_tap);
    NORMLAB_UNROLL
    for (int n = 0; n < N; ++n) {
      const auto g = V::load(grad + n * V::lanes);
      products[n][0] += g * left;
      products[n][1] += g * right;
    }
  }
  NORMLAB_UNROLL
  for (int n = 0; n < N; ++n) {
    T *sum = sums + n * sums_step, *other_sum = other_sums + n * sums_step;
    V::store(V::load(sum) + products[n][0], sum);
    if (other_sum != sum) V::store(V::load(other_sum) + products[n][1], other_sum);
  }
}

template <class T>
T total(const T* vector) {
  T sum = 0;
  for (int64_t lane = 0; lane < Vector<T>::lanes; ++lane) sum += vector[lane];
  return sum;
}

template <class T>
void weight_gradient(const Shape& shape, int64_t images, int64_t outputs, const T* grad, const T* x,
                     T* grad_weight, T* grad_bias) {
  using V = Vector<T>;
  constexpr int64_t lanes = V::lanes;
  const int64_t taps = shape.taps(), out_plane = shape.out_height() * shape.out_width();
  const Padded<T> one(shape, 1);
  // As many images at a time as make some dozens of cells, for sums to stay in registers over.
  const int64_t each = static_cast<int64_t>(one.cells.size());
  const int64_t together = std::min(images, 1 + 63 / each);
  Padded<T> padded(shape, together);
  std::vector<T> gradients(together * each * outputs * lanes);
  std::vector<T> sums(outputs * taps * lanes), bias_sums(outputs * lanes);
  std::vector<int64_t> offsets, cells;
  for (int64_t channel = 0; channel < shape.channels; ++channel)
    for (int64_t row = 0; row < shape.window_height; ++row)
      for (int64_t column = 0; column < shape.window_width; ++column)
        offsets.push_back(channel * padded.plane + row * padded.pitch + column);
  for (int64_t start = 0; start < images; start += together) {
    const int64_t count = std::min(together, images - start);
    cells.clear();
    T* to = gradients.data();
    for (int64_t image = 0; image < count; ++image) {
      padded.put(image, x + (start + image) * shape.channels * shape.height * shape.width);
      const T* from = grad + (start + image) * outputs * out_plane;
      for (const Cell& cell : padded.cells) {
        cells.push_back(image * padded.size + cell.from);
        for (int64_t output = 0; output < outputs; ++output, to += lanes) {
          V::store(V::load(from + output * out_plane + cell.to, cell.width), to);
          T* bias_sum = bias_sums.data() + output * lanes;
          V::store(V::load(bias_sum) + V::load(to), bias_sum);
        }
      }
    }
    in_parts(outputs, [&](int64_t output, auto size) {
      for (int64_t tap = 0; tap < taps; tap += 2) {
        const int64_t other = std::min(tap + 1, taps - 1);
        T* at = sums.data() + (output * taps) * lanes;
        add_products<T, size>(padded.values(), cells, gradients.data() + output * lanes,
                              outputs * lanes, offsets[tap], offsets[other], at + tap * lanes,
                              at + other * lanes, taps * lanes);
      }
    });
  }
  for (int64_t i = 0; i < outputs * taps; ++i) grad_weight[i] = total(sums.data() + i * lanes);
  if (grad_bias)
    for (int64_t i = 0; i < outputs; ++i) grad_bias[i] = total(bias_sums.data() + i * lanes);
}

template <class T>
void convolve(const Convolution& c, const T* x, const T* weight, const T* bias, T* y) {
  const Shape shape{c.in, c.height, c.width, c.rim_height, c.rim_width, c.window_height,
                    c.window_width};
  correlate_all(shape, c.images, c.out, x, bias, y, [&](int64_t output, int64_t tap) {
    return weight[output * shape.taps() + tap];
  });
}

template <class T>
void convolve_backward(const Convolution& c, const T* grad, const T* x, const T* weight, T* grad_x,
                       T* grad_weight, T* grad_bias) {
  const Shape shape{c.in, c.height, c.width, c.rim_height, c.rim_width, c.window_height,
                    c.window_width};
  weight_gradient(shape, c.images, c.out, grad, x, grad_weight, grad_bias);
  if (!grad_x) return;
  // The gradient with a rim of its own, and the window turned by half a turn.
  const Shape turned{c.out, shape.out_height(), shape.out_width(),
                     c.window_height - 1 - c.rim_height, c.window_width - 1 - c.rim_width,
                     c.window_height, c.window_width};
  const int64_t window = c.window_height * c.window_width;
  correlate_all<T>(turned, c.images, c.in, grad, nullptr, grad_x, [&](int64_t input, int64_t tap) {
    const int64_t output = tap / window, place = window - 1 - tap % window;
    return weight[(output * c.in + input) * window + place];
  });
}

}  // namespace

extern "C" {

void NORMLAB_NAME(normlab_convolve)(int wide, const Convolution* c, const void* x,
                                    const void* weight, const void* bias, void* y) {
  auto run = [&](auto type) {
    using T = decltype(type);
    convolve(*c, static_cast<const T*>(x), static_cast<const T*>(weight),
             static_cast<const T*>(bias), static_cast<T*>(y));
  };
  wide ? run(double{}) : run(float{});
}

void NORMLAB_NAME(normlab_convolve_backward)(int wide, const Convolution* c, const void* grad,
                                             const void* x, const void* weight, void* grad_x,
                                             void* grad_weight, void* grad_bias) {
  auto run = [&](auto type) {
    using T = decltype(type);
    convolve_backward(*c, static_cast<const T*>(grad), static_cast<const T*>(x),
                      static_cast<const T*>(weight), static_cast<T*>(grad_x),
                      static_cast<T*>(grad_weight), static_cast<T*>(grad_bias));
  };
  wide ? run(double{}) : run(float{});
}

}  // extern "C"
