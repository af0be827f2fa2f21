// See tensorrt_layout.h: a plugin compiled with the headers of TensorRT 10 that calls findLogger() in
// 11, or the other way round, calls something else.
#include "tensorrt_log.h"

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <atomic>
#include <cstdio>
#include <cstring>

#include "tensorrt_layout.h"

namespace jmp_deploy {

// The layouts of TensorRT 10 and of 11. Only ever called, never made nor destroyed. Not in an
// unnamed namespace: the compiler would see that nobody implements them and call its trap for pure
// virtual functions instead.
namespace layout {
struct Logger10 {
  virtual void log(int32_t severity, char const* message) noexcept = 0;
  virtual ~Logger10() = default;
};
struct Finder10 {
  virtual Logger10* findLogger() = 0;
  virtual ~Finder10() = default;
};
struct Versioned11 {
  virtual int32_t getAPILanguage() const noexcept = 0;
  virtual void getInterfaceInfo() const noexcept = 0;  // returns a struct; never called
  virtual ~Versioned11() = default;
};
struct Logger11 : Versioned11 {
  virtual void log(int32_t severity, char const* message) noexcept = 0;
};
struct Finder11 : Versioned11 {
  virtual Logger11* findLogger() = 0;
};
}  // namespace layout

namespace {

using Severity = nvinfer1::ILogger::Severity;

// By the version of the library that the finder's vtable lies in.
Layout layout_of(void* finder) noexcept {
  void* vtable = nullptr;
  std::memcpy(&vtable, finder, sizeof vtable);
  Dl_info info;
  if (dladdr(vtable, &info) == 0) return Layout::kUnknown;
  void* library = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return Layout::kUnknown;
  Layout const found = layout_of_library(library);
  dlclose(library);  // only gives back what RTLD_NOLOAD counted
  return found;
}

std::atomic<void*> logger_finder{nullptr};

template <typename Finder>
bool log_with(void* finder, Severity severity, char const* message) {
  auto* logger = static_cast<Finder*>(finder)->findLogger();
  if (logger == nullptr) return false;
  logger->log(static_cast<int32_t>(severity), message);
  return true;
}

void log_message(Severity severity, std::string const& message) noexcept {
  char const* text = message.c_str();
  try {
    void* finder = logger_finder.load();
    Layout const found = finder == nullptr ? Layout::kUnknown : layout_of(finder);
    if (found == Layout::kTensorRT10 && log_with<layout::Finder10>(finder, severity, text)) return;
    if (found == Layout::kTensorRT11 && log_with<layout::Finder11>(finder, severity, text)) return;
  } catch (...) {
    // findLogger() may throw; stderr remains
  }
  std::fprintf(stderr, "%s\n", text);
}

}  // namespace

void set_logger_finder(void* finder) noexcept {
  if (finder != nullptr) logger_finder.store(finder);
}

void log_error(std::string const& message) noexcept { log_message(Severity::kERROR, message); }

void log_warning(std::string const& message) noexcept {
  log_message(Severity::kWARNING, message);
}

}  // namespace jmp_deploy
