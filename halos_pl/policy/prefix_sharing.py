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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from halos_pl.batch import Routing, TokenBatch
from halos_pl.policy.architecture import decoder_and_head
from halos_pl.policy.head import token_logps
from halos_pl.policy.logprobs import Scores
from halos_pl.policy.routing import row_routing, token_routing
from halos_pl.policy.sharding import is_sharded, run
from halos_pl.policy.shared_attention import Layout, SharedPrefix, choose
from halos_pl.policy.upload import ramps, repeats, upload

NAME = "halos_prefix_sharing"


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
    layer = int(getattr(module, "layer_idx"))  # noqa: B009  (mypy would take it for a tensor)
    if layout.keep:
        layout.kept[layer] = key.detach(), value.detach()
    attend = choose(query, value, dropout)
    return attend(layout, layer, query, key, value, scale=scaling, window=sliding_window, dropout=dropout), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)


class _Pass:
    """One pass, planned on the host: its packed sequence, and the tokens with loss that its hidden states predict.

    Args:
        batch: Batch to which the rows belong.
        rows: Numbers of the pass's rows, by prompt.
        mismatched: Whether the rows are mismatched.
        never_empty: Whether to compute a token that no row needs if no row needs any.
        earlier: Pass whose keys and values the prompts that it has computed are taken from.
        whole: Whether to compute the last token of each completion too, from which nothing is predicted.

    Attributes:
        layout: Layout of the packed sequence.
        ids: Tokens [layout.size].
        ends: Position in the packed sequence of the last token of each prompt that this pass computes.
        rows: Numbers of the rows, in the order of the packed sequence.
        spans: For each row of the batch, (start, stop) of its prompt's tokens and of its own, without its last one.
    """

    def __init__(
        self,
        batch: TokenBatch,
        rows: dict[int, list[int]],
        *,
        mismatched: bool,
        never_empty: bool = False,
        earlier: _Pass | None = None,
        whole: bool = False,
    ) -> None:
        self.mismatched = mismatched
        self.rows = [i for members in rows.values() for i in members]
        self.ends: dict[int, int] = {}
        self.spans: list[list[tuple[int, int]]] = [[] for _ in batch.completions]
        computed = {} if earlier is None else {prefix.slot: prefix.prompt for prefix in earlier.layout.prefixes}
        pieces, prefixes, size = [], [], 0
        for p, members in rows.items():
            prompt = computed.get(p)
            if prompt is None:
                pieces.append(batch.prompts[p])
                prompt = size, size + len(batch.prompts[p])
                size = prompt[1]
                self.ends[p] = size - 1
            branches = {}
            for i in members:
                last = size + len(batch.completions[i]) - 1  # nothing is predicted from the last token
                self.spans[i] = [prompt, (size, last)]
                branches[i] = size, last + whole
                pieces.append(batch.completions[i] if whole else batch.completions[i][:-1])
                size = branches[i][1]
            branches = {i: (start, stop) for i, (start, stop) in branches.items() if stop > start}
            prefixes.append(SharedPrefix(p, prompt, tuple(branches.values()), tuple(branches), earlier=p in computed))
        if never_empty and not size:
            pieces, prefixes, size = [batch.prompts[0][:1]], [SharedPrefix(-1, (0, 1), (), ())], 1
        self.ids = torch.cat(pieces)
        self.layout: Layout = Layout(prefixes, None if earlier is None else earlier.layout)
        # Hidden states from the earlier pass come after those of this one.
        self._prompt_states = self.ends | {
            p: size + number for number, p in enumerate(earlier.ends if earlier is not None else ())
        }

    def columns(self, batch: TokenBatch) -> list[Tensor]:
        """LongTensors on the CPU: the end of each prompt; the rows, and the position of each one's last token; for each
        token with loss the position of the hidden state that predicts it, its position among the tokens of all
        completions, its row and its column; then those of the layout."""
        prompt, loss = batch.host.prompt, batch.host.loss
        states, targets, rows, columns = [], [], [], []  # runs (start, length)
        offset = 0
        for i in self.rows:
            positions, size = loss[i], len(batch.completions[i])
            for k, length in [(0, size)] if positions is None else [(k, 1) for k in positions]:
                if k == 0:
                    states.append((self._prompt_states[prompt[i]], 1))
                states.append((self.spans[i][1][0] + max(k - 1, 0), length - (k == 0)))
                targets.append((offset + k, length))
                rows.append((i, length))
                columns.append((k, length))
            offset += size
        kernels = batch.prompt.device.type != "cpu"
        of_layout = self.layout.columns() if kernels and self.layout.size else [self.layout.positions()]
        ends = torch.tensor(list(self.ends.values()), dtype=torch.long, device="cpu")
        members, last = (
            torch.tensor(numbers, dtype=torch.long, device="cpu")
            for numbers in (self.rows, [self.spans[i][1][1] for i in self.rows])
        )
        return [ends, members, last, ramps(states), ramps(targets), repeats(rows), ramps(columns), *of_layout]


