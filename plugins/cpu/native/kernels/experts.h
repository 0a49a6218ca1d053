// A gated mixture of experts: the tokens of each expert together, experts and parts of their weights side by side.
#pragma once

#include "linear.h"
#include "quantized.h"

namespace zif {
namespace ZIF_ISA {
namespace {

// Which entries (token, choice) go to which expert. An entry is token * chosen + choice; its place is where it stands
// when entries are ordered by expert, and by entry within one.
struct Dispatch {
    int64_t* order;   // [entries], entry by place
    int64_t* places;  // [entries], place by entry
    int64_t* starts;  // [experts + 1], first place of each expert
    int64_t* used;    // [experts], the experts that have entries, rising
    int64_t num_used;

    // Returns false when an id is no expert.
    bool fill(const int64_t* ids, int64_t entries, int64_t experts) {
        for (int64_t i = 0; i <= experts; ++i) starts[i] = 0;
        for (int64_t i = 0; i < entries; ++i) {
            if (ids[i] < 0 || ids[i] >= experts) return false;
            ++starts[ids[i] + 1];
        }
        num_used = 0;
        for (int64_t i = 0; i < experts; ++i) {
            if (starts[i + 1] > 0) used[num_used++] = i;
            starts[i + 1] += starts[i];
        }
        for (int64_t i = 0; i < entries; ++i) {
            const int64_t place = starts[ids[i]]++;
            order[place] = i;
            places[i] = place;
        }
        for (int64_t i = experts; i > 0; --i) starts[i] = starts[i - 1];
        starts[0] = 0;
        return true;
    }
};

// Experts whose weights are of any kind. Call: zif_cpu_experts_call, or another with its fields but for the weights.
template <class Product, class Call>
class Mixture {
public:
    typedef typename Product::Element T;
    typedef typename Product::Weight Weight;

    // gate_up, down: stacks of one weight for each expert.
    Mixture(const Call& call, const Weight& gate_up, const Weight& down)
        : call_(call), gate_up_(gate_up), down_(down), channels_(down.outputs), inner_(down.inputs),
          entries_(call.tokens * call.chosen) {}

    // Tokens in pieces whose scratch memory is bounded.
    int32_t run_pieces() const {
        const int64_t token_bytes = call_.chosen * (channels_ + inner_) * int64_t(sizeof(T));
        const int64_t piece = kPieceBytes / token_bytes > kLeastPiece ? kPieceBytes / token_bytes : kLeastPiece;
        for (int64_t first = 0; first < call_.tokens; first += piece) {
            Call part = call_;
            part.x = typed(call_.x) + first * call_.x_stride;
            part.y = const_cast<T*>(typed(call_.y)) + first * channels_;
            part.weights += first * call_.chosen;
            part.ids += first * call_.chosen;
            part.tokens = call_.tokens - first < piece ? call_.tokens - first : piece;
            if (Mixture(part, gate_up_, down_).run() != 0) return -1;
        }
        return 0;
    }

private:
    static constexpr int64_t kPieceBytes = 128 << 20;
    static constexpr int64_t kLeastPiece = 64;

    int32_t run() {
        auto* table = static_cast<int64_t*>(scratch(0, 1, (2 * entries_ + 3 * call_.experts + 2) * 8));
        offsets_ = table + 2 * entries_ + 2 * call_.experts + 1;
        dispatch_ = {table, table + entries_, table + 2 * entries_, table + 2 * entries_ + call_.experts + 1, 0};
        if (!dispatch_.fill(call_.ids, entries_, call_.experts)) return -1;
        const int64_t row_bytes = rounded_up(entries_ * channels_ * int64_t(sizeof(T)), 64);
        auto* memory = static_cast<char*>(scratch(0, 2, row_bytes + entries_ * inner_ * int64_t(sizeof(T))));
        rows_ = reinterpret_cast<T*>(memory);
        gated_ = reinterpret_cast<T*>(memory + row_bytes);
        parallel_for(entries_, [&](int64_t place, int) {
            const int64_t token = dispatch_.order[place] / call_.chosen;
            std::memcpy(rows_ + place * channels_, typed(call_.x) + token * call_.x_stride, channels_ * sizeof(T));
        });
        for_products(rows_, gate_up_, inner_, [&](const Product& product, const Part& part, int thread) {
            const T* bias = bias_of(call_.gate_up_bias, part.expert, 2 * inner_);
            const Gated<T> gated = {gated_ + dispatch_.starts[part.expert] * inner_, inner_, bias, call_.activation};
            gated.multiply(product, part.block, part.outputs, thread);
        });
        for_products(gated_, down_, channels_, [&](const Product& product, const Part& part, int thread) {
            const T* bias = bias_of(call_.down_bias, part.expert, channels_);
            const Target<T> target = {rows_ + dispatch_.starts[part.expert] * channels_, channels_, bias};
            product.multiply(part.block, part.outputs, target, thread);
        });
        parallel_for(call_.tokens, [&](int64_t token, int) { combine(token); });
        return 0;
    }

