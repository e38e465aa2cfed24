// Convolutions of small images, on the calling thread.
//
// Libraries that are made for hundreds of channels leave most of a vector empty where there are six.
// Here the lanes of a vector are images: as many as it has are turned, so that they lie side by side,
// and what is made of them is turned back. Sums for some channels at some places stay in registers.
// Fewer images than lanes cost as much as many. Stride and dilation are 1.

#include "vectors.h"

#include <algorithm>
#include <vector>

namespace {

using std::int64_t;

// As many images as a vector has lanes, and a rim of zeros around each.
template <class T>
class Block {
 public:
  static constexpr int64_t lanes = Vector<T>::lanes;
  const int64_t pitch, plane;  // Of a row and of a channel, in vectors.
  const int64_t area;          // Values of a channel without its rim.

  Block(int64_t channels, int64_t height, int64_t width, int64_t rim_height = 0,
        int64_t rim_width = 0)
      : pitch(width + 2 * rim_width), plane(pitch * (height + 2 * rim_height)),
        area(height * width), corner_(rim_height * pitch + rim_width), values_(channels * plane) {
    places_.reserve(channels * area);
    for (int64_t channel = 0; channel < channels; ++channel)
      for (int64_t row = 0; row < height; ++row)
        for (int64_t column = 0; column < width; ++column)
          places_.push_back(corner_ + channel * plane + row * pitch + column);
  }

  // At the corner of the rim, and of the images.
  const Vector<T>* outside() const { return values_.data(); }
  const Vector<T>* inside() const { return values_.data() + corner_; }
  Vector<T>* inside() { return values_.data() + corner_; }

  // `count` images; what they leave free becomes zeros.
  void take(const T* images, int64_t count) {
    const int64_t image = static_cast<int64_t>(places_.size());
    for (int64_t start = 0; start < image; start += lanes) {
      const int64_t some = std::min(lanes, image - start);
      typename Vector<T>::Type rows[lanes];
      read_turned(images + start, image, count, some, rows);
      for (int64_t i = 0; i < some; ++i) values_[places_[start + i]].of = rows[i];
    }
  }

  // The first `channels` of `count` images, which are `image` values apart.
  void give(T* images, int64_t image, int64_t count, int64_t channels) const {
    for (int64_t start = 0; start < channels * area; start += lanes) {
      const int64_t some = std::min(lanes, channels * area - start);
      typename Vector<T>::Type rows[lanes] = {};
      for (int64_t i = 0; i < some; ++i) rows[i] = values_[places_[start + i]].of;
      write_turned(rows, images + start, image, count, some);
    }
  }

