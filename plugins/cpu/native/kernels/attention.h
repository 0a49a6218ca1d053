// Attention over a paged cache, for decoding and for prompts, and the writing of that cache.
//
// Keys are cut at multiples of `kSplitKeys` positions, and what each cut gives is merged in order. What a query gets is
// the same to the bit whatever else is in its unit and whichever thread computes it. A request that has more than
// `kFewQueries` queries in a step is computed in another way than one that decodes, and with tiles so are all requests
// of its step; where the call asks for `batch_invariant` there is one way for all.
//
//     unit    some adjacent queries of one request; `rows` are its queries times the query heads of one KV head
//     task    a unit and a KV head, all cuts in order; where tasks are few each cut is one, and the last one merges
//     split   scores of all rows [rows, keys], softmax of each row's visible keys, then values times weights
//
// Softmax in parts: Milakov and Gimelshein, 2018; parts in parallel: Dao et al., Flash-Decoding, 2023.
#pragma once

#include "attention_task.h"

namespace zif {
namespace ZIF_ISA {
namespace {
namespace paged {

template <class T, class C, bool kTiled>
void attend_by(const zif_cpu_attention& call) {
    const Plan plan = plan_tasks<kTiled>(call);
    // Of many short ones a thread takes some adjacent ones: it then knows what it computes next, and asks for that.
    const int64_t most = all_few(call) ? plan.num_tasks / (16 * num_threads()) : 1;
    const int64_t at_once = larger(1, smaller(kTasksAtOnce, most));
    parallel_for((plan.num_tasks + at_once - 1) / at_once, [&](int64_t part, int thread) {
        const int64_t first = part * at_once, last = smaller(plan.num_tasks, first + at_once) - 1;
        for (int64_t task = first; task <= last; ++task) {
            const int64_t coming = task < last ? task + 1 : first + at_once * num_threads();
            const Place place = plan.place_of(task), next = plan.place_of(coming);
            HeadTask<T, C, kTiled> one(call, place, next, thread);
            if (place.unit->first_partial < 0) one.run_all();
            else one.run_one(place.split, plan.partials + place.unit->first_partial);
        }
    });
}

// Where all is decoding, values are added as they lie: putting them into tiles takes longer than reading them.
template <class T, class C>
void attend_as(const zif_cpu_attention& call) {
    if constexpr (kByTiles<T>) {
        if (!all_few(call)) return attend_by<T, C, true>(call);
    }
    attend_by<T, C, false>(call);
}

template <class T>
void attend_cache(const zif_cpu_attention& call) {
    if (call.cache == ZIF_INT8) attend_as<T, Int8>(call);
    else attend_as<T, T>(call);
}

}  // namespace paged

void attend(const zif_cpu_attention* call) {
    if (call->dtype == ZIF_BFLOAT16) paged::attend_cache<BFloat16>(*call);
    else if (call->dtype == ZIF_FLOAT16) paged::attend_cache<Float16>(*call);
    else paged::attend_cache<float>(*call);
}

}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
