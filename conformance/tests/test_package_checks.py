"""The detectors of level L0 see what they are there for: one planted fault each, and no alarm without one."""

import pytest

from zif_conformance.package.fresh import run_fresh
from zif_conformance.package.source import PackageSource

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _on_path(lab, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(lab.site))
    monkeypatch.syspath_prepend(str(lab.site))


_OPEN = "\ndef _open(self, plan, rank):\n    {body}\n    return NullDevice(plan)\nToyPlatform.open = _open\n"
_PROBE = """
_before = ToyPlatform.probe
def _probe(self):
    {body}
    return _before(self)
ToyPlatform.probe = _probe
"""


@pytest.mark.parametrize(
    ("fault", "check", "option", "found"),
    [
        ("import torch", "imported_array_libraries", "import", "torch"),
        ("import numpy", "imported_array_libraries", "import", "numpy"),
        (_PROBE.format(body="import torch"), "imported_array_libraries", "probe", "torch"),
        ("import os; os.environ['TOY'] = '1'", "changed_process_state", "import", "environment"),
        ("import sys; sys.path.append('/toy')", "changed_process_state", "import", "path"),
        ("import warnings; warnings.simplefilter('ignore')", "changed_process_state", "import", "warning filters"),
        ("import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)", "changed_process_state", "import", "signal"),
        ("import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()",
         "changed_process_state", "import", "threads"),
        ("import os; os.chdir('/')", "changed_process_state", "import", "working folder"),
        (_PROBE.format(body="import os; os.environ['TOY'] = '1'"), "changed_process_state", "probe", "environment"),
        ("import os; os.environ.get('TOY_SETTING')", "environment_reads_at_import", "", "TOY_SETTING"),
        ("import os; os.getenv('TOY_SETTING')", "environment_reads_at_import", "", "TOY_SETTING"),
        ("_dev = open('/dev/zero', 'rb')", "opened_device_files", "", "/dev/zero"),
        ("import zif.contract as c; c.negotiate = lambda *a: None", "rebound_names", "import", "negotiate was"),
        ("import zif.plugins as p; p.PlatformRegistry.toy = lambda s: 1", "rebound_names", "import", "toy was added"),
        (_OPEN.format(body="import torch; torch.add = max"), "rebound_names", "use", "torch.add was rebound"),
        (_OPEN.format(body="import torch; torch.Tensor.toy = lambda s: None"), "rebound_names", "use", "toy was added"),
        (_OPEN.format(body="import builtins; builtins.sum = max"), "rebound_names", "use", "sum was rebound"),
    ],
)  # fmt: skip
def test_a_fault_is_found(lab, fault, check, option, found):
    lab.plugin(fault)
    answer = run_fresh(check, "toy", option)
    assert any(found in line for line in answer), answer


def test_a_hook_of_an_unchosen_platform_is_not_asked(lab):
    lab.plugin("zif_scheduler = hookimpl(lambda config: 'mine')")
    assert run_fresh("answers_of_unchosen", "toy") == []


@pytest.mark.parametrize(
    ("check", "option"),
    [
        ("imported_array_libraries", "probe"),
        ("changed_process_state", "plan"),
        ("opened_device_files", ""),
        ("rebound_names", "use"),
        ("environment_reads_at_import", ""),
        ("answers_of_unchosen", ""),
    ],
)
def test_a_clean_plugin_raises_no_alarm(lab, check, option):
    lab.plugin()
    assert run_fresh(check, "toy", option) == []


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("import os; os._exit(4)", "code 4"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "code -11"),
        ("raise ImportError('libtoy.so')", "libtoy.so"),
    ],
)
def test_a_process_that_dies_is_a_failed_test(lab, fault, reason):
    lab.plugin(fault)
    with pytest.raises(AssertionError, match=reason):
        run_fresh("imported_array_libraries", "toy", "import")


@pytest.mark.parametrize(
    ("source", "method"),
    [
        ("import zif.engine", "foreign_core_imports"),
        ("from zif.runtime import runner", "foreign_core_imports"),
        ("from zif import LLM", "foreign_core_imports"),
        ("from zif.contract.negotiation import _decide", "foreign_core_imports"),
        ("import importlib\nimportlib.import_module('zif.kv.pool')", "foreign_core_imports"),
        ("import torch\ntorch.add = None", "rebound_attributes"),
        ("import torch.nn.functional as F\nF.linear = None", "rebound_attributes"),
        ("import torch\nsetattr(torch.Tensor, 'x', 1)", "rebound_attributes"),
        ("from torch import Tensor\ndel Tensor.add", "rebound_attributes"),
        ("from zif.contract import Plan\nPlan.platform = 'mine'", "rebound_attributes"),
        ("import os\nos.environ['X']", "environment_modules"),
        ("import os\nos.getenv('X')", "environment_modules"),
        ("from os import environ", "environment_modules"),
    ],
)
def test_source_faults_are_found(lab, source, method):
    lab.plugin(name="odd", files={"fault.py": source, "fine.py": "from zif.errors import ZifError\nimport torch\n"})
    found = getattr(PackageSource("zif_odd"), method)()
    files = {str(finding).partition(":")[0] for finding in found}
    assert "fault.py" in files
    assert "fine.py" not in files
