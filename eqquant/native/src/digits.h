// Products of integers, summed along the stored rows: y = x . w^T by digits of x.
//
// Processors multiply 8-bit integers four times as fast as floats. The numbers of a row of x are written as integers of 24
// bits, times a unit that is a power of two: three digits d0 256^2 + d1 256 + d2 between -128 and 127. With w = low + code
// (or low + 2 code, in the codes of bits), and u the unit,
//
//   sum_k w_k x_k = u (256^2 sum_k w_k d0_k + 256 sum_k w_k d1_k + sum_k w_k d2_k)
//   sum_k w_k d_k = sum_k code_k d_k + low sum_k d_k
//
// where the codes are unsigned bytes, as the instruction wants one operand to be. All sums are of integers, without
// rounding; and so the product of integers is an exact one. Where x is rounded to 8 bits already, one digit serves, and
// the unit is the largest |x| over 127.
#pragma once
#include <atomic>
#include <cfloat>
#include <cmath>
#include "chunks.h"

#if defined(__AVX512VNNI__) && EQQUANT_WIDE
namespace eqquant::EQQUANT_LEVEL {

constexpr int64_t GROUP = 64;              // bytes of a row that are decoded at once
constexpr int64_t MAX_LENGTH = 1 << 16;    // 65536 products of 255 and 127 do not exceed 32 bits
constexpr float BASE = 256, LARGEST = 127 * BASE * BASE;

// The codes in 64 bytes of a row, place by place.
struct Int8Codes {
  static constexpr int PLACES = 1, LOW = -128;
  void decode(__m512i bytes, __m512i v[PLACES]) const { v[0] = _mm512_xor_si512(bytes, _mm512_set1_epi8(-128)); }
};
struct TernaryCodes {
  static constexpr int PLACES = 5, LOW = -1;
  void decode(__m512i fraction, __m512i v[PLACES]) const {
    const __m512i one = _mm512_set1_epi8(1), two = _mm512_set1_epi8(2);
#pragma GCC unroll 5
    for (int i = 0; i < PLACES; i++) {  // the integer part of the fraction times 3, and what is left of it
      const __mmask64 positive = _mm512_cmpge_epu8_mask(fraction, _mm512_set1_epi8(86)), above = _mm512_cmpge_epu8_mask(fraction, _mm512_set1_epi8(static_cast<char>(171)));
      v[i] = _mm512_mask_mov_epi8(_mm512_maskz_mov_epi8(positive, one), above, two);
      if (i + 1 < PLACES) fraction = _mm512_add_epi8(fraction, _mm512_add_epi8(fraction, fraction));
    }
  }
};
template <int STEP, int LOWEST> struct BitCodes {
  static constexpr int PLACES = 8, LOW = LOWEST;
  void decode(__m512i bytes, __m512i v[PLACES]) const {
#pragma GCC unroll 8
    for (int i = 0; i < PLACES; i++) v[i] = _mm512_maskz_mov_epi8(_mm512_test_epi8_mask(bytes, _mm512_set1_epi8(static_cast<char>(1 << i))), _mm512_set1_epi8(STEP));
  }
};

inline __m512i group(const Matrix& w, int64_t row, int64_t g) {
  const uint8_t* p = w.codes + row * w.bytes + g * GROUP;
  const int64_t left = w.bytes - g * GROUP;
  return left >= GROUP ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8((1ull << left) - 1, p);
}

// The D digits of a row of x in the order of the codes: out[digit * ldd + i / 64 * stride + i % 64]. False if a number
// is not finite.
template <int D> bool digits_of(const float* x, const int32_t* order, int64_t length, int64_t count, int8_t* out, int64_t ldd, int64_t stride, float* unit, int32_t* sums) {
  __m512 most = _mm512_setzero_ps();
  bool finite = true;
  for (int64_t k = 0; k < length; k += LANES) {
    const __mmask16 here = length - k >= LANES ? 0xffff : static_cast<__mmask16>((1u << (length - k)) - 1);
    const __m512 a = _mm512_abs_ps(_mm512_maskz_loadu_ps(here, x + k));
    finite &= _mm512_cmp_ps_mask(a, _mm512_set1_ps(FLT_MAX), _CMP_LE_OQ) == 0xffff;
    most = _mm512_max_ps(most, a);
  }
  if (!finite) return false;
  const float largest = _mm512_reduce_max_ps(most);
  int exponent;
  std::frexp(largest / LARGEST, &exponent);
  const float u = std::max(D == 1 ? largest / 127 : std::ldexp(1.0f, exponent), FLT_MIN);
  __m512i sum[D];
  for (int d = 0; d < D; d++) sum[d] = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += LANES) {
    const __m512i at = _mm512_loadu_si512(order + i);
    const __m512 numbers = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), _mm512_cmpge_epi32_mask(at, _mm512_setzero_si512()), at, x, 4);
    __m512i rest = _mm512_cvtps_epi32(_mm512_div_ps(numbers, _mm512_set1_ps(u)));
    for (int d = D - 1; d >= 0; d--) {  // the last digit first, and what is left of the number
      const __m512i digit = d ? _mm512_srai_epi32(_mm512_slli_epi32(rest, 24), 24) : rest;
      sum[d] = _mm512_add_epi32(sum[d], digit);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + d * ldd + i / GROUP * stride + i % GROUP), _mm512_cvtepi32_epi8(digit));
      rest = _mm512_srai_epi32(_mm512_sub_epi32(rest, digit), 8);
    }
  }
  *unit = u;
  for (int d = 0; d < D; d++) sums[d] = _mm512_reduce_add_epi32(sum[d]);
  return true;
}

