// Parameters and their state, checked once for all steps: what `prepare` makes and a number stands
// for. A step then hands over gradients only.
#pragma once

#include <memory>
#include <mutex>
#include <unordered_map>

#include "torch/layout.h"

namespace dtokd::ops {

class Prepared {
  TensorList params_;  // before `place`, which is that of the first
  TensorList state_;

 public:
  const int rule;
  const Place place;

  // state: row by row, of each row what bits of its `held` say: bit i the rule's state i (i <
  // kMaxStates), kStep its counter of steps, kMaster its master copy.
  Prepared(int64_t rule, StableListHandle params, StableListHandle state, const Ints& reach,
           const Ints& role, const Ints& group, const Ints& held)
      : params_(params),
        state_(state),
        rule(int(rule)),
        place(place_of(params_)),
        reach_(reach),
        role_(role),
        held_(held) {
    const size_t T = params_.size();
    DTOKD_CHECK(numbers_of(this->rule) > 0, kOp, ": there is no rule number ", rule);
    DTOKD_CHECK(reach.size() == T && role.size() == T && group.size() == T && held.size() == T, kOp,
                ": reach, role, group and held must have one number for each of ", T, " params");
    size_t next = 0;
    for (size_t t = 0; t < T; ++t) {
      first_.push_back(next);
      next += size_t(__builtin_popcountll(held[t]));
      DTOKD_CHECK(group[t] >= 0 && held[t] >= 0 && held[t] >> (kMaster + 1) == 0, kOp, ": group[",
                  t, "] is ", group[t], " and held[", t, "] is ", held[t]);
      groups_ = std::max(groups_, size_t(group[t]) + 1);
    }
    DTOKD_CHECK(next == state_.size(), kOp, ": state has ", state_.size(), " tensors, expected ",
                next, ", as held says");
    likes_.reserve(T);
    for (size_t t = 0; t < T; ++t) {
      likes_.emplace_back(params_[t]);
      rows_.push_back({});
      rows_[t].group = int(group[t]);
      set(t);
    }
  }

  // With this step's gradients. A tensor whose memory has moved since is checked again.
  std::vector<UpdateRow> rows(const TensorList& grads, int K, size_t groups, const char* op,
                              std::unique_ptr<GradientRows>& held) {
    DTOKD_CHECK(groups >= groups_, op, ": numbers are those of ", groups, " groups, expected ",
                groups_);
    for (size_t t = 0; t < rows_.size(); ++t) {
      if (moved(t)) {
        likes_[t] = Like(params_[t]);
        set(t);
      }
    }
    held = std::make_unique<GradientRows>(grads, reach_, role_, K, &likes_, place, op);
    std::vector<UpdateRow> result = rows_;
    for (size_t t = 0; t < result.size(); ++t) result[t].grads = held->rows[t];
    return result;
  }

  Tensor like() const { return params_[0].tensor(); }

 private:
  static constexpr int kStep = kMaxStates, kMaster = kMaxStates + 1;
  static constexpr const char* kOp = "prepare";

  static Place place_of(const TensorList& params) {
    DTOKD_CHECK(!params.empty(), kOp, ": params holds no tensor");
    return Place(params[0]);
  }

  // f(slot, tensor) for all that a row holds.
  template <class F>
  void for_each_held(size_t t, const F& f) const {
    size_t next = first_[t];
    for (int slot = 0; slot <= kMaster; ++slot) {
      if (held_[t] >> slot & 1) f(slot, state_[next++]);
    }
  }

  bool moved(size_t t) const {
    const UpdateRow& row = rows_[t];
    bool result = params_[t].const_data_ptr() != row.param;
    for_each_held(t, [&](int slot, ListedTensor tensor) {
      const void* was = slot == kStep     ? static_cast<const void*>(row.step)
                        : slot == kMaster ? static_cast<const void*>(row.master)
                                          : row.state[slot];
      result = result || tensor.const_data_ptr() != was;
    });
    return result;
  }

