"""Attention over shared prefixes, computed in one of three ways with the same result.

A token attends to the tokens up to it in its row: its prompt, and its own completion. ``loop`` calls torch's attention
for each prefix; it runs everywhere, and is the only one on a CPU. On a GPU, one call computes a whole layer: ``varlen``
treats each completion as a sequence whose keys are gathered from its prompt and itself, and ``flex`` masks all other
tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from halos_pl.policy.upload import ramps, repeats, upload


@dataclass(frozen=True)
class SharedPrefix:
    """The position of a prompt and its completions in the packed sequence.

    Attributes:
        slot: Index of the prompt.
        prompt: (start, stop) of the prompt's tokens; in the earlier pass if ``earlier``.
        branches: (start, stop) of each completion's tokens, contiguous, after those of the prompt.
        rows: Number of each completion's row.
        earlier: Whether the prompt's keys and values come from an earlier pass.
    """

    slot: int
    prompt: tuple[int, int]
    branches: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    earlier: bool = False

    @property
    def before(self) -> int:
        """Number of tokens of the prompt."""
        return self.prompt[1] - self.prompt[0]

    @property
    def own(self) -> int:
        """Number of tokens in this pass."""
        return sum(b - a for a, b in self.branches) + (0 if self.earlier else self.before)


class Indices(NamedTuple):
    """The tokens of a pass, on the device; T queries, and K keys over S sequences.

    Attributes:
        positions: LongTensor [T], position of each token in its row.
        slots: LongTensor [T], prompt of each token.
        rows: LongTensor [T], row of each completion token, -1 for prompt tokens.
        gather: LongTensor [K], keys of all sequences, as positions among the tokens of the earlier pass, if its keys
            are used, followed by those of this pass.
        query_ends, key_ends: IntTensor [S + 1], cumulative lengths of the sequences.
    """

    positions: Tensor
    slots: Tensor
    rows: Tensor
    gather: Tensor
    query_ends: Tensor
    key_ends: Tensor


class Layout:
    """The prefixes of one pass, and the keys and values that it keeps for a later one.

    This is a plain class because FSDP copies the dataclasses among the arguments of a layer, and the copy's ``kept``
    would be lost.

    Args:
        prefixes: Prefixes in the order of the packed sequence.
        earlier: Layout of the pass whose keys and values some prefixes use.

    Attributes:
        size: Number of tokens.
        keep: Whether to keep keys and values for a later pass.
        kept: Keys and values [1, heads, size, width] of all tokens, without gradient, by layer.
        windows: Sliding windows that the layers passed to their attention.
        sequences: For each branch, the number of its queries and the spans (start, stop) of its keys; the first branch
            includes its prompt unless that comes from an earlier pass.
    """

    def __init__(self, prefixes: Sequence[SharedPrefix], earlier: Layout | None = None) -> None:
        self.prefixes = list(prefixes)
        self.earlier = earlier if any(prefix.earlier for prefix in prefixes) else None
        self.size = sum(prefix.own for prefix in prefixes)
        self.keep = False
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.windows: set[int | None] = set()
        self.sequences = self._sequences()
        self._indices: Indices | None = None
        self._masks: dict[Any, Tensor] = {}
        self._block_masks: dict[int | None, BlockMask] = {}

    def _sequences(self) -> list[tuple[int, list[tuple[int, int]]]]:
        sequences = []
        offset = 0 if self.earlier is None else self.earlier.size
        for prefix in self.prefixes:
            branches = [(offset + a, offset + b) for a, b in prefix.branches]
            shift = 0 if prefix.earlier else offset
            prompt = prefix.prompt[0] + shift, prefix.prompt[1] + shift
            if not prefix.earlier:
                stop, branches = (branches[0][1] if branches else prompt[1]), branches[1:]
                sequences.append((stop - prompt[0], [(prompt[0], stop)]))
            sequences += [(b - a, [prompt, (a, b)]) for a, b in branches]
        return sequences

    # -- indices --------------------------------------------------------------------------------------

    @property
    def longest(self) -> tuple[int, int]:
        """Number of queries and of keys of the longest sequence."""
        keys = [sum(b - a for a, b in spans) for _, spans in self.sequences]
        return max(n for n, _ in self.sequences), max(keys)

    def positions(self) -> Tensor:
        """LongTensor [size] on the CPU, the position of each token in its row."""
        return ramps([(0 if row < 0 else prefix.before, n) for prefix, row, n in self._pieces()])

    def _pieces(self) -> list[tuple[SharedPrefix, int, int]]:
        """(prefix, row, number of tokens) of each prompt, whose row is -1, and completion."""
        pieces = []
        for prefix in self.prefixes:
            pieces += [] if prefix.earlier else [(prefix, -1, prefix.before)]
            pieces += [(prefix, row, b - a) for row, (a, b) in zip(prefix.rows, prefix.branches, strict=True)]
        return pieces

    def columns(self) -> list[Tensor]:
        """The :class:`Indices` as LongTensors on the CPU."""
        pieces = self._pieces()
        return [
            self.positions(),
            repeats([(prefix.slot, n) for prefix, _, n in pieces]),
            repeats([(row, n) for _, row, n in pieces]),
            ramps([(a, b - a) for _, spans in self.sequences for a, b in spans]),
            *(
                torch.tensor([0, *accumulate(lengths)], device="cpu")
                for lengths in zip(*((n, sum(b - a for a, b in spans)) for n, spans in self.sequences), strict=True)
            ),
        ]

    def place(self, columns: Sequence[Tensor]) -> None:
        """Sets the indices from :meth:`columns` that were copied to the device."""
        *tokens, query_ends, key_ends = columns
        self._indices = Indices(*tokens, query_ends.int(), key_ends.int())  # type: ignore[call-arg]

    def indices(self, device: torch.device) -> Indices:
        """The indices on the device, copied now unless :meth:`place` has set them."""
        if self._indices is None:
            self.place(upload(self.columns(), device))
        assert self._indices is not None
        return self._indices

    # -- masks ----------------------------------------------------------------------------------------

    def mask(self, before: int, lengths: tuple[int, ...], window: int | None, device: torch.device) -> Tensor:
        """Attention mask, BoolTensor [sum(lengths), before + sum(lengths)], of completions after ``before`` tokens."""
        key = (before, lengths, window)
        if key not in self._masks:
            size = sum(lengths)
            branch = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
            position = torch.cat([torch.arange(length) for length in lengths])
            causal = (branch[:, None] == branch[None, :]) & (position[:, None] >= position[None, :])
            mask = torch.cat([torch.ones(size, before, dtype=torch.bool), causal], dim=1)
            if window is not None:
                where = torch.cat([torch.arange(before), before + position])
                mask &= (before + position)[:, None] - where[None, :] < window
            self._masks[key] = mask.to(device)
        return self._masks[key]

    def block_mask(self, window: int | None, device: torch.device) -> BlockMask:
        """The mask of all tokens for FlexAttention, [1, 1, T, T] or, with the keys of an earlier pass before, more."""
        if window not in self._block_masks:
            at, slot, row = queries = self.indices(device)[:3]
            key_at, key_slot, key_row = queries
            if self.earlier is not None:
                before = self.earlier.indices(device)[:3]
                key_at, key_slot, key_row = (torch.cat(pair) for pair in zip(before, queries, strict=True))

            def visible(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
                ahead = at[q] - key_at[k]
                same = (slot[q] == key_slot[k]) & ((key_row[k] == -1) | (key_row[k] == row[q]))
                inside = same & (ahead >= 0)
                return inside if window is None else inside & (ahead < window)

            self._block_masks[window] = create_block_mask(visible, None, None, self.size, len(key_at), device=device)
        return self._block_masks[window]

    def with_earlier(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [1, heads, K, width], those of the earlier pass before those of this one."""
        if self.earlier is None:
            return key, value
        before = self.earlier.kept[layer]
        return torch.cat([before[0], key], dim=2), torch.cat([before[1], value], dim=2)


