// Batch normalization of tensors in main memory, forward and backward, with what follows it.
//
// y = act((x - mean) * rstd * weight + bias + residual), channel by channel. A tensor is read as
// (R, N, C, S): R replicas with statistics of their own, N samples, C channels, S positions; it lies
// in memory in that order ("planar") or with the channels last, (R, N, S, C) ("interleaved").
//
// Memory is what takes time here, so every pass does all that can be done while a value is at hand,
// and nothing between normalization and activation is stored: the backward pass computes it again.
//
// Sums: values are taken relative to a shift close to the mean, summed in blocks of about kHeld in the
// arithmetic type, and the blocks in double. If the shift turns out to be far from the mean,
// more than a standard deviation, the sums are taken again around the mean. So no digits cancel.
// How the work is cut into chunks depends on the shape alone, and chunks are added up in order: the
// number of threads does not change a bit of the result.

#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

#define NORMLAB_NOINLINE __attribute__((noinline))  // One copy each keeps the build short.

namespace {

using std::int64_t;

#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif
constexpr int64_t kTile = 512;         // Values of a run that are taken at a time.
constexpr int64_t kHeld = 1024;        // Values that are summed in the arithmetic type.
constexpr int64_t kChannels = 64;      // Channels whose sums are finished together.
constexpr int64_t kAhead = 4096;       // Bytes ahead of what is read that rows are fetched at.
constexpr int64_t kRun = 1 << 12;     // Values that lie together when a task reads them.
constexpr int64_t kRows = 64;          // The same, of rows.
constexpr int64_t kChunk = 1 << 14;    // Values that are worth a task of their own.
constexpr int64_t kMaxChunks = 64;     // Tasks a channel, or a replica, is cut into at most.
constexpr int64_t kThreadWork = 1 << 15;  // Values below which a second thread costs more.
constexpr int64_t kShortRun = 64;      // Planar runs shorter than this are read as rows.
constexpr int64_t kWidth = 256;        // Interleaved rows shorter than this are taken several at once.

struct bfloat16 {
  std::uint16_t bits;
};

template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};
template <class T>
using arithmetic = typename Arithmetic<T>::type;

inline double widen(double value) { return value; }
inline float widen(float value) { return value; }
inline float widen(bfloat16 value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline void narrow(double value, double& out) { out = value; }
inline void narrow(float value, float& out) { out = value; }
inline void narrow(float value, bfloat16& out) {  // To nearest, ties to even; NaN stays NaN.
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  out.bits = static_cast<std::uint16_t>(nan ? (bits >> 16) | 0x40 : rounded);
}

// What follows the normalization, and its derivative. NaN passes through, as in torch. A residual can
// be added before those whose derivative shows in their output.
struct Identity {
  static constexpr bool follows_addition = true;
  template <class A>
  A value(A z) const { return z; }
  template <class A>
  A times_slope(A z, A grad) const { return (void)z, grad; }
};
struct ReLU {
  static constexpr bool follows_addition = true;
  template <class A>
  A value(A z) const { return z < 0 ? A(0) : z; }
  template <class A>
  A times_slope(A z, A grad) const { return z <= 0 ? A(0) : grad; }
};
struct LeakyReLU {
  static constexpr bool follows_addition = false;
  double negative_slope;
  template <class A>
  A value(A z) const { return z > 0 ? z : z * A(negative_slope); }
  template <class A>
  A times_slope(A z, A grad) const { return z > 0 ? grad : grad * A(negative_slope); }
};
template <class A>
inline A logistic(A z) { return A(1) / (A(1) + exponential(-z)); }
struct Sigmoid {
  static constexpr bool follows_addition = false;
  template <class A>
  A value(A z) const { return logistic(z); }
  template <class A>
  A times_slope(A z, A grad) const {
    const A y = logistic(z);
    return grad * y * (A(1) - y);
  }
};
struct SiLU {
  static constexpr bool follows_addition = false;
  template <class A>
  A value(A z) const { return z * logistic(z); }
  template <class A>
  A times_slope(A z, A grad) const {
    const A y = logistic(z);
    return grad * (y + z * y * (A(1) - y));
  }
};

struct Shape {
  int64_t R, N, C, S;
  bool interleaved;
  int threads;

  // Short runs are better read as rows of all channels, each channel S columns wide.
  bool by_rows() const { return interleaved || S < kShortRun; }
  int64_t channels() const { return R * C; }
  int64_t count() const { return N * S; }  // Values of a channel.
  int workers() const {
    return static_cast<int>(std::max<int64_t>(
        1, std::min<int64_t>(threads, channels() * count() / kThreadWork)));
  }
};

// Ask for memory ahead of its use. Processors do so by themselves, but not across pages, nor while a
// load waits for the sign of another.
template <class T>
inline void fetch(const T* from, int64_t n) {
  const char* bytes = reinterpret_cast<const char*>(from);
  for (int64_t i = 0; i < n * static_cast<int64_t>(sizeof(T)); i += 64)
    __builtin_prefetch(bytes + i);
}

// The same of what lies behind what is read now, whether or not it still belongs to the tensor.
template <class T>
inline void fetch_ahead(const T* from, int64_t n) {
  fetch(reinterpret_cast<const T*>(reinterpret_cast<std::uintptr_t>(from) + kAhead), n);
}

// Memory that begins where a vector register may: a load across two lines of the cache is two.
template <class T>
struct Aligned {
  using value_type = T;
  Aligned() = default;
  template <class U>
  Aligned(const Aligned<U>&) {}
  T* allocate(std::size_t n) {
    return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64)));
  }
  void deallocate(T* p, std::size_t) { ::operator delete(p, std::align_val_t(64)); }
  friend bool operator==(const Aligned&, const Aligned&) { return true; }
  friend bool operator!=(const Aligned&, const Aligned&) { return false; }
};
template <class T>
using aligned_vector = std::vector<T, Aligned<T>>;

