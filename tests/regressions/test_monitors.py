"""A callback that monitors what is never logged is refused before training (Lightning#11534)."""

from __future__ import annotations

import pytest
from run_halos import binary_data, fit, metrics, pair_data, refused, run

from halos_pl.cli.main import main


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("monitors")
    return {"binary": binary_data(folder / "binary.jsonl"), "pairs": pair_data(folder / "pairs.jsonl")}


def monitoring(callback: str, monitor: str, *more: str) -> list[str]:
    return [f"--trainer.callbacks+={callback}", f"--trainer.callbacks.monitor={monitor}", *more]


def slow(*case: object) -> object:
    """A case whose fault a quicker one shows as well."""
    return pytest.param(*case, marks=pytest.mark.slow)


VALIDATES = "--data.validation={pairs}"
STEPS = "--trainer.max_steps=2"


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("callback", "monitor", "options", "named"),
    [
        ("EarlyStopping", "val_loss", [VALIDATES], "val/loss"),
        slow("ModelCheckpoint", "val/los", [VALIDATES], "val/loss"),
        ("EarlyStopping", "val/loss", [], "data.validation"),
        ("EarlyStopping", "val/loss", [VALIDATES, "--trainer.limit_val_batches=0"], "limit_val_batches"),
        ("ModelCheckpoint", "val/loss", [VALIDATES, STEPS], "step 3"),  # of which an epoch has 3
        (
            "ModelCheckpoint",
            "val/loss",
            [VALIDATES, "--trainer.val_check_interval=7", "--trainer.check_val_every_n_epoch=null"],
            "step 7",
        ),
        slow("ModelCheckpoint", "val/loss", [VALIDATES, "--trainer.check_val_every_n_epoch=2"], "step 6"),
        ("EarlyStopping", "val/rewards/accuracies", ["--data.validation={binary}"], "rewards"),  # no pairs
        slow("EarlyStopping", "rewards/accuracies", [], "rewards"),  # nor in the training data
        slow("EarlyStopping", "test/loss", [VALIDATES], "val/loss"),
        slow("ModelCheckpoint", "lr-AdamW", [VALIDATES], "grad_norm"),
    ],
)
def test_what_is_never_logged_is_not_monitored(tiny_folder, files, tmp_path, capfd, callback, monitor, options, named):
    words = fit(tiny_folder, "kto", files["binary"], tmp_path / "run", *(o.format(**files) for o in options))
    said = refused(capfd, [*words, *monitoring(callback, monitor)])
    assert said.startswith("halos: MonitorError")
    assert "\n" not in said
    for word in (callback, repr(monitor), named):
        assert word in said
    assert not list((tmp_path / "run").rglob("*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("callback", "monitor"),
    [
        ("EarlyStopping", "loss"),
        ("EarlyStopping", "grad_norm"),
        ("EarlyStopping", "val/rewards/auroc"),
        ("ModelCheckpoint", "val/outcome/z0_estimate"),
        ("ModelCheckpoint", "val/kl"),
        ("ModelCheckpoint", "step"),
    ],
)
def test_what_is_logged_may_be_monitored(tiny_folder, files, tmp_path, callback, monitor):
    words = fit(tiny_folder, "kto", files["binary"], tmp_path / "run", VALIDATES.format(**files))
    main([*words, *monitoring(callback, monitor), "--trainer.max_steps=3"])
    logged = {name for row in metrics(tmp_path / "run") for name in row} | {"step"}
    assert monitor in logged


@pytest.mark.slow
def test_all_that_is_logged_is_known(tiny_folder, files, tmp_path):
    """Else a monitor of it would be refused."""
    from types import SimpleNamespace

    from lightning.pytorch.callbacks import EarlyStopping

    from halos_pl.cli.lightning_cli import HalosCLI
    from halos_pl.training.monitors import check_monitors

    for objective in ("kto", "sft", "dpo", "grpo", "bco"):
        data = files["binary" if objective in ("kto", "sft", "bco") else "pairs"]
        words = fit(tiny_folder, objective, data, tmp_path / objective, VALIDATES.format(**files))
        main(words)
        cli = HalosCLI(words[1:], run=False)
        for name in {name for row in metrics(tmp_path / objective) for name in row} - {"step", "epoch"}:
            trainer = SimpleNamespace(callbacks=[EarlyStopping(name)], limit_val_batches=1.0)
            check_monitors(trainer, cli.model, cli.datamodule)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_callback_of_the_users_own_may_log_what_is_monitored(tiny_folder, files, tmp_path):
    """It is not refused; where nothing logs it, the run ends in a line, with a checkpoint to go on from."""
    words = fit(tiny_folder, "kto", files["binary"], tmp_path / "run", VALIDATES.format(**files))
    foreign = ["--trainer.callbacks+=plugins.signal_at.SignalAt", "--trainer.callbacks.name=SIGTERM"]
    foreign += ["--trainer.callbacks.moment=on_fit_end", "--trainer.callbacks.step=99"]
    ended = run([*words, *foreign, *monitoring("EarlyStopping", "mine")], tmp_path)
    assert ended.status == 1, ended
    assert "Traceback" not in ended
    assert ended.splitlines()[-1].startswith("halos: MonitorError")
    assert "`mine`" in ended.splitlines()[-1]
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.parametrize(
    ("option", "named"), [("--trainer.val_check_interval=2", "val_check_interval"), (VALIDATES, "step 3")]
)
def test_validation_that_never_runs_is_said(tiny_folder, files, tmp_path, recwarn, option, named):
    main([*fit(tiny_folder, "kto", files["binary"], tmp_path / "run", STEPS), option.format(**files)])
    assert any(named in str(w.message) and "data.validation" in str(w.message) for w in recwarn)
