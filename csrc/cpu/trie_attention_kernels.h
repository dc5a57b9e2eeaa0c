// The kernels of trie_attention.h, once for each instruction set; see simd.h for what to define.
//
// Inside a tile everything is kept with query rows in the lanes: scores, P, dP and dS are
// [column][row]. Softmax then runs down the columns without any sum across lanes, K and V are read
// where they lie, and only Q and dO need transposing, once a tile.
#pragma once

#include "trie_attention_job.h"
#include "trie_attention_workspace.h"

namespace tw::TW_ISA {

constexpr float kLn2 = 0.6931471805599453f;

int64_t workspace_bytes(const TrieAttentionJob &job) {
  Workspace w;
  char *none = nullptr;
  return w.place(none, job.max_path + kRows, padded(job.args.head_dim)) - none;
}

// One piece of the rows of one KV head, tile by tile. Windowed and Capped: whether the job has
// window_starts and a softcap.
template <bool Windowed, bool Capped> struct PieceTask {
  const TrieAttentionJob &job;
  const TrieAttentionArgs &args;
  const Piece &piece;
  const int64_t kv_head, group, head_dim, width;
  Workspace w;
  int64_t row = 0, rows = 0;       // the tile: tokens [row, row + rows)
  int64_t size = 0, path = 0;      // the stack: all, and before the tile's own columns
  int64_t near = 0;                // no row sees a column of the stack before it
  int64_t full_first = 0, full = 0; // every row sees columns [full_first, full) of the path
  bool finite = true; // all V (backward: K) pushed so far; else by_rows takes only what rows see

  PieceTask(const void *context, int64_t index, int worker)
      : job(*static_cast<const TrieAttentionJob *>(context)), args(job.args),
        piece(job.pieces[index % job.num_pieces]), kv_head(index / job.num_pieces),
        group(args.heads / args.kv_heads), head_dim(args.head_dim), width(padded(head_dim)) {
    w.place(job.workspaces + worker * job.workspace_bytes, job.max_path + kRows, width);
  }

  char *at(const Heads &x, int64_t token, int64_t head) const {
    return static_cast<char *>(x.data) +
           (token * x.row_stride + head * x.head_stride) * size_of(args.dtype);
  }

  void push(int64_t column, bool is_backward) {
    const int64_t at_top = size * width;
    w.columns[size++] = static_cast<int32_t>(column);
    load_row(w.k + at_top, at(args.k, column, kv_head), args.dtype, head_dim);
    load_row(w.v + at_top, at(args.v, column, kv_head), args.dtype, head_dim);
    if (!is_backward) return;
    memset(w.dk + at_top, 0, width * 4);
    memset(w.dv + at_top, 0, width * 4);
  }

  // The path of the piece's first row: jumps over the subtrees that end before it.
  void push_path(bool is_backward) {
    for (int64_t j = 0; j < piece.first_row;) {
      if (args.subtree_ends[j] <= piece.first_row)
        j = args.subtree_ends[j];
      else if (Windowed && j < piece.first_column)
        ++j;
      else
        push(j++, is_backward);
    }
    finite = all_finite(is_backward ? w.k : w.v, size * width);
  }

  // Drops every column that is no ancestor of `next_row`, the first row after the tile.
  void drop_finished(int64_t next_row, bool is_backward) {
    // Down a path subtrees shrink: those of its columns that end come last.
    int64_t kept = full;
    while (kept > 0 && args.subtree_ends[w.columns[kept - 1]] <= next_row) --kept;
    for (int64_t c = kept; c < size; ++c) {
      if (args.subtree_ends[w.columns[c]] <= next_row) {
        if (is_backward) finish_column(c);
        continue;
      }
      if (kept < c) move(kept, c, is_backward);
      ++kept;
    }
    size = kept;
  }

  void move(int64_t to, int64_t from, bool is_backward) {
    w.columns[to] = w.columns[from];
    memcpy(w.k + to * width, w.k + from * width, width * 4);
    memcpy(w.v + to * width, w.v + from * width, width * 4);
    if (!is_backward) return;
    memcpy(w.dk + to * width, w.dk + from * width, width * 4);
    memcpy(w.dv + to * width, w.dv + from * width, width * 4);
  }

  // Nothing more of this piece adds to dK and dV of a stack entry.
  void finish_column(int64_t c) {
    const int64_t column = w.columns[c], own = column - piece.first_row;
    if (own >= 0 && args.subtree_ends[column] <= piece.end_row) {
      store_row(at(args.dk, column, kv_head), w.dk + c * width, args.dtype, head_dim, args.scale);
      store_row(at(args.dv, column, kv_head), w.dv + c * width, args.dtype, head_dim, 1);
      return;
    }
    // Other pieces see it too. Columns of the first row's path never move: c is their place in it.
    const int64_t place = own < 0 ? c : piece.path + own;
    float *share = job.shares + (kv_head * job.share_rows + piece.share + place) * 2 * width;
    memcpy(share, w.dk + c * width, width * 4);
    memcpy(share + width, w.dv + c * width, width * 4);
  }

  // Asks for the rows that the next tile will load. They are a few lines each, far apart: what
  // hardware prefetchers miss. (Not inlined, GCC takes it for a function without effect and drops
  // the call.)
  TW_INLINE void prefetch_rows(const Heads &x, int64_t head, int64_t first) const {
    for (int64_t i = first; i < min(first + kRows, piece.end_row); ++i) {
      const char *from = at(x, i, head);
      for (int64_t byte = 0; byte < head_dim * size_of(args.dtype); byte += 64)
        __builtin_prefetch(from + byte, 0, 2);
    }
  }

  void begin_tile(int64_t first, bool is_backward) {
    row = first;
    rows = min(kRows, piece.end_row - first);
    path = size;
    prefetch_rows(args.k, kv_head, first + kRows);
    prefetch_rows(args.v, kv_head, first + kRows);
    for (int64_t i = 0; i < rows; ++i) push(row + i, is_backward);
    finite = finite && all_finite((is_backward ? w.k : w.v) + path * width, rows * width);
    if (Windowed) {
      int32_t least = args.window_starts[row], greatest = least;
      for (int64_t i = 0; i < rows; ++i) {
        w.starts[i] = args.window_starts[row + i];
        least = w.starts[i] < least ? w.starts[i] : least;
        greatest = w.starts[i] > greatest ? w.starts[i] : greatest;
      }
      near = place_on_path(least);
      full_first = place_on_path(greatest);
    }
    // Down a path subtrees shrink, so the columns in whose subtrees all rows lie come first.
    full = near;
    while (full < path && args.subtree_ends[w.columns[full]] >= row + rows) ++full;
    for (int64_t c = near; c < size; ++c) {
      w.first_row[c] = static_cast<int32_t>(max(0, w.columns[c] - row));
      w.end_row[c] = static_cast<int32_t>(min(rows, args.subtree_ends[w.columns[c]] - row));
    }
  }

  // Where on the stack a row's first column stands; an own column of the tile: behind the path,
  // whose columns follow each other in depth.
  int64_t place_on_path(int64_t column) const {
    return column < row ? job.depths[column] - job.depths[w.columns[0]] : path;
  }

  // Whether some rows may not see column c of the stack.
  TW_INLINE bool is_masked(int64_t c) const { return c >= full || (Windowed && c < full_first); }

  // Row i of the tile sees column c of the stack.
  bool sees(int64_t i, int64_t c) const {
    return w.first_row[c] <= i && i < w.end_row[c] && !(Windowed && w.columns[c] < w.starts[i]);
  }

  // Rows [first, end) of the tile in the subtree of any of columns [c, c + m) of the stack.
  struct Span {
    int64_t first, end;
  };
  Span span(int64_t c, int64_t m) const {
    if (c + m <= full) return {0, rows};
    int64_t end = 0;
    for (int64_t i = c; i < c + m; ++i) end = max(end, w.end_row[i]);
    return {w.first_row[c], end};
  }

  // c [columns c0..c1][rows] = a [columns] x b_t: scores from K and Q, dP from V and dO. Vectors of
  // rows that see none of the columns are left as they are.
  void by_columns(const float *a, const float *b_t, float *c, int64_t c0, int64_t c1) const {
    for (int64_t j = c0; j < c1; j += kMicroRows) {
      const int64_t m = min(kMicroRows, c1 - j);
      const Span seen = span(j, m);
      const int64_t lane = seen.first / kLanes * kLanes;
      const int64_t lanes = (seen.end - lane + kLanes - 1) / kLanes * kLanes;
      multiply_rows<Order::row_major>({a + j * width, width, b_t + lane, kRows,
                                       c + (j - c0) * kRows + lane, kRows, head_dim, false},
                                      m, lanes);
    }
  }

  // acc [rows][width] += p^T [rows][columns c0..c1] b [columns]: out from P, V and dQ from dS, K.
  void by_rows(const float *p, const float *b, int64_t c0, int64_t c1) const {
    if (!finite) return by_rows_seen(p, b, c0, c1);
    for (int64_t i = 0; i < rows; i += kMicroRows) {
      const int64_t m = min(kMicroRows, rows - i);
      const int64_t columns = min(c1, path + i + m) - c0; // none of the rows sees one beyond
      if (columns > 0)
        multiply_rows<Order::column_major>(
            {p + i, kRows, b + c0 * width, width, w.acc + i * width, width, columns, c0 > near}, m,
            width);
    }
  }

  void by_rows_seen(const float *p, const float *b, int64_t c0, int64_t c1) const {
    if (c0 == near) memset(w.acc, 0, rows * width * 4);
    for (int64_t c = c0; c < c1; ++c)
      for (int64_t i = 0; i < rows; ++i)
        if (sees(i, c)) add_row(w.acc + i * width, p[(c - c0) * kRows + i], b + c * width);
  }

  // sum += p * x, rows of `width`.
  void add_row(float *sum, float p, const float *x) const {
    for (int64_t d = 0; d < width; d += kLanes)
      store(sum + d, multiply_add(all(p), load(x + d), load(sum + d)));
  }

  // c [columns c0..c1][width] += p [columns][rows] b [rows]: dV from P and dO, dK from dS and Q.
  void to_columns(const float *p, const float *b, float *c, int64_t c0, int64_t c1,
                  bool b_finite) const {
    if (!b_finite) return to_columns_seen(p, b, c, c0, c1);
    for (int64_t j = c0; j < c1; j += kMicroRows) {
      const int64_t m = min(kMicroRows, c1 - j);
      const Span seen = span(j, m);
      multiply_rows<Order::row_major>({p + (j - c0) * kRows + seen.first, kRows,
                                       b + seen.first * width, width, c + j * width, width,
                                       seen.end - seen.first, true},
                                      m, width);
    }
  }

  void to_columns_seen(const float *p, const float *b, float *to, int64_t c0, int64_t c1) const {
    for (int64_t c = c0; c < c1; ++c)
      for (int64_t i = 0; i < rows; ++i)
        if (sees(i, c)) add_row(to + c * width, p[(c - c0) * kRows + i], b + i * width);
  }

  // Which lanes of vector v see column c.
  TW_INLINE Ints visible(int64_t c, int v) const {
    const Ints lane = lane_numbers() + v * kLanes;
    const Ints seen = (lane >= w.first_row[c]) & (lane < w.end_row[c]);
    if constexpr (!Windowed) return seen;
    return seen & (load_as<Ints>(w.starts + v * kLanes) <= w.columns[c]);
  }

  // The tile's rows of x as floats, and zeros below them.
  void load_rows(float *to, const Heads &x, int64_t head) const {
    for (int64_t i = 0; i < rows; ++i)
      load_row(to + i * width, at(x, row + i, head), args.dtype, head_dim);
    memset(to + rows * width, 0, (kRows - rows) * width * 4);
  }

  void store_rows(const Heads &x, int64_t head, const float *factors) const {
    for (int64_t i = 0; i < rows; ++i)
      store_row(at(x, row + i, head), w.acc + i * width, args.dtype, head_dim, factors[i]);
  }

  void load_queries(int64_t head) const {
    load_rows(w.q, args.q, head);
    prefetch_rows(args.q, head, row + kRows);
    transpose(w.q_t, w.q, kRows, width, query_factor());
  }

  // Products of queries and keys become scores in base 2, with a cap what tanh takes.
  float query_factor() const { return Capped ? args.scale / args.softcap : args.scale * kLog2E; }

  void forward_head(int64_t head) const {
    load_queries(head);
    Floats top[kVectors], sum[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      top[v] = all(-1e30f); // below any score, and finite: masked scores are infinitely below it
      sum[v] = Floats{};
    }
    for (int64_t c0 = near; c0 < size; c0 += kBlock) {
      const int64_t c1 = min(size, c0 + kBlock);
      by_columns(w.k, w.q_t, w.p, c0, c1);
      Floats new_top[kVectors] = {top[0], top[1]};
      for (int64_t c = c0; c < c1; ++c) {
        float *s = w.p + (c - c0) * kRows;
        for (int v = 0; v < kVectors; ++v) {
          Floats x = load(s + v * kLanes);
          if constexpr (Capped) x = tanh(x) * (args.softcap * kLog2E);
          const bool masked = is_masked(c);
          if (masked) x = visible(c, v) ? x : all(-__builtin_inff());
          if (Capped || masked) store(s + v * kLanes, x);
          new_top[v] = max(x, new_top[v]);
        }
      }
      for (int v = 0; v < kVectors; ++v) {
        const Floats factor = exp2(top[v] - new_top[v]);
        store(w.factor + v * kLanes, factor);
        sum[v] *= factor;
        top[v] = new_top[v];
      }
      for (int64_t c = c0; c < c1; ++c) {
        float *s = w.p + (c - c0) * kRows;
        for (int v = 0; v < kVectors; ++v) {
          const Floats p = exp2(load(s + v * kLanes) - top[v]);
          store(s + v * kLanes, p);
          sum[v] += p;
        }
      }
      if (c0 > near)
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t d = 0; d < width; d += kLanes)
            store(w.acc + i * width + d, load(w.acc + i * width + d) * w.factor[i]);
      by_rows(w.p, w.v, c0, c1);
    }
    for (int v = 0; v < kVectors; ++v) {
      store(w.row_max + v * kLanes, top[v]);
      store(w.row_sum + v * kLanes, sum[v]);
      store(w.factor + v * kLanes, 1.0f / sum[v]);
    }
    store_rows(args.out, head, w.factor);
    float *lse = args.lse + head * args.tokens + row;
    for (int64_t i = 0; i < rows; ++i)
      lse[i] = w.row_max[i] * kLn2 + __builtin_logf(w.row_sum[i]);
  }