class Attend(Protocol):
    """Attention over a layout.

    Args:
        layout: Layout of T tokens.
        layer: Number of the layer.
        query, key, value: [1, heads, T, width]; keys and values may have fewer heads.
        scale: Factor of the products of queries and keys; None for ``width ** -0.5``.
        window: Number of tokens that a token sees, including itself; None for all.
        dropout: Probability of dropping a weight; only ``loop`` supports one.

    Returns:
        [1, T, heads, width].
    """

    def __call__(
        self,
        layout: Layout,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
        dropout: float = 0.0,
    ) -> Tensor: ...


def loop(
    layout: Layout,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Two calls of torch's attention for each prefix: the prompt with its first completion, and the others.

    On a CPU, in float32: there, the backward pass of torch's attention takes two to four times as long in bfloat16.
    """
    groups, dtype = query.shape[1] // key.shape[1], _dtype(query)
    widened = query.device.type == "cpu" and dtype.itemsize == 2
    if widened:
        query, key, value = query.float(), key.float(), value.float()

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        shared = groups > 1 and q.device.type == "cpu"  # elsewhere, not every kernel with a mask shares heads
        if groups > 1 and not shared:
            k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        with torch.autocast("cpu", enabled=False) if widened else nullcontext():
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale, is_causal=mask is None, enable_gqa=shared
            )

    # Split, not sliced: the backward pass of each slice would allocate zeros for the whole sequence.
    sizes = [prefix.own for prefix in layout.prefixes]
    out = []
    for prefix, q, k, v in zip(layout.prefixes, *(x.split(sizes, dim=2) for x in (query, key, value)), strict=True):
        rest = tuple(b - a for a, b in prefix.branches)
        if prefix.earlier:
            assert layout.earlier is not None
            k_prompt, v_prompt = (x[:, :, slice(*prefix.prompt)].to(query.dtype) for x in layout.earlier.kept[layer])
        else:
            # The prompt and its first completion form one causal sequence, which needs no mask.
            n, rest = prefix.before + sum(rest[:1]), rest[1:]
            narrow = window is not None and n > window
            mask = layout.mask(0, (n,), window, query.device) if narrow else None
            if rest:
                pieces = prefix.before, n - prefix.before, q.shape[2] - n
                (k_prompt, k_first, k), (v_prompt, v_first, v) = (x.split(pieces, dim=2) for x in (k, v))
                first, q = q.split((n, q.shape[2] - n), dim=2)
                whole = torch.cat([k_prompt, k_first], dim=2), torch.cat([v_prompt, v_first], dim=2)
                out.append(attend(first, *whole, mask))
            else:
                out.append(attend(q, k, v, mask))
        if rest:
            narrow_window = window if window is not None and prefix.before + max(rest) > window else None
            joined = torch.cat([k_prompt, k], dim=2), torch.cat([v_prompt, v], dim=2)
            out.append(attend(q, *joined, layout.mask(prefix.before, rest, narrow_window, query.device)))
    joined_out = torch.cat(out, dim=2).transpose(1, 2).contiguous()
    return joined_out.to(dtype) if widened else joined_out


def _inputs(layout: Layout, layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values in the dtype of an autocast: unlike torch's attention, the kernels do not cast."""
    key, value = layout.with_earlier(layer, key, value)
    dtype = _dtype(query)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def varlen(
    layout: Layout,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """One call of FlashAttention over sequences of different lengths, whose causal mask ends at the last key."""
    assert not dropout
    indices = layout.indices(query.device)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in _inputs(layout, layer, query, key, value))
    if len(indices.gather) > len(k) or layout.earlier is not None:
        k, v = k.index_select(0, indices.gather), v.index_select(0, indices.gather)
    most_queries, most_keys = layout.longest
    before = -1 if window is None or most_keys <= window else window - 1
    out = varlen_attn(
        q,
        k,
        v,
        indices.query_ends,
        indices.key_ends,
        most_queries,
        most_keys,
        scale=scale,
        window_size=(before, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.unsqueeze(0)  # type: ignore[union-attr]


@functools.cache
def _flex(device: str) -> Callable[..., Tensor]:
    """FlexAttention, compiled except on a CPU, where only tests call it."""
    return flex_attention if device == "cpu" else torch.compile(flex_attention, dynamic=True)  # type: ignore[return-value]


def flex(
    layout: Layout,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """One call of FlexAttention, whose mask skips blocks of tokens that do not see each other."""
    assert not dropout
    q, k, v = _inputs(layout, layer, query, key, value)
    mask = layout.block_mask(window, q.device)
    shared = q.shape[1] != k.shape[1]
    out = _flex(q.device.type)(q, k, v, block_mask=mask, scale=scale, enable_gqa=shared)
    return out.transpose(1, 2).contiguous()


# -- selection ------------------------------------------------------------------------------------------


def _dtype(query: Tensor) -> torch.dtype:
    """The dtype in which attention is computed."""
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype


def _runs_varlen(query: Tensor, value: Tensor) -> bool:
    """Whether torch's FlashAttention supports the tensors and the device."""
    if torch.version.cuda is None or _dtype(query) not in (torch.float16, torch.bfloat16):
        return False
    major, minor = torch.cuda.get_device_capability(query.device)
    width = query.shape[-1]
    widest = 256 if (major, minor) in ((8, 0), (9, 0), (10, 0)) else 192  # others lack the memory for the backward pass
    return major >= 8 and width == value.shape[-1] and width % 8 == 0 and width <= widest


def _runs_flex(query: Tensor) -> bool:
    """Whether FlexAttention supports the tensors, and its compiler is installed."""
    dtypes = torch.float16, torch.bfloat16, torch.float32
    return _dtype(query) in dtypes and query.shape[-1] >= 16 and find_spec("triton") is not None


def choose(query: Tensor, value: Tensor, dropout: float) -> Attend:
    """The fastest attention for a layer's queries and values [1, heads, tokens, width]."""
    if query.device.type != "cuda" or dropout:
        return loop
    return varlen if _runs_varlen(query, value) else flex if _runs_flex(query) else loop