// Two sums of a channel: of (x - shift) and its square, or of the gradient and its product with x.
struct Sums {
  double first = 0, second = 0;
  void operator+=(const Sums& other) {
    first += other.first;
    second += other.second;
  }
};

// The same while they grow, from run to run. Its lanes do not wait for one another.
template <class A>
class Growing {
 public:
  // Add a[i], and a[i] * b[i]. Both have room for a vector beyond n, which is set to zero.
  void add(A* a, A* b, int64_t n) {
    const Vector zero = {};
    std::memcpy(a + n, &zero, sizeof zero);
    std::memcpy(b + n, &zero, sizeof zero);
    Vector first = first_, other_first = other_first_, second = second_, other = other_second_;
    int64_t i = 0;
    for (; i + kLanes < n; i += 2 * kLanes) {
      take(a + i, b + i, first, second);
      take(a + i + kLanes, b + i + kLanes, other_first, other);
    }
    if (i < n) take(a + i, b + i, first, second);
    first_ = first, other_first_ = other_first, second_ = second, other_second_ = other;
    held_ += n;
    if (held_ >= kHeld) empty();
  }

  // Return the sums, and begin anew.
  Sums take() {
    empty();
    const Sums sums = sums_;
    sums_ = {};
    return sums;
  }

  static constexpr int64_t kLanes = kVectorBytes / sizeof(A);

 private:
  typedef A Vector __attribute__((vector_size(kVectorBytes)));
  Vector first_ = {}, other_first_ = {}, second_ = {}, other_second_ = {};
  int64_t held_ = 0;
  Sums sums_;

  static void take(const A* a, const A* b, Vector& first, Vector& second) {
    Vector v, w;
    std::memcpy(&v, a, sizeof v);
    std::memcpy(&w, b, sizeof w);
    first += v;
    second += v * w;
  }
  void empty() {
    const Vector first = first_ + other_first_, second = second_ + other_second_;
    for (int64_t i = 0; i < kLanes; ++i) sums_ += {first[i], second[i]};
    first_ = other_first_ = second_ = other_second_ = Vector{};
    held_ = 0;
  }
};

// The affine map of a channel, z = (x - shift) * scale + offset, where shift is the mean as far as
// the arithmetic type holds it, and the rest of the mean is in the offset.
template <class A>
struct Affine {
  A shift, scale, offset;
  Affine() = default;
  Affine(double mean, double rstd, double weight, double bias)
      : shift(static_cast<A>(mean)),
        scale(static_cast<A>(rstd * weight)),
        offset(static_cast<A>(bias - (mean - static_cast<double>(shift)) * rstd * weight)) {}
  A operator()(A x) const { return (x - shift) * scale + offset; }
};

// ---------------------------------------------------------------- what the two passes work on

template <class T, class Act>
struct Forward {
  using A = arithmetic<T>;
  Shape shape;
  Act act;
  const T *x, *residual;
  const A *weight, *bias;
  A *running_mean, *running_var;
  double momentum, eps;
  bool training;
  T* y;
  double *mean, *var;

  // Turn sums around a shift into statistics. False if the shift was too far from the mean.
  bool finish(int64_t c, double shift, Sums sums) const {
    const double n = static_cast<double>(shape.count());
    const double offset = sums.first / n;
    const double spread = sums.second / n - offset * offset;
    mean[c] = shift + offset;
    var[c] = std::max(spread, 0.0);
    if (std::isnan(spread)) var[c] = spread;  // max would have hidden it.
    return !(offset * offset > spread);
  }

