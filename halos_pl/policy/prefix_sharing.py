"""Prefix sharing: every distinct prompt is computed once for all rows that share it, without padding or a mask.

A shared prefix is a prompt followed by its completions: chosen, rejected, mismatched, and those of other rows with the
same prompt. All prefixes are packed into a single sequence, where each token keeps the position it has in its row. Only
attention looks across tokens. Our attention function lets a prompt token attend to the prompt up to it, and a
completion token to its prompt and its own completion. So each distinct prompt token and each completion token is
computed once.

Mismatched rows get no gradient. They are computed after the others, without gradient, from the keys and values that the
pass with gradient has cached for their prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from halos_pl.batch import Routing, TokenBatch
from halos_pl.policy.architecture import decoder_and_head
from halos_pl.policy.head import token_logps
from halos_pl.policy.routing import row_routing, token_routing
from halos_pl.policy.sharding import is_sharded, run

NAME = "halos_prefix_sharing"


@dataclass(frozen=True)
class SharedPrefix:
    """The position of a prompt and its completions in the packed sequence.

    Attributes:
        prompt: (start, stop) of the prompt's tokens; empty if its keys and values come from an earlier pass.
        branches: (start, stop) of each completion's tokens.
        slot: Index of the prompt, under which its keys and values are cached.
        before: Number of tokens of the prompt.
    """

    prompt: tuple[int, int]
    branches: tuple[tuple[int, int], ...]
    slot: int
    before: int


class Layout:
    """The prefixes of one pass, and the cached keys and values of their prompts.

    Attributes:
        prefixes: Prefixes in the order of the packed sequence.
        keep: Whether to cache keys and values of the prompts for a later pass.
        kept: Cached keys and values [1, heads, tokens, size] without gradient, by (layer, slot).
        masks: Attention masks, built once for all layers.
        windows: Sliding windows that the layers passed to their attention.
    """

    # Not a dataclass: FSDP copies each dataclass that a block gets, so what the block adds to it would be lost.
    def __init__(
        self,
        prefixes: list[SharedPrefix],
        keep: bool = False,
        kept: dict[tuple[int, int], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.prefixes, self.keep = prefixes, keep
        self.kept = {} if kept is None else kept
        self.masks: dict[Any, Tensor] = {}
        self.windows: set[int | None] = set()

    def mask(self, before: int, lengths: tuple[int, ...], window: int | None, device: torch.device) -> Tensor:
        """Attention mask, BoolTensor [sum(lengths), before + sum(lengths)], of completions after ``before`` tokens."""
        key = (before, lengths, window)
        if key not in self.masks:
            size = sum(lengths)
            branch = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
            position = torch.cat([torch.arange(length) for length in lengths])
            causal = (branch[:, None] == branch[None, :]) & (position[:, None] >= position[None, :])
            mask = torch.cat([torch.ones(size, before, dtype=torch.bool), causal], dim=1)
            if window is not None:
                where = torch.cat([torch.arange(before), before + position])
                mask &= (before + position)[:, None] - where[None, :] < window
            self.masks[key] = mask.to(device)
        return self.masks[key]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' interface over a layout; query [1, heads, tokens, size]."""
    if layout is None:  # when sampling, for example
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, sliding_window=sliding_window, **kwargs
        )
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise NotImplementedError("attention with a soft cap or with sinks")
    layout.windows.add(sliding_window)
    groups = query.shape[1] // key.shape[1]
    layer = int(getattr(module, "layer_idx"))  # noqa: B009  (mypy would take it for a tensor)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        shared = groups > 1 and q.device.type == "cpu"  # elsewhere, not every kernel with a mask shares heads
        if groups > 1 and not shared:
            k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling, is_causal=mask is None, enable_gqa=shared
        )

    # Split, not sliced: the backward pass of each slice would allocate zeros for the whole sequence.
    sizes = [
        (prefix.branches[-1][1] if prefix.branches else prefix.prompt[1]) - prefix.prompt[0]
        for prefix in layout.prefixes
    ]
    out = []
    for prefix, q, k, v in zip(layout.prefixes, *(x.split(sizes, dim=2) for x in (query, key, value)), strict=True):
        prompt = prefix.prompt[1] - prefix.prompt[0]
        rest = tuple(b - a for a, b in prefix.branches)
        if prompt:
            # The prompt and its first completion form one causal sequence, which needs no mask.
            n, rest = prompt + sum(rest[:1]), rest[1:]
            narrow = sliding_window is not None and n > sliding_window
            mask = layout.mask(0, (n,), sliding_window, query.device) if narrow else None
            if layout.keep:
                layout.kept[layer, prefix.slot] = k[:, :, :prompt].detach(), v[:, :, :prompt].detach()
            if rest:
                pieces = prompt, n - prompt, q.shape[2] - n
                (k_prompt, k_first, k), (v_prompt, v_first, v) = (x.split(pieces, dim=2) for x in (k, v))
                first, q = q.split((n, q.shape[2] - n), dim=2)
                whole = torch.cat([k_prompt, k_first], dim=2), torch.cat([v_prompt, v_first], dim=2)
                out.append(attend(first, *whole, mask))
            else:
                out.append(attend(q, k, v, mask))
        else:
            k_prompt, v_prompt = layout.kept[layer, prefix.slot]
        if rest:
            window = (
                sliding_window if sliding_window is not None and prefix.before + max(rest) > sliding_window else None
            )
            joined = torch.cat([k_prompt, k], dim=2), torch.cat([v_prompt, v], dim=2)
            out.append(attend(q, *joined, layout.mask(prefix.before, rest, window, query.device)))
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)


