// Lookup in embedding tables, and the update of the rows that a batch touches.
//
// A group of tables lies in one piece of memory. Each feature reads one table; features of the same table are neighbours. T tables,
// F features, B bags a feature, N ids: ids [N] are the features' one after the other, those of bag b of feature f from
// offsets[f B + b] on. Where ids have weights, a bag is the sum of its rows times these. A gradient is summed over all occurrences of a row, in their order, and then the row is updated once: the
// result is the same from run to run, whatever the number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "half.h"
#include "kernel.h"

namespace {

enum Pooling { SUM, MEAN, NONE };
enum Optimizer { SGD, ROWWISE_ADAGRAD, ADAGRAD, ADAM, FTRL };

constexpr int64_t MOST_AT_ONCE = 64;   // columns of a row for whose width there is no code of its own
constexpr int64_t AHEAD = 12;          // rows that are on their way from memory while one is read
constexpr int64_t BAGS_AT_ONCE = 128;  // of all features in turn, so that a row of the output is written while it is in the cache

struct Features {
  int64_t count, bags;
  const int64_t *columns;  // [F + 1] of the output
  const int64_t *begins;   // [F] where a feature's table begins, in values
  const int64_t *ids, *offsets;
  const float *weights;  // [N] of the ids of bags, or null
  int64_t width(int64_t f) const { return columns[f + 1] - columns[f]; }
  const int64_t *of(int64_t f) const { return offsets + f * bags; }
};

template <typename Value>
void prefetch(const Value *row, int64_t width) {
  for (const char *line = (const char *)row; line < (const char *)(row + width); line += 64) __builtin_prefetch(line);
}

// Calls ``function`` with the width as a constant where that is a usual one, else with 0.
template <typename Function>
void by_width(int64_t width, Function function) {
  switch (width) {
    case 4: return function(std::integral_constant<int64_t, 4>());
    case 8: return function(std::integral_constant<int64_t, 8>());
    case 16: return function(std::integral_constant<int64_t, 16>());
    case 32: return function(std::integral_constant<int64_t, 32>());
    case 64: return function(std::integral_constant<int64_t, 64>());
    default: return function(std::integral_constant<int64_t, 0>());
  }
}

// Calls ``function(column, count)`` for a row's columns, as many at once as a local array holds.
template <int64_t WIDTH, typename Function>
void by_columns(int64_t width, Function function) {
  if (WIDTH) return function(int64_t(0), WIDTH);
  for (int64_t column = 0; column < width; column += MOST_AT_ONCE) function(column, std::min(MOST_AT_ONCE, width - column));
}

template <int64_t WIDTH, typename Value>
void look_up_bags(const Value *table, const Features &features, int64_t f, Pooling pooling, int64_t first, int64_t last,
                  float *output) {
  const int64_t width = WIDTH ? WIDTH : features.width(f), stride = features.columns[features.count];
  const int64_t *ids = features.ids, *offsets = features.of(f), end = offsets[last];
  for (int64_t bag = first; bag < last; bag++) {
    const int64_t begin = offsets[bag], size = offsets[bag + 1] - begin;
    const float share = pooling == MEAN && size ? 1.f / size : 1.f;
    float *to = output + bag * stride + features.columns[f];
    by_columns<WIDTH>(width, [&](int64_t column, int64_t count) {
      float row[WIDTH ? WIDTH : MOST_AT_ONCE], sum[WIDTH ? WIDTH : MOST_AT_ONCE];
      std::fill(sum, sum + count, 0.f);
      for (int64_t n = begin; n < begin + size; n++) {
        if (n + AHEAD < end) prefetch(table + ids[n + AHEAD] * width + column, count);
        load(table + ids[n] * width + column, count, row);
        if (features.weights)
          for (int64_t i = 0; i < count; i++) sum[i] += features.weights[n] * row[i];
        else
          for (int64_t i = 0; i < count; i++) sum[i] += row[i];
      }
      for (int64_t i = 0; i < count; i++) to[column + i] = share * sum[i];
    });
  }
}

template <int64_t WIDTH, typename Value>
void look_up_ids(const Value *table, const Features &features, int64_t f, int64_t first, int64_t last, float *output) {
  const int64_t width = WIDTH ? WIDTH : features.width(f), end = features.of(f)[last];
  for (int64_t n = features.of(f)[first]; n < end; n++) {
    if (n + AHEAD < end) prefetch(table + features.ids[n + AHEAD] * width, width);
    load(table + features.ids[n] * width, width, output + n * width);
  }
}

template <typename Value>
void look_up(const Value *memory, const Features &features, Pooling pooling, float *output, int64_t threads) {
  const int64_t blocks = (features.bags + BAGS_AT_ONCE - 1) / BAGS_AT_ONCE;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t first = block * BAGS_AT_ONCE, last = std::min(first + BAGS_AT_ONCE, features.bags);
    for (int64_t f = 0; f < features.count; f++)
      by_width(features.width(f), [&](auto constant) {
        constexpr int64_t WIDTH = decltype(constant)::value;
        const Value *table = memory + features.begins[f];
        if (pooling == NONE)
          look_up_ids<WIDTH>(table, features, f, first, last, output);
        else
          look_up_bags<WIDTH>(table, features, f, pooling, first, last, output);
      });
  }
}

