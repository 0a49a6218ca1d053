"""Train the small language model that lies in ``checkpoint/``, from text every Python installation carries.

This file is the whole recipe: it gathers the documentation strings of the running interpreter's standard library,
trains a byte-level BPE tokenizer on them, trains a Llama-architecture model of about 3.5 million parameters on the CPU
and writes a Hugging Face checkpoint folder. It downloads nothing.

It is not part of the engine, nothing imports it, and the model is not a useful assistant: it is a real checkpoint,
small enough to live in a repository, whose text is recognisable documentation prose.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import inspect
import json
import math
import os
import random
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

END, USER, ASSISTANT = "<|endoftext|>", "<|user|>", "<|assistant|>"
VOCABULARY = 3072
CONTEXT = 1024
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content'] + eos_token }}"
    "{% else %}{{ '<|user|>' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "site-packages", "dist-packages"}
)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True, order=True)
class Document:
    """One piece of documentation: the dotted name it documents, and its cleaned text."""

    name: str
    text: str


@dataclass(frozen=True)
class Settings:
    """What the command line decides; the shape of the model is fixed in `model_config`."""

    out: Path
    steps: int
    minutes: float
    batch_tokens: int
    learning_rate: float
    dropout: float
    save_every: int
    compile: bool
    threads: int
    seed: int


# ---------------------------------------------------------------------------------------------------------- corpus


def stdlib_files(root: Path) -> list[Path]:
    """The library's own Python sources in a fixed order, without tests and bundled applications."""
    files = sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix())
    return [path for path in files if not SKIPPED_FOLDERS & set(path.relative_to(root).parts)]


def clean(text: str) -> str:
    """Dedented text without trailing blanks on any line."""
    return "\n".join(line.rstrip() for line in inspect.cleandoc(text).splitlines()).strip()


def module_name(path: Path, root: Path) -> str:
    """``os/path.py`` as ``os.path``; a package's ``__init__`` as the package."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def docstrings(node: ast.AST, name: str) -> Iterator[Document]:
    """Every docstring at or below a node, each under its qualified name."""
    text = ast.get_docstring(node, clean=False) if isinstance(node, DOCUMENTED) else None
    if text:
        yield Document(name, clean(text))
    for child in ast.iter_child_nodes(node):
        label = getattr(child, "name", None)
        yield from docstrings(child, f"{name}.{label}" if isinstance(label, str) else name)


def help_topics(tree: ast.Module) -> Iterator[Document]:
    """The texts of ``help('TOPIC')``, which the library keeps as one dictionary of strings."""
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            for name, text in ast.literal_eval(statement.value).items():
                yield Document(name, clean(text))


def parse(path: Path) -> ast.Module | None:
    """The syntax tree of a file, or None where the running interpreter cannot read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return None


def gather_corpus(root: Path) -> list[Document]:
    """All documentation of the library: distinct texts, sorted, short fragments left out."""
    first_name: dict[str, str] = {}
    for path in stdlib_files(root):
        tree = parse(path)
        if tree is None:
            continue
        name = module_name(path, root)
        for document in help_topics(tree) if name == "pydoc_data.topics" else docstrings(tree, name):
            first_name.setdefault(document.text, document.name)
    return sorted(Document(name, text) for text, name in first_name.items() if len(text) >= 16)


def bucket(document: Document, buckets: int) -> int:
    """A number below `buckets` that depends on the text alone, so that every run splits alike."""
    return int.from_bytes(hashlib.sha256(document.text.encode()).digest()[:8], "big") % buckets


def is_held_out(document: Document) -> bool:
    """Whether a document is kept for measuring only: about one in thirty."""
    return bucket(document, 30) == 0


def render(document: Document) -> list[str]:
    """A document as training texts: as it is and, for one in four, also as the answer in a chat."""
    texts = [document.text]
    if bucket(document, 4) == 1:
        texts.append(f"{USER}What is {document.name}?{ASSISTANT}{document.text}")
    return texts


