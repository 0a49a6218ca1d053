// How a step's attention is cut into tasks, and where the cache has the rows of a head.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "attention_amx.h"
#include "attention_tile.h"
#include "pool.h"
#include "zif_cpu.h"

namespace zif {
namespace ZIF_ISA {
namespace {
namespace paged {

constexpr int64_t kMaxPartialBytes = 64 << 20;
constexpr int64_t kTasksAtOnce = 8;  // that a thread takes where there are many
constexpr int64_t kPlaces = kSplitKeys + kPanelKeys + kTileAhead;  // keys behind the last one may be multiplied

// Whether products of T are made by tiles.
template <class T>
#if defined(__AMX_BF16__)
constexpr bool kByTiles = kPaired<T>;
#else
constexpr bool kByTiles = false;
#endif

constexpr int64_t kFewQueries = 8;

template <bool kTiled>
constexpr int64_t kUnitRows = kTiled ? 256 : 64;

template <bool kTiled>
int64_t held_rows(int64_t rows) {
    return kTiled && rows > 16 ? rounded_up(rows, 16) : rows;
}

template <bool kTiled>
int64_t width_of(int64_t head_dim) {
    return rounded_up(head_dim, kTiled ? 32 : kLanes);
}

inline int64_t first_visible(const zif_cpu_attention& call, int64_t position) {
    return call.window > 0 ? larger(0, position - call.window + 1) : 0;
}

// Keys of a split, counted from its first: from - to - 1 are seen, start - stop - 1 are these in whole steps.
struct KeyRange {
    int64_t from;
    int64_t to;
    int64_t start;
    int64_t stop;
};

// Some adjacent queries of one request.
struct Unit {
    bool few;  // queries that the request has in this step: keys and values are then used as they lie
    int64_t request;
    int64_t token;  // the first one's row in the batch
    int64_t num_queries;
    int64_t position;  // the first one's
    int64_t first_split;
    int64_t num_splits;
    int64_t first_task;
    int64_t first_partial;  // [kv_heads, num_splits, Softmax] in the plan's partials; -1: a head's splits are one task
    int32_t* pending;       // [kv_heads], splits that are not done

    KeyRange keys(const zif_cpu_attention& call, int64_t split) const {
        const int64_t base = split * kSplitKeys;
        const int64_t from = larger(0, first_visible(call, position) - base);
        const int64_t to = smaller(kSplitKeys, position + num_queries - base);
        return {from, to, from / kKeyStep * kKeyStep, rounded_up(to, kKeyStep)};
    }
};

// The first thing that a task computes. unit: null where there is no task.
struct Place {
    const Unit* unit;
    int64_t head;
    int64_t split;
};

struct Plan {
    Unit* units;
    int64_t num_units;
    int64_t num_tasks;
    float* partials;

    Place place_of(int64_t task) const {
        if (task >= num_tasks) return {nullptr, 0, 0};
        int64_t low = 0, high = num_units;
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (units[middle].first_task <= task ? low : high) = middle;
        }
        const Unit& unit = units[low];
        const int64_t own = task - unit.first_task, per_head = unit.first_partial < 0 ? 1 : unit.num_splits;
        return {&unit, own / per_head, unit.first_split + own % per_head};
    }
};

// The memory of a task, piece by piece.
struct Pieces {
    char* memory;
    int64_t used;

    template <class T>
    T* take(int64_t count) {
        T* piece = reinterpret_cast<T*>(memory + used);
        used += rounded_up(count * sizeof(T), 64);
        return piece;
    }
};

// Where the cache has a request's rows of one head.
template <class C>
struct HeadRows {
    const zif_cpu_attention& call;
    const int32_t* blocks;
    int64_t bytes;  // of a row
    int64_t first;

    HeadRows(const zif_cpu_attention& call, int64_t request, int64_t head)
        : call(call), blocks(call.block_table + request * call.table_stride), bytes(row_bytes<C>(call.head_dim)),
          first(head * call.block_size * bytes) {}

