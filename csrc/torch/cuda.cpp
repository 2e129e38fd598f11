// The operations on a GPU, and whole steps in one launch. Nothing here waits for the device, and
// scratch memory comes from torch's allocator on the current stream, so that calls can be captured
// in a graph and run on several streams.
//
// Tests compile this with DTOKD_EMULATION, for CPU tensors and the emulation of CUDA: then it
// belongs to the namespace dtokd_emulated.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/launch.h"
#include "torch/operations.h"

namespace dtokd::ops {
namespace {

using Rows = std::vector<GradientRow>;

// The device that a call runs on: the current one until the end of the scope, and its stream.
struct Cuda : Place {
  const Tensor like;
  const char* op;
  const std::optional<Tensor> tickets;
  cuda::Stream stream = nullptr;

#ifdef DTOKD_EMULATION
  Cuda(const Tensor& like, const char* op, const std::optional<Tensor>& tickets)
      : Place(like), like(like), op(op), tickets(tickets) {}
#else
  torch::stable::accelerator::DeviceGuard guard;

  Cuda(const Tensor& like, const char* op, const std::optional<Tensor>& tickets)
      : Place(like), like(like), op(op), tickets(tickets), guard(index) {
    check_code(aoti_torch_get_current_cuda_stream(index, &stream));
  }
#endif

  void launched(int error) const {
    DTOKD_CHECK(error == 0, op, ": the launch failed: ", cuda::error_name(error));
  }

  // Memory for the call.
  struct Scratch {
    const Tensor partials;
    const cuda::Scratch pointers;
  };

  // size: of the partial sums. The tickets are [cuda::kTickets] int32, zero when no launch that
  // uses them runs.
  Scratch scratch(int64_t size) const {
    DTOKD_CHECK(
        tickets && tickets->scalar_type() == ScalarType::Int && tickets->numel() == cuda::kTickets,
        op, ": tickets must be ", cuda::kTickets, " int32 zeros");
    Tensor partials = torch::stable::new_empty(like, {size > 0 ? size : 1}, ScalarType::Double);
    return {partials,
            {static_cast<double*>(partials.mutable_data_ptr()),
             static_cast<unsigned*>(tickets->mutable_data_ptr())}};
  }

  static cuda::Record pointers_of(const RecordTensors& record) {
    return {record.grams_pointer(), record.values_pointer(), record.flags_pointer()};
  }

  void gram(const Rows& rows, int K, double* grams) const {
    const Scratch memory = scratch(cuda::scratch_size(rows, K));
    launched(cuda::launch_gram(rows, K, memory.pointers, grams, stream));
  }

  void combine(const Rows& rows, int K, const double* table,
               const std::vector<void*>& targets) const {
    launched(cuda::launch_combine(rows, targets, {K, table, nullptr}, stream));
  }

  void min_norm_weights(const double* gram, int K, const bool* present, bool clamp,
                        double* out) const {
    launched(cuda::launch_min_norm_weights(gram, K, present, clamp, out, stream));
  }

  void balance(int K, const double* losses, const double* weights, const Earlier& earlier,
               const BalanceOptions& options, const RecordTensors& record) const {
    launched(
        cuda::launch_balance(K, losses, weights, earlier, options, pointers_of(record), stream));
  }

  void gram_balance(const Rows& rows, int K, const double* losses, const BalanceOptions& options,
                    const RecordTensors& record) const {
    const Scratch memory = scratch(cuda::scratch_size(rows, K));
    launched(cuda::launch_gram_balance(rows, K, losses, options, memory.pointers,
                                       pointers_of(record), stream));
  }

  void update(const Operations<Cuda>::Update& update, int K, const double* table, const bool* skips,
              double* grams) const {
    const Rows& gradients = update.gradients->rows;
    const Scratch memory = scratch(grams ? cuda::scratch_size(gradients, K) : 0);
    const int rule = update.plan->rule;
    const cuda::Direction direction{K, table, skips};
    launched(grams ? cuda::launch_gram_update(rule, update.rows, update.groups, direction,
                                              memory.pointers, grams, stream)
                   : cuda::launch_update(rule, update.rows, update.groups, direction,
                                         memory.pointers, stream));
  }
};

// gram_balance and AdamW's update_ in one launch. -> grams, values, flags; empty tensors, with
// nothing changed, where no such launch fits.
std::tuple<Tensor, Tensor, Tensor> resident_(int64_t prepared, const TensorList& grads,
                                             const Tensor& losses, bool log_gradients, bool clamp,
                                             bool rescale_sum, double max_norm, double loss_floor,
                                             double limit, const TensorList& lrs, Ints lr_of,
                                             std::vector<double> numbers,
                                             std::optional<Tensor> tickets) {
  const char* op = "resident_";
  const int K = checked_K(losses.numel(), op);
  const Operations<Cuda>::Update update(prepared, grads, K, lrs, lr_of, numbers, tickets, op);
  const Cuda& device = update.backend;
  device.check(losses, op, "losses");
  const RecordTensors record(new_grams(update.first, K), K);
  const Cuda::Scratch memory = device.scratch(cuda::scratch_size(update.gradients->rows, K));
  const int error = update.plan->rule != kAdamW
                        ? cuda::kUnfit
                        : cuda::launch_resident_adamw(
                              update.rows, update.groups, K, doubles(losses, K, op, "losses"),
                              {log_gradients, clamp, rescale_sum, max_norm, loss_floor, limit},
                              memory.pointers, Cuda::pointers_of(record), device.stream);
  if (error == cuda::kUnfit) {
    const auto none = [&] { return torch::stable::new_empty(losses, {0}, ScalarType::Double); };
    return {none(), none(), none()};
  }
  device.launched(error);
  return {record.grams, record.values, record.flags};
}

void implement(torch::stable::detail::StableLibrary& m) {
  Operations<Cuda>::implement(m);
  m.impl("resident_", TORCH_BOX(&WithLists<&resident_>::call));
}

}  // namespace

#ifdef DTOKD_EMULATION
STABLE_TORCH_LIBRARY_IMPL(dtokd_emulated, CPU, m) { implement(m); }
#else
STABLE_TORCH_LIBRARY_IMPL(dtokd, CUDA, m) { implement(m); }
#endif

}  // namespace dtokd::ops