uint64_t hash(int64_t row) { return row * 0x9E3779B97F4A7C15ull; }  // Fibonacci hashing: its upper bits

// The distinct rows that a batch touches in a table, in the order in which they occur first, and the sums of their gradients.
// Open addressing; the memory is kept from call to call.
struct Touched {
  int64_t count, shift;
  std::vector<int32_t> slots;
  std::vector<int64_t> rows;
  std::vector<float> sums;

  void clear(int64_t ids) {
    count = 0, shift = 58;
    while ((int64_t(1) << (64 - shift)) < 2 * ids) shift--;
    slots.assign(int64_t(1) << (64 - shift), -1);
    if ((int64_t)rows.size() < ids) rows.resize(ids);
  }

  template <int64_t WIDTH>
  void add(int64_t row, int64_t width, float share, const float *gradient) {
    const uint64_t last = slots.size() - 1;
    uint64_t slot = hash(row) >> shift;
    while (slots[slot] >= 0 && rows[slots[slot]] != row) slot = (slot + 1) & last;
    const int64_t n = WIDTH ? WIDTH : width;
    if (slots[slot] < 0) {
      if ((int64_t)sums.size() < (count + 1) * n) sums.resize(std::max<int64_t>(2 * sums.size(), (count + 1) * n));
      float *sum = sums.data() + count * n;
      for (int64_t i = 0; i < n; i++) sum[i] = share * gradient[i];
      slots[slot] = count, rows[count++] = row;
    } else {
      float *sum = sums.data() + slots[slot] * n;
      for (int64_t i = 0; i < n; i++) sum[i] += share * gradient[i];
    }
  }
};

struct Rates {
  float lr, eps, beta1, beta2, correction1, correction2, alpha, beta, l1, l2;
};

// What the gradient of a row is multiplied by, after ``sum`` has grown.
float rowwise_adagrad(const Rates &r, const float *g, int64_t width, float *sum) {
  float parts[4] = {0, 0, 0, 0};
  for (int64_t i = 0; i < width; i += 4)
    for (int64_t part = 0; part < 4; part++) parts[part] += g[i + part] * g[i + part];
  *sum += ((parts[0] + parts[1]) + (parts[2] + parts[3])) / width;
  return r.lr / (std::sqrt(*sum) + r.eps);
}

void adagrad(const Rates &r, const float *g, int64_t count, float *w, float *sum) {
  for (int64_t i = 0; i < count; i++) {
    sum[i] += g[i] * g[i];
    w[i] -= r.lr * g[i] / (std::sqrt(sum[i]) + r.eps);
  }
}

