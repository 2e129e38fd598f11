// The operations on a GPU, as launches over raw pointers. Every pointer named "device" is read or
// written by the device only: nothing here waits for it, allocates or copies, so that all of it can
// be captured in a graph. Launches return a cudaError_t, 0 for success.
#pragma once

#include <cstdint>
#include <vector>

#include "dtokd/balance.h"
#include "dtokd/numbers.h"
#include "dtokd/rows.h"

namespace dtokd::cuda {

using Stream = void*;  // a cudaStream_t

const char* error_name(int error);

using Gradients = GradientRow;
using Target = UpdateRow;

// Device memory that launches need. Two launches that share it must not run at the same time: give
// each stream its own. partials: scratch_size(...) doubles, any content. tickets: kTickets words,
// zero before the first launch; every launch leaves them zero.
constexpr int kTickets = 4;
struct Scratch {
  double* partials;
  unsigned* tickets;
};
int64_t scratch_size(const std::vector<Gradients>&, int K);

// Where the results of a balance go, all on the device. grams: [kRoles, K, K] of raw gradients;
// values: [values_size(K)] as write_record lays them out; flags: [2], vertex and skipped.
struct Record {
  double* grams;
  double* values;
  bool* flags;
};

// grams: device, [kRoles, K, K]. The bits depend on K, types, sizes and order of the tensors only,
// and on whether the code for the GPU takes sums in parts (parts.cuh).
int launch_gram(const std::vector<Gradients>&, int K, const Scratch&, double* grams, Stream);

// The same, then DTO-KD's weights and all that follows from them. losses: device, [K].
int launch_gram_balance(const std::vector<Gradients>&, int K, const double* losses,
                        const BalanceOptions&, const Scratch&, const Record&, Stream);

// From the Gram matrices in record.grams. weights: device, [K], or null for DTO-KD's. What
// Earlier points to is on the device; {} if the matrices are this step's.
int launch_balance(int K, const double* losses, const double* weights, const Earlier&,
                   const BalanceOptions&, const Record&, Stream);

// gram: device, [K, K]; present: device, [K], or null for all; weights: device, [K].
int launch_min_norm_weights(const double* gram, int K, const bool* present, bool clamp,
                            double* weights, Stream);

// What an update descends: coefficients: device, [kRoles, K], or [1, K] if every role is kShared;
// skipped: device, one bool: nothing changes where it is set; null for never.
struct Direction {
  int K;
  const double* coefficients;
  const bool* skipped;
};

// out: device, one per tensor, may be one of its gradients.
int launch_combine(const std::vector<Gradients>&, const std::vector<void*>& out, const Direction&,
                   Stream);

// rule: a RuleNumber. State is of the gradients' type, or float32 beside half types, or bfloat16
// beside float32. Many groups, one launch; more than one for several types or very many tensors.
int launch_update(int rule, const std::vector<Target>&, const std::vector<Group>&, const Direction&,
                  const Scratch&, Stream);

// The update and, in the same pass, the Gram matrices of the gradients: grams: device,
// [kRoles, K, K], also where the step is skipped. All gradients are read.
int launch_gram_update(int rule, const std::vector<Target>&, const std::vector<Group>&,
                       const Direction&, const Scratch&, double* grams, Stream);

// launch_gram_balance and AdamW's launch_update in one launch, with the same bits, that keeps the
// gradients on the chip between the two. For small models: K <= 2, one combination of types, at
// most kMaxWholeChunks whole tiles (plan.h); K's coefficients come from the record. Returns kUnfit,
// with nothing launched, if that or the device does not allow it.
constexpr int kUnfit = -1;
int launch_resident_adamw(const std::vector<Target>&, const std::vector<Group>&, int K,
                          const double* losses, const BalanceOptions&, const Scratch&,
                          const Record&, Stream);

}  // namespace dtokd::cuda
