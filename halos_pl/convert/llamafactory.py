"""LLaMA-Factory: a recipe for ``llamafactory-cli train FILE``, of the stages dpo, kto and rm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from halos_pl.common.type_words import near
from halos_pl.convert.draft import Draft
from halos_pl.convert.losses import Term, mean_nll, part, section, terms
from halos_pl.convert.peer import Given, Peer
from halos_pl.convert.run import ConvertError, Run
from halos_pl.convert.training import evaluates, fill_precision, fill_training

_OTHER_STAGES = {"pt": "pre-training", "sft": "supervised fine-tuning", "ppo": "PPO"}
_PAIR_LOSSES = ("sigmoid", "hinge", "ipo", "orpo", "simpo")
#: Columns of a judged or compared row, by ours.
_MEDIA = ("images", "videos", "audios", "system", "tools", "history")
#: The tags of conversations that are read, with the names that our schemas have for their columns.
_TAGS = {
    "conversations": {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"},
    "messages": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
}


class LLaMAFactory(Peer):
    """LLaMA-Factory's stages dpo, kto and rm."""

    word, title = "llamafactory", "LLaMA-Factory"
    tables = ("training_arguments", "llamafactory")

    def trainer(self, given: Given, asked: str | None) -> str:
        stage = given.values.get("stage", "sft")
        place = given.places.get("stage", "the file has no stage")
        if stage == "orpo":  # of earlier versions
            given.values["pref_loss"] = "orpo"
        if stage in ("dpo", "kto", "rm", "orpo"):
            return str(stage)
        what = _OTHER_STAGES.get(str(stage), f"stage {stage}")
        raise ConvertError(f"{place}: not a preference run: {what}; the stages dpo, kto and rm can be converted")

    def fill(self, run: Run, draft: Draft) -> None:
        fill_precision(run, draft)
        for key, value in section(_loss(run)).items():
            draft.set(f"model.{key}", value)
        _fill_model(run, draft)
        fill_training(run, draft, pairs=run.trainer != "kto")
        if run.flag("disable_shuffling"):
            draft.set("data.shuffle", False, "disable_shuffling")
        _fill_data(run, draft)
        run.value("stage")
        if run.trainer == "kto":
            run.note(
                "stage", "LLaMA-Factory takes z0 from the rows of one forward pass; here z0 is that of the whole step"
            )


def _loss(run: Run) -> list[Term]:
    """The terms of the loss."""
    if run.trainer == "rm":
        return terms("bradley_terry")
    if (beta := run.number("pref_beta")) <= 0:
        raise run.error("pref_beta", f"it is {beta:g}; it must be above 0")
    share = run.number("pref_ftx")
    found = _kto(run, beta, share) if run.trainer == "kto" else _pairs(run, beta)
    if run.value("moe_aux_loss_coef") is not None:
        found.append(part("RouterLoss", weight=run.number("moe_aux_loss_coef")))
    return [*found, mean_nll(share)] if share > 0 and run.trainer != "kto" else found


def _kto(run: Run, beta: float, share: float) -> list[Term]:
    if share:
        raise run.error(
            "pref_ftx", f"it is {share:g}: in stage kto its weight depends on the labels of a forward pass; set it to 0"
        )
    weights = run.number("kto_chosen_weight"), run.number("kto_rejected_weight")
    return terms("kto", beta=beta, lambda_desirable=weights[0], lambda_undesirable=weights[1])


def _pairs(run: Run, beta: float) -> list[Term]:
    kind, smoothing = run.choice("pref_loss", _PAIR_LOSSES), run.number("dpo_label_smoothing")
    if smoothing and kind != "sigmoid":
        raise run.error("dpo_label_smoothing", f"LLaMA-Factory refuses it with pref_loss {kind}; remove it")
    if kind == "orpo":
        return [terms("orpo", by=beta)[0], mean_nll(1.0)]
    if kind == "simpo":
        return terms("simpo", beta=beta, by=run.number("simpo_gamma") / beta)
    if kind == "sigmoid":
        return terms("dpo", beta=beta, label_smoothing=smoothing)
    return terms({"hinge": "hinge", "ipo": "ipo_length_normalised"}[kind], beta=beta)


