"""The data-driven decoder: one forward for every family, driven by a `DecoderSpec`.

Calls the platform's operators and the runner's attention, and knows neither. Weights come from `zif.models.weights`
by the names of `zif.models.layout`. Letters as in `zif.models.spec`; T tokens of the step, S chosen rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from zif.contract import AttentionParams, ExpertWeights, NormOutput, OpTable, QuantizedExperts, QuantizedWeight
from zif.models.heads import Head
from zif.models.model import LayerAttention, Model
from zif.models.rope import Angles, Rotary
from zif.models.spec import AttentionSpec, DecoderSpec, MlpSpec, MoeSpec, QKNorm, RopeSpec

Weight = torch.Tensor | QuantizedWeight
"""Numbers, or codes with scales, or what a platform made of numbers that only products read (`multiplied`): that is a
tensor to a type checker alone, and nothing here looks into it."""

Weights = Mapping[str, Weight]
"""Weights by the decoder's own names, "layers.3.qkv"."""


@dataclass(frozen=True, slots=True)
class Projection:
    """A matrix, [O, I], with its bias, [O]."""

    weight: Weight
    bias: torch.Tensor | None

    def apply(self, ops: OpTable, x: torch.Tensor) -> torch.Tensor:
        """Multiply and add. x: [T, I]. Returns [T, O]."""
        if isinstance(self.weight, QuantizedWeight):
            return ops.quantized_linear(x, self.weight, self.bias)
        return ops.linear(x, self.weight, self.bias)

    def logits(self, ops: OpTable, x: torch.Tensor) -> torch.Tensor:
        """Do what `apply` does, unrounded where the platform has it so. x: [S, I]. Returns [S, O], float32."""
        if isinstance(self.weight, QuantizedWeight):
            wide = ops.quantized_logits(x, self.weight, self.bias)
        else:
            wide = ops.logits(x, self.weight, self.bias)
        return self.apply(ops, x).float() if wide is None else wide


@dataclass(frozen=True, slots=True)
class Norm:
    """One RMS norm. weight: [C] or [D]."""

    weight: torch.Tensor
    eps: float
    offset: float

    def apply(self, ops: OpTable, x: torch.Tensor) -> torch.Tensor:
        """Normalize over the last axis."""
        return ops.rms_norm(x, self.weight, self.eps, self.offset)


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention of one layer with its weights.

    qkv: [(H + 2K) * D, C]. output: [C, H * D]. The norms of queries and keys are over D or over all heads.
    """

    spec: AttentionSpec
    layer: int
    params: AttentionParams
    qkv: Projection
    output: Projection
    q_norm: Norm | None
    k_norm: Norm | None

    def run(
        self, ops: OpTable, x: torch.Tensor, angles: Mapping[RopeSpec, Angles], attend: LayerAttention
    ) -> torch.Tensor:
        """Attend from each token. x: [T, C]. Returns [T, C]."""
        spec = self.spec
        qkv = self.qkv.apply(ops, x)
        query, key, value = torch.split(qkv, [spec.query_size, spec.kv_size, spec.kv_size], dim=-1)
        query = self._heads(ops, query, spec.num_heads, self.q_norm)
        key = self._heads(ops, key, spec.num_kv_heads, self.k_norm)
        if spec.rope is not None:
            angle = angles[spec.rope]
            rotated = ops.rotate(query, key, angle.cos, angle.sin, interleaved=False)
            query, key = rotated.query, rotated.key
        heads = attend(self.layer, query, key, value.view(-1, spec.num_kv_heads, spec.head_dim), self.params)
        return self.output.apply(ops, heads.flatten(1))

    def _heads(self, ops: OpTable, x: torch.Tensor, num_heads: int, norm: Norm | None) -> torch.Tensor:
        """Split channels into heads, normalized before or after as the spec says. x: [T, H * D]. Returns [T, H, D]."""
        if norm is not None and self.spec.qk_norm == QKNorm.FULL_WIDTH:
            x = norm.apply(ops, x)
        x = x.view(-1, num_heads, self.spec.head_dim)
        return norm.apply(ops, x) if norm is not None and self.spec.qk_norm == QKNorm.PER_HEAD else x


@dataclass(frozen=True, slots=True)
class Mlp:
    """A gated MLP. gate_up: [2I, C]. down: [C, I]."""

    spec: MlpSpec
    gate_up: Projection
    down: Projection

    def run(self, ops: OpTable, x: torch.Tensor) -> torch.Tensor:
        """Transform each token. x: [T, C]. Returns [T, C]."""
        gated = ops.gated_linear(x, self.gate_up.weight, self.gate_up.bias, self.spec.activation)
        return self.down.apply(ops, gated)


@dataclass(frozen=True, slots=True)
class Moe:
    """A mixture of experts. router: [E, C]."""

    spec: MoeSpec
    router: Projection
    weights: ExpertWeights | QuantizedExperts

    def run(self, ops: OpTable, x: torch.Tensor) -> torch.Tensor:
        """Transform each token by its experts. x: [T, C]. Returns [T, C]."""
        routed = ops.route(self.router.apply(ops, x), self.spec.num_experts_per_token, self.spec.routing)
        if isinstance(self.weights, QuantizedExperts):
            return ops.quantized_experts(x, self.weights, routed, self.spec.activation)
        return ops.experts(x, self.weights, routed, self.spec.activation)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer; norms that its placement does not have are None."""

    attention: Attention
    mlp: Mlp | Moe
    attention_in_norm: Norm | None
    attention_out_norm: Norm | None
    mlp_in_norm: Norm | None
    mlp_out_norm: Norm | None


