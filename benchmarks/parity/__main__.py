"""Computes the numbers of all rows, and writes them and the page.

    make parity

Rows of a library that is not installed keep their numbers. Liger-Kernel is no dependency of the tests:
``pip install --no-deps liger-kernel==0.8.5`` brings its part that needs no GPU.
"""

from __future__ import annotations

import sys

from parity.numbers import updated, write
from parity.page import FILE, page
from parity.table import libraries, table


def main() -> int:
    """Runs the command; returns the exit status."""
    try:
        rows = table()
        numbers = updated(rows)
    except ValueError as error:
        print(f"parity: {error}", file=sys.stderr)
        return 1
    for name, library in libraries().items():
        if library.missing:
            count = sum(row.library == name for row in rows)
            print(f"{library.title}: {library.missing}; its {count} rows keep their numbers")
    write(numbers)
    FILE.write_text(page(rows, numbers), encoding="utf-8")
    print(f"{FILE}: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
