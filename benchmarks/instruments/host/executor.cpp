// Runs a grid on the CPU: blocks one after another, the threads of a block as fibers that switch at
// barriers.
//
// With a seed, the order of the blocks, and that of the threads between any two barriers, is
// shuffled: what depends on either shows as other bits. Barriers are strict: a thread that leaves
// while others wait, or waits where others do not, fails the launch, as does a warp operation whose
// mask names a lane that does not take part.
#include <dlfcn.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#else
static void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
static void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

namespace host_cuda {
namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr unsigned kWarp = 32;

enum class State { kReady, kAtBarrier, kAtWarpBarrier, kDone };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  void* asan_stack = nullptr;
  State state = State::kReady;
  unsigned mask = 0;      // of the warp barrier that it waits at
  unsigned shuffles = 0;  // how many it has done: even and odd ones use different slots
  Place place;
};

struct Slots {
  alignas(8) char bytes[2][kWarp][8];
};

class Executor {
 public:
  void run(unsigned blocks, unsigned threads, void (*body)(void*), void* argument) {
    body_ = body;
    argument_ = argument;
    std::vector<unsigned> order(blocks);
    std::iota(order.begin(), order.end(), 0u);
    if (seed_ != 0) std::shuffle(order.begin(), order.end(), random_);
    for (const unsigned block : order) run_block(block, blocks, threads);
  }

  void seed(unsigned seed) {
    seed_ = seed;
    random_.seed(seed);
  }

  Fiber& current() { return *current_; }

  void wait(State state, unsigned mask = 0) {
    current_->state = state;
    current_->mask = mask;
    switch_to_scheduler(false);
  }

  char* slot(unsigned lane) {
    const unsigned warp = current_->place.thread.x / kWarp;
    return slots_[warp].bytes[current_->shuffles % 2][lane];
  }

  bool first_use(void* shared) { return poisoned_.insert(shared).second; }

 private:
  void run_block(unsigned block, unsigned blocks, unsigned threads) {
    while (fibers_.size() < threads) {
      fibers_.emplace_back(new Fiber);
      fibers_.back()->stack.resize(kStackBytes);
    }
    slots_.assign((threads + kWarp - 1) / kWarp, Slots{});
    poisoned_.clear();
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = *fibers_[t];
      fiber.state = State::kReady;
      fiber.shuffles = 0;
      fiber.place = {dim3(t, 0, 0), dim3(block, 0, 0), dim3(threads), dim3(blocks)};
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Executor::entry, 0);
    }
    std::vector<unsigned> order(threads);
    std::iota(order.begin(), order.end(), 0u);
    for (;;) {
      if (seed_ != 0) std::shuffle(order.begin(), order.end(), random_);
      for (const unsigned t : order) {
        if (fibers_[t]->state == State::kReady) switch_to(*fibers_[t]);
      }
      if (count(0, threads, State::kDone) == threads) return;
      if (!release(threads))
        throw std::runtime_error("threads of a block wait for ever: " + waiting(threads));
    }
  }

  unsigned count(unsigned first, unsigned last, State state) const {
    unsigned n = 0;
    for (unsigned t = first; t < last; ++t) n += fibers_[t]->state == state;
    return n;
  }

  // Everybody has run to a barrier or to the end. Opens what is complete.
  bool release(unsigned threads) {
    bool any = false;
    for (unsigned first = 0; first < threads; first += kWarp)
      any |= release_warp(first, std::min(first + kWarp, threads));
    if (any) return true;
    if (count(0, threads, State::kAtBarrier) != threads) return false;
    for (unsigned t = 0; t < threads; ++t) fibers_[t]->state = State::kReady;
    return true;
  }

  bool release_warp(unsigned first, unsigned last) {
    unsigned mask = 0, arrived = 0;
    for (unsigned t = first; t < last; ++t) {
      const Fiber& fiber = *fibers_[t];
      if (fiber.state != State::kAtWarpBarrier) continue;
      if (arrived != 0 && fiber.mask != mask) return false;
      mask = fiber.mask;
      arrived |= 1u << (t - first);
    }
    if (arrived == 0 || arrived != mask) return false;
    for (unsigned t = first; t < last; ++t) {
      if (fibers_[t]->state == State::kAtWarpBarrier) fibers_[t]->state = State::kReady;
    }
    return true;
  }

  std::string waiting(unsigned threads) const {
    return std::to_string(count(0, threads, State::kAtBarrier)) + " at a block's barrier, " +
           std::to_string(count(0, threads, State::kAtWarpBarrier)) + " at a warp's, " +
           std::to_string(count(0, threads, State::kDone)) + " have left";
  }

  void switch_to(Fiber& fiber) {
    current_ = &fiber;
    void* own = nullptr;
    __sanitizer_start_switch_fiber(&own, fiber.stack.data(), fiber.stack.size());
    swapcontext(&scheduler_, &fiber.context);
    __sanitizer_finish_switch_fiber(own, nullptr, nullptr);
  }

  void switch_to_scheduler(bool leaving) {
    Fiber& fiber = *current_;
    __sanitizer_start_switch_fiber(leaving ? nullptr : &fiber.asan_stack, scheduler_stack_,
                                   scheduler_stack_bytes_);
    swapcontext(&fiber.context, &scheduler_);
    __sanitizer_finish_switch_fiber(fiber.asan_stack, &scheduler_stack_, &scheduler_stack_bytes_);
  }

  static void entry();

  unsigned seed_ = 0;
  std::mt19937 random_;
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
  std::vector<Fiber*> fibers_;  // kept for the life of the process, like their stacks
  std::vector<Slots> slots_;
  std::unordered_set<void*> poisoned_;
  Fiber* current_ = nullptr;
  ucontext_t scheduler_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
};

