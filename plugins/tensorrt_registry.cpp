// How TensorRT comes by our creators. There are two ways, and a library cannot choose:
//
// 1. IPluginRegistry::loadLibrary opens the library and asks getCreators() for them.
// 2. Triton, DeepStream, Isaac ROS, ONNX Runtime, Polygraphy's command line and trtexec
//    --staticPlugins only dlopen() a library, and expect it to register its creators while it is
//    opened. TensorRT's macro for that binds a library to one libnvinfer.so.N and to the registry's
//    vtable of the headers; here the TensorRT that is there is found, asked for its version, and
//    called by the layout of that version.
//
// Opened by loadLibrary we register nothing, so that way 1 is what it always was. A loadLibrary after
// way 2 gets the creators all the same: it refuses those that are there already, and an empty list
// too (TensorRT-RTX 1.7), so ours go out before it is given them. Unloaded, the library takes its
// creators out again.
#include <NvInferRuntime.h>
#include <dlfcn.h>
#include <link.h>
#include <unwind.h>

#include <cstdio>
#include <string>
#include <vector>

#include "tensorrt_layout.h"
#include "tensorrt_log.h"
#include "token_reduce_plugin.h"

#define JMP_EXPORT extern "C" __attribute__((visibility("default")))

JMP_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder);
JMP_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nb_creators);

