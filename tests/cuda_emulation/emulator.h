// What the torch side of the emulation needs of emulator.cpp.
#pragma once

#include <cstddef>
#include <string>

namespace emulation {
void* allocate(size_t bytes);  // memory whose borders are checked, filled with NaN; null if there is no more
void release(void* p);
std::string take_error();      // what the last launch did wrong, '' if nothing
}  // namespace emulation
