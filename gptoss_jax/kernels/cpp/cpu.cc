// Matrix products for CPUs: rows of x, sorted by expert, with the rows of each expert's weight, summed in float32; and attention over a cache.
//
// One micro-kernel serves everything: dot products of a few rows of x with a few rows of the weight, both contiguous along the summed
// dimension, held in registers until their end. Rows of a weight that aren't numbers the processor multiplies (MXFP4, or bfloat16
// without AVX512-BF16) are first written as such to a buffer of a few rows, which stays in the first-level cache. So a single row of x
// streams each packed byte once, and many rows share one decoding.
//
// Compiled for the processor it runs on (cpu_library.py), so the instruction set is chosen by the compiler's macros.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

struct BFloat16 {
  uint16_t bits;
};

inline float Widen(float value) { return value; }
inline float Widen(BFloat16 value) {
  uint32_t bits = uint32_t{value.bits} << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline void Narrow(float value, float* out) { *out = value; }
inline void Narrow(float value, BFloat16* out) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  out->bits = value != value ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// --- Registers -------------------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int kLanes = 16, kTileRows = 6, kTileOuts = 4;  // 24 sums, 4 weights and a row in 32 registers; 4 rows of 2,880 in the first cache
constexpr int kMostRows = 8;  // up to so many in one pass, though not all sums have registers: memory is slower than that
#elif defined(__AVX__)
constexpr int kLanes = 8, kTileRows = 2, kTileOuts = 4, kMostRows = 2;
#else
constexpr int kLanes = 4, kTileRows = 2, kTileOuts = 4, kMostRows = 2;
#endif

typedef float Sums __attribute__((vector_size(4 * kLanes)));

inline float Total(Sums sums) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)sums);
#else
  float total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += sums[lane];
  return total;
#endif
}

// e to the power of each x of at most 0, relative error 1e-7; 0 below -87. A loop over std::exp takes longer than the rest of attention.
inline Sums Exponential(Sums x) {
  typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
  const Integers bounded = x > Sums{} - 87.0f, not_a_number = x != x;
  const Sums safe = (Sums)(bounded & (Integers)x);
  const Sums turns = safe * 1.44269504f + 12582912.0f;  // its last bits are the power of two, rounded
  const Sums whole = turns - 12582912.0f, rest = safe - whole * 0.693145752f - whole * 1.42860677e-6f;
  Sums power = rest * 1.98756919e-4f + 1.39819994e-3f;
  power = power * rest + 8.33345205e-3f;
  power = power * rest + 4.16657962e-2f;
  power = power * rest + 1.66666657e-1f;
  power = power * rest + 0.5f;
  power = power * rest * rest + rest + 1.0f;
  return (Sums)((bounded & ((Integers)power + ((Integers)turns << 23))) | (not_a_number & (Integers)x));
}

// The numbers from `from` on as float32, one a lane; zero past the first `count`.
template <typename T>
Sums Spread(const T* from, int64_t count) {
  typedef std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t> Bits;
  typedef Bits Packed __attribute__((vector_size(sizeof(T) * kLanes)));
  typedef uint32_t Wide __attribute__((vector_size(4 * kLanes)));
  Packed packed = {};
  if (count >= kLanes) std::memcpy(&packed, from, sizeof packed);
  else std::memcpy(&packed, from, count * sizeof(T));
  return (Sums)(__builtin_convertvector(packed, Wide) << (32 - 8 * sizeof(T)));
}

// The numbers a processor multiplies: Register holds kWidth of them, MultiplyAdd adds their products to float32 sums.
template <typename T>
struct Operand {
  static constexpr bool kMultiplies = false;
};

