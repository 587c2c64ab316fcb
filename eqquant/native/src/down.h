// Products with matrices that are packed down their columns: a stored row holds several rows of numbers.
//
// Sixteen columns are the lanes of a vector, and no number changes its place: only rows do.
#pragma once
#include "across.h"
#include "along.h"

namespace eqquant::EQQUANT_LEVEL {

// The row of numbers that lies in this place of a stored row, or -1.
template <class W> int64_t row_in(const Matrix& w, int64_t stored_row, int place) {
  const int64_t in_tile = (w.high_first ? W::PLACES - 1 - place : place) * w.stored + stored_row % w.stored;
  const int64_t row = stored_row / w.stored * w.tile + in_tile;
  return in_tile < w.tile && row < w.height ? row : -1;
}

// The scales of a stored row, for 16 columns.
struct ColumnScales {
  const Matrix& w;
  int64_t stored_rows;  // that share them
  explicit ColumnScales(const Matrix& w) : w(w), stored_rows(w.row_block >= w.height ? std::max<int64_t>(w.rows, 1) : w.row_block / w.tile * w.stored) {}
  F of(int64_t stored_row, int64_t chunk) const {
    const float* row = w.scales + stored_row / stored_rows * w.blocks();
    if (w.block != 1) return splat(row[0]);
    const int64_t left = w.length - chunk * CHUNK;
    if (left >= CHUNK) return load(row + chunk * CHUNK);
    float rest[CHUNK] = {};
    memcpy(rest, row + chunk * CHUNK, left * sizeof(float));
    return load(rest);
  }
};

// The rows of numbers in a stored row, scaled: out[place][16 * chunks].
template <class W> void decode_row(const W& format, const Matrix& w, const ColumnScales& scales, int64_t stored_row, int64_t begin, int64_t end, float* out, int64_t ldo) {
  const uint8_t* row = w.codes + stored_row * w.bytes;
  for (int64_t c = begin; c < end; c++) {
    F v[W::PLACES];
    decode(format, w, row, c, v);
    const F s = scales.of(stored_row, c);
    for (int place = 0; place < W::PLACES; place++) store(out + place * ldo + (c - begin) * CHUNK, mul(v[place], s));
  }
}

// y[16 * CHUNKS columns] = x . those columns of w, for one row of x, in the order of the places.
template <class W, int CHUNKS> void column_strip(const W& format, const Matrix& w, const ColumnScales& scales, const float* x, int64_t first, float* y) {
  F total[CHUNKS];
  for (int c = 0; c < CHUNKS; c++) total[c] = zeros();
  for (int64_t begin = 0; begin < w.rows;) {
    const int64_t end = std::min({w.rows, begin + 64, (begin / scales.stored_rows + 1) * scales.stored_rows});
    F part[CHUNKS][2];
#pragma GCC unroll 8
    for (int c = 0; c < CHUNKS; c++) part[c][0] = part[c][1] = zeros();
    for (int64_t r = begin; r < end; r++) {
      const uint8_t* row = w.codes + r * w.bytes;
      prefetch(row + 64 * w.bytes + first * CHUNK);
#pragma GCC unroll 8
      for (int c = 0; c < CHUNKS; c++) {
        F v[W::PLACES];
        if (CHUNKS == 1) decode(format, w, row, first, v);
        else format.decode(row + (first + c) * CHUNK, v);
#pragma GCC unroll 8
        for (int place = 0; place < W::PLACES; place++) part[c][place % 2] = fma(splat(x[r * W::PLACES + place]), v[place], part[c][place % 2]);
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < CHUNKS; c++) total[c] = fma(add(part[c][0], part[c][1]), scales.of(begin, first + c), total[c]);
    begin = end;
  }
  for (int c = 0; c < CHUNKS; c++) store(y + c * LANES, total[c]);
}

template <class W> void across_down(const Problem& p, const Pool& pool) {
  constexpr int64_t ROWS = 64 / W::PLACES, STEP = 32;  // stored rows, and chunks, that are decoded at a time
  constexpr int M = EQQUANT_WIDE ? 6 : 4, VECTORS = EQQUANT_WIDE ? 4 : 1, CHUNKS = 4;
  constexpr int64_t LD = STEP * CHUNK + LANES;
  const Matrix& w = p.w;
  const W format(w);
  const ColumnScales scales(w);
  const int64_t chunks = chunks_of(w), ldx = w.rows * W::PLACES, step = strip_of(chunks, STEP, pool);
  float* x = for_inputs.get<float>(p.m * ldx + 1);
  for (int64_t r = 0; r < w.rows; r++)
    for (int place = 0; place < W::PLACES; place++) {
      const int64_t row = row_in<W>(w, r, place);
      for (int64_t m = 0; m < p.m; m++) x[m * ldx + r * W::PLACES + place] = row < 0 ? 0 : p.x[m * w.height + row];
    }
  pool.each((chunks + step - 1) / step, [&](int64_t i) {
    const int64_t begin = i * step, end = std::min(chunks, begin + step), width = std::min(w.length, end * CHUNK) - begin * CHUNK;
    float* y = for_outputs.get<float>(p.m * LD);
    if (p.m == 1) {
      int64_t c = begin;
      for (; (c + CHUNKS) * CHUNK <= std::min(end * CHUNK, w.bytes); c += CHUNKS) column_strip<W, CHUNKS>(format, w, scales, x, c, y + (c - begin) * CHUNK);
      for (; c < end; c++) column_strip<W, 1>(format, w, scales, x, c, y + (c - begin) * CHUNK);
    } else {
      float* block = for_weights.get<float>(ROWS * W::PLACES * LD);
      memset(block, 0, ROWS * W::PLACES * LD * sizeof(float));
      memset(y, 0, p.m * LD * sizeof(float));
      for (int64_t k = 0; k < w.rows; k += ROWS) {
        const int64_t rows = std::min(ROWS, w.rows - k), count = rows * W::PLACES;
        for (int64_t r = 0; r < rows; r++) {
          for (int64_t b = begin * CHUNK; b < end * CHUNK; b += 64) prefetch(w.codes + (k + r + ROWS) * w.bytes + b);
          decode_row(format, w, scales, k + r, begin, end, block + r * W::PLACES * LD, LD);
        }
        strips<M, VECTORS>(p.m, x + k * W::PLACES, ldx, block, LD, count, up(width, VECTORS * LANES), y);
      }
    }
    for (int64_t m = 0; m < p.m; m++) memcpy(p.y + m * w.length + begin * CHUNK, y + m * LD, width * sizeof(float));
  });
}

// The products of some stored rows with one row of x, padded: y[row].
template <class W> void row_sums(const Problem& p, const W& format, const ColumnScales& scales, const float* x, float* y, int64_t first, int64_t last) {
  const Matrix& w = p.w;
  for (int64_t r = first; r < last; r++) {
    F total[W::PLACES];
    for (int place = 0; place < W::PLACES; place++) total[place] = zeros();
    for (int64_t c = 0; c < chunks_of(w); c++) {
      F v[W::PLACES];
      decode(format, w, w.codes + r * w.bytes, c, v);
      const F xs = mul(load(x + c * CHUNK), scales.of(r, c));
#pragma GCC unroll 8
      for (int place = 0; place < W::PLACES; place++) total[place] = fma(v[place], xs, total[place]);
    }
    for (int place = 0; place < W::PLACES; place++) {
      const int64_t row = row_in<W>(w, r, place);
      if (row >= 0) y[row] = sum(total[place]);
    }
  }
}

template <class W, int VECTORS, int N> void many_along_down(const Problem& p, const ColumnScales& scales, const Pool& pool) {
  constexpr int64_t LONG = 16, HIGH = 144 / W::PLACES;  // chunks, and stored rows, of a block
  constexpr int64_t LD = LONG * CHUNK + LANES, L = VECTORS * LANES, BROAD = 256 / L;
  const Matrix& w = p.w;
  const W format(w);
  const int64_t length = chunks_of(w) * CHUNK, panels = (p.m + L - 1) / L;
  float* x = for_inputs.get<float>(panels * L * length);
  pool.each(panels, [&](int64_t q) { pack_panel<L>(p.x + q * L * w.length, std::min(L, p.m - q * L), w.length, nullptr, 0, length, x + q * L * length); });
  const int64_t high = (w.rows + HIGH - 1) / HIGH, broad = (panels + BROAD - 1) / BROAD;
  pool.each(high * broad, [&](int64_t i) {
    const int64_t first = i / broad * HIGH, stored = std::min(HIGH, w.rows - first), rows = stored * W::PLACES;
    const int64_t begin = i % broad * BROAD, end = std::min(panels, begin + BROAD), ldy = (end - begin) * L + LANES;
    float* block = for_weights.get<float>(up(rows, N) * LD);
    float* y = for_outputs.get<float>(up(rows, N) * ldy);
    memset(block, 0, up(rows, N) * LD * sizeof(float));
    for (int64_t c = 0; c < chunks_of(w); c += LONG) {
      const int64_t stop = std::min(chunks_of(w), c + LONG);
      for (int64_t r = 0; r < stored; r++) decode_row(format, w, scales, first + r, c, stop, block + r * W::PLACES * LD, LD);
      for (int64_t q = begin; q < end; q++)
        for (int64_t n = 0; n < rows; n += N) panel<VECTORS, N>(x + q * L * length + c * CHUNK * L, block + n * LD, LD, (stop - c) * CHUNK, y + n * ldy + (q - begin) * L, ldy, c == 0);
    }
    for (int64_t n = 0; n < rows; n++) {
      const int64_t row = row_in<W>(w, first + n / W::PLACES, static_cast<int>(n % W::PLACES));
      if (row < 0) continue;
      for (int64_t m = begin * L; m < std::min(end * L, p.m); m++) p.y[m * w.height + row] = y[n * ldy + m - begin * L];
    }
  });
}

template <class W> void along_down(const Problem& p, const Pool& pool) {
  const Matrix& w = p.w;
  const ColumnScales scales(w);
  if (p.m > 2) {
    if constexpr (EQQUANT_WIDE) return p.m > LANES ? many_along_down<W, 2, 12>(p, scales, pool) : many_along_down<W, 1, 24>(p, scales, pool);
    else return many_along_down<W, 1, 6>(p, scales, pool);
  }
  const W format(w);
  const int64_t length = chunks_of(w) * CHUNK;
  float* x = for_inputs.get<float>(p.m * length);
  for (int64_t m = 0; m < p.m; m++) {
    memcpy(x + m * length, p.x + m * w.length, w.length * sizeof(float));
    memset(x + m * length + w.length, 0, (length - w.length) * sizeof(float));
  }
  const int64_t parts = std::max<int64_t>(1, w.height * w.length / WORK), each = (w.rows + parts - 1) / parts;
  pool.each((w.rows + each - 1) / each, [&](int64_t i) {
    for (int64_t m = 0; m < p.m; m++) row_sums(p, format, scales, x + m * length, p.y + m * w.height, i * each, std::min(w.rows, (i + 1) * each));
  });
}

}  // namespace eqquant::EQQUANT_LEVEL
