// See token_reduce_plugin.h. Every noexcept method catches, logs an error and returns an error
// value: TensorRT then stops with an error of its own.
#include "token_reduce_plugin.h"

#include <cmath>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <stdexcept>
#include <utility>

#include "tensorrt_log.h"

namespace jmp_deploy {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

constexpr int32_t kSuccess = 0;
constexpr int32_t kFailure = -1;

void report_error(std::string const& message) noexcept {
  try {
    log_error(std::string(kPluginName) + ": " + message);
  } catch (...) {
    log_error(message);
  }
}

// --- Attributes ----------------------------------------------------------------------------------

// One row per attribute: its name and where it lives in the struct.
struct Attribute {
  char const* name;
  int32_t JmpTokenReduceParams::*integer;  // exactly one of the two is set
  float JmpTokenReduceParams::*real;
};

constexpr Attribute kAttributes[] = {
    {"num_prefix", &JmpTokenReduceParams::num_prefix, nullptr},
    {"num_keep", &JmpTokenReduceParams::num_keep, nullptr},
    {"num_heads", &JmpTokenReduceParams::num_heads, nullptr},
    {"head_dim", &JmpTokenReduceParams::head_dim, nullptr},
    {"scale", nullptr, &JmpTokenReduceParams::scale},
    {"tau", nullptr, &JmpTokenReduceParams::tau},
    {"merge_weight", nullptr, &JmpTokenReduceParams::merge_weight},
    {"granularity", &JmpTokenReduceParams::granularity, nullptr},
    {"importance", &JmpTokenReduceParams::importance, nullptr},
    {"proportional", &JmpTokenReduceParams::proportional, nullptr},
    {"selection", &JmpTokenReduceParams::selection, nullptr},
};
constexpr size_t kNbAttributes = sizeof(kAttributes) / sizeof(kAttributes[0]);

// The value of a field may lie at any address, hence the copy.
template <typename T>
T read_as(PluginField const& field) {
  T value;
  std::memcpy(&value, field.data, sizeof value);
  return value;
}

int32_t read_integer(PluginField const& field) {
  int64_t value = 0;
  if (field.type == PluginFieldType::kINT32) {
    value = read_as<int32_t>(field);
  } else if (static_cast<int32_t>(field.type) == 10) {  // kINT64: not in the headers of 10.0
    value = read_as<int64_t>(field);
  } else {
    throw std::invalid_argument(std::string(field.name) + ": expected an integer, found type " +
                                std::to_string(static_cast<int32_t>(field.type)));
  }
  if (value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument(std::string(field.name) + ": expected 32 bits, found " +
                                std::to_string(value));
  }
  return static_cast<int32_t>(value);
}

float read_real(PluginField const& field) {
  if (field.type == PluginFieldType::kFLOAT32) return read_as<float>(field);
  if (field.type == PluginFieldType::kFLOAT64) {
    double const value = read_as<double>(field);
    // The conversion of a double outside float's range is undefined.
    if (std::isfinite(value) && std::abs(value) > std::numeric_limits<float>::max()) {
      throw std::invalid_argument(std::string(field.name) + ": too large for float32");
    }
    return static_cast<float>(value);
  }
  throw std::invalid_argument(std::string(field.name) + ": expected a float, found type " +
                              std::to_string(static_cast<int32_t>(field.type)));
}

std::string all_names() {
  std::string names;
  for (Attribute const& attribute : kAttributes) {
    names += (names.empty() ? "" : ", ") + std::string(attribute.name);
  }
  return names;
}

// Reads and checks all attributes; throws std::invalid_argument with a message for the log.
JmpTokenReduceParams parse_attributes(nvinfer1::PluginFieldCollection const* collection) {
  if (collection == nullptr || (collection->nbFields > 0 && collection->fields == nullptr)) {
    throw std::invalid_argument("no attributes given; expected " + all_names());
  }
  JmpTokenReduceParams params{};
  bool found[kNbAttributes] = {};
  for (int32_t i = 0; i < collection->nbFields; ++i) {
    PluginField const& field = collection->fields[i];
    std::string const name = field.name == nullptr ? "" : field.name;
    size_t at = 0;
    while (at < kNbAttributes && name != kAttributes[at].name) ++at;
    if (at == kNbAttributes) {
      throw std::invalid_argument("unknown attribute \"" + name + "\"; expected " + all_names());
    }
    if (found[at]) throw std::invalid_argument(name + ": given twice");
    if (field.data == nullptr || field.length != 1) {
      throw std::invalid_argument(name + ": expected one number, found " +
                                  std::to_string(field.data == nullptr ? 0 : field.length));
    }
    Attribute const& attribute = kAttributes[at];
    if (attribute.integer != nullptr) {
      params.*attribute.integer = read_integer(field);
    } else {
      params.*attribute.real = read_real(field);
    }
    found[at] = true;
  }
  for (size_t at = 0; at < kNbAttributes; ++at) {
    if (!found[at]) {
      throw std::invalid_argument(std::string(kAttributes[at].name) + ": attribute missing");
    }
  }
  char message[256];
  if (jmp_token_reduce_check_attributes(&params, message, sizeof message) != 0) {
    throw std::invalid_argument(message);
  }
  return params;
}

// Fields for all attributes; with values that point into `params` if there is one.
std::vector<PluginField> make_fields(JmpTokenReduceParams const* params) {
  std::vector<PluginField> fields;
  for (Attribute const& attribute : kAttributes) {
    bool const integer = attribute.integer != nullptr;
    void const* data = nullptr;
    if (params != nullptr) {
      data = integer ? static_cast<void const*>(&(params->*attribute.integer))
                     : static_cast<void const*>(&(params->*attribute.real));
    }
    fields.emplace_back(attribute.name, data,
                        integer ? PluginFieldType::kINT32 : PluginFieldType::kFLOAT32, 1);
  }
  return fields;
}

// All attributes, floats by their bits.
std::string text_of(JmpTokenReduceParams const& params) {
  std::string text;
  for (Attribute const& attribute : kAttributes) {
    int32_t value = 0;
    if (attribute.integer != nullptr) {
      value = params.*attribute.integer;
    } else {
      std::memcpy(&value, &(params.*attribute.real), sizeof value);
    }
    text += std::string(attribute.name) + "=" + std::to_string(value) + ";";
  }
  return text;
}

// --- Shapes and types ------------------------------------------------------------------------------

constexpr char const* kInputNames[kNbInputs] = {"x", "qkv", "size"};
constexpr int32_t kInputRanks[kNbInputs] = {3, 3, 2};

// What the kernel calls the type; -1 for one that it does not take.
int32_t kernel_type(DataType type) {
  if (type == DataType::kFLOAT) return JMP_FLOAT32;
  if (type == DataType::kHALF) return JMP_FLOAT16;
  if (type == DataType::kBF16) return JMP_BFLOAT16;
  return -1;
}

bool is_supported(DataType type) { return kernel_type(type) >= 0; }

std::string name_of(DataType type) {
  if (type == DataType::kFLOAT) return "float32";
  if (type == DataType::kHALF) return "float16";
  if (type == DataType::kBF16) return "bfloat16";
  return "type " + std::to_string(static_cast<int32_t>(type));
}

char const* text_of(Version version) { return version == Version::kPlain ? "1" : "2"; }

void expect_rank(int32_t input, int32_t rank) {
  if (rank != kInputRanks[input]) {
    throw std::invalid_argument(std::string(kInputNames[input]) + ": expected " +
                                std::to_string(kInputRanks[input]) + " dimensions, found " +
                                std::to_string(rank));
  }
}

std::string text_of(Dims const& dims) {
  std::string text = "[";
  for (int32_t i = 0; i < dims.nbDims; ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(dims.d[i]);
  }
  return text + "]";
}

// Dims hold 64 bits since TensorRT 10.
int32_t narrow(char const* what, int64_t value) {
  if (value < 0 || value > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument(std::string(what) + ": expected 0 to 2^31 - 1, found " +
                                std::to_string(value));
  }
  return static_cast<int32_t>(value);
}

}  // namespace

