"""Shared prompts computed once: the rows of a batch as trees, without padding and without a mask.

A tree is a prompt and the completions that follow it: chosen, rejected, mismatched, and those of other rows with the
same prompt. All trees lie one after the other in a single sequence; each token keeps the position that it has
in its own row. The model's layers work on tokens, so only attention has to know: an attention function of ours lets a
token of a prompt see the prompt before it, and a token of a completion its prompt and its own completion. So every
distinct prompt token and every completion token is computed once, and none besides.

Mismatched rows get no gradient. They are computed after the others, without gradient, on the keys and values
that the pass with gradient has left of their prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from halos_pl.batch import Labels, TokenBatch
from halos_pl.policy.head import token_logps
from halos_pl.policy.loading import base_model

NAME = "halos_tree"


@dataclass(frozen=True)
class Tree:
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
class Forest:
    """The trees of one pass, and what is kept of its prompts for another one.

    Attributes:
        trees: in the order of the packed sequence.
        keep: whether keys and values of the prompts are kept.
        kept: keys and values [1, heads, tokens, size] without gradient, by (layer, slot).
        masks: made once a pass, not once a layer.
        windows: the sliding windows that the layers asked for.
    """

    trees: list[Tree]
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
    forest: Forest | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' interface over a forest; query [1, heads, tokens, size]."""
    if forest is None:  # sampling, say
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, sliding_window=sliding_window, **kwargs
        )
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise NotImplementedError("attention with a soft cap or with sinks")
    forest.windows.add(sliding_window)
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
    sizes = [(tree.branches[-1][1] if tree.branches else tree.prompt[1]) - tree.prompt[0] for tree in forest.trees]
    out = []
    for tree, q, k, v in zip(forest.trees, *(x.split(sizes, dim=2) for x in (query, key, value)), strict=True):
        prompt = tree.prompt[1] - tree.prompt[0]
        rest = tuple(b - a for a, b in tree.branches)
        if prompt:
            # The prompt and its first completion are one causal sequence, which needs no mask.
            n, rest = prompt + sum(rest[:1]), rest[1:]
            narrow = sliding_window is not None and n > sliding_window
            mask = forest.mask(0, (n,), sliding_window, query.device) if narrow else None
            if forest.keep:
                forest.kept[layer, tree.slot] = k[:, :, :prompt].detach(), v[:, :, :prompt].detach()
            if rest:
                pieces = prompt, n - prompt, q.shape[2] - n
                (k_prompt, k_first, k), (v_prompt, v_first, v) = (x.split(pieces, dim=2) for x in (k, v))
                first, q = q.split((n, q.shape[2] - n), dim=2)
                whole = torch.cat([k_prompt, k_first], dim=2), torch.cat([v_prompt, v_first], dim=2)
                out.append(attend(first, *whole, mask))
            else:
                out.append(attend(q, k, v, mask))
        else:
            k_prompt, v_prompt = forest.kept[layer, tree.slot]
        if rest:
            window = sliding_window if sliding_window is not None and tree.before + max(rest) > sliding_window else None
            behind = torch.cat([k_prompt, k], dim=2), torch.cat([v_prompt, v], dim=2)
            out.append(attend(q, *behind, forest.mask(tree.before, rest, window, query.device)))
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)


@dataclass
class _Pass:
    """What goes into one pass: tokens, positions, trees, and which hidden state predicts which completion token."""

    ids: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    trees: list[Tree] = field(default_factory=list)
    size: int = 0

    def append(self, ids: Tensor, first_position: int) -> tuple[int, int]:
        start, self.size = self.size, self.size + len(ids)
        self.ids.append(ids)
        self.positions.append(torch.arange(first_position, first_position + len(ids), device=ids.device))
        return start, self.size


def parts(model: nn.Module) -> tuple[Any, Any]:
    """The layers of a causal language model and its head; of a peft model with the adapter in them."""
    base = base_model(model)
    head = base.get_output_embeddings()
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    return base.base_model if decoder is None or decoder is head else decoder, head  # some call their head so


def _hidden(model: nn.Module, run: _Pass, forest: Forest) -> Tensor:
    """Hidden states [tokens, size] of the packed sequence."""
    ids = torch.cat(run.ids)[None]
    hidden: Tensor = parts(model)[0](
        input_ids=ids,
        position_ids=torch.cat(run.positions)[None],
        # A mask of four dimensions is handed on as it is; ours is not looked at.
        attention_mask=torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=ids.device),
        use_cache=False,
        forest=forest,
    ).last_hidden_state[0]
    return hidden


@dataclass(frozen=True)
class States:
    """What the m completion tokens that carry the loss are predicted from.

    Attributes:
        hidden: [m, size].
        targets: LongTensor [m], the tokens.
        row, column: LongTensor [m], the places of the tokens in [n, T].
        mismatched: whether they are those of mismatched rows, which have no gradient.
        windows: sliding windows that layers named, None for a layer without one.
    """

    hidden: Tensor
    targets: Tensor
    row: Tensor
    column: Tensor
    mismatched: bool
    windows: set[int | None]