// ROWS rows of w times COLUMNS rows of digits, side by side: [group][place][COLUMNS][64].
template <class W, int COLUMNS, int ROWS> void few_digits(const Matrix& w, const int8_t* x, int64_t first, int64_t last, int32_t out[ROWS][COLUMNS]) {
  const int64_t groups = (w.bytes + GROUP - 1) / GROUP, ahead = up(4096, ROWS * w.bytes);
  __m512i total[ROWS][COLUMNS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 12
    for (int c = 0; c < COLUMNS; c++) total[r][c] = _mm512_setzero_si512();
  for (int64_t g = 0; g < groups; g++) {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      const int64_t row = std::min(first + r, last - 1);
      prefetch(w.codes + row * w.bytes + g * GROUP + ahead);
      __m512i v[W::PLACES];
      W().decode(group(w, row, g), v);
#pragma GCC unroll 8
      for (int place = 0; place < W::PLACES; place++)
#pragma GCC unroll 12
        for (int c = 0; c < COLUMNS; c++) total[r][c] = _mm512_dpbusd_epi32(total[r][c], v[place], _mm512_loadu_si512(x + ((g * W::PLACES + place) * COLUMNS + c) * GROUP));
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 12
    for (int c = 0; c < COLUMNS; c++) out[r][c] = _mm512_reduce_add_epi32(total[r][c]);
}

// Up to 8 rows of x, of which COLUMNS at a time. False if one holds numbers that are not finite.
template <class W, int D> bool few_by_digits(const Problem& p, const Pool& pool) {
  constexpr int ROWS = 4, MOST = D == 1 ? 4 : 2, LIMIT = 8;
  const Matrix& w = p.w;
  const int64_t count = up(w.bytes, GROUP) * W::PLACES;
  const int32_t* order = order_of<W, GROUP>(w);
  int8_t* x = for_inputs.get<int8_t>(p.m * D * count);
  float unit[LIMIT];
  int32_t sums[LIMIT][D];
  auto together = [&](int64_t m) -> int64_t { return p.m - m >= MOST ? MOST : p.m - m >= 2 ? 2 : 1; };
  for (int64_t m = 0; m < p.m; m += together(m))
    for (int64_t q = 0, n = together(m); q < n; q++)
      if (!digits_of<D>(p.x + (m + q) * w.length, order, w.length, count, x + m * D * count + q * D * GROUP, GROUP, n * D * GROUP, unit + m + q, sums[m + q])) return false;
  const int64_t parts = std::max<int64_t>(1, w.rows * w.length >> 18), each = up((w.rows + parts - 1) / parts, 8);
  pool.each((w.rows + each - 1) / each, [&](int64_t i) {
    const int64_t begin = i * each, last = std::min(w.rows, begin + each);
    for (int64_t m = 0; m < p.m; m += together(m)) {
      const int64_t columns = together(m);
      for (int64_t n = begin; n < last; n += ROWS) {
        int32_t out[ROWS * MOST * D];
        const int8_t* digits = x + m * D * count;
        if (columns == 1) few_digits<W, D, ROWS>(w, digits, n, last, reinterpret_cast<int32_t(*)[D]>(out));
        else if (columns == 2) few_digits<W, 2 * D, ROWS>(w, digits, n, last, reinterpret_cast<int32_t(*)[2 * D]>(out));
        else few_digits<W, MOST * D, ROWS>(w, digits, n, last, reinterpret_cast<int32_t(*)[MOST * D]>(out));
        for (int r = 0; r < ROWS && n + r < last; r++)
          for (int64_t q = 0; q < columns; q++) {
            double sum = 0;  // holds all of it
            for (int d = 0; d < D; d++) sum = sum * BASE + (static_cast<double>(out[(r * columns + q) * D + d]) + static_cast<double>(W::LOW) * sums[m + q][d]);
            p.y[(m + q) * w.rows + n + r] = static_cast<float>(sum * unit[m + q]) * *w.scales_of(n + r);
          }
      }
    }
  });
  return true;
}

// acc[j][v][16 rows of x] = sum over k of w[j][k] x[k][v][16 rows], four numbers of k side by side.
template <int VECTORS, int N> void panel_of_digits(const int8_t* x, const uint8_t* w, int64_t ldw, int64_t fours, __m512i acc[N][VECTORS]) {
  __m512i a[N][VECTORS];
#pragma GCC unroll 24
  for (int j = 0; j < N; j++)
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; v++) a[j][v] = _mm512_setzero_si512();
  for (int64_t k = 0; k < fours; k++) {
    __m512i xv[VECTORS];
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; v++) xv[v] = _mm512_loadu_si512(x + (k * VECTORS + v) * GROUP);
#pragma GCC unroll 24
    for (int j = 0; j < N; j++) {
      int32_t four;
      memcpy(&four, w + j * ldw + k * 4, 4);
      const __m512i b = _mm512_set1_epi32(four);
#pragma GCC unroll 3
      for (int v = 0; v < VECTORS; v++) a[j][v] = _mm512_dpbusd_epi32(a[j][v], b, xv[v]);
    }
  }
#pragma GCC unroll 24
  for (int j = 0; j < N; j++)
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; v++) acc[j][v] = a[j][v];
}

