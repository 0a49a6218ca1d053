"""Ask a real server with lm-evaluation-harness, and hold what it reports against transformers on the same checkpoint.

    python core/tests/serving/lm_eval_run.py [--environment FOLDER]

The harness lives in an environment of its own, which this makes (in ~/.cache/zif/lm-eval) and uses again. The server is
`zif serve` with the embedded model in float32. Asked through `local-completions`, as its users do: log-likelihoods of
continuations and whether they are the greedy ones, rolling log-likelihoods of texts that are longer than the context,
greedy generation up to stop strings, and a task of multiple choice from a file; one request at a time and several.
The tokens are the harness's own, so that what differs is the server's. Exit status 0 when all of it agrees.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import venv
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[3]
CHECKPOINT = REPOSITORY / "examples" / "embedded_model" / "checkpoint"
REQUIREMENTS = ["lm-eval[api]==0.4.13", "transformers", "-c", str(REPOSITORY / "constraints" / "cpu.txt")]
MAX_LENGTH = 256
TOLERANCE = 2e-3
"""Of a sum over up to 256 tokens, in nats."""

PAIRS = [
    ("Return a list of", " plugins"),
    ("Return a list of", " the blocks that a request holds"),
    ("def step(self) -> None:\n    ", '"""Compute one step."""'),
    ("Raise an error", " if the device is lost.\n"),
    ("", "The first token has no context"),
    ("naïve café ", "日本語 and emoji 🙂"),
    ("The block manager " * 20, "keeps blocks"),
]
TEXTS = ["A short text.", "The scheduler hands out tokens to requests. " * 40]
PROMPTS = [("Return a list of", ["\n"]), ("The engine", [" the", "."]), ("def ", ["\n\n"])]
QUESTIONS = [
    {"question": "Raise an", "choices": [" error", " plugin", " zebra"], "answer": 0},
    {"question": "Return the number of", "choices": [" bananas", " tokens", " clouds"], "answer": 1},
    {"question": "A request that", "choices": [" xylophone", " qqq", " is"], "answer": 2},
]


def prepared(folder: Path) -> Path:
    """Return the Python of an environment, made unless it is there."""
    marker, python = folder / ".made-from.json", folder / "bin" / "python"
    if not (marker.exists() and json.loads(marker.read_text()) == REQUIREMENTS and python.exists()):
        print(f"making the environment of {REQUIREMENTS[0]} in {folder}", file=sys.stderr)
        venv.create(folder, clear=True, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
        marker.write_text(json.dumps(REQUIREMENTS))
    return python


def started() -> "tuple[subprocess.Popen[str], str]":
    """Return a server that is ready, and its address. Raises `RuntimeError` with what it said when it ends before."""
    command = [
        str(Path(sys.executable).with_name("zif")), "serve", str(CHECKPOINT), "--platform", "cpu", "--dtype", "float32",
        "--max-model-len", str(MAX_LENGTH), "--port", "0", "--no-log-requests",
    ]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout is not None
    said = []
    for line in server.stdout:
        said.append(line)
        if "ready at" in line:
            # Nobody reads on, and a pipe that is full must not hold the server up.
            threading.Thread(target=server.stdout.read, daemon=True).start()
            return server, line.partition("ready at ")[2].split()[0]
    raise RuntimeError(f"the server ended with {server.wait()}:\n{''.join(said)}")


def ask(address: str, num_concurrent: int) -> dict[str, Any]:
    """Ask through the harness, in its environment, and return what it reports and which tokens that is about."""
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    model = LocalCompletionsAPI(
        model=CHECKPOINT.name, base_url=f"{address}/v1/completions", tokenizer=str(CHECKPOINT),
        tokenizer_backend="huggingface", max_length=MAX_LENGTH, num_concurrent=num_concurrent,
        batch_size=1 if num_concurrent > 1 else 3, max_retries=1,
    )  # fmt: skip

    def instances(kind: str, given: list[Any]) -> list[Any]:
        return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(given)]

    def windows(text: str) -> list[Any]:
        tokens, prefix = model.tok_encode(text), model.prefix_token_id
        rolled = get_rolling_token_windows(tokens, prefix, max_seq_len=model.max_length - 1, context_len=1)
        return [make_disjoint_window(window) for window in rolled]

    def encoded(context: str, continuation: str) -> Any:
        if context:
            return model._encode_pair(context, continuation)
        return [model.prefix_token_id], model.tok_encode(continuation)

    generation = [(prompt, {"until": stops, "max_gen_toks": 24}) for prompt, stops in PROMPTS]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "questions.jsonl"
        path.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
        task = {
            "task": "questions", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}},
            "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
            "doc_to_choice": "choices", "doc_to_target": "answer", "target_delimiter": "",
        }  # fmt: skip
        evaluated = lm_eval.simple_evaluate(model=model, tasks=[task], bootstrap_iters=0)
    return {
        "pairs": [encoded(*pair) for pair in PAIRS],
        "likelihoods": model.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True),
        "windows": [windows(text) for text in TEXTS],
        "rolling": model.loglikelihood_rolling(
            instances("loglikelihood_rolling", [(text,) for text in TEXTS]), disable_tqdm=True
        ),
        "generated": model.generate_until(instances("generate_until", generation), disable_tqdm=True),
        "prompts": [model.tok_encode(prompt) for prompt, _ in PROMPTS],
        "choices": [[encoded(q["question"], choice) for choice in q["choices"]] for q in QUESTIONS],
        "accuracy": evaluated["results"]["questions"]["acc,none"],
    }


class Truth:
    """What transformers says of the checkpoint in float32."""

    def __init__(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)

    def likelihood(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Return the log-likelihood of a continuation, and whether it is the greedy one."""
        torch = self._torch
        tokens = (context + continuation)[-MAX_LENGTH:]
        with torch.inference_mode():
            logits = self._model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        rows = logits[len(tokens) - len(continuation) - 1 : len(tokens) - 1]
        wanted = torch.tensor(continuation)
        greedy = bool((rows.argmax(-1) == wanted).all())
        return float(rows.gather(1, wanted[:, None]).sum()), greedy

    def generated(self, prompt: list[int], stops: list[str], max_tokens: int) -> str:
        """Return the greedy text up to a stop string."""
        tokens, text = list(prompt), ""
        for _ in range(max_tokens):
            with self._torch.inference_mode():
                tokens.append(int(self._model(self._torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == self._tokenizer.eos_token_id:
                break
            text = self._tokenizer.decode(tokens[len(prompt) :])
            ends = [text.index(stop) for stop in stops if stop in text]
            if ends:
                return text[: min(ends)]
        return text


def differences(seen: dict[str, Any], truth: Truth) -> list[str]:
    """Return what the harness reports otherwise than transformers, in words."""
    found = []
    for pair, (context, continuation), (value, greedy) in zip(PAIRS, seen["pairs"], seen["likelihoods"], strict=True):
        expected = truth.likelihood(context, continuation)
        if abs(value - expected[0]) > TOLERANCE or greedy != expected[1]:
            found.append(f"log-likelihood of {pair!r:.60}: {(value, greedy)}, must be {expected}")
    for text, windows, value in zip(TEXTS, seen["windows"], seen["rolling"], strict=True):
        total = sum(truth.likelihood(*window)[0] for window in windows)
        if abs(value - total) > TOLERANCE * len(windows):
            found.append(f"rolling log-likelihood of {text!r:.40}: {value}, must be {total}")
    for (prompt, stops), tokens, text in zip(PROMPTS, seen["prompts"], seen["generated"], strict=True):
        expected_text = truth.generated(tokens, stops, 24)
        if text != expected_text:
            found.append(f"text after {prompt!r}: {text!r}, must be {expected_text!r}")
    right = 0
    for question, choices in zip(QUESTIONS, seen["choices"], strict=True):
        values = [truth.likelihood(*choice)[0] for choice in choices]
        right += values.index(max(values)) == question["answer"]
    if abs(seen["accuracy"] - right / len(QUESTIONS)) > 1e-9:
        found.append(f"accuracy {seen['accuracy']}, must be {right / len(QUESTIONS)}")
    return found


def main() -> int:
    """Compare both ways of asking, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environment", type=Path, default=Path.home() / ".cache" / "zif" / "lm-eval")
    parser.add_argument("--ask", nargs=2, metavar=("ADDRESS", "CONCURRENT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask:
        print(json.dumps(ask(options.ask[0], int(options.ask[1]))))
        return 0
    python = prepared(options.environment)
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    server, address = started()
    answers = []
    try:
        for num_concurrent in ("1", "4"):
            command = [str(python), __file__, "--ask", address, num_concurrent]
            done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
            answers.append(json.loads(done.stdout.splitlines()[-1]))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    truth = Truth()
    found = [fault for seen in answers for fault in differences(seen, truth)]
    print(*found, sep="\n", end="\n" if found else "")
    counts = f"{len(PAIRS)} log-likelihoods, {len(TEXTS)} rolling, {len(PROMPTS)} texts, {len(QUESTIONS)} questions"
    print(f"{counts}, asked twice: {'all as transformers says' if not found else f'{len(found)} differ'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