template <>
struct Operand<float> {
  static constexpr bool kMultiplies = true;
  static constexpr int kWidth = kLanes;
  typedef Sums Register;
  static Register Load(const float* from) {
    Register value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  static Sums MultiplyAdd(Register a, Register b, Sums sums) { return a * b + sums; }
};

#if defined(__AVX512BF16__)
template <>
struct Operand<BFloat16> {
  static constexpr bool kMultiplies = true;
  static constexpr int kWidth = 2 * kLanes;
  typedef __m512i Register;
  static Register Load(const BFloat16* from) { return _mm512_loadu_si512(from); }
  static Sums MultiplyAdd(Register a, Register b, Sums sums) {
    return (Sums)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// out[r][o] = dot(x row r, weight row o), for R rows of x and O of the weight, each of `size` numbers. With several rows of x the processor is
// busy for too long to see where each row of the weight goes on, as the next row of the same stream.
template <int R, int O, typename T>
void Dot(const T* x, const T* weight, int64_t weight_stride, int64_t size, float* out, int64_t out_stride) {
  using Op = Operand<T>;
  Sums sums[R][O] = {};
  int64_t k = 0;
  for (; k + Op::kWidth <= size; k += Op::kWidth) {
    typename Op::Register w[O];
    for (int o = 0; o < O; ++o) {
      w[o] = Op::Load(weight + o * weight_stride + k);
      if (R > 1) __builtin_prefetch(weight + o * weight_stride + k + size, 0, 2);
    }
    for (int r = 0; r < R; ++r) {
      const typename Op::Register row = Op::Load(x + r * size + k);
      for (int o = 0; o < O; ++o) sums[r][o] = Op::MultiplyAdd(row, w[o], sums[r][o]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int o = 0; o < O; ++o) {
      float total = Total(sums[r][o]);
      for (int64_t rest = k; rest < size; ++rest) total += Widen(x[r * size + rest]) * Widen(weight[o * weight_stride + rest]);
      out[r * out_stride + o] = total;
    }
  }
}

#if defined(__AVX512F__)
// The totals of 16 registers, one a lane, in the order 0, 4, 8, 12, 2, 6, ..., 1, ..., 3, ..., 15: at each level two registers' halves are added
// crosswise, so that half as many are left.
inline Sums Totals(const Sums* sums) {
  __m512 left[16];
  std::memcpy(left, sums, sizeof left);
  for (int half : {8, 4})
    for (int i = 0; i < half; ++i) left[i] = _mm512_add_ps(_mm512_unpacklo_ps(left[i], left[i + half]), _mm512_unpackhi_ps(left[i], left[i + half]));
  for (int half : {2, 1})
    for (int i = 0; i < half; ++i)
      left[i] = _mm512_add_ps(_mm512_shuffle_f32x4(left[i], left[i + half], 0x88), _mm512_shuffle_f32x4(left[i], left[i + half], 0xdd));
  return (Sums)left[0];
}
#endif

template <int R, typename T>
void DotRows(int rows, const T* x, const T* weight, int64_t weight_stride, int64_t size, float* out, int64_t out_stride) {
  if constexpr (R > 1) {
    if (rows < R) return DotRows<R - 1>(rows, x, weight, weight_stride, size, out, out_stride);
  }
  Dot<R, kTileOuts>(x, weight, weight_stride, size, out, out_stride);
}

// out[r][o] = dot(x row r, weight row o) for any number of each.
template <typename T>
void Products(int64_t rows, const T* x, int64_t outs, const T* weight, int64_t weight_stride, int64_t size, float* out, int64_t out_stride) {
  const int64_t pass = rows <= kMostRows ? kMostRows : kTileRows;
  int64_t o = 0;
  for (; o + kTileOuts <= outs; o += kTileOuts)
    for (int64_t r = 0; r < rows; r += pass)
      DotRows<kMostRows>(int(std::min(pass, rows - r)), x + r * size, weight + o * weight_stride, weight_stride, size, out + r * out_stride + o,
                         out_stride);
  for (; o < outs; ++o)
    for (int64_t r = 0; r < rows; ++r) Dot<1, 1>(x + r * size, weight + o * weight_stride, weight_stride, size, out + r * out_stride + o, out_stride);
}

// --- MXFP4 -----------------------------------------------------------------------------------------------------------------------

constexpr int kBlock = 32, kBlockBytes = 16;

// Bits of float32 of a code at a scale byte, exact for every byte: denormals at the bottom, infinities at the top (mxfp4.py).
inline float DecodeCode(unsigned code, int scale) {
  const unsigned magnitude = code & 7;
  const int exponent = scale - 1 + int(magnitude == 1 ? 0 : magnitude >> 1);
  const uint32_t mantissa = magnitude == 1 ? 0 : (magnitude & 1) << 22;
  uint32_t bits = exponent >= 255  ? 0x7f800000u
                  : exponent >= 1 ? uint32_t(exponent) << 23 | mantissa
                                  : (mantissa | 0x800000u) >> (1 - exponent);
  if (!magnitude) bits = 0;
  bits |= uint32_t{code & 8} << 28;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename T>
void DecodeBlockExactly(const uint8_t* block, int scale, T* out) {
  for (int i = 0; i < kBlockBytes; ++i) {
    Narrow(DecodeCode(block[i] & 15, scale), out + 2 * i);
    Narrow(DecodeCode(block[i] >> 4, scale), out + 2 * i + 1);
  }
}

#if defined(__AVX2__)
// Twice each value is a small integer: looked up 16 at a time, widened, and scaled by 2^(scale - 128), a normal number from scale 2 on.
inline void DecodeBlock(const uint8_t* block, int scale, float* out) {
  if (scale < 2) return DecodeBlockExactly(block, scale, out);
  const __m128i twice = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
  const __m128i bytes = _mm_loadu_si128((const __m128i*)block), low = _mm_set1_epi8(15);
  const __m128i even = _mm_shuffle_epi8(twice, _mm_and_si128(bytes, low));
  const __m128i odd = _mm_shuffle_epi8(twice, _mm_and_si128(_mm_srli_epi16(bytes, 4), low));
  const __m128i first = _mm_unpacklo_epi8(even, odd), second = _mm_unpackhi_epi8(even, odd);
#if defined(__AVX512F__)
  const __m512 factor = _mm512_castsi512_ps(_mm512_set1_epi32((scale - 1) << 23));
  _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(first)), factor));
  _mm512_storeu_ps(out + 16, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(second)), factor));
#else
  const __m256 factor = _mm256_castsi256_ps(_mm256_set1_epi32((scale - 1) << 23));
  const __m128i quarters[4] = {first, _mm_srli_si128(first, 8), second, _mm_srli_si128(second, 8)};
  for (int i = 0; i < 4; ++i)
    _mm256_storeu_ps(out + 8 * i, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(quarters[i])), factor));