  // Move the running statistics toward the batch's, or take their place; return the map.
  Affine<A> affine(int64_t c) const {
    if (training) {
      const double n = static_cast<double>(shape.count());
      if (running_mean) move(running_mean[c], mean[c]);
      if (running_var) move(running_var[c], var[c] * (n / (n - 1)));
    } else {
      mean[c] = running_mean[c];
      var[c] = running_var[c];
    }
    return {mean[c], 1 / std::sqrt(var[c] + eps), weight ? weight[c] : 1.0, bias ? bias[c] : 0.0};
  }
  void move(A& running, double batch) const {
    running = static_cast<A>(running + momentum * (batch - running));
  }
};

template <class T, class Act>
struct Backward {
  using A = arithmetic<T>;
  Shape shape;
  Act act;
  const T *grad, *x, *y;  // y only after an addition: its sign is that of the sum.
  const A *weight, *bias;
  const double *mean, *var;
  double eps;
  bool training;
  T *grad_x, *grad_residual;
  A *grad_weight, *grad_bias;

  bool summing() const { return training || grad_weight || grad_bias; }
  double rstd(int64_t c) const { return 1 / std::sqrt(var[c] + eps); }
  Affine<A> affine(int64_t c) const {
    return {mean[c], rstd(c), weight ? weight[c] : 1.0, bias ? bias[c] : 0.0};
  }

  // grad_x = grad_z * scale + (x - shift) * slope + constant
  struct Map {
    A slope, constant;
  };
  Map finish(int64_t c, Sums sums) const {  // Sums of grad_z and of grad_z * (x - shift).
    const double n = static_cast<double>(shape.count()), r = rstd(c);
    const double rest = mean[c] - static_cast<double>(static_cast<A>(mean[c]));
    const double product = (sums.second - rest * sums.first) * r;  // Of grad_z and normalized x.
    if (grad_weight) grad_weight[c] = static_cast<A>(product);
    if (grad_bias) grad_bias[c] = static_cast<A>(sums.first);
    if (!training) return {0, 0};
    const double scale = r * (weight ? weight[c] : 1.0);
    const double slope = -scale * r * product / n;
    return {static_cast<A>(slope), static_cast<A>(-scale * sums.first / n - rest * slope)};
  }
};

// --------------------------------------------------------------------------- planar

// Offset of the first value of a channel; its runs of S values lie C * S apart.
inline int64_t planar_start(const Shape& s, int64_t channel) {
  return (channel / s.C * s.N * s.C + channel % s.C) * s.S;
}

// Add a run to the sums of its channel, and ask for the channel's next one.
template <class T>
NORMLAB_NOINLINE void sum_run(const T* __restrict x, const T* next, int64_t n, arithmetic<T> shift,
                              Growing<arithmetic<T>>& sums) {
  using A = arithmetic<T>;
  alignas(64) A offsets[kTile + Growing<A>::kLanes];
  for (int64_t start = 0; start < n; start += kTile) {
    const int64_t m = std::min(n - start, kTile);
    fetch(next + start, m);
#pragma omp simd
    for (int64_t i = 0; i < m; ++i) offsets[i] = widen(x[start + i]) - shift;
    sums.add(offsets, offsets, m);
  }
}

template <class T, class Act>
NORMLAB_NOINLINE void apply_run(const Forward<T, Act>& p, Affine<arithmetic<T>> map, int64_t start) {
  using A = arithmetic<T>;
  const T* __restrict x = p.x + start;
  T* __restrict y = p.y + start;
  const int64_t n = p.shape.S;
  if (Act::follows_addition && p.residual) {
    const T* __restrict residual = p.residual + start;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      narrow(p.act.value(A(map(widen(x[i])) + widen(residual[i]))), y[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) narrow(p.act.value(map(widen(x[i]))), y[i]);
  }
}

template <class T, class Act>
NORMLAB_NOINLINE void sum_run(const Backward<T, Act>& p, Affine<arithmetic<T>> map, int64_t offset,
                              int64_t next, Growing<arithmetic<T>>& sums) {
  using A = arithmetic<T>;
  alignas(64) A offsets[kTile + Growing<A>::kLanes], grads[kTile + Growing<A>::kLanes];
  for (int64_t start = 0; start < p.shape.S; start += kTile) {
    const int64_t m = std::min(p.shape.S - start, kTile);
    const T* __restrict x = p.x + offset + start;
    const T* __restrict grad = p.grad + offset + start;
    fetch(p.x + next + start, m);
    fetch(p.grad + next + start, m);
    if (Act::follows_addition && p.y) {
      const T* __restrict y = p.y + offset + start;
      fetch(p.y + next + start, m);
#pragma omp simd
      for (int64_t i = 0; i < m; ++i) {
        offsets[i] = widen(x[i]) - map.shift;
        grads[i] = p.act.times_slope(A(widen(y[i])), A(widen(grad[i])));
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < m; ++i) {
        offsets[i] = widen(x[i]) - map.shift;
        grads[i] =
            p.act.times_slope(A(offsets[i] * map.scale + map.offset), A(widen(grad[i])));
      }
    }
    sums.add(grads, offsets, m);
  }
}

template <class T, class Act>
NORMLAB_NOINLINE void apply_run(const Backward<T, Act>& p, Affine<arithmetic<T>> map,
               typename Backward<T, Act>::Map back, int64_t start) {
  using A = arithmetic<T>;
  const T* __restrict x = p.x + start;
  const T* __restrict grad = p.grad + start;
  T* __restrict grad_x = p.grad_x + start;
  const int64_t n = p.shape.S;
  if (Act::follows_addition && p.y) {
    const T* __restrict y = p.y + start;
    T* __restrict grad_residual = p.grad_residual + start;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const A g = p.act.times_slope(A(widen(y[i])), A(widen(grad[i])));
      narrow(g, grad_residual[i]);
      narrow(A(g * map.scale + ((widen(x[i]) - map.shift) * back.slope + back.constant)), grad_x[i]);
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const A wide = widen(x[i]);
      const A g = p.act.times_slope(map(wide), A(widen(grad[i])));
      narrow(A(g * map.scale + ((wide - map.shift) * back.slope + back.constant)), grad_x[i]);
    }
  }
}

