// Messages to TensorRT's log.
#ifndef JMP_TENSORRT_LOG_H
#define JMP_TENSORRT_LOG_H

#include <string>

namespace jmp_deploy {

// Keeps what TensorRT hands to setLoggerFinder: an nvinfer1::ILoggerFinder.
void set_logger_finder(void* finder) noexcept;

// Log through TensorRT's logger; to stderr where there is none that we can call.
void log_error(std::string const& message) noexcept;
void log_warning(std::string const& message) noexcept;

}  // namespace jmp_deploy

#endif  // JMP_TENSORRT_LOG_H
