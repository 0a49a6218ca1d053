"""The neutral torch tier: model runner, batch building, sampler. It reaches a device only through the contract.

A vendor whose device runs whole compiled programs brings a runner of its own and makes it of the parts named here; the
modules behind them are core's affair.
"""

from zif.contract import DrawOptions, TokenLogprobs
from zif.models.model import LayerAttention, Model
from zif.models.weights import load_decoder
from zif.runtime.batch import StepBatch
from zif.runtime.book import PromptRows, RequestBook
from zif.runtime.drawing import WEIGHT_SCALE, fraction_of
from zif.runtime.logprobs import prompt_logprobs
from zif.runtime.randomness import FRACTION_BITS
from zif.runtime.sampler import OPTIONS_FAULT, SampledTokens, Sampler, raw_fault
from zif.runtime.tokens import SamplePositions
from zif.runtime.verification import without_guesses

__all__ = [
    "FRACTION_BITS",
    "OPTIONS_FAULT",
    "WEIGHT_SCALE",
    "DrawOptions",
    "LayerAttention",
    "Model",
    "PromptRows",
    "RequestBook",
    "SamplePositions",
    "SampledTokens",
    "Sampler",
    "StepBatch",
    "TokenLogprobs",
    "fraction_of",
    "load_decoder",
    "prompt_logprobs",
    "raw_fault",
    "without_guesses",
]