TokenReducePlugin::TokenReducePlugin(JmpTokenReduceParams const& attributes, Version version,
                                     std::string plugin_namespace, std::string name)
    : attributes_(attributes),
      version_(version),
      namespace_(std::move(plugin_namespace)),
      name_(std::move(name)) {
  fields_ = make_fields(&attributes_);
  timing_id_ = text_of(attributes_) + (version_ == Version::kPlain ? "" : "index;");
}

// Not the default: the fields point into the object.
TokenReducePlugin::TokenReducePlugin(TokenReducePlugin const& other)
    : TokenReducePlugin(other.attributes_, other.version_, other.namespace_, other.name_) {}

std::string TokenReducePlugin::prefixed(std::string const& message) const {
  return std::string(kPluginName) + ": " + (name_.empty() ? "" : "layer " + name_ + ": ") + message;
}

void TokenReducePlugin::expect_counts(int32_t nb_inputs, int32_t nb_outputs) const {
  if (nb_inputs == kNbInputs && nb_outputs == getNbOutputs()) return;
  throw std::invalid_argument("expected 3 inputs (x, qkv, size) and " +
                              std::to_string(getNbOutputs()) + " outputs, found " +
                              std::to_string(nb_inputs) + " and " + std::to_string(nb_outputs));
}

