"""What a test or a plugin does to its process ends that test, and the run goes on."""

import pytest

from zif.errors import ConfigError, ContractError

_GOOD = """
@conforms(level="L1", clause="5.1")
def test_{name}(subject):
    assert subject.name == "toy"
"""


def _words(outcomes):
    return {test_id: outcome.verdict.value for test_id, outcome in outcomes.items()}


@pytest.mark.parametrize(
    ("body", "word", "detail"),
    [
        pytest.param("assert subject.name == 'other'", "failed", "other", marks=pytest.mark.slow),
        ("raise RuntimeError('kernel fault')", "failed", "kernel fault"),
        pytest.param("sys.exit(7)", "failed", "7", marks=pytest.mark.slow),
        ("os._exit(7)", "crashed", "exit code 7"),
        pytest.param("os.kill(os.getpid(), signal.SIGSEGV)", "crashed", "SIGSEGV", marks=pytest.mark.slow),
        pytest.param("raise KeyboardInterrupt", "crashed", "exit code", marks=pytest.mark.slow),
        pytest.param("threading.Event().wait()", "crashed", "deadline", marks=pytest.mark.slow),
        ("pytest.skip('not today')", "failed", "skipped without a missing claim"),
    ],
)
def test_the_run_goes_on(lab, body, word, detail):
    lab.plugin()
    declared = '\n@conforms(level="L1", clause="5.1", deadline_s=1)\ndef test_bad(subject):\n    ' + body + "\n"
    lab.tests(_GOOD.format(name="before") + declared + _GOOD.format(name="after"))
    outcomes = lab.run()
    assert _words(outcomes) == {"L1.small.before": "passed", "L1.small.bad": word, "L1.small.after": "passed"}
    assert detail in outcomes["L1.small.bad"].detail


def test_a_hang_shows_its_stack(lab):
    lab.plugin()
    lab.tests(
        """
        def waits_for_nobody():
            threading.Event().wait()

        @conforms(level="L1", clause="5.2", deadline_s=1)
        def test_hang(subject):
            waits_for_nobody()
        """
    )
    assert "waits_for_nobody" in lab.run()["L1.small.hang"].detail


def test_a_teardown_that_fails_fails_its_test(lab):
    lab.plugin("def _close(self): raise OSError('still busy')\nNullDevice.close = _close")
    lab.tests('\n@conforms(level="L1", clause="5.1")\ndef test_open(device):\n    assert device.plan\n')
    outcome = lab.run()["L1.small.open"]
    assert outcome.verdict.value == "failed"
    assert "still busy" in outcome.detail


@pytest.mark.slow
def test_a_device_that_never_opens_is_tried_three_times(lab):
    lab.plugin("def _open(self, plan, rank):\n    import threading; threading.Event().wait()\nToyPlatform.open = _open")
    opening = "".join(
        f'\n@conforms(level="L1", clause="5.1", deadline_s=1)\ndef test_open_{i}(device):\n    assert device.plan\n'
        for i in range(5)
    )
    lab.tests(opening + _GOOD.format(name="without_device"))
    # Describing opens a device too, and is ended sooner than a patient user would have it.
    words = _words(lab.run(start_s=6.0))
    assert [words[f"L1.small.open_{i}"] for i in range(5)] == ["crashed"] * 3 + ["not run"] * 2
    assert words["L1.small.without_device"] == "passed"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("def _probe(self): raise OSError('driver too old')\nToyPlatform.probe = _probe", "driver too old"),
        pytest.param("ToyPlatform.probe = lambda self: 'two devices'", "two devices", marks=pytest.mark.slow),
        pytest.param(
            "ToyPlatform.probe = lambda self: Probe((), 'no card in slot 3')",
            "no card in slot 3",
            marks=pytest.mark.slow,
        ),
        ("def _probe(self):\n    import os; os._exit(9)\nToyPlatform.probe = _probe", "exit code 9"),
        pytest.param(
            "def zif_platform(): raise ImportError('libtoy.so.1')\nzif_platform = hookimpl(zif_platform)",
            "libtoy.so.1",
            marks=pytest.mark.slow,
        ),
        pytest.param("raise ImportError('libtoy.so.2')", "libtoy.so.2", marks=pytest.mark.slow),
    ],
)
def test_a_platform_that_cannot_be_described_runs_level_zero_only(lab, fault, reason):
    lab.plugin(fault)
    lab.tests('\n@conforms(level="L0", clause="1.1")\ndef test_alone():\n    assert True\n', "test_l0_small.py")
    lab.tests(_GOOD.format(name="needs_it"))
    outcomes = lab.run()
    assert _words(outcomes) == {"L0.small.alone": "passed", "L1.small.needs_it": "not run"}
    assert reason in outcomes["L1.small.needs_it"].detail


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("def _plan(self, workload): raise ValueError('bad shape')\nToyPlatform.plan = _plan", "bad shape"),
        pytest.param(
            "ToyPlatform.plan = lambda self, workload: None", "neither Plan nor Refusal", marks=pytest.mark.slow
        ),
        pytest.param(
            "ToyPlatform.plan = lambda self, workload: Refusal('toy', ('too small; use another',))",
            "too small",
            marks=pytest.mark.slow,
        ),
        ("def _open(self, plan, rank): raise OSError('card is gone')\nToyPlatform.open = _open", "card is gone"),
    ],
)
def test_a_hook_that_fails_fails_the_tests_that_call_it(lab, fault, reason):
    lab.plugin(fault)
    lab.tests(
        '\n@conforms(level="L1", clause="5.1")\ndef test_open(device):\n    assert device.plan\n'
        + _GOOD.format(name="other")
    )
    outcomes = lab.run()
    assert _words(outcomes) == {"L1.small.open": "failed", "L1.small.other": "passed"}
    assert reason in outcomes["L1.small.open"].detail


