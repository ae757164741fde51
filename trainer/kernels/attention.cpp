// DIN's attention unit (trainer/modules/attention.py) in few passes over the tokens; the matrix products between them are the
// caller's. trainer/modules/attention_kernels.py says in which order they run, and has the formulas of the gradients.
//
// B samples, T tokens of all of them, those of sample b from offsets[b] on; D the width of an event, C channels, P positions.
// Hidden layers [T, C] and pairs [T, 2 D] are of bf16 (bf16 = 1) or float32. Sums run in the order of the tokens.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernel.h"

#define RESTRICT __restrict__

namespace {

struct Bf16 {
  uint16_t bits;
};

inline float get(float value) { return value; }

inline float get(Bf16 value) {
  const uint32_t bits = (uint32_t)value.bits << 16;
  float found;
  memcpy(&found, &bits, sizeof found);
  return found;
}

inline void put(float *to, float value) { *to = value; }

inline void put(Bf16 *to, float value) {  // to the nearest, ties to even; NaN stays NaN
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const bool nan = (bits & 0x7FFFFFFF) > 0x7F800000;
  to->bits = nan ? 0x7FC0 : (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}

template <typename Function>
void by_type(int64_t bf16, Function function) {
  if (bf16)
    function(Bf16());
  else
    function(float());
}

inline float fma(float x, float y, float z) { return __builtin_fmaf(x, y, z); }

// e^x to 2e-7 of itself between -87 and 88 (Cephes' polynomial), in operations that become vector instructions.
inline float exponential(float x) {
  x = std::min(std::max(x, -87.f), 88.f);
  const float power = floorf(fma(x, 1.44269504f, 0.5f));
  x = fma(power, 2.12194440e-4f, fma(power, -0.693359375f, x));
  float y = fma(1.9875691500e-4f, x, 1.3981999507e-3f);
  y = fma(y, x, 8.3334519073e-3f);
  y = fma(y, x, 4.1665795894e-2f);
  y = fma(y, x, 1.6666665459e-1f);
  y = fma(y, x, 5.0000001201e-1f);
  y = fma(y * x, x, x) + 1.f;
  const int32_t bits = ((int32_t)power + 127) << 23;
  float scale;
  memcpy(&scale, &bits, sizeof scale);
  return y * scale;
}

inline float sigmoid(float x) { return 1.f / (1.f + exponential(-x)); }

// In eight partial sums, whose order is fixed.
inline float dot(const float *RESTRICT x, const float *RESTRICT y, int64_t width) {
  constexpr int64_t LANES = 8;
  float lanes[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES)
    for (int64_t j = 0; j < LANES; j++) lanes[j] += x[i + j] * y[i + j];
  float rest = 0.f;
  for (; i < width; i++) rest += x[i] * y[i];
  return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7])) + rest;
}

// Sums over tokens: in float32 over a few, of those in float64.
class Sums {
 public:
  Sums(int64_t rows, int64_t width) : width_(width), part_(rows * width), total_(rows * width) {}
  float *row(int64_t index) { return part_.data() + index * width_; }
  void flush() {
    for (size_t i = 0; i < part_.size(); i++) total_[i] += part_[i];
    std::fill(part_.begin(), part_.end(), 0.f);
  }
  void store(float *to) {
    flush();
    std::copy(total_.begin(), total_.end(), to);
  }

 private:
  int64_t width_;
  std::vector<float> part_;
  std::vector<double> total_;
};

constexpr int64_t BLOCK = 64;  // tokens summed in float32

// Dice with the mean and the scale of the batch; without them PReLU, of which ReLU is the one with slope 0.
struct Activation {
  const float *mean, *scale, *alpha;
};

