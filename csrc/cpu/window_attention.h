// Attention of one window and one head, for the images that share the window. Included by kernels.h.
//
// With n tokens, head dim D, and np, dp their multiples of the vector width, the tiles are
//   q (times scale), k, v, grad_out, result [n, dp];  k_t, v_t [dp, np];
//   bias, scores, grad_scores, grad_bias [n, np].
// The bias tile, with -inf in the columns beyond n, is made once for all images; the gradient of
// the bias is summed in a tile over them and added to the table once.

template <class A>
struct Tiles {
  A *bias, *scores, *grad_scores, *grad_bias;
  A *q, *k, *v, *grad_out, *result;
  A *k_t, *v_t;
  int64_t np, dp;
  int64_t bytes = 0;

  Tiles(void* scratch, int64_t n, int64_t head_dim) {
    constexpr int64_t W = Vector<A>::width;
    np = (n + W - 1) / W * W;
    dp = (head_dim + W - 1) / W * W;
    char* base = (char*)scratch;
    const auto take = [&](int64_t elements) {
      A* tile = (A*)(base + bytes);
      bytes += (elements * int64_t(sizeof(A)) + 63) / 64 * 64;
      return tile;
    };
    bias = take(n * np), scores = take(n * np);
    grad_scores = take(n * np), grad_bias = take(n * np);
    q = take(n * dp), k = take(n * dp), v = take(n * dp);
    grad_out = take(n * dp), result = take(n * dp);
    k_t = take(dp * np), v_t = take(dp * np);
  }
};

// tile[i, 0:D] = factor * rows; the columns beyond D are zero.
template <class A, class T>
GREENMIM_INLINE void load_rows(
    A* tile, int64_t dp, const T* from, int64_t stride, const int32_t* rows, int n, int head_dim,
    A factor) {
  constexpr int W = Vector<A>::width;
  for (int i = 0; i < n; i++, tile += dp) {
    const T* row = from + rows[i] * stride;
    if (head_dim == dp) {  // whole vectors
      for (int64_t d = 0; d < dp; d += W) store<A>(tile + d, factor * load_storage<A>(row + d));
      continue;
    }
    for (int d = 0; d < head_dim; d++) tile[d] = factor * load_scalar(row + d);
    for (int64_t d = head_dim; d < dp; d++) tile[d] = 0;
  }
}

// tile_t[d, i] = tile[i, d], for whole vectors; the columns beyond n are zero.
template <class A>
GREENMIM_INLINE void transpose(A* tile_t, int64_t np, const A* tile, int64_t dp, int n) {
  constexpr int W = Vector<A>::width;
  for (int64_t i = 0; i < np; i += W)
    for (int64_t d = 0; d < dp; d += W) {
      Vec<A> rows[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; r++)
        rows[r] = i + r < n ? load<A>(tile + (i + r) * dp + d) : Vec<A>{};
      transpose_block<A>(rows);
#pragma GCC unroll 16
      for (int r = 0; r < W; r++) store<A>(tile_t + (d + r) * np + i, rows[r]);
    }
}

template <class A, class T>
GREENMIM_INLINE void store_rows(
    T* to, int64_t stride, const int32_t* rows, const A* tile, int64_t dp, int n, int head_dim,
    A factor) {
  constexpr int W = Vector<A>::width;
  for (int i = 0; i < n; i++, tile += dp) {
    T* row = to + rows[i] * stride;
    if (head_dim == dp) {
      for (int64_t d = 0; d < dp; d += W) store_storage<A>(row + d, factor * load<A>(tile + d));
      continue;
    }
    for (int d = 0; d < head_dim; d++) store_scalar(row + d, factor * tile[d]);
  }
}

// Ask for one row of a head ahead of its use. Called row by row, between other work: a burst of
// requests would wait for the processor's queue of misses. Reads go to the second cache: rows lie
// at multiples of 3C, which share few sets of the first one.
template <class T>
GREENMIM_INLINE void prefetch_row(const T* row, int head_dim, bool to_write) {
  for (int byte = 0; byte < head_dim * int(sizeof(T)); byte += 64)
    to_write ? __builtin_prefetch((const char*)row + byte, 1)
             : __builtin_prefetch((const char*)row + byte, 0, 2);
}

