"""The kernels of attention over shared prefixes: all give what the loop over prefixes gives."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_families import MODELS
from shared_rows import batches, example, model, results
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from halos_pl.batch import TokenBatch
from halos_pl.policy import prefix_sharing, scorer, shared_attention
from halos_pl.policy.prefix_sharing import shared_logps
from halos_pl.policy.scorer import Scorer
from halos_pl.policy.shared_attention import Attend, Layout, SharedPrefix, choose, flex, loop, varlen
from halos_pl.policy.spec import ModelError
from halos_pl.policy.upload import upload


def plain_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    most_queries: int,
    most_keys: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.attention.varlen.varlen_attn`` as its documentation defines it, a sequence and a head at a time."""
    before, after = window_size
    assert after == 0  # causal
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert query_ends.dtype == key_ends.dtype == torch.int32
    ends = list(zip(query_ends.tolist(), key_ends.tolist(), strict=True))
    assert ends[0] == (0, 0)
    assert ends[-1] == (len(query), len(key))
    out = []
    for (q0, k0), (q1, k1) in itertools.pairwise(ends):
        assert 0 < q1 - q0 <= most_queries
        assert q1 - q0 <= k1 - k0 <= most_keys
        # The last query sees the last key.
        ahead = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0) - torch.arange(k1 - k0)[None]
        seen = (ahead >= 0) & ((ahead <= before) | torch.tensor(before < 0))
        heads = []
        for head in range(query.shape[1]):
            shared = head // (query.shape[1] // key.shape[1])
            q, k, v = query[q0:q1, head], key[k0:k1, shared], value[k0:k1, shared]
            scores = (q @ k.T) * (scale or 1 / math.sqrt(query.shape[2]))
            weights = torch.where(seen, scores, -math.inf).softmax(dim=1)
            heads.append(weights @ v)
        out.append(torch.stack(heads, dim=1))
    return torch.cat(out)


@pytest.fixture(autouse=True)
def _no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU has no kernel for sequences of different lengths."""
    monkeypatch.setattr(shared_attention, "varlen_attn", plain_varlen)


@st.composite
def passes(draw: st.DrawFn) -> tuple[Layout, Layout | None]:
    """A pass, and a later one that uses some of its keys: prompts of 1 to 5 tokens with 0 to 4 completions each."""

    def prefix(slot: int, size: int, prompt: tuple[int, int] | None, least: int) -> tuple[SharedPrefix, int]:
        earlier = prompt is not None
        if prompt is None:
            prompt = size, size + draw(st.integers(1, 5))
            size = prompt[1]
        lengths = draw(st.lists(st.integers(1, 4), min_size=least, max_size=4))
        ends = [size + sum(lengths[:i]) for i in range(len(lengths) + 1)]
        rows = tuple(100 * slot + 10 * earlier + i for i in range(len(lengths)))
        return SharedPrefix(slot, prompt, tuple(itertools.pairwise(ends)), rows, earlier), ends[-1]

    def layout(slots: list[int], earlier: Layout | None) -> Layout:
        prompts = {p.slot: p.prompt for p in earlier.prefixes} if earlier else {}
        prefixes, size = [], 0
        for slot in slots:
            each, size = prefix(slot, size, prompts.get(slot), least=0 if size or slot not in prompts else 1)
            prefixes.append(each)
        return Layout(prefixes, earlier)

    first = layout(draw(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True)), None)
    if draw(st.booleans()):
        return first, None
    return first, layout(draw(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True)), first)


def both(
    attend: Attend, layouts: tuple[Layout, Layout | None], heads: tuple[int, int], gradient: bool, **options: Any
) -> list[Tensor]:
    """Outputs of a layer in both passes, and the gradients of the first pass's queries, keys and values."""
    draw = torch.Generator().manual_seed(0)
    found: list[Tensor] = []
    for layout in layouts:
        if layout is None:
            break
        inputs = [
            torch.randn(1, n, layout.size, 16, generator=draw, dtype=torch.float64) for n in (heads[0], *heads[1:] * 2)
        ]
        if gradient:
            inputs = [each.requires_grad_() for each in inputs]
        layout.kept[3] = inputs[1].detach(), inputs[2].detach()
        out = attend(layout, 3, *inputs, **options)
        found.append(out.detach())
        if gradient:
            weights = torch.randn(out.shape, generator=draw, dtype=out.dtype)
            found += torch.autograd.grad((out * weights).sum(), inputs)
    return found


@given(
    layouts=passes(),
    heads=st.sampled_from([(2, 2), (4, 2), (4, 1)]),
    window=st.none() | st.integers(1, 9),
    scale=st.sampled_from([None, 0.7]),
)
@settings(max_examples=60)
def test_sequences_with_gathered_keys_equal_the_loop(
    layouts: tuple[Layout, Layout | None], heads: tuple[int, int], window: int | None, scale: float | None
) -> None:
    wanted, found = (both(attend, layouts, heads, True, window=window, scale=scale) for attend in (loop, varlen))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.slow  # each example traces its mask anew
