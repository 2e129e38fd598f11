// How Python runs the kernels of a translated file.
#include <cstring>
#include <string>

#include "runtime.h"

// Returns what went wrong, or null. parameters: the address of each.
extern "C" const char* ptx_launch(const char* name, const unsigned* grid, const unsigned* block,
                                  size_t shared_bytes, bool cooperative,
                                  const void* const* parameters, const char* schedule) {
  static std::string error;
  try {
    const ptx::Kernel* kernel = ptx_kernels;
    while (kernel->name && std::strcmp(kernel->name, name) != 0) ++kernel;
    if (!kernel->name) throw emulation::Error(std::string("no kernel is named ") + name);
    emulation::Machine::get().schedule = emulation::Schedule(schedule);
    emulation::launch({grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared_bytes,
                      cooperative, [=] { kernel->run(parameters); });
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
  return nullptr;
}
