// The operations on a GPU as torch sees them: schemas, checks, and tensors turned into pointers. A
// library of its own, so that the CPU operations load without CUDA. Nothing here waits for the
// device, and scratch memory comes from torch's allocator on the current stream, so that calls can
// be captured in a graph and run on several streams.
//
// Tests compile it with DTOKD_EMULATION, for CPU tensors and the emulation of CUDA: then it is
// called dtokd_emulated.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <functional>
#include <optional>
#include <string>
#include <tuple>

#include "cuda/launch.h"
#include "torch/checks.h"

namespace dtokd::ops {
namespace {

using Ints = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;

#ifdef DTOKD_EMULATION
#define DTOKD_LIBRARY(macro, ...) macro(dtokd_emulated, __VA_ARGS__)
#define DTOKD_KEY CPU
#else
#define DTOKD_LIBRARY(macro, ...) macro(dtokd_cuda, __VA_ARGS__)
#define DTOKD_KEY CUDA
#endif

// The device that a call runs on: the current one until the end of the scope, and its stream.
class Device {
 public:
#ifdef DTOKD_EMULATION
  explicit Device(const Tensor& like) : index_(like.get_device_index()) {}
#else
  explicit Device(const Tensor& like) : index_(like.get_device_index()), guard_(index_) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
  }
#endif
  void check(const Tensor& tensor, const char* op, const char* name) const {
    STD_TORCH_CHECK(tensor.get_device_index() == index_ && tensor.is_cpu() == is_cpu_, op, ": ",
                    name, " must be on the device of the first tensor, number ", index_);
  }

  cuda::Stream stream = nullptr;

 private:
  int32_t index_;
#ifdef DTOKD_EMULATION
  bool is_cpu_ = true;
#else
  bool is_cpu_ = false;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

void check_launch(int error, const char* op) {
  STD_TORCH_CHECK(error == 0, op, ": the launch failed: ", cuda::error_name(error));
}

// Tensors of one role that the same objectives reach: `count` of them.
struct GroupShape {
  int role;
  unsigned reach;  // bit i: objective i
  int64_t count;
};

std::vector<GroupShape> group_shapes(const Ints& counts, const Ints& roles, const Ints& reaches,
                                     const char* op) {
  STD_TORCH_CHECK(counts.size() == roles.size() && counts.size() == reaches.size(), op,
                  ": counts, roles and reaches must have one number for each group");
  std::vector<GroupShape> groups;
  for (size_t g = 0; g < counts.size(); ++g) {
    STD_TORCH_CHECK(roles[g] >= 0 && roles[g] < kRoles, op, ": roles[", g, "] is ", roles[g],
                    ", expected 0 to ", kRoles - 1);
    groups.push_back({int(roles[g]), unsigned(reaches[g]), counts[g]});
  }
  return groups;
}

// Checks that the tensors at one position lie in memory element by element alike.
struct Position {
  const char* op;
  const Tensor& like;
  bool contiguous;

