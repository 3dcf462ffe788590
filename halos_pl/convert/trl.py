"""TRL: the arguments of its trainers, as in a file for ``trl kto --config FILE``."""

from __future__ import annotations

from typing import Any

from halos_pl.convert.draft import Draft
from halos_pl.convert.losses import Term, part, scaled, section, terms
from halos_pl.convert.peer import Given, Peer
from halos_pl.convert.run import ConvertError, Run
from halos_pl.convert.table import table
from halos_pl.convert.training import evaluates, fill_precision, fill_training

#: Objectives by TRL's loss types, and the argument here that each takes ``label_smoothing`` as.
_DPO = {
    "sigmoid": "dpo",
    "robust": "robust_dpo",
    "sigmoid_norm": "dpo_length_normalised",
    "ipo": "ipo_length_normalised",
    "sft": "sft",
    **{name: name for name in ("hinge", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired")},
    **{name: name for name in ("apo_zero", "apo_down", "discopop")},
}
_SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
_DIVERGENCES = {"forward_kl": "ForwardKL", "js_divergence": "JensenShannon", "alpha_divergence": "AlphaDivergence"}
#: Losses on the difference of sums of log-ratios, which an f-divergence can replace.
_OF_RATIOS = ("sigmoid", "hinge", "exo_pair", "robust", "discopop")


class TRL(Peer):
    """TRL's KTO, DPO, CPO, ORPO and reward trainers."""

    word, title = "trl", "TRL"
    tables = ("training_arguments", "trl")
    trainers = ("kto", "dpo", "cpo", "orpo", "reward")

    def trainer(self, given: Given, asked: str | None) -> str:
        if asked:
            return asked
        settings = table(*self.tables).settings
        fits = [name for name in self.trainers if all(name in settings[k].only for k in _particular(settings, given))]
        if len(fits) == 1:
            return fits[0]
        file = next(iter(given.places.values()), "the file").partition(":")[0]
        raise ConvertError(
            f"{file} does not tell its trainer; add --trainer and one of {', '.join(fits or self.trainers)}"
        )

    def fill(self, run: Run, draft: Draft) -> None:
        fill_precision_of(run, draft)
        for key, value in section(_loss(run)).items():
            draft.set(f"model.{key}", value)
        _fill_model(run, draft)
        fill_training(run, draft, pairs=run.trainer != "kto")
        _fill_data(run, draft)
        if run.trainer == "kto":
            run.note(
                "loss_type",
                "TRL takes each prompt with its neighbour's answer, and z0 from the rows of one"
                " forward pass; here mismatches are random, and z0 is that of the whole step",
            )
        if run.trainer == "orpo":
            run.note("beta", "TRL counts the prompt's tokens in ORPO's likelihood term; here only the answer's count")


def _particular(settings: dict[str, Any], given: Given) -> list[str]:
    """The settings that only some trainers have."""
    return [key for key in given.values if key in settings and settings[key].only]


def fill_precision_of(run: Run, draft: Draft) -> None:
    """TRL trains in bfloat16 unless told otherwise."""
    if run.value("bf16") is None:
        run.given["bf16"] = not run.flag("fp16")
    fill_precision(run, draft)


def _loss(run: Run) -> list[Term]:
    """The terms of the loss."""
    if run.trainer == "reward":
        coefficient = run.value("center_rewards_coefficient")
        found = terms("bradley_terry")
        return (
            found
            if coefficient is None
            else [*found, part("Centring", weight=run.number("center_rewards_coefficient"))]
        )
    if (beta := run.number("beta")) <= 0:
        raise run.error("beta", f"it is {beta:g}; it must be above 0")
    if run.trainer == "orpo":
        return terms("orpo", by=beta)
    found = {"kto": _kto, "dpo": _dpo, "cpo": _cpo}[run.trainer](run, beta)
    if run.trainer != "cpo" and run.value("router_aux_loss_coef") is not None:
        found.append(part("RouterLoss", weight=run.number("router_aux_loss_coef")))
    elif run.trainer != "cpo":
        run.note(
            "router_aux_loss_coef",
            "of a mixture of experts, TRL adds the router's loss with the weight in the"
            " model's config.json; model.extra_terms RouterLoss adds it here",
        )
    return found


def _kto(run: Run, beta: float) -> list[Term]:
    name = run.choice("loss_type", ("kto", "apo_zero_unpaired"))
    weights = run.number("desirable_weight"), run.number("undesirable_weight")
    return terms(name, beta=beta, lambda_desirable=weights[0], lambda_undesirable=weights[1])


def _dpo(run: Run, beta: float) -> list[Term]:
    kinds = run.texts("loss_type")
    weights = run.value("loss_weights") or [1.0] * len(kinds)
    if not isinstance(weights, list) or len(weights) != len(kinds):
        raise run.error("loss_weights", f"there must be {len(kinds)} numbers, one for each loss_type")
    smoothing = run.number("label_smoothing")
    if smoothing and not set(kinds) & set(_SMOOTHED):
        raise run.error("label_smoothing", f"TRL uses it only with {', '.join(_SMOOTHED)}; remove it, or choose one")
    found = []
    for kind, weight in zip(kinds, weights, strict=True):
        if kind not in _DPO:
            raise run.error("loss_type", f"{kind} has no equal here; choose from {', '.join(_DPO)}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or weight < 0:
            raise run.error("loss_weights", f"{weight} is not a number from 0")
        if weight:
            found += [scaled(term, weight) for term in _dpo_terms(run, kind, beta, smoothing)]
    if not found:
        raise run.error("loss_weights", "all are 0, so nothing would be trained")
    return found


def _dpo_terms(run: Run, kind: str, beta: float, smoothing: float) -> list[Term]:
    """The terms of one loss type. TRL takes 0.001 for exo_pair without smoothing, whose loss would be infinite."""
    values: dict[str, Any] = {} if kind == "sft" else {"beta": beta}
    divergence = run.choice("f_divergence_type", ("reverse_kl", *_DIVERGENCES))
    if divergence != "reverse_kl" and kind != "sft":
        if kind not in _OF_RATIOS:
            raise run.error("f_divergence_type", f"{divergence} with loss_type {kind} has no equal; use reverse_kl")
        alpha = {"alpha": run.number("f_alpha_divergence_coef")} if divergence == "alpha_divergence" else {}
        values["reward"] = part(_DIVERGENCES[divergence], **alpha)
    if kind == "discopop":
        values["tau"] = run.number("discopop_tau")
    found = terms(_DPO[kind], **values)
    if kind in _SMOOTHED:
        arguments = found[0]["init_args"]
        holder = arguments["value_function" if kind == "exo_pair" else "feedback"]["init_args"]
        holder["label_smoothing"] = smoothing or (1e-3 if kind == "exo_pair" else 0.0)
    return found


def _cpo(run: Run, beta: float) -> list[Term]:
    kind = run.choice("loss_type", ("sigmoid", "simpo", "hinge", "ipo"))
    smoothing, alpha = run.number("label_smoothing"), run.number("cpo_alpha")
    if smoothing and kind in ("hinge", "ipo"):
        raise run.error("label_smoothing", f"TRL does not use it with loss_type {kind}; remove it")
    if kind == "simpo":
        found = terms("simpo", beta=beta, by=run.number("simpo_gamma") / beta, label_smoothing=smoothing)
    else:
        plain = {"hinge": part("Hinge", beta=beta, margin=1.0), "ipo": part("Quadratic", beta=beta)}
        value = {"value_function": plain[kind]} if kind in plain else {"beta": beta}
        mean = part("LogProb", length_normalised=kind == "ipo")
        found = terms("cpo", reward=mean, label_smoothing=smoothing, **value)[:1]
    return [*found, part("NLL", weight=alpha, per="token", rows="desirable")] if alpha else found


def _fill_model(run: Run, draft: Draft) -> None:
    load = _load_arguments(run)
    draft.set("model.policy.path", run.required("model_name_or_path"), "model_name_or_path")
    if load["revision"] != "main":
        draft.set("model.policy.revision", load["revision"], "model_revision")
    dtype = str(load["dtype"]).removeprefix("torch.")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise run.error("dtype", f"{dtype} has no equal here; name it: float32, bfloat16 or float16")
    draft.set("model.policy.dtype", dtype, "dtype")
    if dtype != "float32":
        draft.set("model.master_weights", False, "TRL's optimizer steps on the weights themselves")
        run.note(
            "dtype",
            "TRL's optimizer rounds each step to the weights' dtype, and so loses small ones;"
            " model.master_weights true avoids it",
        )
    draft.set("model.policy.attn_implementation", load["attn_implementation"] or "sdpa", "attn_implementation")
    draft.set("model.policy.trust_remote_code", bool(load["trust_remote_code"]), "trust_remote_code")
    on = run.value("gradient_checkpointing") is not False
    draft.set("model.policy.gradient_checkpointing", on, "gradient_checkpointing")
    draft.set("model.policy.dropout", not run.flag("disable_dropout"), "disable_dropout")
    draft.set("model.policy.liger", run.flag("use_liger_kernel"), "use_liger_kernel")
    if run.flag("use_peft"):
        draft.set("model.policy.lora", _lora(run), "lora_*, use_rslora, use_dora")
    bits = 4 if run.flag("load_in_4bit") else 8 if run.flag("load_in_8bit") else 0
    if bits:
        draft.set("model.policy.quantize", _quantize(run, bits), "load_in_4bit, load_in_8bit, bnb_*")
    if run.trainer in ("kto", "dpo"):
        draft.set("model.reference_store", run.flag("precompute_ref_log_probs"), "precompute_ref_log_probs")
        if run.flag("sync_ref_model"):
            every, mix = run.whole("ref_model_sync_steps"), run.number("ref_model_mixup_alpha")
            draft.set("model.reference_model", part("SyncedCopy", every=every, mix=mix), "sync_ref_model, ref_model_*")


def _load_arguments(run: Run) -> dict[str, Any]:
    """How the model is loaded; ``model_init_kwargs`` replaces the settings of the same meaning."""
    load = {
        "revision": run.text("model_revision"),
        "dtype": run.text("dtype"),
        "attn_implementation": run.text("attn_implementation"),
        "trust_remote_code": run.flag("trust_remote_code"),
    }
    more = run.value("model_init_kwargs") or {}
    if not isinstance(more, dict):
        raise run.error("model_init_kwargs", "it must be a mapping")
    more = {{"torch_dtype": "dtype"}.get(key, key): value for key, value in more.items()}
    if unknown := [str(key) for key in more if key not in load]:
        raise run.error("model_init_kwargs", f"{', '.join(unknown)} has no equal here; it takes {', '.join(load)}")
    return load | more


def _lora(run: Run) -> dict[str, Any]:
    targets = run.texts("lora_target_modules")
    if not targets:
        targets = ["q_proj", "v_proj"]
        run.note(
            "lora_target_modules",
            "peft chooses the layers by the architecture: q_proj and v_proj for most, which"
            " this config names; change them for a model that has others",
        )
    return {
        "r": run.whole("lora_r"),
        "alpha": run.whole("lora_alpha"),
        "dropout": run.number("lora_dropout"),
        "target_modules": "all-linear" if targets == ["all-linear"] else targets,
        "use_rslora": run.flag("use_rslora"),
        "use_dora": run.flag("use_dora"),
        "modules_to_save": run.texts("lora_modules_to_save") or None,
    }


def _quantize(run: Run, bits: int) -> dict[str, Any]:
    quantize: dict[str, Any] = {"method": "bitsandbytes", "bits": bits}
    if bits == 8:
        return quantize | {"outlier_threshold": 6.0}  # the default of transformers
    storage = run.text("bnb_4bit_quant_storage")
    quantize |= {"quant_type": run.text("bnb_4bit_quant_type"), "double_quant": run.flag("use_bnb_nested_quant")}
    return quantize | ({"storage_dtype": storage} if storage else {})


def _fill_data(run: Run, draft: Draft) -> None:
    if run.value("max_length") is None:
        raise run.error("max_length", "null, no limit, has no equal; give the number of tokens of your longest row")
    draft.set("data.max_length", run.whole("max_length"), "max_length")
    run.note(
        "max_length",
        "TRL cuts a long row at its end; here a long prompt loses its beginning, and then a completion its end",
    )
    evaluated = evaluates(run, draft)
    if mixture := run.value("datasets"):
        if not isinstance(mixture, list) or not all(isinstance(each, dict) for each in mixture):
            raise run.error("datasets", "it must be a list of mappings, such as {path: OWNER/NAME, split: train}")
        draft.set("data.train", [_source(run, each) for each in mixture], "datasets")
        if evaluated:
            run.note("eval_strategy", "the data of the evaluation are not in the config; give --data.validation")
    elif path := run.text("dataset_name"):
        name = run.text("dataset_config")
        source = {"path": path, "streaming": run.flag("dataset_streaming")} | ({"name": name} if name else {})
        draft.set("data.train", source | {"split": run.text("dataset_train_split")}, "dataset_name")
        if evaluated:
            held_out = source | {"split": run.text("dataset_test_split")}
            draft.set("data.validation", held_out, "dataset_test_split")
    else:
        run.note("dataset_name", "no data are named; give --data.train FILE")


def _source(run: Run, entry: dict[str, Any]) -> dict[str, Any]:
    """A data set of a mixture; a local file is named by its reader, as in ``{path: json, data_files: rows.jsonl}``."""
    known = {"path", "name", "data_dir", "data_files", "split", "columns"}
    if unknown := [str(key) for key in entry if key not in known]:
        raise run.error(
            "datasets", f"{', '.join(unknown)} is no setting of a data set; it takes {', '.join(sorted(known))}"
        )
    if entry.get("columns"):
        run.note("datasets", "columns that carry no meaning here are ignored, so columns is left out")
    source = {key: entry[key] for key in ("path", "name", "data_dir") if entry.get(key)}
    source |= {"split": entry.get("split") or "train", "streaming": run.flag("streaming")}
    if files := entry.get("data_files"):
        if not isinstance(files, str) or entry.get("path") not in ("json", "csv", "parquet"):
            raise run.error(
                "datasets", "data_files is read only as one file of a path json, csv or parquet; name a file"
            )
        return {"path": files}
    return source
