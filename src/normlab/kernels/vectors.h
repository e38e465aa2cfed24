// Vectors of numbers, as wide as the processor has them.

#pragma once

#include "kernels.h"

#include <type_traits>
#include <utility>

#ifdef __clang__
#define NORMLAB_UNROLL _Pragma("unroll")
#else
#define NORMLAB_UNROLL _Pragma("GCC unroll 16")
#endif

namespace {

// The sums of `kMostRows` times `kTogether` vectors fill three of four registers.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTogether = 4;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kTogether = 4;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kTogether = 2;
#else
constexpr int kVectorBytes = 16, kTogether = 2;
#endif
constexpr int kMostRows = 6;

template <class T>
struct Vector {
  static constexpr std::int64_t lanes = kVectorBytes / sizeof(T);
  typedef T Type __attribute__((vector_size(kVectorBytes)));
  Type of;
};

// The first `count` lanes, and zeros.
template <class T>
inline typename Vector<T>::Type load(const T* from, std::int64_t count) {
  typename Vector<T>::Type value{};
  if (count == Vector<T>::lanes)
    std::memcpy(&value, from, sizeof value);
  else
    std::memcpy(&value, from, sizeof(T) * count);
  return value;
}

template <class T>
inline void store(typename Vector<T>::Type value, T* to, std::int64_t count) {
  if (count == Vector<T>::lanes)
    std::memcpy(to, &value, sizeof value);
  else
    std::memcpy(to, &value, sizeof(T) * count);
}

// Lanes of two vectors by turns, from one of them on.
template <class T, std::int64_t from, std::size_t... i>
inline auto interleave(typename Vector<T>::Type a, typename Vector<T>::Type b,
                       std::index_sequence<i...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, (from + i / 2 + i % 2 * Vector<T>::lanes)...);
#else
  typedef std::conditional_t<sizeof(T) == 8, std::int64_t, std::int32_t> Place
      __attribute__((vector_size(kVectorBytes)));
  return __builtin_shuffle(a, b, Place{(from + i / 2 + i % 2 * Vector<T>::lanes)...});
#endif
}

// Rows become columns.
template <class T>
inline void turn(typename Vector<T>::Type* rows) {
  constexpr std::int64_t lanes = Vector<T>::lanes, half = lanes / 2;
  constexpr auto each = std::make_index_sequence<lanes>{};
  NORMLAB_UNROLL
  for (std::int64_t done = 1; done < lanes; done *= 2) {
    typename Vector<T>::Type turned[lanes];
    NORMLAB_UNROLL
    for (std::int64_t i = 0; i < half; ++i) {
      turned[2 * i] = interleave<T, 0>(rows[i], rows[i + half], each);
      turned[2 * i + 1] = interleave<T, half>(rows[i], rows[i + half], each);
    }
    NORMLAB_UNROLL
    for (std::int64_t i = 0; i < lanes; ++i) rows[i] = turned[i];
  }
}

// Reads `count` rows of `some` values that are `stride` apart, and zeros for the rest; turned.
template <class T>
inline void read_turned(const T* from, std::int64_t stride, std::int64_t count, std::int64_t some,
                        typename Vector<T>::Type* rows) {
  constexpr std::int64_t lanes = Vector<T>::lanes;
  if (count == lanes && some == lanes) {
    NORMLAB_UNROLL
    for (std::int64_t lane = 0; lane < lanes; ++lane)
      std::memcpy(&rows[lane], from + lane * stride, sizeof rows[lane]);
  } else {
    std::memset(rows, 0, sizeof(*rows) * lanes);
    for (std::int64_t lane = 0; lane < count; ++lane)
      std::memcpy(&rows[lane], from + lane * stride, sizeof(T) * some);
  }
  turn<T>(rows);
}

template <class T>
inline void write_turned(typename Vector<T>::Type* rows, T* to, std::int64_t stride,
                         std::int64_t count, std::int64_t some) {
  constexpr std::int64_t lanes = Vector<T>::lanes;
  turn<T>(rows);
  if (count == lanes && some == lanes) {
    NORMLAB_UNROLL
    for (std::int64_t lane = 0; lane < lanes; ++lane)
      std::memcpy(to + lane * stride, &rows[lane], sizeof rows[lane]);
  } else {
    for (std::int64_t lane = 0; lane < count; ++lane)
      std::memcpy(to + lane * stride, &rows[lane], sizeof(T) * some);
  }
}

// Calls `run` with a number from 1 to `most`, as a constant.
template <int most, class Run>
void as_constant(std::int64_t number, Run run) {
  if constexpr (most > 1)
    if (number < most) return as_constant<most - 1>(number, run);
  run(std::integral_constant<int, most>{});
}

// Calls `run` with parts of about equal size, none above `kMostRows`: their start, and their size as
// a constant.
template <class Run>
void in_parts(std::int64_t rows, Run run) {
  const std::int64_t parts = (rows + kMostRows - 1) / kMostRows;
  for (std::int64_t part = 0; part < parts; ++part) {
    const std::int64_t start = rows * part / parts;
    as_constant<kMostRows>(rows * (part + 1) / parts - start, [&](auto size) { run(start, size); });
  }
}

}  // namespace
