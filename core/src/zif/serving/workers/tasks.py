"""What a worker can do, by name. Runs in the worker's process only."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from zif.errors import RequestError, ZifError
from zif.serving.workers.messages import GrammarCost, GrammarTask, RenderTask, TaskName, WorkerSetup, decoded
from zif.structured import GrammarCompiler, TokenVocabulary
from zif.text.chat import ChatOptions, ChatTemplates, render_chat
from zif.text.tokenizer import load_tokenizer

TaskFunction = Callable[[bytes], bytes]
"""From what a task takes, encoded, to the msgpack of its result. Raises RequestError for a request that is wrong."""


def load_tasks(setup: WorkerSetup) -> Mapping[TaskName, TaskFunction]:
    """Make the tasks, with all that they load once. Without a tokenizer that grammars can use, forms are refused."""
    try:
        check_grammar = _checker(_compiler(setup))
    except ZifError as error:
        check_grammar = _refuser(f"structured output is not served: {error}")
    return {TaskName.CHECK_GRAMMAR: check_grammar, TaskName.RENDER_TEMPLATE: _render}


def _compiler(setup: WorkerSetup) -> GrammarCompiler:
    if not setup.folder:
        raise RequestError("the workers were started without a tokenizer")
    definition = load_tokenizer(Path(setup.folder)).definition()
    if definition is None:
        raise RequestError("the model's tokenizer runs as code; grammars need one that is data")
    # Nothing is kept: the point is what compiling takes.
    compiler = GrammarCompiler(TokenVocabulary(lambda: definition, setup.vocab_size, frozenset(setup.eos_ids)), 0)
    compiler.load()
    return compiler


def _checker(compiler: GrammarCompiler) -> TaskFunction:
    def check_grammar(payload: bytes) -> bytes:
        task = decoded(payload, GrammarTask)
        began = time.process_time()
        compiler.check(task.form)
        return msgspec.msgpack.encode(GrammarCost(time.process_time() - began))

    return check_grammar


def _refuser(reason: str) -> TaskFunction:
    def check_grammar(payload: bytes) -> bytes:
        raise RequestError(reason)

    return check_grammar


def _render(payload: bytes) -> bytes:
    task = decoded(payload, RenderTask)
    options = ChatOptions(task.add_generation_prompt, task.continue_final_message, task.tools, task.variables)
    text = render_chat(ChatTemplates(task.sources, task.special_tokens), task.messages, options)
    return msgspec.msgpack.encode(text)