# ------------------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer with exactly `VOCABULARY` entries, the special ones first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        special_tokens=[END, USER, ASSISTANT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise SystemExit(f"the corpus gives only {tokenizer.get_vocab_size()} of {VOCABULARY} vocabulary entries")
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[Tensor]:
    """Each text as token ids, the end marker in front: it separates texts and starts each of them."""
    end = tokenizer.token_to_id(END)
    return [torch.tensor([end, *encoding.ids]) for encoding in tokenizer.encode_batch(texts)]


def tokenizer_settings() -> dict[str, Any]:
    """What ``tokenizer_config.json`` says."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "additional_special_tokens": [USER, ASSISTANT],
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


# ----------------------------------------------------------------------------------------------------------- model


def model_config(tokenizer: Tokenizer) -> LlamaConfig:
    """The shape of the model: five layers of width 256, four query heads over two key-value heads."""
    end = tokenizer.token_to_id(END)
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=448,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )


def new_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """A freshly initialised model whose projections into the residual stream start small."""
    model = LlamaForCausalLM(model_config(tokenizer))
    scale = 1 / math.sqrt(2 * model.config.num_hidden_layers)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.down_proj.weight.mul_(scale)
    return model


def add_dropout(model: LlamaForCausalLM, probability: float) -> None:
    """Drop features where a layer writes into the residual stream, while training; one mask serves a whole row."""

    def hook(module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        mask = nn.functional.dropout(torch.ones_like(output[:, :1]), probability, training=module.training)
        return output * mask

    model.model.embed_tokens.register_forward_hook(hook)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(hook)
        layer.mlp.down_proj.register_forward_hook(hook)


def save_checkpoint(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the checkpoint folder, each file replaced whole so that a reader never sees half of one."""
    out.mkdir(parents=True, exist_ok=True)
    end = tokenizer.token_to_id(END)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        rounded = copy.deepcopy(model).to(torch.bfloat16).eval()
        rounded.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)
        rounded.save_pretrained(scratch)
        tokenizer.save(str(Path(scratch, "tokenizer.json")), pretty=False)
        Path(scratch, "tokenizer_config.json").write_text(json.dumps(tokenizer_settings(), indent=2) + "\n")
        digest = hashlib.sha256(Path(scratch, "model.safetensors").read_bytes()).hexdigest()
        Path(scratch, "SHA256SUMS").write_text(f"{digest}  model.safetensors\n")
        for file in Path(scratch).iterdir():
            os.chmod(file, 0o644)
            os.replace(file, out / file.name)


# -------------------------------------------------------------------------------------------------------- training


def token_stream(texts: list[Tensor], seed: int) -> Iterator[Tensor]:
    """The texts for ever, in a new order on every pass."""
    shuffler = random.Random(seed)
    while True:
        yield from shuffler.sample(texts, len(texts))


