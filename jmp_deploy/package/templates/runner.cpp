// One photo through an engine, in C++: TensorRT 10 and 11, a CUDA graph, the model's preprocessing,
// the five largest outputs.
//
//   runner ENGINE PLUGIN|- PHOTO.ppm
//
// preprocess.txt and labels.txt are read from the working folder. The photo is a binary PPM (P6), so
// that nothing but TensorRT and the CUDA runtime is needed.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

void check(bool good, char const* what) {
  if (!good) throw std::runtime_error(what);
}

class Logger final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, char const* message) noexcept override {
    if (severity <= Severity::kWARNING) std::fprintf(stderr, "%s\n", message);
  }
};

// --- Images: Pillow's arithmetic, but for its rounding to 8 bits between and after the passes ------

struct Image {  // RGB, interleaved, 0 to 255
  int width = 0, height = 0;
  std::vector<float> pixels;
};

Image read_ppm(std::string const& path) {
  std::ifstream file(path, std::ios::binary);
  std::string kind;
  Image image;
  int most = 0;
  file >> kind >> image.width >> image.height >> most;
  check(file && kind == "P6" && most == 255 && image.width > 0 && image.height > 0 &&
            image.width <= 65536 && image.height <= 65536,
        "the photo is not a binary PPM of 8 bits without comments");
  file.get();
  std::vector<unsigned char> bytes(size_t{3} * image.width * image.height);
  file.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  check(static_cast<bool>(file), "the photo is cut short");
  image.pixels.assign(bytes.begin(), bytes.end());
  return image;
}

struct Filter {
  double support;
  std::function<double(double)> weight;
};

Filter filter_named(std::string const& name) {
  if (name == "bilinear") return {1, [](double x) { return std::max(0.0, 1 - std::abs(x)); }};
  check(name == "bicubic", "preprocess.txt: this runner has bilinear and bicubic");
  return {2, [](double x) {
            x = std::abs(x);
            if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
            return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0.0;
          }};
}

// Resizes the rows, and turns the image: twice gives the image resized, upright.
Image resize_and_turn(Image const& from, int width, Filter const& filter) {
  Image to{from.height, width, std::vector<float>(size_t{3} * width * from.height)};
  double const scale = static_cast<double>(from.width) / width, wide = std::max(scale, 1.0);
  for (int x = 0; x < width; ++x) {
    double const centre = (x + 0.5) * scale, reach = filter.support * wide;
    int const first = std::max(0, static_cast<int>(centre - reach + 0.5));
    int const last = std::min(from.width, static_cast<int>(centre + reach + 0.5));
    std::vector<double> weights;
    for (int i = first; i < last; ++i) weights.push_back(filter.weight((i - centre + 0.5) / wide));
    double const sum = std::accumulate(weights.begin(), weights.end(), 0.0);
    for (int y = 0; y < from.height; ++y) {
      for (int c = 0; c < 3; ++c) {
        double value = 0;
        for (int i = first; i < last; ++i) {
          value += weights[i - first] * from.pixels[3 * (size_t{1} * y * from.width + i) + c];
        }
        float const result = static_cast<float>(std::min(255.0, std::max(0.0, value / sum)));
        to.pixels[3 * (size_t{1} * x * from.height + y) + c] = std::round(result);
      }
    }
  }
  return to;
}

// [3, H, W] as the model wants it, by preprocess.txt.
std::vector<float> preprocess(Image image) {
  std::ifstream file("preprocess.txt");
  int height = 0, width = 0, edge = 0, squash = 0;
  std::string interpolation;
  float mean[3], std_[3];
  file >> height >> width >> edge >> squash >> interpolation;
  for (float& value : mean) file >> value;
  for (float& value : std_) file >> value;
  check(static_cast<bool>(file), "preprocess.txt cannot be read");
  int wide = edge, high = edge;
  if (squash == 0 && image.width > image.height) {
    wide = static_cast<int>(static_cast<double>(edge) * image.width / image.height);
  } else if (squash == 0) {
    high = static_cast<int>(static_cast<double>(edge) * image.height / image.width);
  }
  Filter const filter = filter_named(interpolation);
  image = resize_and_turn(resize_and_turn(image, wide, filter), high, filter);
  check(image.width >= width && image.height >= height, "the crop is larger than the photo");
  int const left = static_cast<int>(std::nearbyint((image.width - width) / 2.0));
  int const top = static_cast<int>(std::nearbyint((image.height - height) / 2.0));
  std::vector<float> values;
  for (int c = 0; c < 3; ++c) {
    for (int y = 0; y < height; ++y) {
      for (int x = 0; x < width; ++x) {
        size_t const at = 3 * (size_t{1} * (y + top) * image.width + x + left) + c;
        values.push_back((image.pixels[at] / 255 - mean[c]) / std_[c]);
      }
    }
  }
  return values;
}