void TokenReducePlugin::report(std::string const& message) const noexcept {
  try {
    log_error(prefixed(message));
  } catch (...) {
    log_error(message);
  }
}

JmpTokenReduceParams TokenReducePlugin::complete(Dims const& x, Dims const& qkv, Dims const& size,
                                                 DataType type) const {
  expect_rank(0, x.nbDims);
  expect_rank(1, qkv.nbDims);
  expect_rank(2, size.nbDims);
  if (!is_supported(type)) {
    throw std::invalid_argument("expected float32, float16 or bfloat16 inputs, found " + name_of(type));
  }
  if (qkv.d[0] != x.d[0] || qkv.d[1] != x.d[1] || size.d[1] != x.d[1]) {
    throw std::invalid_argument(
        "expected x [B, N, C], qkv [B, N, W], size [B, N] or [1, N] with one B and one N, found x " +
        text_of(x) + ", qkv " + text_of(qkv) + ", size " + text_of(size));
  }
  JmpTokenReduceParams params = attributes_;
  params.dtype = kernel_type(type);
  params.batch = narrow("batch", x.d[0]);
  params.tokens = narrow("tokens", x.d[1]);
  params.channels = narrow("channels", x.d[2]);
  params.qkv_width = narrow("qkv width", qkv.d[2]);
  params.size_batch = narrow("batch of size", size.d[0]);
  char message[256];
  if (jmp_token_reduce_check(&params, message, sizeof message) != 0) {
    throw std::invalid_argument(message);
  }
  return params;
}

// --- IPluginV3 -----------------------------------------------------------------------------------

nvinfer1::IPluginCapability* TokenReducePlugin::getCapabilityInterface(
    nvinfer1::PluginCapabilityType type) noexcept {
  // Not a switch: a header that knows one more type would make it a warning.
  using Type = nvinfer1::PluginCapabilityType;
  if (type == Type::kCORE) return static_cast<nvinfer1::IPluginV3OneCore*>(this);
  if (type == Type::kBUILD) return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
  if (type == Type::kRUNTIME) return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  return nullptr;
}

nvinfer1::IPluginV3* TokenReducePlugin::clone() noexcept {
  try {
    return new TokenReducePlugin(*this);
  } catch (std::exception const& error) {
    report(error.what());
    return nullptr;
  }
}

// --- IPluginV3OneCore ------------------------------------------------------------------------------

nvinfer1::AsciiChar const* TokenReducePlugin::getPluginName() const noexcept {
  return kPluginName;
}

nvinfer1::AsciiChar const* TokenReducePlugin::getPluginVersion() const noexcept {
  return text_of(version_);
}

nvinfer1::AsciiChar const* TokenReducePlugin::getPluginNamespace() const noexcept {
  return namespace_.c_str();
}

// --- IPluginV3OneBuild -----------------------------------------------------------------------------

int32_t TokenReducePlugin::getNbOutputs() const noexcept {
  return version_ == Version::kPlain ? kIndex : kIndex + 1;
}

