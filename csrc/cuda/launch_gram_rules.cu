// Steps that measure by all rules but AdamW, and the choice among all.
#include "cuda/launch_gram_update.h"

namespace dtokd::cuda {

// in launch_gram_adamw.cu
extern template int launch_gram_rule<AdamW>(const Call&, const Scratch&, double*);

int launch_gram_update(int rule, const std::vector<Target>& targets,
                       const std::vector<Group>& groups, const Direction& direction,
                       const Scratch& scratch, double* grams, Stream stream) {
  switch (rule) {
#define DTOKD_CASE(Rule)                                                   \
  case k##Rule: {                                                          \
    const Call call(targets, groups, direction, stream, has_extras<Rule>); \
    return launch_gram_rule<Rule>(call, scratch, grams);                   \
  }
    DTOKD_RULES(DTOKD_CASE)
#undef DTOKD_CASE
  }
  return kInvalidValue;
}

}  // namespace dtokd::cuda
