"""What a chat template writes around messages: where an assistant's turn ends, and which tokens mark turns.

Both are found by rendering dialogues of known words, so they hold for any template, not for a list of known ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product, takewhile
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from halos_pl.data.calls import CALLS, THOUGHTS, forms, printed_wrong, says_none, tool_forms

#: A message, and a tool: a JSON schema.
Message = dict[str, Any]
Tools = list[dict[str, Any]] | None
#: Contents of the dialogues that are rendered: no template writes these words itself.
_WORD = "zqword{}qz"
#: An empty span such as ``<think>\n\n</think>``: a part of a turn that opens or ends none.
_EMPTY_SPAN = re.compile(r"<(\w+)>\s*</\1>")
#: A token that stands in brackets of some kind.
_FORM = re.compile(r"[^\w\s].*[^\w\s]", re.DOTALL)
_LONGEST_SPAN = 40  # characters of an empty one, with the blanks behind it
_TAG = re.compile(r"<(/?)(\w+)>")
_TELLING = 12  # characters; the template's own words may hold a shorter text
NO_TEMPLATE = (
    "The data are message lists, but the tokenizer has no chat template: name one with chat_template (a .jinja file,"
    " or chatml), use an instruct model's tokenizer, or give prompt and completion as plain text."
)


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    *,
    prompt: bool,
    tools: Tools = None,
    begun: bool = False,
) -> str:
    """What the chat template writes.

    Args:
        tokenizer: with a chat template.
        messages: the dialogue.
        prompt: end with the head of an answer.
        tools: that the model may call.
        begun: end with the content of the last message; see :func:`render_begun`.

    Raises:
        ValueError: no chat template, or one that refuses the messages.
    """
    if not tokenizer.chat_template:
        raise ValueError(NO_TEMPLATE)
    how: dict[str, Any] = {"add_generation_prompt": prompt and not begun, "continue_final_message": begun}
    refused: Exception | None = None
    for given, form in product(tool_forms(tools), forms(messages)):
        try:
            # A copy: templates may change what they are given.
            text = str(tokenizer.apply_chat_template(form, tools=given, tokenize=False, **how))  # type: ignore[arg-type]
        except Exception as error:  # templates raise what they like (jinja2.TemplateError, TypeError, ...)
            # What the template itself says (raise_exception) tells more than what it stumbled over.
            refused = refused if refused and type(error) is not TemplateError else error
            continue
        if not printed_wrong(form, text) and not says_none(form, text):
            return text
    roles = [message.get("role") for message in messages]
    why = str(refused or "it does not write the arguments of a call as JSON").partition("\n")[0]
    raise ValueError(f"The chat template refuses messages with the roles {roles}: {why}") from refused


#: A span that the end of a text opens: ``<think>\n``.
OPENED = re.compile(r"<(\w+)>\s*$")
#: An empty span, and another of the same name behind it: ``<think>\n\n</think>\n\n<think>``.
DOUBLED_SPAN = re.compile(r"<(\w+)>\s*</\1>\s*<\1>")


def without_opening(head: str, content: str) -> str:
    """The content without the tag at its start (``<think>``) with which ``head`` already ends."""
    opened = OPENED.search(head)
    tag = f"<{opened[1]}>" if opened else ""
    return content.lstrip().removeprefix(tag).lstrip() if tag and content.lstrip().startswith(tag) else content


def render_begun(tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Tools = None) -> str:
    """What the chat template writes up to the end of the last message, which the assistant is to continue.

    Templates rewrite an answer that holds thoughts as if it were complete: they cut the thoughts, or write an empty
    span in front of them. The content then follows the head of an answer as it is.

    Raises:
        ValueError: no chat template, or one that refuses the messages.
    """
    *before, last = messages
    try:
        text = render(tokenizer, messages, prompt=False, tools=tools, begun=True)
    except ValueError:
        if not before or "</" not in last["content"] or last.keys() - {"role", "content"}:
            raise
    else:
        if not DOUBLED_SPAN.search(text, max(0, len(text) - len(last["content"]) - _LONGEST_SPAN)):
            return text
    head = render(tokenizer, before, prompt=True, tools=tools)
    return head + without_opening(head, last["content"])


def refuse_ignored(tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Tools) -> None:
    """Refuses tools, calls of tools, thoughts and names that the template ignores: the model would never see them.

    What names the tool that has answered, and the id of a call, may be ignored: the call says it. Thoughts may be cut
    from earlier turns.

    Raises:
        ValueError: naming the column or the key.
    """

    def ignored(what: str, key: str) -> ValueError:
        return ValueError(
            f"The chat template ignores {what}, so the model would never see it; use a template that writes it"
            f" (chat_template), or remove it ('ignore: [\"{key}\"]' drops it from a source of training data)."
        )

    def differs(others: list[Message], other_tools: Tools) -> bool:
        try:
            return render(tokenizer, others, prompt=False, tools=other_tools) != text
        except ValueError:
            return True  # it reads what is missing

    said = [message.keys() - {"role", "content"} for message in messages]
    if not tools and not any(said):
        return
    text = render(tokenizer, messages, prompt=False, tools=tools)
    if tools and not differs(messages, None):
        raise ignored("the column 'tools'", "tools")
    for i, keys in enumerate(said):
        role = messages[i]["role"]
        for key in sorted(keys - {"tool_call_id"} - ({"name"} if role in ("tool", "function", "ipython") else set())):
            left = {k: v for k, v in messages[i].items() if k != key}
            without = [*messages[:i], left, *messages[i + 1 :]]
            if not differs(without, tools) and not (key in THOUGHTS and _writes_thoughts(tokenizer, key)):
                raise ignored(f"the {key} of message {i + 1} (role {role!r})", key)


def _writes_thoughts(tokenizer: PreTrainedTokenizerBase, key: str) -> bool:
    """Whether the template writes the thoughts of a dialogue's last turn, whatever it cuts from earlier ones."""
    last = {"role": "assistant", "content": _WORD.format(1), key: _WORD.format(2)}
    try:
        text = render(tokenizer, [{"role": "user", "content": _WORD.format(0)}, last], prompt=False)
    except ValueError:
        return False
    return _WORD.format(2) in text


