// Products summed along the stored rows: y = x . w^T.
//
// The numbers of a row come out of their bytes in another order than that of x, and x is put into theirs, once for a
// call. With few rows of x, each row of w is decoded in registers and multiplied with all of them. With many, a
// block of w is decoded to floats that stay in the cache, and multiplied 16 or 32 rows of x at a time.
#pragma once
#include "chunks.h"

namespace eqquant::EQQUANT_LEVEL {

constexpr int FEW = 8;                   // rows of x
constexpr int64_t AHEAD = 4096;          // bytes to be fetched ahead of those that are decoded
constexpr int64_t WORK = 1 << 18;        // products that are worth a chunk of work

template <class W> void in_order(const Matrix& w, const int32_t* order, const float* x, float* out) {
  if (W::PLACES == 1 && w.stored == w.tile) {
    memcpy(out, x, w.length * sizeof(float));
    memset(out + w.length, 0, (padded<W>(w) - w.length) * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < padded<W>(w); i++) out[i] = order[i] < 0 ? 0 : x[order[i]];
}

// ROWS rows of w times M rows of x. SEGMENT: how many chunks share a scale, if that is a constant.
template <class W, int M, int ROWS, int SEGMENT>
void few_rows(const Problem& p, const W& format, const Scales& scales, const float* x, int64_t ldx, float* y, int64_t first, int64_t last) {
  const Matrix& w = p.w;
  const int64_t chunks = chunks_of(w), whole = w.bytes / CHUNK, in_segment = SEGMENT ? SEGMENT : scales.chunks;
  const int64_t ahead = up(AHEAD, ROWS * w.bytes);  // in rows that are not being read yet
  for (int64_t n = first; n < last; n += ROWS) {
    F total[ROWS][M];
    const uint8_t* row[ROWS];
    const float* scale[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      const int64_t at = std::min(n + r, last - 1);
      row[r] = w.codes + at * w.bytes;
      scale[r] = w.scales_of(at);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) total[r][m] = zeros();
    }
    for (int64_t segment = 0, begin = 0; begin < chunks; segment++, begin += in_segment) {
      F part[ROWS][M];
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) part[r][m] = zeros();
      auto multiply = [&](int64_t c, bool is_whole) __attribute__((always_inline)) {
        const float* xc = x + c * CHUNK * W::PLACES;
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
          F v[W::PLACES];
          if (is_whole) {
            if (c % 4 == r % 4) prefetch(row[r] + c * CHUNK + ahead);
            format.decode(row[r] + c * CHUNK, v);
          } else {
            decode(format, w, row[r], c, v);
          }
#pragma GCC unroll 8
          for (int place = 0; place < W::PLACES; place++)
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) part[r][m] = fma(v[place], load(xc + m * ldx + place * LANES), part[r][m]);
        }
      };
      const int64_t end = std::min(begin + in_segment, whole);
      if (SEGMENT && end == begin + SEGMENT) {
#pragma GCC unroll 8
        for (int64_t c = 0; c < SEGMENT; c++) multiply(begin + c, true);
      } else {
        for (int64_t c = begin; c < end; c++) multiply(c, true);
        if (std::min(begin + in_segment, chunks) > whole) multiply(whole, false);
      }
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        const F s = scales.of_segment(scale[r], segment);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) total[r][m] = fma(part[r][m], s, total[r][m]);
      }
    }
    for (int r = 0; r < ROWS && n + r < last; r++)
      for (int m = 0; m < M; m++) y[m * w.rows + n + r] = sum(total[r][m]);
  }
}

template <class W, int SEGMENT> void few(const Problem& p, const Scales& scales, const Pool& pool) {
  const Matrix& w = p.w;
  const W format(w);
  const int64_t ldx = padded<W>(w);
  const int32_t* order = order_of<W>(w);
  float* x = for_inputs.get<float>(p.m * ldx);
  for (int64_t m = 0; m < p.m; m++) in_order<W>(w, order, p.x + m * w.length, x + m * ldx);
  const int64_t parts = std::max<int64_t>(1, w.rows * w.length / WORK), each = up((w.rows + parts - 1) / parts, 8);
  pool.each((w.rows + each - 1) / each, [&](int64_t i) {
    const int64_t first = i * each, last = std::min(w.rows, first + each);
    int64_t m = 0;
    for (; m + 4 <= p.m; m += 4) few_rows<W, 4, EQQUANT_WIDE ? 4 : 1, SEGMENT>(p, format, scales, x + m * ldx, ldx, p.y + m * w.rows, first, last);
    for (; m + 2 <= p.m; m += 2) few_rows<W, 2, EQQUANT_WIDE ? 4 : 2, SEGMENT>(p, format, scales, x + m * ldx, ldx, p.y + m * w.rows, first, last);
    for (; m < p.m; m++) few_rows<W, 1, EQQUANT_WIDE ? 8 : 4, SEGMENT>(p, format, scales, x + m * ldx, ldx, p.y + m * w.rows, first, last);
  });
}

