// One struct for each way to hold numbers in bytes: it decodes 16 bytes to the numbers in each of their places.
#pragma once
#include "problem.h"
#include "simd.h"

namespace eqquant::EQQUANT_LEVEL {

struct Int8 {
  static constexpr int PLACES = 1;
  explicit Int8(const Matrix&) {}
  void decode(const uint8_t* p, F v[PLACES]) const { v[0] = floats(signed_bytes(p)); }
};

struct Nibbles {
  static constexpr int PLACES = 2;
  F levels;
  explicit Nibbles(const Matrix& w) : levels(load(w.levels)) {}
  void decode(const uint8_t* p, F v[PLACES]) const {
    I code = bytes(p);
    v[0] = look_up(levels, code);
    v[1] = look_up(levels, right<4>(code));
  }
};

struct Ternary {
  static constexpr int PLACES = 5;
  F levels;
  explicit Ternary(const Matrix& w) : levels(load(w.levels)) {}
  void decode(const uint8_t* p, F v[PLACES]) const {
    I fraction = bytes(p);  // times 3, its integer part is the next digit
#pragma GCC unroll 5
    for (int i = 0; i < PLACES; i++) {
      I thrice = plus(plus(fraction, fraction), fraction);
      v[i] = look_up(levels, right<8>(thrice));
      fraction = both(thrice, integer(255));
    }
  }
};

struct Bits {
  static constexpr int PLACES = 8;
  I level, other;
  explicit Bits(const Matrix& w) : level(as_integers(splat(w.levels[0]))), other(as_integers(splat(w.levels[1]))) {}
  void decode(const uint8_t* p, F v[PLACES]) const {
    I code = bytes(p);
#pragma GCC unroll 8
    for (int i = 0; i < PLACES; i++) v[i] = as_floats(where_above(both(code, integer(1 << i)), integer(0), other, level));
  }
};

// A float8 with so many bits of mantissa. Neither here nor in what is computed are there subnormal float32 numbers, which
// XLA's threads take for 0.
template <int MANTISSA, int BIAS, bool INFINITIES> struct Float8 {
  static constexpr int PLACES = 1;
  explicit Float8(const Matrix&) {}
  void decode(const uint8_t* p, F v[PLACES]) const {
    constexpr int REBASE = (127 - BIAS) << 23, STEP = 1 << 23, UP = 23 - MANTISSA;
    constexpr int FIRST_NORMAL = 1 << MANTISSA;
    // The first number that is not finite: its exponent moves on to that of float32's infinity. Without
    // infinities it is the only one, and all bits are set.
    constexpr int LAST_FINITE = INFINITIES ? 127 - FIRST_NORMAL : 126;
    constexpr int TO_INFINITY = INFINITIES ? (255 - 31) << 23 : (255 - 15) << 23;
    I code = bytes(p), magnitude = both(code, integer(127)), bits = left<UP>(magnitude);
    F normal = as_floats(plus(bits, where_above(magnitude, integer(LAST_FINITE), integer(TO_INFINITY), integer(REBASE))));
    // (1 + f) 2^e - 2^e, with the exponent e of the least normal number.
    F subnormal = add(as_floats(plus(bits, integer(REBASE + STEP))), as_floats(integer(static_cast<int32_t>(0x80000000u | (REBASE + STEP)))));
    I absolute = where_above(magnitude, integer(FIRST_NORMAL - 1), as_integers(normal), as_integers(subnormal));
    v[0] = as_floats(plus(absolute, left<24>(both(code, integer(128)))));
  }
};
using E4M3 = Float8<3, 7, false>;
using E5M2 = Float8<2, 15, true>;

}  // namespace eqquant::EQQUANT_LEVEL
