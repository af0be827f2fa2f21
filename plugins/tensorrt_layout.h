// TensorRT 11 changed the vtables of three interfaces that we call: ILogger and ILoggerFinder (it
// put IVersionedInterface under them) and IPluginRegistry (it dropped what was deprecated). All
// other interfaces of the plugin are the same in both. So which layout a library has is asked of
// that library when it is at hand, and not decided by the headers that the plugin was compiled with.
#ifndef JMP_TENSORRT_LAYOUT_H
#define JMP_TENSORRT_LAYOUT_H

#include <dlfcn.h>

#include <cstdint>

namespace jmp_deploy {

enum class Layout { kUnknown, kTensorRT10, kTensorRT11 };

// Of a library of TensorRT or TensorRT-RTX that is open; kUnknown for any other.
inline Layout layout_of_library(void* library) noexcept {
  auto const version = [library](char const* symbol) {
    using Getter = int32_t (*)();
    auto const getter = reinterpret_cast<Getter>(dlsym(library, symbol));
    return getter == nullptr ? -1 : getter();
  };
  int32_t const major = version("getInferLibMajorVersion");
  int32_t const minor = version("getInferLibMinorVersion");
  if (major == 10) return Layout::kTensorRT10;
  if (major == 11) return Layout::kTensorRT11;
  // TensorRT-RTX: 1.0 has the old layout by its documentation, by trial 1.4 has the old one and 1.5,
  // 1.6 and 1.7 have the new one.
  if (major == 1) return minor >= 5 ? Layout::kTensorRT11 : Layout::kTensorRT10;
  return Layout::kUnknown;
}

}  // namespace jmp_deploy

#endif  // JMP_TENSORRT_LAYOUT_H