 private:
  const int64_t corner_;
  std::vector<int64_t> places_;  // Of an image's values.
  std::vector<Vector<T>> values_;
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

// `N` channels at `M` places side by side. `weights` has the N of each tap together.
template <class T, int N, int M>
void correlate(const Shape& shape, const Block<T>& x, int64_t row, int64_t column,
               const T* weights, const T* bias, Vector<T>* y, int64_t y_plane) {
  typename Vector<T>::Type sums[N][M];
  NORMLAB_UNROLL
  for (int n = 0; n < N; ++n)
    NORMLAB_UNROLL
    for (int m = 0; m < M; ++m) sums[n][m] = (bias ? bias[n] : T(0)) - typename Vector<T>::Type{};
  // Other rows of the window meet zeros.
  const int64_t first = std::max<int64_t>(0, shape.rim_height - row);
  const int64_t last = std::min(shape.window_height, shape.rim_height + shape.height - row);
  for (int64_t channel = 0; channel < shape.channels; ++channel)
    for (int64_t tap = first; tap < last; ++tap) {
      const Vector<T>* at = x.outside() + channel * x.plane + (row + tap) * x.pitch + column;
      const T* weight = weights + (channel * shape.window_height + tap) * shape.window_width * N;
      for (int64_t i = 0; i < shape.window_width; ++i, ++at, weight += N)
        NORMLAB_UNROLL
        for (int n = 0; n < N; ++n)
          NORMLAB_UNROLL
          for (int m = 0; m < M; ++m) sums[n][m] += weight[n] * at[m].of;
    }
  NORMLAB_UNROLL
  for (int n = 0; n < N; ++n)
    NORMLAB_UNROLL
    for (int m = 0; m < M; ++m) y[n * y_plane + m].of = sums[n][m];
}

// The weights of a sum over windows, those of a part's channels together for each tap.
template <class T, class Weight>
std::vector<T> arranged(int64_t outputs, int64_t taps, Weight weight) {
  std::vector<T> weights(outputs * taps);
  in_parts(outputs, [&](int64_t start, auto size) {
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int n = 0; n < size; ++n)
        weights[start * taps + tap * size + n] = weight(start + n, tap);
  });
  return weights;
}

// y[o] = bias[o] + the sum over taps of weight(o, tap) * x, of `count` images; by way of `made`, which
// has room for a part's channels.
template <class T>
void correlate_all(const Shape& shape, const Block<T>& x, int64_t count, int64_t outputs,
                   const std::vector<T>& weights, const T* bias, Block<T>& made, T* y) {
  const int64_t width = shape.out_width();
  in_parts(outputs, [&](int64_t start, auto size) {
    const T *weight = weights.data() + start * shape.taps(), *part = bias ? bias + start : nullptr;
    for (int64_t row = 0; row < shape.out_height(); ++row) {
      Vector<T>* to = made.inside() + row * made.pitch;
      if (width < kTogether)
        for (int64_t at = 0; at < width; ++at)
          correlate<T, size, 1>(shape, x, row, at, weight, part, to + at, made.plane);
      else  // The last places may be made twice.
        for (int64_t next = 0; next < width; next += kTogether) {
          const int64_t at = std::min(next, width - kTogether);
          correlate<T, size, kTogether>(shape, x, row, at, weight, part, to + at, made.plane);
        }
    }
    made.give(y + start * made.area, outputs * made.area, count, size);
  });
}

// Adds to `sums`, which have `taps` for each output, those of N outputs and `count` taps over some rows.
template <class T, int N>
void add_products(const Shape& shape, int64_t first, int64_t last, const Block<T>& grad,
                  int64_t output, const Block<T>& x, const int64_t* offsets, int64_t count,
                  Vector<T>* sums) {
  typename Vector<T>::Type products[N][kTogether] = {};
  const Vector<T>* g = grad.inside() + output * grad.plane + first * grad.pitch;
  const Vector<T>* at[kTogether];
  for (int m = 0; m < kTogether; ++m) at[m] = x.outside() + offsets[m < count ? m : 0];
  for (int64_t row = first; row < last; ++row, g += grad.pitch)
    for (int64_t column = 0; column < shape.out_width(); ++column)
      NORMLAB_UNROLL
      for (int n = 0; n < N; ++n)
        NORMLAB_UNROLL
        for (int m = 0; m < kTogether; ++m)
          products[n][m] += g[n * grad.plane + column].of * at[m][row * x.pitch + column].of;
  NORMLAB_UNROLL
  for (int n = 0; n < N; ++n)
    NORMLAB_UNROLL
    for (int m = 0; m < kTogether; ++m)
      if (m < count) sums[(output + n) * shape.taps() + m].of += products[n][m];
}

template <class T>
Vector<T> plane_total(const Block<T>& block, int64_t channel, int64_t height, int64_t width) {
  Vector<T> sum{};
  const Vector<T>* at = block.inside() + channel * block.plane;
  for (int64_t row = 0; row < height; ++row, at += block.pitch)
    for (int64_t column = 0; column < width; ++column) sum.of += at[column].of;
  return sum;
}

template <class T>
T total(const Vector<T>& vector) {
  T sum = 0;
  for (int64_t lane = 0; lane < Vector<T>::lanes; ++lane) sum += vector.of[lane];
  return sum;
}

Shape shape_of(const Convolution& c) {
  return {c.in, c.height, c.width, c.rim_height, c.rim_width, c.window_height, c.window_width};
}

template <class T>
void convolve(const Convolution& c, const T* x, const T* weight, const T* bias, T* y) {
  const Shape shape = shape_of(c);
  Block<T> from(c.in, c.height, c.width, c.rim_height, c.rim_width);
  Block<T> made(std::min<int64_t>(c.out, kMostRows), shape.out_height(), shape.out_width());
  const auto weights = arranged<T>(c.out, shape.taps(), [&](int64_t output, int64_t tap) {
    return weight[output * shape.taps() + tap];
  });
  for (int64_t start = 0; start < c.images; start += from.lanes) {
    const int64_t count = std::min(from.lanes, c.images - start);
    from.take(x + start * c.in * from.area, count);
    correlate_all(shape, from, count, c.out, weights, bias, made, y + start * c.out * made.area);
  }
}

template <class T>
void convolve_backward(const Convolution& c, const T* grad, const T* x, const T* weight, T* grad_x,
                       T* grad_weight, T* grad_bias) {
  const Shape shape = shape_of(c);
  // For the gradient by x: that of the sums with a rim of its own, the window turned by half a turn.
  const Shape turned{c.out, shape.out_height(), shape.out_width(),
                     c.window_height - 1 - c.rim_height, c.window_width - 1 - c.rim_width,
                     c.window_height, c.window_width};
  const int64_t window = c.window_height * c.window_width, taps = shape.taps();
  const auto weights = arranged<T>(c.in, turned.taps(), [&](int64_t input, int64_t tap) {
    const int64_t output = tap / window, place = window - 1 - tap % window;
    return weight[(output * c.in + input) * window + place];
  });
  Block<T> images(c.in, c.height, c.width, c.rim_height, c.rim_width);
  Block<T> gradients(c.out, turned.height, turned.width, turned.rim_height, turned.rim_width);
  Block<T> made(grad_x ? std::min<int64_t>(c.in, kMostRows) : 0, c.height, c.width);
  std::vector<int64_t> offsets;  // Of taps in the images.
  for (int64_t channel = 0; channel < c.in; ++channel)
    for (int64_t row = 0; row < c.window_height; ++row)
      for (int64_t column = 0; column < c.window_width; ++column)
        offsets.push_back(channel * images.plane + row * images.pitch + column);
  // So many rows are added up, then their sums: fewer errors add up.
  const int64_t band = 1 + 255 / turned.width;
  std::vector<Vector<T>> sums(c.out * taps), bias_sums(c.out);
  for (int64_t start = 0; start < c.images; start += images.lanes) {
    const int64_t count = std::min(images.lanes, c.images - start);
    images.take(x + start * c.in * images.area, count);
    gradients.take(grad + start * c.out * gradients.area, count);
    in_parts(c.out, [&](int64_t output, auto size) {
      for (int64_t tap = 0; tap < taps; tap += kTogether)
        for (int64_t row = 0; row < turned.height; row += band)
          add_products<T, size>(shape, row, std::min(row + band, turned.height), gradients, output,
                                images, offsets.data() + tap, taps - tap, sums.data() + tap);
    });
    for (int64_t i = 0; i < c.out; ++i)
      bias_sums[i].of += plane_total(gradients, i, turned.height, turned.width).of;
    if (grad_x)
      correlate_all<T>(turned, gradients, count, c.in, weights, nullptr, made,
                       grad_x + start * c.in * images.area);
  }
  for (int64_t i = 0; i < c.out * taps; ++i) grad_weight[i] = total(sums[i]);
  if (grad_bias)
    for (int64_t i = 0; i < c.out; ++i) grad_bias[i] = total(bias_sums[i]);
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
