// Attention over a paged cache for short queries, and the writing of that cache.
//
// Keys are cut at multiples of `kSplitKeys` positions, and what each cut gives is merged in order. Which thread does
// what changes nothing in the arithmetic of a query: neither the other requests nor the other queries of its own do.
//
//     unit    some adjacent queries of one request; `rows` are its queries times the query heads of one KV head
//     task    a unit and a KV head, all cuts in order; of long requests each cut is a task, and the last one merges
//     split   scores of all rows [rows, keys], softmax of each row's visible keys, then values times weights
//
// Softmax in parts: Milakov and Gimelshein, 2018; parts in parallel: Dao et al., Flash-Decoding, 2023.
#pragma once

#include "attention_amx.h"
#include "attention_tile.h"
#include "pool.h"
#include "zif_cpu.h"

namespace zif {
namespace ZIF_ISA {
namespace {
namespace paged {

constexpr int64_t kSplitKeys = 256;
constexpr int64_t kScoreKeys = 16;  // keys that all rows use before the next ones: they stay in L1
constexpr int64_t kValueKeys = 32;
constexpr int64_t kUnitRows = 64;
constexpr int64_t kMaxPartialBytes = 64 << 20;
constexpr int64_t kOffsets = kSplitKeys + 128;  // keys behind the last one are asked for, and may be multiplied
static_assert(kSplitKeys + 16 <= kScoreStride);

inline int64_t first_visible(const zif_cpu_attention& call, int64_t position) {
    return call.window > 0 ? larger(0, position - call.window + 1) : 0;
}

// Some adjacent queries of one request.
struct Unit {
    int64_t request;
    int64_t token;  // the first one's row in the batch
    int64_t num_queries;
    int64_t position;  // the first one's
    int64_t first_split;
    int64_t num_splits;
    int64_t first_task;
    int64_t first_partial;  // [kv_heads, num_splits, Softmax] in the plan's partials; -1: a head's splits are one task
    int32_t* pending;       // [kv_heads], splits that are not done
};

struct Plan {
    Unit* units;
    int64_t num_units;
    int64_t num_tasks;
    float* partials;

    const Unit& unit_of(int64_t task) const {
        int64_t low = 0, high = num_units;
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (units[middle].first_task <= task ? low : high) = middle;
        }
        return units[low];
    }
};

// One KV head of a unit. Memory is its thread's.
template <class T>
struct HeadTask {
    const zif_cpu_attention& call;
    const Unit& unit;
    int64_t head;
    int64_t group;  // query heads of the KV head
    int64_t rows;
    int thread;
    int64_t width;  // head_dim in whole vectors
    int64_t query_width;
    const T* keys;
    const T* values;
    typename Dot<T>::Query* query;  // [rows, query_width]
    float* scores;                  // [rows, kScoreStride], later weights
    float* running;                 // Softmax
    float* fresh;                   // Softmax
    int64_t* offsets;               // [kOffsets], of the split's keys; behind the last one it is repeated
    int64_t* first;                 // [rows], of the split's keys the first that the row sees
    int64_t* last;                  // [rows], one behind the last

    HeadTask(const zif_cpu_attention& call, const Unit& unit, int64_t head, int thread)
        : call(call), unit(unit), head(head), group(call.heads / call.kv_heads), rows(unit.num_queries * group),
          thread(thread), width(rounded_up(call.head_dim, kLanes)),
          query_width(rounded_up(call.head_dim, Dot<T>::kStep)) {
        const int64_t start = head * call.block_size * call.head_dim;
        keys = static_cast<const T*>(call.keys) + start;
        values = static_cast<const T*>(call.values) + start;
        const int64_t indices = kOffsets + 2 * rows, state = Softmax::size(rows, width);
        const int64_t floats = rows * kScoreStride + 2 * state;
        const int64_t bytes = indices * 8 + floats * 4 + rows * query_width * sizeof(*query);
        offsets = static_cast<int64_t*>(scratch(thread, 2, bytes));
        first = offsets + kOffsets;
        last = first + rows;
        scores = reinterpret_cast<float*>(last + rows);
        running = scores + rows * kScoreStride;
        fresh = running + state;
        query = reinterpret_cast<typename Dot<T>::Query*>(fresh + state);
    }

    void keep_query() {
        std::memset(query, 0, rows * query_width * sizeof(*query));
        for (int64_t row = 0; row < rows; ++row) {
            const T* token = static_cast<const T*>(call.query) + (unit.token + row / group) * call.query_stride;
            const T* from = token + (head * group + row % group) * call.head_dim;
            Dot<T>::keep(from, query + row * query_width, call.head_dim);
        }
    }