// Many rows of x: 16 of them with all their digits in a panel, or 16 * VECTORS with a single one.
template <class W, int D, int VECTORS, int N> bool many_by_digits(const Problem& p, const Pool& pool) {
  constexpr int64_t ROWS = LANES * VECTORS / D;
  static_assert(D == 1 || VECTORS == D);
  const Matrix& w = p.w;
  const int64_t groups = (w.bytes + GROUP - 1) / GROUP, count = groups * GROUP * W::PLACES, panels = (p.m + ROWS - 1) / ROWS;
  const int32_t* order = order_of<W, GROUP>(w);
  int8_t* x = for_inputs.get<int8_t>(panels * count * VECTORS * LANES);
  float* units = for_outputs.get<float>(panels * ROWS * (1 + D));
  int32_t* sums = reinterpret_cast<int32_t*>(units + panels * ROWS);  // [panel][digit][row]
  std::atomic<bool> finite{true};
  pool.each(panels * ROWS, [&](int64_t m) {
    const int64_t panel = m / ROWS, l = m % ROWS;
    int8_t* digits = for_weights.get<int8_t>(D * count);
    int32_t sum[D] = {};
    if (m >= p.m) {
      memset(digits, 0, D * count);
      units[m] = 0;
    } else if (!digits_of<D>(p.x + m * w.length, order, w.length, count, digits, count, GROUP, units + m, sum)) {
      finite.store(false, std::memory_order_relaxed);
      return;
    }
    for (int d = 0; d < D; d++) {
      sums[(panel * D + d) * ROWS + l] = sum[d];
      int8_t* out = x + panel * count * VECTORS * LANES + (D > 1 ? d * LANES + l : l) * 4;
      for (int64_t k = 0; k < count / 4; k++) memcpy(out + k * VECTORS * GROUP, digits + d * count + k * 4, 4);
    }
  });
  if (!finite.load()) return false;
  const int64_t ldw = count + GROUP;
  int64_t high = std::clamp<int64_t>((384 << 10) / count / N * N, N, 12 * N);
  while (high > N && (w.rows + high - 1) / high < 4 * pool.threads()) high -= N;
  pool.each((w.rows + high - 1) / high, [&](int64_t i) {
    const int64_t first = i * high, last = std::min(w.rows, first + high);
    uint8_t* block = for_weights.get<uint8_t>(high * ldw);
    for (int64_t n = first; n < first + up(last - first, N); n++)
      for (int64_t g = 0; g < groups; g++) {
        __m512i v[W::PLACES];
        W().decode(group(w, std::min(n, last - 1), g), v);
        for (int place = 0; place < W::PLACES; place++) _mm512_storeu_si512(block + (n - first) * ldw + (g * W::PLACES + place) * GROUP, v[place]);
      }
    for (int64_t q = 0; q < panels; q++)
      for (int64_t n = first; n < last; n += N) {
        __m512i acc[N][VECTORS];
        panel_of_digits<VECTORS, N>(x + q * count * VECTORS * LANES, block + (n - first) * ldw, ldw, count / 4, acc);
        for (int64_t h = 0; h < ROWS; h += LANES) {
          const int64_t m = q * ROWS + h, left = std::min<int64_t>(p.m - m, LANES);
          if (left <= 0) break;
          const __m512 unit = _mm512_loadu_ps(units + m);
          alignas(64) float y[N][LANES];
          const int64_t columns = std::min<int64_t>(N, last - n);
          for (int64_t j = 0; j < columns; j++) {
            __m512 sum = _mm512_setzero_ps();
            for (int d = 0; d < D; d++) {
              const __m512i low = _mm512_mullo_epi32(_mm512_loadu_si512(sums + (q * D + d) * ROWS + h), _mm512_set1_epi32(W::LOW));
              sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(BASE), _mm512_cvtepi32_ps(_mm512_add_epi32(acc[j][D > 1 ? d : h / LANES], low)));
            }
            _mm512_store_ps(y[j], _mm512_mul_ps(_mm512_mul_ps(sum, unit), _mm512_set1_ps(*w.scales_of(n + j))));
          }
          for (int64_t l = 0; l < left; l++)  // whole pieces of rows: those of 16 rows may share one set of the cache
            for (int64_t j = 0; j < columns; j++) p.y[(m + l) * w.rows + n + j] = y[j][l];
        }
      }
  });
  return true;
}