template <typename Value>
void activate(const Activation &a, const Value *RESTRICT hidden, int64_t width, float *RESTRICT to) {
  if (a.mean)
    for (int64_t i = 0; i < width; i++) {
      const float s = get(hidden[i]), p = sigmoid((s - a.mean[i]) * a.scale[i]);
      to[i] = s * (a.alpha[i] + (1.f - a.alpha[i]) * p);
    }
  else
    for (int64_t i = 0; i < width; i++) {
      const float s = get(hidden[i]), alpha = a.alpha[i];
      to[i] = s * (s > 0.f ? 1.f : alpha);
    }
}

// From the gradient of an activation's output, which becomes the output, to that of its input, to, statistics taken as given;
// adds to the sums of the gradient of alpha, of z = (s - mean) scale, and of z times z.
template <typename Value>
void activate_back(const Activation &a, const Value *RESTRICT hidden, int64_t width, float *RESTRICT gradient,
                   Value *RESTRICT to, float *RESTRICT of_alpha, float *RESTRICT of_z, float *RESTRICT of_z_z) {
  if (a.mean)
    for (int64_t i = 0; i < width; i++) {
      const float s = get(hidden[i]), g = gradient[i], z = (s - a.mean[i]) * a.scale[i], p = sigmoid(z);
      const float slope = a.alpha[i] + (1.f - a.alpha[i]) * p;
      const float left = g * s * (1.f - p), dz = left * p * (1.f - a.alpha[i]);
      of_alpha[i] += left;
      of_z[i] += dz;
      of_z_z[i] += dz * z;
      gradient[i] = s * slope;
      put(to + i, g * slope + dz * a.scale[i]);
    }
  else
    for (int64_t i = 0; i < width; i++) {
      const float s = get(hidden[i]), g = gradient[i], alpha = a.alpha[i], below = g * s;
      const float slope = s > 0.f ? 1.f : alpha;
      of_alpha[i] += s > 0.f ? 0.f : below;
      gradient[i] = s * slope;
      put(to + i, g * slope);
    }
}

template <typename Value>
void add_moments(const Value *RESTRICT hidden, const float *RESTRICT shift, int64_t width, float *RESTRICT sum,
                 float *RESTRICT squares) {
  for (int64_t i = 0; i < width; i++) {
    const float x = get(hidden[i]) - shift[i];
    sum[i] += x;
    squares[i] += x * x;
  }
}

// What goes through Dice's statistics: gradient += constant + slope (s - mean).
struct Through {
  const float *mean, *constant, *slope;
  template <typename Value>
  void add(const Value *RESTRICT hidden, int64_t width, Value *RESTRICT gradient) const {
    for (int64_t i = 0; i < width; i++)
      put(gradient + i, get(gradient[i]) + constant[i] + slope[i] * (get(hidden[i]) - mean[i]));
  }
};

// How many tokens of its sample come after token t, the last position for all older ones.
inline int64_t position_of(int64_t t, int64_t end, int64_t positions) { return std::min(end - 1 - t, positions - 1); }

}  // namespace

// pairs [T, 2 D]: [k, q k]. With cosine [T]: cos(q, k), and the lengths of k [T] and of q [B], at least 1e-8.
KERNEL void attention_pairs(int64_t samples, const int64_t *offsets, int64_t width, const float *tokens, const float *query,
                            int64_t bf16, void *pairs, float *cosine, float *token_norm, float *query_norm) {
  by_type(bf16, [&](auto type) {
    using Value = decltype(type);
    for (int64_t b = 0; b < samples; b++) {
      const float *q = query + b * width;
      if (cosine) query_norm[b] = std::max(sqrtf(dot(q, q, width)), 1e-8f);
      for (int64_t t = offsets[b]; t < offsets[b + 1]; t++) {
        const float *RESTRICT k = tokens + t * width;
        Value *RESTRICT pair = (Value *)pairs + t * 2 * width;
        for (int64_t i = 0; i < width; i++) put(pair + i, k[i]), put(pair + width + i, k[i] * q[i]);
        if (!cosine) continue;
        token_norm[t] = std::max(sqrtf(dot(k, k, width)), 1e-8f);
        cosine[t] = dot(q, k, width) / (token_norm[t] * query_norm[b]);
      }
    }
  });
}

