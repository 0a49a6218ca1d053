"""KV events in an engine process: what the block pools wrote in a step goes to the publisher after it."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from zif.kv.journal import BlockJournal
from zif.serving.telemetry.kv_events import KVEventPublisher, KVEventSettings


class BlockNews:
    """A journal and its publisher. Raises `ConfigError` when the publisher cannot start."""

    def __init__(self, settings: KVEventSettings) -> None:
        self.journal = BlockJournal()
        self._publisher = KVEventPublisher(settings)
        self._publisher.start()

    def publish(self) -> None:
        """Publish what was written since the last call."""
        self._publisher.publish(self.journal.take())

    def close(self) -> None:
        """Close the publisher's sockets. Idempotent."""
        self._publisher.close()


def to_launch(settings: KVEventSettings | None) -> dict[str, Any] | None:
    """Return settings as JSON takes them."""
    if settings is None:
        return None
    folder = settings.key_folder
    return asdict(settings) | {"key_folder": None if folder is None else str(folder)}


def from_launch(values: dict[str, Any]) -> KVEventSettings:
    """Return the settings that `to_launch` wrote."""
    folder = values["key_folder"]
    return KVEventSettings(**values | {"key_folder": None if folder is None else Path(folder)})


def remove_sockets(settings: KVEventSettings | None) -> None:
    """Remove the publisher's Unix sockets after a process that had no time to."""
    if settings is None:
        return
    for address in (settings.endpoint, settings.replay_endpoint):
        if address is not None and address.startswith("ipc:///"):
            Path(address.removeprefix("ipc://")).unlink(missing_ok=True)
