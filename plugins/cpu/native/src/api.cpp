// The C entry points: each goes to the kernel of the instruction set in use.
#include <stdlib.h>

#include "isa.h"
#include "pool.h"

#if defined(__GLIBC__)
#include <malloc.h>
#endif

using zif::kernels;
using zif::OneCall;

int32_t zif_cpu_abi(void) { return ZIF_CPU_ABI; }

int32_t zif_cpu_use_threads(int32_t num_threads) {
    const OneCall one;
    return zif::use_threads(num_threads) ? 0 : -1;
}

int32_t zif_cpu_keep_memory(void) {
#if defined(__GLIBC__)
    constexpr int kMost = 1 << 30;
    return mallopt(M_MMAP_THRESHOLD, kMost) && mallopt(M_TRIM_THRESHOLD, kMost) ? 0 : -1;
#else
    return -1;
#endif
}

void zif_cpu_linear(const zif_cpu_product* call) {
    const OneCall one;
    kernels().linear(call);
}

void zif_cpu_rms_norm(const zif_cpu_norm* call) {
    const OneCall one;
    kernels().rms_norm(call);
}

void zif_cpu_add_rms_norm(const zif_cpu_norm* call) {
    const OneCall one;
    kernels().add_rms_norm(call);
}

void zif_cpu_rotate(const zif_cpu_rotation* call) {
    const OneCall one;
    kernels().rotate(call);
}

void zif_cpu_gated_activation(const zif_cpu_gating* call) {
    const OneCall one;
    kernels().gated_activation(call);
}

void zif_cpu_store_kv(const zif_cpu_kv_rows* call) {
    const OneCall one;
    kernels().store_kv(call);
}

void zif_cpu_attend(const zif_cpu_attention* call) {
    const OneCall one;
    kernels().attend(call);
}

void zif_cpu_run(const zif_cpu_entry* entries, int64_t count) {
    for (int64_t i = 0; i < count; ++i) entries[i].function(entries[i].call);
}

void zif_cpu_choose(const zif_cpu_choice* call) {
    const OneCall one;
    kernels().choose(call);
}

int32_t zif_cpu_experts(const zif_cpu_experts_call* call) {
    const OneCall one;
    return kernels().experts(call);
}

void zif_cpu_quantized_linear(const zif_cpu_quantized_product* call) {
    const OneCall one;
    kernels().quantized_linear(call);
}

int32_t zif_cpu_quantized_experts(const zif_cpu_quantized_experts_call* call) {
    const OneCall one;
    return kernels().quantized_experts(call);
}
