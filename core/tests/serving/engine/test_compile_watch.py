"""Vouching for steps that compile: seen from a thread, told while it lasts, and not for ever."""

import sys
import threading

import pytest

from zif.serving.engine.compile_watch import COMPILERS, CompileWatch, compiler_of
from zif.serving.engine.messages import Compiling


class End:
    """The engine's end of a channel: what was sent."""

    def __init__(self):
        self.sent = []
        self.told = threading.Event()

    def send(self, message):
        self.sent.append(message)
        self.told.set()
        return True


def inside(module, function):
    """Call a function from code of a module of that name."""
    eval("function()", {"__name__": module, "function": function})


@pytest.fixture
def watch():
    end = End()
    watch = CompileWatch(end, period_s=0.01)
    watch.start()
    yield watch, end
    watch.close()


def test_a_step_within_a_compiler_is_told(watch):
    watch, end = watch
    for _ in range(2):
        end.told.clear()
        with watch:
            inside("torch._inductor.graph", lambda: end.told.wait(20))
        assert end.told.is_set()
    assert set(end.sent) == {Compiling("torch._inductor")}
    num_sent = len(end.sent)
    inside("torch._inductor.graph", lambda: end.told.clear())
    assert len(end.sent) == num_sent


def test_a_step_that_hangs_elsewhere_is_not(watch):
    watch, end = watch
    with watch:
        inside("zif.null.runner", lambda: end.told.wait(0.2))
    assert end.sent == []


def test_nobody_vouches_for_longer_than_the_limit():
    end = End()
    watch = CompileWatch(end, period_s=0.01, limit_s=0.0)
    watch.start()
    with watch:
        inside("zif.structured.compiler", lambda: end.told.wait(0.2))
    watch.close()
    assert end.sent == []


def test_the_channel_is_not_touched_outside_the_block(watch):
    watch, end = watch
    inside("zif.structured.compiler", lambda: end.told.wait(0.2))
    assert end.sent == []


@pytest.mark.parametrize("module", [*COMPILERS, *(f"{compiler}.part" for compiler in COMPILERS)])
def test_compilers_are_known_by_the_names_of_their_modules(module):
    found = []
    inside(module, lambda: found.append(compiler_of(sys._getframe())))
    assert module.startswith(found[0])


def test_other_modules_are_no_compilers():
    assert compiler_of(sys._getframe()) is None
    found = []
    inside("torch._inductors", lambda: found.append(compiler_of(sys._getframe())))
    assert found == [None]


def test_the_compiler_of_forms_is_where_it_is_said_to_be():
    from zif.structured.compiler import GrammarCompiler

    assert GrammarCompiler.__module__ in COMPILERS