int32_t TokenReducePlugin::getOutputDataTypes(DataType* output_types, int32_t nb_outputs,
                                              DataType const* input_types,
                                              int32_t nb_inputs) const noexcept {
  try {
    expect_counts(nb_inputs, nb_outputs);
    for (int32_t i = 0; i < kNbInputs; ++i) {
      if (!is_supported(input_types[i]) || input_types[i] != input_types[0]) {
        throw std::invalid_argument(
            "expected x, qkv and size all in float32, all in float16 or all in bfloat16, found " +
            name_of(input_types[0]) + ", " + name_of(input_types[1]) + ", " +
            name_of(input_types[2]));
      }
    }
    for (int32_t i = 0; i < nb_outputs; ++i) {
      output_types[i] = i == kIndex ? DataType::kINT32 : input_types[0];
    }
    return kSuccess;
  } catch (std::exception const& error) {
    report(error.what());
    return kFailure;
  }
}

int32_t TokenReducePlugin::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nb_inputs,
                                           nvinfer1::DimsExprs const* /*shape_inputs*/,
                                           int32_t /*nb_shape_inputs*/,
                                           nvinfer1::DimsExprs* outputs, int32_t nb_outputs,
                                           nvinfer1::IExprBuilder& builder) noexcept {
  try {
    expect_counts(nb_inputs, nb_outputs);
    for (int32_t i = 0; i < kNbInputs; ++i) expect_rank(i, inputs[i].nbDims);
    auto const* batch = inputs[0].d[0];
    auto const* places = builder.constant(attributes_.num_prefix + attributes_.num_keep);
    outputs[0].nbDims = 3;
    outputs[0].d[0] = batch;
    outputs[0].d[1] = places;
    outputs[0].d[2] = inputs[0].d[2];
    for (int32_t i = 1; i < nb_outputs; ++i) {
      outputs[i].nbDims = 2;
      outputs[i].d[0] = batch;
      outputs[i].d[1] = places;
    }
    if (nb_outputs > kIndex) {
      outputs[kIndex].d[1] =
          builder.operation(nvinfer1::DimensionOperation::kSUB, *inputs[0].d[1],
                            *builder.constant(attributes_.num_prefix));
    }
    return kSuccess;
  } catch (std::exception const& error) {
    report(error.what());
    return kFailure;
  }
}

bool TokenReducePlugin::supportsFormatCombination(int32_t position,
                                                  nvinfer1::DynamicPluginTensorDesc const* in_out,
                                                  int32_t nb_inputs,
                                                  int32_t nb_outputs) noexcept {
  if (position < 0 || position >= nb_inputs + nb_outputs) return false;
  auto const& desc = in_out[position].desc;
  if (position == nb_inputs + kIndex) {
    return desc.format == nvinfer1::TensorFormat::kLINEAR && desc.type == DataType::kINT32;
  }
  return desc.format == nvinfer1::TensorFormat::kLINEAR && is_supported(desc.type) &&
         desc.type == in_out[0].desc.type;
}

int32_t TokenReducePlugin::configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in,
                                           int32_t nb_inputs,
                                           nvinfer1::DynamicPluginTensorDesc const* /*out*/,
                                           int32_t nb_outputs) noexcept {
  try {
    expect_counts(nb_inputs, nb_outputs);
    static_cast<void>(complete(in[0].min, in[1].min, in[2].min, in[0].desc.type));
    JmpTokenReduceParams const largest =
        complete(in[0].max, in[1].max, in[2].max, in[0].desc.type);
    char why[256];
    if (jmp_token_reduce_check_tuned(&largest, why, sizeof why) != 0) {
      log_warning(prefixed(std::string("the plain kernels run here, which are slow: ") + why));
    }
    return kSuccess;
  } catch (std::exception const& error) {
    report(error.what());
    return kFailure;
  }
}

