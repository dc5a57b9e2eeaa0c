// The trie attention kernels (csrc/cuda/trie_attention_{fwd,bwd}.cu) step by step on the CPU, in
// double precision: the same index arithmetic, grids and arguments (trie_attention_index.h,
// trie_attention.cpp), with the copy engine, the tensor cores and the threads' registers played
// after the PTX ISA. Each thread block runs its copying warp first and its computing warpgroups
// after; whether they would have waited for each other for ever is then found from what they did.
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/trie_attention.h"

namespace tw::cuda {

namespace {

constexpr double kInfinity = HUGE_VAL;
constexpr int kWarpgroupThreads = 128;

void require(bool holds, const char *what) {
  if (!holds) throw std::logic_error(what);
}

// ---- The copy engine

using Tile = std::vector<double>; // shared memory, in elements

// Calls f(element of the tile, element in memory, or null outside the tensor) for every box that a
// tile of head_dim columns needs, to or from `rows` tokens of a head from token `row` on.
template <class F>
void for_each_copied(const Tiles &map, int head_dim, int rows, int head, int row, F f) {
  require(map.box[0] == kBoxColumns && map.box[1] == 1 && map.box[2] == static_cast<uint32_t>(rows),
          "a box is not what the kernel takes it for");
  require(row >= 0 && head >= 0 && head < static_cast<int>(map.sizes[1]), "no such head");
  for (int box = 0; box < head_dim / kBoxColumns; ++box)
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < kBoxColumns; ++c) {
        const int byte = ((box * rows + r) * kBoxColumns + c) * 2;
        const int swizzled = byte ^ ((byte >> 7 & 7) << 4);
        const uint64_t address = map.address + (box * kBoxColumns + c) * 2 +
                                 head * map.strides[1] + uint64_t(row + r) * map.strides[2];
        const bool inside = static_cast<uint64_t>(row + r) < map.sizes[2];
        f(swizzled / 2, inside ? reinterpret_cast<Bits *>(address) : nullptr);
      }
}

double value(Bits bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float result;
  std::memcpy(&result, &wide, 4);
  return result;
}

Tile load_tile(const Tiles &map, int head_dim, int rows, int head, int row) {
  Tile tile(rows * head_dim, NAN);
  for_each_copied(map, head_dim, rows, head, row,
                  [&](int at, const Bits *from) { tile[at] = from ? value(*from) : 0; });
  return tile;
}

template <class T> std::vector<T> load_numbers(const T *from, int count) {
  require(reinterpret_cast<uintptr_t>(from) % 16 == 0 && count % 4 == 0, "a bulk copy's alignment");
  return {from, from + count};
}

// ---- The tensor cores

struct Matrix {
  int rows, columns;
  std::vector<double> values;
  Matrix(int rows, int columns) : rows(rows), columns(columns), values(rows * columns) {}
  double &at(int r, int c) { return values[r * columns + c]; }
  double at(int r, int c) const { return values[r * columns + c]; }
};

Matrix of_tile(const Tile &tile, int rows, int head_dim) {
  Matrix m(rows, head_dim);
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < head_dim; ++c) m.at(r, c) = tile[box_offset(rows, r, c)];
  return m;
}

// What the threads of a warpgroup hold of 64 x columns.
using Registers = std::vector<std::vector<double>>; // [thread][columns / 2]

Registers registers(int columns, double value = 0) {
  return Registers(kWarpgroupThreads, std::vector<double>(columns / 2, value));
}

// A B^T
Registers scores(const Matrix &a, const Matrix &b) {
  Registers result = registers(b.rows);
  for (int t = 0; t < kWarpgroupThreads; ++t)
    for (int e = 0; e < b.rows / 2; ++e) {
      double sum = 0;
      for (int c = 0; c < a.columns; ++c)
        sum += a.at(product_row(t, e), c) * b.at(product_column(t, e), c);
      result[t][e] = sum;
    }
  return result;
}

// sum += A B with A from registers: products of depth 16 (PTX ISA, wgmma with m64k16: A).
void add_product(Registers &sum, const Registers &a, const Matrix &b) {
  Matrix left(kWarpgroupRows, b.rows);
  for (int t = 0; t < kWarpgroupThreads; ++t)
    for (int e = 0; e < b.rows / 2; ++e)
      left.at(16 * (t / 32) + t % 32 / 4 + 8 * (e % 8 / 2 % 2),
              16 * (e / 8) + 2 * (t % 4) + e % 2 + 8 * (e % 8 / 4)) = a[t][e];
  for (int t = 0; t < kWarpgroupThreads; ++t)
    for (int e = 0; e < b.columns / 2; ++e)
      for (int k = 0; k < b.rows; ++k)
        sum[t][e] += left.at(product_row(t, e), k) * b.at(k, product_column(t, e));
}

