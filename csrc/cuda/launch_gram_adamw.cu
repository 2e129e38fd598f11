// AdamW's kernels that measure, in a file of their own: they take long to compile.
#include "cuda/launch_gram_update.h"

namespace dtokd::cuda {

template int launch_gram_rule<AdamW>(const Call&, const Scratch&, double*);

}  // namespace dtokd::cuda
