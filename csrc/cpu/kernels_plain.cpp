// The kernels for any machine.
#include <cmath>
#include <cstring>

#include "dtokd/host_device.h"
#include "dtokd/update_rules.h"
#include "cpu/kernels.h"

namespace dtokd::cpu {
namespace plain {

#include "cpu/vec_plain.h"
#include "cpu/chunk_kernels.h"

}  // namespace plain

const Kernels* plain_kernels() {
  static const Kernels kernels{"plain", plain::gram, plain::combine, plain::update};
  return &kernels;
}

}  // namespace dtokd::cpu
