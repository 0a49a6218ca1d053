// The C entry points: each goes to the kernel of the instruction set in use.
#include <stdlib.h>

#include "isa.h"
#include "pool.h"
#include "rows.h"

#if defined(__GLIBC__)
#include <malloc.h>
#endif

using zif::kernels;
using zif::OneCall;

namespace {

void compute_alone(const zif::RowWise& kernel, const void* call) {
    zif::RowRun run;
    run.add(kernel, call);
    run.compute();
}

template <class Call>
bool is(void (*function)(const void*), void (*entry_point)(const Call*)) {
    return function == reinterpret_cast<void (*)(const void*)>(entry_point);
}

// The kernel behind an entry point, null where it is none of rows.
const zif::RowWise* row_wise_kernel(void (*function)(const void*)) {
    if (is(function, zif_cpu_rms_norm)) return &zif::kRmsNorm;
    if (is(function, zif_cpu_add_rms_norm)) return &zif::kAddRmsNorm;
    if (is(function, zif_cpu_rotate)) return &zif::kRotate;
    if (is(function, zif_cpu_store_kv)) return &zif::kStore;
    return nullptr;
}

const zif::Kernels& kernels_of(const zif_cpu_compact& compact) {
    return *static_cast<const zif::Kernels*>(compact.made_by);
}

const zif::Kernels& kernels_of(const zif_cpu_product& call) {
    return call.compact != nullptr ? kernels_of(*call.compact) : kernels();
}

}  // namespace

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
    kernels_of(*call).linear(call);
}

void zif_cpu_rms_norm(const zif_cpu_norm* call) { compute_alone(zif::kRmsNorm, call); }

void zif_cpu_add_rms_norm(const zif_cpu_norm* call) { compute_alone(zif::kAddRmsNorm, call); }

void zif_cpu_rotate(const zif_cpu_rotation* call) { compute_alone(zif::kRotate, call); }

void zif_cpu_gated_activation(const zif_cpu_gating* call) {
    const OneCall one;
    kernels().gated_activation(call);
}

void zif_cpu_store_kv(const zif_cpu_kv_rows* call) { compute_alone(zif::kStore, call); }

void zif_cpu_attend(const zif_cpu_attention* call) {
    const OneCall one;
    kernels().attend(call);
}

void zif_cpu_run(const zif_cpu_entry* entries, int64_t count) {
    zif::RowRun run;
    for (int64_t i = 0; i < count; ++i) {
        const zif_cpu_entry& entry = entries[i];
        const zif::RowWise* kernel = row_wise_kernel(entry.function);
        if (kernel != nullptr && run.add(*kernel, entry.call)) continue;
        run.compute();
        if (kernel == nullptr) entry.function(entry.call);
        else run.add(*kernel, entry.call);
    }
    run.compute();
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

void zif_cpu_gated_linear(const zif_cpu_gated_product* call) {
    const OneCall one;
    kernels_of(call->product).gated_linear(call);
}

void zif_cpu_gated_quantized_linear(const zif_cpu_gated_quantized_product* call) {
    const OneCall one;
    kernels().gated_quantized_linear(call);
}

int32_t zif_cpu_quantized_experts(const zif_cpu_quantized_experts_call* call) {
    const OneCall one;
    return kernels().quantized_experts(call);
}

int32_t zif_cpu_compact_weight(const zif_cpu_compaction* call) {
    const OneCall one;
    const zif::Kernels& in_use = kernels();
    const_cast<zif_cpu_compact*>(call->compact)->made_by = &in_use;
    return in_use.compact_weight(call);
}

void zif_cpu_unpack_weight(const zif_cpu_compaction* call) {
    const OneCall one;
    kernels_of(*call->compact).unpack_weight(call);
}
