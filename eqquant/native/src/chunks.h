// A stored row as chunks of 16 bytes: which numbers they hold, and what their scales are.
#pragma once
#include <algorithm>
#include <cstdlib>
#include "formats.h"

namespace eqquant::EQQUANT_LEVEL {

constexpr int64_t CHUNK = 16;  // bytes

inline int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
inline int64_t chunks_of(const Matrix& w) { return (w.bytes + CHUNK - 1) / CHUNK; }
// Numbers in whole chunks, with places that hold none.
template <class W> int64_t padded(const Matrix& w) { return chunks_of(w) * CHUNK * W::PLACES; }

// Memory that a thread keeps.
struct Scratch {
  void* p = nullptr;
  size_t size = 0;
  ~Scratch() { free(p); }
  template <class T> T* get(int64_t count) {
    const size_t bytes = (count * sizeof(T) + 127) / 128 * 128 + 128;
    if (bytes > size) {
      free(p);
      p = aligned_alloc(128, bytes);
      size = bytes;
    }
    return static_cast<T*>(p);
  }
};
inline thread_local Scratch for_inputs, for_weights, for_outputs, for_order, for_piece;

// For [chunk of so many bytes][place][lane]: the position in its row of the number that lies there, or -1.
template <class W, int64_t BYTES = CHUNK> const int32_t* order_of(const Matrix& w) {
  const int64_t bytes = up(w.bytes, BYTES);
  int32_t* order = for_order.get<int32_t>(bytes * W::PLACES);
  int64_t first = 0, j = 0;  // of the tile; and the byte in it
  for (int64_t b = 0; b < bytes; b++) {
    int32_t* out = order + b / BYTES * BYTES * W::PLACES + b % BYTES;
    for (int place = 0; place < W::PLACES; place++) {
      const int64_t in_tile = (w.high_first ? W::PLACES - 1 - place : place) * w.stored + j, k = first + in_tile;
      out[place * BYTES] = in_tile < w.tile && k < w.length && b < w.bytes ? static_cast<int32_t>(k) : -1;
    }
    if (++j == w.stored) j = 0, first += w.tile;
  }
  return order;
}

// The numbers of chunk `c` of a row, up to their scale.
template <class W> inline void decode(const W& format, const Matrix& w, const uint8_t* row, int64_t c, F v[W::PLACES]) {
  const int64_t left = w.bytes - c * CHUNK;
  if (left >= CHUNK) return format.decode(row + c * CHUNK, v);
  uint8_t rest[CHUNK] = {};
  memcpy(rest, row + c * CHUNK, left);
  format.decode(rest, v);
}

// The scales along a row: one for the whole of it, for so many chunks, or for each half of a chunk.
struct Scales {
  int64_t chunks;  // that share one
  int64_t count;
  bool in_halves;
  explicit Scales(const Matrix& w) {
    const int64_t bytes = w.block / w.tile * w.stored;
    count = w.blocks();
    in_halves = count > 1 && bytes < CHUNK;
    chunks = count == 1 ? chunks_of(w) : in_halves ? 1 : bytes / CHUNK;
  }
  F of_segment(const float* row, int64_t segment) const {
    if (!in_halves) return splat(row[segment]);
    const int64_t second = 2 * segment + 1;
    return halves(row[2 * segment], row[second < count ? second : count - 1]);
  }
};

}  // namespace eqquant::EQQUANT_LEVEL
