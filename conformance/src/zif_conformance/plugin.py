"""The pytest plugin: `pytest --zif-platform X --pyargs zif_conformance.suite`, and the fixtures of the suite.

Does nothing without `--zif-platform` or a supervisor. Loaded by pytest through its entry point, so it stays light: no
array library, no platform before a fixture asks for it. Which process runs which test is `zif_conformance.supervisor`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from zif.contract import Capabilities, Device, DeviceInfo
from zif.errors import ConfigError
from zif_conformance.claims import COMPUTING, Claims
from zif_conformance.marks import LEVELS, declaration_of
from zif_conformance.outcomes import TestCase
from zif_conformance.proof import GateRecorder, Proof, missing_claims
from zif_conformance.recording import Recorder
from zif_conformance.subject import Subject

if TYPE_CHECKING:
    from zif_conformance.profiles import Profile

_CASES = pytest.StashKey[dict[str, TestCase]]()
_RECORDER = pytest.StashKey[Recorder]()
_SUBJECTS = pytest.StashKey[dict[str, Subject]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the suite's options."""
    group = parser.getgroup("zif conformance")
    group.addoption("--zif-platform", metavar="NAME", help="platform under test, as `zif platforms` names it")
    group.addoption("--zif-profile", metavar="NAME", help="run the levels of this profile only")
    group.addoption("--zif-level", metavar="L0,L3", help="run these levels only")
    group.addoption(
        "--zif-bundle", metavar="DIR", type=Path, help="write a bundle (without a verdict: see zif conform)"
    )
    group.addoption("--zif-tests", metavar="FILE", type=Path, help="run the test ids in this file, one per line")
    group.addoption("--zif-events", metavar="FD", type=int, help="file descriptor for what happens, as JSON lines")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marks and, in a run of the suite, the recorder."""
    config.addinivalue_line("markers", "conforms(declaration): a test of the conformance suite")
    config.addinivalue_line("markers", "exercises(*claims): claims that one parameter of a test exercises")
    config.stash[_CASES] = {}
    config.stash[_SUBJECTS] = {}
    if _wanted(config):
        config.stash[_RECORDER] = Recorder(config.getoption("--zif-events"))
        config.pluginmanager.register(config.stash[_RECORDER], "zif-conformance-recorder")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give each test of a suite its id, and keep those that were asked for."""
    levels, asked = _levels(config), _asked_ids(config)
    of_profile = _profile(config).selection if config.getoption("--zif-profile") else None
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        case = _case(item)
        if case is None:
            kept.append(item)
            continue
        if case.test_id in config.stash[_CASES]:
            raise pytest.UsageError(f"two tests have the id {case.test_id!r}; rename one of them")
        config.stash[_CASES][case.test_id] = case
        wanted = case.declaration.level in levels and all(
            ids is None or case.test_id in ids for ids in (asked, of_profile)
        )
        (kept if wanted else dropped).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)
    if _wanted(config):
        config.stash[_RECORDER].collected(config.stash[_CASES].values())


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Pass over a test whose claims the platform does not make; a test of a suite needs a platform."""
    declaration = declaration_of(item)
    if declaration is None:
        return
    if not item.config.getoption("--zif-platform"):
        pytest.skip("no platform under test; name one with --zif-platform")
    needed = declaration.claims if declaration.level == "L0" else (COMPUTING, *declaration.claims)
    if needed:
        missing = missing_claims(Claims.of(_subject(item.config).device_info().capabilities), needed)
        if missing:
            Proof(item.user_properties).lack(missing)
        Proof(item.user_properties).prove(*declaration.claims)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the bundle when pytest itself was asked for one."""
    folder = session.config.getoption("--zif-bundle")
    if folder is None or not _wanted(session.config) or session.config.getoption("collectonly"):
        return
    from zif_conformance.direct import write_direct_bundle

    cases = session.config.stash[_CASES].values()
    write_direct_bundle(session.config.getoption("--zif-platform"), cases, session.config.stash[_RECORDER], folder)


