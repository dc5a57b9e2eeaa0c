#define TW_FORWARD_IN_TURNS 1
#define TW_FORWARD_SHARERS 2
#include "cuda/attention/trie_attention_fwd.cu"