  Position(const char* op, const Tensor& like)
      : op(op), like(like), contiguous(like.is_contiguous()) {
    DTOKD_CHECK_FIT(contiguous || is_dense(like), op, ": a tensor is not dense");
  }
  void check(const Tensor& tensor, const char* name, const Device& device) const {
    device.check(tensor, op, name);
    STD_TORCH_CHECK(tensor.numel() == like.numel(), op, ": ", name, " has ", tensor.numel(),
                    " elements, expected ", like.numel());
    DTOKD_CHECK_FIT(contiguous ? tensor.is_contiguous() : same_strides(tensor, like), op, ": ",
                    name, " is laid out otherwise");
  }
};

// The gradients of all groups. grads: group by group, in a group objective by objective of its
// reach. like: what they must be laid out as, one per tensor; empty: as the first of them.
std::vector<cuda::Gradients> gradients(const Tensors& grads, const std::vector<GroupShape>& groups,
                                       int K, const Tensors& like, const Device& device,
                                       const char* op) {
  std::vector<cuda::Gradients> result;
  size_t start = 0;
  for (const GroupShape& group : groups) {
    const int lists = __builtin_popcount(group.reach);
    STD_TORCH_CHECK(
        lists >= 1 && group.reach >> K == 0 && start + size_t(lists * group.count) <= grads.size(),
        op, ": grads does not hold what counts and reaches say");
    for (int64_t t = 0; t < group.count; ++t) {
      const Tensor& first = like.empty() ? grads[start + t] : like.at(result.size());
      const Position position(op, first);
      cuda::Gradients entry{type_of(first.scalar_type()), group.role, first.numel(), {}};
      size_t list = 0;
      for (int i = 0; i < K; ++i) {
        if (!(group.reach >> i & 1)) continue;
        const Tensor& g = grads[start + list++ * group.count + t];
        DTOKD_CHECK_FIT(g.scalar_type() == first.scalar_type(), op,
                        ": gradients have another dtype than their parameter");
        position.check(g, "grads", device);
        entry.of[i] = g.const_data_ptr();
      }
      result.push_back(entry);
    }
    start += lists * group.count;
  }
  STD_TORCH_CHECK(start == grads.size(), op, ": grads has ", grads.size(), " tensors, expected ",
                  start);
  return result;
}

int checked_K(int64_t K, const char* op) {
  STD_TORCH_CHECK(K >= 1 && K <= kMaxObjectives, op, ": ", K, " objectives, expected 1 to ",
                  kMaxObjectives);
  return int(K);
}

// Memory for one call. tickets: [cuda::kTickets] int32, zero when no launch that uses it runs.
struct CallScratch {
  Tensor partials;
  cuda::Scratch pointers;

  CallScratch(const Tensor& like, int64_t partials_size, const Tensor& tickets, const char* op)
      : partials(torch::stable::new_empty(like, {partials_size > 0 ? partials_size : 1},
                                          ScalarType::Double)) {
    STD_TORCH_CHECK(tickets.scalar_type() == ScalarType::Int && tickets.numel() == cuda::kTickets,
                    op, ": tickets must be ", cuda::kTickets, " int32 zeros");
    pointers = {static_cast<double*>(partials.mutable_data_ptr()),
                static_cast<unsigned*>(tickets.mutable_data_ptr())};
  }
};

Tensor gram_by_role(const Tensors& grads, const Ints& counts, const Ints& roles,
                    const Ints& reaches, int64_t objectives, const Tensor& tickets) {
  const char* op = "gram_by_role";
  const int K = checked_K(objectives, op);
  const Device device(grads.at(0));
  const auto lists = gradients(grads, group_shapes(counts, roles, reaches, op), K, {}, device, op);
  const CallScratch scratch(grads[0], cuda::scratch_size(lists, K), tickets, op);
  Tensor grams = torch::stable::new_empty(grads[0], {kRoles, K, K}, ScalarType::Double);
  check_launch(cuda::launch_gram(lists, K, scratch.pointers,
                                 static_cast<double*>(grams.mutable_data_ptr()), device.stream),
               op);
  return grams;
}

// The record of a balance: Gram matrices [kRoles, K, K], values and flags as write_record lays
// them out.
struct RecordTensors {
  Tensor grams, values, flags;

