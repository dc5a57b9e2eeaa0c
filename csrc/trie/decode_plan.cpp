#include "decode_plan.h"

#include <algorithm>
#include <stdexcept>

namespace tw {

namespace {

// Fetching a key costs about as much as attending to it from this many rows.
constexpr int64_t kFetchRows = 16;
// Items per worker that the cuts aim at: the fewer, the less to merge; the more, the better balance.
constexpr int64_t kItemsPerWorker = 2;
// Shortest piece worth its partial results, which cost as much as some keys per row.
constexpr int64_t kMinKeys = 64, kMinKeysPerRow = 8;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t cost(const DecodeItem &item) {
  return item.num_keys * (kFetchRows + item.end_row - item.first_row);
}

// Keys of each piece when an item is cut into pieces of about `target` cost; whole pages.
int64_t piece_keys(const DecodeItem &item, int64_t target, int64_t page_size) {
  const int64_t rows = item.end_row - item.first_row;
  const int64_t keys = std::max({target / (kFetchRows + rows), kMinKeys, kMinKeysPerRow * rows});
  const int64_t pieces = ceil_div(item.num_keys, keys);
  const int64_t quantum = ceil_div(kMinKeys, page_size) * page_size;
  return ceil_div(ceil_div(item.num_keys, pieces), quantum) * quantum;
}

} // namespace

void DecodePlanner::add(const int32_t *table, int32_t length, int32_t new_tokens) {
  const int32_t index = static_cast<int32_t>(sequences_.size());
  const int32_t num_pages = static_cast<int32_t>(ceil_div(length, page_size_));
  const int32_t first_new = length - new_tokens;
  for (int32_t p = first_new / page_size_; p < num_pages; ++p) {
    const auto [writer, is_first] = writers_.emplace(table[p], index);
    if (!is_first)
      throw std::invalid_argument("sequences " + std::to_string(writer->second) + " and " +
                                  std::to_string(index) + " both write page " +
                                  std::to_string(table[p]) + ": copy a page before its second "
                                  "owner writes it");
  }
  sequences_.push_back({length, new_tokens, static_cast<int32_t>(slots_.size())});
  for (int32_t t = first_new; t < length; ++t)
    slots_.push_back(table[t / page_size_] * page_size_ + t % page_size_);
  if (share_) {
    trie_.insert(table, num_pages);
  } else {
    lone_runs_.push_back({static_cast<int32_t>(lone_pool_.size()), num_pages, -1});
    lone_pool_.insert(lone_pool_.end(), table, table + num_pages);
  }
}

// The run in which each sequence ends.
std::vector<int32_t> DecodePlanner::end_runs(const std::vector<Run> &runs) const {
  std::unordered_map<int32_t, int32_t> run_of_last;
  for (size_t i = 0; i < runs.size(); ++i)
    run_of_last.emplace(runs[i].offset + runs[i].length - 1, static_cast<int32_t>(i));
  std::vector<int32_t> ends;
  if (share_)
    for (const int32_t last : trie_.path_ends()) ends.push_back(run_of_last.at(last));
  else
    for (const Run &run : lone_runs_) ends.push_back(run_of_last.at(run.offset + run.length - 1));
  return ends;
}

DecodePlan DecodePlanner::plan(int32_t num_workers, int32_t tile_rows) const {
  DecodePlan plan;
  const std::vector<Run> runs = share_ ? trie_.runs() : lone_runs_;
  plan.pages = share_ ? trie_.pool() : lone_pool_;

  // Sequences in the order of the runs they end in: the rows below a run are then contiguous, the
  // sequences that end in it first.
  const std::vector<int32_t> ends = end_runs(runs);
  std::vector<int32_t> first_row(runs.size() + 1, 0), num_rows(runs.size(), 0);
  for (size_t s = 0; s < ends.size(); ++s) num_rows[ends[s]] += sequences_[s].new_tokens;
  for (size_t i = 0; i < runs.size(); ++i) first_row[i + 1] = first_row[i] + num_rows[i];
  const size_t num_queries = slots_.size();
  plan.rows.resize(num_queries);
  plan.positions.resize(num_queries);
  plan.slots.resize(num_queries);
  std::vector<int32_t> next_row(first_row.begin(), first_row.end() - 1);
  for (size_t s = 0; s < ends.size(); ++s) {
    const Sequence &sequence = sequences_[s];
    for (int32_t i = 0; i < sequence.new_tokens; ++i) {
      const int32_t row = next_row[ends[s]]++, query = sequence.first_query + i;
      plan.rows[row] = query;
      plan.positions[row] = sequence.length - sequence.new_tokens + i;
      plan.slots[row] = slots_[query];
    }
  }
  for (size_t i = runs.size(); i-- > 0;)
    if (runs[i].parent >= 0) num_rows[runs[i].parent] += num_rows[i];

  tile_rows = static_cast<int32_t>(std::clamp<size_t>(num_queries, 1, tile_rows));
  std::vector<DecodeItem> whole; // not cut yet
  std::vector<int32_t> run_position(runs.size());
  int64_t total = 0;
  for (size_t i = 0; i < runs.size(); ++i) {
    const int32_t up = runs[i].parent;
    run_position[i] = up < 0 ? 0 : run_position[up] + runs[up].length * page_size_;
    const int32_t end = first_row[i] + num_rows[i];
    for (int32_t row = first_row[i]; row < end; row += tile_rows) {
      const int32_t row_end = std::min(row + tile_rows, end);
      const int32_t last = *std::max_element(plan.positions.begin() + row,
                                             plan.positions.begin() + row_end);
      // No row sees a key beyond its own position, so none beyond the last one is read at all:
      // what a page holds past the end of its sequence does not matter.
      const int32_t keys = std::min(runs[i].length * page_size_, last + 1 - run_position[i]);
      if (keys <= 0) continue;
      whole.push_back({runs[i].offset, keys, run_position[i], row, row_end, 0});
      total += cost(whole.back());
    }
  }

  const int64_t target = std::max<int64_t>(1, ceil_div(total, kItemsPerWorker * num_workers));
  std::vector<int32_t> merges(num_queries, 0);
  int32_t slot = 0;
  for (const DecodeItem &item : whole) {
    const int64_t piece = piece_keys(item, target, page_size_);
    for (int64_t key = 0; key < item.num_keys; key += piece) {
      DecodeItem part = item;
      part.first_page += static_cast<int32_t>(key / page_size_);
      part.first_position += static_cast<int32_t>(key);
      part.num_keys = static_cast<int32_t>(std::min<int64_t>(piece, item.num_keys - key));
      part.first_slot = slot;
      slot += item.end_row - item.first_row;
      plan.items.push_back(part);
      for (int32_t row = item.first_row; row < item.end_row; ++row) ++merges[row];
    }
  }

  // Items stand in preorder still, so the slots of a row come in order of their keys.
  plan.merge_ptr.assign(1, 0);
  for (const int32_t count : merges) plan.merge_ptr.push_back(plan.merge_ptr.back() + count);
  plan.merge_slots.resize(slot);
  std::vector<int32_t> next(plan.merge_ptr.begin(), plan.merge_ptr.end() - 1);
  for (const DecodeItem &item : plan.items)
    for (int32_t row = item.first_row; row < item.end_row; ++row)
      plan.merge_slots[next[row]++] = item.first_slot + row - item.first_row;
  std::stable_sort(plan.items.begin(), plan.items.end(),
                   [](const DecodeItem &a, const DecodeItem &b) { return cost(a) > cost(b); });
  return plan;
}

} // namespace tw