    // A block of an expert's rows and some of its outputs.
    struct Part {
        int64_t expert;
        int64_t block;
        Range outputs;
    };

    static const T* typed(const void* array) { return static_cast<const T*>(array); }

    static const T* bias_of(const void* biases, int64_t expert, int64_t outputs) {
        return biases == nullptr ? nullptr : typed(biases) + expert * outputs;
    }

    int64_t count(int64_t expert) const { return dispatch_.starts[expert + 1] - dispatch_.starts[expert]; }

    // The rows of one expert, made ready for its weight.
    Product product_of(const T* x, const Weight& stack, int64_t i, char* memory) const {
        const int64_t expert = dispatch_.used[i], first = dispatch_.starts[expert];
        return {x + first * stack.inputs, stack.inputs, count(expert), Product::entry(stack, expert),
                memory + offsets_[i]};
    }

    // Make x, [entries, inputs], ready, and call multiply(product, part, thread) for all outputs of each expert: in as
    // few parts as keep the threads busy, since memory is read in order for long then.
    template <class Multiply>
    void for_products(const T* x, const Weight& stack, int64_t outputs, const Multiply& multiply) const {
        offsets_[0] = 0;
        for (int64_t i = 0; i < dispatch_.num_used; ++i) {
            offsets_[i + 1] = offsets_[i] + rounded_up(Product::bytes(stack, count(dispatch_.used[i])), 64);
        }
        auto* memory = static_cast<char*>(scratch(0, 0, offsets_[dispatch_.num_used]));
        parallel_for(dispatch_.num_used, [&](int64_t i, int thread) {
            const Product product = product_of(x, stack, i, memory);
            for (int64_t part = 0; part < product.num_parts(); ++part) product.prepare(part, thread);
        });
        const int64_t chunk = large_chunk(outputs, dispatch_.num_used);
        for_chunks(outputs, chunk, dispatch_.num_used, [&](int64_t i, const Range& range, int thread) {
            const Product product = product_of(x, stack, i, memory);
            for (int64_t block = 0; block < product.num_blocks(); ++block) {
                multiply(product, {dispatch_.used[i], block, range}, thread);
            }
        });
    }

    // The choices of a token in the order of expert ids, so that the sum does not depend on how they were listed.
    int64_t next_choice(int64_t token, int64_t last_place) const {
        int64_t best = entries_;
        for (int64_t choice = 0; choice < call_.chosen; ++choice) {
            const int64_t place = dispatch_.places[token * call_.chosen + choice];
            if (place > last_place && place < best) best = place;
        }
        return best;
    }

    void combine(int64_t token) const {
        T* y = const_cast<T*>(typed(call_.y)) + token * channels_;
        for_vectors(0, channels_, [&](int64_t k, auto lanes) {
            Float total = {};
            for (int64_t place = next_choice(token, -1); place < entries_; place = next_choice(token, place)) {
                total += lanes.load(rows_ + place * channels_ + k) * call_.weights[dispatch_.order[place]];
            }
            lanes.store(y + k, total);
        });
    }

    Call call_;
    Weight gate_up_;
    Weight down_;
    int64_t channels_;
    int64_t inner_;
    int64_t entries_;
    Dispatch dispatch_ = {};
    int64_t* offsets_ = nullptr;  // [experts + 1], of what each used expert's rows need
    T* rows_ = nullptr;           // [entries, channels], by place: inputs at first, outputs at last
    T* gated_ = nullptr;          // [entries, inner]
};

int32_t experts(const zif_cpu_experts_call* call) {
    const auto run = [&](auto element) {
        typedef decltype(element) T;
        const PlainWeight<T> gate_up = {static_cast<const T*>(call->gate_up), 2 * call->inner, call->channels};
        const PlainWeight<T> down = {static_cast<const T*>(call->down), call->channels, call->inner};
        return Mixture<PlainProduct<T>, zif_cpu_experts_call>(*call, gate_up, down).run_pieces();
    };
    switch (call->dtype) {
        case ZIF_FLOAT32: return run(float());
        case ZIF_BFLOAT16: return run(BFloat16());
        case ZIF_FLOAT16: return run(Float16());
    }
    return -1;
}

int32_t quantized_experts(const zif_cpu_quantized_experts_call* call) {
    const auto run = [&](auto element) {
        typedef quantized::Product<decltype(element)> Product;
        return Mixture<Product, zif_cpu_quantized_experts_call>(*call, call->gate_up, call->down).run_pieces();
    };
    switch (call->dtype) {
        case ZIF_FLOAT32: return run(float());
        case ZIF_BFLOAT16: return run(BFloat16());
        case ZIF_FLOAT16: return run(Float16());
    }
    return -1;
}

}  // namespace
}  // namespace ZIF_ISA
}  // namespace zif