  RecordTensors(const Tensor& grams, int K)
      : grams(grams),
        values(torch::stable::new_empty(grams, {values_size(K)}, ScalarType::Double)),
        flags(torch::stable::new_empty(grams, {2}, ScalarType::Bool)) {}
  cuda::Record pointers() const {
    return {static_cast<double*>(grams.mutable_data_ptr()),
            static_cast<double*>(values.mutable_data_ptr()),
            static_cast<bool*>(flags.mutable_data_ptr())};
  }
};

std::tuple<Tensor, Tensor, Tensor> gram_balance(const Tensors& grads, const Ints& counts,
                                                const Ints& roles, const Ints& reaches,
                                                int64_t objectives, const Tensor& losses,
                                                bool log_gradients, bool clamp, bool rescale_sum,
                                                double max_norm, double loss_floor,
                                                const Tensor& tickets) {
  const char* op = "gram_balance";
  const int K = checked_K(objectives, op);
  const Device device(grads.at(0));
  device.check(losses, op, "losses");
  const auto lists = gradients(grads, group_shapes(counts, roles, reaches, op), K, {}, device, op);
  const CallScratch scratch(grads[0], cuda::scratch_size(lists, K), tickets, op);
  const RecordTensors record(torch::stable::new_empty(grads[0], {kRoles, K, K}, ScalarType::Double),
                             K);
  const BalanceOptions options{log_gradients, clamp, rescale_sum, max_norm, loss_floor};
  check_launch(cuda::launch_gram_balance(lists, K, doubles(losses, K, op, "losses"), options,
                                         scratch.pointers, record.pointers(), device.stream),
               op);
  return {record.grams, record.values, record.flags};
}

std::tuple<Tensor, Tensor> balance_by_role(const Tensor& grams, const Tensor& losses,
                                           const std::optional<Tensor>& weights, bool log_gradients,
                                           bool clamp, bool rescale_sum, double max_norm,
                                           double loss_floor) {
  const char* op = "balance_by_role";
  const int K = checked_K(losses.numel(), op);
  doubles(grams, kRoles * K * K, op, "grams");
  const Device device(grams);
  device.check(losses, op, "losses");
  if (weights) device.check(*weights, op, "weights");
  const RecordTensors record(grams, K);
  const BalanceOptions options{log_gradients, clamp, rescale_sum, max_norm, loss_floor};
  check_launch(cuda::launch_balance(K, doubles(losses, K, op, "losses"),
                                    weights ? doubles(*weights, K, op, "weights") : nullptr,
                                    options, record.pointers(), device.stream),
               op);
  return {record.values, record.flags};
}

Tensor min_norm_weights(const Tensor& gram, bool clamp, const std::optional<Tensor>& present) {
  const char* op = "min_norm_weights";
  const int K = objectives_of(gram, op);
  const Device device(gram);
  const bool* flags = nullptr;
  if (present) {
    device.check(*present, op, "present");
    STD_TORCH_CHECK(present->scalar_type() == ScalarType::Bool && present->numel() == K &&
                        present->is_contiguous(),
                    "min_norm_weights: present must be [K] bool");
    flags = static_cast<const bool*>(present->const_data_ptr());
  }
  Tensor out = torch::stable::new_empty(gram, {K}, ScalarType::Double);
  check_launch(
      cuda::launch_min_norm_weights(doubles(gram, K * K, op, "gram"), K, flags, clamp,
                                    static_cast<double*>(out.mutable_data_ptr()), device.stream),
      op);
  return out;
}

void combine_(const Tensors& out, const Tensors& grads, const Tensor& coefficients) {
  if (out.empty()) return;
  const char* op = "combine_";
  const int K = checked_K(coefficients.numel(), op);
  const Device device(out[0]);
  device.check(coefficients, op, "coefficients");
  const std::vector<GroupShape> all{{kShared, (1u << K) - 1, int64_t(out.size())}};
  const auto lists = gradients(grads, all, K, out, device, op);
  std::vector<void*> targets;
  for (const Tensor& tensor : out) {
    device.check(tensor, op, "out");
    targets.push_back(tensor.mutable_data_ptr());
  }
  check_launch(cuda::launch_combine(lists, targets,
                                    {K, doubles(coefficients, K, op, "coefficients"), nullptr},
                                    device.stream),
               op);
}

const double* options_of(const std::vector<double>& options, size_t group, size_t count,
                         size_t groups, const char* op) {
  STD_TORCH_CHECK(options.size() == count * groups, op, ": options has ", options.size(),
                  " numbers, expected ", count, " for each of ", groups, " groups");
  return options.data() + group * count;
}

// What the updates of several groups have in common. Options come as numbers, so many for each
// group; option 0 is lr, option 1 the index of a tensor in `lrs` to read it from, or -1.
struct Updates {
  const char* op;
  const Tensor first;
  const Device device;
  std::vector<GroupShape> groups;
  cuda::Direction direction;
  std::vector<cuda::Target> targets;

