// csrc/cuda/register.cpp for tensors on the CPU, as operators of the namespace m2m_emulated, and an allocator that puts tensors into the arena.
#include <c10/core/Allocator.h>
#include <torch/library.h>

#include "emulator.h"

#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(ns, key, m) _TORCH_LIBRARY_IMPL(m2m_emulated, CPU, m, 0)

#include "register.cpp"

#include "probe.h"

namespace {

struct GuardedAllocator final : c10::Allocator {
    c10::Allocator* others = c10::GetAllocator(c10::kCPU);
    bool enabled = false;

    c10::DataPtr allocate(size_t bytes) override {
        if (!enabled || bytes == 0) return others->allocate(bytes);
        void* p = emulation::allocate(bytes);
        TORCH_CHECK(p, "the arena of the emulation is full");
        return {p, p, &emulation::release, c10::Device(c10::kCPU)};
    }
    c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
    void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

GuardedAllocator& allocator() {
    static GuardedAllocator instance;
    return instance;
}

at::Tensor probe(const at::Tensor& x, int64_t fault) {
    const at::Tensor y = at::empty_like(x);
    C10_CUDA_CHECK(static_cast<cudaError_t>(emulation_probe(x.const_data_ptr<float>(), y.mutable_data_ptr<float>(), static_cast<int>(x.numel()),
                                                            static_cast<int>(fault))));
    return y;
}

TORCH_LIBRARY_FRAGMENT(m2m_emulated, m) { m.def("probe(Tensor x, int fault) -> Tensor", {}); }

}  // namespace

_TORCH_LIBRARY_IMPL(m2m_emulated, CPU, m, 1) { m.impl("probe", probe); }

extern "C" void emulation_guard(int enabled) {
    if (!allocator().enabled && enabled) c10::SetAllocator(c10::kCPU, &allocator());
    allocator().enabled = enabled != 0;
    if (!enabled) c10::SetAllocator(c10::kCPU, allocator().others);
}
