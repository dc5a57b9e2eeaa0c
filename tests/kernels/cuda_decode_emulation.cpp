// The decode kernels (csrc/cuda/trie_decode.cu) step by step on the CPU, in double precision: the
// same index arithmetic, launches and arguments (trie_decode_index.h, trie_decode.cpp), with the
// copy engine, the tensor cores and the threads' registers played after the PTX ISA. There it all
// runs in one order; the ring, with its barriers, is played alone and in any order.
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/trie_decode.h"
#include "cuda/trie_decode_index.h"

namespace tw::cuda {

namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

void require(bool holds, const char *what) {
  if (!holds) throw std::logic_error(what);
}

double value(Element element, const void *at) {
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  if (element == Element::bfloat16) {
    const uint32_t wide = uint32_t{bits} << 16;
    float result;
    std::memcpy(&result, &wide, 4);
    return result;
  }
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double magnitude = exponent == 31  ? (fraction ? kNaN : kInfinity)
                           : exponent == 0 ? std::ldexp(fraction, -24)
                                           : std::ldexp(1024 + fraction, exponent - 25);
  return bits >> 15 ? -magnitude : magnitude;
}

// cp.async.bulk.tensor of one box to `offset` of a tile, which starts at a multiple of 1024 bytes.
// Returns the bytes that arrive.
int copy_box(const Tiles &tiles, const int64_t (&at)[4], char *tile, int offset) {
  require(offset % kStripBytes == 0, "a box must start at a multiple of 128 bytes");
  int linear = offset;
  for (uint32_t key = 0; key < tiles.box[2]; ++key)
    for (uint32_t column = 0; column < tiles.box[0]; ++column, linear += kElementBytes) {
      const int64_t from[] = {at[0] + column, at[1], at[2] + key, at[3]};
      uint64_t address = tiles.address + from[0] * kElementBytes;
      for (int i = 0; i < 4; ++i)
        require(from[i] >= 0 && from[i] < static_cast<int64_t>(tiles.sizes[i]),
                "a box reaches out of the pages");
      for (int i = 1; i < 4; ++i) address += from[i] * tiles.strides[i];
      const int swizzled = linear ^ (linear >> 7 & 7) << 4;
      std::memcpy(tile + swizzled, reinterpret_cast<const void *>(address), kElementBytes);
    }
  return linear - offset;
}

// [kTile, head_dim] as wgmma reads a tile.
std::vector<double> operand(Element element, const char *tile, int head_dim) {
  std::vector<double> matrix(kTile * head_dim);
  for (int row = 0; row < kTile; ++row)
    for (int column = 0; column < head_dim; ++column)
      matrix[row * head_dim + column] =
          value(element, tile + chunk_offset(row, column / kChunkColumns) +
                             column % kChunkColumns * kElementBytes);
  return matrix;
}

void write(const WriteArguments &a, const Grid &grid) {
  for (unsigned block = 0; block < grid.blocks; ++block) {
    const int slot = a.slots[block], row = a.rows[block];
    if (slot < 0) continue;
    for (int head = 0; head < a.kv_heads; ++head)
      for (int column = 0; column < a.head_dim; ++column) {
        const int64_t to = slot / a.page_size * a.kv.page_stride +
                           slot % a.page_size * a.kv.slot_stride + head * a.kv.head_stride + column;
        for (const auto &[new_rows, pages] : {std::pair{a.new_k, a.kv.k}, {a.new_v, a.kv.v}})
          static_cast<uint16_t *>(pages)[to] = static_cast<const uint16_t *>(
              new_rows.data)[row * new_rows.row_stride + head * new_rows.head_stride + column];
      }
  }
}

// The multiplying warpgroup's registers: thread by thread.
struct Warpgroup {
  int first_m, end_m;
  std::vector<double> q; // [kTile, head_dim]
  double scores[kWarpgroupThreads][kTile / 2];
  std::vector<std::vector<double>> sums; // [thread][head_dim / 2]
  double top[kWarpgroupThreads][2], sum[kWarpgroupThreads][2];
  int visible[kWarpgroupThreads][2];
};

void multiply_keys(Warpgroup &w, const std::vector<double> &k, int head_dim) {
  for (int thread = 0; thread < kWarpgroupThreads; ++thread)
    for (int i = 0; i < kTile / 2; ++i) {
      const double *q_row = &w.q[product_row(thread, i) * head_dim];
      const double *k_row = &k[product_column(thread, i) * head_dim];
      double score = 0;
      for (int c = 0; c < head_dim; ++c) score += q_row[c] * k_row[c];
      w.scores[thread][i] = score;
    }
}

// Scores become weights; what is accumulated moves to the new top.
void softmax_step(Warpgroup &w, int first_key, bool masked, double scale_log2) {
  double high[kWarpgroupThreads][2];
  for (int thread = 0; thread < kWarpgroupThreads; ++thread)
    for (int r = 0; r < 2; ++r) {
      high[thread][r] = -kInfinity;
      for (int i = 0; i < kTile / 2; ++i) {
        if (i / 2 % 2 != r) continue;
        if (masked && first_key + product_column(thread, i) >= w.visible[thread][r])
          w.scores[thread][i] = -kInfinity;
        high[thread][r] = std::fmax(high[thread][r], w.scores[thread][i]);
      }
    }
  for (int thread = 0; thread < kWarpgroupThreads; ++thread)
    for (int r = 0; r < 2; ++r) {
      double row_high = -kInfinity; // of the four threads that share the row
      for (int lane = 0; lane < 4; ++lane)
        row_high = std::fmax(row_high, high[thread / 4 * 4 + lane][r]);
      const double new_top = std::fmax(w.top[thread][r], row_high * scale_log2);
      const double factor = std::exp2(w.top[thread][r] - new_top);
      w.top[thread][r] = new_top;
      w.sum[thread][r] *= factor;
      for (int i = 0; i < kTile / 2; ++i)
        if (i / 2 % 2 == r) {
          w.scores[thread][i] = std::exp2(w.scores[thread][i] * scale_log2 - new_top);
          w.sum[thread][r] += w.scores[thread][i];
        }
      for (size_t i = 0; i < w.sums[thread].size(); ++i)
        if (i / 2 % 2 == static_cast<size_t>(r)) w.sums[thread][i] *= factor;
    }
}

void multiply_values(Warpgroup &w, const std::vector<double> &v, int head_dim) {
  // The first operand from registers, four products of 16 keys (PTX ISA, wgmma with m64k16: A).
  std::vector<double> weights(kTile * kTile, kNaN); // [row, key]
  for (int thread = 0; thread < kWarpgroupThreads; ++thread)
    for (int product = 0; product < kTile / 16; ++product)
      for (int e = 0; e < 8; ++e) {
        const int row = 16 * (thread / 32) + thread % 32 / 4 + 8 * (e / 2 % 2);
        const int key = 16 * product + 2 * (thread % 4) + e % 2 + 8 * (e / 4);
        weights[row * kTile + key] = w.scores[thread][8 * product + e];
      }
  for (int thread = 0; thread < kWarpgroupThreads; ++thread)
    for (int i = 0; i < head_dim / 2; ++i) {
      const int row = product_row(thread, i), column = product_column(thread, i);
      for (int key = 0; key < kTile; ++key)
        w.sums[thread][i] += weights[row * kTile + key] * v[key * head_dim + column];
    }
}

void partial_block(const TrieDecodeArgs &args, const PartialArguments &a, int block) {
  const int head_dim = args.head_dim, groups = warpgroups(args);
  const int slots = ring_slots(head_dim, groups);
  const Tiles tiles[] = {page_tiles(args, args.kv.k), page_tiles(args, args.kv.v)};
  const Part part = part_of_block(block, a.row_blocks, a.kv_heads, groups);
  require(part.item < args.num_items, "a block has no item");
  const DecodeItem item = a.items[part.item];
  const int end_m =
      std::min((item.end_row - item.first_row) * a.group, part.first_m + groups * kTile);
  if (part.first_m >= end_m) return;
  int least = item.num_keys, most = 0;
  for (int row = item.first_row + row_of(part.first_m, a.group);
       row < item.first_row + row_of(end_m - 1, a.group) + 1; ++row) {
    least = std::min(least, visible_keys(item, a.positions[row]));
    most = std::max(most, visible_keys(item, a.positions[row]));
  }

  std::vector<Warpgroup> all((end_m - part.first_m + kTile - 1) / kTile);
  for (size_t g = 0; g < all.size(); ++g) {
    Warpgroup &w = all[g];
    w.first_m = part.first_m + static_cast<int>(g) * kTile, w.end_m = end_m;
    std::vector<char> q_tile(tile_bytes(head_dim), -1);
    for (int row = 0; row < kTile; ++row)
      for (int chunk = 0; chunk < head_dim / kChunkColumns; ++chunk) {
        const int m = w.first_m + row;
        char *to = &q_tile[chunk_offset(row, chunk)];
        std::memset(to, 0, 16);
        if (m >= end_m) continue;
        const int64_t from = a.rows[item.first_row + row_of(m, a.group)] * a.q.row_stride +
                             head_of(m, a.group, part.head) * a.q.head_stride +
                             chunk * kChunkColumns;
        std::memcpy(to, static_cast<const uint16_t *>(a.q.data) + from, 16);
      }
    w.q = operand(args.element, q_tile.data(), head_dim);
    w.sums.assign(kWarpgroupThreads, std::vector<double>(head_dim / 2, 0));
    for (int thread = 0; thread < kWarpgroupThreads; ++thread)
      for (int r = 0; r < 2; ++r) {
        const int m = w.first_m + product_row(thread, 2 * r);
        w.top[thread][r] = -1e30, w.sum[thread][r] = 0;
        w.visible[thread][r] =
            m < end_m ? visible_keys(item, a.positions[item.first_row + row_of(m, a.group)]) : 0;
      }
  }

  std::vector<char> ring(slots * tile_bytes(head_dim), -1); // NaN until something is copied there
  for (int first_key = 0, turn = 0; first_key < most; first_key += kTile) {
    for (const Tiles &pages : tiles) {
      char *tile = &ring[ring_slot(turn, slots) * tile_bytes(head_dim)];
      int arrived = 0;
      for (int lane = 0; lane < 32; ++lane) {
        const Box box = box_of_lane(lane, a.page_size);
        const int key = first_key + box.key;
        if (box.strip * kBoxColumns >= head_dim || key >= most) continue;
        const int64_t at[] = {box.strip * kBoxColumns, part.head, key % a.page_size,
                              a.pages[item.first_page + key / a.page_size]};
        arrived += copy_box(pages, at, tile, box.offset());
      }
      require(arrived == arriving_bytes(most - first_key, a.page_size, head_dim),
              "the barrier waits for other bytes than arrive");
      if (&pages == tiles) {
        const auto k = operand(args.element, tile, head_dim);
        for (Warpgroup &w : all) {
          multiply_keys(w, k, head_dim);
          softmax_step(w, first_key, first_key + kTile > least, a.scale_log2);
        }
      } else {
        for (int key = most - first_key; key < kTile; ++key)
          for (int chunk = 0; chunk < head_dim / kChunkColumns; ++chunk)
            std::memset(tile + chunk_offset(key, chunk), 0, 16);
        const auto v = operand(args.element, tile, head_dim);
        for (Warpgroup &w : all) multiply_values(w, v, head_dim);
      }
      ++turn;
    }
  }

  for (const Warpgroup &w : all)
    for (int thread = 0; thread < kWarpgroupThreads; ++thread)
      for (int r = 0; r < 2; ++r) {
        double sum = 0;
        for (int lane = 0; lane < 4; ++lane) sum += w.sum[thread / 4 * 4 + lane][r];
        const int m = w.first_m + product_row(thread, 2 * r);
        if (m >= end_m) continue;
        const int64_t result = (int64_t{item.first_slot} + row_of(m, a.group)) * args.heads +
                               head_of(m, a.group, part.head);
        for (int i = 2 * r; i < head_dim / 2; i += 4)
          for (int c = 0; c < 2; ++c)
            a.out[result * head_dim + product_column(thread, i + c)] =
                sum == 0 ? 0 : w.sums[thread][i + c] / sum;
        if (thread % 4 == 0)
          a.lse[result] = sum == 0 ? -kInfinity : w.top[thread][r] + std::log2(sum);
      }
}

// out: [rows, heads, head_dim] in place of args.out.
void merge(const TrieDecodeArgs &args, const MergeArguments &a, const Grid &grid, double *out) {
  constexpr int kWarps = kMergeThreads / 32;
  for (int64_t index = 0; index < int64_t{grid.blocks} * kWarps; ++index) {
    const int64_t row = index / a.heads, head = index % a.heads;
    if (row >= a.num_rows) continue;
    double top = -1e30, total = 0;
    const auto result = [&](int i) { return int64_t{a.merge_slots[i]} * a.heads + head; };
    for (int i = a.merge_ptr[row]; i < a.merge_ptr[row + 1]; ++i)
      top = std::fmax(top, a.partial_lse[result(i)]);
    double *to = out + (int64_t{a.rows[row]} * a.heads + head) * args.head_dim;
    std::fill(to, to + args.head_dim, 0);
    for (int i = a.merge_ptr[row]; i < a.merge_ptr[row + 1]; ++i) {
      const double weight = std::exp2(a.partial_lse[result(i)] - top);
      total += weight;
      for (int c = 0; c < args.head_dim; ++c)
        to[c] += weight * a.partial_out[result(i) * args.head_dim + c];
    }
    for (int c = 0; c < args.head_dim; ++c) to[c] = total == 0 ? 0 : to[c] / total;
  }
}

// A barrier in shared memory (PTX ISA, mbarrier).
struct Barrier {
  int arrivals, pending = arrivals, bytes = 0, parity = 0; // of the phase that is not complete yet

