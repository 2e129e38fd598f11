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
#include "torch/tensor_list.h"

namespace dtokd::ops {
namespace {

using Ints = std::vector<int64_t>;

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
    check_code(aoti_torch_get_current_cuda_stream(index_, &stream));
  }
#endif
  void check(const Tensor& tensor, const char* op, const char* name) const {
    check(ListedTensor(tensor.get()), op, name);
  }
  void check(ListedTensor tensor, const char* op, const char* name) const {
    DTOKD_CHECK(tensor.device_index() == index_ && tensor.device_type() == type_, op, ": ", name,
                " must be on the device of the first tensor, number ", index_);
  }

  cuda::Stream stream = nullptr;

 private:
  int32_t index_;
#ifdef DTOKD_EMULATION
  int32_t type_ = aoti_torch_device_type_cpu();
#else
  int32_t type_ = aoti_torch_device_type_cuda();
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

void check_launch(int error, const char* op) {
  DTOKD_CHECK(error == 0, op, ": the launch failed: ", cuda::error_name(error));
}

// Tensors of one role that the same objectives reach: `count` of them.
struct GroupShape {
  int role;
  unsigned reach;  // bit i: objective i
  int64_t count;
};

std::vector<GroupShape> group_shapes(const Ints& counts, const Ints& roles, const Ints& reaches,
                                     const char* op) {
  DTOKD_CHECK(counts.size() == roles.size() && counts.size() == reaches.size(), op,
              ": counts, roles and reaches must have one number for each group");
  std::vector<GroupShape> groups;
  for (size_t g = 0; g < counts.size(); ++g) {
    DTOKD_CHECK(roles[g] >= 0 && roles[g] < kRoles, op, ": roles[", g, "] is ", roles[g],
                ", expected 0 to ", kRoles - 1);
    groups.push_back({int(roles[g]), unsigned(reaches[g]), counts[g]});
  }
  return groups;
}

// What the tensors at one position have in common: they lie in memory element by element alike.
struct Position {
  ListedTensor like;
  int64_t size;
  int32_t dtype;
  bool contiguous;

  Position(ListedTensor like, const char* op)
      : like(like), size(like.numel()), dtype(like.dtype()), contiguous(like.is_contiguous()) {
    DTOKD_CHECK_FIT(contiguous || is_dense(like), op, ": a tensor is not dense");
  }
  // t: its place in the list `name`.
  void check(ListedTensor tensor, const char* op, const char* name, size_t t,
             const Device& device) const {
    device.check(tensor, op, name);
    DTOKD_CHECK_SHAPE(tensor, like, op, name, t);
    DTOKD_CHECK_FIT(contiguous ? tensor.is_contiguous() : same_strides(tensor, like), op, ": ",
                    name, " is laid out otherwise");
  }
};

// The gradients of all groups, and the positions that they belong to.
struct Gradients {
  std::vector<cuda::Gradients> of;
  std::vector<Position> positions;

