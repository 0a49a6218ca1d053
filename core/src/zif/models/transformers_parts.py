"""The two halves of a transformers model: the decoder, which gives hidden states, and the head, which gives logits.

Each architecture treats logits in its own way after the output matrix (soft caps, scales). Those lines live in the
forward method of its class, so the head is that method itself, run with a stand-in that returns the hidden states it
is given. Used by `transformers_trace` and `transformers_backend`.
"""

import itertools
from typing import Any

import torch


class _DecoderResult:
    """The result of a decoder as the forward method of a causal language model reads it: hidden states, no extras."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _DecoderStandIn(torch.nn.Module):
    """Takes the place of `module` and returns the embeddings it gets. Keeps its numbers: some heads scale by them."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        numbers = {name: value for name, value in vars(module).items() if type(value) in (int, float)}
        self.__dict__.update(numbers)

    def forward(self, *_inputs: Any, inputs_embeds: torch.Tensor, **_options: Any) -> _DecoderResult:
        return _DecoderResult(inputs_embeds)


class SplitModel(torch.nn.Module):
    """A causal language model of transformers taken apart. Takes `model` over; `path` is its decoder's.

    What serves neither half (image towers) is dropped. The parameters are those of both halves, tied ones once.
    """

    def __init__(self, model: torch.nn.Module, path: str) -> None:
        super().__init__()
        self.decoder = model.get_submodule(path)
        parent = original = model
        for name in path.split("."):  # one at each level: some heads call `self.model`, some `self.model.decoder`
            original = original.get_submodule(name)
            stand_in = _DecoderStandIn(original)
            setattr(parent, name, stand_in)
            parent = stand_in
        self.head = model

    def hidden(self, token_ids: torch.Tensor, positions: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
        """Run the decoder. token_ids, positions: [1, T]. Returns [1, T, C]."""
        hidden: torch.Tensor = self.decoder(input_ids=token_ids, position_ids=positions, use_cache=False, **options)[0]
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run the head. hidden: [1, S, C]. Returns [1, S, V], float32."""
        logits: torch.Tensor = self.head(inputs_embeds=hidden, use_cache=False, return_dict=True).logits
        return logits.float()


def find_decoder_path(model: torch.nn.Module) -> str | None:
    """Return the path of the module that runs the layers, None when the layers are not numbered or `model` runs them.

    Goes by structure: the decoder is the smallest module that holds all modules with a `layer_idx`, and an embedding.
    (`get_decoder` of transformers goes by attribute names and picks other modules for some architectures.)
    """
    paths = [
        name.split(".") for name, module in model.named_modules() if isinstance(getattr(module, "layer_idx", None), int)
    ]
    path = _common_start(paths) if paths else []
    while path and not any(isinstance(m, torch.nn.Embedding) for m in model.get_submodule(".".join(path)).modules()):
        path.pop()
    return ".".join(path) or None


def _common_start(paths: list[list[str]]) -> list[str]:
    first, last = min(paths), max(paths)
    return [
        part for part, other in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    ]