// A channel's samples are cut into so many chunks, whose sums are added up in order.
inline int64_t planar_chunks(const Shape& s) {
  return std::max<int64_t>(1, std::min({s.N, kMaxChunks, s.count() / kChunk}));
}

// Neighbouring channels that one task takes together. A run much shorter than a page of memory is
// hardly begun when it ends, and the next lies far away.
inline int64_t planar_block(const Shape& s) {
  return std::max<int64_t>(1, std::min(s.C, kRun / std::max<int64_t>(s.S, 1)));
}

// Walk over all channels: sum the runs of a channel, finish it, apply to its runs. With work enough
// for every thread, a thread takes a block of channels through all three while it is in the cache,
// and comes back over it in reverse, from what it saw last. Otherwise threads share out the chunks.
// Where nothing is summed they go through memory as it lies. `sum(c, n, next, sums)` also asks for
// the next sample.
template <class A, class Sum, class Finish, class Apply>
void walk_planar(const Shape& s, bool summing, Sum sum, Finish finish, Apply apply) {
  const int64_t channels = s.channels(), chunks = planar_chunks(s), block = planar_block(s);
  const int64_t blocks = (channels + block - 1) / block;
  const int workers = s.workers();
  std::vector<Sums> partial(summing ? channels * chunks : 0);
  auto sum_chunk = [&](int64_t begin, int64_t end, int64_t k, std::vector<Growing<A>>& growing) {
    const int64_t stop = s.N * (k + 1) / chunks;
    for (int64_t n = s.N * k / chunks; n < stop; ++n)
      for (int64_t c = begin; c < end; ++c) sum(c, n, std::min(n + 1, s.N - 1), growing[c - begin]);
    for (int64_t c = begin; c < end; ++c) partial[c * chunks + k] = growing[c - begin].take();
  };
  auto finish_channel = [&](int64_t c) {
    Sums total;
    for (int64_t k = 0; k < chunks; ++k) total += partial[c * chunks + k];
    finish(c, total);
  };
  auto apply_chunk = [&](int64_t begin, int64_t end, int64_t k) {
    for (int64_t n = s.N * (k + 1) / chunks - 1; n >= s.N * k / chunks; --n)
      for (int64_t c = begin; c < end; ++c) apply(c, n);
  };
#pragma omp parallel num_threads(workers)
  {
    if (!summing) {
#pragma omp for schedule(static)
      for (int64_t c = 0; c < channels; ++c) finish(c, Sums{});
#pragma omp for schedule(static)
      for (int64_t i = 0; i < channels * s.N; ++i) {
        const int64_t sample = i / s.C, r = sample / s.N;
        apply(r * s.C + i % s.C, sample % s.N);
      }
    } else if (blocks >= workers) {
      std::vector<Growing<A>> growing(block);
#pragma omp for schedule(static)
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t begin = b * block, end = std::min(channels, begin + block);
        for (int64_t k = 0; k < chunks; ++k) sum_chunk(begin, end, k, growing);
        for (int64_t c = begin; c < end; ++c) finish_channel(c);
        for (int64_t k = chunks - 1; k >= 0; --k) apply_chunk(begin, end, k);
      }
    } else {
      std::vector<Growing<A>> growing(1);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < channels * chunks; ++i)
        sum_chunk(i / chunks, i / chunks + 1, i % chunks, growing);
#pragma omp for schedule(static)
      for (int64_t c = 0; c < channels; ++c) finish_channel(c);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < channels * chunks; ++i)
        apply_chunk(i / chunks, i / chunks + 1, i % chunks);
    }
  }
}

