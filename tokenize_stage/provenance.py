"""Which versions of what made a token set."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("asvr", "torch", "transformers", "diffusers", "ray", "pillow", "simplejpeg", "pyarrow", "numpy")


def installed_versions() -> dict[str, str]:
    """The installed packages that have a part in the codes, read from their metadata without importing them."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
