"""Where a killed run goes on: the one place that knows how Lightning counts its progress.

A batch is a function of (seed, epoch, step), so going on exactly takes the right epoch and step, and nothing
of the data loader's state.
"""

from __future__ import annotations

from typing import Any


def settle_progress(fit_loop: dict[str, Any]) -> tuple[int, int]:
    """Reads epoch and step off a checkpoint's loop state, and mends the state after an epoch's last step.

    A checkpoint that is written when an epoch's last step is done, but before the epoch is closed, sends
    Lightning 2.6 into the next epoch without counting it, and that epoch is lost. Such a state is rewritten
    here to what it means: the epoch is over, nothing of the next has begun.

    A run that was stopped during a validation begins that validation anew before it trains.

    The other way round, a fit that ``max_steps`` ends within an epoch closes that epoch. Such a state is
    rewritten to say that the epoch goes on, so that a longer fit meets the rest of its rows.

    Within an epoch a state is rewritten to one in which a step has been taken and its validation, if one was due, has
    run: Lightning would count a step twice that was saved behind its validation.

    Args:
        fit_loop: ``checkpoint["loops"]["fit_loop"]``; changed in place.

    Returns:
        The epoch (from 0) and the number of its steps that have been taken.
    """
    epochs, batches = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    begun = epochs["current"]["ready"]
    evaluations = fit_loop["epoch_loop.val_loop.batch_progress"]["total"]
    validating = evaluations["ready"] > evaluations["processed"]  # Lightning starts with that, then trains
    if validating or not batches["is_last_batch"]:
        for counts in (epochs["total"], epochs["current"]):
            counts["processed"] = counts["completed"] = max(counts["ready"] - 1, 0)
        if not validating:
            # The step is over, its validation too; Lightning would count a step when it skips the validation.
            for key in ("total", "current"):
                batches[key]["completed"] = max(batches[key]["ready"] - 1, 0)
            fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = max(batches["total"]["ready"] - 1, 0)
        # Of an epoch whose last validation is still to come no step is read.
        return max(begun - 1, 0), 0 if batches["is_last_batch"] else batches["current"]["ready"]
    for key in ("total", "current"):
        epochs[key] = dict.fromkeys(epochs[key], epochs[key]["ready"])
    steps = batches["total"]["ready"]
    batches["total"] = dict.fromkeys(batches["total"], steps)
    batches["current"] = dict.fromkeys(batches["current"], 0)
    batches["is_last_batch"] = False
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = steps
    return begun, 0
