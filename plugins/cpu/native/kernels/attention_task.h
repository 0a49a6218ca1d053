// One KV head of some adjacent queries of one request: its scores, weights and sums, cut by cut.
#pragma once

#include "attention_codes.h"
#include "attention_plan.h"

namespace zif {
namespace ZIF_ISA {
namespace {
namespace paged {

// One KV head of a unit. Memory is its thread's. T: queries and results, C: the cache. kTiled: products by tiles.
template <class T, class C, bool kTiled>
struct HeadTask {
    static constexpr int64_t kPer = kPaired<T> ? 2 : 1;              // elements of a word
    static constexpr bool kIntegers = !kTiled && kByIntegers<T, C>;  // of units of few queries
    static constexpr int64_t kStride = kTiled ? kWeightStride : kScoreStride;
    typedef std::conditional_t<kTiled, BFloat16, float> Weight;

    const zif_cpu_attention& call;
    const Unit& unit;
    int64_t head;
    Place next;     // what this thread computes next, as far as is known
    int64_t group;  // query heads of the KV head
    int64_t rows;
    int64_t held;   // rows, and those that make tiles whole
    int64_t width;  // head_dim in whole vectors, or tiles
    int64_t words;  // of a query row
    float* query;   // [held, words]
    float* scores;  // [held, kScoreStride], later weights
    Weight* weights;
    float* running;       // Softmax
    float* fresh;         // Softmax
    float* packed_query;  // a panel of up to 16 rows
    float* panels;        // [kPanels, words, kLanes]
    float* packed;        // values: [kKeyStep, width], or tiles of all keys
    float* key_scales;    // [kSplitKeys]
    float* value_scales;  // [kSplitKeys]
    const char** keys;    // [kPlaces], rows of the split
    const char** values;  // the same
    int64_t num_coming;
    const char** coming;  // [kSplitKeys], keys that are read after the split's values
    Seen* seen;           // [rows]
    SplitRows<T> split;   // if kIntegers

    HeadTask(const zif_cpu_attention& call, const Place& place, const Place& next, int thread)
        : call(call), unit(*place.unit), head(place.head), next(next), group(call.heads / call.kv_heads),
          rows(unit.num_queries * group), held(held_rows<kTiled>(rows)), width(width_of<kTiled>(call.head_dim)),
          words(rounded_up(call.head_dim, kVectorElements<kPaired<T>>) / kPer) {
        Pieces counted = {nullptr, 0};
        place_pieces(counted);
        Pieces pieces = {static_cast<char*>(scratch(thread, 2, counted.used)), 0};
        place_pieces(pieces);
    }

    void place_pieces(Pieces& pieces) {
        query = pieces.take<float>(held * words);
        scores = pieces.take<float>(held * larger(kScoreStride, width));  // of rows one by one: their sums
        // Behind the last row as many as a tile has: single rows are multiplied by whole tiles too.
        weights = kTiled ? pieces.take<Weight>((held + 16) * kStride) : reinterpret_cast<Weight*>(scores);
        for (float** softmax : {&running, &fresh}) *softmax = pieces.take<float>(Softmax::size(held, width));
        packed_query = pieces.take<float>(kLanes * words);
        panels = pieces.take<float>(kPanelKeys * words);
        packed = pieces.take<float>(kTiled ? kSplitKeys * width / 2 : kKeyStep * width);
        for (float** scales : {&key_scales, &value_scales}) *scales = pieces.take<float>(kSplitKeys);
        keys = pieces.take<const char*>(kPlaces);
        values = pieces.take<const char*>(kPlaces);
        coming = pieces.take<const char*>(kSplitKeys);
        seen = pieces.take<Seen>(rows);
        if constexpr (kIntegers) split.place(pieces, rows, call.head_dim);
    }

