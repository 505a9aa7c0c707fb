// Attention of one window and one head, for the images that share the window. Included by kernels.h.
//
// With n slots of which m are tokens, head dim D, and np, dp their multiples of the vector width, the
// tiles are
//   q (times scale), grad_out [m, dp];  k, v [n, dp];  k_t, v_t [dp, np];  result [n, dp];
//   bias, scores, grad_scores, grad_bias [m, np].
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

// tile[0:D] = factor * row; the columns beyond D are zero.
template <class A, class T>
GREENMIM_INLINE void load_row(A* tile, int64_t dp, const T* row, int head_dim, A factor) {
  constexpr int W = Vector<A>::width;
  if (head_dim == dp) {  // whole vectors
    for (int64_t d = 0; d < dp; d += W) store<A>(tile + d, factor * load_storage<A>(row + d));
    return;
  }
  for (int d = 0; d < head_dim; d++) tile[d] = factor * load_scalar(row + d);
  for (int64_t d = head_dim; d < dp; d++) tile[d] = 0;
}
template <class A, class T>
GREENMIM_INLINE void load_rows(
    A* tile, int64_t dp, const T* from, int64_t stride, const int32_t* rows, int count, int head_dim,
    A factor) {
  for (int i = 0; i < count; i++)
    load_row<A>(tile + i * dp, dp, from + rows[i] * stride, head_dim, factor);
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
    T* to, int64_t stride, const int32_t* rows, const A* tile, int64_t dp, int count, int head_dim,
    A factor) {
  constexpr int W = Vector<A>::width;
  for (int i = 0; i < count; i++, tile += dp) {
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
  for (int i = 0; i < task.tokens; i++) {
    A* row = t.bias + i * t.np;
    const int32_t first = task.query_row[i];
    for (int j = 0; j < n; j++)
      row[j] = table == nullptr ? A(0) : table[int64_t(first + task.key_row[j]) * task.num_heads];
    for (int64_t j = n; j < t.np; j++) row[j] = -__builtin_inf();
  }
}

// One of q, k, v or their gradients, of the task's head.
template <class T>
struct HeadRows {
  T* first;  // row 0 of image 0
  int64_t image, row;

  HeadRows(const Rows& rows, int head)
      : first(rows.data == nullptr ? nullptr : (T*)rows.data + head * rows.head), image(rows.image), row(rows.row) {}

  T* of(int64_t b) const { return first + b * image; }
};

// The tiles of keys and values, which do not change from image to image for padding.
template <class A, class T>
GREENMIM_INLINE void load_padding(const WindowTask& task, const Tiles<A>& t) {
  for (int i = task.tokens; i < task.size; i++) {
    load_row<A>(t.k + i * t.dp, t.dp, (const T*)task.pad_k, task.head_dim, A(1));
    load_row<A>(t.v + i * t.dp, t.dp, (const T*)task.pad_v, task.head_dim, A(1));
  }
}

template <class T>
void forward(const WindowTask& task, void* scratch) {
  using A = typename Arithmetic<T>::type;
  constexpr int W = Vector<A>::width;
  const int n = task.size, m = task.tokens, head_dim = task.head_dim;
  const int64_t channels = int64_t(task.num_heads) * head_dim;
  const HeadRows<T> q(task.q, task.head), k(task.k, task.head), v(task.v, task.head);
  const Tiles<A> t(scratch, n, head_dim);
  make_bias(task, t);
  load_padding<A, T>(task, t);
  for (int64_t b = task.first_image; b < task.last_image; b++) {
    const int64_t next = b + 1 < task.last_image ? b + 1 : b;
    const T *next_q = q.of(next), *next_k = k.of(next), *next_v = v.of(next);
    T* out = (T*)task.out + b * task.rows_per_image * channels + task.head * head_dim;
    A* lse = (A*)task.lse + (b * task.num_heads + task.head) * task.rows_per_image;
    load_rows<A>(t.q, t.dp, q.of(b), q.row, task.rows, m, head_dim, A(task.scale));
    load_rows<A>(t.k, t.dp, k.of(b), k.row, task.rows, m, head_dim, A(1));
    load_rows<A>(t.v, t.dp, v.of(b), v.row, task.rows, m, head_dim, A(1));
    transpose<A>(t.k_t, t.np, t.k, t.dp, n);
    product<A>({t.q, t.dp, 1}, t.k_t, t.np, t.scores, t.np, m, t.np, head_dim);
    for (int i = 0; i < m; i++) {
      A* row = t.scores + i * t.np;
      const A* bias = t.bias + i * t.np;
      prefetch_row(out + task.rows[i] * channels, head_dim, true);
      prefetch_row(next_q + task.rows[i] * q.row, head_dim, false);
      prefetch_row(next_k + task.rows[i] * k.row, head_dim, false);
      prefetch_row(next_v + task.rows[i] * v.row, head_dim, false);
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
    product<A>({t.scores, t.np, 1}, t.v, t.dp, t.result, t.dp, m, t.dp, n);
    store_rows<A>(out, channels, task.rows, t.result, t.dp, m, head_dim, A(1));
  }
}

// sums[d] += rows of padding of a result.
template <class A>
GREENMIM_INLINE void add_padding(A* sums, const WindowTask& task, const Tiles<A>& t) {
  for (int i = task.tokens; i < task.size; i++)
    for (int d = 0; d < task.head_dim; d++) sums[d] += t.result[i * t.dp + d];
}

template <class T>
void backward(const WindowTask& task, void* scratch) {
  using A = typename Arithmetic<T>::type;
  constexpr int W = Vector<A>::width;
  const int n = task.size, m = task.tokens, head_dim = task.head_dim;
  const int64_t channels = int64_t(task.num_heads) * head_dim;
  const int64_t image = task.rows_per_image * channels;
  const HeadRows<T> q(task.q, task.head), k(task.k, task.head), v(task.v, task.head);
  const HeadRows<T> grad_q(task.grad_q, task.head), grad_k(task.grad_k, task.head),
      grad_v(task.grad_v, task.head);
  A* grad_pad = (A*)task.grad_pad;
  const bool need_qkv = task.grad_q.data != nullptr;
  const Tiles<A> t(scratch, n, head_dim);
  make_bias(task, t);
  load_padding<A, T>(task, t);
  for (int64_t j = 0; j < m * t.np; j++) t.grad_bias[j] = 0;
  for (int64_t b = task.first_image; b < task.last_image; b++) {
    const int64_t next = b + 1 < task.last_image ? b + 1 : b;
    const T *next_q = q.of(next), *next_k = k.of(next), *next_v = v.of(next);
    const T* grad_out = (const T*)task.grad_out + b * image + task.head * head_dim;
    const T* next_grad_out = grad_out + (next - b) * image;
    const A* lse = (const A*)task.lse + (b * task.num_heads + task.head) * task.rows_per_image;
    load_rows<A>(t.q, t.dp, q.of(b), q.row, task.rows, m, head_dim, A(task.scale));
    load_rows<A>(t.k, t.dp, k.of(b), k.row, task.rows, m, head_dim, A(1));
    load_rows<A>(t.v, t.dp, v.of(b), v.row, task.rows, m, head_dim, A(1));
    load_rows<A>(t.grad_out, t.dp, grad_out, channels, task.rows, m, head_dim, A(1));
    transpose<A>(t.k_t, t.np, t.k, t.dp, n);
    transpose<A>(t.v_t, t.np, t.v, t.dp, n);
    product<A>({t.q, t.dp, 1}, t.k_t, t.np, t.scores, t.np, m, t.np, head_dim);
    product<A>({t.grad_out, t.dp, 1}, t.v_t, t.np, t.grad_scores, t.np, m, t.np, head_dim);
    for (int i = 0; i < m; i++) {
      A* row = t.scores + i * t.np;
      A* grad_row = t.grad_scores + i * t.np;
      const A* bias = t.bias + i * t.np;
      A* grad_bias = t.grad_bias + i * t.np;
      const A normaliser = lse[task.rows[i]];
      prefetch_row(next_grad_out + task.rows[i] * channels, head_dim, false);
      prefetch_row(next_q + task.rows[i] * q.row, head_dim, false);
      prefetch_row(next_k + task.rows[i] * k.row, head_dim, false);
      prefetch_row(next_v + task.rows[i] * v.row, head_dim, false);
      // delta = sum_j P dP, which is sum_d out grad_out without the rounding of `out`. Divided by the
      // sum of P: where scores are large that differs from 1 by the rounding of the normaliser, and a
      // gradient whose rows do not add up to zero would be wrong by as much of delta.
      Vec<A> deltas{}, sums{};
      for (int64_t j = 0; j < t.np; j += W) {
        const Vec<A> p = exponential(load<A>(row + j) + load<A>(bias + j) - normaliser);
        deltas += p * load<A>(grad_row + j);
        sums += p;
        store<A>(row + j, p);
      }
      const A delta = horizontal_sum<A>(deltas) / horizontal_sum<A>(sums);
      for (int64_t j = 0; j < t.np; j += W) {
        const Vec<A> grad = load<A>(row + j) * (load<A>(grad_row + j) - delta);
        store<A>(grad_row + j, grad);
        store<A>(grad_bias + j, load<A>(grad_bias + j) + grad);
      }
    }
    if (!need_qkv && grad_pad == nullptr) continue;
    if (need_qkv) {
      product<A>({t.grad_scores, t.np, 1}, t.k, t.dp, t.result, t.dp, m, t.dp, n);
      store_rows<A>(
          grad_q.of(b), grad_q.row, task.rows, t.result, t.dp, m, head_dim, A(task.scale));
    }
    // t.q carries the scale already.
    product<A>({t.grad_scores, 1, t.np}, t.q, t.dp, t.result, t.dp, n, t.dp, m);
    if (need_qkv)
      store_rows<A>(grad_k.of(b), grad_k.row, task.rows, t.result, t.dp, m, head_dim, A(1));
    if (grad_pad != nullptr) add_padding(grad_pad, task, t);
    product<A>({t.scores, 1, t.np}, t.grad_out, t.dp, t.result, t.dp, n, t.dp, m);
    if (need_qkv)
      store_rows<A>(grad_v.of(b), grad_v.row, task.rows, t.result, t.dp, m, head_dim, A(1));
    if (grad_pad != nullptr) add_padding(grad_pad + head_dim, task, t);
  }
  if (task.grad_table == nullptr) return;
  A* grad_table = (A*)task.grad_table;
  for (int i = 0; i < m; i++)
    for (int j = 0; j < n; j++)
      grad_table[task.query_row[i] + task.key_row[j]] += t.grad_bias[i * t.np + j];
}

void forward_any(const WindowTask& task, void* scratch) {
  switch (task.storage) {
    case StorageType::Float32: return forward<float>(task, scratch);
    case StorageType::Float64: return forward<double>(task, scratch);
    case StorageType::BFloat16: return forward<bfloat16>(task, scratch);
    case StorageType::Float16: return forward<float16>(task, scratch);
  }
}

void backward_any(const WindowTask& task, void* scratch) {
  switch (task.storage) {
    case StorageType::Float32: return backward<float>(task, scratch);
    case StorageType::Float64: return backward<double>(task, scratch);
    case StorageType::BFloat16: return backward<bfloat16>(task, scratch);
    case StorageType::Float16: return backward<float16>(task, scratch);
  }
}

int64_t scratch_bytes(StorageType storage, int64_t size, int64_t head_dim) {
  if (storage == StorageType::Float64) return Tiles<double>(nullptr, size, head_dim).bytes;
  return Tiles<float>(nullptr, size, head_dim).bytes;
}
