// The kernels for one level of processors: compiled once for each, with its instructions and -DEQQUANT_LEVEL=its_name.
#include "across.h"
#include "along.h"
#include "digits.h"
#include "down.h"

namespace eqquant::EQQUANT_LEVEL {

template <class W> static void product(const Problem& p, const Pool& pool) {
  if (p.w.down) return p.sum_along_rows ? along_down<W>(p, pool) : across_down<W>(p, pool);
  p.sum_along_rows ? along<W>(p, pool) : across<W>(p, pool);
}

static void multiply(const Problem& p, const Pool& pool) {
  if (by_digits(p, pool)) return;
  switch (p.code) {
    case Code::int8: return product<Int8>(p, pool);
    case Code::nibbles: return product<Nibbles>(p, pool);
    case Code::ternary: return product<Ternary>(p, pool);
    case Code::bits: return product<Bits>(p, pool);
    case Code::e4m3: return product<E4M3>(p, pool);
    case Code::e5m2: return product<E5M2>(p, pool);
  }
}

static bool runs_here() {
#if defined(__AVX512BW__)
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return true;
#endif
}

#define EQQUANT_TEXT_OF(a) #a
#define EQQUANT_TEXT(a) EQQUANT_TEXT_OF(a)
extern const Level level;
const Level level = {EQQUANT_TEXT(EQQUANT_LEVEL), runs_here, multiply};

}  // namespace eqquant::EQQUANT_LEVEL