def refuse_dropped(tokenizer: PreTrainedTokenizerBase, messages: list[Message], text: str, tools: Tools = None) -> None:
    """Refuses messages whose content is not in their rendering ``text`` because the template ignores it.

    A template may change a content, e.g. cut earlier thoughts; one that ignores it writes nothing for a single word
    in its place either.

    Raises:
        ValueError: naming the message.
    """
    word = _WORD.format(0)
    for i, message in enumerate(messages):
        content = message["content"].strip()
        if not content or (len(content) >= _TELLING and content in text):
            continue
        try:
            mismatched = render(
                tokenizer, [*messages[:i], message | {"content": word}, *messages[i + 1 :]], prompt=False, tools=tools
            )
        except ValueError:
            continue  # it reads the content
        if word not in mismatched:
            cure = "remove the content beside its calls" if CALLS in message else "remove such messages"
            raise ValueError(
                f"The chat template ignores the content of message {i + 1} (role {message['role']!r}), so the model"
                f" would never see it; use a template that writes text of this role, or {cure}."
            )


def around_content(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], place: int, tools: Tools = None
) -> tuple[str, str] | None:
    """What the template writes before and after the content of a message, in the rendering of all of them.

    Only the content of the message itself is rendered, no call and no thought; None if the template refuses that.
    """
    word = _WORD.format(0)
    kept = {key: value for key, value in messages[place].items() if key != CALLS and key not in THOUGHTS}
    try:
        changed = [*messages[:place], kept | {"content": word}, *messages[place + 1 :]]
        text = render(tokenizer, changed, prompt=False, tools=tools)
    except ValueError:
        return None
    before, found, after = text.partition(word)
    return (before, after) if found else None