// ---- The two sides of a thread block

// What one fill of a ring brings.
struct Copy {
  Tile first, second; // of k and v, or q and dout; or one tile of one of them
  std::vector<int32_t> ends;
  std::vector<float> lse2, delta;
};

// Steps of the copying warp: a fill of a ring. Of a computing one: a wait for the next fill of a
// ring, or the release of the oldest.
struct Step {
  enum Kind { fill, wait, release } kind;
  int ring;
};

void require_progress(const std::vector<int> &stages, const std::vector<Step> &producer,
                      const std::vector<Step> &consumer) {
  std::vector<int> filled(stages.size()), waited(stages.size()), released(stages.size());
  size_t p = 0, c = 0;
  for (bool moved = true; moved;) {
    moved = false;
    for (; p < producer.size(); ++p, moved = true) {
      const int r = producer[p].ring;
      if (filled[r] - released[r] == stages[r]) break;
      ++filled[r];
    }
    for (; c < consumer.size(); ++c, moved = true) {
      const int r = consumer[c].ring;
      if (consumer[c].kind == Step::release) {
        require(released[r] < waited[r], "a buffer is released before it was waited for");
        ++released[r];
      } else {
        if (waited[r] == filled[r]) break;
        ++waited[r];
      }
    }
  }
  require(p == producer.size() && c == consumer.size(), "the warps wait for each other for ever");
  require(filled == released, "a buffer is never released");
}

// A warpgroup's rows of the result, as store_tile sends them through shared memory.
void store_tile(const Tiles &map, const TrieAttentionArgs &args, const Registers &values, int head,
                int row, double *to, int64_t heads) {
  const int head_dim = static_cast<int>(args.head_dim);
  Tile buffer(kWarpgroupRows * head_dim, NAN);
  for (int t = 0; t < kWarpgroupThreads; ++t)
    for (int e = 0; e < head_dim / 2; ++e)
      buffer[box_offset(kWarpgroupRows, product_row(t, e), product_column(t, e))] = values[t][e];
  // The destination is double in place of bfloat16: found from the address by the tensor's strides.
  for_each_copied(map, head_dim, kWarpgroupRows, head, row, [&](int at, const Bits *address) {
    if (!address) return;
    const int64_t offset = (reinterpret_cast<uint64_t>(address) - map.address) / 2;
    require(offset < args.tokens * heads * head_dim, "a store beyond the tensor");
    require(std::isnan(to[offset]), "an element is stored twice");
    to[offset] = buffer[at];
  });
}

// Of the four threads that share a row.
template <class F> double over_quad(int thread, F f, bool largest) {
  double result = f(thread / 4 * 4);
  for (int lane = 1; lane < 4; ++lane) {
    const double other = f(thread / 4 * 4 + lane);
    result = largest ? std::fmax(result, other) : result + other;
  }
  return result;
}

void hide(Registers &s, int first_row, int first_column, const std::vector<int32_t> &ends) {
  for (int t = 0; t < kWarpgroupThreads; ++t)
    for (size_t e = 0; e < s[t].size(); ++e) {
      const int column = product_column(t, e);
      if (!visible(first_row + product_row(t, e), first_column + column, ends[column]))
        s[t][e] = -kInfinity;
    }
}

struct Softmax {
  double max[kWarpgroupThreads][2], sum[kWarpgroupThreads][2] = {};
  Softmax() {
    for (auto &of_thread : max) of_thread[0] = of_thread[1] = -1e30;
  }
  void update(Registers &s, Registers &out, double scale_log2) {
    double highest[kWarpgroupThreads][2];
    for (int t = 0; t < kWarpgroupThreads; ++t)
      for (int h = 0; h < 2; ++h) {
        highest[t][h] = -kInfinity;
        for (size_t e = 2 * h; e < s[t].size(); e += 4)
          highest[t][h] = std::fmax(highest[t][h], std::fmax(s[t][e], s[t][e + 1]));
      }
    for (int t = 0; t < kWarpgroupThreads; ++t)
      for (int h = 0; h < 2; ++h) {
        const double top = over_quad(t, [&](int of) { return highest[of][h]; }, true);
        const double next = std::fmax(max[t][h], top * scale_log2);
        const double shrink = std::exp2(max[t][h] - next);
        max[t][h] = next;
        sum[t][h] *= shrink;
        for (size_t e = 0; e < s[t].size(); ++e) {
          if (static_cast<int>(e / 2 % 2) != h) continue;
          s[t][e] = std::exp2(s[t][e] * scale_log2 - next);
          sum[t][h] += s[t][e];
        }
        for (size_t e = 0; e < out[t].size(); ++e)
          if (static_cast<int>(e / 2 % 2) == h) out[t][e] *= shrink;
      }
  }
};

