// The C ABI of zif-cpu's kernels: raw pointers, sizes, strides. All sizes and strides count elements, not bytes.
//
// Arrays lie in host memory. The last axis of every array is dense; a first axis with a stride has it as an argument.
// Functions return when all is written. They may be called from any thread, one call at a time runs.
#pragma once

#include <stdint.h>

#define ZIF_CPU_ABI 6

#ifdef __cplusplus
extern "C" {
#endif

#define ZIF_CPU_PUBLIC __attribute__((visibility("default")))

// What elements are. Codes are part of the ABI.
enum { ZIF_FLOAT32 = 0, ZIF_BFLOAT16 = 1, ZIF_FLOAT16 = 2, ZIF_INT8 = 3 };

// Gated activations, as zif.contract.Activation has them.
enum { ZIF_SILU = 0, ZIF_GELU = 1, ZIF_GELU_TANH = 2, ZIF_SWIGLU_CLAMPED = 3 };

ZIF_CPU_PUBLIC int32_t zif_cpu_abi(void);

// The instruction sets that this library has kernels for and this processor runs, space separated, best last.
ZIF_CPU_PUBLIC const char* zif_cpu_isas(void);

// Choose one of them. Returns 0, or -1 for a name that is not among them.
ZIF_CPU_PUBLIC int32_t zif_cpu_use_isa(const char* name);

// Threads that compute, the caller's included; at least 1. Returns 0, or -1 when the system gives no more threads.
ZIF_CPU_PUBLIC int32_t zif_cpu_use_threads(int32_t num_threads);

// Let what is freed stay with the process, for all of it: arrays of a step's size would else go back to the system and be
// faulted in again, page after page, by the next step. Returns 0, or -1 where the C library cannot be told.
ZIF_CPU_PUBLIC int32_t zif_cpu_keep_memory(void);

// Operators take a struct: to a caller from another language, each argument costs as much as a row, and calls of one form
// can be put into a list (zif_cpu_run).

// A weight of bfloat16 in 12 bits, without loss (zif_cpu_compact_weight). Inputs are pieces of ZIF_COMPACT_INPUTS. The
// instruction set that made it multiplies it, whichever is in use.
enum { ZIF_COMPACT_INPUTS = 128, ZIF_COMPACT_ROWS = 16 };
typedef struct {
    const uint8_t* rows;         // [outputs, inputs / 128, 192], or in the order of `made_by`
    const uint32_t* first;       // [ceil(outputs / 16) * inputs / 128 + 1], the first exception of 16 rows in a piece
    const uint32_t* exceptions;  // bits 0 to 15: the number; 16 to 22: its input in the piece; 23 to 26: its row of the 16
    uint8_t uppers[16];          // upper bytes by code
    const void* made_by;         // the instruction set
} zif_cpu_compact;

// y = x @ weight.T + bias, summed in float32. All of one dtype; where `wide` is not 0, y is float32: sums as they are.
typedef struct {
    const void* x;       // [tokens, inputs], first axis strided
    const void* weight;  // [outputs, inputs]
    const void* bias;    // [outputs], or null
    void* y;             // [tokens, outputs]
    int64_t x_stride;
    int64_t tokens;
    int64_t inputs;
    int64_t outputs;
    int32_t dtype;
    int32_t wide;
    const zif_cpu_compact* compact;  // of ZIF_BFLOAT16, in place of `weight`; or null
} zif_cpu_product;

ZIF_CPU_PUBLIC void zif_cpu_linear(const zif_cpu_product* call);

// Hold a weight in 12 bits: fills `compact` and what it points to; of exceptions there is room for `capacity`.
typedef struct {
    const void* weight;  // [outputs, inputs], bfloat16
    const zif_cpu_compact* compact;
    int64_t outputs;
    int64_t inputs;    // a multiple of ZIF_COMPACT_INPUTS
    int64_t capacity;  // below 2**32; zif_cpu_unpack_weight does not look at it
} zif_cpu_compaction;

// Returns 0, or -1 where there are more exceptions than there is room, or the instruction set in use has no such form of
// so many outputs: what is filled is then of no use.
ZIF_CPU_PUBLIC int32_t zif_cpu_compact_weight(const zif_cpu_compaction* call);

// The opposite: the weight as it was, to `weight`.
ZIF_CPU_PUBLIC void zif_cpu_unpack_weight(const zif_cpu_compaction* call);

// The same product, of weight's and bias' first half (gates) and second half, each rounded to the dtype as zif_cpu_linear
// does, then f(gate) * up, in float32. y: [tokens, outputs / 2]. `wide` is not looked at.
typedef struct {
    zif_cpu_product product;
    int32_t activation;
} zif_cpu_gated_product;

ZIF_CPU_PUBLIC void zif_cpu_gated_linear(const zif_cpu_gated_product* call);

// y = x / rms(x) * (weight + weight_offset), in float32, for each head of each row.
typedef struct {
    const void* x;         // [rows, heads, channels], first axis strided
    const void* residual;  // the same; zif_cpu_add_rms_norm only
    const void* weight;    // [channels]
    void* sum;             // [rows, heads, channels], dense; zif_cpu_add_rms_norm only
    void* y;               // [rows, heads, channels], dense
    int64_t x_stride;
    int64_t residual_stride;
    int64_t rows;
    int64_t heads;
    int64_t channels;
    float eps;
    float weight_offset;
    int32_t dtype;
} zif_cpu_norm;

ZIF_CPU_PUBLIC void zif_cpu_rms_norm(const zif_cpu_norm* call);

// sum = residual + x, rounded to the dtype; y = rms_norm(sum). sum may be residual or x where those are dense.
ZIF_CPU_PUBLIC void zif_cpu_add_rms_norm(const zif_cpu_norm* call);

// Rotate the first 2 * rotated elements of each head by its token's angles; copy the rest. In float32.
typedef struct {
    const void* query;    // [tokens, heads, head_dim], first axis strided
    const void* key;      // [tokens, kv_heads, head_dim], first axis strided
    const float* cos;     // [tokens, rotated], dense
    const float* sin;     // the same
    void* rotated_query;  // [tokens, heads, head_dim], dense
    void* rotated_key;    // [tokens, kv_heads, head_dim], dense
    int64_t query_stride;
    int64_t key_stride;
    int64_t tokens;
    int64_t heads;
    int64_t kv_heads;
    int64_t head_dim;
    int64_t rotated;
    int32_t interleaved;  // pairs are (2i, 2i + 1); else (i, i + rotated)
    int32_t dtype;
} zif_cpu_rotation;

ZIF_CPU_PUBLIC void zif_cpu_rotate(const zif_cpu_rotation* call);

// y = f(gate) * up, in float32.
typedef struct {
    const void* gate_up;  // [rows, 2 * channels], first axis strided, gate before up
    void* y;              // [rows, channels], dense
    int64_t stride;
    int64_t rows;
    int64_t channels;
    int32_t activation;
    int32_t dtype;
} zif_cpu_gating;

ZIF_CPU_PUBLIC void zif_cpu_gated_activation(const zif_cpu_gating* call);

// Put keys and values of new tokens into their slots of a paged cache. Block b of head h of the cache is at
// keys + b * block_stride + h * block_size * row. A row is one token's vector of a head: head_dim elements, or, of
// ZIF_INT8, head_dim codes, zeros up to a multiple of 4 bytes, and the float32 scale that codes are multiplied by:
// largest absolute element / 127, or NaN where an element is not finite.
typedef struct {
    const void* key;       // [tokens, kv_heads, head_dim], first axis strided
    const void* value;     // the same
    void* keys;            // the cache
    void* values;
    const int64_t* slots;  // [tokens], block * block_size + offset; negative ones are skipped
    int64_t key_stride;
    int64_t value_stride;
    int64_t block_stride;
    int64_t tokens;
    int64_t kv_heads;
    int64_t head_dim;
    int64_t block_size;
    int32_t dtype;
    int32_t cache;  // of the cache: dtype, or ZIF_INT8
} zif_cpu_kv_rows;

ZIF_CPU_PUBLIC void zif_cpu_store_kv(const zif_cpu_kv_rows* call);

// Attention over a paged cache, of prompts and of single tokens; softmax in float32.
typedef struct {
    const void* query;           // [tokens, heads, head_dim], first axis strided
    void* output;                // [tokens, heads, head_dim], dense
    const void* keys;            // as in zif_cpu_store_kv
    const void* values;
    const void* sinks;           // [heads], or null
    const int32_t* requests;     // [num_requests], rows of the tables below that are served
    const int32_t* query_start;  // [R + 1]
    const int32_t* seq_lens;     // [R]
    const int32_t* block_table;  // [R, ...]
    int64_t query_stride;
    int64_t block_stride;
    int64_t table_stride;
    int64_t num_requests;
    int64_t heads;
    int64_t kv_heads;
    int64_t head_dim;
    int64_t block_size;
    int64_t window;  // 0: none
    float scale;
    float softcap;  // 0: none
    int32_t dtype;
    int32_t cache;  // of keys and values: dtype, or ZIF_INT8
    int32_t batch_invariant;  // single tokens are computed in the way of prompts: equal bits however a prompt is cut
} zif_cpu_attention;

ZIF_CPU_PUBLIC void zif_cpu_attend(const zif_cpu_attention* call);

// The sum of the chosen experts' outputs, weighted, of a gated mixture of experts; in float32, in the order of ids.
// x: [tokens, channels], first axis strided. gate_up: [experts, 2 * inner, channels]. down: [experts, channels, inner].
// Biases: [experts, 2 * inner], [experts, channels], or null. weights, ids: [tokens, chosen]. y: [tokens, channels].
typedef struct {
    const void* x;
    const void* gate_up;
    const void* gate_up_bias;
    const void* down;
    const void* down_bias;
    const float* weights;
    const int64_t* ids;
    void* y;
    int64_t x_stride;
    int64_t tokens;
    int64_t channels;
    int64_t inner;
    int64_t experts;
    int64_t chosen;
    int32_t activation;
    int32_t dtype;
} zif_cpu_experts_call;

// Returns 0, or -1 when an id is no expert, in which case y is undefined.
ZIF_CPU_PUBLIC int32_t zif_cpu_experts(const zif_cpu_experts_call* call);

// One call of a list: a function of those here that take a struct and return nothing, and its struct.
typedef struct {
    void (*function)(const void* call);
    const void* call;
} zif_cpu_entry;

// Make the calls of a list, in order. Norms, rotations and stores that follow each other are made token by token where
// that gives the same.
ZIF_CPU_PUBLIC void zif_cpu_run(const zif_cpu_entry* entries, int64_t count);

// The next token of each row: the most likely one at temperature 0, else one drawn, as OpTable.choose_tokens has it.
typedef struct {
    const float* logits;       // [rows, vocabulary], first axis strided
    const float* temperature;  // [rows], and so are those below
    const float* min_p;
    const int64_t* top_k;
    const double* top_p;
    const int64_t* fractions;  // over 2**62
    int64_t* tokens;           // [rows]
    float* peaks;              // [rows]: the largest logit, NaN where the row has one
    int64_t stride;
    int64_t rows;
    int64_t vocabulary;
} zif_cpu_choice;

ZIF_CPU_PUBLIC void zif_cpu_choose(const zif_cpu_choice* call);

// A weight held as integers: an element is (code - zero) * scale. `group` inputs share a scale and a zero, and divide
// the inputs. Codes of 8 bits: [outputs, inputs], int8. Of 4 bits: [outputs, inputs / 2]; of a group of g codes, byte j
// has code j in its lower and code j + g / 2 in its upper half.
typedef struct {
    const void* codes;
    const float* scales;   // [outputs, inputs / group]
    const int16_t* zeros;  // the same, or null: zero is 0 for 8 bits and 8 for 4 bits
    int64_t outputs;
    int64_t inputs;
    int64_t group;
    int32_t bits;                 // 8, or 4
    int32_t dynamic_activations;  // x is rounded to 8 bits: for codes of 8 bits with one group and no zeros
} zif_cpu_quantized;

// y = x @ weight.T + bias, as OpTable.quantized_linear has it. Sums of 8-bit activations are exact below 131072 inputs.
// Where `wide` is not 0, y is float32.
typedef struct {
    zif_cpu_quantized weight;
    const void* x;     // [tokens, inputs], first axis strided
    const void* bias;  // [outputs], or null
    void* y;           // [tokens, outputs]
    int64_t x_stride;
    int64_t tokens;
    int32_t dtype;
    int32_t wide;
} zif_cpu_quantized_product;

ZIF_CPU_PUBLIC void zif_cpu_quantized_linear(const zif_cpu_quantized_product* call);

// What zif_cpu_gated_linear does.
typedef struct {
    zif_cpu_quantized_product product;
    int32_t activation;
} zif_cpu_gated_quantized_product;

ZIF_CPU_PUBLIC void zif_cpu_gated_quantized_linear(const zif_cpu_gated_quantized_product* call);

// What zif_cpu_experts does with quantized weights, each a stack of one per expert; `outputs` and `inputs` are of one.
typedef struct {
    zif_cpu_quantized gate_up;  // gate rows before up rows
    zif_cpu_quantized down;
    const void* x;
    const void* gate_up_bias;
    const void* down_bias;
    const float* weights;
    const int64_t* ids;
    void* y;
    int64_t x_stride;
    int64_t tokens;
    int64_t experts;
    int64_t chosen;
    int32_t activation;
    int32_t dtype;
} zif_cpu_quantized_experts_call;

// Returns 0, or -1 when an id is no expert, in which case y is undefined.
ZIF_CPU_PUBLIC int32_t zif_cpu_quantized_experts(const zif_cpu_quantized_experts_call* call);

#ifdef __cplusplus
}
#endif
