"""Faults of what is claimed and planned (L0) that a process sees in itself: lies, silent refusals, wrong sums."""

from zif_conformance.mutants.bank import Edit, Mutant


def _fault(name: str, broken: str, origin: str, *changes: str, file: str = "platform.py") -> Mutant:
    edits = tuple(Edit(file, *pair) for pair in zip(changes[::2], changes[1::2], strict=True))
    # A claim is compared with what other processes see.
    return Mutant(f"plan-{name}", "L0", broken, origin, edits, fresh=name.startswith("claims-"))


_ANSWER = "return negotiate(workload, offer)"
_INFO = "capabilities=_CAPABILITIES,"
_IDENTITY = "device_id=_device_id(index),"
_AVAILABLE = "available_bytes=settings.memory_bytes,"
_LAST_FEATURE = "Feature.PREFIX_CACHING,"
_PROBED = 'return Probe(devices, steps=(f"{settings.num_devices} virtual devices by setting",))'


def _edited(source: str) -> str:
    """Return a `plan` whose answer goes through an expression of `answer`."""
    return f"import dataclasses\n\n        answer = negotiate(workload, offer)\n        return {source}"


def _replaced(changes: str) -> str:
    return _edited(f"dataclasses.replace(answer, {changes}) if isinstance(answer, Plan) else answer")