    // Put the addresses of rows from - to - 1 of `cache`, which is the call's keys or values.
    void find(const void* cache, int64_t from, int64_t to, const char** rows) const {
        int64_t block = from / call.block_size, base = block * call.block_size;
        for (int64_t key = from; key < to; ++block, base += call.block_size) {
            const int64_t end = smaller(to, base + call.block_size);
            const char* row = static_cast<const char*>(cache) + first + (key - base) * bytes +
                              blocks[block] * call.block_stride * static_cast<int64_t>(sizeof(C));
            for (; key < end; ++key, row += bytes) rows[key - from] = row;
        }
    }
};

// Put the addresses of a split's keys that some query sees, of `most` at most. Returns their number.
template <class C>
int64_t find_keys(const zif_cpu_attention& call, const Place& place, int64_t most, const char** rows) {
    const KeyRange range = place.unit->keys(call, place.split);
    const int64_t from = place.split * kSplitKeys + range.from, count = smaller(most, range.to - range.from);
    HeadRows<C>(call, place.unit->request, place.head).find(call.keys, from, from + count, rows);
    return count;
}

// Put what each query row of a unit sees of a split, of whose keys some query sees `range`.
inline void put_seen(const zif_cpu_attention& call, const Unit& unit, int64_t split, const KeyRange& range,
                     Seen* seen) {
    const int64_t group = call.heads / call.kv_heads, base = split * kSplitKeys;
    for (int64_t row = 0; row < unit.num_queries * group; ++row) {
        const int64_t position = unit.position + row / group;
        const int64_t last = larger(range.from, smaller(position + 1 - base, range.to));
        const int64_t first = smaller(last, larger(range.from, first_visible(call, position) - base));
        seen[row] = {first, last, range.start, range.stop};
    }
}

// Whether no request has more than a few queries in this step, as in decoding, and the number may decide how they are
// computed.
inline bool all_few(const zif_cpu_attention& call) {
    for (int64_t i = 0; i < call.num_requests; ++i) {
        const int32_t* start = call.query_start + call.requests[i];
        if (start[1] - start[0] > kFewQueries) return false;
    }
    return !call.batch_invariant;
}

// Cut the call into units, of long requests the last one first: they are the longest, and may not come at the end.
// Returns their number; writes them where `units` is not null.
template <bool kTiled>
inline int64_t cut(const zif_cpu_attention& call, Unit* units) {
    const int64_t most = larger(1, kUnitRows<kTiled> * call.kv_heads / call.heads);
    int64_t num_units = 0;
    for (int64_t i = 0; i < call.num_requests; ++i) {
        const int64_t request = call.requests[i], begin = call.query_start[request];
        const int64_t end = call.query_start[request + 1], context = call.seq_lens[request] - (end - begin);
        const int64_t count = (end - begin + most - 1) / most;
        for (int64_t own = count - 1; own >= 0 && units != nullptr; --own) {
            Unit& unit = units[num_units + count - 1 - own] = {};
            unit.request = request;
            unit.few = !call.batch_invariant && end - begin <= kFewQueries;
            unit.token = begin + own * most;
            unit.num_queries = smaller(most, end - unit.token);
            unit.position = context + own * most;
            unit.first_split = first_visible(call, unit.position) / kSplitKeys;
            unit.num_splits = (unit.position + unit.num_queries - 1) / kSplitKeys + 1 - unit.first_split;
        }
        num_units += count;
    }
    return num_units;
}

// Give each split its own task where a unit's head would be a large part of one thread's share of all splits.
template <bool kTiled>
inline Plan plan_tasks(const zif_cpu_attention& call) {
    const int64_t num_units = cut<kTiled>(call, nullptr), group = call.heads / call.kv_heads;
    const int64_t unit_bytes = num_units * sizeof(Unit);
    Plan plan = {nullptr, num_units, 0, nullptr};
    plan.units = static_cast<Unit*>(scratch(0, 0, unit_bytes + num_units * call.kv_heads * sizeof(int32_t)));
    auto* pending = reinterpret_cast<int32_t*>(plan.units + num_units);
    cut<kTiled>(call, plan.units);
    int64_t total = 0, floats = 0;
    for (int64_t i = 0; i < num_units; ++i) total += plan.units[i].num_splits * call.kv_heads;
    const int64_t share = num_threads() > 1 ? total / (8 * num_threads()) : total;
    for (int64_t i = 0; i < num_units; ++i) {
        Unit& unit = plan.units[i];
        const int64_t rows = held_rows<kTiled>(unit.num_queries * group);
        const int64_t size = Softmax::size(rows, width_of<kTiled>(call.head_dim));
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

}  // namespace paged
}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