@dataclass
class _Pass:
    """The input of one pass: tokens, positions and prefixes."""

    ids: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    prefixes: list[SharedPrefix] = field(default_factory=list)
    size: int = 0

    def append(self, ids: Tensor, first_position: int) -> tuple[int, int]:
        start, self.size = self.size, self.size + len(ids)
        self.ids.append(ids)
        self.positions.append(torch.arange(first_position, first_position + len(ids), device=ids.device))
        return start, self.size


def _hidden(model: nn.Module, run: _Pass, layout: Layout, experts: int | None) -> tuple[Tensor, Routing | None]:
    """Hidden states [tokens, size] of the packed sequence, and the routing of its tokens unless ``experts`` is None."""
    ids = torch.cat(run.ids)[None]
    outputs = decoder_and_head(model)[0](
        input_ids=ids,
        position_ids=torch.cat(run.positions)[None],
        # transformers passes a four-dimensional mask on unchanged, and our attention ignores it.
        attention_mask=torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=ids.device),
        use_cache=False,
        layout=layout,
        **({} if experts is None else {"output_router_logits": True}),
    )
    routing = None if experts is None else token_routing(outputs.router_logits, run.size, experts)
    return outputs.last_hidden_state[0], routing


@dataclass(frozen=True)
class States:
    """Hidden states that predict the m completion tokens with loss.

    Attributes:
        hidden: Hidden states [m, size].
        targets: LongTensor [m], the tokens to predict.
        row, column: LongTensor [m], positions of the tokens in [n, T].
        mismatched: Whether the tokens belong to mismatched rows, which have no gradient.
        windows: Sliding windows that layers passed to their attention, None for a layer without one.
        routing: Routing of all n rows, zero for mismatched ones; None unless it was requested.
    """

    hidden: Tensor
    targets: Tensor
    row: Tensor
    column: Tensor
    mismatched: bool
    windows: set[int | None]
    routing: Routing | None = None


