"""What rounding costs: perplexity and logits of the embedded model, and products of layers with outliers.

The model is `examples/embedded_model/checkpoint`; the texts are those that its training held out, documentation of the
running interpreter's library. Every row is computed by the reference operators, so it says what a scheme costs and not
what a kernel adds. KL is the divergence of the next token's distribution from that of float32, in nats per token. The
layers are synthetic: weights with heavy tails, and tokens of which a few channels are many times larger than the
others, as Dettmers et al., 2022 found in large models; a model of this size has none. Run:

    python benchmarks/quality.py
"""

import argparse
import importlib.util
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
from torch.nn import functional

from zif.contract import Allocator, AttentionParams, Buffer, QuantizedWeight, WeightScheme
from zif.models.decoder import Decoder, Mlp, Projection
from zif.models.description import ModelSource, describe_model
from zif.models.weights import load_decoder
from zif.reference.ops import ReferenceOps
from zif.reference.quantization import decode_vectors, encode_vectors, multiply, quantize

EXAMPLE = Path(__file__).resolve().parents[1] / "examples/embedded_model"
ROW = 256
"""Tokens that see each other: the length that the model was mostly trained on."""

INT8 = WeightScheme(8, dynamic_activations=True)
SCHEMES = {
    "8 bits, activations in 8": INT8,
    "8 bits, activations as they are": WeightScheme(8),
    "4 bits, groups of 32": WeightScheme(4, 32),
    "4 bits, groups of 64": WeightScheme(4, 64),
    "4 bits, groups of 128": WeightScheme(4, 128),
    "4 bits, groups of 32, zero points": WeightScheme(4, 32, zero_points=True),
    "4 bits, groups of 128, zero points": WeightScheme(4, 128, zero_points=True),
}


