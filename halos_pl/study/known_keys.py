"""The keys that a section of a study file may have."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from halos_pl.study.spec import StudyError


def refuse_unknown(
    given: Iterable[str], section: str, known: Collection[str], fault: Callable[..., StudyError]
) -> None:
    """Refuses a key that a section does not have.

    Args:
        given: the keys in the file.
        section: name of the section.
        known: the keys that it may have.
        fault: makes an error from a message and the key at fault.

    Raises:
        StudyError: names the line at fault.
    """
    for key in given:
        if key not in known:
            raise fault(f"unknown key {key!r} of {section}; it takes {', '.join(known)}", section, key)