void adam(const Rates &r, const float *g, int64_t count, float *w, float *m, float *v) {
  for (int64_t i = 0; i < count; i++) {
    m[i] = r.beta1 * m[i] + (1 - r.beta1) * g[i];
    v[i] = r.beta2 * v[i] + (1 - r.beta2) * g[i] * g[i];
    w[i] -= r.lr * (m[i] / r.correction1) / (std::sqrt(v[i] / r.correction2) + r.eps);
  }
}

// A row is [w, z, n, 0], and g[3] the gradient of w (trainer/optim/ftrl.py).
void ftrl(const Rates &r, const float *g, float *row) {
  if (g[3] == 0) return;
  const float root = std::sqrt(row[2]), n = row[2] + g[3] * g[3], grown = std::sqrt(n);
  const float z = row[1] + g[3] - (grown - root) / r.alpha * row[0];
  const float shrunk = std::fabs(z) <= r.l1 ? 0.f : z - std::copysign(r.l1, z);
  row[0] = -shrunk / ((r.beta + grown) / r.alpha + r.l2), row[1] = z, row[2] = n;
}

// The columns of a table's state beside a row of ``width``.
int64_t state_width(Optimizer optimizer, int64_t width) {
  return optimizer == ROWWISE_ADAGRAD ? 1 : optimizer == ADAGRAD || optimizer == ADAM ? width : 0;
}

template <int64_t WIDTH, Optimizer OPTIMIZER, typename Value>
void update_row(const Rates &r, const float *g, int64_t width, Value *row, float *first, float *second) {
  const float step = OPTIMIZER == ROWWISE_ADAGRAD ? rowwise_adagrad(r, g, WIDTH ? WIDTH : width, first) : r.lr;
  by_columns<WIDTH>(width, [&](int64_t column, int64_t count) {
    float w[WIDTH ? WIDTH : MOST_AT_ONCE];
    load(row + column, count, w);
    if (OPTIMIZER == SGD || OPTIMIZER == ROWWISE_ADAGRAD)
      for (int64_t i = 0; i < count; i++) w[i] -= step * g[column + i];
    if (OPTIMIZER == ADAGRAD) adagrad(r, g + column, count, w, first + column);
    if (OPTIMIZER == ADAM) adam(r, g + column, count, w, first + column, second + column);
    if (OPTIMIZER == FTRL) ftrl(r, g, w);
    store(w, count, row + column);
  });
}

template <int64_t WIDTH, Optimizer OPTIMIZER, typename Value>
void update_rows(const Touched &touched, const Rates &rates, int64_t width, Value *table, float *first, float *second) {
  const int64_t state = state_width(OPTIMIZER, width);
  for (int64_t n = 0; n < touched.count; n++) {
    if (n + AHEAD < touched.count) {
      const int64_t row = touched.rows[n + AHEAD];
      prefetch(table + row * width, width);
      if (state) prefetch(first + row * state, state);
      if (OPTIMIZER == ADAM) prefetch(second + row * state, state);
    }
    const int64_t row = touched.rows[n];
    update_row<WIDTH, OPTIMIZER>(rates, touched.sums.data() + n * width, width, table + row * width, first + row * state,
                                 second + row * state);
  }
}

// Finds the rows of features [f, end), all of one table, of which every ``parts``-th is part ``part``'s.
template <int64_t WIDTH>
void sum_gradients(const Features &features, int64_t f, int64_t end, Pooling pooling, const float *gradient, int64_t part,
                   int64_t parts, Touched &touched) {
  const int64_t width = WIDTH ? WIDTH : features.width(f), stride = features.columns[features.count];
  const auto mine = [&](int64_t row) { return parts == 1 || (int64_t)((hash(row) >> 8) % parts) == part; };
  touched.clear(features.of(end)[0] - features.of(f)[0]);
  if (pooling == NONE) {
    for (int64_t n = features.of(f)[0]; n < features.of(end)[0]; n++)
      if (mine(features.ids[n])) touched.add<WIDTH>(features.ids[n], width, 1.f, gradient + n * width);
    return;
  }
  for (; f < end; f++) {
    const int64_t *offsets = features.of(f);
    const float *columns = gradient + features.columns[f];
    for (int64_t bag = 0; bag < features.bags; bag++) {
      if (bag + AHEAD < features.bags) prefetch(columns + (bag + AHEAD) * stride, width);
      const int64_t size = offsets[bag + 1] - offsets[bag];
      const float share = pooling == MEAN && size ? 1.f / size : 1.f;
      for (int64_t n = offsets[bag]; n < offsets[bag + 1]; n++)
        if (mine(features.ids[n]))
          touched.add<WIDTH>(features.ids[n], width, features.weights ? share * features.weights[n] : share, columns + bag * stride);
    }
  }
}