def _fill_model(run: Run, draft: Draft) -> None:
    draft.set("model.policy.path", run.required("model_name_or_path"), "model_name_or_path")
    if (revision := run.text("model_revision")) != "main":
        draft.set("model.policy.revision", revision, "model_revision")
    draft.set("model.policy.trust_remote_code", run.flag("trust_remote_code"), "trust_remote_code")
    on = not run.flag("disable_gradient_checkpointing")
    draft.set("model.policy.gradient_checkpointing", on, "disable_gradient_checkpointing")
    draft.set("model.policy.dropout", run.trainer == "rm", "LLaMA-Factory turns dropout off in the stages dpo and kto")
    liger = run.flag("enable_liger_kernel") or run.flag("use_liger_kernel")
    draft.set("model.policy.liger", liger, "enable_liger_kernel")
    method = run.choice("finetuning_type", ("lora", "full"))
    _fill_dtype(run, draft, method)
    if method == "lora":
        draft.set("model.policy.lora", _lora(run), "lora_*, additional_target, use_rslora, use_dora")
    if run.value("quantization_bit") is not None:
        if method != "lora":
            raise run.error("quantization_bit", "quantized weights cannot be trained; set finetuning_type to lora")
        draft.set("model.policy.quantize", _quantize(run), "quantization_*, double_quantization")
    if (reference := run.text("ref_model")) and run.trainer != "rm":
        draft.set("model.reference_model", part("OtherModel", model={"path": reference}), "ref_model")


def _fill_dtype(run: Run, draft: Draft, method: str) -> None:
    """Frozen weights have the dtype of the products, trained ones float32, unless ``pure_bf16``."""
    if run.flag("pure_bf16"):
        draft.set("trainer.precision", "32-true", "pure_bf16: all weights are bfloat16, so nothing is cast")
        draft.set("model.master_weights", False, "pure_bf16: the optimizer steps on the weights themselves")
    elif not run.flag("bf16") and not run.flag("fp16"):
        run.note("bf16", "without it, LLaMA-Factory loads a model in the dtype of its files; here it is float32")
    half = run.flag("pure_bf16") or (method == "lora" and run.flag("bf16"))
    draft.set("model.policy.dtype", "bfloat16" if half else "float32", "bf16, pure_bf16, finetuning_type")


def _lora(run: Run) -> dict[str, Any]:
    rank, targets = run.whole("lora_rank"), run.texts("lora_target")
    return {
        "r": rank,
        "alpha": 2 * rank if run.value("lora_alpha") is None else run.whole("lora_alpha"),
        "dropout": run.number("lora_dropout"),
        "target_modules": "all-linear" if targets == ["all"] else targets,
        "use_rslora": run.flag("use_rslora"),
        "use_dora": run.flag("use_dora"),
        "modules_to_save": run.texts("additional_target") or None,
    }


def _quantize(run: Run) -> dict[str, Any]:
    bits = run.whole("quantization_bit")
    run.choice("quantization_method", ("bnb", "bitsandbytes"))
    if bits == 8:
        return {"method": "bitsandbytes", "bits": 8, "outlier_threshold": 6.0}  # the default of transformers
    if bits != 4:
        raise run.error("quantization_bit", f"it is {bits}; only 4 and 8 have an equal here")
    kind, double = run.text("quantization_type"), run.flag("double_quantization")
    return {"method": "bitsandbytes", "bits": 4, "quant_type": kind, "double_quant": double}


def _fill_data(run: Run, draft: Draft) -> None:
    draft.set("data.max_length", run.whole("cutoff_len"), "cutoff_len")
    run.note(
        "cutoff_len",
        "LLaMA-Factory shortens prompt and completion in proportion; here a long prompt loses its"
        " beginning, and then a completion its end",
    )
    draft.set("data.text_prompts", "chat", "LLaMA-Factory puts texts into its template")
    run.note(
        "template",
        "the model's own chat template is used, which LLaMA-Factory's may differ from;"
        " data.chat_template replaces it, and halos data inspect shows the text",
    )
    run.text("template")
    names = run.texts("dataset")
    if not names:
        raise run.error("dataset", "no data are named; add it to the file, or to --overrides")
    draft.set("data.train", _sources(run, "dataset", names), "dataset")
    if held_out := run.texts("eval_dataset"):
        draft.set("data.validation", _sources(run, "eval_dataset", held_out), "eval_dataset")
    if evaluates(run, draft) and not held_out:
        raise run.error("eval_strategy", "no data are named to evaluate on; set eval_dataset, or eval_strategy to no")