def test_what_is_not_claimed_is_unsupported_and_never_runs(lab):
    lab.plugin()
    lab.tests(
        """
        @conforms(level="L1", clause="3.4", claims=("graph_capture",))
        def test_declared(subject):
            raise AssertionError("ran without the claim")

        @conforms(level="L1", clause="3.4")
        @pytest.mark.parametrize("dtype", cases("dtype", "float32", "int4"))
        def test_parameter(subject, dtype):
            assert dtype == "float32"

        @conforms(level="L1", clause="3.4")
        def test_asked(claims):
            claims.require("block_size:16")
            claims.require("block_size:100000")
            raise AssertionError("went on without the claim")
        """
    )
    outcomes = lab.run()
    assert _words(outcomes) == {
        "L1.small.declared": "unsupported",
        "L1.small.parameter[float32]": "passed",
        "L1.small.parameter[int4]": "unsupported",
        "L1.small.asked": "unsupported",
    }
    assert outcomes["L1.small.asked"].missing == ("block_size:100000",)
    assert outcomes["L1.small.parameter[float32]"].proven == ("dtype:float32",)


def test_measurements_reach_the_outcome(lab):
    lab.plugin()
    lab.tests(
        """
        @conforms(level="L1", gate="G3", clause="9.1")
        def test_measured(record_gate):
            record_gate("G3", 0.5, 2.0, "row 7")
            record_gate("G3", float("nan"), 2.0)
        """
    )
    near, far = lab.run()["L1.small.measured"].measurements[::-1]
    assert (near.headroom, near.what) == (4.0, "row 7")
    assert 0 <= far.headroom < 1e-300


@pytest.mark.slow
def test_workers_and_isolated_tests_come_to_the_same(lab):
    lab.plugin()
    for name in ("one", "two", "three"):
        lab.tests(_GOOD.format(name=name) + _GOOD.format(name="b"), f"test_l1_{name}.py")
    lab.tests('\n@conforms(level="L1", clause="5.1", isolated=True)\ndef test_x():\n    os._exit(3)\n', "test_l1_x.py")
    words = _words(lab.run(workers=3))
    assert words.pop("L1.x.x") == "crashed"
    assert set(words.values()) == {"passed"}
    assert len(words) == 6


def test_an_unknown_platform_is_refused_with_the_nearest_name(lab):
    lab.plugin()
    lab.tests(_GOOD.format(name="any"))
    with pytest.raises(ConfigError, match="did you mean 'toy'"):
        lab.run(platform="toyy")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_module", "no_such_module"),
        ('\n@conforms(level="L2", clause="1.1")\ndef test_x():\n    assert True\n', "declares L2"),
        ('\n@conforms(level="L1", clause=())\ndef test_x():\n    assert True\n', "must name one"),
        ('\n@conforms(level="L1", clause="1.1", claims=("dtyp:float32",))\ndef test_x():\n    pass\n', "is none"),
    ],
)
def test_a_broken_suite_is_an_error_and_no_result(lab, source, reason):
    lab.plugin()
    lab.tests(source)
    with pytest.raises(ContractError, match=reason):
        lab.run()