  // delta = sum over head_dim of dO * O, one a row.
  void load_delta(int64_t head) const {
    for (int64_t i = 0; i < rows; ++i) {
      const char *out = at(args.out, row + i, head);
      const float *dout = w.dout + i * width;
      load_row(w.acc, out, args.dtype, head_dim);
      Floats sum = Floats{};
      for (int64_t d = 0; d < width; d += kLanes) sum += load(w.acc + d) * load(dout + d);
      store(w.partial + i * kLanes, sum);
    }
    memset(w.partial + rows * kLanes, 0, (kRows - rows) * kLanes * 4);
    transpose(w.partial_t, w.partial, kRows, kLanes, 1);
    for (int v = 0; v < kVectors; ++v) {
      Floats sum = Floats{};
      for (int l = 0; l < kLanes; ++l) sum += load(w.partial_t + l * kRows + v * kLanes);
      store(w.delta + v * kLanes, sum);
    }
  }

  void backward_head(int64_t head) const {
    load_queries(head);
    load_rows(w.dout, args.dout, head);
    prefetch_rows(args.dout, head, row + kRows);
    prefetch_rows(args.out, head, row + kRows);
    transpose(w.dout_t, w.dout, kRows, width, 1);
    load_delta(head);
    const bool q_finite = all_finite(w.q, rows * width);
    const bool dout_finite = all_finite(w.delta, kRows); // else its row's delta is not finite
    memset(w.lse, 0, kRows * 4);
    memcpy(w.lse, args.lse + head * args.tokens + row, rows * 4);
    Floats lse[kVectors], delta[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      lse[v] = load(w.lse + v * kLanes) * kLog2E;
      delta[v] = load(w.delta + v * kLanes);
    }
    for (int64_t c0 = near; c0 < size; c0 += kBlock) {
      const int64_t c1 = min(size, c0 + kBlock);
      by_columns(w.k, w.q_t, w.p, c0, c1);
      by_columns(w.v, w.dout_t, w.ds, c0, c1);
      for (int64_t c = c0; c < c1; ++c) {
        for (int v = 0; v < kVectors; ++v) {
          const int64_t at = (c - c0) * kRows + v * kLanes;
          Floats x = load(w.p + at), slope = all(1.0f);
          if constexpr (Capped) {
            const Floats t = tanh(x);
            x = t * (args.softcap * kLog2E);
            slope = 1.0f - t * t;
          }
          Floats p = exp2(x - lse[v]);
          Floats ds = p * (load(w.ds + at) - delta[v]);
          if constexpr (Capped) ds *= slope;
          if (is_masked(c)) {
            const Ints seen = visible(c, v);
            p = seen ? p : Floats{};
            ds = seen ? ds : Floats{};
          }
          store(w.p + at, p);
          store(w.ds + at, ds);
        }
      }
      to_columns(w.p, w.dout, w.dv, c0, c1, dout_finite);
      to_columns(w.ds, w.q, w.dk, c0, c1, q_finite);
      by_rows(w.ds, w.k, c0, c1);
    }
    for (int v = 0; v < kVectors; ++v) store(w.factor + v * kLanes, all(args.scale));
    store_rows(args.dq, head, w.factor);
  }