#endif
}
#else
inline void DecodeBlock(const uint8_t* block, int scale, float* out) {
  if (scale < 2) return DecodeBlockExactly(block, scale, out);
  static constexpr int8_t kTwice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  uint32_t bits = uint32_t(scale - 1) << 23;
  float factor;
  std::memcpy(&factor, &bits, sizeof factor);
  for (int i = 0; i < kBlockBytes; ++i) {
    out[2 * i] = kTwice[block[i] & 15] * factor;
    out[2 * i + 1] = kTwice[block[i] >> 4] * factor;
  }
}
#endif

#if defined(__AVX512BF16__)
alignas(64) constexpr uint16_t kCodeValues[32] = {  // bfloat16 of the 16 codes, twice
    0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0,
    0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0};

// The 32 codes of a block as words whose bits 0 to 3 are the code. Bit 4 is another's, and doesn't matter to a look-up in kCodeValues.
inline __m512i Codes(const uint8_t* block) {
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)block));
  return _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));
}

// The scale is added to the exponents of what isn't zero: exact while they stay those of normal numbers.
inline void DecodeBlock(const uint8_t* block, int scale, BFloat16* out) {
  if (scale < 2 || scale > 252) return DecodeBlockExactly(block, scale, out);
  const __m512i codes = Codes(block), values = _mm512_permutexvar_epi16(codes, _mm512_load_si512(kCodeValues));
  const __mmask32 nonzero = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(7));
  _mm512_storeu_si512(out, _mm512_mask_add_epi16(values, nonzero, values, _mm512_set1_epi16(int16_t((scale - 127) * 128))));
}
#endif

// --- Weights -----------------------------------------------------------------------------------------------------------------------

// Rows of a weight as numbers of type T, `stride` numbers apart.
template <typename T>
struct RowsOf {
  const T* values;
  int64_t stride;
};

// Rows(row, step, count) gives rows row, row + step, ... of all experts' rows, in `buffer` unless they lie in memory as T already.
struct Mxfp4 {
  const uint8_t *blocks, *scales;
  int64_t outs, size;
  template <typename T>
  RowsOf<T> Rows(int64_t row, int64_t step, int64_t count, T* buffer) const {
    const int64_t row_blocks = size / kBlock;
    for (int64_t o = 0; o < count; ++o)
      for (int64_t i = 0, block = (row + o * step) * row_blocks; i < row_blocks; ++i, ++block) {
        __builtin_prefetch(blocks + block * kBlockBytes + 2048);
        DecodeBlock(blocks + block * kBlockBytes, scales[block], buffer + o * size + i * kBlock);
      }
    return {buffer, size};
  }
};

