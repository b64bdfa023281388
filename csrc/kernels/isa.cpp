#include "kernels/isa.h"

#include <cstdlib>
#include <stdexcept>

namespace mobilenet_fast {
namespace {

std::vector<Isa> detect() {
  std::vector<Isa> found;
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks XGETBV, so a set that the operating system does not save is not reported.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    found.push_back(Isa::kAvx512);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(Isa::kAvx2);
#elif defined(__aarch64__)
  found.push_back(Isa::kNeon);
#endif
  found.push_back(Isa::kScalar);
  return found;
}

std::string valid_names() {
  std::string names;
  for (Isa isa : available_isas()) names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  return names;
}

Isa from_environment() {
  const char* cap = std::getenv("MOBILENET_FAST_ISA");
  return cap == nullptr || *cap == '\0' ? available_isas().front() : parse_isa(cap, "MOBILENET_FAST_ISA");
}

thread_local bool is_overridden = false;
thread_local Isa overriding = Isa::kScalar;

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kNeon:
      return "neon";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    default:
      return "scalar";
  }
}

const std::vector<Isa>& available_isas() {
  static const std::vector<Isa> found = detect();
  return found;
}

Isa parse_isa(const std::string& name, const std::string& what) {
  for (Isa isa : available_isas()) {
    if (name == isa_name(isa)) return isa;
  }
  throw std::invalid_argument(what + ": must be one of " + valid_names() + " on this CPU, got '" + name + "'");
}

Isa current_isa() {
  static const Isa isa = from_environment();
  return is_overridden ? overriding : isa;
}

void override_isa(const std::string& name) {
  if (!name.empty()) overriding = parse_isa(name, "override_isa");
  is_overridden = !name.empty();
}

}  // namespace mobilenet_fast
