"""zif: an LLM inference engine whose core knows no vendor.

The public names load on first use, so that `import zif` stays fast and needs no array library.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zif.contract.sampling import SamplingParams
    from zif.contract.structured import StructuredOutput
    from zif.engine.llm import LLM
    from zif.engine.outputs import CompletionOutput, Logprob, PooledOutput, RequestOutput

__version__ = "0.1.0"

_HOMES = {
    "LLM": "zif.engine.llm",
    "CompletionOutput": "zif.engine.outputs",
    "Logprob": "zif.engine.outputs",
    "PooledOutput": "zif.engine.outputs",
    "RequestOutput": "zif.engine.outputs",
    "SamplingParams": "zif.contract.sampling",
    "StructuredOutput": "zif.contract.structured",
}

__all__ = [
    "LLM",
    "CompletionOutput",
    "Logprob",
    "PooledOutput",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutput",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'zif' has no attribute {name!r}")
    from zif.engine.garbage import collection_paused

    with collection_paused():
        value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