// --- The engine ------------------------------------------------------------------------------------

std::vector<char> read_file(std::string const& path) {
  std::ifstream file(path, std::ios::binary);
  check(static_cast<bool>(file), "the engine cannot be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

void run(std::string const& plan, std::string const& plugin, std::string const& photo) {
  Logger logger;
  if (plugin != "-") {
    check(getPluginRegistry()->loadLibrary(plugin.c_str()) != nullptr, "the plugin does not load");
  }
  std::vector<char> const bytes = read_file(plan);
  std::unique_ptr<nvinfer1::IRuntime> runtime(nvinfer1::createInferRuntime(logger));
  check(runtime != nullptr, "TensorRT does not start");
  std::unique_ptr<nvinfer1::ICudaEngine> engine(
      runtime->deserializeCudaEngine(bytes.data(), bytes.size()));
  check(engine != nullptr, "the engine does not fit this GPU or this TensorRT: build it here");
  std::unique_ptr<nvinfer1::IExecutionContext> context(engine->createExecutionContext());
  check(context != nullptr && engine->getNbIOTensors() == 2, "not an engine of jmp_deploy");
  bool const input_first =
      engine->getTensorIOMode(engine->getIOTensorName(0)) == nvinfer1::TensorIOMode::kINPUT;
  char const* input = engine->getIOTensorName(input_first ? 0 : 1);
  char const* output = engine->getIOTensorName(input_first ? 1 : 0);

  std::vector<float> const image = preprocess(read_ppm(photo));
  nvinfer1::Dims shape = engine->getTensorShape(input);
  shape.d[0] = 1;
  check(context->setInputShape(input, shape), "the engine has no profile for one image");
  nvinfer1::Dims const out_shape = context->getTensorShape(output);
  int64_t size = 1;
  for (int32_t i = 1; i < shape.nbDims; ++i) size *= shape.d[i];
  check(size == static_cast<int64_t>(image.size()), "preprocess.txt is of another model");
  std::vector<float> values(static_cast<size_t>(out_shape.d[out_shape.nbDims - 1]));

  void *device_in = nullptr, *device_out = nullptr;
  check(cudaMalloc(&device_in, image.size() * sizeof(float)));
  check(cudaMalloc(&device_out, values.size() * sizeof(float)));
  check(cudaMemcpy(device_in, image.data(), image.size() * sizeof(float), cudaMemcpyHostToDevice));
  check(context->setTensorAddress(input, device_in) && context->setTensorAddress(output, device_out),
        "TensorRT refuses an address");

  // Once as it is, so that nothing is allocated within the capture; then as a graph.
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  check(context->enqueueV3(stream), "the inference fails");
  check(cudaStreamSynchronize(stream));
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  check(context->enqueueV3(stream), "the inference cannot be captured");
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiateWithFlags(&exec, graph, 0));
  constexpr int kRuns = 100;
  auto const start = std::chrono::steady_clock::now();
  for (int i = 0; i < kRuns; ++i) check(cudaGraphLaunch(exec, stream));
  check(cudaStreamSynchronize(stream));
  std::chrono::duration<double, std::milli> const spent = std::chrono::steady_clock::now() - start;
  check(cudaMemcpy(values.data(), device_out, values.size() * sizeof(float),
                   cudaMemcpyDeviceToHost));

  std::vector<std::string> labels;
  std::ifstream file("labels.txt");
  for (std::string line; std::getline(file, line);) labels.push_back(line);
  std::vector<size_t> order(values.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return values[a] > values[b]; });
  for (size_t i = 0; i < std::min<size_t>(5, order.size()); ++i) {
    std::string const label =
        order[i] < labels.size() ? labels[order[i]] : std::to_string(order[i]);
    std::printf("%9.4f  %s\n", static_cast<double>(values[order[i]]), label.c_str());
  }
  std::printf("%.3f ms an inference\n", spent.count() / kRuns);
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  cudaFree(device_in);
  cudaFree(device_out);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s ENGINE PLUGIN|- PHOTO.ppm\n", argv[0]);
    return 2;
  }
  try {
    run(argv[1], argv[2], argv[3]);
    return 0;
  } catch (std::exception const& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
