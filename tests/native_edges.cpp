// The kernels of one level on buffers that end where memory ends: a byte read or written too far is an error of the
// processor. Every product is compared with one in float64. tests/native_edges.py compiles and runs it, under sanitizers.
#include <sys/mman.h>
#include <unistd.h>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>
#include "problem.h"

namespace eqquant {
namespace EQQUANT_LEVEL { extern const Level level; }

static std::mt19937 numbers(7);

// An array whose last byte is the last one of a page; the next page cannot be read.
template <class T> struct Edge {
  T* data;
  explicit Edge(const Edge&) = delete;
  explicit Edge(int64_t count) {
    const size_t page = sysconf(_SC_PAGESIZE), bytes = count * sizeof(T), pages = (bytes + page - 1) / page + 1;
    memory = static_cast<uint8_t*>(mmap(nullptr, (pages + 1) * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(memory + pages * page, page, PROT_NONE);
    data = reinterpret_cast<T*>(memory + pages * page - bytes);
    size = (pages + 1) * page;
  }
  ~Edge() { munmap(memory, size); }

 private:
  uint8_t* memory;
  size_t size;
};

struct Alone final : Pool {
  int64_t threads() const override { return 1; }
  void run(int64_t chunks, void (*f)(void*, int64_t), void* argument) const override {
    for (int64_t i = chunks - 1; i >= 0; i--) f(argument, i);  // in any order
  }
};

static double float8(int code, int mantissa, int bias) {
  const int m = code & ((1 << mantissa) - 1), e = (code & 127) >> mantissa;
  const double value = e ? std::ldexp(1 + std::ldexp(m, -mantissa), e - bias) : std::ldexp(m, 1 - bias - mantissa);
  return code & 128 ? -value : value;
}

static double number(const Problem& p, uint8_t byte, int place) {
  switch (p.code) {
    case Code::int8: return static_cast<int8_t>(byte);
    case Code::nibbles: return p.w.levels[byte >> 4 * (p.w.high_first ? 1 - place : place) & 15];
    case Code::bits: return p.w.levels[byte >> (p.w.high_first ? 7 - place : place) & 1];
    case Code::ternary: {
      int fraction = byte, digit = 0;
      for (int i = 0; i <= place; i++) digit = fraction * 3 >> 8, fraction = fraction * 3 & 255;
      return p.w.levels[digit];
    }
    case Code::e4m3: return float8(byte, 3, 7);
    case Code::e5m2: return float8(byte, 2, 15);
  }
  return 0;
}

static int numbers_in_byte(Code code) { return code == Code::nibbles ? 2 : code == Code::ternary ? 5 : code == Code::bits ? 8 : 1; }

static int failures = 0;

static void check(Code code, int64_t m, int64_t rows, int64_t columns, int64_t stored, int64_t block, bool down, bool sum_along_rows) {
  const int places = numbers_in_byte(code);
  const int64_t packed = down ? rows : columns, tile = stored * places, bytes = (packed + tile - 1) / tile * stored;
  Problem p{};
  p.code = code, p.sum_along_rows = sum_along_rows, p.m = m;
  p.w.rows = down ? bytes : rows, p.w.bytes = down ? columns : bytes;
  p.w.height = rows, p.w.length = columns, p.w.tile = tile, p.w.stored = stored, p.w.down = down;
  p.w.row_block = down ? block : 1, p.w.block = down ? 1 : block;
  float levels[16];
  for (int i = 0; i < 16; i++) levels[i] = code == Code::ternary || code == Code::bits ? i - 1 : std::sin(i + 1.0f);
  p.w.levels = levels;
  const int64_t blocks_down = (rows + p.w.row_block - 1) / p.w.row_block, blocks = (columns + p.w.block - 1) / p.w.block;
  Edge<uint8_t> codes(p.w.rows * p.w.bytes);
  Edge<float> scales(blocks_down * blocks), x(m * p.inputs()), y(m * p.outputs());
  for (int64_t i = 0; i < p.w.rows * p.w.bytes; i++) {
    codes.data[i] = static_cast<uint8_t>(numbers());
    if (code == Code::e4m3 || code == Code::e5m2) codes.data[i] &= 0xbb;  // finite, and small
  }
  for (int64_t i = 0; i < blocks_down * blocks; i++) scales.data[i] = 0.5f + (numbers() % 100) / 100.0f;
  for (int64_t i = 0; i < m * p.inputs(); i++) x.data[i] = (numbers() % 2001) / 1000.0f - 1;
  p.w.codes = codes.data, p.w.scales = scales.data, p.x = x.data, p.y = y.data;
  EQQUANT_LEVEL::level.multiply(p, Alone());
  std::vector<double> dense(rows * columns);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < columns; c++) {
      const int64_t at = down ? r : c, in_tile = at % tile, byte = at / tile * stored + in_tile % stored;
      const uint8_t* where = down ? p.w.codes + byte * p.w.bytes + c : p.w.codes + r * p.w.bytes + byte;
      dense[r * columns + c] = number(p, *where, static_cast<int>(in_tile / stored)) * scales.data[r / p.w.row_block * blocks + c / p.w.block];
    }
  for (int64_t i = 0; i < m; i++)
    for (int64_t o = 0; o < p.outputs(); o++) {
      double want = 0, terms = 0;
      for (int64_t k = 0; k < p.inputs(); k++) {
        const double term = x.data[i * p.inputs() + k] * (sum_along_rows ? dense[o * columns + k] : dense[k * columns + o]);
        want += term, terms += std::fabs(term);
      }
      // Digits leave out a share of the largest input, whatever its own weight is.
      const double allowed = 1e-6 * terms + 1e-5;
      if (!(std::fabs(y.data[i * p.outputs() + o] - want) <= allowed)) {
        if (failures++ < 10)
          std::printf("code %d m %d rows %d columns %d stored %d block %d down %d along %d: got %g, want %g\n", static_cast<int>(code), static_cast<int>(m), static_cast<int>(rows), static_cast<int>(columns), static_cast<int>(stored), static_cast<int>(block), down, sum_along_rows, y.data[i * p.outputs() + o], want);
      }
    }
}

}  // namespace eqquant

int main() {
  using namespace eqquant;
  if (!EQQUANT_LEVEL::level.runs_here()) return std::printf("%s does not run here\n", EQQUANT_LEVEL::level.name), 0;
  int count = 0;
  for (Code code : {Code::int8, Code::nibbles, Code::ternary, Code::bits, Code::e4m3, Code::e5m2})
    for (auto [rows, columns] : {std::pair{1, 1}, {3, 17}, {5, 64}, {37, 130}, {150, 33}, {2, 700}})
      for (int m : {1, 2, 3, 4, 7, 9, 17, 33})
        for (bool down : {false, true})
          for (bool along : {false, true}) {
            const int packed = down ? rows : columns, places = numbers_in_byte(code);
            check(code, m, rows, columns, 1, packed, down, along), count++;
            if (places == 1) check(code, m, rows, columns, 1, 32, down, along), count++;
            else check(code, m, rows, columns, 16, 16 * places, down, along), check(code, m, rows, columns, 8, 8 * places, down, along), count += 2;
          }
  std::printf("%s: %d products, %d wrong numbers\n", EQQUANT_LEVEL::level.name, count, failures);
  return failures != 0;
}
