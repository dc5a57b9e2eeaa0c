// Radix build of a token trie and its preorder flattening (ARCHITECTURE, facts 1 and 2).
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace tw {

// The flat trie: one entry per token, preorder, children in first-seen order.
struct FlatTrie {
  std::vector<int64_t> tokens;
  std::vector<int64_t> positions;      // depth
  std::vector<int64_t> parents;        // flat index, -1 at a root
  std::vector<int32_t> subtree_ends;   // one past the last token of the subtree
  std::vector<float> positive_weights; // sum over the paths through the token of max(w, 0)
  std::vector<float> negative_weights; // sum over the paths through the token of min(w, 0)
  std::vector<int32_t> path_ends;      // flat index of the last token of every path
};

// Tokens live in `pool_` in insertion order, each exactly once; a node is a run of the pool.
// A split shortens the old node and gives its tail a new one, so pool indices never move: path ends
// and weights are kept by pool index, and a child is found by (pool index of its parent's last
// token, its first token), a key that no split can change.
class RadixBuilder {
public:
  // ids: n >= 1 non-negative token ids. weights: n floats, or nullptr for none.
  void insert(const int32_t *ids, size_t n, const float *weights);
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
  int32_t append_leaf(int32_t parent, const int32_t *ids, size_t n);
  void split(int32_t node, int32_t length);
  void add_weights(int32_t pool_index, size_t n, const float *weights);
  std::vector<int32_t> preorder() const;

  std::vector<int32_t> pool_;
  std::vector<float> positive_, negative_;
  std::vector<Node> nodes_{Node{0, 0}}; // node 0 is the empty root above every first token
  std::vector<int32_t> path_ends_;      // pool indices
  std::unordered_map<uint64_t, int32_t> children_;
};

} // namespace tw
