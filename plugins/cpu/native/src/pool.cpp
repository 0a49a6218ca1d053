#include "pool.h"

#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include <pthread.h>

#if defined(__linux__)
#include <sched.h>
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace zif {
namespace {

constexpr int kSpins = 4000;  // some 20 to 60 microseconds: the time between two kernels of one step
constexpr int kPurposes = 7;

struct Work {
    void (*task)(const void*, int64_t, int) = nullptr;
    const void* context = nullptr;
    int64_t count = 0;
};

void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Where threads may run, and keeping out of one another's way. A kernel often wakes a thread on the processor of the
// thread that woke it, when no other one idles at that moment; both would take turns there for milliseconds.
class Processors {
public:
#if defined(__linux__)
    Processors() { known_ = sched_getaffinity(0, sizeof(allowed_), &allowed_) == 0 && CPU_COUNT(&allowed_) > 1; }

    int current() const { return known_ ? sched_getcpu() : -1; }

    // Leave processor `taken` to its thread, if that is where this one runs.
    void leave(int taken) const {
        if (taken < 0 || sched_getcpu() != taken || !CPU_ISSET(taken, &allowed_)) return;
        cpu_set_t others = allowed_;
        CPU_CLR(taken, &others);
        sched_setaffinity(0, sizeof(others), &others);
    }

private:
    cpu_set_t allowed_;
    bool known_ = false;
#else
    int current() const { return -1; }
    void leave(int) const {}
#endif
};

struct Scratch {
    void* memory[kPurposes] = {};
    int64_t bytes[kPurposes] = {};

    ~Scratch() {
        for (void* one : memory) std::free(one);
    }
};

class Pool {
public:
    Pool() { scratch_.push_back(std::make_unique<Scratch>()); }

    int size() const { return static_cast<int>(threads_.size()) + 1; }

    bool resize(int count) {
        if (count == size()) return true;
        stop();
        while (static_cast<int>(scratch_.size()) < count) scratch_.push_back(std::make_unique<Scratch>());
        for (int thread = 1; thread < count; ++thread) {
            try {
                threads_.emplace_back([this, thread, seen = round_.load()] { serve(thread, seen); });
            } catch (const std::system_error&) {
                return false;
            }
        }
        return true;
    }

    void run(const Work& work) {
        if (threads_.empty() || work.count == 1) {
            for (int64_t index = 0; index < work.count; ++index) work.task(work.context, index, 0);
            return;
        }
        work_ = work;
        caller_processor_ = processors_.current();
        next_.store(0, std::memory_order_relaxed);
        busy_.store(static_cast<int>(threads_.size()), std::memory_order_relaxed);
        round_.fetch_add(1, std::memory_order_seq_cst);
        if (sleeping_.load(std::memory_order_seq_cst) > 0) round_.notify_all();
        take(0);
        wait_for_others();
    }

    void* memory(int thread, int purpose, int64_t bytes) {
        Scratch& own = *scratch_[thread];
        if (own.bytes[purpose] < bytes) {
            std::free(own.memory[purpose]);
            const int64_t rounded = (bytes + bytes / 4 + 4095) / 4096 * 4096;
            own.memory[purpose] = std::aligned_alloc(64, rounded);
            if (own.memory[purpose] == nullptr) std::abort();
            own.bytes[purpose] = rounded;
        }
        return own.memory[purpose];
    }

    std::mutex& calls() { return calls_; }

    // In a child of fork the threads are gone: it has only the caller's. Their handles cannot be joined.
    void forget_threads() {
        new (&calls_) std::mutex;
        auto* lost = new std::vector<std::thread>(std::move(threads_));
        (void)lost;
        threads_.clear();
        sleeping_.store(0);
    }

private:
    void take(int thread) {
        for (;;) {
            const int64_t index = next_.fetch_add(1, std::memory_order_relaxed);
            if (index >= work_.count) break;
            work_.task(work_.context, index, thread);
        }
    }

    void wait_for_others() {
        for (int spin = 0; spin < kSpins; ++spin) {
            if (busy_.load(std::memory_order_acquire) == 0) return;
            relax();
        }
        for (int left; (left = busy_.load(std::memory_order_acquire)) != 0;) busy_.wait(left, std::memory_order_acquire);
    }

    void serve(int thread, uint32_t seen) {
        for (;;) {
            await(seen);
            ++seen;
            if (ending_.load(std::memory_order_acquire)) return;
            processors_.leave(caller_processor_);
            take(thread);
            if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) busy_.notify_one();
        }
    }

    void await(uint32_t seen) {
        for (int spin = 0; spin < kSpins; ++spin) {
            if (round_.load(std::memory_order_acquire) != seen) return;
            relax();
        }
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        while (round_.load(std::memory_order_seq_cst) == seen) round_.wait(seen, std::memory_order_acquire);
        sleeping_.fetch_sub(1, std::memory_order_relaxed);
    }

    void stop() {
        ending_.store(true, std::memory_order_release);
        round_.fetch_add(1, std::memory_order_release);
        round_.notify_all();
        for (std::thread& thread : threads_) thread.join();
        threads_.clear();
        ending_.store(false, std::memory_order_release);
    }

    std::mutex calls_;
    std::vector<std::thread> threads_;
    std::vector<std::unique_ptr<Scratch>> scratch_;
    Work work_;
    const Processors processors_;
    int caller_processor_ = -1;
    alignas(64) std::atomic<uint32_t> round_{0};
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<int> busy_{0};
    alignas(64) std::atomic<int> sleeping_{0};
    std::atomic<bool> ending_{false};
};

// Never destroyed: threads may wait in it while the process ends.
Pool& pool() {
    static Pool* const one = [] {
        auto* made = new Pool;
        pthread_atfork(nullptr, nullptr, [] { pool().forget_threads(); });
        return made;
    }();
    return *one;
}

}  // namespace

OneCall::OneCall() { pool().calls().lock(); }

OneCall::~OneCall() { pool().calls().unlock(); }

void parallel(int64_t count, void (*task)(const void*, int64_t, int), const void* context) {
    if (count <= 0) return;
    pool().run({task, context, count});
}

int num_threads() { return pool().size(); }

bool use_threads(int count) { return pool().resize(count < 1 ? 1 : count); }

void* scratch(int thread, int purpose, int64_t bytes) { return pool().memory(thread, purpose, bytes); }

}  // namespace zif