template <class T, class Act>
void forward_planar(const Forward<T, Act>& p) {
  using A = arithmetic<T>;
  const Shape& s = p.shape;
  const int64_t stride = s.C * s.S;
  std::vector<Affine<A>> maps(s.channels());
  std::vector<A> shifts(s.channels());
  auto start = [&](int64_t c, int64_t n) { return planar_start(s, c) + n * stride; };
  // The mean of some values from a few samples is a good first guess.
  auto guess = [&](int64_t c) {
    double total = 0;
    const int64_t values = std::min<int64_t>(s.S, 16), samples = std::min<int64_t>(s.N, 4);
    for (int64_t n = 0; n < samples; ++n)
      for (int64_t i = 0; i < values; ++i)
        total += widen(p.x[start(c, s.N * n / samples) + s.S * i / values]);
    const A mean = static_cast<A>(total / static_cast<double>(samples * values));
    return std::isfinite(mean) ? mean : A(0);
  };
  for (int64_t c = 0; p.training && c < s.channels(); ++c) shifts[c] = guess(c);
  walk_planar<A>(
      s, p.training,
      [&](int64_t c, int64_t n, int64_t next, Growing<A>& sums) {
        sum_run(p.x + start(c, n), p.x + start(c, next), s.S, shifts[c], sums);
      },
      [&](int64_t c, Sums sums) {
        if (p.training && !p.finish(c, shifts[c], sums)) {
          const A mean = static_cast<A>(p.mean[c]);
          Growing<A> again;
          for (int64_t n = 0; n < s.N; ++n)
            sum_run(p.x + start(c, n), p.x + start(c, n), s.S, mean, again);
          p.finish(c, mean, again.take());
        }
        maps[c] = p.affine(c);
      },
      [&](int64_t c, int64_t n) { apply_run(p, maps[c], start(c, n)); });
}

template <class T, class Act>
void backward_planar(const Backward<T, Act>& p) {
  using A = arithmetic<T>;
  const Shape& s = p.shape;
  const int64_t stride = s.C * s.S;
  std::vector<Affine<A>> maps(s.channels());
  std::vector<typename Backward<T, Act>::Map> backs(s.channels());
  for (int64_t c = 0; c < s.channels(); ++c) maps[c] = p.affine(c);
  auto start = [&](int64_t c, int64_t n) { return planar_start(s, c) + n * stride; };
  walk_planar<A>(
      s, p.summing(),
      [&](int64_t c, int64_t n, int64_t next, Growing<A>& sums) {
        sum_run(p, maps[c], start(c, n), start(c, next), sums);
      },
      [&](int64_t c, Sums sums) { backs[c] = p.finish(c, sums); },
      [&](int64_t c, int64_t n) { apply_run(p, maps[c], backs[c], start(c, n)); });
}

// ----------------------------------------------------------------------------- rows

// A replica as rows of columns: C columns if it is interleaved, C * S if it is planar. Short rows are
// taken `group` at a time, as one wide row over which the channels repeat: so that they fill vector
// registers, whatever C is.
struct Rows {
  int64_t count, span, columns, C, group, width, chunks;
  explicit Rows(const Shape& s)
      : count(s.interleaved ? s.N * s.S : s.N),
        span(s.interleaved ? 1 : s.S),
        columns(s.C * span),
        C(s.C),
        group(columns < kWidth ? std::min((kWidth + columns - 1) / columns, count) : 1),
        width(columns * group),
        chunks(std::max<int64_t>(
            1, std::min({kMaxChunks, columns * count / kChunk, count / (group * kRows / 4)}))) {}
  int64_t begin(int64_t chunk) const {
    const int64_t groups = (count + group - 1) / group;
    return std::min(count, groups * chunk / chunks * group);
  }
  int64_t wide(int64_t row, int64_t end) const {
    return std::min(width, (end - row) * columns);
  }
  int64_t blocks() const { return (C + kChannels - 1) / kChannels; }
  // Add the columns of a wide row to their channels.
  template <class A>
  void fold(const A* __restrict from, double* __restrict to) const {
    for (const A* stop = from + width; from < stop; from += columns) {
      if (span == 1) {
        for (int64_t c = 0; c < C; ++c) to[c] += from[c];
      } else {
        for (int64_t c = 0; c < C; ++c) {
          double sum = 0;
          for (int64_t i = 0; i < span; ++i) sum += from[c * span + i];
          to[c] += sum;
        }
      }
    }
  }
};

