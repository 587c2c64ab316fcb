// What a kernel is asked for: products of rows with matrices whose numbers are packed.
#pragma once
#include <cstdint>

namespace eqquant {

// How a stored byte holds numbers.
enum class Code : int64_t {
  int8,     // one, in two's complement
  nibbles,  // two, each the index of one of 16 levels
  ternary,  // five, digits of a fraction in base 3; digit d stands for level d
  bits,     // eight, each the index of one of two levels
  e4m3,     // one float8 without infinities
  e5m2,     // one float8
};

// A matrix as it is stored: `rows` rows of `bytes` bytes, for `height` rows of `length` numbers. It is packed along its
// rows, or down its columns: there, a tile of `tile` numbers lies in `stored` bytes, planar: place p of byte j of a
// tile holds its number p * stored + j. Number (r, k) of the matrix is its level times scales[r / row_block][k / block].
struct Matrix {
  const uint8_t* codes;
  int64_t rows, bytes, height, length;
  bool down;  // whether it is packed down its columns
  int64_t tile, stored;
  bool high_first;      // whether place 0 of a byte is in its high bits
  const float* levels;  // 16
  // Packed along the rows, a scale covers all of a row, or whole chunks of 16 bytes, or half of one. Packed down the
  // columns, it covers whole tiles, and all columns or a single one.
  const float* scales;
  int64_t row_block, block;

  int64_t blocks() const { return (length + block - 1) / block; }
  const float* scales_of(int64_t row) const { return scales + row / row_block * blocks(); }
};

// y (m, outputs) = x (m, inputs) . w^T if the rows of w are its outputs, else x . w. `x` and `y` are
// contiguous. Shared out in chunks over the threads of `pool`.
struct Problem {
  Code code;
  Matrix w;
  bool sum_along_rows;  // whether the numbers of a row are summed up: w^T
  bool rounded;         // whether x is rounded to 8 bits already, so that one digit says all of it
  const float* x;
  int64_t m;
  float* y;

  int64_t inputs() const { return sum_along_rows ? w.length : w.height; }
  int64_t outputs() const { return sum_along_rows ? w.height : w.length; }
};

// Threads that run chunks of work; the caller is one of them.
struct Pool {
  virtual int64_t threads() const = 0;
  // Runs f(argument, i) for each i below `chunks`, and returns when all are done.
  virtual void run(int64_t chunks, void (*f)(void*, int64_t), void* argument) const = 0;

  template <class F> void each(int64_t chunks, F f) const {
    run(chunks, [](void* argument, int64_t i) { (*static_cast<F*>(argument))(i); }, &f);
  }

 protected:
  ~Pool() = default;
};

// The kernels, compiled for several levels of processors: one of them serves, or the next lower one.
struct Level {
  const char* name;
  bool (*runs_here)();
  void (*multiply)(const Problem&, const Pool&);
};

}  // namespace eqquant