void forward_block(const TrieAttentionArgs &args, const ForwardArguments &a, int blocks, int block,
                   double *out, double *lse) {
  const int head_dim = args.head_dim;
  const Stream stream = forward_stream(head_dim);
  const Tiles q_map = tiles_of(args, args.q, args.heads, kWarpgroupRows);
  const Tiles out_map = tiles_of(args, args.out, args.heads, kWarpgroupRows);
  const Tiles k_map = tiles_of(args, args.k, args.kv_heads, stream.rows);
  const Tiles v_map = tiles_of(args, args.v, args.kv_heads, stream.rows);
  enum { kQ, kK, kV };
  const std::vector<int> stages = {1, stream.stages, stream.stages};
  std::vector<Copy> copies[3];
  std::vector<Step> producer, consumer;

  const auto fill = [&](int ring, Copy copy) {
    copies[ring].push_back(std::move(copy));
    producer.push_back({Step::fill, ring});
  };
  const auto load_k = [&](int head, int row) {
    fill(kK, {load_tile(k_map, head_dim, stream.rows, head, row), {},
              load_numbers(a.ends + row, stream.rows), {}, {}});
  };
  const auto load_v = [&](int head, int row) {
    fill(kV, {load_tile(v_map, head_dim, stream.rows, head, row), {}, {}, {}, {}});
  };
  for (int round = 0, tile; (tile = tile_of(round, blocks, block)) < a.tiles; ++round) {
    const RowTile t = row_tile(a.rows, a.heads, tile);
    const int kv_head = t.head / a.group;
    Copy own;
    for (int w = 0; w < kConsumers; ++w)
      (w ? own.second : own.first) = load_tile(q_map, head_dim, kWarpgroupRows, t.head,
                                               t.first_row + w * kWarpgroupRows);
    fill(kQ, own);
    int row = a.rows.kv_blocks[t.begin] * stream.rows;
    load_k(kv_head, row);
    for (int i = t.begin + 1; i < t.end; ++i) {
      const int next = a.rows.kv_blocks[i] * stream.rows;
      load_k(kv_head, next);
      load_v(kv_head, row);
      row = next;
    }
    load_v(kv_head, row);
  }

  for (int w = 0; w < kConsumers; ++w) {
    size_t next[3] = {};
    consumer.clear();
    const auto wait = [&](int ring) -> const Copy & {
      consumer.push_back({Step::wait, ring});
      return copies[ring].at(next[ring]);
    };
    const auto release = [&](int ring) {
      consumer.push_back({Step::release, ring});
      ++next[ring];
    };
    for (int round = 0, tile; (tile = tile_of(round, blocks, block)) < a.tiles; ++round) {
      const RowTile t = row_tile(a.rows, a.heads, tile);
      const int first_row = t.first_row + w * kWarpgroupRows;
      const Copy &own = wait(kQ);
      const Matrix q = of_tile(w ? own.second : own.first, kWarpgroupRows, head_dim);
      Softmax softmax;
      Registers sums = registers(head_dim), p;
      const Copy *k = &wait(kK);
      for (int i = t.begin; i < t.end; ++i) {
        Registers s = scores(q, of_tile(k->first, stream.rows, head_dim));
        const bool first = i == t.begin;
        if (!first) add_product(sums, p, of_tile(wait(kV).first, stream.rows, head_dim));
        if (i >= t.partial) hide(s, first_row, a.rows.kv_blocks[i] * stream.rows, k->ends);
        release(kK);
        softmax.update(s, sums, a.scale_log2);
        if (i + 1 < t.end) k = &wait(kK);
        if (!first) release(kV);
        p = s;
      }
      release(kQ);
      add_product(sums, p, of_tile(wait(kV).first, stream.rows, head_dim));
      release(kV);
      for (int thread = 0; thread < kWarpgroupThreads; ++thread)
        for (int h = 0; h < 2; ++h) {
          const double total = over_quad(thread, [&](int of) { return softmax.sum[of][h]; }, false);
          for (size_t e = 0; e < sums[thread].size(); ++e)
            if (static_cast<int>(e / 2 % 2) == h) sums[thread][e] *= 1 / total;
          const int row = first_row + product_row(thread, 0) + 8 * h;
          if (thread % 4 == 0 && row < a.tokens)
            lse[static_cast<int64_t>(t.head) * a.tokens + row] =
                (softmax.max[thread][h] + std::log2(total)) * M_LN2;
        }
      store_tile(out_map, args, sums, t.head, first_row, out, args.heads);
    }
    require_progress(stages, producer, consumer);
  }
}