    // Place the keys of a split that some query sees, and for each row those that it sees. Returns their number.
    int64_t place(int64_t split) {
        int64_t from = larger(split * kSplitKeys, first_visible(call, unit.position));
        if (call.block_size % kScoreKeys == 0) from -= from % kScoreKeys;  // then 16 keys lie together
        const int64_t to = smaller((split + 1) * kSplitKeys, unit.position + unit.num_queries);
        const int32_t* blocks = call.block_table + unit.request * call.table_stride;
        for (int64_t key = from; key < to;) {
            const int64_t block = key / call.block_size, end = smaller(to, (block + 1) * call.block_size);
            int64_t at = blocks[block] * call.block_stride + (key - block * call.block_size) * call.head_dim;
            for (; key < end; ++key, at += call.head_dim) offsets[key - from] = at;
        }
        for (int64_t i = to - from; i < kOffsets; ++i) offsets[i] = offsets[to - from - 1];
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t position = unit.position + row / group;
            last[row] = larger(0, smaller(position + 1, to) - from);
            first[row] = smaller(last[row], larger(0, first_visible(call, position) - from));
        }
        return to - from;
    }

    // Ask for the first keys or values of the split; the later ones are asked for by those who read.
    void ask_first(const T* from) const {
        const int64_t bytes = call.head_dim * sizeof(T);
        for (int64_t i = 0; i < kAheadKeys; ++i) {
            const char* row = reinterpret_cast<const char*>(from + offsets[i]);
            for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
        }
    }

    template <int kRows, bool kAsk>
    void score(int64_t row, int64_t key) {
        constexpr int64_t kKeys = kLanes / kRows;
        for (int64_t end = key + kScoreKeys; key < end; key += kKeys) {
            float each[kLanes];
            const auto* some = query + row * query_width;
            store(each, dots<T, kRows, kAsk>(some, query_width, keys, offsets + key, call.head_dim));
            for (int i = 0; i < kRows; ++i) {
                std::memcpy(scores + (row + i) * kScoreStride + key, each + i * kKeys, kKeys * sizeof(float));
            }
        }
    }

    template <int kRows>
    void add(int64_t row, int64_t from, int64_t to, const Softmax& softmax) {
        if (from >= to) return;
        const float* weights = scores + row * kScoreStride + from;
        const int64_t* places = offsets + from;
        float* weighted = softmax.weighted + row * width;
        int64_t at = 0;
        for (; at + kVectorsAtOnce * kLanes <= call.head_dim; at += kVectorsAtOnce * kLanes) {
            add_values<T, kRows, kVectorsAtOnce, true>(weights, values + at, places, to - from, weighted + at, width,
                                                       0);
        }
        for (; at < call.head_dim; at += kLanes) {
            const int64_t tail = at + kLanes <= call.head_dim ? 0 : call.head_dim - at;
            add_values<T, kRows, 1, true>(weights, values + at, places, to - from, weighted + at, width, tail);
        }
    }

    // Add the values of keys from - to to kRows rows: together where all see them, and only to those that do.
    template <int kRows>
    void add_visible(int64_t row, int64_t from, int64_t to, const Softmax& softmax) {
        int64_t start = from, end = to;
        for (int64_t i = row; i < row + kRows; ++i) {
            start = larger(start, first[i]);
            end = smaller(end, last[i]);
        }
        end = larger(start, end);
        for (int64_t i = row; i < row + kRows; ++i) {
            add<1>(i, larger(from, first[i]), smaller(smaller(start, last[i]), to), softmax);
        }
        add<kRows>(row, start, end, softmax);
        for (int64_t i = row; i < row + kRows; ++i) {
            add<1>(i, larger(end, first[i]), smaller(to, last[i]), softmax);
        }
    }


    void score_rows(int64_t key) {
        int64_t row = 0;
        if (rows >= 4) score<4, true>(row, key), row += 4;
        for (; row + 4 <= rows; row += 4) score<4, false>(row, key);
        if (row + 2 <= rows) score<2, true>(row, key), row += 2;
        if (row < rows) score<1, true>(row, key);
    }