def before_content(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], place: int, tools: Tools = None
) -> str | None:
    """The first part of :func:`around_content`."""
    around = around_content(tokenizer, messages, place, tools)
    return around and around[0]


def _segments(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str]) -> list[str] | None:
    """What the template writes before, between and after the contents of a dialogue; None where it refuses it."""
    words = [_WORD.format(i) for i in range(len(roles))]
    try:
        messages = [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)]
        text = render(tokenizer, messages, prompt=False)
    except ValueError:
        return None
    segments, at = [], 0
    for word in words:
        place = text.rfind(word) if word == words[-1] else text.find(word, at)
        if place < at:
            return None
        segments.append(text[at:place])
        at = place + len(word)
    return [*segments, text[at:]]


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the tokens, the longest first; nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """The added tokens that may be a part of a dialogue's form, and whether each is special.

    Of those that are not special only such as ``<|im_end|>`` or ``[INST]``: tokenizers also add line breaks and blanks,
    and users add words.
    """
    added = {token.content: bool(token.special) for token in tokenizer.added_tokens_decoder.values()}
    return {token: special for token, special in added.items() if token.strip() and (special or _FORM.fullmatch(token))}


@dataclass(frozen=True)
class TurnEnd:
    """How the template ends an assistant's turn.

    Attributes:
        token: the token at which the model stops when it speaks.
        id: of that token.
        after: what the template still writes behind it at the end of a dialogue, such as a line break.
    """

    token: str
    id: int
    after: str

    def cut(self, text: str) -> str:
        """The rendering of a completion up to its last turn's end, ``token`` included.

        Raises:
            ValueError: it does not end as the template ends turns.
        """
        if text.endswith(self.token + self.after):
            return text[: len(text) - len(self.after)]
        before, token, rest = text.rpartition(self.token)
        if not token or rest.strip():
            raise ValueError(
                f"The chat template ends this completion with {text[-40:]!r}, other dialogues with"
                f" {self.token + self.after!r}; use a template that ends every turn of the assistant in the same way."
            )
        return before + token


def turn_end(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str] = ()) -> TurnEnd | None:
    """The end of an assistant's turn, found by rendering; None where the template writes no token for it.

    Of the tokens behind the content of the last message:

    1. Those from the first on that begins a message are no part of the turn (templates that always add the head of
       an answer).
    2. What is written behind an inner turn as well ends the turn: up to EOS, or else up to the last such token
       (``<|END_RESPONSE|><|END_OF_TURN_TOKEN|>``; but of phi-3's ``<|end|>\\n<|endoftext|>`` only the first).
    3. Where an inner turn ends with another token (harmony's ``<|end|>``, last ``<|return|>``), or the template
       refuses a second turn: of the tokens directly one after the other the one that ends the user's turn too, else
       EOS, else the last.

    Added tokens that are not special count only where no special one but EOS is there.

    Args:
        tokenizer: without a chat template no turn has an end.
        roles: of a dialogue that the template accepts, should it refuse the plain ones; the last is the assistant's.

    Raises:
        ValueError: the template refuses every dialogue that was tried.
    """
    if not tokenizer.chat_template:
        return None
    asked = dict.fromkeys([("user", "assistant"), ("system", "user", "assistant"), *([tuple(roles)] if roles else [])])
    tried = {own: segments for own in asked if (segments := _segments(tokenizer, own))}
    if not tried:
        raise ValueError("The chat template refuses a dialogue of user and assistant.")
    first = next(iter(tried))
    tail, inner = tried[first][-1], _segments(tokenizer, [*first, "user", "assistant"])
    eos, added = str(tokenizer.eos_token), added_tokens(tokenizer)
    pattern = any_of([eos, *(token for token, special in added.items() if special)])
    if set(pattern.findall(tail)) <= {eos}:
        pattern = any_of([eos, *added])
    openers = set.intersection(*(set(pattern.findall(segments[0])) for segments in tried.values())) - {eos}
    found = list(pattern.finditer(tail))
    found = list(takewhile(lambda match: match[0] not in openers, found)) or found[:1]
    if not found:
        return None
    pairs = enumerate(zip(tail, inner[len(first)], strict=False)) if inner else iter(())
    shared = next((i for i, (a, b) in pairs if a != b), min(len(tail), len(inner[len(first)])) if inner else 0)
    both = [match for match in found if match.end() <= shared]
    if both:
        end = next((match for match in both if match[0] == eos), both[-1])
    else:
        run = found[:1]
        for match in found[1:]:
            if match.start() != run[-1].end():
                break
            run.append(match)
        users = pattern.search(tried[first][-2])
        likely = [match for token in (users and users[0], eos) for match in run if match[0] == token]
        end = (likely or run[-1:])[0]
    token: Any = tokenizer.convert_tokens_to_ids(end[0])
    return TurnEnd(end[0], int(token), tail[end.end() :])


