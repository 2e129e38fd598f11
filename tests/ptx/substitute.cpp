// Puts the kernels of a translated file in the place of the emulated ones, by being linked in.
#include "tests/emulation/substitutes.h"

#include "runtime.h"

namespace {

[[maybe_unused]] const bool kDone = [] {
  for (const ptx::Kernel* kernel = ptx_kernels; kernel->name; ++kernel) {
    emulation::substitutes()[emulation::kernel_name(kernel->name)] = {kernel->run};
  }
  return true;
}();

}  // namespace