template <typename Stored>
struct Dense {
  const Stored* values;
  int64_t outs, size;
  RowsOf<Stored> Rows(int64_t row, int64_t step, int64_t, Stored*) const { return {values + row * size, step * size}; }
  template <typename T>
  RowsOf<T> Rows(int64_t row, int64_t step, int64_t count, T* buffer) const {
    for (int64_t o = 0; o < count; ++o)
      for (int64_t i = 0; i < size; ++i) buffer[o * size + i] = Widen(values[(row + o * step) * size + i]);
    return {buffer, size};
  }
};

// A few rows of x are multiplied with codes as they are decoded, in registers, each block's sum scaled afterwards: a fifth of the
// instructions of decoding to memory first.
constexpr int kFewRows = 6;

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
// A register holds 4 blocks as 32 words of 4 codes each, so that the codes j of all words are those of numbers 4 * word + j: x is laid out
// likewise, all numbers j of 128 together, and zeros up to a multiple of 128.
constexpr int kQuad = 4 * kBlock;

inline int64_t InterleavedSize(const Mxfp4& weight) { return (weight.size + kQuad - 1) / kQuad * kQuad; }

inline void Interleave(const Mxfp4& weight, const BFloat16* x, int64_t rows, BFloat16* out) {
  for (int64_t r = 0; r < rows; ++r, x += weight.size)
    for (int64_t k = 0; k < weight.size; k += kQuad, out += kQuad) {
      BFloat16 quad[kQuad] = {};
      std::memcpy(quad, x + k, std::min<int64_t>(kQuad, weight.size - k) * sizeof *x);
      for (int part = 0; part < 4; ++part) {
        const __m512i words = _mm512_loadu_si512(quad + part * kBlock);
        for (int j = 0; j < 4; ++j)
          _mm_storeu_si128((__m128i*)(out + j * kBlock + part * 8), _mm512_cvtepi64_epi16(_mm512_srli_epi64(words, 16 * j)));
      }
    }
}

// out[r][o] = dot(x row r, row o of codes), for R interleaved rows of x and O of codes, `step` rows apart.
template <int R, int O>
void DotPacked(const BFloat16* x, const Mxfp4& weight, int64_t row, int64_t step, float* out, int64_t out_stride) {
  const int64_t count = weight.size / kBlock, x_stride = InterleavedSize(weight);
  const __m512i table = _mm512_load_si512(kCodeValues);
  const __m512i to_lanes = _mm512_set_epi32(  // of four scale bytes, each to the topmost byte of its block's four lanes, zero to the others
      0x03808080, 0x03808080, 0x03808080, 0x03808080, 0x02808080, 0x02808080, 0x02808080, 0x02808080, 0x01808080, 0x01808080, 0x01808080,
      0x01808080, 0x00808080, 0x00808080, 0x00808080, 0x00808080);
  __m512 sums[R][O];
  for (auto& row_sums : sums)
    for (auto& sum : row_sums) sum = _mm512_setzero_ps();
  for (int o = 0; o < O; ++o)  // scales two rows on: too few bytes for the processor to see where they lead
    for (int64_t ahead = 0; ahead < count; ahead += 64) __builtin_prefetch(weight.scales + (row + o * step + 2) * count + ahead);
  const auto multiply = [&](int64_t i, int blocks) {
    __m512i codes[O];
    __m512 parts[R][O];
#pragma GCC unroll 4
    for (int o = 0; o < O; ++o) {
      const uint8_t* from = weight.blocks + ((row + o * step) * count + i) * kBlockBytes;
      __builtin_prefetch(from + 2048, 0, 2);
      codes[o] = _mm512_maskz_loadu_epi32((1 << 4 * blocks) - 1, from);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) parts[r][o] = _mm512_setzero_ps();
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      __m512bh values[O];
#pragma GCC unroll 4
      for (int o = 0; o < O; ++o) values[o] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes[o], 4 * j), table);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512bh row_x = (__m512bh)_mm512_load_si512(x + r * x_stride + (i + j) * kBlock);
#pragma GCC unroll 4
        for (int o = 0; o < O; ++o) parts[r][o] = _mm512_dpbf16_ps(parts[r][o], values[o], row_x);
      }
    }
#pragma GCC unroll 4
    for (int o = 0; o < O; ++o) {
      int32_t bytes = 0;
      std::memcpy(&bytes, weight.scales + (row + o * step) * count + i, blocks);
      // Bits of float32: byte 0 becomes zero (what it scales is below 2^-124), byte 255 infinity.
      const __m512 scale = (__m512)_mm512_srli_epi32(_mm512_shuffle_epi8(_mm512_set1_epi32(bytes), to_lanes), 1);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r][o] = _mm512_fmadd_ps(parts[r][o], scale, sums[r][o]);
    }
  };
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) multiply(i, 4);
  if (i < count) multiply(i, int(count - i));
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o) out[r * out_stride + o] = Total((Sums)sums[r][o]);
}