def spelled_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes behind an answer, where no token is in it; empty where there is one, or nothing."""
    if not tokenizer.chat_template:
        return ""
    segments = _segments(tokenizer, ("user", "assistant"))
    tail = segments[-1].strip() if segments else ""
    return "" if any_of([str(tokenizer.eos_token), *added_tokens(tokenizer)]).search(tail) else tail


def ending(tokenizer: PreTrainedTokenizerBase, text: str) -> TurnEnd | None:
    """The added token at the end of a rendered dialogue; None where there is none."""
    *_, last = [None, *any_of(added_tokens(tokenizer)).finditer(text)]
    if last is None or text[last.end() :].strip():
        return None
    token: Any = tokenizer.convert_tokens_to_ids(last[0])
    return TurnEnd(last[0], int(token), text[last.end() :])


def call_end(tokenizer: PreTrainedTokenizerBase, text: str, usual: TurnEnd | None) -> TurnEnd | None:
    """How a rendered dialogue ends whose last message calls a tool: some templates write ``<|call|>`` there."""
    if usual is None or text.rstrip().endswith(usual.token):
        return usual
    return ending(tokenizer, text) or usual


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids at which generation stops, whatever the model's own settings name: EOS and the end of a turn."""
    try:
        end = turn_end(tokenizer)
    except ValueError:
        end = None
    eos: Any = tokenizer.eos_token_id
    return sorted({*([] if eos is None else [eos]), *([] if end is None else [end.id])})


def _rendered(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """What the template writes around the messages of dialogues, without empty spans."""
    for roles in (
        ["user", "assistant", "user", "assistant"],
        ["user", "assistant"],
        ["system", "user", "assistant"],
    ):
        for segment in _segments(tokenizer, roles) or []:
            yield _EMPTY_SPAN.sub("", segment)


def turn_markers(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The tokens with which a text could forge a turn; empty without a chat template.

    These are BOS, EOS, padding, [CLS] and [SEP]; every added token that the template writes around the messages of a
    plain dialogue; and every special token that stands in the template's source. Tags that come in pairs, such as
    ``<think>`` and ``</think>``, mark a span within a turn and do not count, unless the template writes them around
    messages. A special token that no template writes (``<tool>``, added by a user) cannot forge a turn.
    """
    if not tokenizer.chat_template:
        return frozenset()
    names = ("bos_token", "eos_token", "pad_token", "cls_token", "sep_token")
    named = (str(getattr(tokenizer, name, None) or "") for name in names)
    own = {token for token in named if _FORM.fullmatch(token) or token == tokenizer.eos_token}
    added = added_tokens(tokenizer)
    pattern = any_of(added)
    own |= {token for segment in _rendered(tokenizer) for token in pattern.findall(segment)}
    given: Any = tokenizer.chat_template
    source = "".join(given.values()) if isinstance(given, dict) else str(given)

    def paired(token: str) -> bool:
        tag = _TAG.fullmatch(token)
        return tag is not None and f"<{'' if tag[1] else '/'}{tag[2]}>" in added

    return frozenset(own | {t for t, special in added.items() if special and t in source and not paired(t)})
