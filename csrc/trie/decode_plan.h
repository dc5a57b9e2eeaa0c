// The host plan of a decode step: which queries attend to which pages (docs/architecture.md,
// fact 6).
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "decode_costs.h"
#include "radix.h"

namespace tw {

// Rows [first_row, end_row) attend to num_keys keys, the first of them at first_position, in pages
// pages[first_page], pages[first_page + 1], ... A row sees the keys whose position is not above its
// own. Its result goes to partial slot first_slot + (row - first_row).
struct DecodeItem {
  int32_t first_page, num_keys, first_position, first_row, end_row, first_slot;
};

// Rows are the queries of a step in lineage order: sequences by preorder of the trie of their page
// tables, the new tokens of one sequence by position. Rows that share a run of pages are contiguous.
struct DecodePlan {
  std::vector<int32_t> rows;      // [Q]: the caller's row of each row
  std::vector<int32_t> positions; // [Q]: position of each row in its sequence
  std::vector<int32_t> slots;     // [Q]: page * page_size + offset, where its key and value go
  std::vector<int32_t> pages;     // the runs of the trie, every run once
  std::vector<DecodeItem> items;  // in the order in which workers take them
  std::vector<int32_t> merge_ptr; // [Q + 1]: row r merges merge_slots[merge_ptr[r], merge_ptr[r+1])
  std::vector<int32_t> merge_slots; // by key position
  double predicted = 0; // time of a call, by the costs that the plan was cut by
};

class DecodePlanner {
public:
  // share: false plans every sequence alone, as if no page had two readers.
  DecodePlanner(int32_t page_size, bool share) : page_size_(page_size), share_(share) {}

  // Appends a sequence. table: its ceil(length / page_size) pages, non-negative; the last
  // new_tokens of its length >= 1 tokens are queries, 1 <= new_tokens <= length.
  // Throws std::invalid_argument if an earlier sequence writes one of the pages that it writes.
  void add(const int32_t *table, int32_t length, int32_t new_tokens);

  // O(pages that differ + rows x runs on their path). Runs are cut into pieces so that the costs
  // predict the shortest call. Items that stream and wide ones, whose products take longer than
  // their keys, begin at a steady rate, each kind most work first: memory and the products are then
  // busy at the same time, and what begins last is short.
  DecodePlan plan(const DecodeCosts &costs) const;

private:
  struct Sequence {
    int32_t length, new_tokens, first_query;
  };
  using Run = RadixBuilder::Run;

  std::vector<int32_t> end_runs(const std::vector<Run> &runs) const;

  const int32_t page_size_;
  const bool share_;
  std::vector<Sequence> sequences_;
  std::vector<int32_t> slots_;                    // in the caller's order of queries
  std::unordered_map<int32_t, int32_t> writers_; // page -> the sequence that writes it
  RadixBuilder trie_;                             // of the page tables, if shared
  std::vector<Run> lone_runs_;                    // else: one run a sequence
  std::vector<int32_t> lone_pool_;
};

} // namespace tw
