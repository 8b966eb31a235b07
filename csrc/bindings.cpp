// The module fastdpo._cuda: raw device pointers, sizes, strides in elements, dtype tags, a device
// and a stream. It knows nothing of PyTorch, so that one binary serves every version of it;
// fastdpo/backends/cuda.py knows both.
#include "arguments.h"

#include <atomic>

#include "architectures.h"
#include "errors.h"
#include "ops.h"

#ifndef FASTDPO_MODULE
#define FASTDPO_MODULE _cuda
#endif

namespace fastdpo {
namespace {

void check_architecture(int major, int minor) {
  if (runs_on(major, minor)) return;
  throw py::value_error(
      "device should be of a compute capability that fastdpo._cuda was built for (" + built_for() +
      "), got " + std::to_string(major) + "." + std::to_string(minor) +
      "; rebuild it with FASTDPO_CUDA_ARCHS=\"" + std::to_string(major) + "." +
      std::to_string(minor) + "\"");
}

// The newest CUDA version that the driver serves (12040: 12.4); 0 where there is no driver.
int driver_version() {
  int version = 0;
  check_cuda(cudaDriverGetVersion(&version), "driver_version");
  return version;
}

// Makes `device` current for a scope, after checking (once per device) that this binary runs on it,
// and lets other Python threads run meanwhile: a launch may wait (for a context, a module, a full
// queue), and what it waits for may be another thread's launch.
class DeviceScope {
 public:
  DeviceScope(int device, const char* op) {
    check_cuda(cudaGetDevice(&previous_), op);
    if (!checked(device)) {
      int major = 0, minor = 0;
      check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), op);
      check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), op);
      check_architecture(major, minor);
      if (device < 64) known_.fetch_or(uint64_t{1} << device);
    }
    if (device != previous_) check_cuda(cudaSetDevice(device), op);
    current_ = device;
  }
  ~DeviceScope() {
    if (current_ != previous_) (void)cudaSetDevice(previous_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  static bool checked(int device) { return device < 64 && (known_.load() >> device & 1u) != 0; }

  static inline std::atomic<uint64_t> known_{0};
  py::gil_scoped_release release_;
  int previous_ = 0;
  int current_ = 0;
};

int device_index(const py::int_& value) {
  return static_cast<int>(integer(value, "device", 0, 1 << 16));
}

cudaStream_t stream_handle(const py::int_& value) {  // 0 is the default stream
  return pointer<std::remove_pointer_t<cudaStream_t>>(value, "stream", 1, true);
}

// softcap(scale · u) / temperature, softcap 0: none.
LogitMap logit_map(double scale, double softcap, double temperature) {
  number(scale, "scale");
  if (!(softcap >= 0.0) || std::isinf(softcap))
    refuse("softcap", "be positive and finite, or 0 for none, got " + std::to_string(softcap));
  if (!(temperature > 0.0) || std::isinf(temperature))
    refuse("temperature", "be positive and finite, got " + std::to_string(temperature));
  const float gain = number(scale / temperature, "temperature");
  if (softcap == 0.0) return {gain, 1.0f, gain};
  return {number(scale / softcap, "softcap"), number(softcap / temperature, "softcap"), gain};
}

int splits(int64_t rows, int64_t per_row) {
  if (rows > kMostBlocks / per_row) {
    refuse("rows", "fit in a launch of " + std::to_string(kMostBlocks) + " blocks, got " +
                       std::to_string(rows) + " of " + std::to_string(per_row) + " blocks each");
  }
  return static_cast<int>(per_row);
}

// counters [rows] and, from the next 8 bytes on, partials [rows, splits].
int64_t partials_offset(int64_t rows) {
  return ceil_div(rows * static_cast<int64_t>(sizeof(unsigned)), 8) * 8;
}

int64_t logits_logps_workspace_bytes(const py::int_& dtype_tag, const py::int_& rows_,
                                     const py::int_& vocab_) {
  const DType type = dtype(dtype_tag, "dtype");
  const int64_t rows = count(rows_, "rows");
  const int per_row = splits(rows, logits_logps_splits(type, columns(vocab_, "vocab")));
  if (per_row == 1) return 0;
  return partials_offset(rows) + rows * per_row * static_cast<int64_t>(sizeof(float2));
}

void bind_logits_logps(const py::int_& logits, const py::int_& dtype_tag, const py::int_& rows_,
                       const py::int_& vocab, const py::int_& row_stride, const py::int_& labels,
                       double scale, double softcap, double temperature, const py::int_& logps,
                       const py::int_& lse, const py::int_& workspace,
                       const py::int_& workspace_bytes, bool second_launch, const py::int_& device,
                       const py::int_& stream_) {
  const DType type = dtype(dtype_tag, "dtype");
  const int64_t rows = count(rows_, "rows");
  LogitsLogpsParams p{};
  p.rows = rows;
  p.vocab = columns(vocab, "vocab");
  p.row_stride = count(row_stride, "row_stride");
  p.splits = splits(rows, logits_logps_splits(type, p.vocab));
  p.map = logit_map(scale, softcap, temperature);
  const bool empty = rows == 0;
  p.logits = pointer<const void>(logits, "logits", size_of(type), empty);
  p.labels = array<const int64_t>(labels, "labels", empty);
  p.logps = array<float>(logps, "logps", empty);
  p.lse = array<float>(lse, "lse", empty);
  Matrix{reinterpret_cast<uintptr_t>(p.logits), rows, p.vocab, p.row_stride, size_of(type)}.check(
      "row_stride");
  const int64_t needed = logits_logps_workspace_bytes(dtype_tag, rows_, vocab);
  if (count(workspace_bytes, "workspace_bytes") < needed) {
    refuse("workspace_bytes", "be at least " + std::to_string(needed) + ", got " +
                                  py::str(workspace_bytes).cast<std::string>());
  }
  char* memory = pointer<char>(workspace, "workspace", 8, needed == 0);
  p.counters = second_launch ? nullptr : reinterpret_cast<unsigned*>(memory);
  if (needed > 0) p.partials = reinterpret_cast<float2*>(memory + partials_offset(rows));
  const cudaStream_t stream = stream_handle(stream_);
  const int index = device_index(device);
  if (empty) return;
  const DeviceScope scope(index, "logits_logps");
  run_logits_logps(p, type, rows, softcap != 0.0, stream);
}

void bind_logits_logps_backward(
    const py::int_& logits, const py::int_& dtype_tag, const py::int_& rows_, const py::int_& vocab,
    const py::int_& row_stride, const py::int_& labels, const py::int_& lse, const py::int_& grad,
    const py::int_& grad_stride, const py::int_& grad_scale, double scale, double softcap,
    double temperature, const py::int_& out, const py::int_& out_dtype, const py::int_& out_stride,
    const py::int_& device, const py::int_& stream_) {
  const DType type = dtype(dtype_tag, "dtype"), out_type = dtype(out_dtype, "out_dtype");
  const int64_t rows = count(rows_, "rows");
  LogitsLogpsBackwardParams p{};
  p.vocab = columns(vocab, "vocab");
  p.row_stride = count(row_stride, "row_stride");
  p.out_stride = count(out_stride, "out_stride");
  p.grad_stride = count(grad_stride, "grad_stride");
  p.map = logit_map(scale, softcap, temperature);
  const bool empty = rows == 0;
  p.logits = pointer<const void>(logits, "logits", size_of(type), empty);
  p.out = pointer<void>(out, "out", size_of(out_type), empty);
  p.splits = splits(rows, logits_logps_backward_splits(out_type, p.vocab, p.out, p.out_stride));
  p.labels = array<const int64_t>(labels, "labels", empty);
  p.lse = array<const float>(lse, "lse", empty);
  p.grad = array<const float>(grad, "grad", empty);
  p.grad_scale = array<const float>(grad_scale, "grad_scale", true);
  const Matrix read{reinterpret_cast<uintptr_t>(p.logits), rows, p.vocab, p.row_stride,
                    size_of(type)};
  const Matrix written{reinterpret_cast<uintptr_t>(p.out), rows, p.vocab, p.out_stride,
                       size_of(out_type)};
  read.check("row_stride");
  written.check("out_stride");
  Matrix{reinterpret_cast<uintptr_t>(p.grad), rows, 1, p.grad_stride, 4}.check("grad_stride");
  if (rows > 1 && p.out_stride < p.vocab)
    refuse("out_stride", "be at least vocab, got " + std::to_string(p.out_stride));
  const bool in_place =
      p.out == p.logits && type == out_type && (p.out_stride == p.row_stride || rows == 1);
  if (!empty && !in_place && read.overlaps(written)) {
    refuse("out", "be logits itself or lie apart from it, but they overlap");
  }
  const cudaStream_t stream = stream_handle(stream_);
  const int index = device_index(device);
  if (empty) return;
  const DeviceScope scope(index, "logits_logps_backward");
  run_logits_logps_backward(p, type, out_type, rows, softcap != 0.0, stream);
}

void bind_target_logits(const py::int_& hidden, const py::int_& dtype_tag, const py::int_& rows,
                        const py::int_& width, const py::int_& hidden_stride,
                        const py::int_& weight, const py::int_& vocab,
                        const py::int_& weight_stride, const py::int_& bias,
                        const py::int_& bias_dtype, const py::int_& labels, double scale,
                        double softcap, double temperature, const py::int_& out,
                        const py::int_& device, const py::int_& stream_) {
  const DType type = dtype(dtype_tag, "dtype");
  TargetLogitsParams p{};
  p.rows = integer(rows, "rows", 0, kMostBlocks);
  p.width = columns(width, "width");
  p.vocab = integer(vocab, "vocab", 1, kMostElements);
  p.hidden_stride = count(hidden_stride, "hidden_stride");
  p.weight_stride = count(weight_stride, "weight_stride");
  p.bias_dtype = dtype(bias_dtype, "bias_dtype");
  p.map = logit_map(scale, softcap, temperature);
  const bool empty = p.rows == 0;
  p.hidden = pointer<const void>(hidden, "hidden", size_of(type), empty);
  p.weight = pointer<const void>(weight, "weight", size_of(type), empty);
  p.bias = pointer<const void>(bias, "bias", size_of(p.bias_dtype), true);
  p.labels = array<const int64_t>(labels, "labels", empty);
  p.out = array<float>(out, "out", empty);
  Matrix{reinterpret_cast<uintptr_t>(p.hidden), p.rows, p.width, p.hidden_stride, size_of(type)}
      .check("hidden_stride");
  Matrix{reinterpret_cast<uintptr_t>(p.weight), p.vocab, p.width, p.weight_stride, size_of(type)}
      .check("weight_stride");
  const cudaStream_t stream = stream_handle(stream_);
  const int index = device_index(device);
  if (empty) return;
  const DeviceScope scope(index, "target_logits");
  run_target_logits(p, type, softcap != 0.0, stream);
}

// The last block's counter in 8 bytes, then pair_losses [pairs].
int64_t sequence_loss_workspace_bytes(const py::int_& pairs) {
  return 8 * (1 + integer(pairs, "pairs", 0, kMostBlocks));
}

void bind_sequence_loss(const py::int_& logps, const py::int_& rows, const py::int_& labels,
                        const py::int_& offsets, const py::int_& pairs, const py::int_& ref_logps,
                        double beta, double label_smoothing, bool average, bool interleaved,
                        const py::int_& loss, const py::int_& sequence_logps,
                        const py::int_& rewards, const py::int_& coefficients,
                        const py::int_& row_coefficients, const py::int_& workspace,
                        const py::int_& workspace_bytes, const py::int_& device,
                        const py::int_& stream_) {
  SequenceLossParams p{};
  p.rows = integer(rows, "rows", 0, kMostElements / 8);
  p.pairs = integer(pairs, "pairs", 0, kMostBlocks);
  if (!std::isfinite(beta)) refuse("beta", "be finite, got " + std::to_string(beta));
  if (!std::isfinite(label_smoothing))
    refuse("label_smoothing", "be finite, got " + std::to_string(label_smoothing));
  p.beta = beta;
  p.label_smoothing = label_smoothing;
  p.average = average;
  p.interleaved = interleaved;
  const bool empty = p.pairs == 0;
  p.logps = array<const float>(logps, "logps", p.rows == 0);
  p.labels = array<const int64_t>(labels, "labels", true);
  p.offsets = array<const int64_t>(offsets, "offsets", empty);
  p.ref_logps = array<const float>(ref_logps, "ref_logps", empty);
  p.loss = array<float>(loss, "loss");
  p.sequence_logps = array<float>(sequence_logps, "sequence_logps", empty);
  p.rewards = array<float>(rewards, "rewards", empty);
  p.coefficients = array<float>(coefficients, "coefficients", empty);
  p.row_coefficients = array<float>(row_coefficients, "row_coefficients", true);
  const int64_t needed = sequence_loss_workspace_bytes(pairs);
  if (count(workspace_bytes, "workspace_bytes") < needed) {
    refuse("workspace_bytes", "be at least " + std::to_string(needed) + ", got " +
                                  py::str(workspace_bytes).cast<std::string>());
  }
  char* memory = pointer<char>(workspace, "workspace", 8);
  p.counter = reinterpret_cast<unsigned*>(memory);
  p.pair_losses = reinterpret_cast<double*>(memory + 8);
  const cudaStream_t stream = stream_handle(stream_);
  const DeviceScope scope(device_index(device), "sequence_loss");
  run_sequence_loss(p, stream);
}

}  // namespace
}  // namespace fastdpo

