"""Every error that zif raises on purpose.

    ZifError
    ├── ConfigError                 a setting is wrong, unknown or not supported yet   (ValueError)
    ├── RequestError                one request is wrong; other requests go on        (ValueError)
    ├── ModelError                  the model folder cannot be served
    │   ├── CheckpointError         files missing, truncated, corrupt, wrong tensors
    │   └── UnknownArchitectureError
    ├── PlatformError
    │   ├── PlatformNotFoundError   no installed plugin has this name
    │   ├── PlatformUnavailableError  the plugin is there, its device is not
    │   ├── DeviceLostError         an open device, or this process's context on it, is gone
    │   ├── PlanRefusedError        the device cannot run this workload; every reason inside
    │   └── ContractError           a plugin breaks the plugin contract
    ├── OutOfMemoryError            an allocator's limit is reached; recoverable      (MemoryError)
    └── EngineError                 the engine can no longer serve

A message says what happened, the value, the limit, and the next step.
"""

from collections.abc import Sequence


class ZifError(Exception):
    """Root of all errors raised on purpose."""


class ConfigError(ZifError, ValueError):
    """A setting is wrong, unknown, or not supported yet."""


class RequestError(ZifError, ValueError):
    """One request cannot be served; the engine and other requests are unaffected."""


class ModelError(ZifError):
    """The model folder cannot be served."""


class CheckpointError(ModelError):
    """Files of the checkpoint are missing, truncated or corrupt, or tensors do not fit the configuration."""


class UnknownArchitectureError(ModelError):
    """Neither the native decoder nor the generic backend knows the architecture."""


class PlatformError(ZifError):
    """Root of the errors about platforms and their plugins."""


class PlatformNotFoundError(PlatformError):
    """No installed plugin provides the platform."""


class PlatformUnavailableError(PlatformError):
    """The plugin is installed, but its device cannot be used here."""


class DeviceLostError(PlatformError):
    """An open device, or this process's context on it, is gone; nothing that it held can be used any more."""


class PlanRefusedError(PlatformError):
    """The platform refused the workload; the message lists every reason."""


class ContractError(PlatformError):
    """A plugin does not keep the plugin contract."""


class OutOfMemoryError(ZifError, MemoryError):
    """An allocation exceeds the allocator's limit. Nothing was allocated; the allocator stays usable."""


class EngineError(ZifError):
    """The engine met an invariant fault and can no longer serve.

    `outputs` holds the answers of the interrupted call that were finished or under way, so that nothing is lost.
    """

    def __init__(self, message: str, outputs: Sequence[object] = ()) -> None:
        super().__init__(message)
        self.outputs = list(outputs)
