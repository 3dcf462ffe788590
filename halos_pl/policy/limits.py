"""Checks that rows fit a model's positions and vocabulary."""

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
    """Refuses rows that exceed a model's positions, or warns about them.

    Args:
        model: The policy.
        longest: Tokens of the longest row, prompt and completion.

    Raises:
        ModelError: if positions are learned, so that there is none for the last tokens; or if rotary frequencies depend
            on the longest row of a batch, so that a row's log-probs would depend on other rows. Other rotary positions
            exist at any length and only cause a warning.
    """
    most, hard, alike = positions(model)
    if alike and longest > alike and alike != most:
        raise ModelError(
            f"the data have rows of {longest} tokens; a row beyond {alike} changes the log-probs of all rows in its"
            f" batch, so that they would depend on each other: set data.max_length to {alike} or less"
        )
    if not most or longest <= most:
        return
    fault = f"the data have rows of {longest} tokens, but the model has {most} positions"
    cure = f"set data.max_length to {most} or less"
    if hard or alike:
        raise ModelError(f"{fault}: {cure}")
    rank_zero_warn(f"halos: {fault} and was not trained beyond them; {cure}")


def room(places: Positions, length: int, wanted: int) -> int:
    """Number of tokens that fit after a prompt of ``length`` tokens: at most ``wanted``, below 1 if none fits."""
    return min(wanted, places.most - length) if places.most and places.hard else wanted


def check_prompts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    names: Sequence[str],
    wanted: int,
) -> None:
    """Refuses prompts that a model cannot continue.

    Args:
        model: Model that generates.
        tokenizer: Its tokenizer.
        prompts: Token ids.
        names: Names of the prompts for messages.
        wanted: Number of tokens to add to each prompt.

    Raises:
        ModelError: for a prompt with tokens beyond the model's vocabulary, or that fills the model's positions.
    """
    check_vocabulary(model, tokenizer, zip(names, prompts, strict=True))
    places = positions(model)
    long = [i for i, ids in enumerate(prompts) if places.most and len(ids) >= places.most]
    if long:
        raise ModelError(
            f"{names[long[0]]}: the prompt has {len(prompts[long[0]])} tokens, but the model has {places.most}"
            " positions, which leaves none for a completion; shorten it"
            f"{f' ({len(long)} prompts are too long)' if long[1:] else ''}"
        )
    beyond = [i for i, ids in enumerate(prompts) if places.most and len(ids) + wanted > places.most]
    if beyond:
        first, more = beyond[0], f" ({len(beyond)} prompts)" if beyond[1:] else ""
        rank_zero_warn(
            f"halos: {names[first]}: the prompt has {len(prompts[first])} tokens; with max_new_tokens ({wanted}) it"
            f" exceeds the model's {places.most} positions: "
            + ("its completion ends there" if places.hard else "the model was not trained beyond them")
            + more
        )


def check_vocabulary(model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Iterable[tuple[str, Any]]) -> None:
    """Refuses token ids without a row in the model's embedding.

    Args:
        model: Model that reads the tokens.
        tokenizer: Tokenizer they come from.
        rows: (name, sequence of token ids); read only if the tokenizer has more ids than the model.

    Raises:
        ModelError: naming the row, the tokens and the cure.
    """
    size = vocabulary_size(model)
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= size}
    if not beyond:
        return
    tokens = ", ".join(f"{token!r} ({number})" for number, token in sorted(beyond.items())[:5])
    about = (
        f"the tokenizer has {len(beyond)} tokens without a row in the model's embedding of {size} rows: {tokens}"
        f"{', ...' if len(beyond) > 5 else ''}"
    )
    cure = (
        f"resize the embedding with model.resize_token_embeddings({max(beyond) + 1}) and save the model with its"
        " tokenizer; or use the model's own tokenizer"
    )
    for name, ids in rows:
        most = int(np.max(np.asarray(ids), initial=0))
        if most >= size:
            raise ModelError(
                f"{name} has the token {beyond.get(most, '')!r} ({most}), but {about}; {cure}, or remove such rows"
            )
    rank_zero_warn(f"halos: {about}. No row contains them; if one should, {cure}")


def warn_of_ignored_losses(model: nn.Module, *, router_loss: bool) -> None:
    """Warns about auxiliary losses that transformers would add in training, but the objective does not.

    Args:
        model: The policy.
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
