#define TW_FORWARD_IN_TURNS 1
#include "cuda/attention/trie_attention_fwd.cu"