  Updates(const char* op, const Tensors& params, const Tensors& grads, const Ints& counts,
          const Ints& roles, const Ints& reaches, const Tensor& table, const Tensor& skipped)
      : Updates(op, params, grads, counts, roles, reaches, checked_K(table.numel() / kRoles, op)) {
    device.check(table, op, "table");
    device.check(skipped, op, "skipped");
    STD_TORCH_CHECK(skipped.scalar_type() == ScalarType::Bool && skipped.numel() == 1, op,
                    ": skipped must be one bool");
    direction.coefficients = doubles(table, kRoles * direction.K, op, "table");
    direction.skipped = static_cast<const bool*>(skipped.const_data_ptr());
  }

  // For a launch that decides the direction itself.
  Updates(const char* op, const Tensors& params, const Tensors& grads, const Ints& counts,
          const Ints& roles, const Ints& reaches, int K)
      : op(op),
        first(params.at(0)),
        device(first),
        groups(group_shapes(counts, roles, reaches, op)),
        direction{K, nullptr, nullptr} {
    const auto lists = gradients(grads, groups, K, params, device, op);
    STD_TORCH_CHECK(lists.size() == params.size(), op, ": params has ", params.size(),
                    " tensors, expected ", lists.size());
    targets.resize(params.size());
    size_t t = 0;
    for (size_t g = 0; g < groups.size(); ++g) {
      for (int64_t i = 0; i < groups[g].count; ++i, ++t) {
        targets[t] = {};
        targets[t].grads = lists[t];
        targets[t].state_type = lists[t].type;
        device.check(params[t], op, "params");
        targets[t].param = params[t].mutable_data_ptr();
        targets[t].group = int(g);
      }
    }
  }

  // Attaches one kind of state to the tensors of those groups that have it.
  template <class Has, class Attach>
  void attach(const Tensors& params, const Tensors& state, const char* name, const Has& has,
              const Attach& attach) {
    size_t next = 0, t = 0;
    for (size_t g = 0; g < groups.size(); ++g) {
      for (int64_t i = 0; i < groups[g].count; ++i, ++t) {
        if (!has(g)) continue;
        STD_TORCH_CHECK(next < state.size(), op, ": ", name, " has ", state.size(),
                        " tensors, expected more");
        const Tensor& tensor = state[next++];
        Position(op, params[t]).check(tensor, name, device);
        attach(targets[t], tensor);
      }
    }
    STD_TORCH_CHECK(next == state.size(), op, ": ", name, " has ", state.size(),
                    " tensors, expected ", next);
  }

  void attach_state(const Tensors& params, const Tensors& state, int slot, const char* name,
                    const std::function<bool(size_t)>& has) {
    attach(params, state, name, has, [&](cuda::Target& target, const Tensor& tensor) {
      const Type type = type_of(tensor.scalar_type());
      DTOKD_CHECK_FIT(slot == 0 || type == target.state_type, op,
                      ": the states of a tensor have several dtypes");
      const Type own = target.grads.type;
      DTOKD_CHECK_FIT(type == own || (type == Type::kFloat32 && size_of(own) == 2) ||
                          (type == Type::kBFloat16 && own == Type::kFloat32),
                      op, ": no kernel has this dtype of state beside this dtype of parameter");
      target.state_type = type;
      target.state[slot] = tensor.mutable_data_ptr();
    });
  }

  void attach_masters(const Tensors& params, const Tensors& masters,
                      const std::function<bool(size_t)>& has) {
    attach(params, masters, "masters", has, [&](cuda::Target& target, const Tensor& tensor) {
      DTOKD_CHECK_FIT(tensor.scalar_type() == ScalarType::Float && size_of(target.grads.type) == 2,
                      op, ": a master copy is float32, beside a half-precision parameter");
      target.master = static_cast<float*>(tensor.mutable_data_ptr());
    });
  }

  cuda::LearningRate lr(const double* options, const Tensors& lrs) const {
    cuda::LearningRate rate{options[0]};
    const int64_t index = int64_t(options[1]);
    if (index < 0) return rate;
    const Tensor& tensor = lrs.at(index);
    device.check(tensor, op, "lrs");
    rate.type = type_of(tensor.scalar_type());
    STD_TORCH_CHECK(tensor.numel() == 1 && size_of(rate.type) >= 4, op,
                    ": lr must be a float32 or float64 scalar");
    rate.device = tensor.const_data_ptr();
    return rate;
  }

