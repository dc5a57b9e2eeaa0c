// The trie attention kernels (csrc/cuda/attention) in double precision: the tiles, masks and
// addresses of a launch, in one order.
#include "cuda/attention/trie_attention.h"
#include "cuda_emulation.h"

namespace tw::cuda {

namespace {

// `rows` tokens of a head from token `row` on.
Matrix load_tile(bool bfloat16, const TensorMap &map, int head_dim, int rows, int head, int row) {
  std::vector<uint16_t> tile(rows * head_dim, 0xffff);
  int bytes = 0;
  for (int box = 0; box < head_dim / kBoxColumns; ++box)
    bytes += copy_box(Map::of(map), {box * kBoxColumns, head, row}, tile.data(),
                      box * rows * kBoxColumns);
  require(bytes == rows * head_dim * 2, "a tile's barrier waits for other bytes than arrive");
  return {bfloat16, tile.data(), rows, head_dim};
}

// 64 tokens of a head.
void store_tile(bool bfloat16, const TensorMap &map, const Matrix &m, int head, int row) {
  std::vector<uint16_t> tile(m.values.size());
  for (int r = 0; r < m.rows; ++r)
    for (int c = 0; c < m.columns; ++c)
      tile[box_offset(m.rows, r, c)] = rounded(bfloat16, m.row(r)[c]);
  for (int box = 0; box < m.columns / kBoxColumns; ++box)
    copy_box(Map::of(map), {box * kBoxColumns, head, row}, tile.data(),
             box * m.rows * kBoxColumns, true);
}

// Calls f(tile) for the tiles of every block of a persistent grid.
template <class F> void for_each_tile(const Launch &launch, int tiles, size_t shared, F f) {
  require(launch.threads == kThreads && launch.shared_bytes == static_cast<int>(shared),
          "threads or shared memory are not what the kernel takes");
  for (int block = 0; block < launch.blocks; ++block)
    for (int round = 0, tile; (tile = tile_of(round, launch.blocks, block)) < tiles; ++round)
      f(tile);
}

template <bool kBfloat16, int D, Grain kGrain> void forward(const Launch &launch) {
  const auto &a = *static_cast<const ForwardArguments *>(launch.arguments);
  const int rows = forward_stream(D, kGrain).rows;
  for_each_tile(launch, a.tiles, sizeof(ForwardShared<D, kGrain>), [&](int tile) {
    const RowTile t = row_tile(kGrain, a.rows, a.kv_heads, a.group, tile);
    for (int w = 0; w < kConsumers; ++w) {
      const int head = t.head(w), first_row = t.row(w);
      const Matrix q = load_tile(kBfloat16, a.q, D, kWarpgroupRows, head, first_row);
      SoftmaxRows softmax(D);
      for (int i = t.begin; i < t.end; ++i) {
        const int first = a.rows.kv_blocks[i] * rows;
        const Matrix k = load_tile(kBfloat16, a.k, D, rows, t.kv_head, first);
        const Matrix v = load_tile(kBfloat16, a.v, D, rows, t.kv_head, first);
        for_each_product(q, k, [&](int r, int c, double s) {
          if (i < t.partial || visible(first_row + r, first + c, a.ends[first + c]))
            softmax.see(r, s * a.scale_log2, v.row(c));
        });
      }
      for (int r = 0; r < kWarpgroupRows; ++r) {
        for (int c = 0; c < D; ++c) softmax.out.row(r)[c] /= softmax.sum[r];
        const int row = first_row + r;
        if (row < a.tokens)
          a.lse[static_cast<int64_t>(head) * a.tokens + row] =
              static_cast<float>((softmax.max[r] + std::log2(softmax.sum[r])) * M_LN2);
      }
      store_tile(kBfloat16, a.out, softmax.out, head, first_row);
    }
  });
}

template <bool kBfloat16, int D> void delta(const Launch &launch) {
  const auto &a = *static_cast<const DeltaArguments *>(launch.arguments);
  const int blocks_per_head = a.padded / delta_rows(D);
  for (int block = 0; block < launch.blocks; ++block)
    for (int thread = 0; thread < launch.threads; thread += D / kChunkColumns) {
      const int head = block / blocks_per_head;
      const int row = block % blocks_per_head * delta_rows(D) + thread / (D / kChunkColumns);
      const int64_t at = static_cast<int64_t>(head) * a.padded + row;
      a.lse2[at] = a.delta[at] = 0;
      if (row >= a.tokens) continue;
      const auto read = [&](const Heads &x, int c) {
        return value(kBfloat16, static_cast<const uint16_t *>(
                               x.data)[row * x.row_stride + head * x.head_stride + c]);
      };
      double sum = 0;
      for (int c = 0; c < D; ++c) sum += read(a.dout, c) * read(a.out, c);
      a.delta[at] = static_cast<float>(sum);
      a.lse2[at] = static_cast<float>(a.lse[static_cast<int64_t>(head) * a.tokens + row] * M_LOG2E);
    }
}

template <bool kBfloat16, int D, Grain kGrain> void dq(const Launch &launch) {
  const auto &a = *static_cast<const DqArguments *>(launch.arguments);
  const int rows = dq_stream(D, kGrain).rows;
  for_each_tile(launch, a.tiles, sizeof(DqShared<D, kGrain>), [&](int tile) {
    const RowTile t = row_tile(kGrain, a.rows, a.kv_heads, a.group, tile);
    for (int w = 0; w < kConsumers; ++w) {
      const int head = t.head(w), first_row = t.row(w);
      const int64_t at = static_cast<int64_t>(head) * a.padded + first_row;
      const Matrix q = load_tile(kBfloat16, a.q, D, kWarpgroupRows, head, first_row);
      const Matrix dout = load_tile(kBfloat16, a.dout, D, kWarpgroupRows, head, first_row);
      Matrix dq(kWarpgroupRows, D);
      for (int i = t.begin; i < t.end; ++i) {
        const int first = a.rows.kv_blocks[i] * rows;
        const Matrix k = load_tile(kBfloat16, a.k, D, rows, t.kv_head, first);
        const Matrix v = load_tile(kBfloat16, a.v, D, rows, t.kv_head, first);
        Matrix p(kWarpgroupRows, rows);
        for_each_product(q, k, [&](int r, int c, double s) {
          if (i < t.partial || visible(first_row + r, first + c, a.ends[first + c]))
            p.row(r)[c] = std::exp2(s * a.scale_log2 - a.lse2[at + r]);
        });
        for_each_product(dout, v, [&](int r, int c, double dp) {
          add(dq.row(r), a.scale * p.row(r)[c] * (dp - a.delta[at + r]), k.row(c), D);
        });
      }
      store_tile(kBfloat16, a.dq, dq, head, first_row);
    }
  });
}

template <bool kBfloat16, int D, Grain kGrain> void dkv(const Launch &launch) {
  const auto &a = *static_cast<const DkvArguments *>(launch.arguments);
  const int rows = dkv_stream(D).rows;
  for_each_tile(launch, a.tiles, sizeof(DkvShared<D, kGrain>), [&](int tile) {
    const ColumnTile t = column_tile(kGrain, a.columns, a.kv_heads, tile);
    for (int w = 0; w < kConsumers; ++w) {
      const RowRange range = t.range(a.columns, w);
      const int first_column = t.first_column + w * kWarpgroupRows;
      const Matrix k = load_tile(kBfloat16, a.k, D, kWarpgroupRows, t.kv_head, first_column);
      const Matrix v = load_tile(kBfloat16, a.v, D, kWarpgroupRows, t.kv_head, first_column);
      Matrix dk(kWarpgroupRows, D), dv(kWarpgroupRows, D);
      for (int head = t.kv_head * a.group; head < (t.kv_head + 1) * a.group; ++head)
        for (int block = t.first; block < t.last; ++block) {
          if (kGrain == Grain::fine && !range.has(block)) continue;
          const int first = block * rows;
          const int64_t at = static_cast<int64_t>(head) * a.padded + first;
          const Matrix q = load_tile(kBfloat16, a.q, D, rows, head, first);
          const Matrix dout = load_tile(kBfloat16, a.dout, D, rows, head, first);
          Matrix p(kWarpgroupRows, rows);
          for_each_product(k, q, [&](int c, int r, double s) {
            if (!range.is_masked(block) ||
                visible(first + r, first_column + c, a.ends[first_column + c]))
              p.row(c)[r] = std::exp2(s * a.scale_log2 - a.lse2[at + r]);
          });
          for_each_product(v, dout, [&](int c, int r, double dp) {
            add(dv.row(c), p.row(c)[r], dout.row(r), D);
            add(dk.row(c), a.scale * p.row(c)[r] * (dp - a.delta[at + r]), q.row(r), D);
          });
        }
      store_tile(kBfloat16, a.dk, dk, t.kv_head, first_column);
      store_tile(kBfloat16, a.dv, dv, t.kv_head, first_column);
    }
  });
}

template <bool kBfloat16, int D> bool emulate(const Launch &launch) {
  const auto name = std::string(kBfloat16 ? "_bfloat16_" : "_float16_") + std::to_string(D);
  constexpr Grain kCoarse = Grain::coarse, kFine = Grain::fine;
  const struct {
    std::string name;
    void (*run)(const Launch &);
  } kernels[] = {{"delta" + name, delta<kBfloat16, D>},
                 {"forward" + name + "_coarse", forward<kBfloat16, D, kCoarse>},
                 {"forward" + name + "_fine", forward<kBfloat16, D, kFine>},
                 {"dq" + name + "_coarse", dq<kBfloat16, D, kCoarse>},
                 {"dq" + name + "_fine", dq<kBfloat16, D, kFine>},
                 {"dkv" + name + "_coarse", dkv<kBfloat16, D, kCoarse>},
                 {"dkv" + name + "_fine", dkv<kBfloat16, D, kFine>}};
  for (const auto &[name, run] : kernels)
    if (launch.kernel == "trie_attention_" + name) return run(launch), true;
  return false;
}

} // namespace

bool emulate_attention(const Launch &launch) {
  return emulate<true, 64>(launch) || emulate<true, 128>(launch) || emulate<false, 64>(launch) ||
         emulate<false, 128>(launch);
}

} // namespace tw::cuda

// The tile that a block of a persistent grid takes in a round.
extern "C" int tile_of_round(int round, int blocks, int block) {
  return tw::cuda::tile_of(round, blocks, block);
}
