// Radix build of a token trie and its preorder flattening (docs/architecture.md, facts 1 and 2).
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace tw {

// The flat trie: one entry per token, preorder, children in first-seen order.
struct FlatTrie {
  std::vector<int64_t> tokens;
  std::vector<int64_t> positions;    // depth
  std::vector<int64_t> parents;      // flat index, -1 at a root
  std::vector<int32_t> subtree_ends; // one past the last token of the subtree
  std::vector<int32_t> path_ends;    // flat index of the last token of every path
  std::vector<std::vector<float>> columns; // each [N]: sums over the paths through a token
};

// Tokens live in `pool_` in insertion order, each exactly once; a node is a run of the pool.
// A split shortens the old node and gives its tail a new one, so pool indices never move: path ends
// and columns are kept by pool index, and a child is found by (pool index of its parent's last
// token, its first token), a key that no split can change.
class RadixBuilder {
public:
  explicit RadixBuilder(size_t num_columns = 0) : columns_(num_columns) {}

  // ids: n >= 1 non-negative token ids. values: n floats for each column, in the order of columns.
  // Throws std::length_error if more than 2^31 - 1 tokens would be held.
  void insert(const int32_t *ids, size_t n, const std::vector<const float *> &values = {});
  // How many leading ids the trie already holds as the start of some path.
  size_t shared_prefix(const int32_t *ids, size_t n) const;
  FlatTrie flatten() const;
  size_t num_tokens() const { return pool_.size(); }

  // A node as tokens [offset, offset + length) of the pool; `parent` is an index into the same list
  // of runs, -1 at a root.
  struct Run {
    int32_t offset, length, parent;
  };
  std::vector<Run> runs() const; // preorder
  const std::vector<int32_t> &pool() const { return pool_; }
  // Pool index of the last token of every path; it is the last token of a run.
  const std::vector<int32_t> &path_ends() const { return path_ends_; }

private:
  struct Node {
    int32_t offset, length;
    int32_t first_child = -1, last_child = -1, next_sibling = -1;
  };
  static uint64_t child_key(int32_t parent_last, int32_t token) {
    return (static_cast<uint64_t>(static_cast<uint32_t>(parent_last + 1)) << 32) |
           static_cast<uint32_t>(token);
  }
  // The child of `node` that ids[0] leads to, -1 if none, and how many of the ids its run holds.
  struct Match {
    int32_t child, length;
  };
  Match match(int32_t node, const int32_t *ids, size_t n) const;
  int32_t append_leaf(int32_t parent, const int32_t *ids, size_t n);
  void split(int32_t node, int32_t length);
  std::vector<int32_t> preorder() const;

  std::vector<int32_t> pool_;
  std::vector<std::vector<float>> columns_; // by pool index
  std::vector<Node> nodes_{Node{0, 0}}; // node 0 is the empty root above every first token
  std::vector<int32_t> path_ends_;      // pool indices
  std::unordered_map<uint64_t, int32_t> children_;
};

} // namespace tw