// Any number of rows: four outputs share a read of x, two where four would have more sums than there are registers.
template <int R = kFewRows>
void DotPackedRows(int64_t rows, const BFloat16* x, const Mxfp4& weight, int64_t row, int64_t step, int64_t outs, float* out) {
  if constexpr (R > 1) {
    if (rows < R) return DotPackedRows<R - 1>(rows, x, weight, row, step, outs, out);
  }
  constexpr int kTogether = R < 4 ? 4 : 2;
  int64_t o = 0;
  for (; o + kTogether <= outs; o += kTogether) DotPacked<R, kTogether>(x, weight, row + o * step, step, out + o, kTileOuts);
  for (; o < outs; ++o)
    for (int r = 0; r < R; ++r) DotPacked<1, 1>(x + r * InterleavedSize(weight), weight, row + o * step, step, out + r * kTileOuts + o, kTileOuts);
}

// x: interleaved, in whole cache lines. False where exact decoding must have the last word: a scale byte of 255 makes the sum infinite or
// not a number, whatever it scales.
inline bool FewRows(const Mxfp4& weight, int64_t row, int64_t step, int64_t outs, const BFloat16* x, int64_t rows, float* out) {
  DotPackedRows(rows, x, weight, row, step, outs, out);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t o = 0; o < outs; ++o)
      if (!std::isfinite(out[r * kTileOuts + o])) return false;
  return true;
}
#endif

template <typename Weight>
int64_t InterleavedSize(const Weight&) {
  return 0;
}
template <typename T, typename Weight>
void Interleave(const Weight&, const T*, int64_t, T*) {}
template <typename T, typename Weight>
bool FewRows(const Weight&, int64_t, int64_t, int64_t, const T*, int64_t, float*) {
  return false;
}

// --- Threads ---------------------------------------------------------------------------------------------------------------------

// Run body(0 .. count - 1) on XLA's pool and on this thread, which never waits for a task that nobody has begun: a busy pool can't lock it.
template <typename Body>
void ParallelFor(ffi::ThreadPool& pool, int64_t count, int64_t max_threads, const Body& body) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();
  auto work = [shared, count, &body] {  // `body` is gone when a late thread comes, but then no task is left for it
    for (int64_t task; (task = shared->next.fetch_add(1)) < count;) {
      body(task);
      shared->done.fetch_add(1, std::memory_order_release);
    }
  };
  int64_t threads = std::min<int64_t>(pool.num_threads(), count);
  if (max_threads > 0) threads = std::min(threads, max_threads);
  for (int64_t i = 1; i < threads; ++i) pool.Schedule(std::function<void()>(work));
  work();
  while (shared->done.load(std::memory_order_acquire) < count) std::this_thread::yield();
}

// --- The product -----------------------------------------------------------------------------------------------------------------

struct Output {
  void* values;
  const void* bias;  // null where there is none
  bool wide_values, wide_bias;  // float32, otherwise bfloat16
  void Write(int64_t index, int64_t bias_index, float sum) const {
    if (bias) sum += wide_bias ? ((const float*)bias)[bias_index] : Widen(((const BFloat16*)bias)[bias_index]);
    if (wide_values) Narrow(sum, (float*)values + index);
    else Narrow(sum, (BFloat16*)values + index);
  }
};

constexpr int64_t kTaskOuts = 64 * kTileOuts;  // a task: so many outputs of one expert, fewer where threads would go without
constexpr int64_t kRowsInCache = 96;  // rows of x that meet a tile of the weight before the next tile is read

template <typename T>
struct alignas(64) CacheLine {
  T values[64 / sizeof(T)];
};

