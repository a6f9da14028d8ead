// CUDA C++ on the CPU, as much of it as our kernels use, so that they are tested without a GPU.
//
// The threads of a block are fibers that run one after another until each waits at a barrier, so a block's result does
// not depend on luck, and the address sanitizer sees every access. They run from the first to the last or, with
// `backwards`, from the last to the first: where a barrier is missing, one of the two reads what is not there yet. Blocks run
// one after another. Shared memory is filled with NaN before each block: what a kernel reads there before it writes shows
// in its result.
#pragma once
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};

namespace emulation {

constexpr size_t STACK_BYTES = 256 << 10;

struct Barrier {
    int waiting = 0;
    uint64_t generation = 0;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    void* fake_stack = nullptr;
    dim3 thread;
    unsigned index;
    bool done = false;
    // The barrier that it waits at, and the generation that has to pass.
    const Barrier* waits_at = nullptr;
    uint64_t generation = 0;
    // Which of the two exchange buffers of its warp is next.
    unsigned parity = 0;
};

struct Warp {
    Barrier barrier;
    // Two, taken in turn: one is read while the next exchange is written.
    alignas(16) unsigned char exchange[2][32][16];
};

struct Block {
    dim3 index, size, grid;
    unsigned char* shared = nullptr;
    Barrier barrier;
    std::vector<Warp> warps;
    std::vector<Fiber> fibers;
    Fiber* running = nullptr;
    ucontext_t scheduler;
    void* scheduler_fake_stack = nullptr;
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_bytes = 0;
    std::function<void()> kernel;
};

inline Block block;
inline bool backwards = false;

inline Fiber& current() { return *block.running; }

inline void switch_to_scheduler(Fiber& fiber, bool for_good) {
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, block.scheduler_stack,
                                   block.scheduler_stack_bytes);
    swapcontext(&fiber.context, &block.scheduler);
    __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
}

inline void entry() {
    __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_stack_bytes);
    block.kernel();
    current().done = true;
    switch_to_scheduler(current(), true);
}

// Waits until `expected` fibers have come to this barrier.
inline void wait(Barrier& barrier, int expected) {
    uint64_t generation = barrier.generation;
    if (++barrier.waiting == expected) {
        barrier.waiting = 0;
        barrier.generation++;
    } else {
        current().waits_at = &barrier;
        current().generation = generation;
        switch_to_scheduler(current(), false);
    }
}

inline int warp_size(unsigned warp) {
    unsigned threads = block.size.x * block.size.y * block.size.z;
    return int(threads - warp * 32 < 32 ? threads - warp * 32 : 32);
}

inline void wait_warp() {
    unsigned warp = current().index / 32;
    wait(block.warps[warp].barrier, warp_size(warp));
}

template <class T>
T exchange(T value, unsigned from_lane) {
    static_assert(sizeof(T) <= 16);
    Warp& warp = block.warps[current().index / 32];
    unsigned lane = current().index % 32, parity = current().parity++ % 2;
    std::memcpy(warp.exchange[parity][lane], &value, sizeof(T));
    wait_warp();
    std::memcpy(&value, warp.exchange[parity][from_lane % 32], sizeof(T));
    return value;
}

// Runs a kernel over a grid; `call` is the kernel with its arguments.
inline void launch(dim3 grid, dim3 size, size_t shared_bytes, std::function<void()> call) {
    unsigned threads = size.x * size.y * size.z;
    block.kernel = std::move(call);
    block.size = size;
    block.grid = grid;
    block.fibers = std::vector<Fiber>(threads);
    for (Fiber& fiber : block.fibers) fiber.stack = std::make_unique<char[]>(STACK_BYTES);
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                block.index = {x, y, z};
                // Its own allocation, so that the address sanitizer knows where it ends.
                std::unique_ptr<unsigned char[]> shared(static_cast<unsigned char*>(
                    ::operator new[](shared_bytes + 1, std::align_val_t(32))));
                std::memset(shared.get(), 0xff, shared_bytes);
                block.shared = shared.get();
                block.barrier = Barrier();
                block.warps = std::vector<Warp>((threads + 31) / 32);
                unsigned left = threads;
                for (unsigned i = 0; i < threads; i++) {
                    Fiber& fiber = block.fibers[i];
                    fiber.index = i;
                    fiber.thread = {i % size.x, i / size.x % size.y, i / size.x / size.y};
                    fiber.done = false;
                    fiber.waits_at = nullptr;
                    fiber.parity = 0;
                    getcontext(&fiber.context);
                    fiber.context.uc_stack.ss_sp = fiber.stack.get();
                    fiber.context.uc_stack.ss_size = STACK_BYTES;
                    fiber.context.uc_link = nullptr;
                    makecontext(&fiber.context, entry, 0);
                }
                while (left) {
                    bool any = false;
                    for (unsigned i = 0; i < threads; i++) {
                        Fiber& fiber = block.fibers[backwards ? threads - 1 - i : i];
                        if (fiber.done || (fiber.waits_at && fiber.waits_at->generation == fiber.generation)) continue;
                        any = true;
                        fiber.waits_at = nullptr;
                        block.running = &fiber;
                        __sanitizer_start_switch_fiber(&block.scheduler_fake_stack, fiber.stack.get(), STACK_BYTES);
                        swapcontext(&block.scheduler, &fiber.context);
                        __sanitizer_finish_switch_fiber(block.scheduler_fake_stack, nullptr, nullptr);
                        if (fiber.done) left--;
                    }
                    if (!any) {
                        std::fprintf(stderr, "deadlock: %u of %u threads wait at barriers that the others do not reach\n",
                                     left, threads);
                        std::abort();
                    }
                }
                // The allocation was aligned by hand.
                ::operator delete[](shared.release(), std::align_val_t(32));
            }
}

}  // namespace emulation

