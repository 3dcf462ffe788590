"""Special tokens spelled in the text of the data: found, refused, or encoded as plain text."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from halos_pl.data.calls import message_texts, with_texts
from halos_pl.data.example import Prompt
from halos_pl.data.turns import added_tokens, any_of, turn_markers

#: How special tokens in the text of the data are treated, see :class:`SpecialText`.
SpecialTokens = Literal["refuse", "split", "allow"]


def strings(text: Prompt) -> Iterator[tuple[str, str]]:
    """(where, text) for each text of a prompt or completion, including the roles of its messages."""
    if isinstance(text, str):
        yield "", text
        return
    for i, message in enumerate(text, start=1):
        for part in message_texts([message]):
            yield f", message {i} ({message['role']})", part
        yield f", the role of message {i}", message["role"]


class SpecialText:
    """Handles special tokens that a text spells.

    A tokenizer turns the text ``<|im_end|>`` into the token that ends a turn. In a message, such a text forges a turn.
    ``refuse`` therefore refuses messages that spell one of :func:`halos_pl.data.turns.turn_markers`, and roles that
    spell any special token; other special tokens (``<tool>``, added by a user) are accepted. ``split`` encodes special
    tokens in the text as plain text, as ``split_special_tokens`` does, so that only the chat template writes special
    tokens; roles are checked as under ``refuse``. ``allow`` encodes the text as the tokenizer does.

    A plain-text prompt may be rendered by the user, turns included, so ``refuse`` accepts it. An end token at the very
    end of a completion counts as its end in every mode.

    Args:
        tokenizer: tokenizer of the model to be trained.
        mode: ``refuse``, ``split`` or ``allow``.

    Attributes:
        tokens: the special tokens that are searched for.

    Raises:
        ValueError: the mode is unknown.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mode: SpecialTokens) -> None:
        if mode not in get_args(SpecialTokens):
            raise ValueError(f"data.special_tokens_in_text is {mode!r}; it must be refuse, split or allow")
        self.tokenizer, self.mode = tokenizer, mode
        markers = turn_markers(tokenizer)
        self.tokens = sorted(markers | {token for token, special in added_tokens(tokenizer).items() if special})
        self._markers, self._any = markers, any_of(self.tokens)
        # Tokens matched after normalisation: another text may become one of them.
        normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
        self._normal: Callable[[str], str] | None = normalizer and normalizer.normalize_str
        late = {token.content for token in tokenizer.added_tokens_decoder.values() if token.normalized} & {*self.tokens}
        self._late = {n: token for token in late if (n := self._normal(token)).strip()} if self._normal else {}
        self._in_normal = any_of(self._late)
        # Unguessable placeholders, so that no text spells them; they are replaced before anything is encoded.
        secret = secrets.token_hex(8)
        self._held = {token: f"zq{secret}h{i}qz" for i, token in enumerate(self.tokens)}
        self._named = {token: f"zq{secret}n{i}qz" for i, token in enumerate(self.tokens)}
        self._in_held = any_of(self._held.values())
        self._token_of = {held: token for token, held in self._held.items()}
        self._plain: Tokenizer | None = None

    def found(self, *texts: Prompt) -> set[str]:
        """The special tokens spelled in the texts, including the roles of messages."""
        return {token for text in texts for _, part in strings(text) for token in self._spelled(part)}

    def _spelled(self, text: str) -> list[str]:
        tokens: list[str] = self._any.findall(text)
        if self._late and self._normal:
            tokens += [self._late[token] for token in self._in_normal.findall(self._normal(text))]
        return tokens

    def refuse(self, name: str, text: Prompt) -> None:
        """Refuses messages that forge a turn.

        Args:
            name: name of the text, for the error.
            text: messages; plain text is accepted.

        Raises:
            ValueError: names the message and the token.
        """
        if isinstance(text, str) or self.mode == "allow":
            return
        for where, part in strings(text):
            role = where.startswith(", the role")
            if not role and self.mode == "split":
                continue
            spelled = next((token for token in self._spelled(part) if role or token in self._markers), None)
            if role and spelled:
                raise ValueError(f"{name}{where} spells the special token {spelled}; use another role.")
            if spelled:
                at = max(0, part.find(spelled))
                around = part[max(0, at - 15) : at + len(spelled) + 15]
                raise ValueError(
                    f"{name}{where} spells {spelled} (at {around!r}), which marks turns: the text would forge a turn;"
                    " remove it, or set special_tokens_in_text to split (encodes it as plain text) or allow."
                )

    def hold(self, text: Prompt) -> Prompt:
        """The text with a placeholder for each special token, to be passed through the chat template."""

        def held(part: str) -> str:
            return self._any.sub(lambda match: self._held[match[0]], part)

        if isinstance(text, str):
            return held(text)
        return [{key: value if key == "role" else with_texts(value, held) for key, value in m.items()} for m in text]

    def encode_held(self, rendered: list[str]) -> list[list[int]]:
        """Token ids of texts rendered with placeholders, which are encoded as the plain text they replaced.

        Raises:
            ValueError: the tokenizer is not one of the tokenizers library.
        """
        named = (self._any.sub(lambda match: self._named[match[0]], text) for text in rendered)
        texts = [self._in_held.sub(lambda match: self._token_of[match[0]], text) for text in named]
        if self._plain is None:
            self._plain = self._renamed()
        return [encoding.ids for encoding in self._plain.encode_batch(texts, add_special_tokens=False)]

    def _renamed(self) -> Tokenizer:
        """The tokenizer with secret names for its special tokens, so that their usual names are plain text."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ValueError(
                "special_tokens_in_text: split needs a tokenizer of the tokenizers library (a 'fast' one), not a"
                f" {type(self.tokenizer).__name__}; use refuse or allow."
            )
        state: dict[str, Any] = json.loads(backend.to_str())
        state["truncation"] = state["padding"] = None

        def named(token: str) -> str:
            return self._named.get(token, token)

        for token in state["added_tokens"]:
            token["content"] = named(token["content"])
        model = state["model"]
        vocabulary = model["vocab"]
        if isinstance(vocabulary, dict):
            model["vocab"] = {named(piece): place for piece, place in vocabulary.items()}
        else:  # Unigram: a list of [piece, score]
            model["vocab"] = [[named(piece), *rest] for piece, *rest in vocabulary]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = named(model["unk_token"])
        renamed = Tokenizer.from_str(json.dumps(state))
        if wrong := [t for t in self.tokens if renamed.token_to_id(named(t)) != backend.token_to_id(t)]:
            raise ValueError(
                f"special_tokens_in_text: split cannot hide {wrong[0]} from this tokenizer; use refuse or allow"
            )
        return renamed