void delta_block(const TrieAttentionArgs &args, const DeltaArguments &a, int block) {
  const int head_dim = args.head_dim, lanes = head_dim / 8, rows = kDeltaThreads / lanes;
  const int blocks_per_head = a.padded / rows, head = block / blocks_per_head;
  for (int thread = 0; thread < kDeltaThreads; thread += lanes) {
    const int row = block % blocks_per_head * rows + thread / lanes;
    const auto read = [&](const Heads &x, int c) {
      return value(static_cast<const Bits *>(
          x.data)[row * x.row_stride + head * x.head_stride + c]);
    };
    double sum = 0;
    for (int c = 0; row < a.tokens && c < head_dim; ++c) sum += read(a.dout, c) * read(a.out, c);
    const int64_t at = static_cast<int64_t>(head) * a.padded + row;
    a.delta[at] = static_cast<float>(sum);
    a.lse2[at] = row < a.tokens ? static_cast<float>(
                                      a.lse[static_cast<int64_t>(head) * a.tokens + row] * M_LOG2E)
                                : 0.0f;
  }
}

void dq_block(const TrieAttentionArgs &args, const DqArguments &a, int blocks, int block,
              double *dq) {
  const int head_dim = args.head_dim;
  const Stream stream = dq_stream(head_dim);
  const Tiles q_map = tiles_of(args, args.q, args.heads, kWarpgroupRows);
  const Tiles dout_map = tiles_of(args, args.dout, args.heads, kWarpgroupRows);
  const Tiles dq_map = tiles_of(args, args.dq, args.heads, kWarpgroupRows);
  const Tiles k_map = tiles_of(args, args.k, args.kv_heads, stream.rows);
  const Tiles v_map = tiles_of(args, args.v, args.kv_heads, stream.rows);
  enum { kOwn, kStream };
  for (int w = 0; w < kConsumers; ++w) {
    std::vector<Copy> copies[2];
    std::vector<Step> producer, consumer;
    for (int round = 0, tile; (tile = tile_of(round, blocks, block)) < a.tiles; ++round) {
      const RowTile t = row_tile(a.rows, a.heads, tile);
      const int row = t.first_row + w * kWarpgroupRows;
      copies[kOwn].push_back({load_tile(q_map, head_dim, kWarpgroupRows, t.head, row),
                              load_tile(dout_map, head_dim, kWarpgroupRows, t.head, row),
                              {}, {}, {}});
      producer.push_back({Step::fill, kOwn});
      for (int i = t.begin; i < t.end; ++i) {
        const int column = a.rows.kv_blocks[i] * stream.rows;
        copies[kStream].push_back(
            {load_tile(k_map, head_dim, stream.rows, t.head / a.group, column),
             load_tile(v_map, head_dim, stream.rows, t.head / a.group, column),
             load_numbers(a.ends + column, stream.rows), {}, {}});
        producer.push_back({Step::fill, kStream});
      }
    }
    size_t next = 0;
    for (int round = 0, tile; (tile = tile_of(round, blocks, block)) < a.tiles; ++round) {
      const RowTile t = row_tile(a.rows, a.heads, tile);
      const int first_row = t.first_row + w * kWarpgroupRows;
      const Copy &own = copies[kOwn].at(round);
      consumer.push_back({Step::wait, kOwn});
      const Matrix q = of_tile(own.first, kWarpgroupRows, head_dim);
      const Matrix dout = of_tile(own.second, kWarpgroupRows, head_dim);
      Registers sums = registers(head_dim);
      consumer.push_back({Step::wait, kStream});
      for (int i = t.begin; i < t.end; ++i) {
        if (i > t.begin) consumer.push_back({Step::release, kStream});
        if (i + 1 < t.end) consumer.push_back({Step::wait, kStream});
        const Copy &kv = copies[kStream].at(next++);
        const Matrix k = of_tile(kv.first, stream.rows, head_dim);
        Registers s = scores(q, k);
        const Registers dp = scores(dout, of_tile(kv.second, stream.rows, head_dim));
        if (i >= t.partial) hide(s, first_row, a.rows.kv_blocks[i] * stream.rows, kv.ends);
        for (int thread = 0; thread < kWarpgroupThreads; ++thread)
          for (int e = 0; e < stream.rows / 2; ++e) {
            const int64_t at =
                static_cast<int64_t>(t.head) * a.padded + first_row + product_row(thread, e);
            s[thread][e] = std::exp2(s[thread][e] * a.scale_log2 - a.lse2[at]) *
                           (dp[thread][e] - a.delta[at]);
          }
        add_product(sums, s, k);
      }
      consumer.push_back({Step::release, kOwn});
      consumer.push_back({Step::release, kStream});
      for (auto &of_thread : sums)
        for (double &x : of_thread) x *= a.scale;
      store_tile(dq_map, args, sums, t.head, first_row, dq, args.heads);
    }
    require_progress({1, stream.stages}, producer, consumer);
  }
}

