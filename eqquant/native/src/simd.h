// Sixteen floats at once, by whatever instructions this file is compiled for.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace eqquant::EQQUANT_LEVEL {

constexpr int LANES = 16;

#if defined(__AVX512BW__) && defined(__AVX512VL__)
#define EQQUANT_WIDE 1
using F = __m512;   // floats
using I = __m512i;  // 32-bit integers
inline F zeros() { return _mm512_setzero_ps(); }
inline F splat(float a) { return _mm512_set1_ps(a); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F a) { _mm512_storeu_ps(p, a); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(F a) { return _mm512_reduce_add_ps(a); }
inline F halves(float a, float b) {  // 8 times a, 8 times b
  return _mm512_insertf32x8(_mm512_set1_ps(a), _mm256_set1_ps(b), 1);
}
inline I integer(int32_t a) { return _mm512_set1_epi32(a); }
inline I bytes(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline I signed_bytes(const uint8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline I plus(I a, I b) { return _mm512_add_epi32(a, b); }
inline I both(I a, I b) { return _mm512_and_si512(a, b); }
template <int N> inline I left(I a) { return _mm512_slli_epi32(a, N); }
template <int N> inline I right(I a) { return _mm512_srli_epi32(a, N); }
inline F floats(I a) { return _mm512_cvtepi32_ps(a); }
inline F as_floats(I a) { return _mm512_castsi512_ps(a); }
inline I as_integers(F a) { return _mm512_castps_si512(a); }
inline I where_above(I a, I limit, I then, I otherwise) {  // a > limit ? then : otherwise
  return _mm512_mask_mov_epi32(otherwise, _mm512_cmpgt_epi32_mask(a, limit), then);
}
// table[index % 16]
inline F look_up(F table, I index) { return _mm512_permutexvar_ps(index, table); }
inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }

#elif defined(__AVX2__)
#define EQQUANT_WIDE 0
struct F { __m256 a, b; };
struct I { __m256i a, b; };
inline F zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F splat(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F a) { _mm256_storeu_ps(p, a.a); _mm256_storeu_ps(p + 8, a.b); }
inline F mul(F a, F b) { return {_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
inline F add(F a, F b) { return {_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
inline F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)}; }
inline float sum(F a) {
  __m256 s = _mm256_add_ps(a.a, a.b);
  __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_add_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
inline F halves(float a, float b) { return {_mm256_set1_ps(a), _mm256_set1_ps(b)}; }
inline I integer(int32_t a) { return {_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }
inline I bytes(const uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)), _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
}
inline I signed_bytes(const uint8_t* p) {
  return {_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)), _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
}
inline I plus(I a, I b) { return {_mm256_add_epi32(a.a, b.a), _mm256_add_epi32(a.b, b.b)}; }
inline I both(I a, I b) { return {_mm256_and_si256(a.a, b.a), _mm256_and_si256(a.b, b.b)}; }
template <int N> inline I left(I a) { return {_mm256_slli_epi32(a.a, N), _mm256_slli_epi32(a.b, N)}; }
template <int N> inline I right(I a) { return {_mm256_srli_epi32(a.a, N), _mm256_srli_epi32(a.b, N)}; }
inline F floats(I a) { return {_mm256_cvtepi32_ps(a.a), _mm256_cvtepi32_ps(a.b)}; }
inline F as_floats(I a) { return {_mm256_castsi256_ps(a.a), _mm256_castsi256_ps(a.b)}; }
inline I as_integers(F a) { return {_mm256_castps_si256(a.a), _mm256_castps_si256(a.b)}; }
inline I where_above(I a, I limit, I then, I otherwise) {
  return {_mm256_blendv_epi8(otherwise.a, then.a, _mm256_cmpgt_epi32(a.a, limit.a)),
          _mm256_blendv_epi8(otherwise.b, then.b, _mm256_cmpgt_epi32(a.b, limit.b))};
}
inline __m256 look_up_half(F table, __m256i index) {
  __m256 low = _mm256_permutevar8x32_ps(table.a, index), high = _mm256_permutevar8x32_ps(table.b, index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
inline F look_up(F table, I index) { return {look_up_half(table, index.a), look_up_half(table, index.b)}; }
inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }

#else  // whatever instructions the compiler has for vectors
#define EQQUANT_WIDE 0
using F = float __attribute__((vector_size(64)));
using I = int32_t __attribute__((vector_size(64)));
inline F splat(float a) { return F{} + a; }
inline F zeros() { return F{}; }
inline F load(const float* p) { F a; memcpy(&a, p, sizeof a); return a; }
inline void store(float* p, F a) { memcpy(p, &a, sizeof a); }
inline F mul(F a, F b) { return a * b; }
inline F add(F a, F b) { return a + b; }
inline F fma(F a, F b, F c) { return a * b + c; }
inline float sum(F a) {
  for (int half = LANES / 2; half; half /= 2) for (int i = 0; i < half; i++) a[i] += a[i + half];
  return a[0];
}
inline F halves(float a, float b) { return F{a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b}; }
inline I integer(int32_t a) { return I{} + a; }
using Unsigned = uint8_t __attribute__((vector_size(16)));
using Signed = int8_t __attribute__((vector_size(16)));
inline I bytes(const uint8_t* p) { Unsigned a; memcpy(&a, p, sizeof a); return __builtin_convertvector(a, I); }
inline I signed_bytes(const uint8_t* p) { Signed a; memcpy(&a, p, sizeof a); return __builtin_convertvector(a, I); }
inline I plus(I a, I b) { return a + b; }
inline I both(I a, I b) { return a & b; }
using U = uint32_t __attribute__((vector_size(64)));
template <int N> inline I left(I a) { return (I)((U)a << N); }
template <int N> inline I right(I a) { return (I)((U)a >> N); }
inline F floats(I a) { return __builtin_convertvector(a, F); }
inline F as_floats(I a) { return (F)a; }
inline I as_integers(F a) { return (I)a; }
inline I where_above(I a, I limit, I then, I otherwise) { I above = a > limit; return (then & above) | (otherwise & ~above); }
inline F look_up(F table, I index) {
  F r;
  for (int i = 0; i < LANES; i++) r[i] = table[index[i] & 15];
  return r;
}
inline void prefetch(const void* p) { __builtin_prefetch(p); }
#endif

}  // namespace eqquant::EQQUANT_LEVEL