def tree_states(model: nn.Module, batch: TokenBatch) -> Iterator[States]:
    """Hidden states of all rows: first those with gradient, then, without any, those of mismatched rows.

    Args:
        model: one that :func:`takes_trees`.
        batch: n rows.
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
        for p, own in rows.items():
            ids = batch.prompts[p]
            here = (run.size, run.size) if p in last else run.append(ids, 0)
            branches = []
            for i in own:
                start, stop = run.append(batch.completions[i][:-1], len(ids))  # nothing is predicted from the last
                places.append((i, p, start, stop - start))
                branches += [(start, stop)] if stop > start else []
            run.trees.append(Tree(here, tuple(branches), p, len(ids)))
        more = not mismatched and any(is_mismatched)
        forest = Forest(run.trees, keep=more, kept=kept)
        ends = {tree.slot: tree.prompt[1] - 1 for tree in run.trees if tree.prompt[1] > tree.prompt[0]}
        with torch.set_grad_enabled(torch.is_grad_enabled() and not mismatched):
            hidden = _hidden(model, run, forest) if run.size else None
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
            windows=forest.windows,
        )


def tree_logps(model: nn.Module, batch: TokenBatch, windows: set[int | None] | None = None) -> Tensor:
    """Log-probs of the completion tokens under ``model``, as ``completion_logps`` gives them.

    Mismatched rows get no gradient.

    Args:
        model: one that :func:`takes_trees`.
        batch: n rows.
        windows: where to note the sliding windows that layers name.

    Returns:
        float32 [n, T], 0 where a row has no token with loss.
    """
    size = len(batch), max(len(c) for c in batch.completions)
    # Not in the default dtype, which a Trainer of bf16-true sets to bfloat16.
    out = torch.zeros(size, dtype=torch.float32, device=batch.prompt.device)
    head = parts(model)[1]
    for states in tree_states(model, batch):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not states.mismatched):
            found = token_logps(head, states.hidden, states.targets)
        if windows is not None:
            windows |= states.windows
        out = out.index_put((states.row, states.column), found)
    return out


def is_packed(model: nn.Module) -> bool:
    """Whether :func:`takes_trees` has made ``model`` ready."""
    return bool(base_model(model).config._attn_implementation == NAME)


def _unseen(config: Any, windows: set[int | None]) -> str | None:
    """What limits the attention of a model without its layers naming it, as where it is in a mask only."""
    kinds = getattr(config, "layer_types", None) or []
    if getattr(config, "attention_chunk_size", None) is not None or "chunked_attention" in kinds:
        return "its attention goes by chunks"
    window = getattr(config, "sliding_window", None)
    used = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    return f"its sliding window of {window} is in its mask only" if window and used and window not in windows else None


def self_test_batch(model: nn.Module) -> TokenBatch:
    """Five rows of three prompts, of 1 to 9 tokens, the last one a mismatched row: to try a model out."""
    base = base_model(model)
    config = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    device = next(base.parameters()).device
    draw = torch.Generator().manual_seed(0)

    def some(n: int) -> Tensor:
        # On the CPU, where the generator is, even while Lightning has new tensors made on a GPU.
        return torch.randint(0, min(config.vocab_size, 1000), (n,), generator=draw, device="cpu").to(device)

    return TokenBatch(
        prompts=[some(5), some(1), some(9)],
        completions=[some(4), some(1), some(6), some(3), some(2)],
        prompt=torch.tensor([0, 0, 1, 2, 2], device=device),
        labels=Labels(
            desirable=torch.ones(5, dtype=torch.bool, device=device),
            mismatched=torch.tensor([False, False, False, False, True], device=device),
        ),
    )


def same(found: Tensor, wanted: Tensor, eps: float) -> bool:
    """Whether log-probs of made-up rows differ by no more than rounding, of a model in a dtype with this ``eps``.

    A model gathers some of half precision's eps, and may gather many of float32's, which log-probs always are.
    """
    most = max(8 * eps, 2000 * torch.finfo(torch.float32).eps) * (1 + wanted.abs().max())
    return bool((found - wanted).abs().max() <= most)


def takes_trees(model: nn.Module, reference: Callable[[nn.Module, TokenBatch], Tensor]) -> str | None:
    """Makes ``model`` ready for :func:`tree_logps`; says why not where it is not fit for it.

    Found by trying: a few made-up rows must get the same log-probs as by ``reference``, row by row, and those of a row
    must not depend on what the others say.

    Args:
        model: a causal language model of transformers, or a peft model around one.
        reference: the plain path.
    """
    base = base_model(model)
    config = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    before = base.config._attn_implementation
    if before == NAME:
        return None
    if before != "sdpa":
        return f"its attention is {before}, not sdpa"
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            return f"its head has {name}"
    batch = self_test_batch(model)
    # The first row in other words.
    other = (batch.completions[0] + 1) % min(config.vocab_size, 1000)
    changed = replace(batch, completions=[other, *batch.completions[1:]])
    training = base.training
    windows: set[int | None] = set()
    try:
        with torch.no_grad():
            model.eval()
            wanted = reference(model, batch)
            base.config._attn_implementation = NAME
            found, others = tree_logps(model, batch, windows), tree_logps(model, changed)[1:]
    except Exception as error:
        base.config._attn_implementation = before
        return f"it does not take them ({type(error).__name__}: {' '.join(str(error).split())[:100]})"
    finally:
        model.train(training)
    eps, single = (torch.finfo(dtype).eps for dtype in (next(base.parameters()).dtype, torch.float32))
    size = 1 + wanted.abs().max()
    why = _unseen(config, windows)
    if not same(found, wanted, eps):
        why = "its log-probs of them are others"
    elif not bool((others - found[1:]).abs().max() <= max(eps / 16, 10 * single) * size):  # the same sums: mostly 0
        why = "tokens of one row reach another one"
    if why:
        base.config._attn_implementation = before
    return why
