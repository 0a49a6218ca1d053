"""Faults of the package (L0) that fresh interpreters see: what importing, probing and planning bring or change."""

from zif_conformance.mutants.bank import Edit, Mutant


def _fault(name: str, broken: str, origin: str, *changes: str, file: str = "platform.py") -> Mutant:
    edits = tuple(Edit(file, *pair) for pair in zip(changes[::2], changes[1::2], strict=True))
    return Mutant(f"package-{name}", "L0", broken, origin, edits, fresh=True)


_IMPORTS = "import importlib.metadata\nimport importlib.util\n"
_PROBE = 'if importlib.util.find_spec("torch") is None:'
_HOOK = "@hookimpl\ndef zif_platform() -> Platform:"

MUTANTS = (
    _fault(
        "imports-torch",
        "Importing the plugin imports an array library.",
        "plugins whose import takes seconds and claims the device",
        _IMPORTS,
        _IMPORTS + "\nimport torch  # noqa: F401\n",
    ),
    _fault(
        "import-fails-without-torch",
        "Without an array library the plugin cannot be imported, so nobody learns why there is no device.",
        "plugins that vanish without a word",
        _IMPORTS,
        _IMPORTS + "\nassert importlib.util.find_spec('torch')\n",
    ),
    _fault(
        "import-reads-environment",
        "Importing the plugin reads the environment.",
        "settings frozen at import, before anybody can set them",
        _IMPORTS,
        "import os\n" + _IMPORTS + "\n_DEBUG = os.environ.get('ZIF_REFERENCE_DEBUG')\n",
    ),
    _fault(
        "import-sets-environment",
        "Importing the plugin sets a variable of the environment.",
        "plugins that are installed and off, and still change something",
        _IMPORTS,
        "import os\n" + _IMPORTS + "\nos.environ['OMP_NUM_THREADS'] = '3'\n",
    ),
    _fault(
        "import-patches-core",
        "Importing the plugin replaces a function of core.",
        "hundreds of patches that vendors carry",
        _IMPORTS,
        _IMPORTS + "\nimport zif.contract.negotiation\n\nzif.contract.negotiation.format_bytes = str\n",
    ),
    _fault(
        "imports-private-name",
        "The plugin imports a name of core that is not of the contract.",
        "vendors that copied and imported internals",
        _IMPORTS,
        _IMPORTS + "\nfrom zif.contract.negotiation import _decide  # noqa: F401\n",
    ),
    _fault(
        "import-starts-thread",
        "Importing the plugin starts a thread.",
        "background work before anybody asked for a device",
        _IMPORTS,
        _IMPORTS + "import threading\n\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n",
    ),
    _fault(
        "import-changes-locale-of-numbers",
        "Importing the plugin changes the limit of recursion.",
        "plugins that are installed and off, and still change something",
        _IMPORTS,
        _IMPORTS + "import sys\n\nsys.setrecursionlimit(5000)\n",
    ),
    _fault(
        "probe-imports-torch",
        "The probe imports an array library.",
        "processes that lose the device when they fork after the probe",
        _PROBE,
        "import torch  # noqa: F401\n\n        " + _PROBE,
    ),
    _fault(
        "probe-raises-without-torch",
        "The probe raises where an array library is absent.",
        "probes that raise for absent hardware",
        _PROBE,
        "importlib.metadata.version('torch')\n        if importlib.util.find_spec('torch') is None:\n"
        "            raise ModuleNotFoundError('torch')\n        " + _PROBE,
    ),
    _fault(
        "probe-without-reason",
        "The probe says that there is no device, and not why.",
        "error messages that help nobody",
        'return Probe((), "torch is not installed; install torch", ("torch: not installed",))',
        "return Probe(())",
    ),
    _fault(
        "plan-sets-environment",
        "Planning sets a variable of the environment.",
        "plugins that configure a process that is not theirs",
        "probe = self.probe()\n",
        "import os\n\n        os.environ['OMP_NUM_THREADS'] = '3'\n        probe = self.probe()\n",
    ),
    _fault(
        "unknown-hook",
        "The plugin implements a hook that does not exist.",
        "dead overrides: hooks that core deleted long ago",
        _HOOK,
        "@hookimpl\ndef zif_supports_v1() -> bool:\n    return True\n\n\n" + _HOOK,
        file="plugin.py",
    ),
    _fault(
        "no-platform",
        "The plugin brings no platform.",
        "plugins that vanish without a word",
        "return ReferencePlatform()",
        "return None",
        file="plugin.py",
    ),
    _fault(
        "wrong-name",
        "The platform's name has a capital letter and a space.",
        "names that differ between command line and code",
        'NAME = "reference"',
        'NAME = "Reference X"',
    ),
    _fault(
        "import-sets-warning-filters",
        "Importing the plugin silences warnings of the process.",
        "plugins that are installed and off, and still change something",
        _IMPORTS,
        _IMPORTS + "import warnings\n\nwarnings.simplefilter('ignore')\n",
    ),
)
"""Every fault of the package itself."""
