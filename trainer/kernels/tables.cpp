// Lookup in embedding tables.
//
// A group of tables lies in one piece of memory. Each feature reads one table; several may read the same. F features, B bags a
// feature, N ids: ids [N] are the features' one after the other, those of bag b of feature f from offsets[f B + b] on.
#include <algorithm>
#include <cstdint>

#include "half.h"
#include "kernel.h"

namespace {

enum Pooling { SUM = 0, MEAN = 1, NONE = 2 };

constexpr int64_t WIDEST = 1024;       // floats of a row, as in FBGEMM
constexpr int64_t AHEAD = 12;          // rows that are on their way from memory while one is read
constexpr int64_t BAGS_AT_ONCE = 128;  // of all features in turn, so that a row of the output is written while it is in the cache

struct Features {
  int64_t count, bags;
  const int64_t *columns;  // [F + 1] of the output
  const int64_t *begins;   // [F] where a feature's table begins, in values
  const int64_t *ids, *offsets;
  int64_t width(int64_t f) const { return columns[f + 1] - columns[f]; }
  const int64_t *of(int64_t f) const { return offsets + f * bags; }
};

template <typename Value>
void prefetch(const Value *row, int64_t width) {
  for (const char *line = (const char *)row; line < (const char *)(row + width); line += 64) __builtin_prefetch(line);
}

// WIDTH is 0 for those that have no code of their own.
template <typename Value, int64_t WIDTH>
void look_up_bags(const Value *table, const Features &features, int64_t f, Pooling pooling, int64_t first, int64_t last,
                  const float *weights, float *output) {
  const int64_t width = WIDTH ? WIDTH : features.width(f), stride = features.columns[features.count];
  const int64_t *ids = features.ids, *offsets = features.of(f), end = offsets[last];
  float row[WIDTH ? WIDTH : WIDEST], sum[WIDTH ? WIDTH : WIDEST];
  for (int64_t bag = first; bag < last; bag++) {
    const int64_t size = offsets[bag + 1] - offsets[bag];
    std::fill(sum, sum + width, 0.f);
    for (int64_t n = offsets[bag]; n < offsets[bag + 1]; n++) {
      if (n + AHEAD < end) prefetch(table + ids[n + AHEAD] * width, width);
      load(table + ids[n] * width, width, row);
      const float weight = weights ? weights[n] : 1.f;
      for (int64_t i = 0; i < width; i++) sum[i] += weight * row[i];
    }
    const float share = pooling == MEAN && size ? 1.f / size : 1.f;
    float *to = output + bag * stride + features.columns[f];
    for (int64_t i = 0; i < width; i++) to[i] = share * sum[i];
  }
}

template <typename Value, int64_t WIDTH>
void look_up_ids(const Value *table, const Features &features, int64_t f, int64_t first, int64_t last, float *output) {
  const int64_t width = WIDTH ? WIDTH : features.width(f), end = features.of(f)[last];
  for (int64_t n = features.of(f)[first]; n < end; n++) {
    if (n + AHEAD < end) prefetch(table + features.ids[n + AHEAD] * width, width);
    load(table + features.ids[n] * width, width, output + n * width);
  }
}

template <typename Value, int64_t WIDTH>
void look_up(const Value *memory, const Features &features, int64_t f, Pooling pooling, int64_t first, int64_t last,
             const float *weights, float *output) {
  const Value *table = memory + features.begins[f];
  if (pooling == NONE)
    look_up_ids<Value, WIDTH>(table, features, f, first, last, output);
  else
    look_up_bags<Value, WIDTH>(table, features, f, pooling, first, last, weights, output);
}

// Calls ``function`` with the width as a constant where that is a usual one.
template <typename Function>
void by_width(int64_t width, Function function) {
  switch (width) {
    case 4: return function(std::integral_constant<int64_t, 4>());
    case 8: return function(std::integral_constant<int64_t, 8>());
    case 16: return function(std::integral_constant<int64_t, 16>());
    case 32: return function(std::integral_constant<int64_t, 32>());
    case 64: return function(std::integral_constant<int64_t, 64>());
    case 128: return function(std::integral_constant<int64_t, 128>());
    default: return function(std::integral_constant<int64_t, 0>());
  }
}

template <typename Value>
void look_up_all(const Value *memory, const Features &features, Pooling pooling, const float *weights, float *output,
                 int64_t threads) {
  const int64_t blocks = (features.bags + BAGS_AT_ONCE - 1) / BAGS_AT_ONCE;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t first = block * BAGS_AT_ONCE, last = std::min(first + BAGS_AT_ONCE, features.bags);
    for (int64_t f = 0; f < features.count; f++)
      by_width(features.width(f), [&](auto width) {
        look_up<Value, decltype(width)::value>(memory, features, f, pooling, first, last, weights, output);
      });
  }
}

}  // namespace

// output: [B, sum of widths], or of sequences (pooling NONE) [N, width]. sample_weights [N] or null; half: whether rows are fp16.
KERNEL void tables_look_up(const void *memory, int64_t half, int64_t features, const int64_t *columns, const int64_t *begins,
                           int64_t pooling, int64_t bags, const int64_t *ids, const int64_t *offsets,
                           const float *sample_weights, float *output, int64_t threads) {
  const Features all = {features, bags, columns, begins, ids, offsets};
  if (half)
    look_up_all((const Half *)memory, all, (Pooling)pooling, sample_weights, output, threads);
  else
    look_up_all((const float *)memory, all, (Pooling)pooling, sample_weights, output, threads);
}
