// A TensorRT that has a plugin registry and nothing else. Its vtable is the one of the headers that
// it is compiled with. loadLibrary refuses what TensorRT-RTX 1.7 refuses: a creator that is there
// already, and a library that has none.
#include <NvInferRuntime.h>
#include <NvInferVersion.h>
#include <dlfcn.h>

#include <cstring>
#include <string>
#include <vector>

#define FAKE_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using Creator = nvinfer1::IPluginCreatorInterface;

struct Entry {
  Creator const* creator;
  std::string name;
};

class Registry final : public nvinfer1::IPluginRegistry {
 public:
#if NV_TENSORRT_MAJOR < 11
  bool registerCreator(nvinfer1::IPluginCreator&, char const*) noexcept override { std::abort(); }
  nvinfer1::IPluginCreator* const* getPluginCreatorList(int32_t*) const noexcept override {
    std::abort();
  }
  nvinfer1::IPluginCreator* getPluginCreator(char const*, char const*,
                                             char const*) noexcept override {
    std::abort();
  }
  bool deregisterCreator(nvinfer1::IPluginCreator const&) noexcept override { std::abort(); }
#endif
  ~Registry() noexcept override { gone = true; }
  void setErrorRecorder(nvinfer1::IErrorRecorder* const) noexcept override { std::abort(); }
  nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override { std::abort(); }
  bool isParentSearchEnabled() const override { std::abort(); }
  void setParentSearchEnabled(bool const) override { std::abort(); }
  PluginLibraryHandle loadLibrary(char const* path) noexcept override {
    void* library = dlopen(path, RTLD_LAZY | RTLD_LOCAL);
    if (library == nullptr) return nullptr;
    using Getter = Creator* const* (*)(int32_t&);
    auto const get = reinterpret_cast<Getter>(dlsym(library, "getCreators"));
    int32_t count = 0;
    Creator* const* creators = get(count);
    bool good = count > 0;
    for (int32_t i = 0; i < count; ++i) good = good && registerCreator(*creators[i], "");
    return good ? library : nullptr;
  }
  void deregisterLibrary(PluginLibraryHandle) noexcept override { std::abort(); }
  bool registerCreator(Creator& creator, char const* const) noexcept override {
    if (gone) std::abort();
    auto& ours = static_cast<nvinfer1::IPluginCreatorV3One&>(creator);
    std::string const name = std::string(ours.getPluginName()) + "/" + ours.getPluginVersion() +
                             "/" + ours.getPluginNamespace();
    for (Entry const& entry : entries) {
      if (entry.name == name) return false;
    }
    entries.push_back({&creator, name});
    return true;
  }
  Creator* const* getAllCreators(int32_t* const) const noexcept override { std::abort(); }
  Creator* getCreator(char const* const, char const* const, char const* const) noexcept override {
    std::abort();
  }
  bool deregisterCreator(Creator const& creator) noexcept override {
    if (gone) std::abort();
    for (auto entry = entries.begin(); entry != entries.end(); ++entry) {
      if (entry->creator != &creator) continue;
      entries.erase(entry);
      return true;
    }
    return false;
  }
  nvinfer1::IPluginResource* acquirePluginResource(char const*,
                                                   nvinfer1::IPluginResource*) noexcept override {
    std::abort();
  }
  int32_t releasePluginResource(char const*) noexcept override { std::abort(); }
  // In some headers only, at the end of the vtable.
  virtual Creator* const* getAllCreatorsRecursive(int32_t* const) noexcept { std::abort(); }

  std::vector<Entry> entries;
  bool gone = false;
};

Registry& the_registry() {
  static Registry registry;
  return registry;
}

}  // namespace

FAKE_EXPORT nvinfer1::IPluginRegistry* getPluginRegistry() noexcept { return &the_registry(); }
FAKE_EXPORT int32_t getInferLibMajorVersion() noexcept { return FAKE_MAJOR; }
FAKE_EXPORT int32_t getInferLibMinorVersion() noexcept { return NV_TENSORRT_MINOR; }

FAKE_EXPORT char const* fake_names() {
  static std::string names;
  names.clear();
  for (Entry const& entry : the_registry().entries) names += entry.name + " ";
  return names.c_str();
}
FAKE_EXPORT int32_t fake_load_library(char const* path) {
  return the_registry().loadLibrary(path) != nullptr;
}