  // What a launch needs that also takes the Gram matrices.
  CallScratch scratch(const Tensor& tickets) const {
    std::vector<cuda::Gradients> lists;
    for (const cuda::Target& target : targets) lists.push_back(target.grads);
    return {first, cuda::scratch_size(lists, direction.K), tickets, op};
  }
  Tensor new_grams() const {
    return torch::stable::new_empty(first, {kRoles, direction.K, direction.K}, ScalarType::Double);
  }

  // Attaches AdamW's state; returns what the groups' options say.
  std::vector<cuda::AdamWGroup> adamw(const Tensors& params, const Tensors& exp_avgs,
                                      const Tensors& exp_avg_sqs, const Tensors& max_exp_avg_sqs,
                                      const Tensors& state_steps, const Tensors& masters,
                                      const Tensors& lrs, const std::vector<double>& options) {
    const size_t G = groups.size();
    const auto option = [&](size_t g) { return options_of(options, g, 9, G, op); };
    const auto every = [](size_t) { return true; };
    attach_state(params, exp_avgs, 0, "exp_avgs", every);
    attach_state(params, exp_avg_sqs, 1, "exp_avg_sqs", every);
    attach_state(params, max_exp_avg_sqs, 2, "max_exp_avg_sqs",
                 [&](size_t g) { return option(g)[7] != 0; });
    attach_masters(params, masters, [&](size_t g) { return option(g)[8] != 0; });
    STD_TORCH_CHECK(state_steps.size() == params.size(), op,
                    ": state_steps must hold one scalar for each of params");
    for (size_t t = 0; t < params.size(); ++t) {
      device.check(state_steps[t], op, "state_steps");
      DTOKD_CHECK_FIT(
          state_steps[t].numel() == 1 && state_steps[t].scalar_type() == ScalarType::Float, op,
          ": state_steps must hold float32 scalars");
      targets[t].step = static_cast<float*>(state_steps[t].mutable_data_ptr());
    }
    std::vector<cuda::AdamWGroup> result;
    for (size_t g = 0; g < G; ++g) {
      const double* o = option(g);
      result.push_back({lr(o, lrs), o[2], o[3], o[4], o[5], o[6] != 0});
    }
    return result;
  }
};

// The updates of adamw_updates_ and gram_adamw_updates_, until they are launched.
struct AdamWUpdates : Updates {
  std::vector<cuda::AdamWGroup> numbers;

