"""Special tokens spelled in the text of the data: found, refused, or encoded as the plain text that they are."""

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

#: What is done with special tokens in the text of the data, see :class:`SpecialText`.
SpecialTokens = Literal["refuse", "split", "allow"]


def strings(text: Prompt) -> Iterator[tuple[str, str]]:
    """(where, text) of all that a prompt or a completion says: the text, or what its messages hold, roles included."""
    if isinstance(text, str):
        yield "", text
        return
    for i, message in enumerate(text, start=1):
        for said in message_texts([message]):
            yield f", message {i} ({message['role']})", said
        yield f", the role of message {i}", message["role"]


class SpecialText:
    """The special tokens that a text may spell, and what becomes of them.

    A tokenizer turns the text ``<|im_end|>`` into the token that ends a turn, wherever it stands. In the messages of
    a dialogue such a text forges a turn. So under ``refuse`` a row is a fault if a message spells one of
    :func:`halos_pl.data.turns.turn_markers`; other special tokens (``<tool>``, added by a user) are let through, but
    not in a role. Under ``split`` every special token in the text is encoded as plain text, as with the tokenizers'
    own ``split_special_tokens``, and only the chat template writes special tokens; a role that spells one is refused
    as under ``refuse``. Under ``allow`` the text is encoded as the tokenizer does it.

    A prompt that is plain text is the user's own rendering, turns included, so ``refuse`` lets it through. The end
    token at the very end of a completion is that of the completion, whatever the mode.

    Args:
        tokenizer: of the model to be trained.
        mode: ``refuse``, ``split`` or ``allow``.

    Attributes:
        tokens: the special tokens that are looked for.

    Raises:
        ValueError: there is no such mode.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mode: SpecialTokens) -> None:
        if mode not in get_args(SpecialTokens):
            raise ValueError(f"data.special_tokens_in_text is {mode!r}; it must be refuse, split or allow")
        self.tokenizer, self.mode = tokenizer, mode
        markers = turn_markers(tokenizer)
        self.tokens = sorted(markers | {token for token, special in added_tokens(tokenizer).items() if special})
        self._markers, self._any = markers, any_of(self.tokens)
        # Tokens that are looked for in the normalised text: another text may become one of them.
        normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
        self._normal: Callable[[str], str] | None = normalizer and normalizer.normalize_str
        late = {token.content for token in tokenizer.added_tokens_decoder.values() if token.normalized} & {*self.tokens}
        self._late = {n: token for token in late if (n := self._normal(token)).strip()} if self._normal else {}
        self._in_normal = any_of(self._late)
        # Not to be guessed, so that no text can spell them. They are gone before anything is encoded.
        secret = secrets.token_hex(8)
        self._held = {token: f"zq{secret}h{i}qz" for i, token in enumerate(self.tokens)}
        self._named = {token: f"zq{secret}n{i}qz" for i, token in enumerate(self.tokens)}
        self._in_held = any_of(self._held.values())
        self._token_of = {held: token for token, held in self._held.items()}
        self._plain: Tokenizer | None = None

    def found(self, *texts: Prompt) -> set[str]:
        """The special tokens that the texts spell, roles of messages included."""
        return {token for text in texts for _, said in strings(text) for token in self._spelled(said)}

    def _spelled(self, said: str) -> list[str]:
        found: list[str] = self._any.findall(said)
        if self._late and self._normal:
            found += [self._late[token] for token in self._in_normal.findall(self._normal(said))]
        return found

    def refuse(self, name: str, text: Prompt) -> None:
        """Refuses messages that forge a turn.

        Args:
            name: what the text is, for the error.
            text: messages; plain text passes.

        Raises:
            ValueError: naming the message and the token, under ``refuse``; under ``split`` only for a role.
        """
        if isinstance(text, str) or self.mode == "allow":
            return
        for where, said in strings(text):
            role = where.startswith(", the role")
            if not role and self.mode == "split":
                continue
            spelled = next((token for token in self._spelled(said) if role or token in self._markers), None)
            if role and spelled:
                raise ValueError(f"{name}{where} spells the special token {spelled}; name another role.")
            if spelled:
                at = max(0, said.find(spelled))
                around = said[max(0, at - 15) : at + len(spelled) + 15]
                raise ValueError(
                    f"{name}{where} spells {spelled} (at {around!r}), a token that marks turns, so the text would"
                    " forge one; remove it, or set data.special_tokens_in_text to split (encode it as plain text) or"
                    " allow."
                )

    def hold(self, text: Prompt) -> Prompt:
        """The text with a placeholder for each special token, for the chat template to carry through."""

        def held(said: str) -> str:
            return self._any.sub(lambda match: self._held[match[0]], said)

        if isinstance(text, str):
            return held(text)
        return [{key: value if key == "role" else with_texts(value, held) for key, value in m.items()} for m in text]

    def encode_held(self, rendered: list[str]) -> list[list[int]]:
        """Token ids of texts rendered with placeholders, which are encoded as the plain text that they stand for.

        Raises:
            ValueError: a tokenizer that is not one of the tokenizers library.
        """
        named = (self._any.sub(lambda match: self._named[match[0]], text) for text in rendered)
        texts = [self._in_held.sub(lambda match: self._token_of[match[0]], text) for text in named]
        if self._plain is None:
            self._plain = self._renamed()
        return [encoding.ids for encoding in self._plain.encode_batch(texts, add_special_tokens=False)]

    def _renamed(self) -> Tokenizer:
        """The tokenizer with secret names for its special tokens, so that their usual ones are plain text."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ValueError(
                "data.special_tokens_in_text: split needs a tokenizer of the tokenizers library (a 'fast' one), not a"
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
            raise ValueError(f"data.special_tokens_in_text: split cannot hide {wrong[0]} from this tokenizer")
        return renamed