template <class W> bool with_codes(const Problem& p, const Pool& pool) {
  if (p.rounded) return p.m <= 8 ? few_by_digits<W, 1>(p, pool) : p.m <= LANES ? many_by_digits<W, 1, 1, 24>(p, pool) : many_by_digits<W, 1, 2, 12>(p, pool);
  if (p.m <= 8) return few_by_digits<W, 3>(p, pool);
  // To find the digits of a row takes as long as some hundred products with it.
  if (p.m > LANES && p.w.rows < 2048) return false;
  return many_by_digits<W, 3, 3, 8>(p, pool);
}

// The product by digits. False, and nothing is done, if it is none of integers with a scale for each row, or if x is
// not finite.
inline bool by_digits(const Problem& p, const Pool& pool) {
  if (!p.sum_along_rows || p.w.down || p.w.length > p.w.block || p.w.length > MAX_LENGTH) return false;
  const float *levels = p.w.levels;
  switch (p.code) {
    case Code::int8: return with_codes<Int8Codes>(p, pool);
    case Code::ternary: return levels[0] == -1 && levels[1] == 0 && levels[2] == 1 && with_codes<TernaryCodes>(p, pool);
    case Code::bits:
      if (levels[0] == -1 && levels[1] == 1) return with_codes<BitCodes<2, -1>>(p, pool);
      return levels[0] == 0 && levels[1] == 1 && with_codes<BitCodes<1, 0>>(p, pool);
    default: return false;
  }
}

}  // namespace eqquant::EQQUANT_LEVEL
#else
namespace eqquant::EQQUANT_LEVEL {
inline bool by_digits(const Problem&, const Pool&) { return false; }
}  // namespace eqquant::EQQUANT_LEVEL
#endif
