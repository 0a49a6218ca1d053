// Calls whose kernels compute each row by itself: cut by rows for all threads, adjacent ones of a list as one.
//
// In a run of such calls a thread makes all of them for one row, then for the next row: what one call writes and the
// next one reads stays in its cache, and threads wait for each other once.
#pragma once

#include <cassert>

#include "isa.h"
#include "pool.h"

namespace zif {

// What has to hold between two calls of a run: no row of one touches what another row of the other writes. Arrays of a
// recorded step may lie where earlier ones of it lay, in rows of another size, so that it is looked at for each run.

// The piece of an array that belongs to one row of a call: `bytes` at `first` + row * `step`.
struct Piece {
    const char* first;
    int64_t step;
    int64_t bytes;
    bool written;

    // Whether no row of one reaches into what another row of the other one writes, either way.
    static bool apart(const Piece& one, const Piece& other, int64_t rows) {
        if (rows == 1 || !(one.written || other.written)) return true;
        if (one.end(rows) <= other.first || other.end(rows) <= one.first) return true;
        const char* first = one.first < other.first ? one.first : other.first;
        const char* end = one.end(1) > other.end(1) ? one.end(1) : other.end(1);
        return one.step == other.step && end - first <= one.step;
    }

private:
    const char* end(int64_t rows) const { return first + (rows - 1) * step + bytes; }
};

// What a call touches, in a form that all have. The cache is not named: no other call of rows touches it, and no two
// tokens have the same slot.
struct Touched {
    static constexpr int kMost = 6;

    int64_t rows = 0;
    int64_t elements = 0;  // of a row, for the time that it takes
    int64_t element_bytes = 0;
    int count = 0;
    Piece pieces[kMost];

    Touched() = default;
    Touched(int64_t rows, int64_t elements, int32_t dtype)
        : rows(rows), elements(elements), element_bytes(dtype == ZIF_FLOAT32 ? 4 : 2) {}

    void add(const void* first, int64_t step, int64_t size, bool written = false) {
        add_bytes(first, step * element_bytes, size * element_bytes, written);
    }

    void add_bytes(const void* first, int64_t step, int64_t bytes, bool written = false) {
        assert(count < kMost);
        pieces[count++] = {static_cast<const char*>(first), step, bytes, written};
    }

    bool apart(const Touched& other) const {
        for (int i = 0; i < count; ++i) {
            for (int j = 0; j < other.count; ++j) {
                if (!Piece::apart(pieces[i], other.pieces[j], rows)) return false;
            }
        }
        return true;
    }
};

inline Touched touched_by_rms_norm(const zif_cpu_norm& call) {
    const int64_t size = call.heads * call.channels;
    Touched all(call.rows, size, call.dtype);
    all.add(call.x, call.x_stride, size);
    all.add(call.weight, 0, call.channels);
    all.add(call.y, size, size, true);
    return all;
}

inline Touched touched_by_add_rms_norm(const zif_cpu_norm& call) {
    const int64_t size = call.heads * call.channels;
    Touched all = touched_by_rms_norm(call);
    all.add(call.residual, call.residual_stride, size);
    all.add(call.sum, size, size, true);
    return all;
}

inline Touched touched_by_rotation(const zif_cpu_rotation& call) {
    const int64_t query = call.heads * call.head_dim, key = call.kv_heads * call.head_dim;
    const int64_t angles = call.rotated * static_cast<int64_t>(sizeof(float));
    Touched all(call.tokens, query + key, call.dtype);
    all.add(call.query, call.query_stride, query);
    all.add(call.key, call.key_stride, key);
    all.add_bytes(call.cos, angles, angles);
    all.add_bytes(call.sin, angles, angles);
    all.add(call.rotated_query, query, query, true);
    all.add(call.rotated_key, key, key, true);
    return all;
}

inline Touched touched_by_store(const zif_cpu_kv_rows& call) {
    const int64_t size = call.kv_heads * call.head_dim;
    Touched all(call.tokens, 2 * size, call.dtype);
    all.add(call.key, call.key_stride, size);
    all.add(call.value, call.value_stride, size);
    all.add_bytes(call.slots, sizeof(int64_t), sizeof(int64_t));
    return all;
}

// A kernel of rows, in a form that all have.
struct RowWise {
    Touched (*touched)(const void* call);
    RowKernel<void> compute;
    RowKernel<void> ask = nullptr;  // the caches for where `compute` will write
};

template <class Call, Touched (*kTouched)(const Call&)>
Touched touched_by(const void* call) {
    return kTouched(*static_cast<const Call*>(call));
}

template <class Call, RowKernel<Call> Kernels::*kKernel>
void row_of(const void* call, int64_t row, int thread) {
    (kernels().*kKernel)(static_cast<const Call*>(call), row, thread);
}

inline constexpr RowWise kRmsNorm = {
    touched_by<zif_cpu_norm, touched_by_rms_norm>,
    row_of<zif_cpu_norm, &Kernels::rms_norm>,
};
inline constexpr RowWise kAddRmsNorm = {
    touched_by<zif_cpu_norm, touched_by_add_rms_norm>,
    row_of<zif_cpu_norm, &Kernels::add_rms_norm>,
};
inline constexpr RowWise kRotate = {
    touched_by<zif_cpu_rotation, touched_by_rotation>,
    row_of<zif_cpu_rotation, &Kernels::rotate>,
};
inline constexpr RowWise kStore = {
    touched_by<zif_cpu_kv_rows, touched_by_store>,
    row_of<zif_cpu_kv_rows, &Kernels::store_kv>,
    row_of<zif_cpu_kv_rows, &Kernels::ask_for_kv>,
};

// Adjacent calls that are computed as one.
class RowRun {
public:
    // Returns false where the call cannot join those that are there.
    bool add(const RowWise& kernel, const void* call) {
        const Touched touched = kernel.touched(call);
        if (count_ == kMost || (count_ > 0 && touched.rows != members_[0].touched.rows)) return false;
        for (int i = 0; i < count_; ++i) {
            if (!members_[i].touched.apart(touched)) return false;
        }
        members_[count_++] = {kernel, call, touched};
        return true;
    }

    // Compute what is there, and forget it.
    void compute() {
        if (count_ == 0) return;
        int64_t elements = 0;
        for (int i = 0; i < count_; ++i) elements += members_[i].touched.elements;
        const OneCall one;
        for_rows(members_[0].touched.rows, elements, [&](int64_t begin, int64_t end, int thread) {
            for (int64_t row = begin; row < end; ++row) compute_row(row, thread);
        });
        count_ = 0;
    }

private:
    static constexpr int kMost = 8;

    struct Member {
        RowWise kernel;
        const void* call;
        Touched touched;
    };

    void compute_row(int64_t row, int thread) const {
        for (int i = 0; i < count_; ++i) {
            if (members_[i].kernel.ask != nullptr) members_[i].kernel.ask(members_[i].call, row, thread);
        }
        for (int i = 0; i < count_; ++i) members_[i].kernel.compute(members_[i].call, row, thread);
    }

    int count_ = 0;
    Member members_[kMost];
};

}  // namespace zif