void dkv_block(const TrieAttentionArgs &args, const DkvArguments &a, int blocks, int block,
               double *dk, double *dv) {
  const int head_dim = args.head_dim;
  const Stream stream = dkv_stream(head_dim);
  const Tiles k_map = tiles_of(args, args.k, args.kv_heads, kWarpgroupRows);
  const Tiles v_map = tiles_of(args, args.v, args.kv_heads, kWarpgroupRows);
  const Tiles dk_map = tiles_of(args, args.dk, args.kv_heads, kWarpgroupRows);
  const Tiles dv_map = tiles_of(args, args.dv, args.kv_heads, kWarpgroupRows);
  const Tiles q_map = tiles_of(args, args.q, args.heads, stream.rows);
  const Tiles dout_map = tiles_of(args, args.dout, args.heads, stream.rows);
  enum { kOwn, kStream };
  for (int w = 0; w < kConsumers; ++w) {
    std::vector<Copy> copies[2];
    std::vector<Step> producer, consumer;
    for (int round = 0, tile; (tile = tile_of(round, blocks, block)) < a.tiles; ++round) {
      const ColumnTile t = column_tile(a.columns, a.kv_heads, tile);
      const int column = t.first_column + w * kWarpgroupRows;
      copies[kOwn].push_back({load_tile(k_map, head_dim, kWarpgroupRows, t.kv_head, column),
                              load_tile(v_map, head_dim, kWarpgroupRows, t.kv_head, column),
                              {}, {}, {}});
      producer.push_back({Step::fill, kOwn});
      for (int head = t.kv_head * a.group; head < (t.kv_head + 1) * a.group; ++head)
        for (int b = t.first; b < t.last; ++b) {
          const int row = b * stream.rows;
          const int64_t at = static_cast<int64_t>(head) * a.padded + row;
          copies[kStream].push_back({load_tile(q_map, head_dim, stream.rows, head, row),
                                     load_tile(dout_map, head_dim, stream.rows, head, row), {},
                                     load_numbers(a.lse2 + at, stream.rows),
                                     load_numbers(a.delta + at, stream.rows)});
          producer.push_back({Step::fill, kStream});
        }
    }
    size_t next = 0;
    for (int round = 0, tile; (tile = tile_of(round, blocks, block)) < a.tiles; ++round) {
      const ColumnTile t = column_tile(a.columns, a.kv_heads, tile);
      const int first_column = t.first_column + w * kWarpgroupRows;
      const Copy &own = copies[kOwn].at(round);
      consumer.push_back({Step::wait, kOwn});
      const Matrix k = of_tile(own.first, kWarpgroupRows, head_dim);
      const Matrix v = of_tile(own.second, kWarpgroupRows, head_dim);
      Registers dk_sums = registers(head_dim), dv_sums = registers(head_dim);
      for (int head = 0; head < a.group; ++head)
        for (int b = t.first; b < t.last; ++b) {
          consumer.push_back({Step::wait, kStream});
          const Copy &rows = copies[kStream].at(next++);
          const Matrix q = of_tile(rows.first, stream.rows, head_dim);
          const Matrix dout = of_tile(rows.second, stream.rows, head_dim);
          Registers p = scores(k, q), ds = scores(v, dout);
          for (int thread = 0; thread < kWarpgroupThreads; ++thread)
            for (int e = 0; e < stream.rows / 2; ++e) {
              const int column = first_column + product_row(thread, e);
              const int in_tile = product_column(thread, e);
              double &x = p[thread][e];
              if (t.is_masked(b) && !visible(b * stream.rows + in_tile, column, a.ends[column]))
                x = -kInfinity;
              x = std::exp2(x * a.scale_log2 - rows.lse2[in_tile]);
              ds[thread][e] = x * (ds[thread][e] - rows.delta[in_tile]);
            }
          add_product(dv_sums, p, dout);
          add_product(dk_sums, ds, q);
          consumer.push_back({Step::release, kStream});
        }
      consumer.push_back({Step::release, kOwn});
      for (auto &of_thread : dk_sums)
        for (double &x : of_thread) x *= a.scale;
      store_tile(dk_map, args, dk_sums, t.kv_head, first_column, dk, args.kv_heads);
      store_tile(dv_map, args, dv_sums, t.kv_head, first_column, dv, args.kv_heads);
    }
    require_progress({1, stream.stages}, producer, consumer);
  }
}