    void keep_query() {
        std::memset(query, 0, held * words * sizeof(float));
        for (int64_t row = 0; row < rows; ++row) {
            const T* token = static_cast<const T*>(call.query) + (unit.token + row / group) * call.query_stride;
            const T* from = token + (head * group + row % group) * call.head_dim;
            if constexpr (kIntegers) {
                if (unit.few) {
                    split.keep(from, row);
                    continue;
                }
            }
            for (int64_t at = 0, word = 0; at < call.head_dim; at += kVectorElements<kPaired<T>>, word += kLanes) {
                store(query + row * words + word, words_of<kPaired<T>>(from + at, call.head_dim - at));
            }
        }
        if (!lie_as_tiles()) return;
        const char* lying[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) {
            lying[i] = reinterpret_cast<const char*>(query + smaller(i, rows - 1) * words);
        }
        Ahead none(nullptr, 0, 0, 1);
        pack_panel<kPaired<T>, T>(lying, call.head_dim, packed_query, none);
    }

    // Place the rows of a split that some query sees, and for each row those that it sees.
    KeyRange place(int64_t number) {
        const KeyRange range = unit.keys(call, number);
        const HeadRows<C> cache(call, unit.request, head);
        const int64_t base = number * kSplitKeys, start = range.start / kPanelKeys * kPanelKeys;
        cache.find(call.keys, base + range.from, base + range.to, keys + range.from);
        cache.find(call.values, base + range.from, base + range.to, values + range.from);
        num_coming = place_next(number);
        // What others are is not looked at. Behind the last ones lies what is read next, for those who ask for rows.
        std::fill(keys + start, keys + range.from, keys[range.from]);
        std::fill(values + start, values + range.from, values[range.from]);
        const int64_t asked = smaller(kTileAhead, range.to - range.from), other = smaller(kTileAhead, num_coming);
        const int64_t stop = rounded_up(range.to, kPanelKeys) + kTileAhead;  // at most kPlaces
        std::copy(values + range.from, values + range.from + asked, keys + range.to);
        std::copy(coming, coming + other, values + range.to);
        std::fill(keys + range.to + asked, keys + stop, keys[range.to - 1]);
        std::fill(values + range.to + other, values + stop, values[range.to - 1]);
        if (by_integers()) std::fill(coming + num_coming, coming + kSplitKeys, keys[range.to - 1]);
        put_seen(call, unit, number, range, seen);
        return range;
    }

    // Place the keys that are read after a split's values, those that are asked for. Returns their number.
    int64_t place_next(int64_t number) {
        const bool last = number + 1 == unit.first_split + unit.num_splits;
        const Place place = last ? next : Place{&unit, head, number + 1};
        return place.unit == nullptr ? 0 : find_keys<C>(call, place, few_or_tiles() ? kTileAhead : kSplitKeys, coming);
    }

    // Whether rows are asked for shortly before they are read, not while the ones before are multiplied.
    bool few_or_tiles() const { return lie_as_tiles() || (!kTiled && unit.few && !kIntegers); }

    bool by_integers() const { return kIntegers && unit.few; }

    // Whether keys are left operands of tiles as they lie.
    bool lie_as_tiles() const {
        return kTiled && std::is_same_v<C, BFloat16> && held <= 16 && call.head_dim % 32 == 0;
    }

    void read_scales(const char* const* from, int64_t first, int64_t last, float* scales) const {
        if constexpr (std::is_same_v<C, Int8>) {
            for (int64_t i = first; i < last; ++i) scales[i] = row_scale(from[i], call.head_dim);
        }
    }

    void score_all(const KeyRange& range) {
        const int64_t start = range.start / kPanelKeys * kPanelKeys;
        if (!by_integers()) read_scales(keys, range.start, range.stop, key_scales);
#if defined(__AMX_BF16__)
        if constexpr (kTiled) {
            const RowTiles registers(lie_as_tiles() ? kTile : rows);
            if (!lie_as_tiles()) return score_packed(range, start);
            for (int64_t key = start; key < range.to; key += 64) {
                char* copies = reinterpret_cast<char*>(panels);
                const int64_t bytes = row_bytes<C>(call.head_dim);
                multiply_keys(keys + key, bytes, packed_query, words / kTile, copies, scores + key, rows);
            }
            return;
        }
#endif
        if (!unit.few) return score_packed(range, start);
        for (int64_t key = start; key < range.to; key += kFewAhead) {
            score_few(key);
            if (kIntegers) read_scales(keys, key, key + kFewAhead, key_scales);
        }
    }