class Memory(Allocator[torch.Tensor]):
    """Host memory without a limit."""

    def __init__(self) -> None:
        super().__init__(1 << 40)

    def _allocate(self, num_bytes: int, alignment: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def _free(self, buffer: Buffer[torch.Tensor]) -> None:
        del buffer


@dataclass(frozen=True)
class Rows:
    """Attention of rows of `ROW` tokens, each causal in itself; keys and values as 8 bits if `rounds_kv`."""

    rounds_kv: bool = False

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        del layer
        if self.rounds_kv:
            key, value = (decode_vectors(encode_vectors(part), part.shape[-1]).to(part.dtype) for part in (key, value))
        heads = (part.unflatten(0, (-1, ROW)).transpose(1, 2) for part in (query, key, value))
        attended = functional.scaled_dot_product_attention(*heads, is_causal=True, scale=params.scale, enable_gqa=True)
        return attended.transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class Variant:
    """One way to hold the model."""

    name: str
    dtype: str = "float32"
    quantization: str | None = None
    scheme: WeightScheme | None = None
    rounds_kv: bool = False

    def load(self) -> Decoder:
        """Load the model as zif does, or round its layers to a scheme that loading does not choose."""
        source = ModelSource(EXAMPLE / "checkpoint", dtype=self.dtype, quantization=self.quantization)
        model = load_decoder(describe_model(source), ReferenceOps(), Memory(), "cpu", lambda done, total: None)
        assert isinstance(model, Decoder)
        if self.scheme is not None:
            round_layers(model, self.scheme)
        return model


VARIANTS = (
    Variant("float32"),
    Variant("bfloat16", "bfloat16"),
    Variant("float32, int8 KV", rounds_kv=True),
    Variant("quantization=int8", quantization="int8"),
    Variant("quantization=int8, int8 KV", quantization="int8", rounds_kv=True),
    Variant("quantization=int8, bfloat16", "bfloat16", quantization="int8"),
    Variant("quantization=int4", quantization="int4"),
    Variant("quantization=int4, int8 KV", quantization="int4", rounds_kv=True),
    *(Variant(f"layers in {name}", quantization="int8", scheme=scheme) for name, scheme in SCHEMES.items()),
)


def round_layers(model: Decoder, scheme: WeightScheme) -> None:
    """Hold the matrices of all layers in a scheme, rounded from float32."""
    plain = Variant("float32").load()
    layers = []
    for layer in plain._layers:
        attention = replace(
            layer.attention, qkv=rounded(layer.attention.qkv, scheme), output=rounded(layer.attention.output, scheme)
        )
        assert isinstance(layer.mlp, Mlp)
        mlp = replace(layer.mlp, gate_up=rounded(layer.mlp.gate_up, scheme), down=rounded(layer.mlp.down, scheme))
        layers.append(replace(layer, attention=attention, mlp=mlp))
    model._layers = tuple(layers)


def rounded(projection: Projection, scheme: WeightScheme) -> Projection:
    """Round one matrix; groups that do not divide its inputs are halved until they do."""
    weight = projection.weight
    assert isinstance(weight, torch.Tensor)
    group_size = scheme.group_size
    while group_size and weight.shape[-1] % group_size:
        group_size //= 2
    return Projection(quantize(weight, replace(scheme, group_size=group_size)), projection.bias)


def held_out_rows(num_tokens: int) -> torch.Tensor:
    """Return the first tokens of the texts that training held out, [R, ROW], int64."""
    recipe = _recipe()
    tokenizer = recipe.Tokenizer.from_file(str(EXAMPLE / "checkpoint/tokenizer.json"))
    corpus = recipe.gather_corpus(Path(sysconfig.get_path("stdlib")))
    texts = recipe.encode(tokenizer, [document.text for document in corpus if recipe.is_held_out(document)])
    tokens: torch.Tensor = torch.cat(texts)[:num_tokens]
    return tokens[: len(tokens) // ROW * ROW].view(-1, ROW)


def _recipe() -> ModuleType:
    specification = importlib.util.spec_from_file_location("embedded_model_training", EXAMPLE / "train.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


@torch.inference_mode()
def log_likelihoods(model: Decoder, rows: torch.Tensor, rounds_kv: bool) -> torch.Tensor:
    """Return log-probabilities of every next token, [R * (ROW - 1), V], float32."""
    positions = torch.arange(ROW).repeat(rows.shape[0])
    hidden = model.forward(rows.flatten(), positions, Rows(rounds_kv))
    return model.logits(hidden).log_softmax(-1).unflatten(0, (-1, ROW))[:, :-1].flatten(0, 1)


def compare_models(rows: torch.Tensor, show: Callable[[str], None]) -> None:
    """Print perplexity, and divergence from float32, of every variant."""
    show("| weights and KV | bytes of weights | perplexity | against float32 | KL mean | KL 99 % | same token |")
    show("|---|---|---|---|---|---|---|")
    parts = rows.split(16)
    exact = VARIANTS[0].load()
    expected = [log_likelihoods(exact, part, rounds_kv=False) for part in parts]
    base = 0.0
    for variant in VARIANTS:
        model, losses, divergences, same = variant.load(), [], [], []
        for part, wanted in zip(parts, expected, strict=True):
            found, truth = log_likelihoods(model, part, variant.rounds_kv), wanted
            targets = part[:, 1:].reshape(-1, 1)
            losses.append(-found.gather(1, targets)[:, 0])
            divergences.append((truth.exp() * (truth - found)).sum(-1))
            same.append(truth.argmax(-1) == found.argmax(-1))
        loss, divergence = torch.cat(losses).double().mean(), torch.cat(divergences).double()
        perplexity = float(loss.exp())
        base = base or perplexity
        kl, tail = float(divergence.mean()), float(divergence.quantile(0.99))
        agreement = float(torch.cat(same).double().mean())
        show(
            f"| {variant.name} | {held_bytes(model):,} | {perplexity:.3f} | {perplexity / base - 1:+.2%} | {kl:.5f} | "
            f"{tail:.4f} | {agreement:.2%} |"
        )


def held_bytes(model: Decoder) -> int:
    """Count the bytes of a model's matrices."""
    matrices = [model._lm_head]
    for layer in model._layers:
        assert isinstance(layer.mlp, Mlp)
        matrices += [layer.attention.qkv, layer.attention.output, layer.mlp.gate_up, layer.mlp.down]
    return sum(_weight_bytes(matrix.weight) for matrix in matrices)


def _weight_bytes(weight: torch.Tensor | QuantizedWeight) -> int:
    if isinstance(weight, torch.Tensor):
        return int(weight.nbytes)
    zeros = 0 if weight.zeros is None else weight.zeros.nbytes
    return int(weight.codes.nbytes + weight.scales.nbytes + zeros)


@dataclass(frozen=True)
class Outliers:
    """How many of 1,024 channels of a token are larger than the others, and how many times."""

    num_channels: int
    factor: float


@torch.inference_mode()
def compare_layers(show: Callable[[str], None]) -> None:
    """Print the error of one product by scheme and outliers, as a share of the power of the exact result."""
    kinds = {
        "no outliers": Outliers(0, 1.0),
        "6 channels, 20 times": Outliers(6, 20.0),
        "6 channels, 60 times": Outliers(6, 60.0),
    }
    show(f"| error of a layer 4096 -> 1024, share of its power | {' | '.join(kinds)} |")
    show("|---|" + "---|" * len(kinds))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1024, 4096, generator=generator) / 64
    tails = torch.rand(weight.shape, generator=generator) < 0.001
    weight = torch.where(tails, weight * 6, weight)
    for name, scheme in SCHEMES.items():
        held, errors = quantize(weight, scheme), []
        for outliers in kinds.values():
            x = torch.randn(128, 4096, generator=torch.Generator().manual_seed(1))
            x[:, : outliers.num_channels * 4 : 4] *= outliers.factor
            exact = x.double() @ weight.double().T
            error = multiply(x, held, None).double() - exact
            errors.append(float(error.square().sum() / exact.square().sum()))
        show(f"| {name} | {' | '.join(f'{error:.2e}' for error in errors)} |")


def main() -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(description="Measure what holding weights, keys and values as integers costs.")
    parser.add_argument(
        "--tokens", type=int, default=16384, help="held-out tokens to predict, fewer where the texts end"
    )
    arguments = parser.parse_args()
    rows = held_out_rows(arguments.tokens)
    print(f"{rows.numel()} tokens in rows of {ROW}, torch {torch.__version__}\n")
    compare_models(rows, lambda line: print(line, flush=True))
    print()
    compare_layers(lambda line: print(line, flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