  // grads: group by group, in a group objective by objective of its reach. like: what they must be
  // laid out as, one per tensor; null: as the first of them.
  Gradients(const TensorList& grads, const std::vector<GroupShape>& groups, int K,
            const TensorList* like, const Device& device, const char* op) {
    size_t start = 0;
    for (const GroupShape& group : groups) {
      const int lists = __builtin_popcount(group.reach);
      DTOKD_CHECK(lists >= 1 && group.reach >> K == 0 && group.count >= 0 &&
                      start + size_t(lists * group.count) <= grads.size(),
                  op, ": grads does not hold what counts and reaches say");
      for (int64_t t = 0; t < group.count; ++t) {
        DTOKD_CHECK(!like || of.size() < like->size(), op, ": there are ", like->size(),
                    " tensors for the gradients, expected more");
        const Position position(like ? (*like)[of.size()] : grads[start + t], op);
        cuda::Gradients entry{type_of(position.dtype), group.role, position.size, {}};
        size_t list = 0;
        for (int i = 0; i < K; ++i) {
          if (!(group.reach >> i & 1)) continue;
          const ListedTensor g = grads[start + list++ * group.count + t];
          DTOKD_CHECK_FIT(g.dtype() == position.dtype, op,
                          ": gradients have another dtype than their parameter");
          position.check(g, op, "grads", of.size(), device);
          entry.of[i] = g.const_data_ptr();
        }
        of.push_back(entry);
        positions.push_back(position);
      }
      start += lists * group.count;
    }
    DTOKD_CHECK(start == grads.size(), op, ": grads has ", grads.size(), " tensors, expected ",
                start);
  }
};

int checked_K(int64_t K, const char* op) {
  DTOKD_CHECK(K >= 1 && K <= kMaxObjectives, op, ": ", K, " objectives, expected 1 to ",
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
    DTOKD_CHECK(tickets.scalar_type() == ScalarType::Int && tickets.numel() == cuda::kTickets, op,
                ": tickets must be ", cuda::kTickets, " int32 zeros");
    pointers = {static_cast<double*>(partials.mutable_data_ptr()),
                static_cast<unsigned*>(tickets.mutable_data_ptr())};
  }
};

Tensor gram_by_role(const TensorList& grads, const Ints& counts, const Ints& roles,
                    const Ints& reaches, int64_t objectives, const Tensor& tickets) {
  const char* op = "gram_by_role";
  const int K = checked_K(objectives, op);
  const Tensor first = grads.at(0).tensor();
  const Device device(first);
  const Gradients lists(grads, group_shapes(counts, roles, reaches, op), K, nullptr, device, op);
  const CallScratch scratch(first, cuda::scratch_size(lists.of, K), tickets, op);
  Tensor grams = torch::stable::new_empty(first, {kRoles, K, K}, ScalarType::Double);
  check_launch(cuda::launch_gram(lists.of, K, scratch.pointers,
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

std::tuple<Tensor, Tensor, Tensor> gram_balance(const TensorList& grads, const Ints& counts,
                                                const Ints& roles, const Ints& reaches,
                                                int64_t objectives, const Tensor& losses,
                                                bool log_gradients, bool clamp, bool rescale_sum,
                                                double max_norm, double loss_floor, double limit,
                                                const Tensor& tickets) {
  const char* op = "gram_balance";
  const int K = checked_K(objectives, op);
  const Tensor first = grads.at(0).tensor();
  const Device device(first);
  device.check(losses, op, "losses");
  const Gradients lists(grads, group_shapes(counts, roles, reaches, op), K, nullptr, device, op);
  const CallScratch scratch(first, cuda::scratch_size(lists.of, K), tickets, op);
  const RecordTensors record(torch::stable::new_empty(first, {kRoles, K, K}, ScalarType::Double),
                             K);
  const BalanceOptions options{log_gradients, clamp, rescale_sum, max_norm, loss_floor, limit};
  check_launch(cuda::launch_gram_balance(lists.of, K, doubles(losses, K, op, "losses"), options,
                                         scratch.pointers, record.pointers(), device.stream),
               op);
  return {record.grams, record.values, record.flags};
}

std::tuple<Tensor, Tensor> balance_by_role(const Tensor& grams, const Tensor& losses,
                                           const std::optional<Tensor>& weights, bool log_gradients,
                                           bool clamp, bool rescale_sum, double max_norm,
                                           double loss_floor, double limit) {
  const char* op = "balance_by_role";
  const int K = checked_K(losses.numel(), op);
  doubles(grams, kRoles * K * K, op, "grams");
  const Device device(grams);
  device.check(losses, op, "losses");
  if (weights) device.check(*weights, op, "weights");
  const RecordTensors record(grams, K);
  const BalanceOptions options{log_gradients, clamp, rescale_sum, max_norm, loss_floor, limit};
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
    DTOKD_CHECK(present->scalar_type() == ScalarType::Bool && present->numel() == K &&
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

void combine_(const TensorList& out, const TensorList& grads, const Tensor& coefficients) {
  if (out.empty()) return;
  const char* op = "combine_";
  const int K = checked_K(coefficients.numel(), op);
  const Device device(out[0].tensor());
  device.check(coefficients, op, "coefficients");
  const std::vector<GroupShape> all{{kShared, (1u << K) - 1, int64_t(out.size())}};
  const Gradients lists(grads, all, K, &out, device, op);
  std::vector<void*> targets;
  for (size_t t = 0; t < out.size(); ++t) {
    device.check(out[t], op, "out");
    targets.push_back(out[t].mutable_data_ptr());
  }
  check_launch(cuda::launch_combine(lists.of, targets,
                                    {K, doubles(coefficients, K, op, "coefficients"), nullptr},
                                    device.stream),
               op);
}

const double* options_of(const std::vector<double>& options, size_t group, size_t count,
                         size_t groups, const char* op) {
  DTOKD_CHECK(options.size() == count * groups, op, ": options has ", options.size(),
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
  std::vector<Position> positions;
  std::vector<cuda::Target> targets;

  Updates(const char* op, const TensorList& params, const TensorList& grads, const Ints& counts,
          const Ints& roles, const Ints& reaches, const Tensor& table, const Tensor& skipped)
      : Updates(op, params, grads, counts, roles, reaches, checked_K(table.numel() / kRoles, op)) {
    device.check(table, op, "table");
    device.check(skipped, op, "skipped");
    DTOKD_CHECK(skipped.scalar_type() == ScalarType::Bool && skipped.numel() == 1, op,
                ": skipped must be one bool");
    direction.coefficients = doubles(table, kRoles * direction.K, op, "table");
    direction.skipped = static_cast<const bool*>(skipped.const_data_ptr());
  }

  // For a launch that decides the direction itself.
  Updates(const char* op, const TensorList& params, const TensorList& grads, const Ints& counts,
          const Ints& roles, const Ints& reaches, int K)
      : op(op),
        first(params.at(0).tensor()),
        device(first),
        groups(group_shapes(counts, roles, reaches, op)),
        direction{K, nullptr, nullptr} {
    Gradients lists(grads, groups, K, &params, device, op);
    positions = std::move(lists.positions);
    DTOKD_CHECK(lists.of.size() == params.size(), op, ": params has ", params.size(),
                " tensors, expected ", lists.of.size());
    targets.resize(params.size());
    size_t t = 0;
    for (size_t g = 0; g < groups.size(); ++g) {
      for (int64_t i = 0; i < groups[g].count; ++i, ++t) {
        targets[t] = {};
        targets[t].grads = lists.of[t];
        targets[t].state_type = lists.of[t].type;
        device.check(params[t], op, "params");
        targets[t].param = params[t].mutable_data_ptr();
        targets[t].group = int(g);
      }
    }
  }

  // Attaches one kind of state to the tensors of those groups that have it.
  template <class Has, class Attach>
  void attach(const TensorList& state, const char* name, const Has& has, const Attach& attach) {
    size_t next = 0, t = 0;
    for (size_t g = 0; g < groups.size(); ++g) {
      for (int64_t i = 0; i < groups[g].count; ++i, ++t) {
        if (!has(g)) continue;
        DTOKD_CHECK(next < state.size(), op, ": ", name, " has ", state.size(),
                    " tensors, expected more");
        const ListedTensor tensor = state[next++];
        positions[t].check(tensor, op, name, next - 1, device);
        attach(targets[t], tensor);
      }
    }
    DTOKD_CHECK(next == state.size(), op, ": ", name, " has ", state.size(), " tensors, expected ",
                next);
  }

  void attach_state(const TensorList& state, int slot, const char* name,
                    const std::function<bool(size_t)>& has) {
    attach(state, name, has, [&](cuda::Target& target, ListedTensor tensor) {
      const Type type = type_of(tensor.dtype());
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

  void attach_masters(const TensorList& masters, const std::function<bool(size_t)>& has) {
    attach(masters, "masters", has, [&](cuda::Target& target, ListedTensor tensor) {
      DTOKD_CHECK_FIT(
          tensor.dtype() == aoti_torch_dtype_float32() && size_of(target.grads.type) == 2, op,
          ": a master copy is float32, beside a half-precision parameter");
      target.master = static_cast<float*>(tensor.mutable_data_ptr());
    });
  }

  cuda::LearningRate lr(const double* options, const TensorList& lrs) const {
    cuda::LearningRate rate{options[0]};
    const int64_t index = int64_t(options[1]);
    if (index < 0) return rate;
    const ListedTensor tensor = lrs.at(index);
    device.check(tensor, op, "lrs");
    rate.type = type_of(tensor.dtype());
    DTOKD_CHECK(tensor.numel() == 1 && size_of(rate.type) >= 4, op,
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
  std::vector<cuda::AdamWGroup> adamw(const TensorList& exp_avgs, const TensorList& exp_avg_sqs,
                                      const TensorList& max_exp_avg_sqs,
                                      const TensorList& state_steps, const TensorList& masters,
                                      const TensorList& lrs, const std::vector<double>& options) {
    const size_t G = groups.size();
    const auto option = [&](size_t g) { return options_of(options, g, 9, G, op); };
    const auto every = [](size_t) { return true; };
    attach_state(exp_avgs, 0, "exp_avgs", every);
    attach_state(exp_avg_sqs, 1, "exp_avg_sqs", every);
    attach_state(max_exp_avg_sqs, 2, "max_exp_avg_sqs",
                 [&](size_t g) { return option(g)[7] != 0; });
    attach_masters(masters, [&](size_t g) { return option(g)[8] != 0; });
    DTOKD_CHECK(state_steps.size() == targets.size(), op,
                ": state_steps must hold one scalar for each of params");
    for (size_t t = 0; t < state_steps.size(); ++t) {
      const ListedTensor step = state_steps[t];
      device.check(step, op, "state_steps");
      DTOKD_CHECK_FIT(step.numel() == 1 && step.dtype() == aoti_torch_dtype_float32(), op,
                      ": state_steps must hold float32 scalars");
      targets[t].step = static_cast<float*>(step.mutable_data_ptr());
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

  AdamWUpdates(const char* op, const TensorList& params, const TensorList& grads,
               const TensorList& exp_avgs, const TensorList& exp_avg_sqs,
               const TensorList& max_exp_avg_sqs, const TensorList& state_steps,
               const TensorList& masters, const Ints& counts, const Ints& roles,
               const Ints& reaches, const Tensor& table, const Tensor& skipped,
               const TensorList& lrs, const std::vector<double>& options)
      : Updates(op, params, grads, counts, roles, reaches, table, skipped),
        numbers(adamw(exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, masters, lrs, options)) {
  }
};

void adamw_updates_(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                    const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs,
                    const TensorList& state_steps, const TensorList& masters, const Ints& counts,
                    const Ints& roles, const Ints& reaches, const Tensor& table,
                    const Tensor& skipped, const TensorList& lrs,
                    const std::vector<double>& options, const Tensor& tickets) {
  const char* op = "adamw_updates_";
  const AdamWUpdates updates(op, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps,
                             masters, counts, roles, reaches, table, skipped, lrs, options);
  const CallScratch scratch(updates.first, 0, tickets, op);
  check_launch(cuda::launch_adamw(updates.targets, updates.numbers, updates.direction,
                                  scratch.pointers, updates.device.stream),
               op);
}

// The same, and the Gram matrices of the gradients from the same pass: [kRoles, K, K].
Tensor gram_adamw_updates_(const TensorList& params, const TensorList& grads,
                           const TensorList& exp_avgs, const TensorList& exp_avg_sqs,
                           const TensorList& max_exp_avg_sqs, const TensorList& state_steps,
                           const TensorList& masters, const Ints& counts, const Ints& roles,
                           const Ints& reaches, const Tensor& table, const Tensor& skipped,
                           const TensorList& lrs, const std::vector<double>& options,
                           const Tensor& tickets) {
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
    const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
    const TensorList& exp_avg_sqs, const TensorList& state_steps, const Ints& counts,
    const Ints& roles, const Ints& reaches, const Tensor& losses, bool log_gradients, bool clamp,
    bool rescale_sum, double max_norm, double loss_floor, double limit, const TensorList& lrs,
    const std::vector<double>& options, const Tensor& tickets) {
  const char* op = "resident_adamw_";
  const int K = checked_K(losses.numel(), op);
  Updates updates(op, params, grads, counts, roles, reaches, K);
  const RecordTensors record(updates.new_grams(), K);
  updates.device.check(losses, op, "losses");
  const std::vector<cuda::AdamWGroup> groups =
      updates.adamw(exp_avgs, exp_avg_sqs, {}, state_steps, {}, lrs, options);
  const CallScratch scratch = updates.scratch(tickets);
  const BalanceOptions balance{log_gradients, clamp, rescale_sum, max_norm, loss_floor, limit};
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

  SGDUpdates(const char* op, const TensorList& params, const TensorList& grads,
             const TensorList& momentum_buffers, const TensorList& masters, const Ints& counts,
             const Ints& roles, const Ints& reaches, const Tensor& table, const Tensor& skipped,
             const TensorList& lrs, const std::vector<double>& options)
      : Updates(op, params, grads, counts, roles, reaches, table, skipped) {
    const auto option = [&](size_t g) { return options_of(options, g, 9, groups.size(), op); };
    attach_state(momentum_buffers, 0, "momentum_buffers",
                 [&](size_t g) { return option(g)[2] != 0; });
    attach_masters(masters, [&](size_t g) { return option(g)[8] != 0; });
    for (size_t g = 0; g < groups.size(); ++g) {
      const double* o = option(g);
      numbers.push_back({lr(o, lrs), o[2], o[3], o[4], o[5] != 0, o[6] != 0, o[7] != 0});
    }
  }
};

void sgd_updates_(const TensorList& params, const TensorList& grads,
                  const TensorList& momentum_buffers, const TensorList& masters, const Ints& counts,
                  const Ints& roles, const Ints& reaches, const Tensor& table,
                  const Tensor& skipped, const TensorList& lrs,
                  const std::vector<double>& options) {
  const char* op = "sgd_updates_";
  const SGDUpdates updates(op, params, grads, momentum_buffers, masters, counts, roles, reaches,
                           table, skipped, lrs, options);
  check_launch(
      cuda::launch_sgd(updates.targets, updates.numbers, updates.direction, updates.device.stream),
      op);
}

// The same, and the Gram matrices of the gradients from the same pass: [kRoles, K, K].
Tensor gram_sgd_updates_(const TensorList& params, const TensorList& grads,
                         const TensorList& momentum_buffers, const TensorList& masters,
                         const Ints& counts, const Ints& roles, const Ints& reaches,
                         const Tensor& table, const Tensor& skipped, const TensorList& lrs,
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
      "float loss_floor, float limit, Tensor(a!) tickets) -> (Tensor, Tensor, Tensor)");
  m.def(
      "balance_by_role(Tensor grams, Tensor losses, Tensor? weights, bool log_gradients, "
      "bool clamp, bool rescale_sum, float max_norm, float loss_floor, "
      "float limit) -> (Tensor, Tensor)");
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
      "float max_norm, float loss_floor, float limit, Tensor[] lrs, float[] options, "
      "Tensor(e!) tickets) -> "
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
  m.impl("gram_by_role", TORCH_BOX(&WithLists<&gram_by_role>::call));
  m.impl("gram_balance", TORCH_BOX(&WithLists<&gram_balance>::call));
  m.impl("balance_by_role", TORCH_BOX(&balance_by_role));
  m.impl("min_norm_weights", TORCH_BOX(&min_norm_weights));
  m.impl("combine_", TORCH_BOX(&WithLists<&combine_>::call));
  m.impl("adamw_updates_", TORCH_BOX(&WithLists<&adamw_updates_>::call));
  m.impl("gram_adamw_updates_", TORCH_BOX(&WithLists<&gram_adamw_updates_>::call));
  m.impl("resident_adamw_", TORCH_BOX(&WithLists<&resident_adamw_>::call));
  m.impl("sgd_updates_", TORCH_BOX(&WithLists<&sgd_updates_>::call));
  m.impl("gram_sgd_updates_", TORCH_BOX(&WithLists<&gram_sgd_updates_>::call));
}

}  // namespace dtokd::ops
