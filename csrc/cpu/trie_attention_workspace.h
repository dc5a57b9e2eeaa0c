// A worker's memory for one task of trie_attention_kernels.h.
#pragma once

#include "matmul.h"

namespace tw::TW_ISA {

constexpr int64_t kVectors = 2;                // of query rows
constexpr int64_t kRows = kVectors * kLanes;   // of a tile
constexpr int64_t kBlock = 16 * kMicroRows;    // columns between two updates of the softmax

// width: head_dim rounded up to whole vectors; the rest is zero throughout.
struct Workspace {
  // The stack: the columns of the current path, then those of the tile, ascending.
  int32_t *columns;
  int32_t *first_row, *end_row; // rows of the tile in the column's subtree: [first_row, end_row)
  float *k, *v, *dk, *dv;       // [columns][width]
  int32_t *starts; // [kRows], the tile's window_starts
  // One tile of one head.
  float *q, *dout, *acc;  // [kRows][width]; acc is out, or dq
  float *q_t, *dout_t;    // [width][kRows]; q_t times what makes scores of it (query_factor)
  float *p, *ds;          // [kBlock][kRows]
  float *row_max, *lse, *row_sum, *delta, *factor; // [kRows]
  float *partial, *partial_t;        // [kRows][kLanes] and transposed

  // Carves the arrays out of memory that starts at `base`; returns where they end.
  char *place(char *base, int64_t capacity, int64_t width) {
    const auto take = [&](auto *&p, int64_t n) {
      p = reinterpret_cast<std::remove_reference_t<decltype(p)>>(base);
      base += (n * 4 + 63) / 64 * 64;
    };
    take(columns, capacity), take(first_row, capacity), take(end_row, capacity);
    take(starts, kRows);
    for (float **stack : {&k, &v, &dk, &dv}) take(*stack, capacity * width);
    for (float **tile : {&q, &dout, &acc, &q_t, &dout_t}) take(*tile, kRows * width);
    take(p, kBlock * kRows), take(ds, kBlock * kRows);
    for (float **row : {&row_max, &lse, &row_sum, &delta, &factor}) take(*row, kRows);
    take(partial, kRows * kLanes), take(partial_t, kRows * kLanes);
    return base;
  }
};

} // namespace tw::TW_ISA
