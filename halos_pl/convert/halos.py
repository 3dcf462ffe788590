"""The HALOs code of ContextualAI: its ``config/config.yaml`` with the words of ``launch.py``, or that of a run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from halos_pl.common.experiments import presets
from halos_pl.common.yaml_files import read_yaml
from halos_pl.convert.draft import Draft
from halos_pl.convert.losses import Term, part, section, terms
from halos_pl.convert.peer import Given, Peer
from halos_pl.convert.run import ConvertError, Run

#: Our presets by the names of its data sets.
_DATA = {"shp": "shp", "hh": "hh", "oasst": "oasst", "ultrabin": "ultrafeedback"}
_NOT = {
    "SFTTrainer": "supervised fine-tuning",
    "PPOTrainer": "PPO",
    "GRPOTrainer": "GRPO",
}
_MISSING = "???"  # of OmegaConf


class HALOs(Peer):
    """The trainers of preferences and binary feedback in the HALOs code."""

    word, title = "halos", "the HALOs code"
    tables = ("halos",)

    def read(self, path: Path, overrides: dict[str, Any]) -> Given:
        """The settings by dotted names; ``loss=NAME`` and ``model=NAME`` read the files of these names beside it."""
        content, lines = read_yaml(path)
        values, places = _flat(content), {".".join(key): f"{path}:{line}" for key, line in lines.items()}
        groups: dict[str, str] = {}
        for entry in content.get("defaults", []):
            groups |= entry if isinstance(entry, dict) else {}
        for key in [key for key in values if key == "defaults" or values[key] == _MISSING]:
            values.pop(key)
        for group, chosen in groups.items():
            name = overrides.pop(group, chosen)
            if name == _MISSING:
                raise ConvertError(f"{path}: {group} is not chosen; add --overrides {group}=NAME")
            values, places = _merge((values, places), _group(path, group, str(name)))
        for key, value in overrides.items():
            if key in ("loss", "model"):
                raise ConvertError(f"--overrides: {key}={value}: {path} already has its settings of {key}; remove one")
            values[key], places[key] = value, f"--overrides {key}"
        return Given({key: _resolved(value, values) for key, value in values.items()}, places)

    def trainer(self, given: Given, asked: str | None) -> str:
        name = str(given.values.get("loss.trainer"))
        if name in _NOT and not given.values.get("loss.control_tokens.chosen"):
            place = given.places["loss.trainer"]
            raise ConvertError(f"{place}: not a preference run: {_NOT[name]}; losses on feedback can be converted")
        if name == "SLiCTrainer":
            raise ConvertError(
                f"{given.places['loss.trainer']}: its regulariser is a mean over the tokens of padded rows, which has"
                " no equal; halos fit --objective slic is the paper's loss"
            )
        if name not in _LOSSES:
            raise ConvertError(
                f"{given.places.get('loss.trainer', 'the file')}: loss.trainer is {name}; losses of"
                f" {', '.join(_LOSSES)} can be converted"
            )
        return name

    def fill(self, run: Run, draft: Draft) -> None:
        for key in ("loss.trainer", "model.block_name"):  # they follow from the loss and the model
            run.value(key)
        if run.value("loss.dataloader") is not None:
            run.choice("loss.dataloader", [_LOADERS.get(run.trainer, "PairedPreferenceDataLoader")])
        for key, value in section(_loss(run)).items():
            draft.set(f"model.{key}", value)
        _fill_reference(run, draft)
        _fill_model(run, draft)
        _fill_training(run, draft)
        _fill_data(run, draft)


def _flat(node: dict[str, Any], at: str = "") -> dict[str, Any]:
    """Values by dotted names; an empty mapping is a value."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        name = f"{at}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return found


Settings = tuple[dict[str, Any], dict[str, str]]


def _merge(one: Settings, other: Settings) -> Settings:
    return one[0] | other[0], one[1] | other[1]


def _group(path: Path, group: str, name: str) -> Settings:
    """The settings of a group's file, with those of the files that it builds on."""
    file = path.parent / group / f"{name}.yaml"
    if not file.is_file():
        raise ConvertError(f"{group}={name}: there is no {file}; give the config.yaml in the folder config of the code")
    content, lines = read_yaml(file)
    below: Settings = ({}, {})
    for base in content.pop("defaults", []):
        below = _merge(below, _group(path, group, base))
    values = {key: value for key, value in _flat(content, f"{group}.").items() if value != _MISSING}
    return _merge(below, (values, {f"{group}.{'.'.join(key)}": f"{file}:{line}" for key, line in lines.items()}))


