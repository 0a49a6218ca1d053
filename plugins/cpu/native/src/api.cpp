// The C entry points: each goes to the kernel of the instruction set in use.
#include "isa.h"
#include "pool.h"

using zif::kernels;
using zif::OneCall;

int32_t zif_cpu_abi(void) { return ZIF_CPU_ABI; }

int32_t zif_cpu_use_threads(int32_t num_threads) {
    const OneCall one;
    return zif::use_threads(num_threads) ? 0 : -1;
}

void zif_cpu_linear(const void* x, int64_t x_stride, const void* weight, const void* bias, void* y, int64_t tokens,
                    int64_t inputs, int64_t outputs, int32_t dtype) {
    const OneCall one;
    kernels().linear(x, x_stride, weight, bias, y, tokens, inputs, outputs, dtype);
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

void zif_cpu_write_kv(const void* key, int64_t key_stride, const void* value, int64_t value_stride, void* keys,
                      void* values, int64_t block_stride, const int64_t* slots, int64_t tokens, int64_t kv_heads,
                      int64_t head_dim, int64_t block_size, int32_t dtype) {
    const OneCall one;
    kernels().write_kv(key, key_stride, value, value_stride, keys, values, block_stride, slots, tokens, kv_heads,
                       head_dim, block_size, dtype);
}

void zif_cpu_attend(const zif_cpu_attention* call) {
    const OneCall one;
    kernels().attend(call);
}

void zif_cpu_choose(const zif_cpu_choice* call) {
    const OneCall one;
    kernels().choose(call);
}

int32_t zif_cpu_experts(const zif_cpu_experts_call* call) {
    const OneCall one;
    return kernels().experts(call);
}
