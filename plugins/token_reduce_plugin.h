// The TensorRT side of JMPTokenReduce: an IPluginV3 around the launcher of token_reduce_kernel.h.
// Shapes, types, attributes and messages live here; arithmetic does not.
//
// Uses only what is the same in the headers of TensorRT 10.0 to 11.1, and no symbol of
// libnvinfer, so one library loads into TensorRT and TensorRT-RTX alike.
#ifndef JMP_TOKEN_REDUCE_PLUGIN_H
#define JMP_TOKEN_REDUCE_PLUGIN_H

#include <NvInferRuntime.h>

#include <string>
#include <vector>

#include "token_reduce_kernel.h"

namespace jmp_deploy {

constexpr char const* kPluginName = "JMPTokenReduce";
// Version "1" of the plugin gives y, out_size and log_size; "2" also `index`, int32 [B, M]. They are
// two names of one class, so that models that need no index are what they always were.
enum class Version : int32_t { kPlain = 1, kWithIndex = 2 };
constexpr int32_t kNbInputs = 3;  // x, qkv, size
constexpr int32_t kIndex = 3;     // the output of version 2

class TokenReducePlugin final : public nvinfer1::IPluginV3,
                                public nvinfer1::IPluginV3OneCore,
                                public nvinfer1::IPluginV3OneBuild,
                                public nvinfer1::IPluginV3OneRuntime {
 public:
  // `attributes`: the attribute part of the struct, already checked. `name`: of the layer.
  TokenReducePlugin(JmpTokenReduceParams const& attributes, Version version,
                    std::string plugin_namespace, std::string name);
  TokenReducePlugin(TokenReducePlugin const& other);
  TokenReducePlugin& operator=(TokenReducePlugin const&) = delete;
  ~TokenReducePlugin() override = default;

  // IPluginV3
  nvinfer1::IPluginCapability* getCapabilityInterface(
      nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  // IPluginV3OneCore
  nvinfer1::AsciiChar const* getPluginName() const noexcept override;
  nvinfer1::AsciiChar const* getPluginVersion() const noexcept override;
  nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override;

  // IPluginV3OneBuild
  int32_t getNbOutputs() const noexcept override;
  int32_t getOutputDataTypes(nvinfer1::DataType* output_types, int32_t nb_outputs,
                             nvinfer1::DataType const* input_types,
                             int32_t nb_inputs) const noexcept override;
  int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nb_inputs,
                          nvinfer1::DimsExprs const* shape_inputs, int32_t nb_shape_inputs,
                          nvinfer1::DimsExprs* outputs, int32_t nb_outputs,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position,
                                 nvinfer1::DynamicPluginTensorDesc const* in_out,
                                 int32_t nb_inputs, int32_t nb_outputs) noexcept override;
  int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nb_inputs,
                          nvinfer1::DynamicPluginTensorDesc const* out,
                          int32_t nb_outputs) noexcept override;
  size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t nb_inputs,
                          nvinfer1::DynamicPluginTensorDesc const* outputs,
                          int32_t nb_outputs) const noexcept override;
  char const* getTimingCacheID() noexcept override;

  // IPluginV3OneRuntime
  int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nb_inputs,
                        nvinfer1::PluginTensorDesc const* out,
                        int32_t nb_outputs) noexcept override;
  int32_t enqueue(nvinfer1::PluginTensorDesc const* input_desc,
                  nvinfer1::PluginTensorDesc const* output_desc, void const* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(
      nvinfer1::IPluginResourceContext* context) noexcept override;
  nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

 private:
  // Attributes plus these shapes and type; throws std::invalid_argument if they do not fit.
  JmpTokenReduceParams complete(nvinfer1::Dims const& x, nvinfer1::Dims const& qkv,
                                nvinfer1::Dims const& size, nvinfer1::DataType type) const;
  std::string prefixed(std::string const& message) const;  // by plugin and layer
  void report(std::string const& message) const noexcept;

  void expect_counts(int32_t nb_inputs, int32_t nb_outputs) const;

  JmpTokenReduceParams attributes_;
  Version version_;
  std::string namespace_;
  std::string name_;
  std::vector<nvinfer1::PluginField> fields_;  // what getFieldsToSerialize points at
  nvinfer1::PluginFieldCollection collection_{};
  std::string timing_id_;
};

class TokenReduceCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  TokenReduceCreator(Version version, char const* plugin_namespace);

  // IPluginCreatorV3One
  nvinfer1::IPluginV3* createPlugin(nvinfer1::AsciiChar const* name,
                                    nvinfer1::PluginFieldCollection const* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override;
  nvinfer1::AsciiChar const* getPluginName() const noexcept override;
  nvinfer1::AsciiChar const* getPluginVersion() const noexcept override;
  nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override;

 private:
  Version version_;
  char const* namespace_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace jmp_deploy

#endif  // JMP_TOKEN_REDUCE_PLUGIN_H
