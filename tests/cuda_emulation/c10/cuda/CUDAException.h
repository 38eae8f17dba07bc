#pragma once

#include <c10/util/Exception.h>

#include "cuda_runtime.h"
#include "emulator.h"

#define C10_CUDA_CHECK(expression)                                                                      \
    do {                                                                                                \
        const cudaError_t status = expression;                                                          \
        TORCH_CHECK(status == cudaSuccess, "CUDA error ", int(status), ": ", emulation::take_error()); \
    } while (0)