// out[j][VECTORS * 16 rows of x] += sum over k of w[j][k] x[k][VECTORS * 16 rows]
template <int VECTORS, int N> void panel(const float* x, const float* w, int64_t ldw, int64_t count, float* out, int64_t ldo, bool first) {
  F acc[N][VECTORS];
#pragma GCC unroll 24
  for (int j = 0; j < N; j++)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) acc[j][v] = zeros();
  for (int64_t k = 0; k < count; k++) {
    F xv[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) xv[v] = load(x + (k * VECTORS + v) * LANES);
#pragma GCC unroll 24
    for (int j = 0; j < N; j++) {
      const F b = splat(w[j * ldw + k]);
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; v++) acc[j][v] = fma(xv[v], b, acc[j][v]);
    }
  }
#pragma GCC unroll 24
  for (int j = 0; j < N; j++)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) {
      float* o = out + j * ldo + v * LANES;
      store(o, first ? acc[j][v] : add(acc[j][v], load(o)));
    }
}

// Rows of x as out[number][L rows], for some of the numbers in this order; without one, in their own. Zeros where there are
// none.
template <int64_t L> void pack_panel(const float* x, int64_t rows, int64_t length, const int32_t* order, int64_t begin, int64_t end, float* out) {
  for (int64_t l = 0; l < L; l++) {
    const float* row = x + l * length;
    for (int64_t k = begin; k < end; k++) {
      const int64_t at = order ? order[k] : k < length ? k : -1;
      out[k * L + l] = l < rows && at >= 0 ? row[at] : 0;
    }
  }
}

template <class W, int VECTORS, int N> void many(const Problem& p, const Scales& scales, const Pool& pool) {
  constexpr int64_t LONG = 256;          // numbers of a row: their sum is rounded little
  constexpr int64_t HIGH = 144;          // rows of w in a block, a multiple of N
  constexpr int64_t LD = LONG + LANES;   // rows at a power of 2 would share one set of the cache
  constexpr int64_t L = VECTORS * LANES, BROAD = 256 / L;  // rows of x in a panel; panels in a block
  static_assert(HIGH % N == 0);
  const Matrix& w = p.w;
  const W format(w);
  const int64_t length = padded<W>(w), panels = (p.m + L - 1) / L;
  const int32_t* order = order_of<W>(w);
  float* x = for_inputs.get<float>(panels * L * length);
  constexpr int64_t CUT = 256;
  const int64_t cuts = (length + CUT - 1) / CUT;
  pool.each(panels * cuts, [&](int64_t i) {  // x as [panel][number][row]
    const int64_t begin = i % cuts * CUT, end = std::min(length, begin + CUT), row = i / cuts * L;
    pack_panel<L>(p.x + row * w.length, std::min(L, p.m - row), w.length, order, begin, end, x + row * length);
  });
  const int64_t high = (w.rows + HIGH - 1) / HIGH, broad = (panels + BROAD - 1) / BROAD;
  pool.each(high * broad, [&](int64_t i) {
    const int64_t first = i / broad * HIGH, rows = std::min(HIGH, w.rows - first);
    const int64_t begin = i % broad * BROAD, end = std::min(panels, begin + BROAD), ldy = (end - begin) * L + LANES;
    float* block = for_weights.get<float>(HIGH * LD);
    float* y = for_outputs.get<float>(HIGH * ldy);
    constexpr int64_t STEP = LONG / (CHUNK * W::PLACES) > 0 ? LONG / (CHUNK * W::PLACES) : 1;  // chunks
    for (int64_t c = 0; c < chunks_of(w); c += STEP) {
      const int64_t stop = std::min(chunks_of(w), c + STEP);
      for (int64_t n = 0; n < up(rows, N); n++) {
        const int64_t at = first + std::min(n, rows - 1);
        const float* scale = w.scales_of(at);
        float* out = block + n * LD;
        for (int64_t d = c; d < stop; d++) {
          F v[W::PLACES];
          decode(format, w, w.codes + at * w.bytes, d, v);
          const F s = scales.of_segment(scale, d / scales.chunks);
          for (int place = 0; place < W::PLACES; place++, out += LANES) store(out, mul(v[place], s));
        }
      }
      const int64_t k = c * CHUNK * W::PLACES, count = (stop - c) * CHUNK * W::PLACES;
      for (int64_t q = begin; q < end; q++)
        for (int64_t n = 0; n < rows; n += N) panel<VECTORS, N>(x + q * L * length + k * L, block + n * LD, LD, count, y + n * ldy + (q - begin) * L, ldy, c == 0);
    }
    for (int64_t m = begin * L; m < std::min(end * L, p.m); m++)
      for (int64_t n = 0; n < rows; n++) p.y[m * w.rows + first + n] = y[n * ldy + m - begin * L];
  });
}

template <class W> void along(const Problem& p, const Pool& pool) {
  const Scales scales(p.w);
  if (p.m > FEW) {
    if constexpr (EQQUANT_WIDE) return p.m > LANES ? many<W, 2, 12>(p, scales, pool) : many<W, 1, 24>(p, scales, pool);
    else return many<W, 1, 6>(p, scales, pool);
  }
  if (scales.count > 1 && scales.chunks == 1) return few<W, 1>(p, scales, pool);
  if (scales.count > 1 && scales.chunks == 2) return few<W, 2>(p, scales, pool);
  if (scales.count > 1 && scales.chunks == 4) return few<W, 4>(p, scales, pool);
  few<W, 0>(p, scales, pool);
}

}  // namespace eqquant::EQQUANT_LEVEL
