// Attention of one window and one head, for the images that share the window. Included by kernels.h.
//
// Queries are taken kQueries at a time at most, so that the tiles of their scores stay in the second
// cache.
// With n slots of which m are tokens, m' = min(m, kQueries), head dim D, and np, dp the multiples of n
// and D of the vector width, the tiles are
//   q (times scale), grad_out, result [m', dp];  k, v, grad_k, grad_v [n, dp];  k_t, v_t [dp, np];
//   bias, scores, grad_scores, grad_bias [m', np].
// The bias tile has -inf in the columns beyond n. Where m' = m it is made once for all images, and the
// gradient of the bias is summed in a tile over them and added to the table once.
constexpr int kQueries = 64;

// Queries to take at a time: m in as few pieces as can be, of one size.
GREENMIM_INLINE int queries_at_a_time(int m) {
  const int pieces = (m + kQueries - 1) / kQueries;
  return (m + pieces - 1) / pieces;
}

template <class A>
struct Tiles {
  A *bias, *scores, *grad_scores, *grad_bias;
  A *q, *grad_out, *result;
  A *k, *v, *grad_k, *grad_v;
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
    const int64_t queries = n < kQueries ? n : kQueries;
    bias = take(queries * np), scores = take(queries * np);
    grad_scores = take(queries * np), grad_bias = take(queries * np);
    q = take(queries * dp), grad_out = take(queries * dp), result = take(queries * dp);
    k = take(n * dp), v = take(n * dp), grad_k = take(n * dp), grad_v = take(n * dp);
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

// kPiece elements of a column, and as many integers.
template <class A>
struct Piece {
  typedef A type __attribute__((vector_size(kPiece * sizeof(A)), aligned(sizeof(A)), may_alias));
  typedef decltype((type){} < (type){}) integer;
  static constexpr integer lanes = {0, 1, 2, 3, 4, 5, 6, 7};
};

// Of `count` queries from `first` on.
template <class A>
GREENMIM_INLINE void make_bias(const WindowTask& task, const Tiles<A>& t, int first, int count) {
  using P = typename Piece<A>::type;
  const int n = task.size;
  for (int i = 0; i < count; i++) {
    A* row = t.bias + i * t.np;
    const A* column = task.table == nullptr ? nullptr : (const A*)task.table + task.query_place[first + i];
    if (column == nullptr) {
      for (int j = 0; j < n; j++) row[j] = 0;
    } else if (task.runs == nullptr) {
      for (int j = 0; j < n; j++) row[j] = column[task.key_place[j]];
    } else {
      // In whole pieces: what is behind a run is written by the next one, or by the next row.
      const Run* end = task.runs + task.num_runs;
      for (const Run* run = task.runs; run < end; run++) {
        const int length = run->count;
        A* to = row + run->slot;
        const A* from = column + run->key_place;
        for (int j = 0; j < length; j += kPiece) *(P*)(to + j) = *(const P*)(from + j);
      }
    }
    for (int64_t j = n; j < t.np; j++) row[j] = -__builtin_inf();
  }
}

// The gradient of the bias likewise, added to the sums for the table.
template <class A>
GREENMIM_INLINE void add_grad_bias(
    const WindowTask& task, const Tiles<A>& t, int first, int count) {
  using P = typename Piece<A>::type;
  using I = typename Piece<A>::integer;
  for (int i = 0; i < count; i++) {
    A* column = (A*)task.grad_table + task.query_place[first + i];
    const A* row = t.grad_bias + i * t.np;
    if (task.runs == nullptr) {
      for (int j = 0; j < task.size; j++) column[task.key_place[j]] += row[j];
      continue;
    }
    const Run* end = task.runs + task.num_runs;
    for (const Run* run = task.runs; run < end; run++) {
      const int length = run->count;
      A* to = column + run->key_place;
      const A* from = row + run->slot;
      for (int j = 0; j < length; j += kPiece)
        *(P*)(to + j) += (P)((I)*(const P*)(from + j) & (Piece<A>::lanes < length - j));
    }
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
  const int most = queries_at_a_time(m);
  const bool at_once = most == m;
  const bool one_bias = at_once || task.table == nullptr;
  if (one_bias) make_bias(task, t, 0, most);
  load_padding<A, T>(task, t);
  for (int64_t b = task.first_image; b < task.last_image; b++) {
    const int64_t next = b + 1 < task.last_image ? b + 1 : b;
    const T *next_q = q.of(next), *next_k = k.of(next), *next_v = v.of(next);
    T* out = (T*)task.out + b * task.rows_per_image * channels + task.head * head_dim;
    A* lse = (A*)task.lse + (b * task.num_heads + task.head) * task.rows_per_image;
    load_rows<A>(t.k, t.dp, k.of(b), k.row, task.rows, m, head_dim, A(1));
    load_rows<A>(t.v, t.dp, v.of(b), v.row, task.rows, m, head_dim, A(1));
    transpose<A>(t.k_t, t.np, t.k, t.dp, n);
    for (int first = 0; first < m; first += most) {
      const int32_t* rows = task.rows + first;
      const int count = m - first < most ? m - first : most;
      if (!one_bias) make_bias(task, t, first, count);
      load_rows<A>(t.q, t.dp, q.of(b), q.row, rows, count, head_dim, A(task.scale));
      product<A>({t.q, t.dp, 1}, t.k_t, t.np, t.scores, t.np, count, t.np, head_dim);
      A factors[kQueries];
      for (int i = 0; i < count; i++) {
        A* row = t.scores + i * t.np;
        const A* bias = t.bias + i * t.np;
        prefetch_row(out + rows[i] * channels, head_dim, true);
        prefetch_row(next_q + rows[i] * q.row, head_dim, false);
        prefetch_row(next_k + rows[i] * k.row, head_dim, false);
        prefetch_row(next_v + rows[i] * v.row, head_dim, false);
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
        lse[rows[i]] = maximum + A(__builtin_log(sum));
        factors[i] = A(1) / sum;  // of the output's row, which is shorter than the scores'
      }
      product<A>({t.scores, t.np, 1}, t.v, t.dp, t.result, t.dp, count, t.dp, n);
      for (int i = 0; i < count; i++)
        store_rows<A>(out, channels, rows + i, t.result + i * t.dp, t.dp, 1, head_dim, factors[i]);
    }
  }
}

// sums[d] += rows of padding of a gradient.
template <class A>
GREENMIM_INLINE void add_padding(A* sums, const WindowTask& task, const A* grad, int64_t dp) {
  for (int i = task.tokens; i < task.size; i++)
    for (int d = 0; d < task.head_dim; d++) sums[d] += grad[i * dp + d];
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
  const bool need_qkv = task.grad_q.data != nullptr, need_table = task.grad_table != nullptr;
  const int most = queries_at_a_time(m);
  const bool at_once = most == m;
  const bool one_bias = at_once || task.table == nullptr;
  const Tiles<A> t(scratch, n, head_dim);
  if (one_bias) make_bias(task, t, 0, most);
  load_padding<A, T>(task, t);
  const auto clear_grad_bias = [&](int count) {
    for (int64_t j = 0; j < count * t.np; j++) t.grad_bias[j] = 0;
  };
  if (at_once || !need_table) clear_grad_bias(most);
  for (int64_t b = task.first_image; b < task.last_image; b++) {
    const int64_t next = b + 1 < task.last_image ? b + 1 : b;
    const T *next_q = q.of(next), *next_k = k.of(next), *next_v = v.of(next);
    const T* grad_out = (const T*)task.grad_out + b * image + task.head * head_dim;
    const T* next_grad_out = grad_out + (next - b) * image;
    const A* lse = (const A*)task.lse + (b * task.num_heads + task.head) * task.rows_per_image;
    load_rows<A>(t.k, t.dp, k.of(b), k.row, task.rows, m, head_dim, A(1));
    load_rows<A>(t.v, t.dp, v.of(b), v.row, task.rows, m, head_dim, A(1));
    transpose<A>(t.k_t, t.np, t.k, t.dp, n);
    transpose<A>(t.v_t, t.np, t.v, t.dp, n);
    for (int first = 0; first < m; first += most) {
      const int32_t* rows = task.rows + first;
      const int count = m - first < most ? m - first : most;
      if (!one_bias) make_bias(task, t, first, count);
      if (!at_once && need_table) clear_grad_bias(count);
      load_rows<A>(t.q, t.dp, q.of(b), q.row, rows, count, head_dim, A(task.scale));
      load_rows<A>(t.grad_out, t.dp, grad_out, channels, rows, count, head_dim, A(1));
      product<A>({t.q, t.dp, 1}, t.k_t, t.np, t.scores, t.np, count, t.np, head_dim);
      product<A>({t.grad_out, t.dp, 1}, t.v_t, t.np, t.grad_scores, t.np, count, t.np, head_dim);
      for (int i = 0; i < count; i++) {
        A* row = t.scores + i * t.np;
        A* grad_row = t.grad_scores + i * t.np;
        const A* bias = t.bias + i * t.np;
        A* grad_bias = t.grad_bias + i * t.np;
        const A normaliser = lse[rows[i]];
        prefetch_row(next_grad_out + rows[i] * channels, head_dim, false);
        prefetch_row(next_q + rows[i] * q.row, head_dim, false);
        prefetch_row(next_k + rows[i] * k.row, head_dim, false);
        prefetch_row(next_v + rows[i] * v.row, head_dim, false);
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
      if (!at_once && need_table) add_grad_bias(task, t, first, count);
      if (need_qkv) {
        product<A>({t.grad_scores, t.np, 1}, t.k, t.dp, t.result, t.dp, count, t.dp, n);
        store_rows<A>(
            grad_q.of(b), grad_q.row, rows, t.result, t.dp, count, head_dim, A(task.scale));
      }
      if (!need_qkv && grad_pad == nullptr) continue;
      // t.q carries the scale already.
      const bool add = first > 0, all = first + count == m;
      product<A>({t.grad_scores, 1, t.np}, t.q, t.dp, t.grad_k, t.dp, n, t.dp, count, add);
      if (all && need_qkv)
        store_rows<A>(grad_k.of(b), grad_k.row, task.rows, t.grad_k, t.dp, m, head_dim, A(1));
      if (all && grad_pad != nullptr) add_padding(grad_pad, task, t.grad_k, t.dp);
      product<A>({t.scores, 1, t.np}, t.grad_out, t.dp, t.grad_v, t.dp, n, t.dp, count, add);
      if (all && need_qkv)
        store_rows<A>(grad_v.of(b), grad_v.row, task.rows, t.grad_v, t.dp, m, head_dim, A(1));
      if (all && grad_pad != nullptr) add_padding(grad_pad + head_dim, task, t.grad_v, t.dp);
    }
  }
  if (at_once && need_table) add_grad_bias(task, t, 0, m);
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
