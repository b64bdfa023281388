// Which instruction sets this CPU and operating system offer, which of them the user allows, and their names.
#pragma once

#include <string>
#include <vector>

namespace mobilenet_fast {

enum class Isa { kScalar, kNeon, kAvx2, kAvx512 };

const char* isa_name(Isa isa);

// Instruction sets compiled into this binary that the CPU and the operating system support, best first; ends in scalar.
const std::vector<Isa>& available_isas();

// The best available set, capped by the environment variable MOBILENET_FAST_ISA as it stood when the library was
// loaded. Throws std::invalid_argument, naming the valid values, when that variable names an unknown or unsupported
// set.
Isa current_isa();

// Makes the calling thread's current set the one with this name, or what it was for an empty name: for tests.
void override_isa(const std::string& name);

// The set with this name. Throws std::invalid_argument naming the valid values. `what` begins the message.
Isa parse_isa(const std::string& name, const std::string& what);

}  // namespace mobilenet_fast
