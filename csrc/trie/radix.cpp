#include "radix.h"

#include <algorithm>
#include <stdexcept>

namespace tw {

namespace {
constexpr size_t kMaxTokens = INT32_MAX;
}

RadixBuilder::Match RadixBuilder::match(int32_t node, const int32_t *ids, size_t n) const {
  const Node &parent = nodes_[node];
  const auto found = children_.find(child_key(parent.offset + parent.length - 1, ids[0]));
  if (found == children_.end()) return {-1, 0};
  const Node &child = nodes_[found->second];
  const int32_t *run = pool_.data() + child.offset;
  const auto limit = std::min<size_t>(child.length, n);
  return {found->second, static_cast<int32_t>(std::mismatch(run, run + limit, ids).first - run)};
}

int32_t RadixBuilder::append_leaf(int32_t parent, const int32_t *ids, size_t n) {
  if (pool_.size() + n > kMaxTokens)
    throw std::length_error("the trie would hold more than 2^31 - 1 tokens");
  const int32_t node = static_cast<int32_t>(nodes_.size());
  const int32_t offset = static_cast<int32_t>(pool_.size());
  nodes_.push_back(Node{offset, static_cast<int32_t>(n)});
  pool_.insert(pool_.end(), ids, ids + n);
  for (auto &column : columns_) column.resize(pool_.size(), 0.0f);
  Node &p = nodes_[parent];
  if (p.last_child >= 0)
    nodes_[p.last_child].next_sibling = node;
  else
    p.first_child = node;
  p.last_child = node;
  children_.emplace(child_key(p.offset + p.length - 1, ids[0]), node);
  return node;
}

void RadixBuilder::split(int32_t node, int32_t length) {
  const int32_t tail = static_cast<int32_t>(nodes_.size());
  Node lower = nodes_[node];
  lower.offset += length;
  lower.length -= length;
  lower.next_sibling = -1;
  nodes_.push_back(lower);
  Node &upper = nodes_[node];
  upper.length = length;
  upper.first_child = upper.last_child = tail;
  children_.emplace(child_key(lower.offset - 1, pool_[lower.offset]), tail);
}

void RadixBuilder::insert(const int32_t *ids, size_t n, const std::vector<const float *> &values) {
  int32_t node = 0;
  for (size_t done = 0; done < n;) {
    Match next = match(node, ids + done, n - done);
    if (next.child < 0)
      next = {append_leaf(node, ids + done, n - done), static_cast<int32_t>(n - done)};
    else if (next.length < nodes_[next.child].length)
      split(next.child, next.length);
    node = next.child;
    for (size_t c = 0; c < columns_.size(); ++c) {
      float *sums = columns_[c].data() + nodes_[node].offset;
      for (int32_t i = 0; i < next.length; ++i) sums[i] += values[c][done + i];
    }
    done += next.length;
  }
  path_ends_.push_back(nodes_[node].offset + nodes_[node].length - 1);
}

size_t RadixBuilder::shared_prefix(const int32_t *ids, size_t n) const {
  size_t done = 0;
  for (int32_t node = 0; done < n;) {
    const Match next = match(node, ids + done, n - done);
    done += next.length;
    if (next.child < 0 || next.length < nodes_[next.child].length) break;
    node = next.child;
  }
  return done;
}

std::vector<int32_t> RadixBuilder::preorder() const {
  std::vector<int32_t> order, stack;
  order.reserve(nodes_.size());
  for (int32_t node = nodes_[0].first_child;;) {
    if (node < 0) {
      if (stack.empty()) return order;
      node = nodes_[stack.back()].next_sibling;
      stack.pop_back();
      continue;
    }
    order.push_back(node);
    stack.push_back(node);
    node = nodes_[node].first_child;
  }
}

std::vector<RadixBuilder::Run> RadixBuilder::runs() const {
  const std::vector<int32_t> order = preorder();
  std::vector<Run> runs;
  runs.reserve(order.size());
  std::vector<int32_t> parent(nodes_.size(), -1);
  for (const int32_t id : order) {
    const int32_t index = static_cast<int32_t>(runs.size());
    runs.push_back(Run{nodes_[id].offset, nodes_[id].length, parent[id]});
    for (int32_t c = nodes_[id].first_child; c >= 0; c = nodes_[c].next_sibling) parent[c] = index;
  }
  return runs;
}

FlatTrie RadixBuilder::flatten() const {
  const size_t n = pool_.size();
  FlatTrie flat;
  flat.tokens.resize(n);
  flat.positions.resize(n);
  flat.parents.resize(n);
  flat.subtree_ends.resize(n);
  flat.columns.assign(columns_.size(), std::vector<float>(n));

  const std::vector<int32_t> order = preorder();
  std::vector<int32_t> start(nodes_.size()), parent(nodes_.size(), 0), end(nodes_.size());
  std::vector<int32_t> flat_of_pool(n);
  int32_t next = 0;
  for (const int32_t id : order) {
    const Node &node = nodes_[id];
    start[id] = next;
    next += node.length;
    end[id] = next;
    for (int32_t c = node.first_child; c >= 0; c = nodes_[c].next_sibling) parent[c] = id;
  }
  for (auto it = order.rbegin(); it != order.rend(); ++it)
    if (parent[*it]) end[parent[*it]] = std::max(end[parent[*it]], end[*it]);

  for (const int32_t id : order) {
    const Node &node = nodes_[id];
    const int32_t up = parent[id] ? start[parent[id]] + nodes_[parent[id]].length - 1 : -1;
    const int64_t depth = up < 0 ? 0 : flat.positions[up] + 1;
    for (int32_t i = 0; i < node.length; ++i) {
      const int32_t at = start[id] + i, from = node.offset + i;
      flat_of_pool[from] = at;
      flat.tokens[at] = pool_[from];
      flat.positions[at] = depth + i;
      flat.parents[at] = i ? at - 1 : up;
      flat.subtree_ends[at] = end[id];
    }
    for (size_t c = 0; c < columns_.size(); ++c)
      std::copy_n(columns_[c].begin() + node.offset, node.length,
                  flat.columns[c].begin() + start[id]);
  }
  flat.path_ends.reserve(path_ends_.size());
  for (const int32_t p : path_ends_) flat.path_ends.push_back(flat_of_pool[p]);
  return flat;
}

} // namespace tw