template <typename T, typename Weight>
void Multiply(ffi::ThreadPool& pool, int64_t max_threads, const T* x, const Weight& weight, const int32_t* groups, int64_t experts,
              const Output& out) {
  struct Group {
    int64_t expert, first, rows, interleaved;  // interleaved: the line of `few` where its rows begin, if they are few
  };
  std::vector<Group> busy;
  std::vector<CacheLine<T>> few;
  for (int64_t expert = 0, first = 0; expert < experts; first += groups[expert++]) {
    if (!groups[expert]) continue;
    busy.push_back({expert, first, groups[expert], int64_t(few.size())});
    if (groups[expert] > kFewRows) continue;
    few.resize(few.size() + groups[expert] * InterleavedSize(weight) * sizeof(T) / sizeof few[0]);
    Interleave(weight, x + first * weight.size, groups[expert], (T*)(few.data() + busy.back().interleaved));
  }
  const int64_t outs = weight.outs, size = weight.size, share = int64_t(busy.size()) * outs / (8 * pool.num_threads() * kTileOuts) * kTileOuts;
  const int64_t task_outs = std::clamp(share, kTaskOuts / 8, kTaskOuts), tasks = (outs + task_outs - 1) / task_outs;
  ParallelFor(pool, int64_t(busy.size()) * tasks, max_threads, [&](int64_t task) {
    static thread_local std::vector<T> buffer;
    if (int64_t(buffer.size()) < kTileOuts * size) buffer.resize(kTileOuts * size);
    const Group group = busy[task / tasks];
    const int64_t begin = task % tasks * task_outs, end = std::min(begin + task_outs, outs);
    // A tile's rows lie far apart: each is of a stream that goes on from tile to tile, as prefetchers like it.
    const int64_t step = (end - begin) / kTileOuts;
    for (int64_t top = 0; top < group.rows; top += kRowsInCache) {
      const int64_t rows = std::min(kRowsInCache, group.rows - top), first = group.first + top;
      const auto multiply = [&](int64_t o, int64_t count) {
        float sums[kRowsInCache * kTileOuts];
        const int64_t row = group.expert * outs + o;
        if (group.rows > kFewRows || !FewRows(weight, row, step, count, (const T*)(few.data() + group.interleaved), rows, sums)) {
          const auto tile = weight.Rows(row, step, count, buffer.data());
          Products(rows, x + first * size, count, tile.values, tile.stride, size, sums, kTileOuts);
        }
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t j = 0; j < count; ++j)
            out.Write((first + r) * outs + o + j * step, row + j * step, sums[r * kTileOuts + j]);
      };
      for (int64_t o = begin; o < begin + step; ++o) multiply(o, kTileOuts);
      for (int64_t o = begin + step * kTileOuts; o < end; ++o) multiply(o, 1);
    }
  });
}

template <typename Weight>
void MultiplyAs(bool wide_x, const void* x, int64_t count, ffi::ThreadPool& pool, int64_t max_threads, const Weight& weight,
                const int32_t* groups, int64_t experts, const Output& out) {
  if (wide_x) return Multiply(pool, max_threads, (const float*)x, weight, groups, experts, out);
  const BFloat16* narrow = (const BFloat16*)x;
  if constexpr (Operand<BFloat16>::kMultiplies) {
    Multiply(pool, max_threads, narrow, weight, groups, experts, out);
  } else {
    std::vector<float> wide(count);
    for (int64_t i = 0; i < count; ++i) wide[i] = Widen(narrow[i]);
    Multiply(pool, max_threads, (const float*)wide.data(), weight, groups, experts, out);
  }
}

// x [M, in] float32 or bfloat16, rows sorted by expert; weight uint8 [E, outs, in / 32, 16] with scales uint8 [E, outs, in / 32], or
// bfloat16 [E, outs, in] with empty scales; bias [E, outs] float32 or bfloat16, or empty; groups int32 [E], rows of each expert.
// Rows past the groups' sum give zeros. Shapes are the caller's to check (kernels/cpu_library.py).
ffi::Error MatmulHandler(ffi::ThreadPool pool, int64_t max_threads, ffi::AnyBuffer x, ffi::AnyBuffer weight, ffi::Buffer<ffi::U8> scales,
                         ffi::AnyBuffer bias, ffi::Buffer<ffi::S32> groups, ffi::Result<ffi::AnyBuffer> out) {
  const int64_t rows = x.dimensions()[0], size = x.dimensions()[1], outs = weight.dimensions()[1], experts = groups.dimensions()[0];
  const bool wide_x = x.element_type() == ffi::F32;
  const Output output{out->untyped_data(), bias.element_count() ? bias.untyped_data() : nullptr, out->element_type() == ffi::F32,
                      bias.element_type() == ffi::F32};
  int64_t given = 0;
  for (int64_t expert = 0; expert < experts; ++expert) {
    if (groups.typed_data()[expert] < 0) return ffi::Error::InvalidArgument("group sizes must not be negative");
    given += groups.typed_data()[expert];
  }
  if (given > rows) return ffi::Error::InvalidArgument("group sizes sum to more than the rows");
  const int64_t row_bytes = outs * (output.wide_values ? 4 : 2);
  std::memset((char*)out->untyped_data() + given * row_bytes, 0, (rows - given) * row_bytes);
  if (scales.element_count()) {
    const Mxfp4 packed{(const uint8_t*)weight.untyped_data(), scales.typed_data(), outs, size};
    MultiplyAs(wide_x, x.untyped_data(), rows * size, pool, max_threads, packed, groups.typed_data(), experts, output);
  } else {
    const Dense<BFloat16> dense{(const BFloat16*)weight.untyped_data(), outs, size};
    MultiplyAs(wide_x, x.untyped_data(), rows * size, pool, max_threads, dense, groups.typed_data(), experts, output);
  }
  return ffi::Error::Success();
}

