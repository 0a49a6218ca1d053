// The writing of keys and values to a paged cache. The functions of the table serve one token.
#pragma once

#include "attention_plan.h"

namespace zif {
namespace ZIF_ISA {
namespace {
namespace paged {

// Where the rows of a token go: head h's is at `first` + h * `step`, of keys and of values, in bytes.
struct SlotRows {
    int64_t first;
    int64_t step;
    int64_t bytes;  // of a row

    template <class C>
    static SlotRows of(const zif_cpu_kv_rows& call, int64_t slot) {
        const int64_t bytes = row_bytes<C>(call.head_dim), block = slot / call.block_size;
        const int64_t first = block * call.block_stride * static_cast<int64_t>(sizeof(C));
        return {first + slot % call.block_size * bytes, call.block_size * bytes, bytes};
    }
};

// Inlined, because to GCC a function that only asks the caches has no effect: it leaves out calls of it.
template <class C>
__attribute__((always_inline)) inline void ask_for_slot(const zif_cpu_kv_rows& call, int64_t slot) {
    const SlotRows rows = SlotRows::of<C>(call, slot);
    for (int64_t head = 0, at = rows.first; head < call.kv_heads; ++head, at += rows.step) {
        for (int64_t byte = 0; byte < rows.bytes; byte += 64) {
            __builtin_prefetch(static_cast<char*>(call.keys) + at + byte, 1, 2);
            __builtin_prefetch(static_cast<char*>(call.values) + at + byte, 1, 2);
        }
    }
}

template <class T, class C>
void write_token(const zif_cpu_kv_rows& call, int64_t token) {
    const SlotRows rows = SlotRows::of<C>(call, call.slots[token]);
    const T* key = static_cast<const T*>(call.key) + token * call.key_stride;
    const T* value = static_cast<const T*>(call.value) + token * call.value_stride;
    int64_t to = rows.first;
    for (int64_t head = 0; head < call.kv_heads; ++head, to += rows.step) {
        char *key_row = static_cast<char*>(call.keys) + to, *value_row = static_cast<char*>(call.values) + to;
        if constexpr (std::is_same_v<C, Int8>) {
            write_codes(key + head * call.head_dim, call.head_dim, key_row);
            write_codes(value + head * call.head_dim, call.head_dim, value_row);
        } else {
            std::memcpy(key_row, key + head * call.head_dim, rows.bytes);
            std::memcpy(value_row, value + head * call.head_dim, rows.bytes);
        }
    }
}

template <class T>
void write_cache(const zif_cpu_kv_rows& call, int64_t token) {
    if (call.cache == ZIF_INT8) write_token<T, Int8>(call, token);
    else write_token<T, T>(call, token);
}

}  // namespace paged

void store_kv(const zif_cpu_kv_rows* call, int64_t token, int) {
    if (call->slots[token] < 0) return;
    if (call->dtype == ZIF_BFLOAT16) paged::write_cache<BFloat16>(*call, token);
    else if (call->dtype == ZIF_FLOAT16) paged::write_cache<Float16>(*call, token);
    else paged::write_cache<float>(*call, token);
}

// Ask the caches for where store_kv will write.
void ask_for_kv(const zif_cpu_kv_rows* call, int64_t token, int) {
    const int64_t slot = call->slots[token];
    if (slot < 0) return;
    if (call->cache == ZIF_INT8) paged::ask_for_slot<paged::Int8>(*call, slot);
    else if (call->cache == ZIF_FLOAT32) paged::ask_for_slot<float>(*call, slot);
    else paged::ask_for_slot<BFloat16>(*call, slot);
}

}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