  template <bool IsBackward> void run() {
    push_path(IsBackward);
    for (int64_t first = piece.first_row; first < piece.end_row; first += kRows) {
      begin_tile(first, IsBackward);
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        if (IsBackward)
          backward_head(head);
        else
          forward_head(head);
      }
      if (first + kRows < piece.end_row) drop_finished(first + kRows, IsBackward);
    }
    if (IsBackward)
      for (int64_t c = 0; c < size; ++c) finish_column(c);
  }
};

template <bool IsBackward> void run_piece(const void *job, int64_t index, int worker) {
  const TrieAttentionArgs &args = static_cast<const TrieAttentionJob *>(job)->args;
  if (args.window_starts && args.softcap)
    PieceTask<true, true>(job, index, worker).template run<IsBackward>();
  else if (args.window_starts)
    PieceTask<true, false>(job, index, worker).template run<IsBackward>();
  else if (args.softcap)
    PieceTask<false, true>(job, index, worker).template run<IsBackward>();
  else
    PieceTask<false, false>(job, index, worker).template run<IsBackward>();
}

void sum_shares(const void *context, int64_t index, int worker) {
  const auto &job = *static_cast<const TrieAttentionJob *>(context);
  const TrieAttentionArgs &args = job.args;
  const int64_t chunks = (args.tokens + kSumColumns - 1) / kSumColumns, kv_head = index / chunks;
  const int64_t first = index % chunks * kSumColumns, end = min(args.tokens, first + kSumColumns);
  const int64_t width = padded(args.head_dim), size = size_of(args.dtype);
  float *sum = reinterpret_cast<float *>(job.workspaces + worker * job.workspace_bytes);
  int64_t home = 0; // the piece that the column lies in
  for (int64_t j = first; j < end; ++j) {
    while (job.pieces[home].end_row <= j) ++home;
    if (args.subtree_ends[j] <= job.pieces[home].end_row) continue; // finished by its own piece
    // A column's rows are contiguous (docs/architecture.md, fact 2), so the pieces that see it are.
    for (int64_t i = home; i < job.num_pieces && job.pieces[i].first_row < args.subtree_ends[j];
         ++i) {
      const Piece &piece = job.pieces[i];
      if (j < piece.first_column) continue;
      const int64_t place =
          i == home ? piece.path + j - piece.first_row : job.depths[j] - piece.skipped;
      const float *share =
          job.shares + (kv_head * job.share_rows + piece.share + place) * 2 * width;
      for (int64_t d = 0; d < 2 * width; d += kLanes)
        store(sum + d, i == home ? load(share + d) : load(sum + d) + load(share + d));
    }
    const auto to = [&](const Heads &x) {
      return static_cast<char *>(x.data) + (j * x.row_stride + kv_head * x.head_stride) * size;
    };
    store_row(to(args.dk), sum, args.dtype, args.head_dim, args.scale);
    store_row(to(args.dv), sum + width, args.dtype, args.head_dim, 1);
  }
}

const TrieAttentionKernels trie_attention = {
    kRows, padded, workspace_bytes, run_piece<false>, run_piece<true>, sum_shares};

} // namespace tw::TW_ISA