class Decoder(Model):
    """A decoder whose weights are loaded, computing with one platform's operators."""

    def __init__(
        self, spec: DecoderSpec, weights: Weights, ops: OpTable, max_model_len: int, array_device: str
    ) -> None:
        self._spec = spec
        self._ops = ops
        self._embedding = weights["embedding"]
        self._lm_head = _lm_head(spec, weights)
        self._norm = Norm(_tensor(weights, "norm"), spec.norm_eps, spec.norm_weight_offset)
        self._layers = tuple(_build_layer(spec, index, weights) for index in range(len(spec.layers)))
        self._rotaries = {rope: Rotary(rope, max_model_len, array_device) for rope in spec.ropes}
        self._embedding_multiplier = _embedding_multiplier(spec, self._norm.weight.dtype)

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, attend: LayerAttention) -> torch.Tensor:
        hidden = self._embed(token_ids)
        if self._embedding_multiplier != 1.0:
            hidden = hidden * self._embedding_multiplier
        angles = {rope: rotary.angles(positions) for rope, rotary in self._rotaries.items()}
        state = self._normed(hidden, self._layers[0].attention_in_norm)
        for index, layer in enumerate(self._layers):
            update = layer.attention.run(self._ops, state.normed, angles, attend)
            state = self._add(update, layer.attention_out_norm, state.residual, layer.mlp_in_norm)
            update = layer.mlp.run(self._ops, state.normed)
            state = self._add(update, layer.mlp_out_norm, state.residual, self._norm_after(index))
        return state.normed

    @property
    def gives_logits(self) -> bool:
        return self._lm_head is not None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self._lm_head is not None, "the checkpoint has no output matrix"
        logits = self._lm_head.logits(self._ops, hidden)
        if self._spec.logits_divisor != 1.0:
            logits = logits / self._spec.logits_divisor
        cap = self._spec.final_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Look tokens up. Returns [T, C], model dtype."""
        if not isinstance(self._embedding, QuantizedWeight):
            return functional.embedding(token_ids, self._embedding)
        rows = self._embedding.codes[token_ids] * self._embedding.scales[token_ids]
        return rows.to(self._norm.weight.dtype)

    def _norm_after(self, layer: int) -> Norm | None:
        """The norm that the sum after a layer goes through: the next layer's first, or the final one."""
        following = layer + 1
        return self._layers[following].attention_in_norm if following < len(self._layers) else self._norm

    def _normed(self, hidden: torch.Tensor, norm: Norm | None) -> NormOutput:
        return NormOutput(hidden if norm is None else norm.apply(self._ops, hidden), hidden)

    def _add(
        self, update: torch.Tensor, out_norm: Norm | None, residual: torch.Tensor, in_norm: Norm | None
    ) -> NormOutput:
        """Add what attention or MLP gave to the residual stream, and normalize for what comes next."""
        if out_norm is not None:
            update = out_norm.apply(self._ops, update)
        if self._spec.residual_multiplier != 1.0:
            update = update * self._spec.residual_multiplier
        if in_norm is None:
            return self._normed(residual + update, None)
        return self._ops.add_rms_norm(update, residual, in_norm.weight, in_norm.eps, in_norm.offset)


