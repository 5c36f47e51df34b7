// Repeat recorded kernel calls and compare every value that they leave, bit by bit.
//
// usage: replay RECORD THREADS [RESULTS]
//
// With RESULTS, it compares nothing, but writes there what each call leaves in its pointers' values.
//
// record.py writes the record, on whatever processor runs it. Linked with the kernels' sources, this
// program checks another processor (in an emulator, too) or a build with sanitizers; it needs no
// Python. A record is a sequence of calls, in little endian: the length of the function's name (1
// byte), the name, and each argument: an integer or double of 8 bytes; a pointer as its size in bytes
// (8 bytes; -1 for null), the values before the call, and those after it; an array of pointers as
// their number (8 bytes) and each pointer.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <list>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "products.h"

typedef void* P;
typedef void* const* Ps;
typedef struct Decoder* Handle;
typedef int Status;  // 0, or 1 if memory ran out
typedef void Nothing;
typedef int Int;
typedef int64_t Long;
typedef uint64_t Seed;
typedef float Float;
typedef double Double;

#ifdef CHARGPT_BF16
#define KERNEL(result, name, ...)          \
  FUNCTION(result, name##_fp32, __VA_ARGS__) \
  FUNCTION(result, name##_bf16, __VA_ARGS__)
#else
#define KERNEL(result, name, ...) FUNCTION(result, name##_fp32, __VA_ARGS__)
#endif
#define FUNCTION(result, name, ...) extern "C" result name(__VA_ARGS__);
#include "functions.h"
#undef FUNCTION
extern "C" void chargpt_set_threads(int);

namespace {

std::ifstream record;
std::ofstream results;

template <class Value>
Value read() {
  Value value;
  if (!record.read((char*)&value, sizeof value)) throw std::runtime_error("the record ends too early");
  return value;
}

// A pointer's values. Its size is exact, so that a sanitizer finds an access outside.
struct Buffer {
  size_t size;
  std::unique_ptr<char[]> now, expected;

  explicit Buffer(size_t size) : size(size), now(new char[size]), expected(new char[size]) {
    if (!record.read(now.get(), size) || !record.read(expected.get(), size))
      throw std::runtime_error("the record ends too early");
  }
};

// The memory of one call. Values are compared 4 bytes at a time.
struct Call {
  std::string name;
  std::list<Buffer> buffers;
  std::list<std::vector<void*>> arrays;

  void* pointer() {
    const int64_t size = read<int64_t>();
    if (size < 0) return nullptr;
    buffers.emplace_back(size);
    return buffers.back().now.get();
  }

  // Print the first difference and return false, or return true.
  bool equal() const {
    size_t values = 0, number = 0;
    for (const Buffer& buffer : buffers) {
      number++;
      for (size_t at = 0; at < buffer.size; at += 4, values++) {
        const char *now = buffer.now.get() + at, *expected = buffer.expected.get() + at;
        if (!std::memcmp(now, expected, 4)) continue;
        float floats[2];
        std::memcpy(&floats[0], now, 4), std::memcpy(&floats[1], expected, 4);
        std::printf("%s: buffer %zu of %zu, value %zu of %zu: %.9g (%a), expected %.9g (%a)\n",
                    name.c_str(), number, buffers.size(), at / 4, buffer.size / 4, floats[0], floats[0],
                    floats[1], floats[1]);
        return false;
      }
    }
    std::printf("%s: %zu values equal\n", name.c_str(), values);
    return true;
  }
};

Handle decoder = nullptr;  // the one decoder that is alive

template <class Argument>
struct Take {
  static Argument from(Call&) { return (Argument)read<int64_t>(); }
};
template <>
struct Take<Float> {
  static Float from(Call&) { return (float)read<double>(); }
};
template <>
struct Take<Double> {
  static Double from(Call&) { return read<double>(); }
};
template <>
struct Take<P> {
  static P from(Call& call) { return call.pointer(); }
};
template <>
struct Take<Ps> {
  static Ps from(Call& call) {
    std::vector<void*> pointers(read<int64_t>());
    for (void*& pointer : pointers) pointer = call.pointer();
    return call.arrays.insert(call.arrays.end(), std::move(pointers))->data();
  }
};
template <>
struct Take<Handle> {
  static Handle from(Call&) { return decoder; }
};

void accept(Status status) {
  if (status) throw std::runtime_error("out of memory");
}
void accept(Handle handle) {
  if (!handle) throw std::runtime_error("out of memory");
  decoder = handle;
}

template <class Result, class... Arguments>
bool replay(Result (*function)(Arguments...), const char* name) {
  Call call{name, {}, {}};
  const std::tuple<Arguments...> arguments{Take<Arguments>::from(call)...};  // braces: in order
  if constexpr (std::is_void_v<Result>)
    std::apply(function, arguments);
  else
    accept(std::apply(function, arguments));
  if (!results.is_open()) return call.equal();
  for (const Buffer& buffer : call.buffers) results.write(buffer.now.get(), buffer.size);
  return true;
}

#define FUNCTION(result, name, ...) {#name, [] { return replay(name, #name); }},
const std::map<std::string, bool (*)()> functions = {
#include "functions.h"
};
#undef FUNCTION

}  // namespace

int main(int n_arguments, char** arguments) try {
  if (n_arguments < 3) throw std::runtime_error("usage: replay RECORD THREADS [RESULTS]");
  record.open(arguments[1], std::ios::binary);
  if (!record) throw std::runtime_error(std::string("cannot open ") + arguments[1]);
  if (n_arguments > 3) results.open(arguments[3], std::ios::binary);
  chargpt_set_threads(std::atoi(arguments[2]));
  bool equal = true;
  int calls = 0;
  for (; record.peek() != EOF; calls++) {
    std::string name(read<uint8_t>(), 0);
    record.read(&name[0], name.size());
    const auto function = functions.find(name);
    if (function == functions.end()) throw std::runtime_error("unknown function " + name);
    equal = function->second() && equal;
  }
  if (!calls) throw std::runtime_error("an empty record");
  return equal ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 2;
}