def _sources(run: Run, key: str, names: list[str]) -> list[dict[str, Any]]:
    folder = run.required("dataset_dir")
    if folder.startswith("REMOTE:"):
        raise run.error("dataset_dir", "it is on the hub; download dataset_info.json, and give its folder")
    info = None if folder == "ONLINE" else _info(run, Path(folder))
    sources = []
    for name in names:
        if info is not None and name not in info:
            guess = near(name, info)
            hint = f"; did you mean {guess}?" if guess else ""
            raise run.error(key, f"{Path(folder, 'dataset_info.json')} has no data set {name}{hint}")
        entry = {"hf_hub_url": name} if info is None else info[name]
        source = _source(run, name, entry, Path(folder))
        rows = entry.get("num_samples")
        if rows is not None:
            run.note(key, f"LLaMA-Factory draws {rows} rows of {name} at random; here the first ones are taken")
        limits = [n for n in (rows, run.value("max_samples") and run.whole("max_samples")) if n]
        sources.append(source | ({"rows": min(limits)} if limits else {}))
    return sources


def _info(run: Run, folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / "dataset_info.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise run.error(
            "dataset_dir", f"there is no {path}, which tells what a data set is; give --overrides dataset_dir=FOLDER"
        ) from error
    except ValueError as error:
        raise ConvertError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        raise ConvertError(f"{path}: it must be a mapping of names to mappings")
    return content


def _source(run: Run, name: str, entry: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A source of ``halos fit`` for an entry of ``dataset_info.json``."""
    if entry.get("hf_hub_url"):
        source = {"path": entry["hf_hub_url"], "split": entry.get("split", "train")}
        source |= {
            ours: entry[theirs] for ours, theirs in (("name", "subset"), ("data_dir", "folder")) if entry.get(theirs)
        }
        source |= {"streaming": True} if run.flag("streaming") else {}
    elif entry.get("file_name"):
        source = {"path": str(folder / entry["file_name"])}
    else:
        raise run.error(
            "dataset", f"{name} is neither a file nor on the Hugging Face hub; download it, and give a file"
        )
    columns = entry.get("columns", {})
    if lost := [each for each in _MEDIA if columns.get(each)]:
        raise run.error(
            "dataset",
            f"{name} has a column for {', '.join(lost)}, which has no equal here; put such text"
            " into the messages, or choose other data",
        )
    pairs = run.trainer != "kto"
    if not (entry.get("ranking") if pairs else columns.get("kto_tag")):
        what = "pairs (ranking: true)" if pairs else "a label (columns: kto_tag)"
        raise run.error("dataset", f"{name} has no {what} in dataset_info.json, which stage {run.trainer} needs")
    wanted = ("chosen", "rejected") if pairs else ("kto_tag",)
    if missing := [each for each in wanted if not columns.get(each)]:
        raise run.error(
            "dataset", f"dataset_info.json does not name the column {missing[0]} of {name}; add it to columns"
        )
    return source | _schema(run, name, entry, columns, pairs=pairs)


def _schema(run: Run, name: str, entry: dict[str, Any], columns: dict[str, str], *, pairs: bool) -> dict[str, Any]:
    """The row schema of a data set, and our names of its columns where they differ."""
    if entry.get("formatting", "alpaca") == "alpaca":
        if columns.get("query"):
            raise run.error(
                "dataset",
                f"{name} has its prompt in two columns; join {columns.get('prompt')} and"
                f" {columns['query']} in the file",
            )
        named = {"prompt": columns.get("prompt")}
        named |= {"chosen": columns["chosen"], "rejected": columns["rejected"]} if pairs else {}
        named |= {} if pairs else {"completion": columns.get("response"), "label": columns["kto_tag"]}
        schema = "paired" if pairs else "unpaired"
    else:
        tags = _TAGS["conversations"] | entry.get("tags", {})
        ours = next((ours for ours, known in _TAGS.items() if all(tags[k] == v for k, v in known.items())), None)
        if ours is None:
            raise run.error(
                "dataset", f"{name} has tags that are not read; rename them to role, content, user and assistant"
            )
        named = {ours: columns.get("messages", "conversations")}
        named |= (
            {"chosen": columns["chosen"], "rejected": columns["rejected"]} if pairs else {"kto_tag": columns["kto_tag"]}
        )
        schema = {"conversations": "sharegpt", "messages": "messages"}[ours] + ("_pair" if pairs else "")
    if missing := [ours for ours, theirs in named.items() if not theirs]:
        raise run.error(
            "dataset", f"dataset_info.json does not name the column {missing[0]} of {name}; add it to columns"
        )
    renamed = {ours: theirs for ours, theirs in named.items() if ours != theirs}
    return {"schema": schema} | ({"columns": renamed} if renamed else {})
