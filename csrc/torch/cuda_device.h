// What the operations on a GPU share. Nothing here waits for the device, and scratch memory comes
// from torch's allocator on the current stream, so that calls can be captured in a graph and run on
// several streams.
//
// Tests compile them with DTOKD_EMULATION, for CPU tensors and the emulation of CUDA: then they
// belong to the namespace dtokd_emulated.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>

#include "cuda/launch.h"
#include "torch/layout.h"

#ifdef DTOKD_EMULATION
#define DTOKD_CUDA_OPERATIONS(m) STABLE_TORCH_LIBRARY_IMPL(dtokd_emulated, CPU, m)
#else
#define DTOKD_CUDA_OPERATIONS(m) STABLE_TORCH_LIBRARY_IMPL(dtokd, CUDA, m)
#endif

namespace dtokd::ops {

// The device that a call runs on: the current one until the end of the scope, and its stream.
class Device : public Place {
 public:
#ifdef DTOKD_EMULATION
  explicit Device(const Tensor& like) : Place(like) {}
#else
  explicit Device(const Tensor& like) : Place(like), guard_(index) {
    check_code(aoti_torch_get_current_cuda_stream(index, &stream));
  }
#endif

  cuda::Stream stream = nullptr;

#ifndef DTOKD_EMULATION
 private:
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

inline void check_launch(int error, const char* op) {
  DTOKD_CHECK(error == 0, op, ": the launch failed: ", cuda::error_name(error));
}

// Memory for one call. tickets: [cuda::kTickets] int32, zero when no launch that uses it runs.
struct CallScratch {
  Tensor partials;
  cuda::Scratch pointers;

  CallScratch(const Tensor& like, int64_t size, const std::optional<Tensor>& tickets,
              const char* op)
      : partials(torch::stable::new_empty(like, {size > 0 ? size : 1}, ScalarType::Double)) {
    DTOKD_CHECK(
        tickets && tickets->scalar_type() == ScalarType::Int && tickets->numel() == cuda::kTickets,
        op, ": tickets must be ", cuda::kTickets, " int32 zeros");
    pointers = {static_cast<double*>(partials.mutable_data_ptr()),
                static_cast<unsigned*>(tickets->mutable_data_ptr())};
  }
};

inline cuda::Record pointers_of(const RecordTensors& record) {
  return {record.grams_pointer(), record.values_pointer(), record.flags_pointer()};
}

}  // namespace dtokd::ops
