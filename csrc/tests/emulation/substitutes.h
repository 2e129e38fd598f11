// Launches of kernels by name, so that other code may stand in for one: what a compiler made of it.
#pragma once

#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdlib>
#include <map>
#include <string>
#include <tuple>
#include <type_traits>

#include "machine.h"

namespace emulation {

struct Substitute {
  void (*run)(const void* const* parameters);  // the address of each
  int launches = 0;
};

// By names such as "dtokd::cuda::gram_kernel<float, 2>".
inline std::map<std::string, Substitute>& substitutes() {
  static std::map<std::string, Substitute> by_name;
  return by_name;
}

// The name of a template's instance or a function, without result and parameters: nvcc's kernels
// take some by value that the emulation takes by reference.
inline std::string kernel_name(const char* mangled) {
  int status = 0;
  char* demangled = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
  if (status != 0) return mangled;
  std::string name(demangled);
  std::free(demangled);
  const size_t arguments = name.find('<');
  name.erase(0, name.rfind(' ', std::min(arguments, name.find('('))) + 1);
  int depth = 0;
  for (size_t i = 0; i < name.size(); ++i) {
    depth += name[i] == '<' ? 1 : name[i] == '>' ? -1 : 0;
    if (name[i] == '(' && depth == 0) name.resize(i);
  }
  return name;
}

// Runs a kernel, or what stands in for it. The program must export its symbols (-rdynamic).
template <class... Parameters, class... Arguments>
void launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   size_t dynamic_shared_bytes, bool cooperative, const Arguments&... arguments) {
  Dl_info symbol{};
  if (!substitutes().empty()) dladdr(reinterpret_cast<void*>(kernel), &symbol);
  const auto found = substitutes().find(symbol.dli_sname ? kernel_name(symbol.dli_sname) : "");
  if (found == substitutes().end()) {
    launch(grid, block, dynamic_shared_bytes, cooperative, [&] { kernel(arguments...); });
    return;
  }
  ++found->second.launches;
  const std::tuple<std::decay_t<Parameters>...> values(arguments...);
  std::apply(
      [&](const auto&... value) {
        const void* parameters[] = {&value...};
        launch(grid, block, dynamic_shared_bytes, cooperative,
               [&] { found->second.run(parameters); });
      },
      values);
}

}  // namespace emulation
