#include "decode_plan.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <utility>

namespace tw {

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A finer cut must promise that much: the partial results that it adds are certain, the model is not.
constexpr double kGain = 0.98;

// An item before it is cut.
struct Whole {
  DecodeItem item;
  double work; // of a unit
  int64_t rows() const { return item.end_row - item.first_row; }
};

// Keys of each piece of an item when units are to take about `target`.
int64_t piece_keys(const Whole &whole, double target, int32_t page_size, const DecodeCosts &costs) {
  const int64_t rows = whole.rows(), num_keys = whole.item.num_keys;
  const int64_t fitting = static_cast<int64_t>((target - costs.unit) / costs.of_key(rows));
  const int64_t shortest = std::max<int64_t>(costs.piece_keys, costs.piece_keys_per_row * rows);
  const int64_t pieces = ceil_div(num_keys, std::max(fitting, shortest));
  const int64_t quantum = ceil_div(costs.piece_keys, page_size) * page_size;
  return ceil_div(ceil_div(num_keys, pieces), quantum) * quantum;
}

// What the units take if they are cut so. `keys`: distinct ones of one KV head.
DecodeLoad load_of(const std::vector<Whole> &wholes, const std::vector<int64_t> &pieces,
                   size_t num_rows, int64_t keys, const DecodeCosts &costs) {
  DecodeLoad load;
  load.keys = keys;
  std::vector<int64_t> results(num_rows + 1, 0); // of a row, as differences to the row before
  for (size_t i = 0; i < wholes.size(); ++i) {
    const Whole &whole = wholes[i];
    const int64_t count = ceil_div(whole.item.num_keys, pieces[i]);
    load.work += (whole.work + (count - 1) * costs.unit) * costs.kv_heads;
    load.longest = std::max(
        load.longest,
        costs.of_unit(std::min<int64_t>(pieces[i], whole.item.num_keys), whole.rows()));
    results[whole.item.first_row] += count, results[whole.item.end_row] -= count;
  }
  for (size_t i = 0; i < wholes.size(); ++i)
    if (2 * costs.of_unit(std::min<int64_t>(pieces[i], wholes[i].item.num_keys),
                          wholes[i].rows()) > load.longest)
      load.long_units += ceil_div(wholes[i].item.num_keys, pieces[i]) * costs.kv_heads;
  int64_t count = 0;
  for (size_t row = 0; row < num_rows; ++row)
    if ((count += results[row]) > 1) load.partials += count;
  return load;
}

// Puts the items in the order in which workers take them.
void order(std::vector<DecodeItem> &items, double time, const DecodeCosts &costs) {
  const auto rows = [](const DecodeItem &item) { return item.end_row - item.first_row; };
  const auto work = [&](const DecodeItem &item) { return costs.of_unit(item.num_keys, rows(item)); };
  std::stable_sort(items.begin(), items.end(), [&](const DecodeItem &a, const DecodeItem &b) {
    const double x = work(a), y = work(b);
    return x != y ? x > y : a.first_page < b.first_page; // who reads the same keys, at a time
  });
  double all[2] = {0, 0}, before[2] = {0, 0}; // of each kind
  for (const DecodeItem &item : items) all[costs.is_wide(rows(item))] += work(item);
  if (all[0] == 0 || all[1] == 0) return;
  std::vector<std::pair<double, DecodeItem>> starts;
  for (const DecodeItem &item : items) {
    const bool wide = costs.is_wide(rows(item));
    starts.emplace_back(before[wide] / all[wide] * std::max(0., time - work(item)), item);
    before[wide] += work(item);
  }
  std::stable_sort(starts.begin(), starts.end(),
                   [](const auto &a, const auto &b) { return a.first < b.first; });
  for (size_t i = 0; i < items.size(); ++i) items[i] = starts[i].second;
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

DecodePlan DecodePlanner::plan(const DecodeCosts &costs) const {
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

  const int32_t tile_rows =
      static_cast<int32_t>(std::clamp<size_t>(num_queries, 1, costs.tile_rows));
  std::vector<Whole> wholes;
  std::vector<int32_t> run_position(runs.size());
  double work = 0;
  int64_t distinct_keys = 0;
  for (size_t i = 0; i < runs.size(); ++i) {
    const int32_t up = runs[i].parent;
    run_position[i] = up < 0 ? 0 : run_position[up] + runs[up].length * page_size_;
    const int32_t end = first_row[i] + num_rows[i];
    int32_t most_keys = 0;
    for (int32_t row = first_row[i]; row < end; row += tile_rows) {
      const int32_t row_end = std::min(row + tile_rows, end);
      const int32_t last = *std::max_element(plan.positions.begin() + row,
                                             plan.positions.begin() + row_end);
      // No row sees a key beyond its own position, so none beyond the last one is read at all:
      // what a page holds past the end of its sequence does not matter.
      const int32_t keys = std::min(runs[i].length * page_size_, last + 1 - run_position[i]);
      if (keys <= 0) continue;
      most_keys = std::max(most_keys, keys);
      wholes.push_back({{runs[i].offset, keys, run_position[i], row, row_end, 0},
                        costs.of_unit(keys, row_end - row)});
      work += wholes.back().work * costs.kv_heads;
    }
    distinct_keys += most_keys;
  }

  std::vector<int64_t> pieces; // keys of each piece of an item
  double fastest = std::numeric_limits<double>::infinity();
  for (const double waves : costs.waves) {
    const double target = std::max(1., std::ceil(work / (waves * costs.workers)));
    std::vector<int64_t> tried;
    for (const Whole &whole : wholes)
      tried.push_back(piece_keys(whole, target, page_size_, costs));
    const double time = load_of(wholes, tried, num_queries, distinct_keys, costs).time(costs);
    if (time < kGain * fastest) fastest = time, pieces.swap(tried);
  }
  plan.predicted = fastest;

  std::vector<int32_t> merges(num_queries, 0);
  int32_t slot = 0;
  for (size_t i = 0; i < wholes.size(); ++i) {
    const DecodeItem &item = wholes[i].item;
    for (int64_t key = 0; key < item.num_keys; key += pieces[i]) {
      DecodeItem part = item;
      part.first_page += static_cast<int32_t>(key / page_size_);
      part.first_position += static_cast<int32_t>(key);
      part.num_keys = static_cast<int32_t>(std::min<int64_t>(pieces[i], item.num_keys - key));
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
  order(plan.items, plan.predicted, costs);
  return plan;
}

} // namespace tw