size_t TokenReducePlugin::getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs,
                                           int32_t nb_inputs,
                                           nvinfer1::DynamicPluginTensorDesc const* /*outputs*/,
                                           int32_t nb_outputs) const noexcept {
  try {
    expect_counts(nb_inputs, nb_outputs);
    JmpTokenReduceParams const params =
        complete(inputs[0].max, inputs[1].max, inputs[2].max, inputs[0].desc.type);
    return jmp_token_reduce_workspace_bytes(&params);
  } catch (std::exception const& error) {
    report(error.what());  // configurePlugin, or onShapeChange, fails on the same
    return 0;
  }
}

// With it a timing cache spares the builder our kernels, which it would time anew in each build.
char const* TokenReducePlugin::getTimingCacheID() noexcept { return timing_id_.c_str(); }

// --- IPluginV3OneRuntime ---------------------------------------------------------------------------

int32_t TokenReducePlugin::onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nb_inputs,
                                         nvinfer1::PluginTensorDesc const* /*out*/,
                                         int32_t nb_outputs) noexcept {
  try {
    expect_counts(nb_inputs, nb_outputs);
    static_cast<void>(complete(in[0].dims, in[1].dims, in[2].dims, in[0].type));
    return kSuccess;
  } catch (std::exception const& error) {
    report(error.what());
    return kFailure;
  }
}

int32_t TokenReducePlugin::enqueue(nvinfer1::PluginTensorDesc const* input_desc,
                                   nvinfer1::PluginTensorDesc const* /*output_desc*/,
                                   void const* const* inputs, void* const* outputs,
                                   void* workspace, cudaStream_t stream) noexcept {
  try {
    JmpTokenReduceParams const params =
        complete(input_desc[0].dims, input_desc[1].dims, input_desc[2].dims, input_desc[0].type);
    auto* const index =
        version_ == Version::kPlain ? nullptr : static_cast<int32_t*>(outputs[kIndex]);
    int const error = jmp_token_reduce(&params, inputs[0], inputs[1], inputs[2], outputs[0],
                                       outputs[1], outputs[2], index, workspace, stream);
    if (error == 0) return kSuccess;
    report(std::string("CUDA: ") + jmp_token_reduce_error_string(error));
    return kFailure;
  } catch (std::exception const& error) {
    report(error.what());
    return kFailure;
  }
}

nvinfer1::IPluginV3* TokenReducePlugin::attachToContext(
    nvinfer1::IPluginResourceContext* /*context*/) noexcept {
  jmp_token_reduce_prepare();
  return clone();
}

nvinfer1::PluginFieldCollection const* TokenReducePlugin::getFieldsToSerialize() noexcept {
  collection_.nbFields = static_cast<int32_t>(fields_.size());
  collection_.fields = fields_.data();
  return &collection_;
}

// --- IPluginCreatorV3One ---------------------------------------------------------------------------

TokenReduceCreator::TokenReduceCreator(Version version, char const* plugin_namespace)
    : version_(version), namespace_(plugin_namespace), fields_(make_fields(nullptr)) {}

nvinfer1::IPluginV3* TokenReduceCreator::createPlugin(
    nvinfer1::AsciiChar const* name, nvinfer1::PluginFieldCollection const* fields,
    nvinfer1::TensorRTPhase /*phase*/) noexcept {
  try {
    return new TokenReducePlugin(parse_attributes(fields), version_, namespace_,
                                 name == nullptr ? "" : name);
  } catch (std::exception const& error) {
    try {
      bool const named = name != nullptr && *name != '\0';
      report_error((named ? "layer " + std::string(name) + ": " : "") + error.what());
    } catch (...) {
      report_error("out of memory");
    }
    return nullptr;
  }
}

nvinfer1::PluginFieldCollection const* TokenReduceCreator::getFieldNames() noexcept {
  collection_.nbFields = static_cast<int32_t>(fields_.size());
  collection_.fields = fields_.data();
  return &collection_;
}

nvinfer1::AsciiChar const* TokenReduceCreator::getPluginName() const noexcept {
  return kPluginName;
}

nvinfer1::AsciiChar const* TokenReduceCreator::getPluginVersion() const noexcept {
  return text_of(version_);
}

nvinfer1::AsciiChar const* TokenReduceCreator::getPluginNamespace() const noexcept {
  return namespace_;
}

}  // namespace jmp_deploy
