"""Reads preferences from feedback files, and computes the features of their completions and log pi_ref once."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from halos_pl.batch import Needs, TokenBatch
from halos_pl.candidates.policy import Candidates
from halos_pl.candidates.states import Precision, StoredStates
from halos_pl.common.progress import Progress
from halos_pl.data import FeedbackDataModule
from halos_pl.data.example import DataError
from halos_pl.data.same_prompt import words_of
from halos_pl.data.transforms import Pair
from halos_pl.policy.limits import check_length, check_vocabulary
from halos_pl.policy.loading import ModelSpec, load_model, load_tokenizer
from halos_pl.policy.logprobs import completion_mask
from halos_pl.policy.reference import FrozenCopy
from halos_pl.policy.scorer import Scorer
from halos_pl.policy.store import ReferenceStore, StoredReference

#: Rows that the model scores together.
BATCH = 16


@dataclass
class Preferences:
    """Preferences in files, and the distinct completions that they are about.

    A prompt's completions are those of all its rows; one that occurs in several rows is one candidate.

    Attributes:
        prompt: number of each completion's prompt, in the order of the data.
        texts: each completion as text.
        tokens: number of its tokens with loss.
        reference_logps: log pi_ref of each completion in nats; empty without a reference.
        states: mean last hidden state of each completion under the reference, float32 [size] each; empty unless asked
            for.
        words: words of each prompt, by its number (:func:`halos_pl.data.same_prompt.words_of`).
        pairs: (chosen, rejected) of each preference, as numbers of completions.
        names: row of each preference, ``FILE:LINE``.
        scored, stored: number of rows whose log pi_ref was computed, and found in the cache.
    """

    prompt: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    reference_logps: list[float] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    words: dict[int, str] = field(default_factory=dict)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    scored: int = 0
    stored: int = 0

    def features(self, words: int) -> Tensor:
        """float32 [n, 1 + words], or one more column with a reference.

        Number of tokens; log pi_ref per token, if there is a reference; and the number of occurrences of words, each
        counted in one of ``words`` columns by its hash.
        """
        columns = [list(map(float, self.tokens))]
        if self.reference_logps:
            columns.append([logp / n for logp, n in zip(self.reference_logps, self.tokens, strict=True)])
        bags = torch.zeros(len(self.texts), words)
        for row, text in enumerate(self.texts if words else ()):
            for word in text.lower().split():
                bags[row, zlib.crc32(word.encode()) % words] += 1
        return torch.cat([torch.tensor(columns).T, bags], dim=1)

    def sets(self, pairs: Sequence[int], features: Tensor | None) -> tuple[Candidates, Tensor]:
        """The candidates of the prompts of some preferences.

        Args:
            pairs: numbers of preferences.
            features: float [n, d] of all completions; None for free logits.

        Returns:
            The candidates, and the places of chosen and rejected, LongTensor [len(pairs), 2].
        """
        number = {self.prompt[self.pairs[i][0]]: 0 for i in pairs}
        number = {prompt: k for k, prompt in enumerate(number)}
        rows = [row for row, prompt in enumerate(self.prompt) if prompt in number]
        logps = torch.tensor([self.reference_logps[row] if self.reference_logps else 0.0 for row in rows])
        prompt = torch.tensor([number[self.prompt[row]] for row in rows])
        candidates, place = Candidates.of(prompt, logps, None if features is None else features[rows])
        place_of = dict(zip(rows, place.tolist(), strict=True))
        return candidates, torch.tensor([[place_of[row] for row in self.pairs[i]] for i in pairs])


def read_preferences(
    files: Any,
    model: ModelSpec,
    *,
    reference: bool,
    states: bool = False,
    precision: Precision = "32-true",
    max_length: int = 512,
    text_prompts: Any = "plain",
) -> Preferences:
    """The preferences in files, read as ``halos evaluate`` reads held-out feedback.

    Of completions with labels or scores, each is preferred to all of its prompt's that are worse; those without a worse
    or better one are left out and counted in the log.

    Log-probs come from the reference store (:mod:`halos_pl.policy.store`), in which they are found by content; those
    that it lacks are computed and stored at once, so that an interrupted call loses little.

    Args:
        files: sources of feedback, as of ``data.test``.
        model: its tokenizer cuts rows to ``max_length``, and it is the reference.
        reference: whether to compute log pi_ref.
        states: whether to compute mean hidden states too, in the same pass; needs ``reference``.
        precision: of the reference's layers in that pass (see :mod:`halos_pl.candidates.states`).
        max_length, text_prompts: as in :class:`~halos_pl.data.FeedbackDataModule`.

    Raises:
        DataError: a row is faulty or has no finite log-prob or a weight other than 1, or there are no preferences.
        ModelError: the model cannot be loaded, or the rows do not suit it.
    """
    data = FeedbackDataModule(
        test=files,
        eval_batch_size=BATCH,
        max_length=max_length,
        text_prompts=text_prompts,
        transforms=[Pair(which="all")],
    )
    tokenizer = load_tokenizer(model)
    data.connect(tokenizer=tokenizer, needs=Needs(undesirable=True))
    data.setup("test")
    source = _reference(model, tokenizer, data, precision if states else None) if reference else None
    read, known = Preferences(), dict[tuple[int, tuple[int, ...]], int]()
    loader = data.test_dataloader()
    with Progress(len(loader), "reading preferences") as progress:
        for batch in loader:
            _add(read, known, batch, tokenizer, None if source is None else _scored(source, batch))
            progress.advance()
    if source is not None:
        read.scored, read.stored = source.rows_computed, source.rows_stored
    return read


def _reference(
    model: ModelSpec, tokenizer: Any, data: FeedbackDataModule, precision: Precision | None
) -> StoredReference | StoredStates:
    scorer = Scorer(load_model(model), name="the reference").eval()
    check_length(scorer.model, data.longest)
    check_vocabulary(scorer.model, tokenizer, data.tokens())
    if precision is not None:
        return StoredStates(scorer, ReferenceStore(), precision)
    reference = FrozenCopy()
    reference.bind(scorer, model, stored=True)
    return StoredReference(reference, ReferenceStore(), lambda: scorer.numerics)


def _scored(source: StoredReference | StoredStates, batch: TokenBatch) -> Tensor:
    """float32 [n, 1 + size], as of :class:`StoredStates`; without states, size is 0."""
    return source.logps(batch).sum(1, keepdim=True) if isinstance(source, StoredReference) else source(batch)


def _add(
    read: Preferences,
    known: dict[tuple[int, tuple[int, ...]], int],
    batch: TokenBatch,
    tokenizer: Any,
    scored: Tensor | None,
) -> None:
    for name, weight in zip(batch.row_ids, batch.labels.weight.tolist(), strict=True):
        if weight != 1:
            raise DataError(
                f"{name}: the row has the weight {weight:g}, but a policy of candidates counts each preference once;"
                " list the column in 'ignore' of the source"
            )
    tokens, place = completion_mask(batch).sum(1).tolist(), []
    for i, completion in enumerate(batch.completions):
        key = int(batch.labels.group[i]), tuple(completion.tolist())
        if key not in known:
            known[key] = len(known)
            read.prompt.append(key[0])
            if key[0] not in read.words:
                prompt = batch.prompts[int(batch.prompt[i])]
                read.words[key[0]] = words_of(str(tokenizer.decode(prompt)))
            read.texts.append(str(tokenizer.decode(completion, skip_special_tokens=True)))
            read.tokens.append(tokens[i])
            if scored is not None:
                if not bool(scored[i].isfinite().all()):
                    raise DataError(f"{batch.row_ids[i]}: log pi_ref is {scored[i, 0].item()}; leave the row out")
                read.reference_logps.append(scored[i, 0].item())
                if scored.shape[1] > 1:
                    read.states.append(scored[i, 1:])
        place.append(known[key])
    for i, (good, pair) in enumerate(zip(batch.labels.desirable.tolist(), batch.labels.pair.tolist(), strict=True)):
        if good and place[i] == place[pair]:
            raise DataError(
                f"{batch.row_ids[i]}: max_length cuts both completions to the same tokens; raise it, or leave out the"
                " row"
            )
        if good:
            read.pairs.append((place[i], place[pair]))
            read.names.append(batch.row_ids[i].removesuffix("#chosen"))
