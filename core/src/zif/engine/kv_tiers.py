"""The tiers of KV below the device, from an engine's configuration: the store, and what the block manager knows of it.

Called by `start_engine`. Which block goes where is decided in `zif.kv.tiers`.
"""

import hashlib
import json
from pathlib import Path

from zif.contract import ModelRunner, RemoteTier
from zif.engine.planning import PlannedModel
from zif.errors import EngineError
from zif.kv.stores import DiskStore, EntryFormat, HostStore, RemoteStore, TieredStore
from zif.kv.tiers import TierSetup

_VERSION = "zif.kv.model.1"


def kv_fingerprint(planned: PlannedModel) -> bytes:
    """Return 32 bytes that differ when the same tokens could have other KV bytes.

    Hashes the configuration, names, sizes and modification times of weight and code files, dtype, implementation,
    quantization, platform and KV layouts. The weights are not read: a model that is copied finds nothing of what the
    old one left.
    """
    model = planned.model
    files = [file for pattern in ("*.safetensors", "*.py") for file in sorted(model.path.glob(pattern))]
    described = {
        "version": _VERSION,
        "config": model.config,
        "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "dtype": model.dtype,
        "implementation": model.implementation,
        "quantization": model.quantization,
        "platform": planned.plan.platform,
        "groups": [repr(group) for group in planned.arena.groups],
    }
    return hashlib.blake2b(json.dumps(described, sort_keys=True, default=repr).encode(), digest_size=32).digest()


class KVTiers:
    """The tiers of one engine; `store` is None when there are none."""

    def __init__(self, planned: PlannedModel, remote: RemoteTier | None) -> None:
        config, groups = planned.config, planned.arena.groups
        self.store: TieredStore | None = None
        self.setup = TierSetup()
        if not (config.host_kv_bytes or config.disk_kv_bytes or remote):
            return
        fingerprint = kv_fingerprint(planned)
        formats = [EntryFormat(fingerprint, index, group.layout) for index, group in enumerate(groups)]
        host = HostStore(config.host_kv_bytes) if config.host_kv_bytes else None
        disk = None
        if config.disk_kv_path is not None:
            disk = DiskStore(Path(config.disk_kv_path), config.disk_kv_bytes, formats)
        shared = RemoteStore(remote, formats) if remote is not None else None
        self.store = TieredStore(host, disk, shared)
        self.setup = TierSetup(
            host_bytes=config.host_kv_bytes,
            disk_bytes=config.disk_kv_bytes,
            disk_entry_bytes=tuple(form.num_bytes for form in formats),
            kept=tuple(self.store.kept()),
            remote=shared,
            host_bytes_per_s=config.host_kv_bytes_per_s,
            prefill_tokens_per_s=config.prefill_tokens_per_s,
        )

    def attach(self, runner: ModelRunner) -> None:
        """Give a started runner the store. Raises `EngineError` when it serves no copies."""
        if self.store is not None and not runner.attach_store(self.store):
            raise EngineError(
                f"{type(runner).__name__} copies no KV blocks, so there can be no tier below the device; "
                "leave out host_kv_bytes and disk_kv_bytes, or use another platform"
            )