// hidden [T, C] += of_query [B, C] of its sample + cosine [T] cosine_weight [C] + positions [P, C] of its distance from the end;
// with shift [C] also the sums [2, C] of (hidden - shift) and of its square.
KERNEL void attention_hidden(int64_t samples, const int64_t *offsets, int64_t channels, int64_t bf16, void *hidden,
                             const float *of_query, const float *cosine, const float *cosine_weight, const float *positions,
                             int64_t num_positions, const float *shift, float *sums) {
  by_type(bf16, [&](auto type) {
    using Value = decltype(type);
    Sums found(2, channels);
    std::vector<float> scratch(channels);
    float *RESTRICT row = scratch.data();
    for (int64_t b = 0; b < samples; b++, found.flush())
      for (int64_t t = offsets[b]; t < offsets[b + 1]; t++) {
        Value *RESTRICT h = (Value *)hidden + t * channels;
        const float *RESTRICT own = of_query + b * channels;
        for (int64_t i = 0; i < channels; i++) row[i] = get(h[i]) + own[i];
        if (cosine)
          for (int64_t i = 0; i < channels; i++) row[i] += cosine[t] * cosine_weight[i];
        if (positions) {
          const float *RESTRICT position = positions + position_of(t, offsets[b + 1], num_positions) * channels;
          for (int64_t i = 0; i < channels; i++) row[i] += position[i];
        }
        for (int64_t i = 0; i < channels; i++) put(h + i, row[i]);
        if (shift) add_moments(h, shift, channels, found.row(0), found.row(1));
      }
    if (shift) found.store(sums);
  });
}

// sums [2, C] of (hidden - shift) and of its square.
KERNEL void attention_moments(int64_t tokens, int64_t channels, int64_t bf16, const void *hidden, const float *shift,
                              float *sums) {
  by_type(bf16, [&](auto type) {
    using Value = decltype(type);
    Sums found(2, channels);
    for (int64_t t = 0; t < tokens; t++) {
      add_moments((const Value *)hidden + t * channels, shift, channels, found.row(0), found.row(1));
      if (t % BLOCK == BLOCK - 1) found.flush();
    }
    found.store(sums);
  });
}

KERNEL void attention_activate(int64_t tokens, int64_t channels, int64_t bf16, const void *hidden, const float *mean,
                               const float *scale, const float *alpha, void *output) {
  const Activation activation = {mean, scale, alpha};
  by_type(bf16, [&](auto type) {
    using Value = decltype(type);
    std::vector<float> row(channels);
    for (int64_t t = 0; t < tokens; t++) {
      activate(activation, (const Value *)hidden + t * channels, channels, row.data());
      for (int64_t i = 0; i < channels; i++) put((Value *)output + t * channels + i, row[i]);
    }
  });
}

// scores [T]: activation(hidden) . weight [C] + bias.
KERNEL void attention_score(int64_t tokens, int64_t channels, int64_t bf16, const void *hidden, const float *mean,
                            const float *scale, const float *alpha, const float *weight, const float *bias, float *scores) {
  const Activation activation = {mean, scale, alpha};
  by_type(bf16, [&](auto type) {
    using Value = decltype(type);
    std::vector<float> row(channels);
    for (int64_t t = 0; t < tokens; t++) {
      activate(activation, (const Value *)hidden + t * channels, channels, row.data());
      scores[t] = dot(row.data(), weight, channels) + *bias;
    }
  });
}

