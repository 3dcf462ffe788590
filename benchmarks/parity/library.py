"""What the table knows of a library."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True)
class Library:
    """Another library.

    Attributes:
        title: its name.
        repository: owner and name on GitHub; empty if each row names another one.
        revision: commit, or tag of a release, that files and lines refer to; empty without a repository.
        package, version: distribution and version that is called; empty where the formula is written out instead.
    """

    title: str
    repository: str = ""
    revision: str = ""
    package: str = ""
    version: str = ""

    @property
    def called(self) -> bool:
        """Whether the library itself is called."""
        return bool(self.package)

    @property
    def missing(self) -> str:
        """Why the library cannot be called here, in one line; empty if it can."""
        if not self.called:
            return ""
        try:
            found = version(self.package)
        except PackageNotFoundError:
            return f"{self.package} {self.version} is not installed"
        return "" if found == self.version else f"{self.package} {found} is installed, not {self.version}"


def link(code: str, place: str) -> str:
    """Address of ``FILE:LINE`` or ``FILE:FIRST-LAST`` in the repository ``OWNER/NAME@REVISION``."""
    repository, _, revision = code.partition("@")
    file, _, lines = place.partition(":")
    first, _, last = lines.partition("-")
    return f"https://github.com/{repository}/blob/{revision}/{file}#L{first}" + (f"-L{last}" if last else "")
