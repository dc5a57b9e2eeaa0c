// The one matrix product that all of attention is made of: c (+)= a b with c and b in row-major
// vectors and a read word by word, along its rows or down its columns. Needs no packing and no
// transposed copy of a. A word is a float, or a pair of bfloat16 values along the inner dimension.
//
// Define TW_MICRO_ROWS (rows of c held in registers) besides what simd.h needs.
#pragma once

#include "pairs.h"

namespace tw::TW_ISA {

constexpr int kMicroRows = TW_MICRO_ROWS;

enum class Order { row_major, column_major };

template <class Word> struct Product {
  const Word *a;
  int64_t lda;
  const Word *b;
  int64_t ldb;
  float *c;
  int64_t ldc;
  int64_t k; // inner size, in words
  bool add;  // to what c holds; else c is overwritten
};

// M rows by V vectors of c, for k at least 1.
template <int M, int V, Order A, class Word> void micro_product(const Product<Word> &p) {
  using Words = decltype(load(p.b));
  const Word *a = p.a, *b = p.b;
  float *c = p.c;
  const int64_t lda = p.lda, ldb = p.ldb, ldc = p.ldc;
  Floats sum[M][V];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[m][v] = p.add ? load(c + m * ldc + v * kLanes) : Floats{};
  for (int64_t k = p.k; k > 0; --k) {
    Words row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[v] = load(b + v * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Words x = all(A == Order::row_major ? a[m * lda] : a[m]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[m][v] = multiply_add(x, row[v], sum[m][v]);
    }
    a += A == Order::row_major ? 1 : lda;
    b += ldb;
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(c + m * ldc + v * kLanes, sum[m][v]);
}

template <class Word> using MicroProduct = void (*)(const Product<Word> &);

template <int V, Order A, class Word, int... M>
TW_INLINE MicroProduct<Word> micro_of_rows(int64_t m, std::integer_sequence<int, M...>) {
  static constexpr MicroProduct<Word> of_rows[] = {micro_product<M + 1, V, A, Word>...};
  return of_rows[m - 1];
}

// m <= kMicroRows rows of c and n columns, a multiple of kLanes.
template <Order A, class Word = float>
TW_INLINE void multiply_rows(Product<Word> p, int64_t m, int64_t n) {
  constexpr auto rows = std::make_integer_sequence<int, kMicroRows>();
  int64_t j = 0;
  for (const MicroProduct<Word> micro = micro_of_rows<2, A, Word>(m, rows); j + 2 * kLanes <= n;
       j += 2 * kLanes, p.b += 2 * kLanes, p.c += 2 * kLanes)
    micro(p);
  if (j < n) micro_of_rows<1, A, Word>(m, rows)(p);
}

} // namespace tw::TW_ISA
