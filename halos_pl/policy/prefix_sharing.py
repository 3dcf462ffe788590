"""Prefix sharing: every distinct prompt is computed once for all rows that share it, without padding or a mask.

A shared prefix is a prompt with the completions that follow it: chosen, rejected, mismatched, and those of other rows
with the same prompt. All prefixes lie one after the other in a single sequence; each token keeps the position that it
has in its own row. The model's layers work on tokens, so only attention has to know: our attention function lets a
token of a prompt see the prompt before it, and a token of a completion its prompt and its own completion. So every
distinct prompt token and every completion token is computed once.

Mismatched rows get no gradient. They are computed after the others, without gradient, on the keys and values that the
pass with gradient has left of their prompts.
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

NAME = "halos_prefix_sharing"


@dataclass(frozen=True)
class SharedPrefix:
    """Where a prompt and its completions are in the packed sequence.

    Attributes:
        prompt: (start, stop) of the prompt's tokens; empty where its keys and values are those of an earlier pass.
        branches: (start, stop) of each completion's tokens.
        slot: the prompt's number, under which its keys and values are kept.
        before: tokens of the prompt.
    """

    prompt: tuple[int, int]
    branches: tuple[tuple[int, int], ...]
    slot: int
    before: int


@dataclass
class Layout:
    """The prefixes of one pass, and what is kept of its prompts for another one.

    Attributes:
        prefixes: in the order of the packed sequence.
        keep: whether keys and values of the prompts are kept.
        kept: keys and values [1, heads, tokens, size] without gradient, by (layer, slot).
        masks: made once a pass, not once a layer.
        windows: the sliding windows that the layers asked for.
    """

    prefixes: list[SharedPrefix]
    keep: bool = False
    kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    masks: dict[Any, Tensor] = field(default_factory=dict)
    windows: set[int | None] = field(default_factory=set)

    def mask(self, before: int, lengths: tuple[int, ...], window: int | None, device: torch.device) -> Tensor:
        """Who sees whom, BoolTensor [sum(lengths), before + sum(lengths)]: completions behind ``before`` tokens."""
        key = (before, lengths, window)
        if key not in self.masks:
            size = sum(lengths)
            branch = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
            position = torch.cat([torch.arange(length) for length in lengths])
            own = (branch[:, None] == branch[None, :]) & (position[:, None] >= position[None, :])
            mask = torch.cat([torch.ones(size, before, dtype=torch.bool), own], dim=1)
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
    if layout is None:  # sampling, say
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, sliding_window=sliding_window, **kwargs
        )
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise NotImplementedError("attention with a soft cap or with sinks")
    layout.windows.add(sliding_window)
    groups = query.shape[1] // key.shape[1]
    layer = int(getattr(module, "layer_idx"))  # noqa: B009  (mypy knows modules as tensors)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        shared = groups > 1 and q.device.type == "cpu"  # elsewhere not every kernel shares heads behind a mask
        if groups > 1 and not shared:
            k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling, is_causal=mask is None, enable_gqa=shared
        )

    # Split, not sliced: in the backward pass each slice would fill a tensor of the whole sequence with zeros.
    sizes = [
        (prefix.branches[-1][1] if prefix.branches else prefix.prompt[1]) - prefix.prompt[0]
        for prefix in layout.prefixes
    ]
    out = []
    for prefix, q, k, v in zip(layout.prefixes, *(x.split(sizes, dim=2) for x in (query, key, value)), strict=True):
        prompt = prefix.prompt[1] - prefix.prompt[0]
        rest = tuple(b - a for a, b in prefix.branches)
        if prompt:
            # The prompt and its first completion are one causal sequence, which needs no mask.
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
            behind = torch.cat([k_prompt, k], dim=2), torch.cat([v_prompt, v], dim=2)
            out.append(attend(q, *behind, layout.mask(prefix.before, rest, window, query.device)))
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)


@dataclass
class _Pass:
    """What goes into one pass: tokens, positions, prefixes, and which hidden state predicts which completion token."""

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
    """Hidden states [tokens, size] of the packed sequence, and the routing of its tokens if ``experts`` is given."""
    ids = torch.cat(run.ids)[None]
    outputs = decoder_and_head(model)[0](
        input_ids=ids,
        position_ids=torch.cat(run.positions)[None],
        # A mask of four dimensions is passed on as it is; our attention does not read it.
        attention_mask=torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=ids.device),
        use_cache=False,
        layout=layout,
        **({} if experts is None else {"output_router_logits": True}),
    )
    routing = None if experts is None else token_routing(outputs.router_logits, run.size, experts)
    return outputs.last_hidden_state[0], routing


@dataclass(frozen=True)
class States:
    """What the m completion tokens that carry the loss are predicted from.

    Attributes:
        hidden: [m, size].
        targets: LongTensor [m], the tokens.
        row, column: LongTensor [m], the places of the tokens in [n, T].
        mismatched: whether they are those of mismatched rows, which have no gradient.
        windows: sliding windows that layers named, None for a layer without one.
        routing: the routing of all n rows, of which mismatched ones have zeros; None unless it was requested.
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
        model: one that can share prefixes (see ``halos_pl.policy.self_test``), with its attention set to ``NAME``.
        batch: n rows.
        experts: Number of experts that a router chooses for each token; None to return no routing.
    """
    # The tokens of each completion that carry the loss; a completion is computed as a whole all the same.
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
        rows = {p: [i for i in own if is_mismatched[i] == mismatched] for p, own in prompts.items()}
        rows = {p: own for p, own in rows.items() if own}
        if not rows:
            continue
        run = _Pass()
        places: list[tuple[int, int, int, int]] = []  # (row, prompt, branch's first token, tokens of the branch)
        spans: list[list[tuple[int, int]]] = [[] for _ in is_mismatched]  # each row's tokens, with its prompt's
        for p, own in rows.items():
            ids = batch.prompts[p]
            here = (run.size, run.size) if p in last else run.append(ids, 0)
            branches = []
            for i in own:
                start, stop = run.append(batch.completions[i][:-1], len(ids))  # nothing is predicted from the last
                places.append((i, p, start, stop - start))
                spans[i] = [here, (start, stop)]
                branches += [(start, stop)] if stop > start else []
            run.prefixes.append(SharedPrefix(here, tuple(branches), p, len(ids)))
        more = not mismatched and any(is_mismatched)
        layout = Layout(run.prefixes, keep=more, kept=kept)
        ends = {prefix.slot: prefix.prompt[1] - 1 for prefix in run.prefixes if prefix.prompt[1] > prefix.prompt[0]}
        with torch.set_grad_enabled(torch.is_grad_enabled() and not mismatched):
            hidden, of_tokens = (
                _hidden(model, run, layout, None if mismatched else experts) if run.size else (None, None)
            )
            # Hidden states of earlier passes come after those of this one.
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
        model: one that can share prefixes (see ``halos_pl.policy.self_test``), with its attention set to ``NAME``.
        batch: n rows.
        experts: Number of experts that a router chooses for each token; None to return no routing.
        windows: Set to which the sliding windows that layers name are added.

    Returns:
        Log-probs, float32 [n, T], 0 where a row has no token with loss; and the routing, None where it was not
        requested or all rows are mismatched.
    """
    size = len(batch), max(len(c) for c in batch.completions)
    # Not in the default dtype, which a Trainer of bf16-true sets to bfloat16.
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
