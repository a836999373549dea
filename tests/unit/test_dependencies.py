"""What the project builds on: exact versions where it is tested, and none with a hole that is listed here."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]

# The first version in which an advisory is mended, the latest that was known in November 2026. A scanner that
# can ask a database knows more: `make sbom` writes what it reads.
MENDED = {
    "aiohttp": ("3.12.14", "CVE-2025-53643"),
    "cryptography": ("44.0.1", "CVE-2024-12797"),
    "deepspeed": ("0.15.1", "CVE-2024-43497"),
    "filelock": ("3.20.3", "CVE-2026-22701"),
    "h11": ("0.16.0", "CVE-2025-43859"),
    "idna": ("3.7", "CVE-2024-3651"),
    "jinja2": ("3.1.6", "CVE-2025-27516"),
    "mako": ("1.2.2", "CVE-2022-40023"),
    "pillow": ("12.3.0", "CVE-2026-55379"),
    "protobuf": ("6.31.1", "CVE-2025-4565"),
    "pyarrow": ("14.0.1", "CVE-2023-47248"),
    "pygments": ("2.15.0", "CVE-2022-40896"),
    "pyyaml": ("5.4", "CVE-2020-14343"),
    "ray": ("2.54.0", "CVE-2026-27482"),
    "requests": ("2.32.4", "CVE-2024-47081"),
    "starlette": ("1.3.1", "CVE-2026-54283"),
    "torch": ("2.10.0", "CVE-2026-24747"),
    "tqdm": ("4.66.3", "CVE-2024-34062"),
    "transformers": ("4.53.0", "CVE-2025-6921"),
    "urllib3": ("2.7.0", "CVE-2026-44431"),
    "virtualenv": ("20.26.6", "CVE-2024-53899"),
    "vllm": ("0.22.0", "CVE-2026-48746"),
}


def pinned() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, exact, version = line.partition("==")
            assert exact, f"{line} pins nothing"
            found[canonicalize_name(name)] = Version(version)
    return found


def asked_for() -> dict[str, list[Requirement]]:
    """What pyproject.toml asks for, by where."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"dependencies": project["dependencies"], **project["optional-dependencies"]}
    return {group: [Requirement(line) for line in lines] for group, lines in groups.items()}


# Extras that no environment of the tests has: what they ask for is pinned by whoever installs them.
UNPINNED = {"redis", "storage", "vllm"}


def test_everything_that_is_tested_is_pinned() -> None:
    known = pinned()
    missing = [
        requirement.name
        for group, requirements in asked_for().items()
        if group not in UNPINNED
        for requirement in requirements
        if canonicalize_name(requirement.name) not in known
    ]
    assert missing == []
    for requirements in asked_for().values():
        for requirement in requirements:
            version = known.get(canonicalize_name(requirement.name))
            assert version is None or version in requirement.specifier, f"{requirement} is not {version}"


@pytest.mark.parametrize(("name", "mended"), MENDED.items(), ids=MENDED)
def test_no_version_with_a_hole_of_the_list_is_pinned_or_let_in(name: str, mended: tuple[str, str]) -> None:
    version, advisory = mended
    if name in pinned():
        assert pinned()[name] >= Version(version), f"{advisory}: {name} {version} at least"
    for requirements in asked_for().values():
        for requirement in requirements:
            if canonicalize_name(requirement.name) == name:
                lowest = re.search(r"(?:>=|==)([\w.]+)", str(requirement.specifier))
                assert lowest, f"{advisory}: {requirement} has no lower bound"
                assert Version(lowest[1]) >= Version(version), (
                    f"{advisory}: pyproject.toml lets {requirement} in"
                )