    // scores[row][key] = query[row] @ key, of all rows and `count` keys; up to 15 more may be written.
    void score_all(int64_t count) {
#if defined(__AMX_BF16__)
        if constexpr (sizeof(query[0]) == sizeof(BFloat16)) {
            if (TileScores::serves(call.head_dim)) {
                const TileRegisters registers;
                TileScores tiles(query, rows, call.head_dim, thread);
                const bool adjacent = call.block_size >= kTile;
                int64_t key = 0;
                for (; key + kTileAhead <= rounded_up(count, kTile); key += kTileAhead) {
                    tiles.template put<kTilesAtOnce>(keys, offsets + key, adjacent, scores + key);
                }
                for (; key < count; key += kTile) tiles.template put<1>(keys, offsets + key, adjacent, scores + key);
                return;
            }
        }
#endif
        for (int64_t key = 0; key < count; key += kScoreKeys) score_rows(key);
    }

    void add_all(int64_t from, int64_t to, const Softmax& softmax) {
        int64_t row = 0;
        for (; row + 4 <= rows; row += 4) add_visible<4>(row, from, to, softmax);
        if (row + 2 <= rows) add_visible<2>(row, from, to, softmax), row += 2;
        if (row < rows) add_visible<1>(row, from, to, softmax);
    }

    void attend_split(int64_t split, const Softmax& softmax) {
        const int64_t count = place(split);
        ask_first(keys);
        score_all(count);
        ask_first(values);
        for (int64_t row = 0; row < rows; ++row) {
            float* seen = scores + row * kScoreStride + first[row];
            make_logits(seen, last[row] - first[row], call.scale, call.softcap);
            soften(seen, last[row] - first[row], softmax.maximum + row, softmax.total + row);
        }
        std::memset(softmax.weighted, 0, rows * width * sizeof(float));
        for (int64_t key = 0; key < count; key += kValueKeys) {
            add_all(key, smaller(key + kValueKeys, count), softmax);
        }
    }

    void start(const Softmax& softmax) const {
        const T* sinks = static_cast<const T*>(call.sinks);
        for (int64_t row = 0; row < rows; ++row) {
            softmax.maximum[row] = sinks == nullptr ? kLowest : to_float(sinks[head * group + row % group]);
            softmax.total[row] = sinks == nullptr ? 0.0f : 1.0f;
        }
        std::memset(softmax.weighted, 0, rows * width * sizeof(float));
    }

    void finish(const Softmax& softmax) const {
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t token = unit.token + row / group, query_head = head * group + row % group;
            T* output = static_cast<T*>(call.output) + (token * call.heads + query_head) * call.head_dim;
            const float* weighted = softmax.weighted + row * width;
            const float total = softmax.total[row];
            int64_t i = 0;
            for (; i + kLanes <= call.head_dim; i += kLanes) store(output + i, load(weighted + i) / total);
            if (i < call.head_dim) store_some(output + i, load(weighted + i) / total, call.head_dim - i);
        }
    }

    void run_all() {
        const Softmax whole(running, rows), part(fresh, rows);
        keep_query();
        start(whole);
        for (int64_t split = 0; split < unit.num_splits; ++split) {
            attend_split(unit.first_split + split, part);
            whole.merge(part, rows, width);
        }
        finish(whole);
    }