// weights [T]: scores, or their softmax over a sample; output [B, D]: sums of weights (k + intensity), totals [B]: of weights.
KERNEL void attention_pool(int64_t samples, const int64_t *offsets, int64_t width, int64_t softmax, const float *scores,
                           const float *tokens, const float *intensity, float *weights, float *output, float *totals) {
  for (int64_t b = 0; b < samples; b++) {
    const int64_t begin = offsets[b], end = offsets[b + 1];
    std::copy(scores + begin, scores + end, weights + begin);
    if (softmax && begin < end) {
      const float largest = *std::max_element(scores + begin, scores + end);
      float sum = 0.f;
      for (int64_t t = begin; t < end; t++) sum += weights[t] = exponential(scores[t] - largest);
      for (int64_t t = begin; t < end; t++) weights[t] /= sum;
    }
    float *RESTRICT to = output + b * width;
    std::fill(to, to + width, 0.f);
    totals[b] = 0.f;
    for (int64_t t = begin; t < end; t++) {
      const float *RESTRICT k = tokens + t * width;
      for (int64_t i = 0; i < width; i++) to[i] += weights[t] * k[i];
      totals[b] += weights[t];
    }
    if (intensity)
      for (int64_t i = 0; i < width; i++) to[i] += totals[b] * intensity[i];
  }
}

// gradient [B, D] of the output -> of_scores [T], of_tokens [T, D].
KERNEL void attention_pool_back(int64_t samples, const int64_t *offsets, int64_t width, int64_t softmax, const float *gradient,
                                const float *tokens, const float *intensity, const float *weights, float *of_scores,
                                float *of_tokens) {
  for (int64_t b = 0; b < samples; b++) {
    const float *RESTRICT g = gradient + b * width;
    const float added = intensity ? dot(g, intensity, width) : 0.f;
    float mean = 0.f;
    for (int64_t t = offsets[b]; t < offsets[b + 1]; t++) {
      float *RESTRICT to = of_tokens + t * width;
      for (int64_t i = 0; i < width; i++) to[i] = weights[t] * g[i];
      of_scores[t] = dot(g, tokens + t * width, width) + added;
      mean += of_scores[t] * weights[t];
    }
    if (softmax)
      for (int64_t t = offsets[b]; t < offsets[b + 1]; t++) of_scores[t] = weights[t] * (of_scores[t] - mean);
  }
}

// gradient [T, C]: of hidden, from that of the activations, which it holds, or from of_scores [T] where that is given.
// sums [4, C]: of alpha, of z, of z times z, and of the weight of the scores.
KERNEL void attention_activate_back(int64_t tokens, int64_t channels, int64_t bf16, const void *hidden, const float *mean,
                                    const float *scale, const float *alpha, const float *of_scores, const float *weight,
                                    void *gradient, float *sums) {
  const Activation activation = {mean, scale, alpha};
  by_type(bf16, [&](auto type) {
    using Value = decltype(type);
    Sums found(4, channels);
    std::vector<float> scratch(channels);
    float *RESTRICT row = scratch.data(), *RESTRICT of_weight = found.row(3);
    for (int64_t t = 0; t < tokens; t++) {
      const Value *RESTRICT h = (const Value *)hidden + t * channels;
      Value *RESTRICT g = (Value *)gradient + t * channels;
      for (int64_t i = 0; i < channels; i++) row[i] = of_scores ? of_scores[t] * weight[i] : get(g[i]);
      activate_back(activation, h, channels, row, g, found.row(0), found.row(1), found.row(2));
      if (of_scores)
        for (int64_t i = 0; i < channels; i++) of_weight[i] += of_scores[t] * row[i];
      if (t % BLOCK == BLOCK - 1) found.flush();
    }
    found.store(sums);
  });
}

// Adds to gradient [T, C] what goes through the statistics of hidden (where there are some); of_bias [C] is its sum.
KERNEL void attention_through(int64_t tokens, int64_t channels, int64_t bf16, const void *hidden, const float *mean,
                              const float *constant, const float *slope, void *gradient, float *of_bias) {
  const Through through = {mean, constant, slope};
  by_type(bf16, [&](auto type) {
    using Value = decltype(type);
    Sums found(1, channels);
    for (int64_t t = 0; t < tokens; t++) {
      Value *RESTRICT g = (Value *)gradient + t * channels;
      float *RESTRICT sum = found.row(0);
      if (mean) through.add((const Value *)hidden + t * channels, channels, g);
      for (int64_t i = 0; i < channels; i++) sum[i] += get(g[i]);
      if (t % BLOCK == BLOCK - 1) found.flush();
    }
    found.store(of_bias);
  });
}