    // Scores of all rows and 16 keys, which stay in the first cache meanwhile; the first rows ask for later keys.
    void score_few(int64_t key) {
        const auto score = [&](int64_t row, auto count, auto asks) {
            constexpr int kRows = count.value, kKeys = kLanes / kRows;
            for (int64_t i = key; i < key + kFewAhead; i += kKeys) {
                float* to = scores + row * kScoreStride + i;
                if constexpr (kIntegers) {
                    split.template score<kRows>(row, keys + i, values + i, to);
                } else {
                    const float* some = query + row * words;
                    score_rows<kPaired<T>, C, kRows, asks.value>(some, words, keys + i, call.head_dim, to);
                }
            }
        };
        const std::true_type asks;
        int64_t row = 0;
        if (rows >= 4) score(row, std::integral_constant<int, 4>(), asks), row += 4;
        for (; row + 4 <= rows; row += 4) score(row, std::integral_constant<int, 4>(), std::false_type());
        if (row + 2 <= rows) score(row, std::integral_constant<int, 2>(), asks), row += 2;
        if (row < rows) score(row, std::integral_constant<int, 1>(), asks);
    }

    void score_packed(const KeyRange& range, int64_t start) {
        const int64_t steps = (range.to - start) / kLanes * (words / kLanes);
        const int64_t bytes = row_bytes<C>(call.head_dim);
        Ahead ahead(values + range.from, range.to - range.from, bytes, steps + steps / 4 * rows / 4);
        // Of one tile of rows: the next panel is packed while the last one is multiplied.
        const int64_t at_once = kTiled && held <= 16 ? kLanes : kPanelKeys;
        for (int64_t key = start; key < range.to; key += at_once) {
            for (int i = 0; i < at_once / kLanes; ++i) {
                pack_panel<kPaired<T>, C>(keys + key + i * kLanes, call.head_dim, panels + i * words * kLanes, ahead);
            }
#if defined(__AMX_BF16__)
            if constexpr (kTiled) {
                // The first rows see none of the last keys.
                int64_t row = 0;
                while (last_seen(row) <= key) row += kBlockRows;
                multiply_tiles({reinterpret_cast<const char*>(query + row * words), words * 4,
                                reinterpret_cast<const char*>(panels), 1024, words * 64, words / kTile,
                                reinterpret_cast<char*>(scores + row * kScoreStride + key), kScoreStride * 4, false},
                               held - row, at_once, ahead);
                continue;
            }
#endif
            by_rows(0, rows, [&](int64_t row, auto count) {
                float* to = scores + row * kScoreStride + key;
                score_block<kPaired<T>, count.value>(query + row * words, words, panels, to, ahead);
            });
        }
    }

    // Add the values of keys from - to - 1 to kRows rows: together where all see them, and only to those that do.
    template <int kRows>
    void add_visible(int64_t row, int64_t from, int64_t to, const Softmax& softmax, Ahead& ahead) {
        int64_t start = from, end = to;
        for (int64_t i = row; i < row + kRows; ++i) {
            start = larger(start, seen[i].first);
            end = smaller(end, seen[i].last);
        }
        end = larger(start, end);
        const auto add = [&](int64_t i, int64_t first, int64_t last, auto count) {
            if (first >= last) return;
            const float* some = reinterpret_cast<const float*>(weights) + i * kScoreStride + first;
            float* weighted = softmax.weighted + i * width;
            if (unit.few) {
                add_lying<C, count.value>(some, values + first, call.head_dim, last - first, weighted, width);
                return;
            }
            add_rows<count.value>(some, packed + (first - from) * width, last - first, weighted, width, ahead);
        };
        const std::integral_constant<int, 1> one;
        for (int64_t i = row; i < row + kRows; ++i) {
            add(i, larger(from, seen[i].first), smaller(smaller(start, seen[i].last), to), one);
        }
        add(row, start, end, std::integral_constant<int, kRows>());
        for (int64_t i = row; i < row + kRows; ++i) {
            add(i, larger(end, seen[i].first), smaller(to, seen[i].last), one);
        }
    }