    // One split. The last of a head to be done merges all, in order.
    void run_one(int64_t split, float* partials) {
        const int64_t size = Softmax::size(rows, width);
        partials += head * unit.num_splits * size;
        keep_query();
        attend_split(unit.first_split + split, Softmax(partials + split * size, rows));
        if (__atomic_sub_fetch(unit.pending + head, 1, __ATOMIC_ACQ_REL) > 0) return;
        const Softmax whole(running, rows);
        start(whole);
        for (int64_t i = 0; i < unit.num_splits; ++i) whole.merge(Softmax(partials + i * size, rows), rows, width);
        finish(whole);
    }
};

// Cut the call into units. Returns their number; writes them where `units` is not null.
inline int64_t cut(const zif_cpu_attention& call, Unit* units) {
    const int64_t most = larger(1, kUnitRows * call.kv_heads / call.heads);
    int64_t num_units = 0;
    for (int64_t i = 0; i < call.num_requests; ++i) {
        const int64_t request = call.requests[i], begin = call.query_start[request];
        const int64_t end = call.query_start[request + 1], context = call.seq_lens[request] - (end - begin);
        for (int64_t token = begin; token < end; token += most, ++num_units) {
            if (units == nullptr) continue;
            Unit unit = {};
            unit.request = request;
            unit.token = token;
            unit.num_queries = smaller(most, end - token);
            unit.position = context + token - begin;
            unit.first_split = first_visible(call, unit.position) / kSplitKeys;
            unit.num_splits = (unit.position + unit.num_queries - 1) / kSplitKeys + 1 - unit.first_split;
            units[num_units] = unit;
        }
    }
    return num_units;
}

// Give each split its own task where a unit's head would be a large part of one thread's share of all splits.
inline Plan plan_tasks(const zif_cpu_attention& call) {
    const int64_t num_units = cut(call, nullptr), group = call.heads / call.kv_heads;
    const int64_t unit_bytes = num_units * sizeof(Unit);
    Plan plan = {nullptr, num_units, 0, nullptr};
    plan.units = static_cast<Unit*>(scratch(0, 0, unit_bytes + num_units * call.kv_heads * sizeof(int32_t)));
    auto* pending = reinterpret_cast<int32_t*>(plan.units + num_units);
    cut(call, plan.units);
    int64_t total = 0, floats = 0;
    for (int64_t i = 0; i < num_units; ++i) total += plan.units[i].num_splits * call.kv_heads;
    const int64_t share = num_threads() > 1 ? total / (8 * num_threads()) : total;
    for (int64_t i = 0; i < num_units; ++i) {
        Unit& unit = plan.units[i];
        const int64_t size = Softmax::size(unit.num_queries * group, rounded_up(call.head_dim, kLanes));
        const int64_t wanted = call.kv_heads * unit.num_splits * size;
        const bool apart = unit.num_splits > larger(1, share) && (floats + wanted) * 4 <= kMaxPartialBytes;
        unit.first_task = plan.num_tasks;
        unit.first_partial = apart ? floats : -1;
        unit.pending = pending + i * call.kv_heads;
        for (int64_t head = 0; head < call.kv_heads; ++head) unit.pending[head] = unit.num_splits;
        plan.num_tasks += call.kv_heads * (apart ? unit.num_splits : 1);
        floats += apart ? wanted : 0;
    }
    plan.partials = static_cast<float*>(scratch(0, 1, floats * sizeof(float)));
    return plan;
}

template <class T>
void attend_as(const zif_cpu_attention& call) {
    const Plan plan = plan_tasks(call);
    parallel_for(plan.num_tasks, [&](int64_t task, int thread) {
        const Unit& unit = plan.unit_of(task);
        const int64_t own = task - unit.first_task, per_head = unit.first_partial < 0 ? 1 : unit.num_splits;
        HeadTask<T> one(call, unit, own / per_head, thread);
        if (unit.first_partial < 0) one.run_all();
        else one.run_one(own % per_head, plan.partials + unit.first_partial);
    });
}

}  // namespace paged

void attend(const zif_cpu_attention* call) {
    if (call->dtype == ZIF_BFLOAT16) paged::attend_as<BFloat16>(*call);
    else if (call->dtype == ZIF_FLOAT16) paged::attend_as<Float16>(*call);
    else paged::attend_as<float>(*call);
}

void write_kv(const void* key, int64_t key_stride, const void* value, int64_t value_stride, void* keys, void* values,
              int64_t block_stride, const int64_t* slots, int64_t tokens, int64_t kv_heads, int64_t head_dim,
              int64_t block_size, int32_t dtype) {
    constexpr int64_t kTaskBytes = 1 << 17;  // less is not worth waking a thread
    const int64_t element = dtype == ZIF_FLOAT32 ? 4 : 2, head_bytes = head_dim * element;
    const int64_t at_once = paged::larger(1, kTaskBytes / (2 * kv_heads * head_bytes));
    parallel_for((tokens + at_once - 1) / at_once, [&](int64_t task, int) {
        for (int64_t token = task * at_once; token < paged::smaller(tokens, (task + 1) * at_once); ++token) {
            if (slots[token] < 0) continue;
            const int64_t block = slots[token] / block_size, offset = slots[token] % block_size;
            int64_t to = (block * block_stride + offset * head_dim) * element;
            const char* new_key = static_cast<const char*>(key) + token * key_stride * element;
            const char* new_value = static_cast<const char*>(value) + token * value_stride * element;
            for (int64_t head = 0; head < kv_heads; ++head, to += block_size * head_bytes) {
                std::memcpy(static_cast<char*>(keys) + to, new_key + head * head_bytes, head_bytes);
                std::memcpy(static_cast<char*>(values) + to, new_value + head * head_bytes, head_bytes);
            }
        }
    });
}

}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
