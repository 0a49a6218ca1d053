"""Which packages are installed, and whether their versions fit, without importing them: what a probe may ask."""

import importlib.metadata
import importlib.util


def installed_version(package: str) -> str | None:
    """Return the version of an installed, importable package, or None.

    `package` is the name under which it is imported and installed, dashes of the distribution as underscores.
    """
    try:
        if importlib.util.find_spec(package) is None:
            return None
        return importlib.metadata.version(package)
    except (ValueError, ImportError, importlib.metadata.PackageNotFoundError):
        return None  # `sys.modules[package] = None`, or a folder of that name that is no installed package


def release(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: (2, 8) of "2.8.0+cpu". At most two, fewer when it has no more."""
    parts = version.split("+")[0].split(".")[:2]
    return tuple(int(part) for part in parts if part.isdecimal())


def torch_problem(version: str | None, needed: tuple[int, int]) -> str:
    """Say why this version of torch does not do, with the next step; "" when it does."""
    wanted = ".".join(map(str, needed))
    if version is None:
        return f"torch is not installed; install torch>={wanted}"
    if release(version) < needed:
        return f"torch {version} is too old; install torch>={wanted}"
    return ""