  void set(size_t t) {
    const Like& like = likes_[t];
    UpdateRow& row = rows_[t];
    row.state_type = type_of(like.dtype, kOp);
    place.check(params_[t], kOp, "params");
    DTOKD_CHECK(like.is_dense(), kOp, ": params[", t, "] has gaps in memory");
    row.param = params_[t].mutable_data_ptr();
    for_each_held(t, [&](int slot, ListedTensor tensor) {
      place.check(tensor, kOp, "state");
      if (slot == kStep) {
        DTOKD_CHECK(tensor.numel() == 1 && tensor.dtype() == aoti_torch_dtype_float32(), kOp,
                    ": the step counter of row ", t, " must be one float32 number");
        row.step = static_cast<float*>(tensor.mutable_data_ptr());
        return;
      }
      like.check_shape(tensor, kOp, "state", t);
      DTOKD_CHECK(like.has_layout_of(tensor), kOp, ": state of row ", t,
                  " is not laid out as its parameter");
      const Type type = type_of(tensor.dtype(), kOp);
      if (slot == kMaster) {
        DTOKD_CHECK(type == Type::kFloat32 && size_of(type_of(like.dtype, kOp)) == 2, kOp,
                    ": a master copy is float32, beside a half-precision parameter");
        row.master = static_cast<float*>(tensor.mutable_data_ptr());
        return;
      }
      DTOKD_CHECK(slot == 0 || type == row.state_type, kOp, ": the state of row ", t,
                  " has several dtypes");
      row.state_type = type;
      row.state[slot] = tensor.mutable_data_ptr();
    });
  }

  Ints reach_, role_, held_;
  std::vector<size_t> first_;  // of each row's state
  std::vector<Like> likes_;
  std::vector<UpdateRow> rows_;
  size_t groups_ = 0;
};

// Those that are there, by number.
class Registry {
 public:
  static Registry& get() {
    static Registry registry;
    return registry;
  }
  int64_t add(std::shared_ptr<Prepared> prepared) {
    const std::lock_guard lock(mutex_);
    known_[++last_] = std::move(prepared);
    return last_;
  }
  std::shared_ptr<Prepared> at(int64_t number, const char* op) {
    const std::lock_guard lock(mutex_);
    const auto found = known_.find(number);
    DTOKD_CHECK(found != known_.end(), op, ": ", number, " stands for nothing that was prepared");
    return found->second;
  }
  void remove(int64_t number) {
    const std::lock_guard lock(mutex_);
    known_.erase(number);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<Prepared>> known_;
  int64_t last_ = 0;
};

inline int64_t prepare(int64_t rule, StableListHandle params, StableListHandle state, Ints reach,
                       Ints role, Ints group, Ints held) {
  return Registry::get().add(
      std::make_shared<Prepared>(rule, params, state, reach, role, group, held));
}

inline void release(int64_t prepared, const Tensor&) { Registry::get().remove(prepared); }

// The hyper-parameters of all groups. numbers: of each group those of the rule, in its order;
// lr_of: of each group the index of the tensor in `lrs` that is its learning rate, or -1.
inline std::vector<Group> groups_of(int rule, const TensorList& lrs, const Ints& lr_of,
                                    const std::vector<double>& numbers, const Place& place,
                                    const char* op) {
  const size_t count = size_t(numbers_of(rule));
  DTOKD_CHECK(numbers.size() == count * lr_of.size(), op, ": there are ", numbers.size(),
              " numbers, expected ", count, " for each of ", lr_of.size(), " groups");
  std::vector<Group> groups;
  for (size_t g = 0; g < lr_of.size(); ++g) {
    const double* of_group = numbers.data() + g * count;
    Group group{{of_group[0]}, {}};
    std::copy(of_group, of_group + count, group.numbers);
    if (lr_of[g] >= 0) {
      const ListedTensor lr = lrs.at(size_t(lr_of[g]));
      place.check(lr, op, "lrs");
      group.lr.type = type_of(lr.dtype(), op);
      DTOKD_CHECK(lr.numel() == 1 && size_of(group.lr.type) >= 4, op,
                  ": lr must be a float32 or float64 scalar");
      group.lr.device = lr.const_data_ptr();
    }
    groups.push_back(group);
  }
  return groups;
}

}  // namespace dtokd::ops
