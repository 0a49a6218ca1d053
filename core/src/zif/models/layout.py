"""How the tensors of a checkpoint become the tensors that the decoder holds.

Query, key and value matrices are held as one, gate and up as one, all experts of a layer as one: fewer and larger
multiplications. Pure bookkeeping on names and shapes; nothing is read and no array library is imported, so that the
same plan serves the description (bytes), the check of a checkpoint, and the loader. Which of them are held as codes
with scales, `zif.models.quantization.plan` says.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Set

from zif.errors import CheckpointError
from zif.models.checkpoint import Checkpoint, StoredTensor
from zif.models.heads import Head
from zif.models.held import BYTES, FLOATS, Arrangement, HeldTensor, Layout, Piece, Source
from zif.models.quantization.plan import Quantization
from zif.models.spec import AttentionSpec, DecoderSpec, ExpertTensors, MlpSpec, MoeSpec, NormPlacement, QKNorm

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
SCORE_HEAD = "score.weight"

MXFP4_BLOCK = 32
"""Elements that share a scale. OCP Microscaling Formats, version 1.0."""

_IGNORED = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
"""Buffers that old checkpoints store and that are computed from the configuration."""

_NAMES_SHOWN = 8

_CODES = ("weight", "weight_packed", "qweight")
"""Last parts of the names under which a module's matrix may be stored, as numbers or as codes."""


def plan_layout(spec: DecoderSpec, checkpoint: Checkpoint, quantization: Quantization) -> Layout:
    """Match a decoder with the tensors of a checkpoint.

    Raises one `CheckpointError` that names what is missing, unexpected, or of another shape or dtype; `ModelError` on
    codes that are not served.
    """
    stored = checkpoint.tensors
    tensors = [_whole("embedding", EMBEDDING, (spec.vocab_size, spec.hidden_size))]
    for index in range(len(spec.layers)):
        tensors += _layer(spec, index, stored)
    tensors.append(_whole("norm", "model.norm.weight", (spec.hidden_size,)))
    if spec.head is Head.TOKENS and not spec.tied_embeddings:
        tensors.append(_whole("lm_head", LM_HEAD, (spec.vocab_size, spec.hidden_size)))
    held = quantization.held(tensors, stored)
    repeats_embedding = spec.head is Head.TOKENS and spec.tied_embeddings and LM_HEAD in stored
    layout = Layout(held, repeats_embedding, _zero_biases(held, stored))
    # The head over labels is no part of the decoder: `zif.models.pooling_weights` reads it.
    _check(layout, checkpoint, {SCORE_HEAD} if spec.head is Head.CLASSES else set())
    return layout


def _whole(name: str, source: str, shape: tuple[int, ...]) -> HeldTensor:
    return HeldTensor(name, shape, (Piece((Source(source, shape),), 0),))


def _joined(name: str, parts: list[Source]) -> HeldTensor:
    """Put tensors one below the other."""
    pieces, offset = [], 0
    for part in parts:
        pieces.append(Piece((part,), offset))
        offset += math.prod(part.shape)
    rows = sum(part.shape[0] for part in parts)
    return HeldTensor(name, (rows, *parts[0].shape[1:]), tuple(pieces))


def _layer(spec: DecoderSpec, index: int, stored: Mapping[str, StoredTensor]) -> Iterator[HeldTensor]:
    layer, prefix, held = spec.layers[index], f"model.layers.{index}", f"layers.{index}"
    for own, name in norm_names(spec.norm_placement).items():
        yield _whole(f"{held}.{own}", f"{prefix}.{name}.weight", (spec.hidden_size,))
    yield from _attention(layer.attention, spec.hidden_size, f"{prefix}.self_attn", held, stored)
    if isinstance(layer.mlp, MlpSpec):
        yield from _mlp(layer.mlp, spec.hidden_size, f"{prefix}.mlp", held, stored)
    elif layer.mlp.tensors == ExpertTensors.INTERLEAVED:
        yield from _interleaved_experts(layer.mlp, spec.hidden_size, f"{prefix}.mlp", held, stored)
    else:
        yield from _separate_experts(layer.mlp, spec.hidden_size, prefix, held)