template <class A>
GREENMIM_INLINE void make_bias(const WindowTask& task, const Tiles<A>& t) {
  const A* table = (const A*)task.table;
  const int n = task.size;
  for (int i = 0; i < n; i++) {
    A* row = t.bias + i * t.np;
    const int32_t first = task.query_row[i];
    for (int j = 0; j < n; j++)
      row[j] = table == nullptr ? A(0) : table[int64_t(first + task.key_row[j]) * task.num_heads];
    for (int64_t j = n; j < t.np; j++) row[j] = -__builtin_inf();
  }
}

template <class T>
void forward(const WindowTask& task, void* scratch) {
  using A = typename Arithmetic<T>::type;
  constexpr int W = Vector<A>::width;
  const int n = task.size, head_dim = task.head_dim;
  const int64_t channels = int64_t(task.num_heads) * head_dim;
  const int64_t image = task.rows_per_image * channels;
  const Tiles<A> t(scratch, n, head_dim);
  make_bias(task, t);
  for (int64_t b = task.first_image; b < task.last_image; b++) {
    const T* q = (const T*)task.qkv + b * 3 * image + task.head * head_dim;
    const T* next_q = b + 1 < task.last_image ? q + 3 * image : q;
    T* out = (T*)task.out + b * image + task.head * head_dim;
    A* lse = (A*)task.lse + (b * task.num_heads + task.head) * task.rows_per_image;
    load_rows<A>(t.q, t.dp, q, 3 * channels, task.rows, n, head_dim, A(task.scale));
    load_rows<A>(t.k, t.dp, q + channels, 3 * channels, task.rows, n, head_dim, A(1));
    load_rows<A>(t.v, t.dp, q + 2 * channels, 3 * channels, task.rows, n, head_dim, A(1));
    transpose<A>(t.k_t, t.np, t.k, t.dp, n);
    product<A>({t.q, t.dp, 1}, t.k_t, t.np, t.scores, t.np, n, t.np, head_dim);
    for (int i = 0; i < n; i++) {
      A* row = t.scores + i * t.np;
      const A* bias = t.bias + i * t.np;
      const int64_t at = task.rows[i] * channels;
      prefetch_row(out + at, head_dim, true);
      for (int part = 0; part < 3; part++)
        prefetch_row(next_q + 3 * at + part * channels, head_dim, false);
      Vec<A> largest = broadcast<A>(-__builtin_inf());
      for (int64_t j = 0; j < t.np; j += W) {
        const Vec<A> score = load<A>(row + j) + load<A>(bias + j);
        largest = score > largest ? score : largest;
        store<A>(row + j, score);
      }
      const A maximum = horizontal_max<A>(largest);
      Vec<A> sums{};
      for (int64_t j = 0; j < t.np; j += W) {
        const Vec<A> p = exponential(load<A>(row + j) - maximum);
        sums += p;
        store<A>(row + j, p);
      }
      const A sum = horizontal_sum<A>(sums);
      lse[task.rows[i]] = maximum + A(__builtin_log(sum));
      // Dividing the row of probabilities costs the same as dividing the output, and less code.
      const Vec<A> factor = broadcast<A>(A(1) / sum);
      for (int64_t j = 0; j < t.np; j += W) store<A>(row + j, load<A>(row + j) * factor);
    }
    product<A>({t.scores, t.np, 1}, t.v, t.dp, t.result, t.dp, n, t.dp, n);
    store_rows<A>(out, channels, task.rows, t.result, t.dp, n, head_dim, A(1));
  }
}

