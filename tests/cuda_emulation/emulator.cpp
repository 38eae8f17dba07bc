// Runs the threads of a block as fibres, in ascending or descending order, and checks every access of the kernels to memory: they are compiled with
// -fsanitize=kernel-address, which calls the functions at the end of this file, and tensors lie in an arena that knows which bytes belong to them.
#include <csetjmp>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>

#include "cuda_runtime.h"
#include "emulator.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace m2m_stylegan::cuda {
alignas(16) unsigned char shared_memory[emulation::kSharedBytes];
}

namespace emulation {

uint64_t slots[kMaxThreads];

namespace {

constexpr size_t kStack = 64 << 10, kArena = size_t{1} << 28, kRedZone = 256;

enum class State { idle, ready, at_barrier, at_warp_barrier };

struct Fibre {
    ucontext_t context;
    jmp_buf resume;
    State state = State::idle;
    bool started = false;
    int turn = 0;
    std::vector<char> stack;
};

std::vector<Fibre> fibres;
ucontext_t scheduler_context;
jmp_buf scheduler;
const std::function<void()>* kernel;
int current;
bool descending;
size_t shared_size;
std::string error;

void note(const std::string& what) {
    char where[160];
    std::snprintf(where, sizeof where, " by thread %d of block (%u, %u, %u), grid (%u, %u, %u)", current, blockIdx.x, blockIdx.y, blockIdx.z, gridDim.x,
                  gridDim.y, gridDim.z);
    error = what + where;
}

// Ends the kernel before it does what it must not do.
void fail(const std::string& what) {
    note(what);
    _longjmp(scheduler, 1);
}

// Back to the scheduler. setjmp needs no system call, unlike swapcontext, which only starts the fibres.
void leave(State state) {
    fibres[current].state = state;
    if (_setjmp(fibres[current].resume) == 0) _longjmp(scheduler, 1);
}

void fibre_main() {
    for (;;) {
        (*kernel)();
        leave(State::idle);
    }
}

void enter(int thread) {
    Fibre& fibre = fibres[thread];
    current = thread;
    threadIdx = {static_cast<unsigned>(thread), 0, 0};
    if (_setjmp(scheduler)) return;
    if (fibre.started) _longjmp(fibre.resume, 1);
    fibre.started = true;
    fibre.stack.resize(kStack);
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.data();
    fibre.context.uc_stack.ss_size = kStack;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, fibre_main, 0);
    swapcontext(&scheduler_context, &fibre.context);
}

// Lets every thread run to its next barrier until none is left. A barrier opens when all threads of the block (or warp) have come to it.
void run_block(int threads) {
    for (int i = 0; i < threads; ++i) fibres[i].state = State::ready;
    for (;;) {
        for (int i = 0; i < threads; ++i) {
            const int thread = descending ? threads - 1 - i : i;
            if (fibres[thread].state == State::ready) enter(thread);
            if (!error.empty()) return fibres.clear();
        }
        int count[4] = {};
        for (int i = 0; i < threads; ++i) ++count[static_cast<int>(fibres[i].state)];
        if (count[static_cast<int>(State::idle)] == threads) return;
        bool progress = count[static_cast<int>(State::at_barrier)] == threads;
        for (int i = 0; i < threads && progress; ++i) fibres[i].state = State::ready;
        for (int warp = 0; warp < threads && !progress; warp += kWarp) {
            int waiting = 0;
            for (int i = warp; i < warp + kWarp; ++i) waiting += fibres[i].state == State::at_warp_barrier;
            if (waiting < kWarp) continue;
            for (int i = warp; i < warp + kWarp; ++i) fibres[i].state = State::ready;
            progress = true;
        }
        if (progress) continue;
        note("a barrier that not all threads come to");
        return fibres.clear();
    }
}

// Memory of tensors. `owner` tells for each byte whether a tensor has it.
struct Arena {
    unsigned char *bytes = map(), *owner = map();
    size_t used = 0, live = 0;
    std::mutex mutex;