namespace jmp_deploy {

using Creator = nvinfer1::IPluginCreatorInterface;

// IPluginRegistry of TensorRT 10 and of 11, as far as the methods that we call; the others are
// there for their place in the vtable alone. Not in an unnamed namespace: see tensorrt_log.cpp.
namespace layout {
struct Registry10 {
  virtual bool registerPluginCreator() noexcept = 0;
  virtual void* getPluginCreatorList() const noexcept = 0;
  virtual void* getPluginCreator() noexcept = 0;
  virtual ~Registry10() noexcept = default;
  virtual void setErrorRecorder() noexcept = 0;
  virtual void* getErrorRecorder() const noexcept = 0;
  virtual bool deregisterPluginCreator() noexcept = 0;
  virtual bool isParentSearchEnabled() const = 0;
  virtual void setParentSearchEnabled() = 0;
  virtual void* loadLibrary() noexcept = 0;
  virtual void deregisterLibrary() noexcept = 0;
  virtual bool registerCreator(Creator& creator, char const* plugin_namespace) noexcept = 0;
  virtual void* getAllCreators() const noexcept = 0;
  virtual Creator* getCreator() noexcept = 0;
  virtual bool deregisterCreator(Creator const& creator) noexcept = 0;
};
struct Registry11 {
  virtual ~Registry11() noexcept = default;
  virtual void setErrorRecorder() noexcept = 0;
  virtual void* getErrorRecorder() const noexcept = 0;
  virtual bool isParentSearchEnabled() const = 0;
  virtual void setParentSearchEnabled() = 0;
  virtual void* loadLibrary() noexcept = 0;
  virtual void deregisterLibrary() noexcept = 0;
  virtual bool registerCreator(Creator& creator, char const* plugin_namespace) noexcept = 0;
  virtual void* getAllCreators() const noexcept = 0;
  virtual Creator* getCreator() noexcept = 0;
  virtual bool deregisterCreator(Creator const& creator) noexcept = 0;
};
}  // namespace layout

namespace {

// Two creators for each version of the plugin: an ONNX importer looks it up by the node's attribute
// `plugin_namespace`, which is "" if absent, or, in newer versions, by the node's domain.
constexpr int32_t kNbCreators = 4;
constexpr char const* kNamespaces[kNbCreators] = {"", "jmp_deploy", "", "jmp_deploy"};

Creator* const* all_creators() {
  static TokenReduceCreator plain(Version::kPlain, kNamespaces[0]);
  static TokenReduceCreator plain_in_ours(Version::kPlain, kNamespaces[1]);
  static TokenReduceCreator index(Version::kWithIndex, kNamespaces[2]);
  static TokenReduceCreator index_in_ours(Version::kWithIndex, kNamespaces[3]);
  static Creator* const creators[kNbCreators] = {&plain, &plain_in_ours, &index, &index_in_ours};
  return creators;
}

// Where the library that holds an address lies in memory; nullptr if none does.
void const* base_of(void const* address) noexcept {
  Dl_info info;
  return dladdr(address, &info) == 0 ? nullptr : info.dli_fbase;
}

struct TensorRT {
  void* registry;
  void const* base;  // of the library that the registry's code lies in
  Layout layout;
};

// Adds the TensorRT that an open library is, or brings along, unless it is in the list.
void add_tensorrt(void* library, std::vector<TensorRT>& found) {
  auto const get = reinterpret_cast<void* (*)()>(dlsym(library, "getPluginRegistry"));
  if (get == nullptr) return;
  void const* base = base_of(reinterpret_cast<void const*>(get));
  for (TensorRT const& other : found) {
    if (other.base == base) return;
  }
  if (void* registry = get()) found.push_back({registry, base, layout_of_library(library)});
}

int add_name(dl_phdr_info* info, size_t /*size*/, void* names) {
  static_cast<std::vector<std::string>*>(names)->emplace_back(info->dlpi_name);
  return 0;
}

// Every TensorRT in this process; if there is none, the one that the dynamic linker finds.
std::vector<TensorRT> find_tensorrt() {
  std::vector<TensorRT> found;
  std::vector<std::string> names;
  dl_iterate_phdr(add_name, &names);  // the program itself has the name ""
  for (std::string const& name : names) {
    void* library = dlopen(name.empty() ? nullptr : name.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) continue;
    add_tensorrt(library, found);
    dlclose(library);  // gives back what RTLD_NOLOAD counted
  }
  // Polygraphy's command line opens plugins first. Whoever comes later gets the same library.
  constexpr char const* kNames[] = {"libnvinfer.so.11",      "libnvinfer.so.10",
                                    "libtensorrt_rtx.so.1",  "libtensorrt_rtx.so",
                                    "libnvinfer_lean.so.11", "libnvinfer_lean.so.10"};
  for (char const* name : kNames) {
    if (!found.empty()) break;
    void* library = dlopen(name, RTLD_LAZY | RTLD_LOCAL);
    if (library != nullptr) add_tensorrt(library, found);
  }
  // The registry has to be there until we have left it.
  for (TensorRT const& each : found) {
    Dl_info info;
    if (dladdr(each.base, &info) != 0) dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  }
  return found;
}

_Unwind_Reason_Code add_caller(_Unwind_Context* context, void* callers) {
  auto const address = reinterpret_cast<void const*>(_Unwind_GetIP(context));
  static_cast<std::vector<void const*>*>(callers)->push_back(base_of(address));
  return _URC_NO_REASON;
}

bool register_with(TensorRT const& tensorrt, Creator& creator, char const* plugin_namespace) {
  if (tensorrt.layout == Layout::kTensorRT10) {
    auto* registry = static_cast<layout::Registry10*>(tensorrt.registry);
    return registry->registerCreator(creator, plugin_namespace);
  }
  auto* registry = static_cast<layout::Registry11*>(tensorrt.registry);
  return registry->registerCreator(creator, plugin_namespace);
}

void deregister_from(TensorRT const& tensorrt, Creator const& creator) {
  if (tensorrt.layout == Layout::kTensorRT10) {
    static_cast<layout::Registry10*>(tensorrt.registry)->deregisterCreator(creator);
  } else {
    static_cast<layout::Registry11*>(tensorrt.registry)->deregisterCreator(creator);
  }
}

// Made when the library is opened and gone when it is closed. It calls getPluginRegistry() before
// it is complete, so that at the end of the process it goes before the registry does.
class Registration {
 public:
  Registration() noexcept {
    try {
      std::vector<void const*> callers;
      _Unwind_Backtrace(add_caller, &callers);
      Creator* const* creators = all_creators();
      std::vector<TensorRT> const here = find_tensorrt();
      if (here.empty()) {
        std::fprintf(stderr,
                     "%s: opened where no TensorRT is open or on the library path: nothing is "
                     "registered; open TensorRT first, or add its folder to LD_LIBRARY_PATH\n",
                     kPluginName);
      }
      for (TensorRT const& tensorrt : here) {
        bool by_load_library = false;
        for (void const* caller : callers) by_load_library |= caller == tensorrt.base;
        if (by_load_library) continue;
        if (tensorrt.layout == Layout::kUnknown) {
          std::fprintf(stderr,
                       "%s: a TensorRT of unknown version is here: load this library with "
                       "IPluginRegistry::loadLibrary, or take a newer jmp_deploy\n",
                       kPluginName);
          continue;
        }
        int32_t done = 0;
        while (done < kNbCreators &&
               register_with(tensorrt, *creators[done], kNamespaces[done])) {
          ++done;
        }
        if (done == kNbCreators) {
          with_.push_back(tensorrt);
        } else {
          for (int32_t i = 0; i < done; ++i) deregister_from(tensorrt, *creators[i]);
        }
      }
    } catch (...) {
      log_error(std::string(kPluginName) + ": cannot register the plugin");
    }
  }
  Registration(Registration const&) = delete;
  Registration& operator=(Registration const&) = delete;
  ~Registration() {
    for (TensorRT const& tensorrt : with_) leave(tensorrt);
  }

  // Leaves the registry of a TensorRT, which wants to register the creators itself.
  void hand_over(void const* base) noexcept {
    for (auto tensorrt = with_.begin(); tensorrt != with_.end(); ++tensorrt) {
      if (tensorrt->base != base) continue;
      leave(*tensorrt);
      with_.erase(tensorrt);
      return;
    }
  }

 private:
  static void leave(TensorRT const& tensorrt) {
    for (int32_t i = 0; i < kNbCreators; ++i) deregister_from(tensorrt, *all_creators()[i]);
  }

  std::vector<TensorRT> with_;
};

Registration registration;

}  // namespace
}  // namespace jmp_deploy

void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { jmp_deploy::set_logger_finder(finder); }

nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nb_creators) {
  jmp_deploy::registration.hand_over(jmp_deploy::base_of(__builtin_return_address(0)));
  nb_creators = jmp_deploy::kNbCreators;
  return jmp_deploy::all_creators();
}
