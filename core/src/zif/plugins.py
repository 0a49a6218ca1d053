"""Discovery of plugins: guarded, one by one, with every failure remembered.

Plugins register a module under the entry-point group `zif.v1`; the group carries the contract's version, so no code of
a plugin for another version is imported. A platform that the user named is never replaced by another one.
"""

import difflib
import importlib.metadata
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pluggy

from zif.contract import ENTRY_POINT_GROUP, PROJECT_NAME, Platform, Probe, hooks
from zif.errors import ContractError, PlatformNotFoundError, PlatformUnavailableError

_ONLY_SIMULATED = "its device is simulated on the host; name the platform to use it all the same"


@dataclass(frozen=True, slots=True)
class PluginFailure:
    """A plugin that could not be loaded. `name` is its entry point's, `trace` the traceback."""

    name: str
    distribution: str
    reason: str
    trace: str


@dataclass(frozen=True, slots=True)
class PluginEntry:
    """A loaded platform, the distribution that brought it, and the plugin with its hooks."""

    platform: Platform
    distribution: str
    plugin: object

    def probe(self) -> Probe:
        """Probe the platform; one that raises or returns something else is reported, not passed on."""
        try:
            probe = self.platform.probe()
        except (Exception, SystemExit) as error:
            return Probe(devices=(), reason=f"probe raised {error!r}; this is a fault of {self.distribution}")
        if not isinstance(probe, Probe):
            return Probe(devices=(), reason=f"probe returned {probe!r}; this is a fault of {self.distribution}")
        return probe


