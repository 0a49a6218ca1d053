// Threads that wait for work: one pool per process. An idle pool sleeps and uses no processor time.
#pragma once

#include <cstdint>

namespace zif {

// One call of the library at a time: held for the whole of it, because a call's scratch memory lives as long. What
// follows is for whoever holds it.
class OneCall {
public:
    OneCall();
    ~OneCall();
    OneCall(const OneCall&) = delete;
};

// Run task(context, index, thread) for every index below `count`, on all threads; `thread` counts from 0 below
// `num_threads()`. Indices are handed out one by one, in order. Returns when all have run. Tasks must not call
// it themselves.
void parallel(int64_t count, void (*task)(const void* context, int64_t index, int thread), const void* context);

// The same for something that can be called with (index, thread).
template <class Function>
void parallel_for(int64_t count, const Function& function) {
    parallel(
        count,
        [](const void* context, int64_t index, int thread) {
            (*static_cast<const Function*>(context))(index, thread);
        },
        &function);
}

int num_threads();

// What one thread does sooner than another one wakes.
constexpr int64_t kElementsOfTask = 16384;
constexpr int64_t kTasksOfThread = 4;

// Run function(begin, end, thread) on ranges that together are all rows.
template <class Function>
inline void for_rows(int64_t rows, int64_t elements_of_row, const Function& function) {
    if (rows <= 0) return;
    const int64_t threads = num_threads(), most = threads > 1 ? threads * kTasksOfThread : 1;
    int64_t tasks = rows * elements_of_row / kElementsOfTask;
    tasks = tasks < most ? tasks : most;
    tasks = tasks < rows ? tasks : rows;
    tasks = tasks > 1 ? tasks : 1;
    parallel_for(tasks, [&](int64_t task, int thread) {
        function(rows * task / tasks, rows * (task + 1) / tasks, thread);
    });
}

// Returns false when the system gives no more threads; the pool then has those that it got.
bool use_threads(int count);

// Memory of at least `bytes`, 64-byte aligned, of this thread number, undefined content, kept between calls: valid until
// the same thread number asks for the same purpose again. Purposes: 0 to 6.
void* scratch(int thread, int purpose, int64_t bytes);

}  // namespace zif