  explicit Barrier(int arrivals) : arrivals(arrivals) {}
  bool is_complete(int of_parity) const { return of_parity != parity; }
  void arrive(int expected_bytes = 0) {
    require(pending > 0, "a barrier has more arrivals than it counts");
    --pending, bytes += expected_bytes;
    finish();
  }
  void receive(int count) {
    bytes -= count;
    finish();
  }

private:
  void finish() {
    if (pending || bytes) return;
    pending = arrivals, parity ^= 1;
  }
};

// The ring's protocol, in an order that `seed` draws: who goes on next, and which copy lands.
void run_ring(int head_dim, int groups, int turns, unsigned seed) {
  struct Copy {
    int turn, box;
  };
  struct Reader { // a multiplying warp
    int turn = 0;
    bool reads = false;
  };
  const int slots = ring_slots(head_dim, groups), box_bytes = tile_bytes(head_dim) / 4;
  std::vector<Barrier> full(slots, Barrier(1)), empty(slots, Barrier(releases(groups)));
  std::vector<int> holds(slots * 4, -1); // the turn that each quarter of a slot is of
  std::vector<Reader> readers(groups * kWarpgroupThreads / 32);
  std::vector<Copy> in_flight;
  int fetched = 0;
  std::mt19937 random(seed);
  for (;;) {
    std::vector<std::function<void()>> possible;
    const int next = ring_slot(fetched, slots);
    if (fetched < turns && empty[next].is_complete(released_parity(fetched, slots)))
      possible.push_back([&] {
        full[next].arrive(4 * box_bytes);
        for (int box = 0; box < 4; ++box) in_flight.push_back({fetched, box});
        ++fetched;
      });
    if (!in_flight.empty())
      possible.push_back([&] {
        std::swap(in_flight[random() % in_flight.size()], in_flight.back());
        const auto [turn, box] = in_flight.back();
        in_flight.pop_back();
        for (const Reader &reader : readers)
          require(reader.turn > turn - slots, "a slot is filled before every warp has released it");
        holds[ring_slot(turn, slots) * 4 + box] = turn;
        full[ring_slot(turn, slots)].receive(box_bytes);
      });
    for (Reader &reader : readers) {
      if (reader.turn == turns) continue;
      const int slot = ring_slot(reader.turn, slots);
      if (reader.reads)
        possible.push_back([&reader, &empty, slot] {
          empty[slot].arrive();
          reader.reads = false, ++reader.turn;
        });
      else if (full[slot].is_complete(filled_parity(reader.turn, slots)))
        possible.push_back([&reader, &holds, slot] {
          for (int box = 0; box < 4; ++box)
            require(holds[slot * 4 + box] == reader.turn, "a slot is read before it is filled");
          reader.reads = true;
        });
    }
    if (possible.empty()) break;
    possible[random() % possible.size()]();
  }
  for (const Reader &reader : readers) require(reader.turn == turns, "the ring has come to a halt");
}

} // namespace

} // namespace tw::cuda