def _resolved(value: Any, values: dict[str, Any]) -> Any:
    """The value with each ``${NAME}`` replaced, as OmegaConf does."""
    if not isinstance(value, str):
        return value
    return re.sub(r"\$\{([\w.]+)\}", lambda found: str(values.get(found[1], found[0])), value)


def _dpo(run: Run) -> list[Term]:
    return terms("dpo", beta=run.number("loss.beta"))


def _cdpo(run: Run) -> list[Term]:
    return terms("cdpo", beta=run.number("loss.beta"), label_smoothing=run.number("loss.epsilon"))


def _ipo(run: Run) -> list[Term]:
    return terms("ipo_length_normalised", beta=run.number("loss.tau"))


def _simpo(run: Run) -> list[Term]:
    return terms("simpo", beta=run.number("loss.beta"), by=run.number("loss.gamma_beta_ratio"))


def _kto(run: Run) -> list[Term]:
    weights = run.number("loss.desirable_weight"), run.number("loss.undesirable_weight")
    return terms("kto", beta=run.number("loss.beta"), lambda_desirable=weights[0], lambda_undesirable=weights[1])


#: The loss of each of its trainers.
_LOSSES: dict[str, Callable[[Run], list[Term]]] = {
    "KTOTrainer": _kto,
    "DPOTrainer": _dpo,
    "CDPOTrainer": _cdpo,
    "IPOTrainer": _ipo,
    "SimPOTrainer": _simpo,
    "BradleyTerryTrainer": lambda run: terms("bradley_terry"),
    "SFTTrainer": lambda run: terms("csft"),
}
#: Those that do not read pairs.
_LOADERS = {"KTOTrainer": "UnpairedPreferenceDataLoader", "SFTTrainer": "ConditionalSFTDataLoader"}
_CLAMPED = ("KTOTrainer", "DPOTrainer", "CDPOTrainer")


def _loss(run: Run) -> list[Term]:
    found = _LOSSES[run.trainer](run)
    if run.flag("humanline"):
        if run.trainer not in _CLAMPED:
            raise run.error("humanline", f"{run.trainer} with humanline has no equal; set it to false")
        low, high = run.number("log_epsilon_P"), run.number("log_epsilon_R")
        found[0]["init_args"]["reward"] = part("HumanlineLogRatio", low=low, high=high)
    return found


def _fill_reference(run: Run, draft: Draft) -> None:
    draft.set("model.reference_store", run.flag("cache_reference_logprobs"), "cache_reference_logprobs")
    key = "humanline" if run.flag("humanline") else "loss.sync_reference" if run.flag("loss.sync_reference") else ""
    if key:
        draft.set("model.reference_model", part("SyncedCopy", every=2, mix=1.0), key)
        run.note(
            key,
            "the HALOs code copies the policy before each step, so the reference is one step behind; here"
            " it is copied after every second step",
        )


def _fill_model(run: Run, draft: Draft) -> None:
    path = run.text("model.load_from") or run.text("model.name_or_path")
    if not path:
        raise run.error("model.name_or_path", "it is not given; add it to --overrides")
    draft.set("model.policy.path", path, "model.load_from, model.name_or_path")
    dtype = run.choice("model.policy_dtype", ("bfloat16", "float32", "float16"))
    draft.set("model.policy.dtype", dtype, "model.policy_dtype")
    if run.choice("model.reference_dtype", ("bfloat16", "float32", "float16")) != dtype:
        raise run.error("model.reference_dtype", f"it must be that of the policy, {dtype}")
    if dtype != "float32":
        draft.set("model.master_weights", False, "the optimizer steps on the weights themselves")
        run.note(
            "model.policy_dtype",
            "the optimizer rounds each step to the weights' dtype, and so loses small ones;"
            " model.master_weights true avoids it",
        )
    draft.set("trainer.precision", "32-true", "nothing is cast")
    on = run.flag("model.activation_checkpointing")
    draft.set("model.policy.gradient_checkpointing", on, "model.activation_checkpointing")
    if run.flag("model.use_peft"):
        targets = run.texts("model.peft.target_modules")
        lora = {
            "r": run.whole("model.peft.lora_r"),
            "alpha": run.whole("model.peft.lora_alpha"),
            "dropout": run.number("model.peft.lora_dropout"),
            "target_modules": "all-linear" if targets == ["all-linear"] else targets,
        }
        draft.set("model.policy.lora", lora, "model.peft")


