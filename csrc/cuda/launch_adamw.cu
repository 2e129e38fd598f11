// AdamW's kernels, in a file of their own: they take long to compile.
#include "cuda/launch_update.h"

namespace dtokd::cuda {

template int launch_rule<AdamW>(const Call&, unsigned*);

}  // namespace dtokd::cuda