def _planned(batch: TokenBatch, never_empty: bool, whole: bool) -> list[_Pass]:
    """The pass with gradient and the pass of mismatched rows, each if it has rows."""
    members: dict[int, list[int]] = {}
    for i, p in enumerate(batch.host.prompt):
        members.setdefault(p, []).append(i)
    is_mismatched = batch.host.mismatched
    passes: list[_Pass] = []
    for kind in (False, True):
        rows = {p: [i for i in numbers if is_mismatched[i] == kind] for p, numbers in members.items()}
        rows = {p: numbers for p, numbers in rows.items() if numbers}
        if rows:
            earlier = passes[0] if passes else None
            passes.append(_Pass(batch, rows, mismatched=kind, never_empty=never_empty, earlier=earlier, whole=whole))
    return passes


def _hidden(
    model: nn.Module, current: _Pass, positions: Tensor, experts: int | None
) -> tuple[Tensor | None, Routing | None]:
    """Hidden states [tokens, size] of the packed sequence, and the routing of its tokens unless ``experts`` is None."""
    if not current.layout.size:
        return None, None
    outputs = decoder_and_head(model)[0](
        input_ids=current.ids[None],
        position_ids=positions[None],
        # transformers passes a four-dimensional mask on unchanged, and our attention ignores it.
        attention_mask=torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=current.ids.device),
        use_cache=False,
        layout=current.layout,
        **({} if experts is None else {"output_router_logits": True}),
    )
    routing = None if experts is None else token_routing(outputs.router_logits, current.layout.size, experts)
    return outputs.last_hidden_state[0], routing


@dataclass(frozen=True)
class States:
    """Hidden states that predict the m completion tokens with loss, and those after the last tokens of k rows.

    Attributes:
        hidden: Hidden states [m, size].
        targets: LongTensor [m], the tokens to predict.
        row, column: LongTensor [m], positions of the tokens in [n, T].
        mismatched: Whether the tokens belong to mismatched rows, which have no gradient.
        windows: Sliding windows that layers passed to their attention, None for a layer without one.
        routing: Routing of all n rows, zero for mismatched ones; None unless it was requested.
        rows: LongTensor [k], positions of the rows among all n.
        last: Hidden states [k, size] after their last tokens; None unless they were requested.
    """

    hidden: Tensor
    targets: Tensor
    row: Tensor
    column: Tensor
    mismatched: bool
    windows: set[int | None]
    routing: Routing | None
    rows: Tensor
    last: Tensor | None