Executor& executor() {
  static Executor* instance = new Executor;
  return *instance;
}

void Executor::entry() {
  Executor& self = executor();
  __sanitizer_finish_switch_fiber(nullptr, &self.scheduler_stack_, &self.scheduler_stack_bytes_);
  self.body_(self.argument_);
  self.current_->state = State::kDone;
  self.switch_to_scheduler(true);
}

cudaError_t last_error = cudaSuccess;
cudaError_t next_launch_error = cudaSuccess;
int current_device = 0;
int capability = 90;
unsigned long long launches = 0, launched_blocks = 0;
// Returns 0 where the kernel of this (mangled) name ran.
int (*diversion)(const char* name, unsigned blocks, unsigned threads, const void* params,
                 size_t bytes) = nullptr;

cudaError_t keep(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace

const Place& place() { return executor().current().place; }
void barrier() { executor().wait(State::kAtBarrier); }
void warp_barrier(unsigned mask) { executor().wait(State::kAtWarpBarrier, mask); }
void* lane_slot(unsigned lane) { return executor().slot(lane); }
void shuffle_done() { ++executor().current().shuffles; }

void poison_shared(void* memory, size_t bytes) {
  if (executor().first_use(memory)) memset(memory, 0xff, bytes);
}

void run(unsigned blocks, unsigned threads, void (*body)(void*), void* argument) {
  try {
    ++launches;
    launched_blocks += blocks;
    executor().run(blocks, threads, body, argument);
  } catch (const std::exception& error) {
    fprintf(stderr, "host_cuda: %s\n", error.what());
    keep(cudaErrorLaunchFailure);
  }
}

cudaError_t begin_launch(dim3 grid, dim3 block) {
  const cudaError_t injected = next_launch_error;
  next_launch_error = cudaSuccess;
  if (injected != cudaSuccess) return keep(injected);
  const bool possible = grid.x >= 1 && grid.x <= 0x7fffffffu && grid.y == 1 && grid.z == 1 &&
                        block.x >= 1 && block.x <= 1024 && block.y == 1 && block.z == 1;
  return possible ? cudaSuccess : keep(cudaErrorInvalidValue);
}

cudaError_t end_launch() { return last_error; }

bool divert(const void* kernel, dim3 grid, dim3 block, const void* params, size_t bytes) {
  if (diversion == nullptr) return false;
  Dl_info info;
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr ||
      diversion(info.dli_sname, grid.x, block.x, params, bytes) != 0)
    keep(cudaErrorLaunchFailure);
  return true;
}

}  // namespace host_cuda

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    default: return "cudaErrorLaunchFailure";
  }
}
const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }
cudaError_t cudaGetLastError() { return std::exchange(host_cuda::last_error, cudaSuccess); }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = host_cuda::current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  host_cuda::current_device = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? host_cuda::capability / 10
                                                          : host_cuda::capability % 10;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  memset(memory, value, bytes);
  return cudaSuccess;
}

// ---- What the tests steer, through ctypes

extern "C" {
void host_cuda_seed(unsigned seed) { host_cuda::executor().seed(seed); }  // 0: in order
void host_cuda_fail_next_launch(int error) {
  host_cuda::next_launch_error = static_cast<cudaError_t>(error);
}
void host_cuda_capability(int capability) { host_cuda::capability = capability; }
void host_cuda_divert(decltype(host_cuda::diversion) to) { host_cuda::diversion = to; }
unsigned long long host_cuda_launches() { return host_cuda::launches; }
unsigned long long host_cuda_blocks() { return host_cuda::launched_blocks; }
}