// --- Attention of one query a row over a cache -----------------------------------------------------------------------------------------

struct AttentionShape {
  int64_t heads, kv_heads, slots, size, window;  // window 0: none
};

// out[g][s] = dot(q row g, k row s) for G rows of q and rows of k `stride` apart.
template <typename T>
void Scores(int64_t group, const T* q, int64_t count, const T* k, int64_t stride, int64_t size, float* out, int64_t out_stride) {
  int64_t done = 0;
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    constexpr int kKeyOf[16] = {0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15};  // so that Totals gives them in their order
    for (; size % Operand<T>::kWidth == 0 && done + 16 <= count; done += 16)
      for (int64_t g = 0; g < group; ++g) {
        Sums sums[16] = {};
        for (int64_t h = 0; h < size; h += Operand<T>::kWidth) {
          const auto row = Operand<T>::Load(q + g * size + h);
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i) sums[i] = Operand<T>::MultiplyAdd(row, Operand<T>::Load(k + (done + kKeyOf[i]) * stride + h), sums[i]);
        }
        const Sums totals = Totals(sums);
        std::memcpy(out + g * out_stride + done, &totals, sizeof totals);
      }
  }
#endif
  if constexpr (Operand<T>::kMultiplies) {
    Products(group, q, count - done, k + done * stride, stride, size, out + done, out_stride);
  } else {
    for (int64_t g = 0; g < group; ++g)
      for (int64_t s = 0; s < count; ++s) {
        float sum = 0;
        for (int64_t h = 0; h < size; ++h) sum += Widen(q[g * size + h]) * Widen(k[s * stride + h]);
        out[g * out_stride + s] = sum;
      }
  }
}

// One row of the batch and one key-value head: softmax over what is visible of k [slots], a sink per query head opening it, times v.
template <typename T>
void AttendHead(const AttentionShape& shape, const T* q, const T* k, const T* v, const float* sinks, int32_t position, const int32_t* positions,
                T* out) {
  const int64_t group = shape.heads / shape.kv_heads, stride = shape.kv_heads * shape.size, size = shape.size;
  const auto visible = [&](int64_t s) {
    const int64_t distance = int64_t{position} - positions[s];
    return positions[s] >= 0 && distance >= 0 && (!shape.window || distance < shape.window);
  };
  int64_t first = 0, last = shape.slots;  // what of the cache is read
  while (last && !visible(last - 1)) --last;
  while (first < last && !visible(first)) ++first;
  k += first * stride, v += first * stride;
  const int64_t count = last - first, padded = (count + kLanes - 1) / kLanes * kLanes;
  static thread_local std::vector<float> scores;  // [group, padded]: whole registers
  if (int64_t(scores.size()) < group * padded) scores.resize(group * padded);
  for (int64_t s = 0; s < count; ++s)  // short rows far apart: no prefetcher foresees them
    for (int64_t h = 0; h < size; h += 64 / sizeof(T)) {
      __builtin_prefetch(k + s * stride + h);
      __builtin_prefetch(v + s * stride + h, 0, 2);
    }
  Scores(group, q, count, k, stride, size, scores.data(), padded);
  for (int64_t s = 0; s < padded; ++s)
    if (s >= count || !visible(first + s))
      for (int64_t g = 0; g < group; ++g) scores[g * padded + s] = -INFINITY;
  const float scale = 1 / std::sqrt(float(size));
  for (int64_t g = 0; g < group; ++g) {
    float* row = scores.data() + g * padded;
    Sums tops = Sums{} + sinks[g], totals = {};
    for (int64_t s = 0; s < padded; s += kLanes) {
      const Sums scaled = Spread(row + s, kLanes) * scale;
      tops = scaled > tops ? scaled : tops;
      std::memcpy(row + s, &scaled, sizeof scaled);
    }
    float top = sinks[g];
    for (int lane = 0; lane < kLanes; ++lane) top = std::max(top, tops[lane]);
    for (int64_t s = 0; s < padded; s += kLanes) {
      const Sums weights = Exponential(Spread(row + s, kLanes) - top);
      totals += weights;
      std::memcpy(row + s, &weights, sizeof weights);
    }
    const float share = 1 / (Total(totals) + std::exp(sinks[g] - top));
    for (int64_t s = 0; s < padded; ++s) row[s] *= share;
  }
  constexpr int kTogether = 8;  // query heads that share a read of v
  for (int64_t h = 0; h < size; h += kLanes)
    for (int64_t g = 0; g < group; g += kTogether) {
      const int64_t lanes = std::min<int64_t>(kLanes, size - h), heads = std::min<int64_t>(kTogether, group - g);
      Sums sums[kTogether] = {};
      for (int64_t s = 0; s < count; ++s) {
        const Sums value = Spread(v + s * stride + h, lanes);
        for (int64_t i = 0; i < kTogether; ++i) sums[i] += scores[(g + std::min(i, heads - 1)) * padded + s] * value;
      }
      for (int64_t i = 0; i < heads; ++i)
        for (int64_t lane = 0; lane < lanes; ++lane) Narrow(sums[i][lane], out + (g + i) * size + h + lane);
    }
}