template <int64_t WIDTH, typename Value>
void update_table(const Touched &touched, Optimizer optimizer, const Rates &rates, int64_t width, Value *table, float *first,
                  float *second) {
  switch (optimizer) {
    case SGD: return update_rows<WIDTH, SGD>(touched, rates, width, table, first, second);
    case ROWWISE_ADAGRAD: return update_rows<WIDTH, ROWWISE_ADAGRAD>(touched, rates, width, table, first, second);
    case ADAGRAD: return update_rows<WIDTH, ADAGRAD>(touched, rates, width, table, first, second);
    case ADAM: return update_rows<WIDTH, ADAM>(touched, rates, width, table, first, second);
    case FTRL: return update_rows<4, FTRL>(touched, rates, 4, table, first, second);
  }
}

struct State {
  float *first, *second;
  const int64_t *begins;  // [T] where a table's begins in either
};

template <typename Value>
void update(Value *memory, const Features &features, int64_t tables, const int64_t *starts, Pooling pooling,
            const int64_t *optimizers, const State &state, const Rates &rates, const float *gradient, int64_t threads) {
  const int64_t parts = threads > 1 && tables < 4 * threads ? threads : 1;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < tables * parts; task++) {
    const int64_t t = task / parts, f = starts[t], width = features.width(f), begin = state.begins[t];
    by_width(width, [&](auto constant) {
      constexpr int64_t WIDTH = decltype(constant)::value;
      static thread_local Touched touched;
      sum_gradients<WIDTH>(features, f, starts[t + 1], pooling, gradient, task % parts, parts, touched);
      update_table<WIDTH>(touched, (Optimizer)optimizers[t], rates, width, memory + features.begins[f], state.first + begin,
                          state.second + begin);
    });
  }
}

}  // namespace

// output: [B, sum of widths], or of sequences (pooling NONE) [N, width]. half: whether rows are fp16.
KERNEL void tables_look_up(const void *memory, int64_t half, int64_t features, const int64_t *columns, const int64_t *begins,
                           int64_t pooling, int64_t bags, const int64_t *ids, const int64_t *offsets, const float *weights,
                           float *output, int64_t threads) {
  const Features all = {features, bags, columns, begins, ids, offsets, weights};
  if (half)
    look_up((const Half *)memory, all, (Pooling)pooling, output, threads);
  else
    look_up((const float *)memory, all, (Pooling)pooling, output, threads);
}

// starts [T + 1]: the first feature of each table; optimizers [T]; first, second: the tables' states, which begin at states [T];
// rates: as in struct Rates; gradient: of the output of tables_look_up.
KERNEL void tables_update(void *memory, int64_t half, int64_t features, const int64_t *columns, const int64_t *begins,
                          int64_t pooling, int64_t bags, const int64_t *ids, const int64_t *offsets, const float *weights,
                          int64_t tables, const int64_t *starts, const int64_t *optimizers, float *first, float *second, const int64_t *states,
                          const float *rates, const float *gradient, int64_t threads) {
  const Features all = {features, bags, columns, begins, ids, offsets, weights};
  const State state = {first, second, states};
  const Rates &r = *(const Rates *)rates;
  if (half)
    update((Half *)memory, all, tables, starts, (Pooling)pooling, optimizers, state, r, gradient, threads);
  else
    update((float *)memory, all, tables, starts, (Pooling)pooling, optimizers, state, r, gradient, threads);
}
