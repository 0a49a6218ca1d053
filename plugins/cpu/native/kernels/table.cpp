// All kernels of one instruction set: compiled once for each, with its flags, in its namespace.
#include "isa.h"

#include "attention.h"
#include "attention_write.h"
#include "choice.h"
#include "compact.h"
#include "elementwise.h"
#include "experts.h"
#include "linear.h"
#include "quantized.h"

namespace zif {
namespace ZIF_ISA {

#define ZIF_TEXT_OF(name) #name
#define ZIF_TEXT(name) ZIF_TEXT_OF(name)

extern const Kernels kernels;
const Kernels kernels = {
    ZIF_TEXT(ZIF_ISA), linear, rms_norm, add_rms_norm, rotate, gated_activation, store_kv, ask_for_kv, attend, experts,
    choose, quantized_linear, gated_linear, gated_quantized_linear, quantized_experts,
    compact_weight, unpack_weight,
};

}  // namespace ZIF_ISA
}  // namespace zif
