"""The vendor-facing contract, version 1: every public name in one place.

A plugin imports from here. `docs/contract.md` states the clauses; `surface.lock` beside this file freezes the surface.
Standard library and pluggy only; nothing here touches a device.
"""

from zif.contract.arrays import Array, HostArray
from zif.contract.attention import AttentionBackend, AttentionBatch, AttentionParams
from zif.contract.capabilities import Capabilities, Collective, Feature, Numerics
from zif.contract.code import CompiledKernel
from zif.contract.collectives import Communicator, CommunicatorError, CommunicatorGroup
from zif.contract.config import EngineConfig
from zif.contract.device import Device, Health
from zif.contract.graphs import EagerGraphs, GraphRunner
from zif.contract.hidden import HiddenRows
from zif.contract.hooks import CONTRACT_VERSION, ENTRY_POINT_GROUP, PROJECT_NAME, hookimpl
from zif.contract.kinds import (
    AttentionSpec,
    ChunkedLocalSpec,
    CrossAttentionSpec,
    FullAttentionSpec,
    LatentAttentionSpec,
    RecurrentStateSpec,
    SlidingWindowSpec,
    StateTensor,
    WholeHistorySpec,
)
from zif.contract.kv import NEVER, BlockTest, KVArena, KVGroup, KVLayout, KVSpec
from zif.contract.memory import Allocator, Buffer, MemoryStats
from zif.contract.model import ModelDescription
from zif.contract.negotiation import KVSizing, Offer, format_bytes, negotiate, slab_arena
from zif.contract.ops import (
    Activation,
    ChosenTokens,
    DrawOptions,
    ExpertWeights,
    NormOutput,
    OpTable,
    RotatedHeads,
    RouterOutput,
    Routing,
)
from zif.contract.plan import Decision, MemoryPlan, Outcome, Plan, Refusal, SchedulerConstraints, Workload
from zif.contract.platform import DeviceInfo, Platform, Probe
from zif.contract.quantization import QuantizedExperts, QuantizedWeight, WeightScheme
from zif.contract.request import (
    DEFAULT_RETENTION_PRIORITY,
    CacheKey,
    FinishReason,
    PrefixMiss,
    PrefixReport,
    Request,
    RequestStatus,
    Retention,
)
from zif.contract.runner import ModelRunner, Progress
from zif.contract.sampling import GREEDY_TEMPERATURE, MAX_LOGPROBS, MAX_SAMPLES, SamplingParams
from zif.contract.scheduling import BlockManager, KVUsage, Scheduler, TokenUpdate
from zif.contract.step import (
    NO_TOKEN_LEFT,
    BlockUpdate,
    CompletedStep,
    Draft,
    RequestStart,
    StepFuture,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from zif.contract.structured import Grammars, GrammarState, StructuredKind, StructuredOutput
from zif.contract.transfers import (
    BlockBytes,
    BlockLoad,
    BlockMemory,
    BlockSave,
    KeptBlock,
    KVStore,
    RemoteTier,
    Transfers,
    carry_out,
)

__all__ = [
    "CONTRACT_VERSION",
    "DEFAULT_RETENTION_PRIORITY",
    "ENTRY_POINT_GROUP",
    "GREEDY_TEMPERATURE",
    "MAX_LOGPROBS",
    "MAX_SAMPLES",
    "NEVER",
    "NO_TOKEN_LEFT",
    "PROJECT_NAME",
    "Activation",
    "Allocator",
    "Array",
    "AttentionBackend",
    "AttentionBatch",
    "AttentionParams",
    "AttentionSpec",
    "BlockBytes",
    "BlockLoad",
    "BlockManager",
    "BlockMemory",
    "BlockSave",
    "BlockTest",
    "BlockUpdate",
    "Buffer",
    "CacheKey",
    "Capabilities",
    "ChosenTokens",
    "ChunkedLocalSpec",
    "Collective",
    "Communicator",
    "CommunicatorError",
    "CommunicatorGroup",
    "CompiledKernel",
    "CompletedStep",
    "CrossAttentionSpec",
    "Decision",
    "Device",
    "DeviceInfo",
    "Draft",
    "DrawOptions",
    "EagerGraphs",
    "EngineConfig",
    "ExpertWeights",
    "Feature",
    "FinishReason",
    "FullAttentionSpec",
    "GrammarState",
    "Grammars",
    "GraphRunner",
    "Health",
    "HiddenRows",
    "HostArray",
    "KVArena",
    "KVGroup",
    "KVLayout",
    "KVSizing",
    "KVSpec",
    "KVStore",
    "KVUsage",
    "KeptBlock",
    "LatentAttentionSpec",
    "MemoryPlan",
    "MemoryStats",
    "ModelDescription",
    "ModelRunner",
    "NormOutput",
    "Numerics",
    "Offer",
    "OpTable",
    "Outcome",
    "Plan",
    "Platform",
    "PrefixMiss",
    "PrefixReport",
    "Probe",
    "Progress",
    "QuantizedExperts",
    "QuantizedWeight",
    "RecurrentStateSpec",
    "Refusal",
    "RemoteTier",
    "Request",
    "RequestStart",
    "RequestStatus",
    "Retention",
    "RotatedHeads",
    "RouterOutput",
    "Routing",
    "SamplingParams",
    "Scheduler",
    "SchedulerConstraints",
    "SlidingWindowSpec",
    "StateTensor",
    "StepFuture",
    "StepPlan",
    "StepResult",
    "StructuredKind",
    "StructuredOutput",
    "TokenLogprobs",
    "TokenUpdate",
    "Transfers",
    "WeightScheme",
    "WholeHistorySpec",
    "Workload",
    "carry_out",
    "format_bytes",
    "hookimpl",
    "negotiate",
    "slab_arena",
]
