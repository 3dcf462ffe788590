"""``halos rounds``: online training in rounds of sampling, labelling and fitting."""

from __future__ import annotations

import sys
from pathlib import Path

from halos_pl.common.messages import plain
from halos_pl.common.stopping import Stopped


def rounds(study: str, *, out: str | None = None, keep_checkpoints: bool = False) -> None:
    """Train online: in each round, sample completions, label them, and fit. Resumes where an earlier call stopped.

    Every round's model answers the held-out prompts; report.md compares them with the first model, and with an offline
    run if the file asks for one. The code of rules is executed.

    Args:
        study: YAML file, or the name of a shipped one, such as online/kto.
        out: folder for all results; default: runs/NAME, after the file.
        keep_checkpoints: whether to keep the checkpoints of all rounds, not only of the last one.
    """
    # Imported here: they load torch and transformers, for which --help should not wait.
    from halos_pl.cli.ablate import Parsers
    from halos_pl.rounds.check import check
    from halos_pl.rounds.execute import execute
    from halos_pl.rounds.read import load_rounds
    from halos_pl.rounds.report import first_line, write_report
    from halos_pl.rounds.results import Results
    from halos_pl.rounds.spec import RoundsError
    from halos_pl.rounds.state import claim

    spec = load_rounds(study)
    folder = Path(out) if out else Path("runs") / spec.path.stem
    checked = check(spec, Parsers(), folder)
    claim(spec, folder, checked.settings)
    for note in checked.notes:
        print(plain(f"halos: {note}"))
    try:
        execute(spec, folder, checked, keep_checkpoints=keep_checkpoints)
    except (KeyboardInterrupt, Stopped):
        print("\nhalos: the stage was stopped; the same command resumes it", file=sys.stderr)
        raise
    except RoundsError:
        results = Results(spec, folder)
        if results.online:
            print(plain(f"halos: the report of the finished rounds is {write_report(results)}"))
        raise
    results = Results(spec, folder)
    path = write_report(results)
    print(plain(first_line(results)))
    print(plain(f"halos: the report is {path}; report.json and rounds.png are beside it"))
