// How fast all cores together read memory: sums of a buffer that no cache holds. Returns bytes per second.
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <omp.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static uint64_t sum(const uint64_t *words, size_t count) {
    uint64_t totals[64] = {0};
    for (size_t i = 0; i + 64 <= count; i += 64) {
        __builtin_prefetch(words + i + 1024);
        for (size_t j = 0; j < 64; j++) totals[j] += words[i + j];
    }
    uint64_t total = 0;
    for (size_t j = 0; j < 64; j++) total += totals[j];
    return total;
}

double read_bandwidth(size_t bytes, int threads, int repeats) {
    uint64_t *words = aligned_alloc(4096, bytes);
    if (!words) return 0;
    memset(words, 1, bytes);
    size_t part = bytes / 8 / threads;
    volatile uint64_t sink = 0;
    double best = 0;
    for (int repeat = 0; repeat < repeats; repeat++) {
        double started = now();
        uint64_t total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
        total += sum(words + part * omp_get_thread_num(), part);
        double rate = part * 8.0 * threads / (now() - started);
        if (rate > best) best = rate;
        sink += total;
    }
    free(words);
    return best;
}
