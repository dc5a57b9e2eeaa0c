// What a decode plan is cut by: a model of what the parts of a step cost the workers that run it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace tw {

// Times in one unit of the caller's choice (tw_kernels/decode/costs.py has the values and whence they
// are). A unit of work is a piece of an item for one of `kv_heads`.
struct DecodeCosts {
  int32_t workers;            // units that run at a time
  int32_t kv_heads;           // of an item, each a unit of its own
  int32_t group;              // matrix rows of a query row
  int32_t tile_rows;          // most query rows of an item
  int32_t piece_keys;         // pieces are multiples of so many keys, in whole pages
  int32_t piece_keys_per_row; // and no shorter than so many keys for each of their rows
  double fetch;               // of a key by one worker
  double product;             // of a key with 64 matrix rows, while others are fetched
  double row;                 // of a key for each query row, after it was fetched
  double unit;                // to begin and end a unit
  double memory;              // of a key, by all workers together
  double partial;             // to write and read a row's partial result, by all workers together
  double call;                // whatever the step
  std::vector<double> waves;  // how many units a worker the plan may aim at, ascending

  double products(int64_t rows) const { return product * ((rows * group + 63) / 64); }
  bool is_wide(int64_t rows) const { return products(rows) > fetch; }
  double of_key(int64_t rows) const { return std::max(fetch, products(rows)) + row * rows; }
  double of_unit(int64_t keys, int64_t rows) const { return unit + keys * of_key(rows); }
};

// A way to cut a step, as the model sees it.
struct DecodeLoad {
  double work = 0;       // of all units
  double longest = 0;    // unit
  int64_t long_units = 0; // that take more than half as long
  int64_t keys = 0, partials = 0; // distinct keys and partial results of one KV head

  // Units are taken as workers get free, so short ones fill what the long ones leave, and bytes of
  // some come while others multiply. An eighth of the longest unit is lost at the end.
  double time(const DecodeCosts &costs) const {
    const double rounds = static_cast<double>((long_units + costs.workers - 1) / costs.workers);
    const double busy = std::max(work / costs.workers,
                                 std::min(rounds * longest, work / costs.workers + longest));
    return costs.call + std::max(busy, keys * costs.kv_heads * costs.memory) + longest / 8 +
           partials * costs.kv_heads * costs.partial;
  }
};

} // namespace tw