  AdamWUpdates(const char* op, const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
               const Tensors& exp_avg_sqs, const Tensors& max_exp_avg_sqs,
               const Tensors& state_steps, const Tensors& masters, const Ints& counts,
               const Ints& roles, const Ints& reaches, const Tensor& table, const Tensor& skipped,
               const Tensors& lrs, const std::vector<double>& options)
      : Updates(op, params, grads, counts, roles, reaches, table, skipped),
        numbers(adamw(params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, masters, lrs,
                      options)) {}
};

void adamw_updates_(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
                    const Tensors& exp_avg_sqs, const Tensors& max_exp_avg_sqs,
                    const Tensors& state_steps, const Tensors& masters, const Ints& counts,
                    const Ints& roles, const Ints& reaches, const Tensor& table,
                    const Tensor& skipped, const Tensors& lrs, const std::vector<double>& options,
                    const Tensor& tickets) {
  const char* op = "adamw_updates_";
  const AdamWUpdates updates(op, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps,
                             masters, counts, roles, reaches, table, skipped, lrs, options);
  const CallScratch scratch(params[0], 0, tickets, op);
  check_launch(cuda::launch_adamw(updates.targets, updates.numbers, updates.direction,
                                  scratch.pointers, updates.device.stream),
               op);
}

// The same, and the Gram matrices of the gradients from the same pass: [kRoles, K, K].
Tensor gram_adamw_updates_(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
                           const Tensors& exp_avg_sqs, const Tensors& max_exp_avg_sqs,
                           const Tensors& state_steps, const Tensors& masters, const Ints& counts,
                           const Ints& roles, const Ints& reaches, const Tensor& table,
                           const Tensor& skipped, const Tensors& lrs,
                           const std::vector<double>& options, const Tensor& tickets) {
  const char* op = "gram_adamw_updates_";
  const AdamWUpdates updates(op, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps,
                             masters, counts, roles, reaches, table, skipped, lrs, options);
  const CallScratch scratch = updates.scratch(tickets);
  const Tensor grams = updates.new_grams();
  check_launch(cuda::launch_gram_adamw(
                   updates.targets, updates.numbers, updates.direction, scratch.pointers,
                   static_cast<double*>(grams.mutable_data_ptr()), updates.device.stream),
               op);
  return grams;
}

// gram_balance and adamw_updates_ in one launch. -> grams, values, flags; empty tensors, with
// nothing changed, where no such launch fits.
std::tuple<Tensor, Tensor, Tensor> resident_adamw_(
    const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
    const Tensors& exp_avg_sqs, const Tensors& state_steps, const Ints& counts, const Ints& roles,
    const Ints& reaches, const Tensor& losses, bool log_gradients, bool clamp, bool rescale_sum,
    double max_norm, double loss_floor, const Tensors& lrs, const std::vector<double>& options,
    const Tensor& tickets) {
  const char* op = "resident_adamw_";
  const int K = checked_K(losses.numel(), op);
  Updates updates(op, params, grads, counts, roles, reaches, K);
  const RecordTensors record(updates.new_grams(), K);
  updates.device.check(losses, op, "losses");
  const std::vector<cuda::AdamWGroup> groups =
      updates.adamw(params, exp_avgs, exp_avg_sqs, {}, state_steps, {}, lrs, options);
  const CallScratch scratch = updates.scratch(tickets);
  const BalanceOptions balance{log_gradients, clamp, rescale_sum, max_norm, loss_floor};
  const int error = cuda::launch_resident_adamw(
      updates.targets, groups, K, doubles(losses, K, op, "losses"), balance, scratch.pointers,
      record.pointers(), updates.device.stream);
  if (error == cuda::kUnfit) {
    const auto none = [&] { return torch::stable::new_empty(losses, {0}, ScalarType::Double); };
    return {none(), none(), none()};
  }
  check_launch(error, op);
  return {record.grams, record.values, record.flags};
}

// The updates of sgd_updates_ and gram_sgd_updates_, until they are launched.
struct SGDUpdates : Updates {
  std::vector<cuda::SGDGroup> numbers;

