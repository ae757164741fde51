// Rows of fp16 as floats and back, rounded to the nearest (ties to even) as PyTorch does. Widths are multiples of 4.
#pragma once
#include <cstdint>
#include <cstring>
#ifdef __F16C__
#include <immintrin.h>
#endif

struct Half {
  uint16_t bits;
};

static inline void load(const float *row, int64_t width, float *values) { memcpy(values, row, width * sizeof(float)); }

static inline void store(const float *values, int64_t width, float *row) { memcpy(row, values, width * sizeof(float)); }

#if defined(__F16C__)

static inline void load(const Half *row, int64_t width, float *values) {
  for (int64_t i = 0; i < width; i += 4)
    _mm_storeu_ps(values + i, _mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)(row + i))));
}

static inline void store(const float *values, int64_t width, Half *row) {
  for (int64_t i = 0; i < width; i += 4)
    _mm_storel_epi64((__m128i *)(row + i), _mm_cvtps_ph(_mm_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT));
}

#elif defined(__ARM_FP16_FORMAT_IEEE)

static inline void load(const Half *row, int64_t width, float *values) {
  const __fp16 *halves = (const __fp16 *)row;
  for (int64_t i = 0; i < width; i++) values[i] = halves[i];
}

static inline void store(const float *values, int64_t width, Half *row) {
  __fp16 *halves = (__fp16 *)row;
  for (int64_t i = 0; i < width; i++) halves[i] = values[i];
}

#else
#error "this CPU has no instructions for fp16"
#endif
