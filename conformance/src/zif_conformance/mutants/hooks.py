"""Faults of parts that a plugin brings itself instead of core's (L4, L5): model runner, block manager, scheduler.

Each is core's own part with one thing wrong, handed out by a hook of the plugin.
"""

from zif_conformance.mutants.bank import Edit, Mutant

_HOOK = "@hookimpl\ndef zif_platform() -> Platform:"
_INDENT = "        "


def _hooked(level: str, name: str, broken: str, origin: str, source: str) -> Mutant:
    return Mutant(f"{name}", level, broken, origin, (Edit("plugin.py", _HOOK, f"{source}\n\n\n{_HOOK}"),), fresh=True)


def _runner(name: str, broken: str, origin: str, body: str, level: str = "L4") -> Mutant:
    """Return a runner whose class has `body`, methods at one level of indentation inside a function."""
    source = (
        "@hookimpl\ndef zif_model_runner(config, plan, device):\n"
        "    import dataclasses\n\n"
        "    from zif.contract import CompletedStep\n    from zif.runtime.runner import TorchRunner\n\n"
        f"    class Own(TorchRunner):\n{body}\n\n    return Own(config, device)"
    )
    return _hooked(level, f"runner-{name}", broken, origin, source)


def _result(change: str) -> str:
    """Return a `submit` that changes the `result` of a `step`."""
    lines = "".join(f"            {line}\n" for line in change.splitlines())
    return (
        "        def submit(self, step):\n            result = super().submit(step).result()\n"
        f"{lines}            return CompletedStep(result)"
    )


def _plan(change: str) -> str:
    """Return a `submit` that changes the `step` first."""
    lines = "".join(f"            {line}\n" for line in change.splitlines())
    return f"        def submit(self, step):\n{lines}            return super().submit(step)"


def _manager(name: str, broken: str, origin: str, body: str) -> Mutant:
    source = (
        "@hookimpl\ndef zif_block_manager(config, plan, arena):\n"
        "    import dataclasses\n\n    from zif.kv import PagedBlockManager\n\n"
        f"    class Own(PagedBlockManager):\n{body}\n\n"
        "    return Own(arena, enable_prefix_caching=config.enable_prefix_caching,\n"
        "               max_step_tokens=config.max_num_batched_tokens)"
    )
    return _hooked("L5", f"manager-{name}", broken, origin, source)


_RUNNERS = (
    _runner(
        "results-swapped",
        "Two requests of a step get each other's tokens.",
        "row order of packed batches",
        _result("result.sampled.reverse()"),
    ),
    _runner(
        "faults-not-reported",
        "A request whose result is not a number gets a token all the same.",
        "NaN that ends as token 0",
        _result("result.faults.clear()"),
    ),
    _runner(
        "fault-of-one-for-all",
        "A fault of one request is reported for all of the step.",
        "errors that end a whole batch",
        _result("if result.faults:\n    result.faults.update(dict.fromkeys(step.request_ids, 'a fault'))"),
    ),
    _runner(
        "samples-unasked",
        "A chunk that does not reach the end of its prompt samples a token.",
        "sampling of unfinished prompts",
        _result("for tokens in result.sampled:\n    tokens += [] if tokens else [0]"),
    ),
    _runner(
        "step-number-wrong",
        "The result names the step after its own.",
        "results matched to the wrong step when plans run ahead",
        _result("result.step += 1"),
    ),
    _runner(
        "logprobs-for-everybody-lost",
        "Log-probabilities of a step with several requests are left out.",
        "options that work for one request only",
        _result("if len(step.request_ids) > 0:\n    result.logprobs.clear()"),
    ),
    _runner(
        "prompt-logprobs-cut",
        "The last log-probability of each chunk of a prompt is left out.",
        "chunk borders of prompt log-probabilities",
        _result("for entries in result.prompt_logprobs.values():\n    del entries[-1:]"),
    ),
    _runner(
        "guess-accepted-unseen",
        "The last guess is accepted whatever the model says.",
        "speculative decoding that changes the answer",
        _result(
            "for index, request_id in enumerate(step.request_ids):\n"
            "    draft = step.drafts.get(request_id)\n"
            "    if draft is not None and len(result.sampled[index]) <= len(draft.token_ids):\n"
            "        result.sampled[index][-1] = draft.token_ids[len(result.sampled[index]) - 1]"
        ),
    ),
    _runner(
        "guesses-never-accepted",
        "Right guesses are thrown away, though their keys and values count as computed.",
        "speculative decoding that is on and does nothing",
        _result("for index in range(len(result.sampled) if step.drafts else 0):\n    del result.sampled[index][1:]"),
    ),
    _runner(
        "seed-ignored",
        "Every request draws with seed 0.",
        "options accepted and ignored",
        _plan("step.started[:] = [dataclasses.replace(start, seed=0) for start in step.started]"),
    ),
    _runner(
        "seed-counts-rows",
        "The seed is shifted by the number of requests in the step.",
        "random numbers that depend on the batch",
        _plan(
            "shift = len(step.request_ids)\n"
            "step.started[:] = [dataclasses.replace(start, seed=start.seed // 2 + shift) for start in step.started]"
        ),
    ),
    _runner(
        "empty-plan-fails",
        "A plan without requests is an error.",
        "engines that stop when all requests wait",
        _plan("if not step.request_ids:\n    raise RuntimeError('an empty grid')"),
    ),
    _runner(
        "memory-kept-at-close",
        "A closed runner keeps its memory.",
        "leaks that show at the second model",
        "        def close(self):\n            return None",
    ),
    _runner(
        "second-close-fails",
        "To close a runner twice is an error.",
        "cleaning up after a failed start",
        "        def close(self):\n            del self._config\n            super().close()",
    ),
    _runner(
        "tables-not-updated",
        "Blocks that a request gets later are not taken in.",
        "block tables updated after they were copied",
        _plan("step.block_updates.clear()"),
        level="L5",
    ),
)

_MANAGERS = (
    _manager(
        "leaks-at-preemption",
        "A request that loses its blocks loses one for good.",
        "a leaked block per preemption",
        "        def suspend(self, request):\n"
        "            kept = next((b for table in request.block_ids for b in table if b), None)\n"
        "            if kept is not None:\n                self._pools[0].share(kept)\n"
        "            super().suspend(request)",
    ),
    _manager(
        "hit-of-another-salt",
        "The salt of a request is ignored, so that prefixes of other tenants are found.",
        "prefix caches shared between tenants",
        "        def begin(self, request, source=None):\n"
        "            request.cache_key = dataclasses.replace(request.cache_key, salt='')\n"
        "            super().begin(request, source)",
    ),
)

MUTANTS = (*_RUNNERS, *_MANAGERS)
"""Every fault of a part that a plugin brings itself."""