// The same for the first layer, and the gradients of what attention_hidden added: of_query [B, C], of_cosine [T],
// of_cosine_weight [C], of_positions [P, C] (zeros before).
KERNEL void attention_hidden_back(int64_t samples, const int64_t *offsets, int64_t channels, int64_t bf16, const void *hidden,
                                  const float *mean, const float *constant, const float *slope, void *gradient,
                                  const float *cosine, const float *cosine_weight, int64_t num_positions, float *of_query,
                                  float *of_cosine, float *of_cosine_weight, float *of_positions) {
  const Through through = {mean, constant, slope};
  by_type(bf16, [&](auto type) {
    using Value = decltype(type);
    Sums found(1, channels);
    std::vector<float> scratch(channels);
    float *RESTRICT row = scratch.data();
    for (int64_t b = 0; b < samples; b++, found.flush()) {
      float *RESTRICT own = of_query + b * channels, *RESTRICT weight = found.row(0);
      std::fill(own, own + channels, 0.f);
      for (int64_t t = offsets[b]; t < offsets[b + 1]; t++) {
        Value *RESTRICT g = (Value *)gradient + t * channels;
        if (mean) through.add((const Value *)hidden + t * channels, channels, g);
        for (int64_t i = 0; i < channels; i++) row[i] = get(g[i]), own[i] += row[i];
        if (of_positions) {
          float *RESTRICT position = of_positions + position_of(t, offsets[b + 1], num_positions) * channels;
          for (int64_t i = 0; i < channels; i++) position[i] += row[i];
        }
        if (!cosine_weight) continue;
        for (int64_t i = 0; i < channels; i++) weight[i] += cosine[t] * row[i];
        of_cosine[t] = dot(row, cosine_weight, channels);
      }
    }
    if (cosine_weight) found.store(of_cosine_weight);
  });
}

// of_pairs [T, 2 D], of_cosine [T] -> of_query [B, D]; of_tokens [T, D] is added to.
KERNEL void attention_pairs_back(int64_t samples, const int64_t *offsets, int64_t width, const float *tokens,
                                 const float *query, int64_t bf16, const void *of_pairs, const float *cosine,
                                 const float *token_norm, const float *query_norm, const float *of_cosine, float *of_query,
                                 float *of_tokens) {
  by_type(bf16, [&](auto type) {
    using Value = decltype(type);
    for (int64_t b = 0; b < samples; b++) {
      const float *RESTRICT q = query + b * width;
      float *RESTRICT to_q = of_query + b * width;
      std::fill(to_q, to_q + width, 0.f);
      for (int64_t t = offsets[b]; t < offsets[b + 1]; t++) {
        const float *RESTRICT k = tokens + t * width;
        const Value *RESTRICT pair = (const Value *)of_pairs + t * 2 * width;
        float *RESTRICT to_k = of_tokens + t * width;
        for (int64_t i = 0; i < width; i++) {
          const float product = get(pair[width + i]);
          to_k[i] += get(pair[i]) + product * q[i];
          to_q[i] += product * k[i];
        }
        if (!cosine) continue;
        const float g = of_cosine[t], cross = g / (token_norm[t] * query_norm[b]), turn = g * cosine[t];
        const float along_k = turn / (token_norm[t] * token_norm[t]), along_q = turn / (query_norm[b] * query_norm[b]);
        for (int64_t i = 0; i < width; i++) {
          to_k[i] += cross * q[i] - along_k * k[i];
          to_q[i] += cross * k[i] - along_q * q[i];
        }
      }
    }
  });
}