// Null, or what went wrong.
extern "C" const char *emulate_trie_decode(const tw::cuda::TrieDecodeArgs *args, double *out) {
  using namespace tw::cuda;
  static std::string message;
  try {
    if (args->new_k.data) write(write_arguments(*args), write_grid(*args));
    for (unsigned block = 0; block < partial_grid(*args).blocks; ++block)
      partial_block(*args, partial_arguments(*args), block);
    merge(*args, merge_arguments(*args), merge_grid(*args), out);
    return nullptr;
  } catch (const std::exception &error) {
    message = error.what();
    return message.c_str();
  }
}

// Null, or how the protocol failed.
extern "C" const char *emulate_ring(int head_dim, int warpgroups, int turns, unsigned seed) {
  static std::string message;
  try {
    tw::cuda::run_ring(head_dim, warpgroups, turns, seed);
    return nullptr;
  } catch (const std::exception &error) {
    message = error.what();
    return message.c_str();
  }
}

extern "C" const char *why_not_trie_decode(const tw::cuda::TrieDecodeArgs *args) {
  static std::string message;
  message = why_not(*args);
  return message.c_str();
}

extern "C" const char *why_not_tiles(const tw::cuda::Tiles *tiles) {
  static std::string message;
  message = why_not(*tiles);
  return message.c_str();
}

extern "C" void tiles_of_pages(const tw::cuda::TrieDecodeArgs *args, tw::cuda::Tiles *tiles) {
  *tiles = page_tiles(*args, args->kv.k);
}

// Null, or what the driver refused.
extern "C" const char *run_trie_decode(const tw::cuda::TrieDecodeArgs *args, int device,
                                       void *stream, const char *cubin) {
  static std::string message;
  try {
    tw::cuda::trie_decode(*args, tw::cuda::OnDevice(device), stream, cubin);
    return nullptr;
  } catch (const std::exception &error) {
    message = error.what();
    return message.c_str();
  }
}

extern "C" int threads_of_partial(int warpgroups) { return tw::cuda::partial_threads(warpgroups); }

extern "C" int shared_bytes_of_partial(int head_dim, int warpgroups) {
  return tw::cuda::partial_shared_bytes(head_dim, warpgroups);
}

extern "C" int blocks_of_partial(int head_dim, int warpgroups) {
  return tw::cuda::blocks_per_multiprocessor(head_dim, warpgroups);
}