template <class T>
void backward(const WindowTask& task, void* scratch) {
  using A = typename Arithmetic<T>::type;
  constexpr int W = Vector<A>::width;
  const int n = task.size, head_dim = task.head_dim;
  const int64_t channels = int64_t(task.num_heads) * head_dim;
  const int64_t image = task.rows_per_image * channels;
  const Tiles<A> t(scratch, n, head_dim);
  make_bias(task, t);
  for (int64_t j = 0; j < n * t.np; j++) t.grad_bias[j] = 0;
  for (int64_t b = task.first_image; b < task.last_image; b++) {
    const int64_t start = b * 3 * image + task.head * head_dim;
    const T* q = (const T*)task.qkv + start;
    const T* grad_out = (const T*)task.grad_out + b * image + task.head * head_dim;
    const bool more = b + 1 < task.last_image;
    const T* next_q = more ? q + 3 * image : q;
    const T* next_grad_out = more ? grad_out + image : grad_out;
    const A* lse = (const A*)task.lse + (b * task.num_heads + task.head) * task.rows_per_image;
    load_rows<A>(t.q, t.dp, q, 3 * channels, task.rows, n, head_dim, A(task.scale));
    load_rows<A>(t.k, t.dp, q + channels, 3 * channels, task.rows, n, head_dim, A(1));
    load_rows<A>(t.v, t.dp, q + 2 * channels, 3 * channels, task.rows, n, head_dim, A(1));
    load_rows<A>(t.grad_out, t.dp, grad_out, channels, task.rows, n, head_dim, A(1));
    transpose<A>(t.k_t, t.np, t.k, t.dp, n);
    transpose<A>(t.v_t, t.np, t.v, t.dp, n);
    product<A>({t.q, t.dp, 1}, t.k_t, t.np, t.scores, t.np, n, t.np, head_dim);
    product<A>({t.grad_out, t.dp, 1}, t.v_t, t.np, t.grad_scores, t.np, n, t.np, head_dim);
    for (int i = 0; i < n; i++) {
      A* row = t.scores + i * t.np;
      A* grad_row = t.grad_scores + i * t.np;
      const A* bias = t.bias + i * t.np;
      A* grad_bias = t.grad_bias + i * t.np;
      const A normaliser = lse[task.rows[i]];
      const int64_t at = task.rows[i] * channels;
      prefetch_row(next_grad_out + at, head_dim, false);
      for (int part = 0; part < 3; part++)
        prefetch_row(next_q + 3 * at + part * channels, head_dim, false);
      // delta = sum_j P dP, which is sum_d out grad_out without the rounding of `out`.
      Vec<A> deltas{};
      for (int64_t j = 0; j < t.np; j += W) {
        const Vec<A> p = exponential(load<A>(row + j) + load<A>(bias + j) - normaliser);
        deltas += p * load<A>(grad_row + j);
        store<A>(row + j, p);
      }
      const A delta = horizontal_sum<A>(deltas);
      for (int64_t j = 0; j < t.np; j += W) {
        const Vec<A> grad = load<A>(row + j) * (load<A>(grad_row + j) - delta);
        store<A>(grad_row + j, grad);
        store<A>(grad_bias + j, load<A>(grad_bias + j) + grad);
      }
    }
    if (task.out == nullptr) continue;
    T* grad_q = (T*)task.out + start;
    product<A>({t.grad_scores, t.np, 1}, t.k, t.dp, t.result, t.dp, n, t.dp, n);
    store_rows<A>(grad_q, 3 * channels, task.rows, t.result, t.dp, n, head_dim, A(task.scale));
    // t.q carries the scale already.
    product<A>({t.grad_scores, 1, t.np}, t.q, t.dp, t.result, t.dp, n, t.dp, n);
    store_rows<A>(grad_q + channels, 3 * channels, task.rows, t.result, t.dp, n, head_dim, A(1));
    product<A>({t.scores, 1, t.np}, t.grad_out, t.dp, t.result, t.dp, n, t.dp, n);
    store_rows<A>(grad_q + 2 * channels, 3 * channels, task.rows, t.result, t.dp, n, head_dim, A(1));
  }
  if (task.grad_table == nullptr) return;
  A* grad_table = (A*)task.grad_table;
  for (int i = 0; i < n; i++)
    for (int j = 0; j < n; j++)
      grad_table[task.query_row[i] + task.key_row[j]] += t.grad_bias[i * t.np + j];
}

void forward_any(const WindowTask& task, void* scratch) {
  switch (task.storage) {
    case StorageType::Float32: return forward<float>(task, scratch);
    case StorageType::Float64: return forward<double>(task, scratch);
    case StorageType::BFloat16: return forward<bfloat16>(task, scratch);
  }
}

void backward_any(const WindowTask& task, void* scratch) {
  switch (task.storage) {
    case StorageType::Float32: return backward<float>(task, scratch);
    case StorageType::Float64: return backward<double>(task, scratch);
    case StorageType::BFloat16: return backward<bfloat16>(task, scratch);
  }
}

int64_t scratch_bytes(StorageType storage, int64_t size, int64_t head_dim) {
  if (storage == StorageType::Float64) return Tiles<double>(nullptr, size, head_dim).bytes;
  return Tiles<float>(nullptr, size, head_dim).bytes;
}