// The numbers of the channels, one for each column of a wide row.
template <class A>
struct Columns {
  aligned_vector<A> shift, scale, offset, slope, constant;
  explicit Columns(const Rows& rows)
      : shift(rows.width), scale(rows.width), offset(rows.width), slope(rows.width),
        constant(rows.width) {}
  template <class Set>
  void each(const Rows& rows, int64_t channel, Set set) {
    for (int64_t i = channel * rows.span; i < rows.width; i += rows.columns)
      for (int64_t j = i; j < i + rows.span; ++j) set(j);
  }
  void set(const Rows& rows, int64_t channel, Affine<A> map) {
    each(rows, channel, [&](int64_t i) {
      shift[i] = map.shift;
      scale[i] = map.scale;
      offset[i] = map.offset;
    });
  }
};

// As walk_planar, but every chunk holds all channels of a replica. `add(together, r, row,
// width, first, second)` adds the terms of one wide row, or of two, column by column.
template <class A, class Add, class Finish, class Apply>
void walk_rows(const Shape& s, const Rows& rows, bool summing, Add add, Finish finish, Apply apply) {
  const int64_t tasks = s.R * rows.chunks;
  const int workers = s.workers();
  std::vector<double> firsts(summing ? tasks * s.C : 0), seconds(firsts);
#pragma omp parallel num_threads(workers)
  {
    aligned_vector<A> first(summing ? rows.width : 0), second(first);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < (summing ? tasks : 0); ++task) {
      const int64_t r = task / rows.chunks, k = task % rows.chunks, end = rows.begin(k + 1);
      for (int64_t row = rows.begin(k); row < end;) {
        std::fill(first.begin(), first.end(), A(0));
        std::fill(second.begin(), second.end(), A(0));
        const int64_t stop = std::min(end, row + kRows * rows.group);
        for (; row + 2 * rows.group <= stop; row += 2 * rows.group)
          add(std::integral_constant<int, 2>(), r, row, rows.width, first.data(), second.data());
        for (; row < stop; row += rows.group)
          add(std::integral_constant<int, 1>(), r, row, rows.wide(row, stop), first.data(),
              second.data());
        rows.fold(first.data(), &firsts[task * s.C]);
        rows.fold(second.data(), &seconds[task * s.C]);
      }
    }
#pragma omp for schedule(static)
    for (int64_t block = 0; block < s.R * rows.blocks(); ++block) {
      const int64_t r = block / rows.blocks(), begin = block % rows.blocks() * kChannels;
      const int64_t count = std::min(kChannels, s.C - begin);
      double sums[kChannels] = {}, others[kChannels] = {};
      for (int64_t k = 0; k < (summing ? rows.chunks : 0); ++k) {
        const int64_t from = (r * rows.chunks + k) * s.C + begin;
        for (int64_t c = 0; c < count; ++c) {
          sums[c] += firsts[from + c];
          others[c] += seconds[from + c];
        }
      }
      for (int64_t c = 0; c < count; ++c) finish(r, begin + c, Sums{sums[c], others[c]});
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tasks; ++i) {
      const int64_t task = tasks - 1 - i;  // From what was read last, which the cache still holds.
      const int64_t r = task / rows.chunks, k = task % rows.chunks, end = rows.begin(k + 1);
      for (int64_t row = rows.begin(k); row < end; row += rows.group)
        apply(r, row, rows.wide(row, end));
    }
  }
}