def norm_names(placement: NormPlacement) -> dict[str, str]:
    """Map the decoder's names of a layer's norms to those of the checkpoint."""
    if placement == NormPlacement.PRE:
        return {"attention_in_norm": "input_layernorm", "mlp_in_norm": "post_attention_layernorm"}
    after = {"attention_out_norm": "post_attention_layernorm", "mlp_out_norm": "post_feedforward_layernorm"}
    if placement == NormPlacement.POST:
        return after
    return {"attention_in_norm": "input_layernorm", "mlp_in_norm": "pre_feedforward_layernorm", **after}


def _attention(
    spec: AttentionSpec, hidden: int, prefix: str, held: str, stored: Mapping[str, StoredTensor]
) -> Iterator[HeldTensor]:
    sizes = {"q": spec.query_size, "k": spec.kv_size, "v": spec.kv_size}
    if _is_stored(f"{prefix}.qkv_proj", stored):
        parts = {"qkv": sum(sizes.values())}
    else:
        parts = sizes
    yield _joined(f"{held}.qkv", [Source(f"{prefix}.{p}_proj.weight", (rows, hidden)) for p, rows in parts.items()])
    if spec.qkv_bias:
        yield _joined(f"{held}.qkv_bias", [Source(f"{prefix}.{p}_proj.bias", (rows,)) for p, rows in parts.items()])
    yield _whole(f"{held}.output", f"{prefix}.o_proj.weight", (hidden, spec.query_size))
    if spec.output_bias:
        yield _whole(f"{held}.output_bias", f"{prefix}.o_proj.bias", (hidden,))
    if spec.sinks:
        yield _whole(f"{held}.sinks", f"{prefix}.sinks", (spec.num_heads,))
    if spec.qk_norm != QKNorm.NONE:
        wide = spec.qk_norm == QKNorm.FULL_WIDTH
        yield _whole(f"{held}.q_norm", f"{prefix}.q_norm.weight", (spec.query_size if wide else spec.head_dim,))
        yield _whole(f"{held}.k_norm", f"{prefix}.k_norm.weight", (spec.kv_size if wide else spec.head_dim,))


def _mlp(
    spec: MlpSpec, hidden: int, prefix: str, held: str, stored: Mapping[str, StoredTensor]
) -> Iterator[HeldTensor]:
    rows = spec.intermediate_size
    if _is_stored(f"{prefix}.gate_up_proj", stored):
        parts = {"gate_up": 2 * rows}
    else:
        parts = {"gate": rows, "up": rows}
    yield _joined(f"{held}.gate_up", [Source(f"{prefix}.{p}_proj.weight", (n, hidden)) for p, n in parts.items()])
    yield _whole(f"{held}.down", f"{prefix}.down_proj.weight", (hidden, rows))
    if spec.bias:
        yield _joined(f"{held}.gate_up_bias", [Source(f"{prefix}.{p}_proj.bias", (n,)) for p, n in parts.items()])
        yield _whole(f"{held}.down_bias", f"{prefix}.down_proj.bias", (hidden,))


def _separate_experts(spec: MoeSpec, hidden: int, layer: str, held: str) -> Iterator[HeldTensor]:
    """Experts stored one by one, each with three matrices."""
    if spec.tensors == ExpertTensors.W1_W3_W2:
        prefix, (gate, up, down) = f"{layer}.block_sparse_moe", ("w1", "w3", "w2")
    else:
        prefix, (gate, up, down) = f"{layer}.mlp", ("gate_proj", "up_proj", "down_proj")
    rows, experts = spec.intermediate_size, range(spec.num_experts)
    yield _whole(f"{held}.router", f"{prefix}.gate.weight", (spec.num_experts, hidden))
    gate_up = [
        Piece(
            (Source(f"{prefix}.experts.{expert}.{name}.weight", (rows, hidden)),), (2 * expert + half) * rows * hidden
        )
        for expert in experts
        for half, name in enumerate((gate, up))
    ]
    yield HeldTensor(f"{held}.gate_up", (spec.num_experts, 2 * rows, hidden), tuple(gate_up))
    downs = [
        Piece((Source(f"{prefix}.experts.{expert}.{down}.weight", (hidden, rows)),), expert * rows * hidden)
        for expert in experts
    ]
    yield HeldTensor(f"{held}.down", (spec.num_experts, hidden, rows), tuple(downs))


