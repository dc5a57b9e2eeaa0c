#define TW_DKV_RUNS_ON 1
#include "cuda/attention/trie_attention_bwd.cu"