  SGDUpdates(const char* op, const Tensors& params, const Tensors& grads,
             const Tensors& momentum_buffers, const Tensors& masters, const Ints& counts,
             const Ints& roles, const Ints& reaches, const Tensor& table, const Tensor& skipped,
             const Tensors& lrs, const std::vector<double>& options)
      : Updates(op, params, grads, counts, roles, reaches, table, skipped) {
    const auto option = [&](size_t g) { return options_of(options, g, 9, groups.size(), op); };
    attach_state(params, momentum_buffers, 0, "momentum_buffers",
                 [&](size_t g) { return option(g)[2] != 0; });
    attach_masters(params, masters, [&](size_t g) { return option(g)[8] != 0; });
    for (size_t g = 0; g < groups.size(); ++g) {
      const double* o = option(g);
      numbers.push_back({lr(o, lrs), o[2], o[3], o[4], o[5] != 0, o[6] != 0, o[7] != 0});
    }
  }
};

void sgd_updates_(const Tensors& params, const Tensors& grads, const Tensors& momentum_buffers,
                  const Tensors& masters, const Ints& counts, const Ints& roles,
                  const Ints& reaches, const Tensor& table, const Tensor& skipped,
                  const Tensors& lrs, const std::vector<double>& options) {
  const char* op = "sgd_updates_";
  const SGDUpdates updates(op, params, grads, momentum_buffers, masters, counts, roles, reaches,
                           table, skipped, lrs, options);
  check_launch(
      cuda::launch_sgd(updates.targets, updates.numbers, updates.direction, updates.device.stream),
      op);
}

// The same, and the Gram matrices of the gradients from the same pass: [kRoles, K, K].
Tensor gram_sgd_updates_(const Tensors& params, const Tensors& grads,
                         const Tensors& momentum_buffers, const Tensors& masters,
                         const Ints& counts, const Ints& roles, const Ints& reaches,
                         const Tensor& table, const Tensor& skipped, const Tensors& lrs,
                         const std::vector<double>& options, const Tensor& tickets) {
  const char* op = "gram_sgd_updates_";
  const SGDUpdates updates(op, params, grads, momentum_buffers, masters, counts, roles, reaches,
                           table, skipped, lrs, options);
  const CallScratch scratch = updates.scratch(tickets);
  const Tensor grams = updates.new_grams();
  check_launch(
      cuda::launch_gram_sgd(updates.targets, updates.numbers, updates.direction, scratch.pointers,
                            static_cast<double*>(grams.mutable_data_ptr()), updates.device.stream),
      op);
  return grams;
}

}  // namespace

DTOKD_LIBRARY(STABLE_TORCH_LIBRARY, m) {
  m.def("min_norm_weights(Tensor gram, bool clamp, Tensor? present) -> Tensor");
  m.def("combine_(Tensor(a!)[] out, Tensor[] grads, Tensor coefficients) -> ()");
  m.def(
      "gram_by_role(Tensor[] grads, int[] counts, int[] roles, int[] reaches, int K, "
      "Tensor(a!) tickets) -> Tensor");
  m.def(
      "gram_balance(Tensor[] grads, int[] counts, int[] roles, int[] reaches, int K, "
      "Tensor losses, bool log_gradients, bool clamp, bool rescale_sum, float max_norm, "
      "float loss_floor, Tensor(a!) tickets) -> (Tensor, Tensor, Tensor)");
  m.def(
      "balance_by_role(Tensor grams, Tensor losses, Tensor? weights, bool log_gradients, "
      "bool clamp, bool rescale_sum, float max_norm, float loss_floor) -> (Tensor, Tensor)");
  m.def(
      "adamw_updates_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] state_steps, "
      "Tensor(f!)[] masters, int[] counts, int[] roles, int[] reaches, Tensor table, "
      "Tensor skipped, Tensor[] lrs, float[] options, Tensor(g!) tickets) -> ()");
  m.def(
      "gram_adamw_updates_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] state_steps, "
      "Tensor(f!)[] masters, int[] counts, int[] roles, int[] reaches, Tensor table, "
      "Tensor skipped, Tensor[] lrs, float[] options, Tensor(g!) tickets) -> Tensor");
  m.def(
      "resident_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] state_steps, int[] counts, int[] roles, "
      "int[] reaches, Tensor losses, bool log_gradients, bool clamp, bool rescale_sum, "
      "float max_norm, float loss_floor, Tensor[] lrs, float[] options, Tensor(e!) tickets) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "sgd_updates_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
      "Tensor(c!)[] masters, int[] counts, int[] roles, int[] reaches, Tensor table, "
      "Tensor skipped, Tensor[] lrs, float[] options) -> ()");
  m.def(
      "gram_sgd_updates_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
      "Tensor(c!)[] masters, int[] counts, int[] roles, int[] reaches, Tensor table, "
      "Tensor skipped, Tensor[] lrs, float[] options, Tensor(d!) tickets) -> Tensor");
}

DTOKD_LIBRARY(STABLE_TORCH_LIBRARY_IMPL, DTOKD_KEY, m) {
  m.impl("gram_by_role", TORCH_BOX(&gram_by_role));
  m.impl("gram_balance", TORCH_BOX(&gram_balance));
  m.impl("balance_by_role", TORCH_BOX(&balance_by_role));
  m.impl("min_norm_weights", TORCH_BOX(&min_norm_weights));
  m.impl("combine_", TORCH_BOX(&combine_));
  m.impl("adamw_updates_", TORCH_BOX(&adamw_updates_));
  m.impl("gram_adamw_updates_", TORCH_BOX(&gram_adamw_updates_));
  m.impl("resident_adamw_", TORCH_BOX(&resident_adamw_));
  m.impl("sgd_updates_", TORCH_BOX(&sgd_updates_));
  m.impl("gram_sgd_updates_", TORCH_BOX(&gram_sgd_updates_));
}

}  // namespace dtokd::ops
