"""How many positions and how large a vocabulary a model has, and what does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from transformers import PreTrainedTokenizerBase

from halos_pl.policy.architecture import Positions, auxiliary_losses, experts_per_token, positions, vocabulary_size
from halos_pl.policy.spec import ModelError


def check_length(model: nn.Module, longest: int) -> None:
    """Refuses rows that are longer than a model has positions, or warns of them.

    Args:
        model: the policy.
        longest: tokens of the longest row, prompt and completion.

    Raises:
        ModelError: where positions are learned, so that such a row has none; and where rotary ones change with the
            longest row of a batch, so that a row's log-probs would depend on the rows beside it. Other rotary positions
            exist at any length, so that there is only a warning.
    """
    most, hard, alike = positions(model)
    if alike and longest > alike and alike != most:
        raise ModelError(
            f"the data have rows of {longest} tokens; beyond {alike} this model computes all rows of a batch"
            f" in another way, so that they would depend on each other: set data.max_length to {alike} or less"
        )
    if not most or longest <= most:
        return
    said = f"the data have rows of {longest} tokens, and the model {most} positions"
    mend = f"set data.max_length to {most} or less"
    if hard or alike:
        raise ModelError(f"{said}: {mend}")
    rank_zero_warn(f"halos: {said}, beyond which it was not trained; {mend}")


def room(places: Positions, length: int, wanted: int) -> int:
    """Tokens that fit behind a prompt of ``length`` tokens: at most ``wanted``, below 1 where none does."""
    return min(wanted, places.most - length) if places.most and places.hard else wanted


def check_prompts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    names: Sequence[str],
    wanted: int,
) -> None:
    """Refuses prompts that do not fit a model that is to continue them.

    Args:
        model: what generates.
        tokenizer: its tokenizer.
        prompts: token ids.
        names: of the prompts, for the message.
        wanted: tokens that are to be added to each.

    Raises:
        ModelError: for a prompt with tokens beyond the model's vocabulary, or with no position left for a completion.
    """
    check_vocabulary(model, tokenizer, zip(names, prompts, strict=True))
    places = positions(model)
    long = [i for i, ids in enumerate(prompts) if room(places, len(ids), 1) < 1]
    if long:
        raise ModelError(
            f"{names[long[0]]}: the prompt has {len(prompts[long[0]])} tokens, and the model {places.most} positions,"
            f" so that none is left for a completion; shorten it{f' ({len(long)} are too long)' if long[1:] else ''}"
        )
    if places.most and max(map(len, prompts), default=0) + wanted > places.most:
        rank_zero_warn(
            f"halos: some prompts and max_new_tokens ({wanted}) together pass the model's {places.most} positions: "
            + ("those completions end there" if places.hard else "it was not trained beyond them")
        )


def check_vocabulary(model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Iterable[tuple[str, Any]]) -> None:
    """Refuses token ids that have no row in the model's embedding.

    Args:
        model: what they are for.
        tokenizer: what they come from.
        rows: (name, sequence of token ids); they are looked at only where the tokenizer knows more ids than the model.

    Raises:
        ModelError: naming the row, the tokens and the cure.
    """
    known = vocabulary_size(model)
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= known}
    if not beyond:
        return
    tokens = ", ".join(f"{token!r} ({number})" for number, token in sorted(beyond.items())[:5])
    about = (
        f"the tokenizer has {len(beyond)} tokens without a row in the model's embedding of {known} rows: {tokens}"
        f"{', ...' if len(beyond) > 5 else ''}"
    )
    cure = (
        f"resize it, model.resize_token_embeddings({max(beyond) + 1}), and save it with its tokenizer; or take the"
        " tokenizer that belongs to it"
    )
    for name, ids in rows:
        most = int(np.max(np.asarray(ids), initial=0))
        if most >= known:
            raise ModelError(
                f"{name} has the token {beyond.get(most, '')!r} ({most}), but {about}; {cure}, or remove such rows"
            )
    rank_zero_warn(f"halos: {about}. No row has one of them; in case one does, {cure}")


def warn_of_ignored_losses(model: nn.Module, *, router_loss: bool) -> None:
    """Warns of auxiliary losses that transformers would add in training, and the objective does not.

    Args:
        model: the policy.
        router_loss: Whether the objective balances the load of the experts.
    """
    enabled = auxiliary_losses(model)
    if router_loss:
        enabled = {name: value for name, value in enabled.items() if name.startswith("z_")}
    if not enabled:
        return
    settings = ", ".join(f"{name} {'true' if value is True else f'{value:g}'}" for name, value in enabled.items())
    weight = next((value for name, value in enabled.items() if name.endswith("aux_loss_coef")), None)
    cure = (
        f"; to balance the load of the experts, add {{class_path: RouterLoss, init_args: {{weight: {weight:g}}}}} to"
        " model.extra_terms"
        if weight and experts_per_token(model)
        else ""
    )
    rank_zero_warn(f"halos: the model's config enables an auxiliary loss ({settings}), which is not trained{cure}")