    void add_all(const KeyRange& range, const Softmax& softmax, Ahead& ahead) {
#if defined(__AMX_BF16__)
        if constexpr (kTiled) return add_tiles(range, softmax, ahead);
#endif
        if constexpr (kIntegers) {
            const int64_t from = range.start, to = rounded_up(range.to, 4);
            const ValueCodes codes = {values, coming, from, to, call.head_dim};
            if (unit.few) return split.add(codes, scores, rows, softmax.weighted, width);
        }
        std::memset(softmax.weighted, 0, held * width * sizeof(float));
        for (int64_t key = range.from; key < range.to;) {
            const int64_t end = smaller(range.to, rounded_up(key + 1, kKeyStep));
            for (int64_t i = key; i < end && !unit.few; ++i) {
                widen_row<C>(values[i], call.head_dim, width, packed + (i - key) * width);
                if (i % 4 == 0) ahead.step();
            }
            by_rows(0, rows, [&](int64_t row, auto count) { add_visible<count.value>(row, key, end, softmax, ahead); });
            key = end;
        }
    }

#if defined(__AMX_BF16__)
    // How many keys some row of a block sees.
    int64_t last_seen(int64_t row) const { return seen[smaller(row + kBlockRows, rows) - 1].last; }

    // Put the values of keys i - i + kKeyStep - 1 into tiles; of keys start - stop - 1 those from - to - 1 are read.
    void pair_step(const KeyRange& range, int64_t i, char* tiles, Ahead& ahead) const {
        const auto pair = few_or_tiles() ? pair_values<C, true> : pair_values<C, false>;
        pair(values + i, range.from - i, range.to - i, call.head_dim, width, tiles, ahead);
    }

    // sums = weights[row] @ values of keys start - stop - 1, of a tile of rows; of these keys from - to - 1 are read.
    void add_pairs(const KeyRange& range, int64_t row, float* sums, Ahead& ahead) {
        // Values are used once: few at a time, they stay in the first cache.
        char* tiles = reinterpret_cast<char*>(packed);
        for (int64_t key = range.start; key < range.stop; key += kKeyStep) {
            pair_step(range, key, tiles, ahead);
            multiply_tiles({reinterpret_cast<const char*>(weights + row * kStride + key), kStride * 2, tiles,
                            width * 64, 1024, 1, reinterpret_cast<char*>(sums), width * 4, key > range.start},
                           smaller(held, kTile), width, ahead);
        }
    }

    // The same of all rows, a block at a time with the keys that it sees.
    void add_blocks(const KeyRange& range, float* sums, Ahead& ahead) {
        char* tiles = reinterpret_cast<char*>(packed);
        for (int64_t key = range.start; key < range.stop; key += kKeyStep) {
            pair_step(range, key, tiles + (key - range.start) * width * 2, ahead);
        }
        for (int64_t row = 0; row < held; row += kBlockRows) {
            const int64_t steps = (rounded_up(last_seen(row), kKeyStep) - range.start) / kKeyStep;
            multiply_tiles({reinterpret_cast<const char*>(weights + row * kStride + range.start), kStride * 2, tiles,
                            width * 64, 1024, steps, reinterpret_cast<char*>(sums + row * width), width * 4, false},
                           smaller(held - row, kBlockRows), width, ahead);
        }
    }

    void add_tiles(const KeyRange& range, const Softmax& softmax, Ahead& ahead) {
        const RowTiles registers(rows);
        if (held > kTile) add_blocks(range, softmax.weighted, ahead);
        else add_pairs(range, 0, softmax.weighted, ahead);
        if (!spoiled(range)) return;
        // A weight of zero does not hide what is no number: each row alone, with the values that it sees.
        float* sums = scores;
        for (int64_t row = 0; row < rows; ++row) {
            add_pairs({seen[row].first, seen[row].last, range.start, range.stop}, row, sums, ahead);
            std::memcpy(softmax.weighted + row * width, sums, width * sizeof(float));
        }
    }

