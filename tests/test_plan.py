"""``halos plan``: counts, memory and layouts from configs alone."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from run_halos import ROOT, binary_data, config
from transformers import AutoConfig, LlamaForCausalLM

from halos_pl.batch import Needs
from halos_pl.cli.main import main
from halos_pl.cli.run_settings import Placement, layout_of
from halos_pl.common.yaml_files import read_yaml
from halos_pl.plan import fake
from halos_pl.plan.cards import CARDS, memory_of
from halos_pl.plan.error import PlanError
from halos_pl.plan.layout import smallest
from halos_pl.plan.memory import Layout, Planner
from halos_pl.plan.optimizer_state import optimizer_memory
from halos_pl.plan.plan import assumed_rows
from halos_pl.plan.run import Settings, parameters_of
from halos_pl.plan.shapes import Shape, read_shape, shipped
from halos_pl.policy.loading import load_model
from halos_pl.policy.moving_reference import PastPolicies, SyncedCopy
from halos_pl.policy.quantized_weights import bytes_of, quantized_layers
from halos_pl.policy.reference import AdapterOff, FrozenCopy, OtherModel
from halos_pl.policy.spec import LoRASpec, ModelSpec, QuantizeSpec

KTO = Needs(reference=True, mismatched=True, undesirable=True)
#: Published numbers of parameters, by size.
PUBLISHED = {
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-30b": 32_528_943_616,
    "mistral-7b": 7_241_732_096,
}


def tiny(layers: int = 2, **settings: Any) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "vocab_size": 512}
    return AutoConfig.for_model("llama", **{**sizes, "num_hidden_layers": layers, **settings})


def settings_of(**changes: Any) -> Settings:
    """A KTO run of a tiny Llama with AdamW."""
    base: dict[str, Any] = {
        "policy": Shape(tiny(), "test"),
        "dtype": "float32",
        "precision": "None",
        "lora": None,
        "gradient_checkpointing": False,
        "reference_model": FrozenCopy(),
        "other": None,
        "other_dtype": "float32",
        "stored": False,
        "needs": KTO,
        "shares_prefixes": True,
        "micro_batch_rows": None,
        "batch_size": 4,
        "make_optimizer": lambda parameters: torch.optim.AdamW(parameters, fused=True),
        "master_weights": True,
    }
    return Settings(**{**base, **changes})


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_shipped_shapes_have_the_published_parameters(name: str) -> None:
    shape = read_shape(ROOT / "halos_pl" / "plan" / "shapes" / f"{name}.yaml")
    counts = parameters_of(fake.meta_model(shape.config))
    assert counts.total == shape.parameters == PUBLISHED[name]
    assert shape.source


def test_the_models_of_the_paper_are_shipped() -> None:
    models = {read_yaml(path)[0].get("model", {}).get("policy", {}).get("path") for path in paper_configs()}
    assert models - {None} <= shipped().keys()
    assert len(models - {None}) == 8


def paper_configs() -> list[Path]:
    return sorted((ROOT / "experiments" / "paper").glob("*.yaml"))


def work_of(config: Any) -> fake.Work:
    return fake.Work(
        config=config,
        alike=True,
        lora=None,
        quantize=None,
        weights=torch.float32,
        adapter=torch.float32,
        autocast=None,
        gradient_checkpointing=True,
        shares_prefixes=True,
        needs=Needs(),
        reference=None,
        adapter_off=False,
        micro_batch_rows=1,
    )


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [64, 1024, 4096])
def test_a_deep_model_needs_what_its_layers_need(vocabulary: int) -> None:
    """The memory computed from two and three layers is that of a run through all of them, part by part.

    With the middle vocabulary, a model of two layers needs the most memory in the backward pass, and one of three in
    the forward pass.
    """
    config, needs = tiny(4), Needs(reference=True, mismatched=True)
    config.vocab_size = vocabulary
    adapter = {"lora": LoRASpec(r=2), "needs": needs, "reference": config, "adapter_off": True}
    batch = assumed_rows(settings_of(batch_size=2, needs=needs), 8, "").batches[0]
    for work in (work_of(config), replace(work_of(config), micro_batch_rows=None, **adapter)):
        for factor in (0, 1):
            found, expected = (
                max(moments, key=lambda m: m.size + factor * m.gradients)
                for moments in (fake.step_memory(work, batch), fake._step(work, batch, 4))
            )
            assert found.parts == pytest.approx(expected.parts, rel=0.01)
            assert found.gradients == pytest.approx(expected.gradients, rel=0.01)


def test_a_model_that_cannot_run_without_data_is_named_in_one_line(caplog: Any, capfd: Any) -> None:
    """torch computes experts in float32, but its fake tensors refuse to; the traceback that it logs is left out."""
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "vocab_size": 512}
    config = AutoConfig.for_model("mixtral", **sizes, num_hidden_layers=2, num_local_experts=4, num_key_value_heads=2)
    batch = assumed_rows(settings_of(batch_size=2, needs=Needs()), 8, "").batches[0]
    with pytest.raises(PlanError, match="the memory of a mixtral cannot be computed"):
        fake.step_memory(work_of(config), batch)
    assert not caplog.records
    assert not capfd.readouterr().err


@pytest.mark.parametrize(
    ("make", "state", "step_on_gpu"),
    [
        (lambda p: torch.optim.AdamW(p, fused=True), 8, 0),
        (torch.optim.AdamW, 8, 4),
        (lambda p: torch.optim.RMSprop(p, lr=1e-6), 4, 4),
        (lambda p: torch.optim.SGD(p, lr=1e-3), 0, 0),
        (lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9), 4, 0),
    ],
    ids=["AdamW", "AdamW not fused", "RMSprop", "SGD", "SGD with momentum"],
)
def test_the_optimizer_is_measured(make: Any, state: float, step_on_gpu: float) -> None:
    measured = optimizer_memory(make, vectors=True, cuda=True)
    assert (measured.matrix, measured.vector) == (state, state)
    assert measured.step == pytest.approx(step_on_gpu, abs=0.01)


def test_bytes_per_parameter() -> None:
    run = settings_of()
    n = run.parameters.total
    assert Planner(run).lasting(Layout()) == {
        "weights": 4 * n,
        "master weights": 0,
        "optimizer state": 8 * n,
        "reference": 4 * n,
        "gradient buckets": 0,
    }
    half = Planner(settings_of(precision="bf16-true")).lasting(Layout())
    # With their float32 gradients, 18 bytes per trained parameter.
    assert [half[part] / n for part in ("weights", "master weights", "optimizer state", "reference")] == [2, 4, 8, 2]
    assert Planner(run).lasting(Layout(2))["gradient buckets"] == 4 * n
    sharded = Planner(settings_of(precision="bf16-mixed")).lasting(Layout(4, sharded=True))
    assert [sharded[part] / n for part in ("weights", "optimizer state", "reference")] == pytest.approx(
        [1, 2, 0.5], rel=1e-3
    )
    hybrid = Planner(run).lasting(Layout(4, sharded=True, replicas=2))
    assert hybrid["weights"] == 2 * n
    moving = Planner(settings_of(reference_model=SyncedCopy(every=1))).lasting(Layout())
    assert moving["reference"] == 8 * n
    past = Planner(settings_of(reference_model=PastPolicies(every=1, keep=3, start=0.5))).lasting(Layout())
    assert past["reference"] == 16 * n


def test_an_adapter_is_counted_apart() -> None:
    lora = settings_of(lora=LoRASpec(r=4), reference_model=AdapterOff(), dtype="bfloat16")
    counts = lora.parameters
    assert counts.total == settings_of().parameters.total
    assert counts.trained == counts.adapter > 0
    parts = Planner(lora).lasting(Layout())
    assert parts["reference"] == 0
    assert parts["optimizer state"] == 8 * counts.adapter
    assert parts["weights"] == 2 * counts.total + 4 * counts.adapter  # peft's adapters are float32


def test_modules_that_are_trained_whole_are_counted_apart() -> None:
    shape = Shape(tiny(), "test", settings_of().parameters.total)
    run = settings_of(policy=shape, lora=LoRASpec(r=4, modules_to_save=["lm_head"]), reference_model=AdapterOff())
    plain = settings_of(policy=shape, lora=LoRASpec(r=4), reference_model=AdapterOff())
    assert run.parameters.adapter == plain.parameters.adapter + 512 * 64
    assert run.parameters.trained == run.parameters.adapter


@pytest.mark.slow
def test_a_run_that_cannot_be_sharded_gets_one_card() -> None:
    """On a card that is too small for the whole model and large enough for half of it."""
    planner = Planner(settings_of(batch_size=2))
    rows = assumed_rows(planner.settings, 2, "test")
    one, two = (
        planner.memory(layout, rows, gradient_checkpointing=True, micro_batch_rows=1).total
        for layout in (Layout(), Layout(2, sharded=True))
    )
    assert two < one
    several, alone = (smallest(planner, rows, size) for size in ((one + two) / 2, 2 * one))
    assert several is not None
    assert several.layout == Layout(2, sharded=True)
    planner.settings = replace(planner.settings, unsharded="it cannot be sharded")
    assert smallest(planner, rows, (one + two) / 2) is None
    assert smallest(planner, rows, 2 * one) == alone
    assert alone is not None
    assert alone.layout == Layout()


def test_another_model_as_reference_keeps_its_dtype() -> None:
    other = settings_of(other=Shape(tiny(), "test"), other_dtype="bfloat16", reference_model=OtherModel(ModelSpec("x")))
    assert Planner(other).lasting(Layout())["reference"] == 2 * other.parameters.total


def test_the_embedding_of_a_sharded_quantised_base_is_gathered_in_full() -> None:
    """As much as the plain model's, and layers of an eighth of their size."""
    lora = LoRASpec(r=4)
    plain, quantised = (
        Planner(settings_of(lora=lora, reference_model=AdapterOff(), quantize=quantize))
        for quantize in (None, QuantizeSpec("bitsandbytes", 4, double_quant=False))
    )
    rows = assumed_rows(plain.settings, 8, "test")
    layout = Layout(2, sharded=True)
    of_plain, of_quantised = (
        planner.memory(layout, rows, gradient_checkpointing=False, micro_batch_rows=None).parts["gathered weights"]
        for planner in (plain, quantised)
    )
    outside = 4 * plain.settings.parameters.outside
    assert outside + (of_plain - outside) / 8 == pytest.approx(of_quantised, rel=0.1)