def shared_states(
    model: nn.Module, batch: TokenBatch, experts: int | None = None, *, tokens: bool = True, last: bool = False
) -> Iterator[States]:
    """Hidden states of all rows: first those with gradient, then, without any, those of mismatched rows.

    On a GPU nothing waits for the device: all indices are built on the host and copied once.

    Args:
        model: Model that can share prefixes (see ``halos_pl.policy.self_test``), with its attention set to ``NAME``.
        batch: n rows.
        experts: Number of experts that a router chooses for each token; None to return no routing.
        tokens: Whether to return the states that predict tokens; otherwise there are none (m = 0).
        last: Whether to return the states after the last tokens.
    """
    device = batch.prompt.device
    # Without tokens on this rank, others may have some, and gather weights from it.
    passes = _planned(batch, never_empty=is_sharded(model), whole=last)
    columns = [each.columns(batch) for each in passes]
    on_device = iter(upload([column for each in columns for column in each], device))
    of_prompts: Tensor | None = None  # hidden states of the last tokens of the first pass's prompts
    for current, of_current in zip(passes, columns, strict=True):
        ends, members, row_ends, index, target, row, column, *of_layout = (next(on_device) for _ in of_current)
        if len(of_layout) > 1:
            current.layout.place(of_layout)
        if not tokens:
            index, target, row, column = (each[:0] for each in (index, target, row, column))
        current.layout.keep = current is not passes[-1]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not current.mismatched):
            hidden, of_tokens = _hidden(model, current, of_layout[0], None if current.mismatched else experts)
            pools = [each for each in (hidden, of_prompts) if each is not None]
            pool = torch.cat(pools) if len(pools) > 1 else pools[0]
            states = pool.index_select(0, index)
            of_rows = pool.index_select(0, row_ends) if last else None
        if current.layout.keep:
            of_prompts = pool.detach().index_select(0, ends)
        else:
            for each in passes:  # a layer that is recomputed in the backward pass need not keep its keys again
                each.layout.keep = False
                each.layout.kept.clear()
        yield States(
            hidden=states,
            targets=torch.cat([batch.completions[i] for i in current.rows]).index_select(0, target),
            row=row,
            column=column,
            mismatched=current.mismatched,
            windows=current.layout.windows,
            routing=None if of_tokens is None else row_routing(of_tokens, current.spans),
            rows=members,
            last=of_rows,
        )


def shared_scores(
    model: nn.Module,
    batch: TokenBatch,
    experts: int | None = None,
    windows: set[int | None] | None = None,
    *,
    scalar_head: nn.Module | None = None,
    logps: bool = True,
) -> Scores:
    """The scores of the rows; mismatched rows get no gradient.

    Args:
        model, batch, experts: As in :func:`shared_states`.
        windows: Set to add the layers' sliding windows to.
        scalar_head: Head that gives each row a scalar; None for none.
        logps: Whether to compute log-probs.
    """
    return run(model, lambda: _shared_scores(model, batch, experts, windows, scalar_head, logps))


def _shared_scores(
    model: nn.Module,
    batch: TokenBatch,
    experts: int | None,
    windows: set[int | None] | None,
    scalar_head: nn.Module | None,
    with_logps: bool,
) -> Scores:
    # The dtype is explicit because bf16-true changes the default.
    options: Any = {"dtype": torch.float32, "device": batch.prompt.device}
    logps = torch.zeros(len(batch), max(len(c) for c in batch.completions), **options) if with_logps else None
    scalar = None if scalar_head is None else torch.zeros(len(batch), **options)
    head = decoder_and_head(model)[1]
    routing = None
    for states in shared_states(model, batch, experts, tokens=with_logps, last=scalar_head is not None):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not states.mismatched):
            of_tokens = token_logps(head, states.hidden, states.targets) if with_logps else None
            of_rows = scalar_head(states.last) if scalar_head is not None else None
        if logps is not None and of_tokens is not None:
            logps = logps.index_put((states.row, states.column), of_tokens)
        if scalar is not None and of_rows is not None:
            scalar = scalar.index_put((states.rows,), of_rows)
        if windows is not None:
            windows |= states.windows
        routing = routing if states.routing is None else states.routing
    return Scores(logps, routing, scalar)


def shared_logps(model: nn.Module, batch: TokenBatch, windows: set[int | None] | None = None) -> Tensor:
    """Log-probs of the completion tokens, float32 [n, T] (see :func:`shared_scores`)."""
    logps = shared_scores(model, batch, windows=windows).logps
    assert logps is not None
    return logps
