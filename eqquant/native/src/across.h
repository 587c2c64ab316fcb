// Products summed across the stored rows: y = x . w.
//
// A strip of columns of w is decoded to floats, some rows at a time, and multiplied with all rows of x: 16 columns are
// the lanes of a vector. The sums are in the order in which numbers come out of their bytes until the end.
#pragma once
#include "chunks.h"

namespace eqquant::EQQUANT_LEVEL {

// y[M rows][VECTORS * 16 columns] += x[M rows][count] . w[count][VECTORS * 16 columns]
template <int M, int VECTORS> void strip(const float* x, int64_t ldx, const float* w, int64_t ldw, int64_t count, float* y, int64_t ldy) {
  F acc[M][VECTORS];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) acc[m][v] = zeros();
  for (int64_t k = 0; k < count; k++) {
    F wv[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) wv[v] = load(w + k * ldw + v * LANES);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const F b = splat(x[m * ldx + k]);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) acc[m][v] = fma(b, wv[v], acc[m][v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
      float* o = y + m * ldy + v * LANES;
      store(o, add(acc[m][v], load(o)));
    }
}

// y[M rows][16 * CHUNKS bytes' numbers] += x[M rows][count] . w[count rows][those], decoded in registers.
template <class W, int M, int CHUNKS>
void few_across(const Problem& p, const W& format, const Scales& scales, int64_t k, int64_t count, int64_t first, float* y, int64_t ldy) {
  constexpr int VECTORS = CHUNKS * W::PLACES;
  const Matrix& w = p.w;
  F acc[M][VECTORS];
#pragma GCC unroll 4
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) acc[m][v] = zeros();  // a sum for each block of rows: less rounding
  for (int64_t r = k; r < k + count; r++) {
    const uint8_t* row = w.codes + r * w.bytes;
    const float* scale = w.scales_of(r);
    prefetch(row + count * w.bytes + first * CHUNK);
#pragma GCC unroll 8
    for (int c = 0; c < CHUNKS; c++) {
      F v[W::PLACES];
      if (CHUNKS == 1) decode(format, w, row, first, v);
      else format.decode(row + (first + c) * CHUNK, v);
      const F s = scales.of_segment(scale, (first + c) / scales.chunks);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) {
        const F b = mul(splat(p.x[m * w.rows + r]), s);
#pragma GCC unroll 8
        for (int place = 0; place < W::PLACES; place++) acc[m][c * W::PLACES + place] = fma(b, v[place], acc[m][c * W::PLACES + place]);
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) {
      float* o = y + m * ldy + v * LANES;
      store(o, add(acc[m][v], load(o)));
    }
}

// y[m rows][width columns] += x[m rows][count] . w[count][width], M rows at a time.
template <int M, int VECTORS> void strips(int64_t rows, const float* x, int64_t ldx, const float* w, int64_t ld, int64_t count, int64_t width, float* y) {
  // Rows of x that lie at multiples of a power of 2 would share few sets of the cache.
  float* piece = for_piece.get<float>(rows * count);
  for (int64_t m = 0; m < rows; m++) memcpy(piece + m * count, x + m * ldx, count * sizeof(float));
  int64_t m = 0;
  for (; m + M <= rows; m += M)
    for (int64_t j = 0; j < width; j += VECTORS * LANES) strip<M, VECTORS>(piece + m * count, count, w + j, ld, count, y + m * ld + j, ld);
  for (; m < rows; m++)
    for (int64_t j = 0; j < width; j += VECTORS * LANES) strip<1, VECTORS>(piece + m * count, count, w + j, ld, count, y + m * ld + j, ld);
}

// How many chunks a strip has: at most so many, and less if there are too few strips for all threads.
inline int64_t strip_of(int64_t chunks, int64_t most, const Pool& pool) {
  return std::clamp<int64_t>(up(chunks / (4 * pool.threads()), 4), std::min<int64_t>(4, most), most);
}

template <class W> void across(const Problem& p, const Pool& pool) {
  constexpr int64_t ROWS = 64;       // of w that are decoded at a time
  constexpr int64_t COLUMNS = 512;   // about so many in a strip
  constexpr int M = EQQUANT_WIDE ? 6 : 4, VECTORS = EQQUANT_WIDE ? 4 : 1;
  constexpr int64_t STEP = COLUMNS / (CHUNK * W::PLACES);  // chunks in a strip
  constexpr int64_t WIDTH = (STEP * W::PLACES + VECTORS - 1) / VECTORS * VECTORS * LANES, LD = WIDTH + LANES;
  const Matrix& w = p.w;
  const W format(w);
  const Scales scales(w);
  const int32_t* order = order_of<W>(w);
  const int64_t chunks = chunks_of(w), step = strip_of(chunks, STEP, pool);
  pool.each((chunks + step - 1) / step, [&](int64_t i) {
    const int64_t begin = i * step, end = std::min(chunks, begin + step);
    float* block = for_weights.get<float>(ROWS * LD);
    float* y = for_outputs.get<float>(p.m * LD);
    memset(y, 0, p.m * LD * sizeof(float));
    if ((end - begin) * W::PLACES * LANES < WIDTH) memset(block, 0, ROWS * LD * sizeof(float));
    for (int64_t k = 0; k < w.rows; k += ROWS) {
      const int64_t rows = std::min(ROWS, w.rows - k);
      if (p.m == 1) {
        constexpr int CHUNKS = W::PLACES == 1 ? 8 : W::PLACES == 2 ? 4 : 2;
        int64_t c = begin;
        for (; (c + CHUNKS) * CHUNK <= std::min(end * CHUNK, w.bytes); c += CHUNKS) few_across<W, 1, CHUNKS>(p, format, scales, k, rows, c, y + (c - begin) * CHUNK * W::PLACES, LD);
        for (; c < end; c++) few_across<W, 1, 1>(p, format, scales, k, rows, c, y + (c - begin) * CHUNK * W::PLACES, LD);
        continue;
      }
      for (int64_t r = 0; r < rows; r++) {
        const uint8_t* row = w.codes + (k + r) * w.bytes;
        const float* scale = w.scales_of(k + r);
        float* out = block + r * LD;
        for (int64_t b = begin * CHUNK; b < end * CHUNK; b += 64) prefetch(row + ROWS * w.bytes + b);
        for (int64_t c = begin; c < end; c++) {
          F v[W::PLACES];
          decode(format, w, row, c, v);
          const F s = scales.of_segment(scale, c / scales.chunks);
          for (int place = 0; place < W::PLACES; place++, out += LANES) store(out, mul(v[place], s));
        }
      }
      strips<M, VECTORS>(p.m, p.x + k, w.rows, block, LD, rows, up((end - begin) * W::PLACES, VECTORS) * LANES, y);
    }
    const int32_t* column = order + begin * CHUNK * W::PLACES;
    for (int64_t m = 0; m < p.m; m++)
      for (int64_t j = 0; j < (end - begin) * CHUNK * W::PLACES; j++)
        if (column[j] >= 0) p.y[m * w.length + column[j]] = y[m * LD + j];
  });
}

}  // namespace eqquant::EQQUANT_LEVEL