class PlatformRegistry:
    """The platforms that loaded, the plugins that did not, and pluggy's manager with all hooks."""

    def __init__(
        self, manager: pluggy.PluginManager, platforms: Mapping[str, PluginEntry], failures: tuple[PluginFailure, ...]
    ) -> None:
        self.manager = manager
        self.platforms = platforms
        self.failures = failures

    @classmethod
    def discover(cls) -> "PlatformRegistry":
        """Load every installed plugin of this contract version."""
        return cls.load(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP))

    @classmethod
    def load(cls, entry_points: Iterable[importlib.metadata.EntryPoint]) -> "PlatformRegistry":
        """Load the given entry points under guard; what fails is remembered and the others go on."""
        loader = _Loader()
        for entry_point in sorted(entry_points, key=lambda e: (e.name, _distribution(e))):
            loader.load(entry_point)
        return cls(loader.manager, *loader.settle())

    def select(self, name: str | None) -> Platform:
        """Return the platform of this name, or the preferred one that has a device.

        Raises `PlatformNotFoundError`, `PlatformUnavailableError` or `ContractError` (it failed to load).
        """
        return self._preferred() if name is None else self._named(name)

    def ask(self, platform: str, hook: str, **arguments: object) -> Any:
        """Call a first-result hook for a plan of `platform`; None when nobody answers.

        Only the platform's own plugin is asked, and plugins that bring no platform: one that was not chosen has no say.
        """
        others = [entry.plugin for name, entry in self.platforms.items() if name != platform]
        chosen = self.platforms[platform].plugin if platform in self.platforms else None
        return self.manager.subset_hook_caller(hook, [plugin for plugin in others if plugin is not chosen])(**arguments)

    def _named(self, name: str) -> Platform:
        if name not in self.platforms:
            raise self._not_found(name)
        entry = self.platforms[name]
        probe = entry.probe()
        if not probe.devices:
            tried = "".join(f"\n  tried: {step}" for step in probe.steps)
            raise PlatformUnavailableError(f"platform {name!r} has no device here: {probe.reason}{tried}")
        return entry.platform

    def _preferred(self) -> Platform:
        choices = [e for e in self.platforms.values() if e.platform.preference is not None]
        choices.sort(key=lambda e: (-(e.platform.preference or 0), e.platform.name))
        usable = [e.platform for e in choices if any(not device.simulated for device in e.probe().devices)]
        if not usable:
            reasons = [f"\n  {e.platform.name}: {e.probe().reason or _ONLY_SIMULATED}" for e in choices]
            reasons += [f"\n  {failure.name}: failed to load: {failure.reason}" for failure in self.failures]
            raise PlatformUnavailableError(
                "no installed platform has a device here; install one, for example: pip install 'zif[cpu]'"
                + "".join(reasons)
            )
        tied = [p.name for p in usable if p.preference == usable[0].preference]
        if len(tied) > 1:
            raise PlatformUnavailableError(
                f"platforms {', '.join(tied)} are equally preferred; name one with platform="
            )
        return usable[0]

    def _not_found(self, name: str) -> Exception:
        failure = next((f for f in self.failures if f.name == name), None)
        if failure:
            return ContractError(
                f"platform {name!r} of {failure.distribution} failed to load: {failure.reason}; "
                "see the traceback with: zif platforms --verbose"
            )
        near = difflib.get_close_matches(name, self.platforms, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return PlatformNotFoundError(
            f"no installed plugin provides platform {name!r}; {hint}"
            f"installed: {', '.join(self.platforms) or 'none'}; to add it: {_install_command(name)}"
        )


class _Loader:
    """Collects what loads and what does not."""

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager(PROJECT_NAME)
        self.manager.add_hookspecs(hooks)
        self._claims: dict[str, list[PluginEntry]] = {}
        self._failures: list[PluginFailure] = []

    def load(self, entry_point: importlib.metadata.EntryPoint) -> None:
        try:
            plugin = entry_point.load()
            if self.manager.is_registered(plugin):
                raise ContractError("an earlier entry point brought the same plugin; register it once")
            self._register(plugin, entry_point)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a plugin that calls sys.exit at import must not end the process either
            self._fail(entry_point, f"{type(error).__name__}: {error}", traceback.format_exc())

    def _register(self, plugin: object, entry_point: importlib.metadata.EntryPoint) -> None:
        try:
            self.manager.register(plugin, name=f"{_distribution(entry_point)}:{entry_point.name}")
            self.manager.check_pending()
            self._claim(plugin, entry_point)
        except BaseException:
            if self.manager.is_registered(plugin):
                self.manager.unregister(plugin)
            raise

    def settle(self) -> tuple[dict[str, PluginEntry], tuple[PluginFailure, ...]]:
        """Set aside the plugins that claim one name, with all their hooks; return what remains."""
        platforms = {}
        for name, entries in self._claims.items():
            if len(entries) == 1:
                platforms[name] = entries[0]
                continue
            for plugin in filter(self.manager.is_registered, [entry.plugin for entry in entries]):
                self.manager.unregister(plugin)
            claimants = " and ".join(sorted(entry.distribution for entry in entries))
            reason = f"{claimants} both claim the platform name {name!r}; uninstall one of them"
            self._failures.append(PluginFailure(name, claimants, reason, trace=""))
        return dict(sorted(platforms.items())), tuple(self._failures)

    def _claim(self, plugin: object, entry_point: importlib.metadata.EntryPoint) -> None:
        for implementation in self.manager.hook.zif_platform.get_hookimpls():
            if implementation.plugin is plugin:
                platform = implementation.function()
                if not isinstance(platform, Platform):
                    raise ContractError(f"zif_platform returned {platform!r}, which is no zif.contract.Platform")
                entry = PluginEntry(platform, _distribution(entry_point), plugin)
                self._claims.setdefault(platform.name, []).append(entry)

    def _fail(self, entry_point: importlib.metadata.EntryPoint, reason: str, trace: str) -> None:
        self._failures.append(PluginFailure(entry_point.name, _distribution(entry_point), reason, trace))


def _distribution(entry_point: importlib.metadata.EntryPoint) -> str:
    dist = entry_point.dist
    return f"{dist.name} {dist.version}" if dist else "unknown distribution"


def _install_command(name: str) -> str:
    extras = importlib.metadata.metadata("zif").get_all("Provides-Extra") or []
    return f"pip install 'zif[{name}]'" if name in extras else f"pip install zif-{name}"
