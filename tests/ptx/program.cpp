// One launch of a translated file as a program of its own, which sanitizers can watch: its memory
// and arguments come from a file (library.py, Program), and its memory goes back there.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

extern "C" const char* ptx_launch(const char* name, const unsigned* grid, const unsigned* block,
                                  size_t shared_bytes, bool cooperative,
                                  const void* const* parameters, const char* schedule);

namespace {

constexpr size_t kAlignment = 64;

// A tensor, as far behind an aligned place as it was in the process that wrote it.
struct Block {
  std::unique_ptr<char, decltype(&std::free)> room{nullptr, &std::free};
  char* data;
  size_t bytes;
};

struct File {
  std::ifstream stream;
  explicit File(const char* path) : stream(path, std::ios::binary) {}
  uint64_t number() {
    uint64_t value = 0;
    stream.read(reinterpret_cast<char*>(&value), sizeof(value));
    return value;
  }
  std::vector<unsigned> numbers(int count) {
    std::vector<unsigned> result;
    for (int i = 0; i < count; ++i) result.push_back(unsigned(number()));
    return result;
  }
};

}  // namespace

// FILE KERNEL: blocks [shift, bytes, contents], places that hold addresses [block, offset, block
// pointed to, offset], arguments [block or -1, bits], grid, threads, bytes of shared memory.
int main(int, char** arguments) {
  std::vector<Block> blocks;
  File file(arguments[1]);
  blocks.resize(file.number());
  for (Block& block : blocks) {
    const size_t shift = file.number();
    block.bytes = file.number();
    const size_t size = (shift + block.bytes) / kAlignment * kAlignment + kAlignment;
    block.room.reset(static_cast<char*>(std::aligned_alloc(kAlignment, size)));
    block.data = block.room.get() + shift;
    file.stream.read(block.data, std::streamsize(block.bytes));
  }
  for (uint64_t left = file.number(); left > 0; --left) {
    char* place = blocks[file.number()].data;
    place += file.number();
    const char* target = blocks[file.number()].data;
    target += file.number();
    std::memcpy(place, &target, sizeof(target));
  }
  std::vector<uint64_t> values(file.number());
  std::vector<const void*> parameters;
  for (uint64_t& value : values) {
    const uint64_t block = file.number();
    value = file.number();
    if (block != ~uint64_t(0)) value = reinterpret_cast<uint64_t>(blocks[block].data);
    parameters.push_back(&value);
  }
  const std::vector<unsigned> grid = file.numbers(3), threads = file.numbers(3);
  const size_t shared = file.number();
  if (!file.stream) return std::fprintf(stderr, "the file is too short\n"), 2;
  if (const char* error = ptx_launch(arguments[2], grid.data(), threads.data(), shared, false,
                                     parameters.data(), "forward")) {
    return std::fprintf(stderr, "%s\n", error), 1;
  }
  std::ofstream after(arguments[1], std::ios::binary);
  for (const Block& block : blocks) after.write(block.data, std::streamsize(block.bytes));
  return 0;
}