def shared_states(model: nn.Module, batch: TokenBatch, experts: int | None = None) -> Iterator[States]:
    """Hidden states of all rows: first those with gradient, then, without any, those of mismatched rows.

    Args:
        model: Model that can share prefixes (see ``halos_pl.policy.self_test``), with its attention set to ``NAME``.
        batch: n rows.
        experts: Number of experts that a router chooses for each token; None to return no routing.
    """
    # The tokens of each completion that carry the loss. The whole completion is computed in any case.
    carried = [torch.arange(len(c)) for c in batch.completions]
    for i, loss in enumerate(batch.loss or ()):
        if loss is not None:
            carried[i] = loss.nonzero().squeeze(1).cpu()
    prompts: dict[int, list[int]] = {}
    is_mismatched = batch.labels.mismatched.tolist()
    for i, p in enumerate(batch.prompt.tolist()):
        prompts.setdefault(p, []).append(i)
    last: dict[int, Tensor] = {}  # hidden state of each prompt's last token
    kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for mismatched in (False, True):
        rows = {p: [i for i in members if is_mismatched[i] == mismatched] for p, members in prompts.items()}
        rows = {p: members for p, members in rows.items() if members}
        if not rows:
            continue
        run = _Pass()
        places: list[tuple[int, int, int, int]] = []  # (row, prompt, first token of the branch, its length)
        spans: list[list[tuple[int, int]]] = [[] for _ in is_mismatched]  # each row's tokens, with its prompt's
        for p, members in rows.items():
            ids = batch.prompts[p]
            here = (run.size, run.size) if p in last else run.append(ids, 0)
            branches = []
            for i in members:
                start, stop = run.append(batch.completions[i][:-1], len(ids))  # nothing is predicted from the last
                places.append((i, p, start, stop - start))
                spans[i] = [here, (start, stop)]
                branches += [(start, stop)] if stop > start else []
            run.prefixes.append(SharedPrefix(here, tuple(branches), p, len(ids)))
        if not run.size and is_sharded(model):  # the other ranks may have tokens, and gather weights from this one
            run.prefixes = [SharedPrefix(run.append(batch.prompts[0][:1], 0), (), -1, 1)]
        more = not mismatched and any(is_mismatched)
        layout = Layout(run.prefixes, keep=more, kept=kept)
        ends = {prefix.slot: prefix.prompt[1] - 1 for prefix in run.prefixes if prefix.prompt[1] > prefix.prompt[0]}
        with torch.set_grad_enabled(torch.is_grad_enabled() and not mismatched):
            hidden, of_tokens = (
                _hidden(model, run, layout, None if mismatched else experts) if run.size else (None, None)
            )
            # Hidden states from an earlier pass come after those of this one.
            at = {p: run.size + i for i, p in enumerate(last)} | ends
            index = [(at[p], start - 1 + k)[k > 0] for i, p, start, _ in places for k in carried[i].tolist()]
            pool = torch.cat([each for each in (hidden, *last.values()) if each is not None])
            states = pool.index_select(0, torch.tensor(index, device=pool.device))
        if more:
            last = {p: pool[end].detach()[None] for p, end in ends.items()}
        device = batch.prompt.device
        yield States(
            hidden=states,
            targets=torch.cat([batch.completions[i][carried[i].to(device)] for i, *_ in places]),
            row=torch.cat([torch.full((len(carried[i]),), i) for i, *_ in places]).to(device),
            column=torch.cat([carried[i] for i, *_ in places]).to(device),
            mismatched=mismatched,
            windows=layout.windows,
            routing=None if of_tokens is None else row_routing(of_tokens, spans),
        )


def shared_scores(
    model: nn.Module, batch: TokenBatch, experts: int | None = None, windows: set[int | None] | None = None
) -> tuple[Tensor, Routing | None]:
    """Log-probs of the completion tokens and the routing of the rows; mismatched rows get no gradient.

    Args:
        model, batch, experts: As in :func:`shared_states`.
        windows: Set to add the layers' sliding windows to.

    Returns:
        Log-probs, float32 [n, T], 0 where a row has no token with loss; and the routing, None if it was not requested
        or all rows are mismatched.
    """
    return run(model, lambda: _shared_scores(model, batch, experts, windows))


def _shared_scores(
    model: nn.Module, batch: TokenBatch, experts: int | None, windows: set[int | None] | None
) -> tuple[Tensor, Routing | None]:
    size = len(batch), max(len(c) for c in batch.completions)
    # The dtype is explicit because bf16-true changes the default.
    logps = torch.zeros(size, dtype=torch.float32, device=batch.prompt.device)
    head = decoder_and_head(model)[1]
    routing = None
    for states in shared_states(model, batch, experts):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not states.mismatched):
            of_tokens = token_logps(head, states.hidden, states.targets)
        if windows is not None:
            windows |= states.windows
        logps = logps.index_put((states.row, states.column), of_tokens)
        routing = routing if states.routing is None else states.routing
    return logps, routing


def shared_logps(model: nn.Module, batch: TokenBatch, windows: set[int | None] | None = None) -> Tensor:
    """Log-probs of the completion tokens, float32 [n, T] (see :func:`shared_scores`)."""
    return shared_scores(model, batch, windows=windows)[0]
