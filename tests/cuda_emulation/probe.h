// Kernels with one deliberate fault each: does the emulation notice?
#pragma once

enum Fault { kNone, kReadPastEnd, kWriteBeforeStart, kMisaligned, kSharedPastEnd, kMissingBarrier, kBarrierInBranch, kGridTooLarge };

int emulation_probe(const float* x, float* y, int count, int fault);