@pytest.mark.parametrize(
    ("devices", "number"), [("0,1,2,3", 4), ("2", 2), (3, 3), ([0, 5], 2), ("auto", 1), (-1, 1), ("-1", 1), ("7,", 1)]
)
def test_devices_are_counted_as_lightning_counts_them(devices: Any, number: int) -> None:
    placement = Placement("gpu", devices, 1, "auto", "None")
    assert layout_of(placement, devices=None, nodes=None, strategy=None, replicas=None).cards == number


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_takes_the_planned_memory(bits: Any, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    config = tiny(hidden_size=256, intermediate_size=640)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    lora, quantize = LoRASpec(r=4), QuantizeSpec("torchao", bits)
    model = load_model(ModelSpec(str(tmp_path), lora=lora, quantize=quantize))
    layers = dict(quantized_layers(model))
    others = sum(p.numel() for name, p in model.named_parameters() if name.removesuffix(".weight") not in layers)
    measured = sum(map(bytes_of, layers.values())) + 4 * others
    run = settings_of(policy=Shape(config, "test"), lora=lora, reference_model=AdapterOff(), quantize=quantize)
    assert Planner(run).lasting(Layout())["weights"] == pytest.approx(measured, rel=0.03)


def test_micro_batches_and_checkpointing_save_activations() -> None:
    run = settings_of(batch_size=2)
    planner, rows = Planner(run), assumed_rows(run, 64, "")

    def kept(checkpointing: bool, micro: int | None) -> int:
        memory = planner.memory(Layout(), rows, gradient_checkpointing=checkpointing, micro_batch_rows=micro)
        return memory.peak.get("activations", 0)

    assert kept(False, 1) < kept(False, None)
    assert kept(True, 1) < kept(False, 1)


@pytest.mark.slow
def test_the_smallest_layout_grows_as_cards_shrink() -> None:
    run = settings_of(batch_size=4)
    planner, rows = Planner(run), assumed_rows(run, 200, "")
    own = planner.memory(Layout(), rows, gradient_checkpointing=False, micro_batch_rows=None).total
    roomy, tight = smallest(planner, rows, own + 1), smallest(planner, rows, 0.6 * own)
    assert roomy is not None
    assert (roomy.layout.cards, roomy.layout.sharded, roomy.gradient_checkpointing) == (1, False, False)
    assert tight is not None
    assert tight.memory.total <= 0.6 * own
    assert tight.gradient_checkpointing
    assert smallest(planner, rows, 1000) is None


def test_wrong_layouts_and_cards_are_refused() -> None:
    with pytest.raises(PlanError, match=r"--replicas 3 .*8 devices"):
        Layout(8, sharded=True, replicas=3)
    with pytest.raises(PlanError, match=r"--replicas 2 .*fsdp2"):
        Layout(8, replicas=2)
    with pytest.raises(PlanError, match=r"h100-81gb.*h100-80gb"):
        memory_of("h100-81gb")
    assert [memory_of(name.upper()) for name in CARDS] == [size * 1e9 for size in CARDS.values()]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("config: {hidden_size: 8}", "model_type"),
        ("config: {model_type: nope}", "nope"),
        ("config:\n  model_type: lama", r"yaml:2: .*llama"),
        ("layers: 3\nconfig: {model_type: llama}", "layers"),
        ("config: {model_type: llama}\nparameters: many", "many"),
    ],
)
def test_a_wrong_shape_is_named(text: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "shape.yaml").write_text(text)
    with pytest.raises(PlanError, match=named) as error:
        read_shape(tmp_path / "shape.yaml")
    assert str(tmp_path / "shape.yaml") in str(error.value)
    assert len(str(error.value)) < 300


