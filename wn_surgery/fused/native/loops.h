// The arithmetic of small weights and of middle axes, in the order in which torch adds.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace wn_surgery {

// Small weights ----------------------------------------------------------------------------------

// For a weight of a few kilobytes an operator of torch costs more than its arithmetic. These loops
// add in the order of torch's kernel for the first axis, so the bits are the same; `setup` compares
// them, and where they differ they are not used.

constexpr size_t small_bytes = 32 << 10;
inline int lanes = 0;  // of torch's vectors, in floats; 0: its order of adding is not known

template <int L>
float sum_of_products(const float* x, const float* y, int64_t n) {
  if (n < L) {
    float sum = x[0] * y[0];
    for (int64_t i = 1; i < n; ++i) sum += x[i] * y[i];
    return sum;
  }
  float sums[L];
  for (int l = 0; l < L; ++l) sums[l] = x[l] * y[l];
  int64_t d = L;
  for (; d + L <= n; d += L) {
    for (int l = 0; l < L; ++l) sums[l] += x[d + l] * y[d + l];
  }
  for (int l = 0; d + l < n; ++l) sums[l] += x[d + l] * y[d + l];
  for (int half = L / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
  }
  return sums[0];
}

template <int L>
void forward_rows(const float* v, const float* g, float* w, float* norms, int64_t rows, int64_t n) {
  for (int64_t i = 0; i < rows; ++i, v += n, w += n) {
    norms[i] = std::sqrt(sum_of_products<L>(v, v, n));
    const float scale = g[i] / norms[i];
    for (int64_t j = 0; j < n; ++j) w[j] = v[j] * scale;
  }
}

template <int L>
void backward_rows(const float* dw, const float* v, const float* g, const float* norms, float* dv,
                   float* dg, int64_t rows, int64_t n) {
  for (int64_t i = 0; i < rows; ++i, dw += n, v += n, dv += n) {
    dg[i] = sum_of_products<L>(dw, v, n) / norms[i];
    const float scale = g[i] / norms[i], along = scale * dg[i] / norms[i];
    for (int64_t j = 0; j < n; ++j) dv[j] = std::fma(-along, v[j], scale * dw[j]);
  }
}

// Middle axes ------------------------------------------------------------------------------------

// For these torch has no kernel, and each of its operators is a pass over memory. Seen as (before,
// kept, after), with `after` a multiple of the lanes, the norms take one pass and the weight one;
// the backward takes two. The order of adding is that of torch.norm_except_dim, as above.

inline bool middle_is_known = false;
inline bool middle_fuses = false;  // whether torch rounds a square before it is added

struct Axes {
  int64_t before, kept, after;

  // Call `columns(first, end)` for ranges of `kept`, one for each thread. Shorter ones, which would
  // stay in the cache for a second pass, are slower: their pieces are a power of two apart.
  template <typename F>
  void each(F&& columns) const {
    at::parallel_for(0, kept, std::max<int64_t>(1, (1 << 15) / (before * after)), columns);
  }
};

template <int L, bool fuse>
void middle_forward(const float* v, const float* g, float* w, float* norms, float eps,
                    const Axes& axes) {
  axes.each([&](int64_t first, int64_t end) {
    std::vector<float> sums((end - first) * L, 0.0f);
    for (int64_t b = 0; b < axes.before; ++b) {
      const float* x = v + (b * axes.kept + first) * axes.after;
      for (float* s = sums.data(); s < sums.data() + sums.size(); s += L) {
        for (int64_t a = 0; a < axes.after; a += L, x += L) {
          for (int l = 0; l < L; ++l) s[l] = fuse ? std::fma(x[l], x[l], s[l]) : s[l] + x[l] * x[l];
        }
      }
    }
    for (int64_t k = first; k < end; ++k) {
      const float* s = sums.data() + (k - first) * L;
      float sum = s[0];
      for (int l = 1; l < L; ++l) sum += s[l];
      norms[k] = std::sqrt(sum);
      if (norms[k] < eps) norms[k] = eps;  // a NaN stays one
    }
    for (int64_t b = 0; b < axes.before; ++b) {
      for (int64_t k = first; k < end; ++k) {
        const float scale = g[k] / norms[k];
        const int64_t start = (b * axes.kept + k) * axes.after;
        for (int64_t j = start; j < start + axes.after; ++j) w[j] = v[j] * scale;
      }
    }
  });
}

inline void middle_backward(const float* dw, const float* v, const float* g, const float* norms,
                            float* dv, float* dg, float eps, const Axes& axes) {
  constexpr int L = 8;
  axes.each([&](int64_t first, int64_t end) {
    std::vector<float> sums((end - first) * L, 0.0f), along(end - first);
    for (int64_t b = 0; b < axes.before; ++b) {
      const int64_t start = (b * axes.kept + first) * axes.after;
      const float *x = v + start, *y = dw + start;
      for (float* s = sums.data(); s < sums.data() + sums.size(); s += L) {
        for (int64_t a = 0; a < axes.after; a += L, x += L, y += L) {
          for (int l = 0; l < L; ++l) s[l] += y[l] * x[l];
        }
      }
    }
    for (int64_t k = first; k < end; ++k) {
      double sum = 0;
      for (int l = 0; l < L; ++l) sum += sums[(k - first) * L + l];
      dg[k] = static_cast<float>(sum) / norms[k];
      // A norm that is clamped is a constant.
      along[k - first] = eps > 0 && !(norms[k] > eps) ? 0 : g[k] / norms[k] * dg[k] / norms[k];
    }
    for (int64_t b = 0; b < axes.before; ++b) {
      for (int64_t k = first; k < end; ++k) {
        const float scale = g[k] / norms[k], less = along[k - first];
        const int64_t start = (b * axes.kept + k) * axes.after;
        for (int64_t j = start; j < start + axes.after; ++j)
          dv[j] = std::fma(-less, v[j], scale * dw[j]);
      }
    }
  });
}

}  // namespace wn_surgery