def multiplied(spec: DecoderSpec) -> dict[str, str]:
    """Map the names of the weights that `linear`, `gated_linear` or `logits` are given to those of the tensors held.

    They differ where the output matrix is the embedding ("lm_head": "embedding"), a tensor that others read, too. All
    other tensors are read by products alone. The largest come last.
    """
    names = [
        f"layers.{index}.{name}" for index in range(len(spec.layers)) for name in _matrices(spec.layers[index].mlp)
    ]
    held = dict(zip(names, names, strict=True))
    if spec.head is Head.TOKENS:
        held["lm_head"] = "embedding" if spec.tied_embeddings else "lm_head"
    return held


def _matrices(mlp: MlpSpec | MoeSpec) -> tuple[str, ...]:
    """Name the matrices of a layer that are no experts'."""
    return ("qkv", "output", *(("gate_up", "down") if isinstance(mlp, MlpSpec) else ("router",)))


def _lm_head(spec: DecoderSpec, weights: Weights) -> Projection | None:
    if spec.head is not Head.TOKENS:
        return None
    is_embedding = spec.tied_embeddings and "lm_head" not in weights
    return Projection(weights["embedding" if is_embedding else "lm_head"], None)


def _embedding_multiplier(spec: DecoderSpec, dtype: torch.dtype) -> float:
    multiplier = spec.embedding_multiplier
    return float(torch.tensor(multiplier, dtype=dtype)) if spec.rounds_embedding_multiplier else multiplier


def _build_layer(spec: DecoderSpec, index: int, weights: Weights) -> Layer:
    layer, held = spec.layers[index], f"layers.{index}"

    def norm(name: str) -> Norm | None:
        weight = _optional_tensor(weights, f"{held}.{name}")
        return None if weight is None else Norm(weight, spec.norm_eps, spec.norm_weight_offset)

    attention = Attention(
        spec=layer.attention,
        layer=index,
        params=_attention_params(layer.attention, _optional_tensor(weights, f"{held}.sinks")),
        qkv=_projection(weights, f"{held}.qkv"),
        output=_projection(weights, f"{held}.output"),
        q_norm=norm("q_norm"),
        k_norm=norm("k_norm"),
    )
    return Layer(
        attention=attention,
        mlp=_build_mlp(layer.mlp, held, weights),
        attention_in_norm=norm("attention_in_norm"),
        attention_out_norm=norm("attention_out_norm"),
        mlp_in_norm=norm("mlp_in_norm"),
        mlp_out_norm=norm("mlp_out_norm"),
    )


def _attention_params(spec: AttentionSpec, sinks: torch.Tensor | None) -> AttentionParams:
    return AttentionParams(scale=spec.scale, window=spec.window, softcap=spec.softcap, sinks=sinks)


def _build_mlp(spec: MlpSpec | MoeSpec, held: str, weights: Weights) -> Mlp | Moe:
    gate_up, down = _projection(weights, f"{held}.gate_up"), _projection(weights, f"{held}.down")
    if isinstance(spec, MlpSpec):
        return Mlp(spec, gate_up, down)
    router = _projection(weights, f"{held}.router")
    if isinstance(gate_up.weight, QuantizedWeight):
        assert isinstance(down.weight, QuantizedWeight), f"{held}: the experts' matrices are held alike"
        return Moe(spec, router, QuantizedExperts(gate_up.weight, down.weight, gate_up.bias, down.bias))
    return Moe(spec, router, ExpertWeights(gate_up.weight, _tensor(weights, f"{held}.down"), gate_up.bias, down.bias))


def _projection(weights: Weights, name: str) -> Projection:
    return Projection(weights[name], _optional_tensor(weights, f"{name}_bias"))


def _optional_tensor(weights: Weights, name: str) -> torch.Tensor | None:
    return _tensor(weights, name) if name in weights else None


def _tensor(weights: Weights, name: str) -> torch.Tensor:
    """Return a weight that is held as numbers, never as codes or as a platform has it."""
    weight = weights[name]
    assert isinstance(weight, torch.Tensor), f"{name} is not held as numbers"
    return weight