// q, out [B, N, H]; k, v [B, S, K, H], all float32 or all bfloat16; sinks float32 [N]; q_positions int32 [B]; k_positions int32 [B, S].
ffi::Error AttentionHandler(ffi::ThreadPool pool, int64_t max_threads, int64_t window, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                            ffi::Buffer<ffi::F32> sinks, ffi::Buffer<ffi::S32> q_positions, ffi::Buffer<ffi::S32> k_positions,
                            ffi::Result<ffi::AnyBuffer> out) {
  const AttentionShape shape{q.dimensions()[1], k.dimensions()[2], k.dimensions()[1], q.dimensions()[2], window};
  const int64_t group = shape.heads / shape.kv_heads, cache = shape.slots * shape.kv_heads * shape.size;
  const auto attend = [&](auto kind) {
    using T = decltype(kind);
    ParallelFor(pool, q.dimensions()[0] * shape.kv_heads, max_threads, [&](int64_t task) {
      const int64_t row = task / shape.kv_heads, head = task % shape.kv_heads, first = (row * shape.heads + head * group) * shape.size;
      const int64_t offset = row * cache + head * shape.size;
      AttendHead(shape, (const T*)q.untyped_data() + first, (const T*)k.untyped_data() + offset, (const T*)v.untyped_data() + offset,
                 sinks.typed_data() + head * group, q_positions.typed_data()[row], k_positions.typed_data() + row * shape.slots,
                 (T*)out->untyped_data() + first);
    });
  };
  if (q.element_type() == ffi::F32) attend(float{});
  else attend(BFloat16{});
  return ffi::Error::Success();
}

// old, out [B, S, ...], given the same memory by XLA; rows [B, T, ...] of the same type; slots int32 [B, T]: where each goes, out of bounds: nowhere.
ffi::Error WriteHandler(ffi::AnyBuffer old, ffi::AnyBuffer rows, ffi::Buffer<ffi::S32> slots, ffi::Result<ffi::AnyBuffer> out) {
  if (old.untyped_data() != out->untyped_data()) return ffi::Error::Internal("the cache isn't written in place");
  const int64_t batch = slots.dimensions()[0], count = slots.dimensions()[1], size = old.dimensions()[1];
  if (!slots.element_count()) return ffi::Error::Success();
  const int64_t bytes = rows.size_bytes() / slots.element_count();
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t t = 0; t < count; ++t) {
      const int64_t slot = slots.typed_data()[b * count + t];
      if (slot < 0 || slot >= size) continue;
      std::memcpy((char*)out->untyped_data() + (b * size + slot) * bytes, (const char*)rows.untyped_data() + (b * count + t) * bytes, bytes);
    }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(GptossMatmul, MatmulHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("max_threads")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(GptossAttention, AttentionHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("max_threads")
                                  .Attr<int64_t>("window")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(GptossWrite, WriteHandler,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>());