@pytest.fixture(scope="session")
def subject(request: pytest.FixtureRequest) -> Subject:
    """The platform under test."""
    return _subject(request.config)


@pytest.fixture(scope="session")
def device_info(subject: Subject) -> DeviceInfo:
    """The first device that the platform's probe saw."""
    return subject.device_info()


@pytest.fixture(scope="session")
def capabilities(device_info: DeviceInfo) -> Capabilities:
    """What that device claims."""
    return device_info.capabilities


@pytest.fixture(scope="module")
def device(subject: Subject) -> Iterator[Device]:
    """A device opened for a small workload, closed after the file's last test."""
    with subject.opened() as opened:
        yield opened


@pytest.fixture
def claims(request: pytest.FixtureRequest, capabilities: Capabilities) -> "ClaimsInTest":
    """What the device claims, for tests that choose by it: `claims.require("block_size:8")`, `claims.has(...)`."""
    return ClaimsInTest(Claims.of(capabilities), Proof(request.node.user_properties))


@pytest.fixture
def record_gate(request: pytest.FixtureRequest) -> GateRecorder:
    """Record how near a result came to its gate: `record_gate("G3", error, limit, "head 3")`."""
    return GateRecorder(request.node.user_properties)


class ClaimsInTest:
    """The claims as a test asks for them; what it requires counts as exercised."""

    def __init__(self, claims: Claims, proof: Proof) -> None:
        self._claims = claims
        self._proof = proof
        self.has: Callable[..., bool] = claims.has

    def require(self, *names: Any) -> None:
        """Go on when all are claimed and count them as exercised; else the test ends as unsupported."""
        missing = missing_claims(self._claims, names)
        if missing:
            self._proof.lack(missing)
        self._proof.prove(*names)

    def prove(self, *names: Any) -> None:
        """Count claims as exercised by this test, when it passes."""
        self._proof.prove(*names)


def _wanted(config: pytest.Config) -> bool:
    return bool(config.getoption("--zif-platform") or config.getoption("--zif-events") is not None)


def _subject(config: pytest.Config) -> Subject:
    """Find the platform once per process; a failure is met again by each test that needs it."""
    name = config.getoption("--zif-platform")
    found = config.stash[_SUBJECTS]
    if name not in found:
        found[name] = Subject.find(name)
    return found[name]


def _case(item: pytest.Item) -> TestCase | None:
    declaration = declaration_of(item)
    if declaration is None:
        return None
    # test_l3_attention.py::test_window_border[float32] is L3.attention.window_border[float32]
    level, _, topic = item.path.stem.removeprefix("test_").partition("_")
    if level.upper() != declaration.level or not topic:
        raise pytest.UsageError(f"{item.nodeid} declares {declaration.level}, but stands in {item.path.name}")
    test_id = f"{declaration.level}.{topic}.{item.name.removeprefix('test_')}"
    return TestCase(test_id, item.nodeid, declaration, "device" in getattr(item, "fixturenames", ()))


def _levels(config: pytest.Config) -> tuple[str, ...]:
    from zif_conformance.profiles import parse_levels

    levels = _profile(config).levels if config.getoption("--zif-profile") else LEVELS
    given = config.getoption("--zif-level")
    try:
        return tuple(level for level in levels if level in parse_levels(given)) if given else levels
    except ConfigError as error:
        raise pytest.UsageError(str(error)) from error


def _profile(config: pytest.Config) -> "Profile":
    from zif_conformance.profiles import profile

    try:
        return profile(config.getoption("--zif-profile"))
    except ConfigError as error:
        raise pytest.UsageError(str(error)) from error


def _asked_ids(config: pytest.Config) -> frozenset[str] | None:
    path: Path | None = config.getoption("--zif-tests")
    return None if path is None else frozenset(path.read_text(encoding="utf-8").splitlines())