def test_a_shape_with_other_parameters_than_published_is_refused() -> None:
    with pytest.raises(PlanError, match="parameters is 5"):
        _ = settings_of(policy=Shape(tiny(), "test", 5)).parameters


# -- the command ----------------------------------------------------------------------------------------


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    main(["plan", *words, "--format", "json"])
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    return content


def test_the_command_counts_local_data(
    tiny_folder: Path, no_model: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Counts are those of the data module; no weights are read."""
    data = binary_data(tmp_path / "rows.jsonl")
    words = ["--objective", "kto", f"--model.policy.path={tiny_folder}", f"--data.train={data}", "--data.batch_size=4"]
    plan = planned(capsys, *words, "--device", "h100-80gb", "--json_file", str(tmp_path / "new" / "plan.json"))
    assert json.loads((tmp_path / "new" / "plan.json").read_text()) == plan
    assert plan["parameters"]["total"] == plan["parameters"]["trained"] > 0
    assert plan["rows"]["steps_per_epoch"] == 3
    assert 0 < plan["rows"]["tokens_per_step"] < 4 * 2 * 64
    assert plan["flops_per_step"] > 6 * plan["rows"]["tokens_per_step"]
    assert plan["card"]["fits"] is True
    assert plan["smallest"]["h100-80gb"]["devices"] == 1
    assert plan["memory"]["total"] == sum(plan["memory"]["parts"].values())


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--device", "h1000"], "h1000"),
        (["--device", "h100-80gb", "--memory", "80"], "--memory"),
        (["--devices", "0"], "--devices"),
        (["--devices", "4", "--strategy", "fsdp2", "--replicas", "3"], "--replicas 3"),
        (["--devices", "64", "--length", "8"], "64 devices"),
        (["--model.policy.path", "nobody/nothing"], "nobody/nothing"),
        (["--shape", "missing.yaml"], "missing.yaml: the shape"),
        (["--trainer.strategy", "deepspeed"], "fsdp2"),
        (["--strategy", "deepspeed_stage_3"], "DeepSpeed's engine"),
        (["--strategy", "ddp_spawn"], "Use ddp"),
        (["--strategy", "nope"], "nope"),
        (["--model.policy.liger=true", "--trainer.accelerator=cpu"], "model.policy.liger"),
        (["--model.reference_point=SampledKL", "--trainer.strategy=fsdp2"], "reference_point"),
        (["--trainer.devices", "0"], "trainer.devices"),
        (["--trainer.num_nodes", "0"], "trainer.num_nodes"),
        (["--model.policy.lora.modules_to_save", "[nope]"], "halos: ModelError: model.policy.lora.modules_to_save"),
        (["--model.policy.lora.use_dora=true", "--trainer.strategy=fsdp2", "--devices=2"], "use_dora"),
        (["--model.policy.lora.r=2", "--model.policy.quantize.method=torchao", "--strategy=fsdp2"], "quantize"),
        (
            ["--model.policy.lora.r=2", "--model.policy.quantize.method=torchao", "--trainer.precision=bf16-true"],
            "bf16-true",
        ),
        (
            ["--model.policy.lora.r=2", "--model.policy.quantize={method: torchao, bits: 4, group_size: 48}"],
            "group_size is 48",
        ),
    ],
)
def test_wrong_words_are_one_line(
    words: list[str], named: str, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [] if "--model.policy.path" in words else [f"--model.policy.path={tiny_folder}"]
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--objective", "kto", *model, *words])
    assert ended.value.code == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("halos: ")
    assert named in error


@pytest.mark.slow
@pytest.mark.parametrize("path", paper_configs(), ids=lambda path: path.stem)
def test_every_config_of_the_paper_can_be_planned(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if path.stem == "settings":
        return
    plan = planned(capsys, config("paper/settings").partition("=")[2], str(path), "--objective", "kto")
    assert plan["smallest"].keys() == {"80 GB", "141 GB"}
    cards = [fit["devices"] for fit in plan["smallest"].values() if fit]
    assert len(cards) == 2
    assert cards[0] >= cards[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        *("kto", "kto_micro_2", "kto_checkpointing", "dpo", "dpo_lora", "kto_torchao_8", "kto_torchao_4"),
        "kto_torchao_4_checkpointing",
    ],
)
def test_the_plan_is_within_a_fifth_of_a_run(case: str, tmp_path: Path) -> None:
    if "torchao" in case:
        pytest.importorskip("torchao")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import plan_memory

    plan_memory.prepare(tmp_path)
    plan, used, _ = plan_memory.compare(case, tmp_path, kept=False)
    assert plan.total == pytest.approx(used, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_the_plan_of_several_ranks_is_within_a_fifth(strategy: str) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import plan_memory

    plan, used = plan_memory.compare_ranks(strategy)
    assert plan.total == pytest.approx(used, rel=0.2)