MUTANTS = (
    _fault(
        "claims-what-it-refuses",
        "A feature is claimed for which every plan is a refusal.",
        "a capability that lies",
        _ANSWER,
        "if Feature.ATTENTION_SINKS in workload.features:\n"
        "            return Refusal(self.name, (f'{Feature.ATTENTION_SINKS.value}: not here; choose another model',))\n"
        "        " + _ANSWER,
    ),
    _fault(
        "serves-what-it-does-not-claim",
        "A feature that is not claimed is planned as supported.",
        "a capability that lies",
        _ANSWER,
        "import dataclasses\n\n"
        "        more = dataclasses.replace(_CAPABILITIES, features=frozenset(Feature))\n"
        "        offer = dataclasses.replace(offer, device=dataclasses.replace(offer.device, capabilities=more))\n"
        "        " + _ANSWER,
    ),
    _fault(
        "feature-not-answered",
        "A feature asked for is dropped in silence.",
        "options accepted and ignored",
        _ANSWER,
        "import dataclasses\n\n        workload = dataclasses.replace(workload, features=frozenset())\n        "
        + _ANSWER,
    ),
    _fault(
        "refusal-without-reason",
        "A refusal has no reason.",
        "capability checks that return a bool",
        _ANSWER,
        _edited("answer if isinstance(answer, Plan) else Refusal(self.name, ())"),
    ),
    _fault(
        "refusal-without-next-step",
        "A refusal does not say what to do.",
        "error messages that help nobody",
        _ANSWER,
        _edited("answer if isinstance(answer, Plan) else Refusal(self.name, tuple('no' for _ in answer.reasons))"),
    ),
    _fault(
        "first-reason-only",
        "A refusal gives its first reason only.",
        "one error after the other",
        _ANSWER,
        _edited("answer if isinstance(answer, Plan) else Refusal(self.name, answer.reasons[:1])"),
    ),
    _fault(
        "refusal-of-another",
        "A refusal names another platform.",
        "copied code",
        _ANSWER,
        _edited("answer if isinstance(answer, Plan) else Refusal('other', answer.reasons)"),
    ),
    _fault(
        "plan-of-another",
        "A plan names another platform.",
        "copied code",
        _ANSWER,
        _replaced("platform='other'"),
    ),
    _fault(
        "device-not-probed",
        "A plan is for a device that the probe does not list.",
        "device indices after filtering",
        _ANSWER,
        _replaced("device_id='reference:99'"),
    ),
    _fault(
        "refuses-with-exception",
        "What cannot run is answered with an exception.",
        "capability checks that raise",
        _ANSWER,
        "answer = negotiate(workload, offer)\n        if isinstance(answer, Refusal):\n"
        "            raise ConfigError(answer.reasons[0])\n        return answer",
    ),
    _fault(
        "answers-none",
        "What cannot run is answered with None.",
        "capability checks that return nothing",
        _ANSWER,
        "answer = negotiate(workload, offer)\n        return answer if isinstance(answer, Plan) else None",
    ),
    _fault(
        "decision-without-detail",
        "A plan does not say how a feature is served.",
        "reports with blanks",
        _ANSWER,
        _replaced("decisions=tuple(dataclasses.replace(d, detail='') for d in answer.decisions)"),
    ),
    _fault(
        "decisions-cut",
        "A plan leaves out what the workload's kinds of state need.",
        "reports with blanks",
        _ANSWER,
        _replaced("decisions=answer.decisions[1:]"),
    ),
    _fault(
        "plan-counts",
        "Each plan has one block less than the one before.",
        "state kept between plans",
        _ANSWER,
        "import dataclasses\n\n        answer = negotiate(workload, offer)\n"
        "        self.__dict__['calls'] = self.__dict__.get('calls', 0) + 1\n"
        "        note = (f\"plan {self.__dict__['calls']}\",)\n"
        "        return dataclasses.replace(answer, notes=note) if isinstance(answer, Plan) else answer",
    ),
    _fault(
        "cache-too-small",
        "The KV cache is cut to a third.",
        "cache sizes computed twice in two ways",
        _ANSWER,
        _replaced("memory=dataclasses.replace(answer.memory, kv_bytes=answer.memory.kv_bytes // 1000)"),
    ),
    _fault(
        "cache-too-large",
        "The KV cache takes all memory, also that of the weights.",
        "cache sizes computed before the weights",
        _ANSWER,
        _replaced("memory=dataclasses.replace(answer.memory, kv_bytes=answer.memory.available_bytes)"),
    ),
    _fault(
        "limit-ignored",
        "The limit of memory is ignored.",
        "options accepted and ignored",
        _ANSWER,
        "import dataclasses\n\n        workload = dataclasses.replace(workload, memory_limit_bytes=None)\n        "
        + _ANSWER,
    ),
    _fault(
        "implementation-unknown",
        "A plan names code that does not exist.",
        "reports typed by hand",
        '("graphs", "zif.contract.EagerGraphs"),',
        '("graphs", "zif.contract.LazyGraphs"),',
    ),
    _fault(
        "implementation-twice",
        "A plan names two implementations of one service.",
        "registries where the last one wins",
        '("graphs", "zif.contract.EagerGraphs"),',
        '("graphs", "zif.contract.EagerGraphs"), ("ops", "core"),',
    ),
    _fault(
        "buckets-fall",
        "Buckets are listed in falling order.",
        "constraints that cannot be met",
        _ANSWER,
        _replaced("constraints=dataclasses.replace(answer.constraints, token_buckets=(512, 256, 1))"),
    ),
    _fault(
        "alignment-zero",
        "Chunks must end at multiples of 0.",
        "constraints that cannot be met",
        _ANSWER,
        _replaced("constraints=dataclasses.replace(answer.constraints, token_alignment=0)"),
    ),
    _fault(
        "dtype-fallback",
        "A dtype that is not claimed is planned as float32.",
        "silent fallbacks",
        _ANSWER,
        "import dataclasses\n\n        if _CAPABILITIES.numerics(workload.dtype) is None:\n"
        "            workload = dataclasses.replace(workload, dtype='float32')\n        " + _ANSWER,
    ),
    _fault(
        "head-size-fallback",
        "Head sizes that are not claimed are planned without a word.",
        "silent fallbacks",
        _ANSWER,
        "import dataclasses\n\n        workload = dataclasses.replace(workload, head_sizes=())\n        " + _ANSWER,
    ),
    _fault(
        "weights-not-counted",
        "Weights that do not fit are planned.",
        "memory checks left to the allocator",
        _ANSWER,
        "import dataclasses\n\n        workload = dataclasses.replace(workload, weight_bytes=0)\n        " + _ANSWER,
    ),
    _fault(
        "available-exceeds-memory",
        "More memory is free than there is.",
        "statistics of another device",
        _AVAILABLE,
        "available_bytes=2 * settings.memory_bytes,",
    ),
    _fault("available-zero", "No memory is free.", "statistics that had returned 0", _AVAILABLE, "available_bytes=0,"),
    _fault(
        "device-ids-equal",
        "All devices have one id.",
        "device indices after filtering",
        _IDENTITY,
        'device_id="reference:0",',
    ),
    _fault("device-without-name", "Devices have no name.", "reports with blanks", 'name="virtual device",', 'name="",'),
    _fault(
        "claims-change",
        "Claims differ from one probe to the next.",
        "capabilities that depend on what ran before",
        _INFO,
        "capabilities=__import__('dataclasses').replace(\n"
        "            _CAPABILITIES, max_head_size=512 + sum(1 for _ in range(id(object()) % 97))),",
    ),
    _fault(
        "claims-text",
        "Features are claimed as text that is no feature.",
        "names outside a closed vocabulary",
        _LAST_FEATURE,
        'Feature.PREFIX_CACHING, "attention.magic",',
    ),
    _fault(
        "claims-no-dtype",
        "No dtype is claimed.",
        "claims that make everything unsupported",
        "dtypes=tuple(Numerics",
        "dtypes=() and tuple(Numerics",
    ),
    _fault(
        "claims-dtype-twice",
        "A dtype is claimed twice.",
        "claims that contradict each other",
        '_DTYPES = ("float32", "bfloat16", "float16")',
        '_DTYPES = ("float32", "bfloat16", "float16", "float16")',
    ),
    _fault(
        "claims-no-blocks",
        "No block size is claimed.",
        "claims that make everything unsupported",
        "block_sizes=(8, 16, 32, 64, 128),",
        "block_sizes=(),",
    ),
    _fault(
        "claims-parallel-without-sum",
        "Tensor parallelism is claimed without all-reduce.",
        "a capability that lies",
        _LAST_FEATURE,
        "Feature.PREFIX_CACHING, Feature.TENSOR_PARALLEL,",
        "collectives=frozenset(Collective),",
        "collectives=frozenset(Collective) - {Collective.ALL_REDUCE},",
    ),
    _fault(
        "preference-is-text",
        "The preference is no number.",
        "orders by text",
        "preference = None",
        'preference = "low"',
    ),
    _fault(
        "probe-raises",
        "The probe raises on every second call.",
        "probes that raise for absent hardware",
        _PROBED,
        "self.__dict__['probes'] = self.__dict__.get('probes', 0) + 1\n"
        "        if self.__dict__['probes'] % 2 == 0:\n            raise OSError('no driver')\n        " + _PROBED,
    ),
    _fault(
        "probe-finds-fewer",
        "The first device is gone every second time.",
        "devices that come and go between probes",
        _PROBED,
        "self.__dict__['probes'] = self.__dict__.get('probes', 0) + 1\n"
        "        devices = devices[1:] if self.__dict__['probes'] % 2 == 0 else devices\n        " + _PROBED,
    ),
)
"""Every fault of claims and plans that is seen without a fresh process."""