// Null, or what went wrong.
template <class F> const char *attempt(F f) {
  static std::string message;
  try {
    f();
    return nullptr;
  } catch (const std::exception &error) {
    message = error.what();
    return message.c_str();
  }
}

} // namespace

} // namespace tw::cuda

// out [tokens, heads, head_dim] and lse [heads, tokens] in place of the arguments', NaN before.
extern "C" const char *emulate_trie_attention_forward(const tw::cuda::TrieAttentionArgs *args,
                                                      double *out, double *lse) {
  using namespace tw::cuda;
  return attempt([&] {
    const ForwardArguments a = forward_arguments(*args);
    const int blocks = forward_grid(*args).blocks;
    for (int block = 0; block < blocks; ++block) forward_block(*args, a, blocks, block, out, lse);
  });
}

// dq, dk and dv in place of the arguments', NaN before; lse2 and delta are the arguments'.
extern "C" const char *emulate_trie_attention_backward(const tw::cuda::TrieAttentionArgs *args,
                                                       double *dq, double *dk, double *dv) {
  using namespace tw::cuda;
  return attempt([&] {
    for (unsigned block = 0; block < delta_grid(*args).blocks; ++block)
      delta_block(*args, delta_arguments(*args), block);
    const int dq_blocks = dq_grid(*args).blocks, dkv_blocks = dkv_grid(*args).blocks;
    for (int block = 0; block < dq_blocks; ++block)
      dq_block(*args, dq_arguments(*args), dq_blocks, block, dq);
    for (int block = 0; block < dkv_blocks; ++block)
      dkv_block(*args, dkv_arguments(*args), dkv_blocks, block, dk, dv);
  });
}

// Null, or what the driver refused.
extern "C" const char *run_trie_attention(const tw::cuda::TrieAttentionArgs *args, int device,
                                          void *stream) {
  using namespace tw::cuda;
  return attempt([&] {
    trie_attention_forward(*args, OnDevice(device), stream, "fwd.cubin");
    trie_attention_backward(*args, OnDevice(device), stream, "bwd.cubin");
  });
}

extern "C" void tiles_of_tensor(const tw::cuda::TrieAttentionArgs *args,
                                const tw::cuda::Heads *tensor, int64_t heads, int rows,
                                tw::cuda::Tiles *tiles) {
  *tiles = tw::cuda::tiles_of(*args, *tensor, heads, rows);
}

extern "C" const char *why_not_tiles(const tw::cuda::Tiles *tiles) {
  static std::string message;
  message = tw::cuda::why_not(*tiles);
  return message.c_str();
}

// (tile rows, stages) of forward, dQ, dKV; then the tile that a thread block takes in a round.
extern "C" void streams_of(int head_dim, int (*streams)[2]) {
  using namespace tw::cuda;
  const Stream all[] = {forward_stream(head_dim), dq_stream(head_dim), dkv_stream(head_dim)};
  for (int i = 0; i < 3; ++i) streams[i][0] = all[i].rows, streams[i][1] = all[i].stages;
}

extern "C" int tile_of_round(int round, int blocks, int block) {
  return tw::cuda::tile_of(round, blocks, block);
}

// Shared memory in bytes of forward, dQ, dKV.
extern "C" void shared_bytes_of(const tw::cuda::TrieAttentionArgs *args, int *bytes) {
  using namespace tw::cuda;
  const Grid grids[] = {forward_grid(*args), dq_grid(*args), dkv_grid(*args)};
  for (int i = 0; i < 3; ++i) bytes[i] = static_cast<int>(grids[i].shared_bytes);
}
