// C[M, N] (+)= A[M, K] B[K, N] on small row-major tiles that lie in the first cache, or the second.
// A may be strided both ways, so that a transposed A costs nothing; N is a multiple of the vector width.
// With `add` the product is added to what C holds.
// Included per capability, after vector.h.

template <class A>
struct Tile {
  const A* data;
  long row;     // elements from one row to the next
  long column;  // elements from one column to the next
};

// R rows by V vectors of C in registers over the whole of K.
template <class A, int R, int V>
GREENMIM_INLINE void product_block(
    Tile<A> a, const A* b, long b_row, A* c, long c_row, int k_size, bool add) {
  constexpr int W = Vector<A>::width;
  Vec<A> sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) sum[r][v] = add ? load<A>(c + r * c_row + v * W) : Vec<A>{};
  for (int k = 0; k < k_size; k++) {
    Vec<A> row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) row[v] = load<A>(b + k * b_row + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const A left = a.data[r * a.row + k * a.column];
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) sum[r][v] += left * row[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) store<A>(c + r * c_row + v * W, sum[r][v]);
}

// A's three numbers one by one: a Tile by value goes through memory, where it is read at once in
// pieces unlike those it was written in, which waits for all that was written before.
template <class A, int V>
static void product_columns(
    const A* a_data, long a_row, long a_column, const A* b, long b_row, A* c, long c_row, int m_size,
    int k_size, bool add) {
  constexpr int R = 6;
  Tile<A> a{a_data, a_row, a_column};
  int m = 0;
  for (; m + R <= m_size; m += R, a.data += R * a.row, c += R * c_row)
    product_block<A, R, V>(a, b, b_row, c, c_row, k_size, add);
  switch (m_size - m) {
    case 1: product_block<A, 1, V>(a, b, b_row, c, c_row, k_size, add); break;
    case 2: product_block<A, 2, V>(a, b, b_row, c, c_row, k_size, add); break;
    case 3: product_block<A, 3, V>(a, b, b_row, c, c_row, k_size, add); break;
    case 4: product_block<A, 4, V>(a, b, b_row, c, c_row, k_size, add); break;
    case 5: product_block<A, 5, V>(a, b, b_row, c, c_row, k_size, add); break;
  }
}

template <class A>
GREENMIM_INLINE void product(
    Tile<A> a, const A* b, long b_row, A* c, long c_row, int m_size, int n_size, int k_size,
    bool add = false) {
  constexpr int W = Vector<A>::width;
  // 6 x 4 sums fill the 32 registers of AVX-512, 6 x 2 the 16 of AVX2.
  constexpr int V = GREENMIM_VECTOR_REGISTERS >= 32 ? 4 : 2;
  int n = 0;
  for (; n + V * W <= n_size; n += V * W)
    product_columns<A, V>(
        a.data, a.row, a.column, b + n, b_row, c + n, c_row, m_size, k_size, add);
  switch ((n_size - n) / W) {
    case 1:
      product_columns<A, 1>(
          a.data, a.row, a.column, b + n, b_row, c + n, c_row, m_size, k_size, add);
      break;
    case 2:
      product_columns<A, 2>(
          a.data, a.row, a.column, b + n, b_row, c + n, c_row, m_size, k_size, add);
      break;
    case 3:
      product_columns<A, 3>(
          a.data, a.row, a.column, b + n, b_row, c + n, c_row, m_size, k_size, add);
      break;
  }
}