    // Whether a value that some rows see and others do not is no finite number.
    bool spoiled(const KeyRange& range) const {
        if constexpr (std::is_same_v<C, Int8>) return false;
        const Seen &first = seen[0], &last = seen[rows - 1];
        for (int64_t key = range.from; key < range.to; ++key) {
            const bool by_all = key >= last.first && key < first.last;
            if (!by_all && !all_finite<C>(values[key], call.head_dim)) return true;
        }
        return false;
    }
#endif

    void attend_split(int64_t number, const Softmax& softmax) {
        const KeyRange range = place(number);
        score_all(range);
        constexpr bool kScaled = std::is_same_v<C, Int8>;
        read_scales(values, range.start, range.stop, value_scales);
        const Scaling scaling = Scaling::of(call.scale, call.softcap, kScaled ? key_scales : nullptr,
                                            kScaled ? value_scales : nullptr);
        soften_rows(scores, weights, seen, rows, scaling, softmax);
        const int64_t blocks = width / (kColumns * kLanes) * rows / (2 * kRowsAtOnce);
        const int64_t steps = (range.to - range.from) / 4 * (1 + blocks);
        Ahead ahead(coming, few_or_tiles() ? 0 : num_coming, row_bytes<C>(call.head_dim), steps);
        add_all(range, softmax, ahead);
    }

    void start(const Softmax& softmax) const {
        const T* sinks = static_cast<const T*>(call.sinks);
        for (int64_t row = 0; row < rows; ++row) {
            softmax.maximum[row] = sinks == nullptr ? kLowest : to_float(sinks[head * group + row % group]) * kLog2e;
            softmax.total[row] = sinks == nullptr ? 0.0f : 1.0f;
        }
        std::memset(softmax.weighted, 0, held * width * sizeof(float));
    }

    Float weighted_part(const float* weighted, int64_t at) const {
#if defined(__AMX_BF16__)
        if constexpr (kTiled) return in_order(weighted + at / 32 * 32, at % 32 / 16);
#endif
        return load(weighted + at);
    }

    void finish(const Softmax& softmax) const {
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t token = unit.token + row / group, query_head = head * group + row % group;
            T* output = static_cast<T*>(call.output) + (token * call.heads + query_head) * call.head_dim;
            const float* weighted = softmax.weighted + row * width;
            const float total = softmax.total[row];
            int64_t i = 0;
            for (; i + kLanes <= call.head_dim; i += kLanes) store(output + i, weighted_part(weighted, i) / total);
            if (i < call.head_dim) store_some(output + i, weighted_part(weighted, i) / total, call.head_dim - i);
        }
    }

    void run_all() {
        const Softmax whole(running, held), part(fresh, held);
        keep_query();
        // Without a sink the first split is all that there is: merged with nothing it would give the same.
        int64_t done = 0;
        if (call.sinks != nullptr) start(whole);
        else attend_split(unit.first_split + done++, whole);
        for (; done < unit.num_splits; ++done) {
            attend_split(unit.first_split + done, part);
            whole.merge(part, rows, width);
        }
        finish(whole);
    }

    // One split. The last of a head to be done merges all, in order.
    void run_one(int64_t number, float* partials) {
        const int64_t size = Softmax::size(held, width);
        partials += head * unit.num_splits * size;
        keep_query();
        attend_split(number, Softmax(partials + (number - unit.first_split) * size, held));
        if (__atomic_sub_fetch(unit.pending + head, 1, __ATOMIC_ACQ_REL) > 0) return;
        const Softmax whole(running, held);
        start(whole);
        for (int64_t i = 0; i < unit.num_splits; ++i) whole.merge(Softmax(partials + i * size, held), rows, width);
        finish(whole);
    }
};

}  // namespace paged
}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