template <class T, class Act>
void forward_rows(const Forward<T, Act>& p) {
  using A = arithmetic<T>;
  const Shape& s = p.shape;
  const Rows rows(s);
  std::vector<Columns<A>> columns(s.R, Columns<A>(rows));
  auto at = [&](int64_t r, int64_t row) { return (r * rows.count + row) * rows.columns; };
  // The mean of some rows, spread over the batch, is a good first guess. Of 64 values it is hardly ever
  // a standard deviation off; of eight, once in two hundred channels.
  const int64_t samples = std::min<int64_t>(rows.count, std::max<int64_t>(8, 64 / rows.span));
  std::vector<double> totals(p.training ? rows.columns : 0);
  for (int64_t r = 0; p.training && r < s.R; ++r) {
    std::fill(totals.begin(), totals.end(), 0);
    for (int64_t k = 0; k < samples; ++k) {
      const T* x = p.x + at(r, rows.count * k / samples);
      for (int64_t i = 0; i < rows.columns; ++i) totals[i] += widen(x[i]);
    }
    for (int64_t c = 0; c < s.C; ++c) {
      double total = 0;
      for (int64_t i = 0; i < rows.span; ++i) total += totals[c * rows.span + i];
      const A mean = static_cast<A>(total / static_cast<double>(samples * rows.span));
      columns[r].set(rows, c, {std::isfinite(mean) ? mean : A(0), 1, 1, 0});
    }
  }
  walk_rows<A>(
      s, rows, p.training,
      [&](auto together, int64_t r, int64_t row, int64_t width, A* __restrict first,
          A* __restrict second) {
        const T* __restrict x = p.x + at(r, row);
        const A* __restrict shift = columns[r].shift.data();
        fetch_ahead(x, together * width);
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
          const A d = widen(x[i]) - shift[i];
          if constexpr (together == 1) {
            first[i] += d;
            second[i] += d * d;
          } else {
            const A e = widen(x[width + i]) - shift[i];
            first[i] += d + e;
            second[i] += d * d + e * e;
          }
        }
      },
      [&](int64_t r, int64_t c, Sums sums) {
        const int64_t channel = r * s.C + c, column = c * rows.span;
        if (p.training && !p.finish(channel, columns[r].shift[column], sums)) {
          const A mean = static_cast<A>(p.mean[channel]);
          sums = {};
          for (int64_t row = 0; row < rows.count; ++row)
            for (int64_t i = 0; i < rows.span; ++i) {
              const double d = static_cast<double>(widen(p.x[at(r, row) + column + i])) - mean;
              sums += {d, d * d};
            }
          p.finish(channel, mean, sums);
        }
        columns[r].set(rows, c, p.affine(channel));
      },
      [&](int64_t r, int64_t row, int64_t width) {
        const A* __restrict shift = columns[r].shift.data();
        const A* __restrict scale = columns[r].scale.data();
        const A* __restrict offset = columns[r].offset.data();
        const T* __restrict x = p.x + at(r, row);
        T* __restrict y = p.y + at(r, row);
        fetch_ahead(x, width);
        if (Act::follows_addition && p.residual) {
          const T* __restrict residual = p.residual + at(r, row);
#pragma omp simd
          for (int64_t i = 0; i < width; ++i) {
            const A z = (widen(x[i]) - shift[i]) * scale[i] + offset[i];
            narrow(p.act.value(A(z + widen(residual[i]))), y[i]);
          }
        } else {
#pragma omp simd
          for (int64_t i = 0; i < width; ++i)
            narrow(p.act.value(A((widen(x[i]) - shift[i]) * scale[i] + offset[i])), y[i]);
        }
      });
}

template <class T, class Act>
void backward_rows(const Backward<T, Act>& p) {
  using A = arithmetic<T>;
  const Shape& s = p.shape;
  const Rows rows(s);
  std::vector<Columns<A>> columns(s.R, Columns<A>(rows));
  for (int64_t i = 0; i < s.channels(); ++i) columns[i / s.C].set(rows, i % s.C, p.affine(i));
  auto at = [&](int64_t r, int64_t row) { return (r * rows.count + row) * rows.columns; };
  walk_rows<A>(
      s, rows, p.summing(),
      [&](auto together, int64_t r, int64_t row, int64_t width, A* __restrict first,
          A* __restrict second) {
        const A* __restrict shift = columns[r].shift.data();
        const A* __restrict scale = columns[r].scale.data();
        const A* __restrict offset = columns[r].offset.data();
        const T* __restrict x = p.x + at(r, row);
        const T* __restrict grad = p.grad + at(r, row);
        fetch_ahead(x, together * width);
        fetch_ahead(grad, together * width);
        if (Act::follows_addition && p.y) {
          const T* __restrict y = p.y + at(r, row);
          fetch_ahead(y, together * width);
#pragma omp simd
          for (int64_t i = 0; i < width; ++i) {
            const A d = widen(x[i]) - shift[i];
            const A g = p.act.times_slope(A(widen(y[i])), A(widen(grad[i])));
            if constexpr (together == 1) {
              first[i] += g;
              second[i] += g * d;
            } else {
              const A e = widen(x[width + i]) - shift[i];
              const A h = p.act.times_slope(A(widen(y[width + i])), A(widen(grad[width + i])));
              first[i] += g + h;
              second[i] += g * d + h * e;
            }
          }
        } else {
#pragma omp simd
          for (int64_t i = 0; i < width; ++i) {
            const A d = widen(x[i]) - shift[i];
            const A g = p.act.times_slope(A(d * scale[i] + offset[i]), A(widen(grad[i])));
            if constexpr (together == 1) {
              first[i] += g;
              second[i] += g * d;
            } else {
              const A e = widen(x[width + i]) - shift[i];
              const A h =
                  p.act.times_slope(A(e * scale[i] + offset[i]), A(widen(grad[width + i])));
              first[i] += g + h;
              second[i] += g * d + h * e;
            }
          }
        }
      },
      [&](int64_t r, int64_t c, Sums sums) {
        const auto back = p.finish(r * s.C + c, sums);
        columns[r].each(rows, c, [&](int64_t i) {
          columns[r].slope[i] = back.slope;
          columns[r].constant[i] = back.constant;
        });
      },
      [&](int64_t r, int64_t row, int64_t width) {
        const A* __restrict shift = columns[r].shift.data();
        const A* __restrict scale = columns[r].scale.data();
        const A* __restrict offset = columns[r].offset.data();
        const A* __restrict slope = columns[r].slope.data();
        const A* __restrict constant = columns[r].constant.data();
        const T* __restrict x = p.x + at(r, row);
        const T* __restrict grad = p.grad + at(r, row);
        fetch_ahead(x, width);
        fetch_ahead(grad, width);
        T* __restrict grad_x = p.grad_x + at(r, row);
        if (Act::follows_addition && p.y) {
          const T* __restrict y = p.y + at(r, row);
          T* __restrict grad_residual = p.grad_residual + at(r, row);
#pragma omp simd
          for (int64_t i = 0; i < width; ++i) {
            const A g = p.act.times_slope(A(widen(y[i])), A(widen(grad[i])));
            narrow(g, grad_residual[i]);
            narrow(A(g * scale[i] + ((widen(x[i]) - shift[i]) * slope[i] + constant[i])),
                   grad_x[i]);
          }
        } else {
#pragma omp simd
          for (int64_t i = 0; i < width; ++i) {
            const A d = widen(x[i]) - shift[i];
            const A g = p.act.times_slope(A(d * scale[i] + offset[i]), A(widen(grad[i])));
            narrow(A(g * scale[i] + (d * slope[i] + constant[i])), grad_x[i]);
          }
        }
      });
}