PYBIND11_MODULE(FASTDPO_MODULE, m) {
  using namespace fastdpo;
  using py::arg;
  m.doc() =
      "CUDA kernels of fastdpo on raw device pointers (integers). See fastdpo/backends/cuda.py.";
  m.attr("FLOAT32") = static_cast<int>(DType::kFloat32);
  m.attr("BFLOAT16") = static_cast<int>(DType::kBFloat16);
  m.attr("FLOAT16") = static_cast<int>(DType::kFloat16);
  m.attr("CUDART_VERSION") = CUDART_VERSION;
  m.attr("SASS_ARCHITECTURES") = py::tuple(py::cast(sass_architectures()));
  m.attr("PTX_ARCHITECTURES") = py::tuple(py::cast(ptx_architectures()));

  m.def("check_architecture", &check_architecture, arg("major"), arg("minor"),
        "Raises ValueError unless this binary runs on the compute capability; says how to build "
        "one that does.");
  m.def("driver_version", &driver_version,
        "The newest CUDA version that the driver serves, 0 where there is none.");
  m.def("logits_logps_workspace_bytes", &logits_logps_workspace_bytes, py::kw_only(), arg("dtype"),
        arg("rows"), arg("vocab"), "The bytes of `workspace` that logits_logps needs.");
  m.def("sequence_loss_workspace_bytes", &sequence_loss_workspace_bytes, py::kw_only(),
        arg("pairs"), "The bytes of `workspace` that sequence_loss needs.");
  m.def("logits_logps", &bind_logits_logps, py::kw_only(), arg("logits"), arg("dtype"), arg("rows"),
        arg("vocab"), arg("row_stride"), arg("labels"), arg("scale"), arg("softcap"),
        arg("temperature"), arg("logps"), arg("lse"), arg("workspace"), arg("workspace_bytes"),
        arg("second_launch"), arg("device"), arg("stream"),
        "logps [rows] and lse [rows, 2] (float32) of logits [rows, vocab] and labels [rows] "
        "(int64). With second_launch the parts of a row are put together by a launch of their own "
        "instead of by the last block, to the same bits.");
  m.def("logits_logps_backward", &bind_logits_logps_backward, py::kw_only(), arg("logits"),
        arg("dtype"), arg("rows"), arg("vocab"), arg("row_stride"), arg("labels"), arg("lse"),
        arg("grad"), arg("grad_stride"), arg("grad_scale"), arg("scale"), arg("softcap"),
        arg("temperature"), arg("out"), arg("out_dtype"), arg("out_stride"), arg("device"),
        arg("stream"),
        "out [rows, vocab] = grad [rows] (· grad_scale [1] unless 0) · the gradient of "
        "logits_logps's logps.");
  m.def("target_logits", &bind_target_logits, py::kw_only(), arg("hidden"), arg("dtype"),
        arg("rows"), arg("width"), arg("hidden_stride"), arg("weight"), arg("vocab"),
        arg("weight_stride"), arg("bias"), arg("bias_dtype"), arg("labels"), arg("scale"),
        arg("softcap"), arg("temperature"), arg("out"), arg("device"), arg("stream"),
        "out [rows] (float32): the label's own logit, from hidden [rows, width] and weight [vocab, "
        "width].");
  m.def("sequence_loss", &bind_sequence_loss, py::kw_only(), arg("logps"), arg("rows"),
        arg("labels"), arg("offsets"), arg("pairs"), arg("ref_logps"), arg("beta"),
        arg("label_smoothing"), arg("average"), arg("interleaved"), arg("loss"),
        arg("sequence_logps"), arg("rewards"), arg("coefficients"), arg("row_coefficients"),
        arg("workspace"), arg("workspace_bytes"), arg("device"), arg("stream"),
        "The DPO sigmoid loss over `pairs` pairs of sequences of token logps; see "
        "csrc/sequence_loss.cuh.");
}