def batches(texts: list[Tensor], batch_tokens: int, seed: int) -> Iterator[Tensor]:
    """Batches of packed text: mostly rows of 256 tokens, every fourth batch rows of the full context."""
    stream, held, number = token_stream(texts, seed), torch.empty(0, dtype=torch.long), 0
    while True:
        pieces = [held]
        while sum(map(len, pieces)) < batch_tokens:
            pieces.append(next(stream))
        joined = torch.cat(pieces)
        held, number = joined[batch_tokens:], number + 1
        yield joined[:batch_tokens].view(-1, CONTEXT if number % 4 == 0 else CONTEXT // 4)


def loss_on(model: Callable[..., Any], rows: Tensor) -> Tensor:
    """Mean cross-entropy of predicting each next token, in nats."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss: Tensor = model(input_ids=rows, labels=rows, use_cache=False).loss
    return loss


@torch.no_grad()
def measure(model: LlamaForCausalLM, texts: list[Tensor], tokens: int = 32768) -> float:
    """Loss over the first `tokens` of some texts, in rows of 256, without dropout."""
    joined = torch.cat(texts)[:tokens]
    rows = joined[: len(joined) // 256 * 256].view(-1, 256)
    model.eval()
    losses = [loss_on(model, part).item() * len(part) for part in torch.split(rows, 16)]
    model.train()
    return sum(losses) / len(rows)


def make_optimizer(model: LlamaForCausalLM, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW that decays matrices and leaves the norm weights alone."""
    decayed = [weight for weight in model.parameters() if weight.dim() > 1]
    free = [weight for weight in model.parameters() if weight.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def rate_at(progress: float, step: int, peak: float) -> float:
    """A hundred steps of warm-up, then a cosine down to a fiftieth of the peak."""
    warm = min(1.0, (step + 1) / 100)
    return peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def update(model: Callable[..., Any], optimizer: torch.optim.Optimizer, rows: Tensor, rate: float) -> float:
    """One optimizer step with clipped gradients; returns the loss it started from."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = loss_on(model, rows)
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_([weight for group in optimizer.param_groups for weight in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def progress_at(settings: Settings, step: int, started: float) -> float:
    """How far a run is, from 0 to 1, by whichever of its two limits is nearer."""
    return max(step / settings.steps, (time.monotonic() - started) / (60 * settings.minutes))


def train(settings: Settings, tokenizer: Tokenizer, texts: list[Tensor], held_out: list[Tensor]) -> LlamaForCausalLM:
    """Train to the step or time limit, with a usable checkpoint on the way every `save_every` steps."""
    model = new_model(tokenizer)
    add_dropout(model, settings.dropout)
    optimizer = make_optimizer(model, settings.learning_rate)
    stepped = torch.compile(model, dynamic=False) if settings.compile else model
    started = time.monotonic()
    for step, rows in enumerate(batches(texts, settings.batch_tokens, settings.seed)):
        progress = progress_at(settings, step, started)
        if progress >= 1:
            print(f"stopped after {step} steps", flush=True)
            break
        loss = update(stepped, optimizer, rows, rate_at(progress, step, settings.learning_rate))
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}  {time.monotonic() - started:.0f} s  loss {loss:.3f}", flush=True)
        if (step + 1) % settings.save_every == 0:
            print(f"step {step + 1}  held-out {measure(model, held_out):.3f}", flush=True)
            save_checkpoint(model, tokenizer, settings.out)
    return model


# --------------------------------------------------------------------------------------------------------- command


def parse_arguments() -> Settings:
    """The command line as settings."""
    parser = argparse.ArgumentParser(description="Train the embedded example model on the CPU.")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "checkpoint")
    parser.add_argument("--steps", type=int, default=4500, help="optimizer steps")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop here if the steps take longer")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens per step, a multiple of 1024")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak of the schedule")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints on the way")
    parser.add_argument("--compile", action="store_true", help="use torch.compile; needs a C++ compiler")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    return Settings(**vars(parser.parse_args()))


def main() -> None:
    """Gather, tokenize, train, save and report."""
    settings = parse_arguments()
    disable_progress_bar()
    torch.manual_seed(settings.seed)
    torch.set_num_threads(settings.threads)
    corpus = gather_corpus(Path(sysconfig.get_path("stdlib")))
    kept = [document for document in corpus if not is_held_out(document)]
    tokenizer = train_tokenizer([document.text for document in kept])
    texts = encode(tokenizer, [text for document in kept for text in render(document)])
    plain = encode(tokenizer, [document.text for document in kept])
    held_out = encode(tokenizer, [document.text for document in corpus if is_held_out(document)])
    print(f"{len(corpus)} documents, {sum(len(document.text) for document in corpus)} characters")
    print(f"{sum(map(len, texts))} training tokens, {sum(map(len, held_out))} held-out tokens", flush=True)
    model = train(settings, tokenizer, texts, held_out)
    save_checkpoint(model, tokenizer, settings.out)
    saved = LlamaForCausalLM.from_pretrained(settings.out, dtype=torch.bfloat16)
    sample = random.Random(settings.seed).sample(plain, len(plain))
    print(f"final loss: train {measure(saved, sample):.3f}, held-out {measure(saved, held_out):.3f}")


if __name__ == "__main__":
    main()
