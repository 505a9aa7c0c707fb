// Passes between the products of linear layers: GELU, and the transposition of a gradient with all
// that is to be done to it while it is in registers. Included by kernels.h.

struct Gelu {
  Vec<float> value, slope;
};

// GELU x F(x) and its derivative F(x) + x f(x), with the normal distribution's density f and
// F(x) = 1 - f(x) (b1 t + ... + b5 t^5), t = 1 / (1 + p x) for x > 0, which is within 7.5e-8
// (Abramowitz and Stegun, 26.2.17): one exponential gives both.
GREENMIM_INLINE Gelu gelu_of(Vec<float> x) {
  using V = Vec<float>;
  const V density = exponential(x * x * -0.5f) * 0.398942280f;
  const V t = 1.0f / (1.0f + 0.2316419f * (x > 0.0f ? x : -x));
  V p = broadcast<float>(1.330274429f);
  p = p * t - 1.821255978f;
  p = p * t + 1.781477937f;
  p = p * t - 0.356563782f;
  p = p * t + 0.319381530f;
  const V tail = density * (p * t);
  const V below = x > 0.0f ? 1.0f - tail : tail;
  return {x * below, below + x * density};
}

// Of the first `count` lanes; the others are zero.
template <bool whole>
GREENMIM_INLINE Vec<float> load_part(const float* from, int64_t count) {
  if constexpr (whole) return load<float>(from);
  Vec<float> value{};
  __builtin_memcpy(&value, from, count * sizeof(float));
  return value;
}
template <bool whole>
GREENMIM_INLINE void store_part(float* to, Vec<float> value, int64_t count) {
  if constexpr (whole) return store<float>(to, value);
  __builtin_memcpy(to, &value, count * sizeof(float));
}

void gelu(float* x, float* out, int64_t size) {
  constexpr int64_t W = Vector<float>::width;
  int64_t i = 0;
  for (; i + W <= size; i += W) {
    const Gelu of = gelu_of(load<float>(x + i));
    store<float>(out + i, of.value);
    store<float>(x + i, of.slope);
  }
  const int64_t rest = size - i;
  if (rest == 0) return;
  const Gelu of = gelu_of(load_part<false>(x + i, rest));
  store_part<false>(out + i, of.value, rest);
  store_part<false>(x + i, of.slope, rest);
}

// A square block of `lanes` columns and `count` rows from row r and column c on; returns the sums of
// its columns added to `sum`, row after row whatever the vector's width.
template <bool scaled, bool whole>
GREENMIM_INLINE Vec<float> transpose_part(
    const TransposeTask& task, int64_t r, int64_t c, int64_t lanes, int64_t count,
    Vec<float> sum) {
  constexpr int W = Vector<float>::width;
  Vec<float> rows[W] = {};
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) {
    if (!whole && i >= count) break;
    const int64_t at = (r + i) * task.columns + c;
    rows[i] = load_part<whole>(task.grad + at, lanes);
    if constexpr (scaled) {
      rows[i] *= load_part<whole>(task.slope + at, lanes);
      store_part<whole>(task.scaled + at, rows[i], lanes);
    }
    sum += rows[i];
  }
  if (task.transposed == nullptr) return sum;
  transpose_block<float>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) {
    if (!whole && i >= lanes) break;
    store_part<whole>(task.transposed + (c + i) * task.rows + r, rows[i], count);
  }
  return sum;
}

// Columns first to last, block of rows after block of rows: along a row the processor sees what comes
// next, down a column it does not.
template <bool scaled>
GREENMIM_INLINE void transpose_columns(const TransposeTask& task, int64_t first, int64_t last) {
  constexpr int64_t W = Vector<float>::width;
  float sum[kColumnsPerSum];
  double total[kColumnsPerSum];
  for (int64_t i = 0; i < last - first; i++) total[i] = 0;
  for (int64_t begin = 0; begin < task.rows; begin += kRowsPerSum) {
    const int64_t end = task.rows - begin < kRowsPerSum ? task.rows : begin + kRowsPerSum;
    for (int64_t i = 0; i < kColumnsPerSum; i++) sum[i] = 0;
    for (int64_t r = begin; r < end; r += W)
      for (int64_t c = first; c < last; c += W) {
        const int64_t lanes = last - c < W ? last - c : W, count = end - r < W ? end - r : W;
        float* of = sum + (c - first);
        store<float>(
            of, lanes == W && count == W
                ? transpose_part<scaled, true>(task, r, c, W, W, load<float>(of))
                : transpose_part<scaled, false>(task, r, c, lanes, count, load<float>(of)));
      }
    for (int64_t i = 0; i < last - first; i++) total[i] += sum[i];
  }
  for (int64_t i = 0; i < last - first; i++) task.sums[first + i] = float(total[i]);
}

void transpose_strips(const TransposeTask& task, int64_t begin, int64_t end) {
  const int64_t last = end * kStripColumns < task.columns ? end * kStripColumns : task.columns;
  for (int64_t c = begin * kStripColumns; c < last; c += kColumnsPerSum) {
    const int64_t to = last - c < kColumnsPerSum ? last : c + kColumnsPerSum;
    if (task.slope == nullptr)
      transpose_columns<false>(task, c, to);
    else
      transpose_columns<true>(task, c, to);
  }
}

// Rows r and columns c of what a linear layer gave transposed, a block as in transpose_part.
template <bool with_gelu, bool whole>
GREENMIM_INLINE void finish_part(
    const FinishTask& task, int64_t r, int64_t c, int64_t lanes, int64_t count) {
  constexpr int W = Vector<float>::width;
  Vec<float> rows[W] = {};
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) {
    if (!whole && i >= lanes) break;
    rows[i] = load_part<whole>(task.transposed + (c + i) * task.rows + r, count);
  }
  transpose_block<float>(rows);
  Vec<float> bias{};
  if (task.bias != nullptr) bias = load_part<whole>(task.bias + c, lanes);
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) {
    if (!whole && i >= count) break;
    const int64_t at = (r + i) * task.columns + c;
    Vec<float> value = rows[i] + bias;
    if constexpr (with_gelu) {
      const Gelu of = gelu_of(value);
      store_part<whole>(task.slope + at, of.slope, lanes);
      value = of.value;
    }
    store_part<whole>(task.out + at, value, lanes);
  }
}

template <bool with_gelu>
GREENMIM_INLINE void finish_columns(const FinishTask& task, int64_t first, int64_t last) {
  constexpr int64_t W = Vector<float>::width;
  for (int64_t r = 0; r < task.rows; r += W)
    for (int64_t c = first; c < last; c += W) {
      const int64_t lanes = last - c < W ? last - c : W;
      const int64_t count = task.rows - r < W ? task.rows - r : W;
      if (lanes == W && count == W)
        finish_part<with_gelu, true>(task, r, c, W, W);
      else
        finish_part<with_gelu, false>(task, r, c, lanes, count);
    }
}

void finish_strips(const FinishTask& task, int64_t begin, int64_t end) {
  const int64_t last = end * kStripColumns < task.columns ? end * kStripColumns : task.columns;
  if (task.slope == nullptr)
    finish_columns<false>(task, begin * kStripColumns, last);
  else
    finish_columns<true>(task, begin * kStripColumns, last);
}
