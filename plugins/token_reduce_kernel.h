// JMPTokenReduce on the GPU, behind a plain C interface. No TensorRT and no CUDA type in here, so
// that a test, a TensorRT plugin and a CPU build (tests/cuda_on_host.h) can all call it.
//
// The arithmetic is defined in README.md, section "The node". All buffers are device memory,
// densely packed in row-major order.
#ifndef JMP_TOKEN_REDUCE_KERNEL_H
#define JMP_TOKEN_REDUCE_KERNEL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { JMP_FLOAT32 = 0, JMP_FLOAT16 = 1, JMP_BFLOAT16 = 2 };  // dtype of every input and output
enum { JMP_PER_TOKEN = 0, JMP_PER_SAMPLE = 1 };        // granularity of merge or prune
enum { JMP_CLASS_ROW = 0, JMP_ATTENTION_RECEIVED = 1 };  // importance of a patch token
enum { JMP_BY_IMPORTANCE = 0, JMP_DISTINCT = 1 };        // which K tokens are critical

typedef struct JmpTokenReduceParams {
  // Attributes of the node.
  int32_t num_prefix;    // P: tokens in front that always stay (class, distillation, registers)
  int32_t num_keep;      // K: patch tokens to keep, 1 <= K <= N - P
  int32_t num_heads;     // H
  int32_t head_dim;      // d
  float scale;           // of the attention logits, usually d^-0.5
  float tau;             // merge where the similarity reaches this, else prune
  float merge_weight;    // share of a merged token's content that its target takes, 0 to 1
  int32_t granularity;   // JMP_PER_TOKEN or JMP_PER_SAMPLE
  int32_t importance;    // JMP_CLASS_ROW or JMP_ATTENTION_RECEIVED
  int32_t proportional;  // 1: add log(size) of the key token to the logits
  int32_t selection;     // JMP_BY_IMPORTANCE or JMP_DISTINCT
  // Type and shape of the tensors.
  int32_t dtype;       // JMP_FLOAT32, JMP_FLOAT16 or JMP_BFLOAT16
  int32_t batch;       // B
  int32_t tokens;      // N
  int32_t channels;    // C
  int32_t qkv_width;   // W >= 2*H*d
  int32_t size_batch;  // B, or 1: one row of sizes for the whole batch
} JmpTokenReduceParams;

// Both return 0 if `params` is usable, else a non-zero value and, in `message`, one sentence that
// says what was expected and what was found. The first looks at the attributes only.
int jmp_token_reduce_check_attributes(const JmpTokenReduceParams* params, char* message,
                                      size_t message_size);
int jmp_token_reduce_check(const JmpTokenReduceParams* params, char* message, size_t message_size);

// 0 if the tuned kernels take `params`; else the plain ones run, many times slower, and `message`
// says why. Tuned: head_dim a multiple of 8 up to 128, at most 64 heads and 8192 columns of keys, at
// most 2048 patch tokens, rows of x and qkv of whole 16 bytes.
int jmp_token_reduce_check_tuned(const JmpTokenReduceParams* params, char* message,
                                 size_t message_size);
int jmp_token_reduce_is_tuned(const JmpTokenReduceParams* params);  // 1 or 0, without the reason

// Bytes of scratch memory that one call needs, and enough for every smaller batch and number of
// tokens. 0 for bad `params`.
size_t jmp_token_reduce_workspace_bytes(const JmpTokenReduceParams* params);

// Looks up what launches need to know of the current device, so that the first of them, which may be
// captured into a CUDA graph, need not. In the environment, JMP_DEPLOY_OVERLAP=0: launches never overlap;
// JMP_DEPLOY_CLUSTERS=0: the blocks of a sample never wait for each other.
void jmp_token_reduce_prepare(void);

// Enqueues the reduction on `stream` (a cudaStream_t). Allocates nothing, waits for nothing, so it
// may be captured into a CUDA graph.
//   x [B, N, C], qkv [B, N, W], size [size_batch, N]  ->
//   y [B, P+K, C], out_size [B, P+K], log_size [B, P+K]
//   index: null, or int32 [B, M]: what became of each of the M = N - P incoming patch tokens,
//     fate * K + slot. Fate 0: it is the kept patch token `slot` of 0..K-1; 1: it was merged into
//     that; 2: it was pruned, and resembles that most (slot 0 where nothing compares, for NaN)
//   workspace: aligned to 16 bytes. So should be x, qkv and y: else the plain kernels run
// Returns a cudaError_t: cudaErrorInvalidValue (1) if jmp_token_reduce_check refuses `params` or a
// pointer but `index` is null, cudaErrorMisalignedAddress (716) for the workspace.
int jmp_token_reduce(const JmpTokenReduceParams* params, const void* x, const void* qkv,
                     const void* size, void* y, void* out_size, void* log_size,
                     int32_t* index, void* workspace, void* stream);

// The same by the plain kernels, the specification: slow, for any shape and alignment.
size_t jmp_token_reduce_plain_workspace_bytes(const JmpTokenReduceParams* params);
int jmp_token_reduce_plain(const JmpTokenReduceParams* params, const void* x, const void* qkv,
                           const void* size, void* y, void* out_size, void* log_size,
                           int32_t* index, void* workspace, void* stream);

// Text of a value that jmp_token_reduce returned.
const char* jmp_token_reduce_error_string(int error);

#ifdef __cplusplus
}  // extern "C"
#endif

#endif  // JMP_TOKEN_REDUCE_KERNEL_H