    static unsigned char* map() {
        void* p = mmap(nullptr, kArena, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        return p == MAP_FAILED ? nullptr : static_cast<unsigned char*>(p);
    }
};

Arena arena;

void check(uintptr_t address, size_t size, const char* access) {
    char what[80];
    const uintptr_t in_arena = address - reinterpret_cast<uintptr_t>(arena.bytes);
    const uintptr_t in_shared = address - reinterpret_cast<uintptr_t>(m2m_stylegan::cuda::shared_memory);
    if (in_arena < kArena) {
        if (!arena.owner[in_arena] || !arena.owner[in_arena + size - 1]) {
            std::snprintf(what, sizeof what, "%s of %zu bytes outside of all tensors", access, size);
            fail(what);
        } else if (size <= 16 && (size & (size - 1)) == 0 && address % size) {
            std::snprintf(what, sizeof what, "misaligned %s of %zu bytes", access, size);
            fail(what);
        }
    } else if (in_shared < kSharedBytes && in_shared + size > shared_size) {
        std::snprintf(what, sizeof what, "%s of %zu bytes outside of shared memory", access, size);
        fail(what);
    }
}

}  // namespace

int thread() { return current; }
void barrier() { leave(State::at_barrier); }

// Two places per thread in turn: when one is written again, all have passed the barrier behind which it was read.
uint64_t exchange(uint64_t value, int mask) {
    static uint64_t places[kMaxThreads][2];
    const int turn = fibres[current].turn ^= 1;
    places[current][turn] = value;
    leave(State::at_warp_barrier);
    return places[current ^ mask][turn];
}

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& function) {
    const dim3 &grid = config.gridDim, &block = config.blockDim;
    const bool fits = grid.x && grid.x < 1u << 31 && grid.y && grid.y < 1u << 16 && grid.z && grid.z < 1u << 16 && block.x && block.x % kWarp == 0 &&
                      block.x <= kMaxThreads && block.y == 1 && block.z == 1 && config.dynamicSmemBytes <= kSharedBytes;
    if (!fits) return cudaErrorInvalidConfiguration;
    gridDim = grid, blockDim = block, kernel = &function, shared_size = config.dynamicSmemBytes;
    fibres.resize(kMaxThreads);
    const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
    for (uint64_t i = 0; i < blocks && error.empty(); ++i) {
        blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y), static_cast<unsigned>(i / grid.x / grid.y)};
        std::memset(m2m_stylegan::cuda::shared_memory, 0xff, kSharedBytes);  // NaN
        run_block(static_cast<int>(block.x));
    }
    return error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

std::string take_error() {
    std::string taken;
    taken.swap(error);
    return taken;
}

void* allocate(size_t bytes) {
    const std::lock_guard<std::mutex> lock(arena.mutex);
    if (arena.live == 0) arena.used = 0;
    const size_t start = arena.used + kRedZone, rounded = (bytes + kRedZone - 1) / kRedZone * kRedZone;
    if (!arena.bytes || !arena.owner || start + rounded + kRedZone > kArena) return nullptr;
    arena.used = start + rounded;
    ++arena.live;
    std::memset(arena.bytes + start - kRedZone, 0xff, rounded + 2 * kRedZone);  // NaN in every dtype
    std::memset(arena.owner + start - kRedZone, 0, rounded + 2 * kRedZone);
    std::memset(arena.owner + start, 1, bytes);
    return arena.bytes + start;
}

void release(void* p) {
    const std::lock_guard<std::mutex> lock(arena.mutex);
    for (size_t i = static_cast<unsigned char*>(p) - arena.bytes; i < arena.used && arena.owner[i]; ++i) arena.owner[i] = 0;
    --arena.live;
}

}  // namespace emulation

extern "C" void emulation_set_descending(int value) { emulation::descending = value != 0; }

#define M2M_HOOKS(size)                                                                                           \
    extern "C" void __asan_load##size##_noabort(uintptr_t address) { emulation::check(address, size, "read"); }   \
    extern "C" void __asan_store##size##_noabort(uintptr_t address) { emulation::check(address, size, "write"); }
M2M_HOOKS(1)
M2M_HOOKS(2)
M2M_HOOKS(4)
M2M_HOOKS(8)
M2M_HOOKS(16)
extern "C" void __asan_loadN_noabort(uintptr_t address, size_t size) { emulation::check(address, size, "read"); }
extern "C" void __asan_storeN_noabort(uintptr_t address, size_t size) { emulation::check(address, size, "write"); }
extern "C" void __asan_handle_no_return() {}
