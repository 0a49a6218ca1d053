// The writing of keys and values to a paged cache.
#pragma once

#include "attention_plan.h"

namespace zif {
namespace ZIF_ISA {
namespace {
namespace paged {

constexpr int64_t kWriteBytes = 1 << 17;  // of a task: less is not worth waking a thread

template <class T, class C>
void write_token(const zif_cpu_kv_rows& call, int64_t token) {
    const int64_t slot = call.slots[token];
    if (slot < 0) return;
    const int64_t bytes = row_bytes<C>(call.head_dim), block = slot / call.block_size;
    int64_t to = block * call.block_stride * static_cast<int64_t>(sizeof(C)) + slot % call.block_size * bytes;
    const T* key = static_cast<const T*>(call.key) + token * call.key_stride;
    const T* value = static_cast<const T*>(call.value) + token * call.value_stride;
    for (int64_t head = 0; head < call.kv_heads; ++head, to += call.block_size * bytes) {
        char *key_row = static_cast<char*>(call.keys) + to, *value_row = static_cast<char*>(call.values) + to;
        if constexpr (std::is_same_v<C, Int8>) {
            write_codes(key + head * call.head_dim, call.head_dim, key_row);
            write_codes(value + head * call.head_dim, call.head_dim, value_row);
        } else {
            std::memcpy(key_row, key + head * call.head_dim, bytes);
            std::memcpy(value_row, value + head * call.head_dim, bytes);
        }
    }
}

template <class T, class C>
void write_as(const zif_cpu_kv_rows& call) {
    const int64_t token_bytes = 2 * call.kv_heads * call.head_dim * static_cast<int64_t>(sizeof(T));
    const int64_t at_once = larger(1, kWriteBytes / token_bytes);
    parallel_for((call.tokens + at_once - 1) / at_once, [&](int64_t task, int) {
        for (int64_t token = task * at_once; token < smaller(call.tokens, (task + 1) * at_once); ++token) {
            write_token<T, C>(call, token);
        }
    });
}

template <class T>
void write_cache(const zif_cpu_kv_rows& call) {
    if (call.cache == ZIF_INT8) write_as<T, Int8>(call);
    else write_as<T, T>(call);
}

}  // namespace paged

void store_kv(const zif_cpu_kv_rows* call) {
    if (call->dtype == ZIF_BFLOAT16) paged::write_cache<BFloat16>(*call);
    else if (call->dtype == ZIF_FLOAT16) paged::write_cache<Float16>(*call);
    else paged::write_cache<float>(*call);
}

}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