#define threadIdx (emulation::current().thread)
#define blockIdx (emulation::block.index)
#define blockDim (emulation::block.size)
#define gridDim (emulation::block.grid)
#define SHARED_MEMORY(name) unsigned char* name = emulation::block.shared

inline void __syncthreads() {
    emulation::wait(emulation::block.barrier, int(emulation::block.fibers.size()));
}
inline void __syncwarp() { emulation::wait_warp(); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulation::exchange(value, (emulation::current().index % 32) ^ unsigned(mask));
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
    return emulation::exchange(value, unsigned(lane));
}
inline int __any_sync(unsigned, int value) {
    int any = value != 0;
    for (int mask = 16; mask; mask /= 2) any |= __shfl_xor_sync(~0u, any, mask);
    return any;
}
template <class T>
T __ldg(const T* p) {
    return *p;
}
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
using std::max;
using std::min;

struct __nv_bfloat16 {
    uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
inline __nv_bfloat16 __float2bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (std::isnan(x)) return {uint16_t(0x7fff)};
    bits += 0x7fff + (bits >> 16 & 1);
    return {uint16_t(bits >> 16)};
}

// Matrix fragments: lane 0 has the whole of it. Kernels may only fill, load, multiply and store them.
namespace nvcuda::wmma {
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
    T values[16][16];
};

inline bool first_lane() { return emulation::current().index % 32 == 0; }

template <class Use, class T, class Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& f, const T* from, unsigned stride) {
    if (reinterpret_cast<uintptr_t>(from) % 32) std::abort();
    __syncwarp();
    if (first_lane())
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 16; j++)
                f.values[i][j] = std::is_same_v<Layout, col_major> ? from[j * stride + i] : from[i * stride + j];
    __syncwarp();
}
inline void load_matrix_sync(fragment<accumulator, 16, 16, 16, float>& f, const float* from, unsigned stride, layout_t) {
    if (reinterpret_cast<uintptr_t>(from) % 32) std::abort();
    __syncwarp();
    if (first_lane())
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 16; j++) f.values[i][j] = from[i * stride + j];
    __syncwarp();
}
inline void store_matrix_sync(float* to, const fragment<accumulator, 16, 16, 16, float>& f, unsigned stride, layout_t) {
    if (reinterpret_cast<uintptr_t>(to) % 32) std::abort();
    __syncwarp();
    if (first_lane())
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 16; j++) to[i * stride + j] = f.values[i][j];
    __syncwarp();
}
inline void fill_fragment(fragment<accumulator, 16, 16, 16, float>& f, float x) {
    for (auto& row : f.values)
        for (float& value : row) value = x;
}
template <class A, class B>
void mma_sync(fragment<accumulator, 16, 16, 16, float>& d, const fragment<matrix_a, 16, 16, 16, __nv_bfloat16, A>& a,
              const fragment<matrix_b, 16, 16, 16, __nv_bfloat16, B>& b,
              const fragment<accumulator, 16, 16, 16, float>& c) {
    if (!first_lane()) return;
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) {
            float sum = c.values[i][j];
            for (int k = 0; k < 16; k++) sum += __bfloat162float(a.values[i][k]) * __bfloat162float(b.values[k][j]);
            d.values[i][j] = sum;
        }
}
}  // namespace nvcuda::wmma