@given(layouts=passes(), heads=st.sampled_from([(2, 2), (4, 2)]), window=st.none() | st.integers(1, 9))
@settings(max_examples=20)
def test_the_block_mask_equals_the_loop(
    layouts: tuple[Layout, Layout | None], heads: tuple[int, int], window: int | None
) -> None:
    wanted, found = (both(attend, layouts, heads, False, window=window) for attend in (loop, flex))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def use(patch: pytest.MonkeyPatch, attend: Attend) -> list[Layout]:
    """Makes all layers use ``attend``, and returns a list that collects their layouts."""
    layouts: list[Layout] = []

    def attention(layout: Layout, *inputs: Any, **options: Any) -> Tensor:
        layouts.append(layout)
        return attend(layout, *inputs, **options)

    patch.setattr(prefix_sharing, "choose", lambda *_: attention)
    return layouts


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral, window", "gemma3, window"])
@given(batch=batches())
@settings(max_examples=5)
def test_log_probs_and_gradients_of_a_model_equal_the_loop(name: str, batch: TokenBatch) -> None:
    tested = model(name)
    logps, gradients = results(tested, batch, shared_logps)
    with pytest.MonkeyPatch.context() as patch:
        use(patch, varlen)
        others, other_gradients = results(tested, batch, shared_logps)
    torch.testing.assert_close(others, logps, rtol=1e-5, atol=1e-5)
    assert other_gradients.keys() == gradients.keys()
    most = max((float(g.abs().max()) for g in gradients.values()), default=0)
    for key, gradient in gradients.items():
        assert float((other_gradients[key] - gradient).abs().max()) <= 1e-5 * most, key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral, window", *(pytest.param(n, marks=pytest.mark.slow) for n in MODELS)])
@given(batch=batches())
@settings(max_examples=2)
def test_log_probs_by_flex_attention_equal_the_loop(name: str, batch: TokenBatch) -> None:
    tested = model(name).requires_grad_(False)  # on a CPU, FlexAttention has no backward pass
    logps = results(tested, batch, shared_logps)[0]
    with pytest.MonkeyPatch.context() as patch:
        use(patch, flex)
        torch.testing.assert_close(results(tested, batch, shared_logps)[0], logps, rtol=1e-5, atol=1e-5)


def test_one_copy_of_the_indices_serves_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[int] = []

    def counted(columns: Any, device: torch.device) -> list[Tensor]:
        copies.append(len(columns))
        return upload(columns, device)

    monkeypatch.setattr(shared_attention, "upload", counted)
    layouts = use(monkeypatch, varlen)
    tested = model("llama")
    tested.config._attn_implementation = prefix_sharing.NAME
    shared_logps(tested, example(0))
    assert len(layouts) == 4  # two layers in two passes
    assert len({id(layout) for layout in layouts}) == len(copies) == 2
    assert not any(layout.kept or layout.keep for layout in layouts)  # freed once the mismatched rows are computed


@pytest.mark.slow
def test_a_pass_copies_once_and_never_waits_for_the_device() -> None:
    """``on_fake_gpu.py`` fails where something reads a value from the device."""
    program = Path(__file__).with_name("on_fake_gpu.py")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["copies"] == {"to": 1}
    # One call for each of two layers, in the pass with gradient and that of mismatched rows.
    assert found["kernels"] == {"torch_attn._varlen_attn": 4, "torch_attn._varlen_attn_backward": 2}
    assert found["products added in float32"] > 0


@pytest.mark.parametrize(
    ("dtype", "width", "capability", "dropout", "expected"),
    [
        (torch.bfloat16, 64, (9, 0), 0.0, varlen),
        (torch.float16, 256, (8, 0), 0.0, varlen),
        (torch.float32, 64, (9, 0), 0.0, flex),
        (torch.bfloat16, 64, (7, 5), 0.0, flex),
        (torch.bfloat16, 256, (8, 9), 0.0, flex),
        (torch.bfloat16, 192, (8, 9), 0.0, varlen),
        (torch.bfloat16, 288, (9, 0), 0.0, flex),
        (torch.bfloat16, 20, (9, 0), 0.0, flex),
        (torch.float32, 8, (9, 0), 0.0, loop),
        (torch.float64, 64, (9, 0), 0.0, loop),
        (torch.bfloat16, 64, (9, 0), 0.1, loop),
    ],
)
def test_a_gpu_uses_the_fastest_kernel_that_it_supports(
    dtype: torch.dtype,
    width: int,
    capability: tuple[int, int],
    dropout: float,
    expected: Attend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(shared_attention, "find_spec", lambda name: True)  # Triton
    with FakeTensorMode():
        x = torch.empty(1, 2, 3, width, dtype=dtype, device="cuda")
        assert choose(x, x, dropout) is expected
        assert choose(torch.empty(1, 2, 3, width, dtype=dtype), x, dropout) is loop


@pytest.mark.parametrize("sharing", ["auto", "always", "never"])
@pytest.mark.parametrize("right", [True, False])
def test_the_self_test_is_repeated_once_where_a_model_computes_next(
    sharing: Any, right: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tests: list[str] = []

    def fault(name: str, why: str | None) -> Any:
        return lambda *_: tests.append(name) or why

    made = Scorer(model("llama"), prefix_sharing=sharing, name="the policy")
    assert made.shares_prefixes == (sharing != "never")
    monkeypatch.setattr(scorer, "sharing_fault", fault("sharing", None if right else "its log-probs change"))
    monkeypatch.setattr(scorer, "padding_fault", fault("padding", None))
    batch = example(0)
    wanted = made(batch)
    assert tests == []
    monkeypatch.setattr(Scorer, "_kernels", ("cuda", torch.bfloat16))
    if sharing == "always" and not right:
        with pytest.raises(ModelError, match=r"the policy.*its log-probs change"):
            made(batch)
        return
    for _ in range(2):
        torch.testing.assert_close(made(batch), wanted, rtol=1e-5, atol=1e-5)
    shares = sharing != "never" and right
    assert made.shares_prefixes == shares
    assert made.model.config._attn_implementation == (Scorer.attention if shares else "sdpa")
    assert tests == {"never": ["padding"], "auto": ["sharing"] if right else ["sharing", "padding"]}.get(
        sharing, ["sharing"]
    )
    assert ("its log-probs change" in caplog.text) == (sharing == "auto" and not right)
    if not shares:
        with pytest.raises(ModelError, match=r"model\.prefix_sharing"):
            made(batch, wanted="states")
