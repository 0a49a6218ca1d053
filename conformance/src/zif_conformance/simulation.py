"""Where a platform has no device, and can simulate one: the run goes on with that, and every report says so.

The processes of the run inherit the environment variables that the platform's probe names for it.
"""

import os
import sys

from zif.plugins import PlatformRegistry


def simulate_missing_hardware(name: str) -> None:
    """Set the variables with which the platform simulates a device, if it has none. Mutates the environment.

    An unknown platform, or one that fails to load, is left to the run, which says why.
    """
    entry = PlatformRegistry.discover().platforms.get(name)
    probe = entry.probe() if entry else None
    if probe is None or probe.devices or not probe.simulation:
        return
    os.environ.update(probe.simulation)
    variables = " ".join(f"{key}={value}" for key, value in probe.simulation)
    print(f"no device of {name!r} here ({probe.reason}); simulating one: {variables}", file=sys.stderr, flush=True)