def _interleaved_experts(
    spec: MoeSpec, hidden: int, prefix: str, held: str, stored: Mapping[str, StoredTensor]
) -> Iterator[HeldTensor]:
    """Experts of gpt-oss: stored as plain matrices, or packed as MXFP4 blocks with scales."""
    count, rows, experts = spec.num_experts, spec.intermediate_size, f"{prefix}.experts"
    yield _whole(f"{held}.router", f"{prefix}.router.weight", (count, hidden))
    yield _whole(f"{held}.router_bias", f"{prefix}.router.bias", (count,))
    shape, down_shape = (count, 2 * rows, hidden), (count, hidden, rows)
    if f"{experts}.gate_up_proj_blocks" in stored:
        gate_up = Piece(_packed(f"{experts}.gate_up_proj", shape), 0, Arrangement.MXFP4_INTERLEAVED)
        down = Piece(_packed(f"{experts}.down_proj", down_shape), 0, Arrangement.MXFP4)
    else:
        source = Source(f"{experts}.gate_up_proj", (count, hidden, 2 * rows))
        gate_up = Piece((source,), 0, Arrangement.INTERLEAVED_TRANSPOSED)
        down = Piece((Source(f"{experts}.down_proj", (count, rows, hidden)),), 0, Arrangement.TRANSPOSED)
    yield HeldTensor(f"{held}.gate_up", shape, (gate_up,))
    yield HeldTensor(f"{held}.down", down_shape, (down,))
    bias = Source(f"{experts}.gate_up_proj_bias", (count, 2 * rows))
    yield HeldTensor(f"{held}.gate_up_bias", bias.shape, (Piece((bias,), 0, Arrangement.INTERLEAVED),))
    yield _whole(f"{held}.down_bias", f"{experts}.down_proj_bias", (count, hidden))


def _packed(name: str, shape: tuple[int, int, int]) -> tuple[Source, ...]:
    """Name blocks and scales of a packed [E, rows, columns] tensor: two elements a byte, a scale per block."""
    experts, rows, columns = shape
    scales = (experts, rows, columns // MXFP4_BLOCK)
    return Source(f"{name}_blocks", (*scales, MXFP4_BLOCK // 2), BYTES), Source(f"{name}_scales", scales, BYTES)


def _is_stored(module: str, stored: Mapping[str, StoredTensor]) -> bool:
    return any(f"{module}.{name}" in stored for name in _CODES)


def _zero_biases(tensors: Iterable[HeldTensor], stored: Mapping[str, StoredTensor]) -> tuple[str, ...]:
    """Name the biases of matrices with `qweight` that the architecture does not have: some writers store zeros."""
    needed = {source.name for tensor in tensors for piece in tensor.pieces for source in piece.sources}
    modules = [name.removesuffix(".qweight") for name in needed if name.endswith(".qweight")]
    return tuple(sorted(bias for bias in (f"{m}.bias" for m in modules) if bias in stored and bias not in needed))


def _check(layout: Layout, checkpoint: Checkpoint, elsewhere: Set[str]) -> None:
    stored = checkpoint.tensors
    pieces = [piece for tensor in layout.tensors for piece in tensor.pieces]
    needed = {source.name: source for piece in pieces for source in piece.sources}
    allowed = {name: source.dtypes for name, source in needed.items()} | dict.fromkeys(layout.zero_biases, FLOATS)
    if layout.repeats_embedding:
        allowed[LM_HEAD] = FLOATS
    problems = [
        _listing("missing", [name for name in needed if name not in stored]),
        _listing(
            "unexpected", [n for n in stored if n not in allowed | dict.fromkeys(elsewhere) and not _IGNORED.search(n)]
        ),
        _listing(
            "of another shape than config.json says",
            [
                f"{name} {list(stored[name].shape)} instead of {list(source.shape)}"
                for name, source in needed.items()
                if name in stored and stored[name].shape != source.shape
            ],
        ),
        _listing(
            "of a dtype that is not read",
            [
                f"{name} ({stored[name].dtype})"
                for name, dtypes in sorted(allowed.items())
                if name in stored and stored[name].dtype not in dtypes
            ],
        ),
    ]
    found = "; ".join(problem for problem in problems if problem)
    if found:
        raise CheckpointError(
            f"tensors in {str(checkpoint.folder)!r} do not fit the architecture: {found}. "
            "Use the config.json that belongs to these weights"
        )


def _listing(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"{len(names)} {what}: {', '.join(names[:_NAMES_SHOWN])}{more}"