def _fill_training(run: Run, draft: Draft) -> None:
    draft.set("seed_everything", run.whole("seed"), "seed")
    if folder := run.text("local_run_dir"):
        draft.set("run_dir", folder, "local_run_dir")
    run.text("exp_name")
    run.text("cache_dir")
    size, parts = run.whole("model.batch_size"), run.whole("model.gradient_accumulation_steps")
    if parts < 1 or size % (parts * run.devices):
        raise run.error(
            "model.batch_size",
            f"{size} must be a multiple of model.gradient_accumulation_steps * devices, {parts} * {run.devices}",
        )
    rows = run.trainer in _LOADERS
    draft.set("data.batch_size", size, f"model.batch_size, in {'rows' if rows else 'pairs'}")
    draft.set("model.micro_batch_rows", size // (parts * run.devices) * (1 if rows else 2), "batch_size / accumulation")
    run.note("devices", f"micro_batch_rows is for {run.devices} device(s); --devices tells how many there were")
    if run.value("n_examples") is not None:
        draft.set("trainer.max_steps", run.whole("n_examples") // size, "n_examples / batch_size")
    epochs = run.value("n_epochs")
    draft.set("trainer.max_epochs", -1 if epochs is None else run.whole("n_epochs"), "n_epochs")
    draft.set("trainer.gradient_clip_val", run.number("model.max_grad_norm"), "model.max_grad_norm")
    name = run.choice("optimizer", ("AdamW", "Adam", "NAdam", "RAdam"))
    settings = {
        "lr": run.number("lr"),
        "weight_decay": run.number("weight_decay"),
        "betas": [run.number("beta1"), run.number("beta2")],
    }
    draft.set("model.optimizer", part(f"torch.optim.{name}", **settings), "optimizer, lr, weight_decay, beta1, beta2")
    draft.set("model.lr_schedule", "constant_with_warmup", "its schedule")
    draft.set("model.warmup_ratio", run.number("warmup"), "warmup")
    run.note("warmup", "the HALOs code begins at a tenth of the learning rate; here the warm-up begins at 0")
    draft.set("checkpoint.every_n_steps", max(1, run.whole("save_every") // size), "save_every / batch_size")


def _fill_data(run: Run, draft: Draft) -> None:
    draft.set("data.max_length", run.whole("model.max_length"), "model.max_length")
    run.note(
        "model.max_length",
        "the HALOs code limits the prompt alone, too; here a long prompt loses its beginning,"
        " and then a completion its end",
    )
    draft.set("data.text_prompts", "chat", "the HALOs code puts texts into the chat template")
    draft.set("data.train", _sources(run, "train_datasets", "train"), "train_datasets")
    if run.texts("test_datasets"):
        draft.set("data.validation", _sources(run, "test_datasets", "validation"), "test_datasets")
        draft.set("data.eval_batch_size", run.whole("model.eval_batch_size"), "model.eval_batch_size")
        every = max(1, run.whole("eval_every") // draft.content["data"]["batch_size"])
        draft.set("trainer.val_check_interval", every, "eval_every / batch_size")
        draft.set("trainer.check_val_every_n_epoch", None, "eval_every counts over epochs")
        run.note("n_eval_examples", "all held-out rows are measured; rows in data.validation limits them")
        run.value("n_eval_examples")
    shares = {ours: run.number(f"frac_unique_{ours}") for ours in ("desirable", "undesirable")}
    if set(shares.values()) != {1.0}:
        draft.set("data.transforms", [part("KeepFraction", **shares)], "frac_unique_desirable, frac_unique_undesirable")
    if run.trainer == "SFTTrainer":
        tokens = {
            "desirable": run.text("loss.control_tokens.chosen"),
            "undesirable": run.text("loss.control_tokens.rejected"),
        }
        draft.set("data.control_tokens", tokens, "loss.control_tokens")


def _sources(run: Run, key: str, split: str) -> list[Any]:
    """Our sources of its data sets, whose names are those of functions in its code, or JSON files."""
    if not (names := run.texts(key)):
        raise run.error(key, "no data are named; add it to --overrides")
    sources: list[Any] = []
    for name in names:
        if name in _DATA:
            found = read_yaml(presets()[f"data/{_DATA[name]}"])[0]["data"][split]
            sources += found if isinstance(found, list) else [found]
            run.note(
                key, f"{name}: the rows are those of --config data/{_DATA[name]}; the HALOs code filters some data"
            )
        elif Path(name).suffix in (".json", ".jsonl"):
            sources.append({"path": name})
        else:
            raise run.error(
                key, f"{name} is a function of the HALOs code; write its rows into a JSON file, and name that"
            )
    return sources
