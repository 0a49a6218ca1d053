"""Level L1 on plugins that are good but for one part: that part's tests fail or crash, and all others pass."""

import shutil

import pytest

from zif_conformance.supervisor import SUITE
from zif_conformance.template.writing import PluginNames, plugin_files

pytestmark = pytest.mark.slow

_FAULTS = {
    "raises": ("device.py", "TorchDevice.synchronize = lambda self: 1 / 0"),
    "dies": ("device.py", "TorchDevice.health = lambda self, deadline_s: __import__('os').abort()"),
    "wrong shape": (
        "memory.py",
        "_honest = TorchAllocator._allocate\n"
        "TorchAllocator._allocate = lambda self, *wanted: _honest(self, *wanted).view(1, -1)",
    ),
    "leaks": ("device.py", "TorchDevice.close = lambda self: None"),
    "wrong type": ("device.py", "TorchDevice.health = lambda self, deadline_s: 'fine'"),
}
_HIT = {
    "raises": ("failed", "synchronize_shows_what_was_written", "ZeroDivisionError"),
    "dies": ("crashed", "health_answers_within_its_deadline", "SIGABRT"),
    "wrong shape": ("failed", "memory_is_zero_filled_bytes[1]", "AssertionError"),
    "leaks": ("failed", "close_is_idempotent_and_gives_everything_back", "assert"),
    "wrong type": ("failed", "health_answers_within_its_deadline", "AssertionError"),
}


@pytest.mark.parametrize("fault", _FAULTS)
def test_only_the_tests_of_a_broken_part_fail(lab, fault):
    lab.plugin(name="acme")  # packaging; its code is replaced by that of a new plugin
    shutil.rmtree(lab.site / "zif_acme")
    file, broken = _FAULTS[fault]
    for path, text in plugin_files(PluginNames("acme")).items():
        name = path.rpartition("/")[2]
        if path.startswith("src/zif_acme/"):
            (lab.site / "zif_acme").mkdir(exist_ok=True)
            (lab.site / "zif_acme" / name).write_text(f"{text}\n{broken}\n" if name == file else text)
    shutil.copy(SUITE / "test_l1_device.py", lab.suite)
    outcomes = lab.run(platform="acme", setup_s=30.0)
    word, test, reason = _HIT[fault]
    hit = outcomes[f"L1.device.{test}"]
    assert hit.verdict.value == word
    assert reason in hit.detail
    words = [outcome.verdict.value for outcome in outcomes.values()]
    assert set(words) <= {"passed", "unsupported", word}
    assert words.count("passed") > words.count(word)
    assert outcomes["L1.device.plan_is_the_one_that_was_opened"].verdict.value == "passed"