// ------------------------------------------------------------------------- dispatch

template <class Run>
void with_activation(int activation, double negative_slope, Run run) {
  switch (activation) {
    case kReLU: return run(ReLU{});
    case kLeakyReLU: return run(LeakyReLU{negative_slope});
    case kSigmoid: return run(Sigmoid{});
    case kSiLU: return run(SiLU{});
    default: return run(Identity{});
  }
}

template <class Run>
void with_dtype(int dtype, Run run) {
  switch (dtype) {
    case kBFloat16: return run(bfloat16{});
    case kFloat64: return run(double{});
    default: return run(float{});
  }
}

}  // namespace

extern "C" {

// The highest level of x86-64 that this processor runs, of those compiled for; 0 if none. To be asked
// of the base build.
int NORMLAB_NAME(normlab_level)() {
#ifdef __x86_64__
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("bmi2")))
    return 0;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
  return wide ? 4 : 3;
#else
  return 0;
#endif
}

void NORMLAB_NAME(normlab_forward)(
    int dtype, int interleaved, int64_t R, int64_t N, int64_t C, int64_t S, const void* x,
    const void* residual, const void* weight, const void* bias, void* running_mean,
    void* running_var, double momentum, double eps, int activation, double negative_slope,
    int training, void* y, double* statistics, int threads) {
  const Shape shape{R, N, C, S, interleaved != 0, threads};
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    using A = arithmetic<T>;
    with_activation(activation, negative_slope, [&](auto act) {
      const Forward<T, decltype(act)> pass{
          shape, act, static_cast<const T*>(x), static_cast<const T*>(residual),
          static_cast<const A*>(weight), static_cast<const A*>(bias),
          static_cast<A*>(running_mean), static_cast<A*>(running_var), momentum, eps, training != 0,
          static_cast<T*>(y), statistics, statistics + R * C};
      shape.by_rows() ? forward_rows(pass) : forward_planar(pass);
    });
  });
}

void NORMLAB_NAME(normlab_backward)(
    int dtype, int interleaved, int64_t R, int64_t N, int64_t C, int64_t S, const void* grad,
    const void* x, const void* y, const void* weight, const void* bias, const double* statistics,
    double eps, int activation, double negative_slope, int training,
    void* grad_x, void* grad_residual, void* grad_weight, void* grad_bias, int threads) {
  const Shape shape{R, N, C, S, interleaved != 0, threads};
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    using A = arithmetic<T>;
    with_activation(activation, negative_slope, [&](auto act) {
      const Backward<T, decltype(act)> pass{
          shape, act, static_cast<const T*>(grad), static_cast<const T*>(x),
          static_cast<const T*>(y), static_cast<const A*>(weight), static_cast<const A*>(bias),
          statistics, statistics + R * C, eps, training != 0, static_cast<T*>(grad_x), static_cast<T*>(grad_residual),
          static_cast<A*>(grad_weight), static_cast<A*>(grad_bias)};
      shape.by_rows() ? backward_rows(pass) : backward_planar(pass);
    });
  });
}

}  // extern "C"
