// Runs one JMPTokenReduce case from a file. Two builds of the same source:
//   on a CPU, for the sanitizers (the kernel is linked in, compiled against cuda_on_host.h):
//     g++ -std=c++17 -g -pthread -DJMP_CUDA_ON_HOST -fsanitize=thread -o driver
//         -x c++ token_reduce_kernel.cu tests/host_driver.cpp
//   on a GPU, for compute-sanitizer:
//     nvcc -std=c++17 -lineinfo token_reduce_kernel.cu tests/host_driver.cpp -o driver
//
//   driver VERSION CASE OUT [SHORT]
// VERSION: "tuned" or "plain" kernels; "tuned" for a case that they do not take is an error.
// CASE: JmpTokenReduceParams, then x, qkv, size. OUT: y, out_size, log_size, index.
// SHORT names a buffer that is allocated one element (workspace: 512 bytes) too small: a planted bug,
// to prove that AddressSanitizer notices.
// Every buffer is an allocation of its own, of its exact size, filled with 0xff (a NaN) at first.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "../token_reduce_kernel.h"

#ifdef JMP_CUDA_ON_HOST
static void* device_alloc(size_t bytes) {
  return malloc(bytes);  // no slack behind the last byte that a sanitizer would not see
}
static void to_device(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }
static void to_host(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }
static void device_free(void* p) { free(p); }
#else
#include <cuda_runtime.h>
static void require(cudaError_t error) {
  if (error == cudaSuccess) return;
  fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  exit(1);
}
static void* device_alloc(size_t bytes) {
  void* p = nullptr;
  require(cudaMalloc(&p, bytes));
  return p;
}
static void to_device(void* to, const void* from, size_t bytes) {
  require(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice));
}
static void to_host(void* to, const void* from, size_t bytes) {
  require(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost));
}
static void device_free(void* p) { require(cudaFree(p)); }
#endif

namespace {

struct Buffer {
  void* data;
  size_t bytes;      // that the contract asks for
  size_t allocated;  // less than that if planted
};

Buffer make(const char* name, size_t bytes, size_t element, const char* planted) {
  const size_t allocated = strcmp(name, planted) == 0 ? bytes - element : bytes;
  return Buffer{device_alloc(allocated), bytes, allocated};
}

void fill(const Buffer& buffer, FILE* file) {
  std::vector<unsigned char> content(buffer.bytes);
  if (fread(content.data(), 1, content.size(), file) != content.size()) {
    fprintf(stderr, "case file ends too early\n");
    exit(2);
  }
  to_device(buffer.data, content.data(), buffer.allocated);
}

void store(const Buffer& buffer, FILE* file) {
  std::vector<unsigned char> content(buffer.allocated);
  to_host(content.data(), buffer.data, content.size());
  if (fwrite(content.data(), 1, content.size(), file) != content.size()) exit(2);
}

}  // namespace

int main(int argc, char** argv) {
  FILE* file = argc >= 4 ? fopen(argv[2], "rb") : nullptr;
  JmpTokenReduceParams p;
  if (file == nullptr || fread(&p, sizeof p, 1, file) != 1) {
    fprintf(stderr, "usage: driver tuned|plain CASE OUT [SHORT]\n");
    return 2;
  }
  char message[256];
  if (jmp_token_reduce_check(&p, message, sizeof message) != 0) {
    fprintf(stderr, "%s\n", message);
    return 3;
  }
  const bool tuned = strcmp(argv[1], "tuned") == 0;
  if (tuned && jmp_token_reduce_check_tuned(&p, message, sizeof message) != 0) {
    fprintf(stderr, "the tuned kernels do not take this case: %s\n", message);
    return 3;
  }
  const auto launch = tuned ? &jmp_token_reduce : &jmp_token_reduce_plain;
  const auto workspace_bytes =
      tuned ? &jmp_token_reduce_workspace_bytes : &jmp_token_reduce_plain_workspace_bytes;
  const char* planted = argc > 4 ? argv[4] : "";
  const size_t element = p.dtype == JMP_FLOAT32 ? 4 : 2;
  const size_t tokens = static_cast<size_t>(p.batch) * static_cast<size_t>(p.tokens);
  const size_t outputs =
      static_cast<size_t>(p.batch) * static_cast<size_t>(p.num_prefix + p.num_keep);
  const size_t channels = static_cast<size_t>(p.channels);
  const size_t sizes = static_cast<size_t>(p.size_batch) * static_cast<size_t>(p.tokens);

  const Buffer x = make("x", tokens * channels * element, element, planted);
  const Buffer qkv =
      make("qkv", tokens * static_cast<size_t>(p.qkv_width) * element, element, planted);
  const Buffer size = make("size", sizes * element, element, planted);
  const Buffer y = make("y", outputs * channels * element, element, planted);
  const Buffer out_size = make("out_size", outputs * element, element, planted);
  const Buffer log_size = make("log_size", outputs * element, element, planted);
  const size_t patches = tokens - static_cast<size_t>(p.batch) * static_cast<size_t>(p.num_prefix);
  const Buffer index = make("index", patches * 4, 4, planted);
  const Buffer workspace = make("workspace", workspace_bytes(&p), 512, planted);
  fill(x, file);
  fill(qkv, file);
  fill(size, file);
  fclose(file);
#ifdef JMP_CUDA_ON_HOST
  for (const Buffer& b : {y, out_size, log_size, index, workspace}) {
    memset(b.data, 0xff, b.allocated);
  }
#endif  // on a GPU they stay uninitialized: initcheck is to see who reads them

  const int error =
      launch(&p, x.data, qkv.data, size.data, y.data, out_size.data, log_size.data,
             static_cast<int32_t*>(index.data), workspace.data, nullptr);
  if (error != 0) {
    fprintf(stderr, "%s\n", jmp_token_reduce_error_string(error));
    return 1;
  }
  FILE* out = fopen(argv[3], "wb");
  if (out == nullptr) return 2;
  for (const Buffer& b : {y, out_size, log_size, index}) store(b, out);
  if (fclose(out) != 0) return 2;
  for (const Buffer& b : {x, qkv, size, y, out_size, log_size, index, workspace}) {
    device_free(b.data);
  }
  return 0;
}
