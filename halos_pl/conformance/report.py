"""The report of a check: one row for each clause, and a verdict computed from the rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

from halos_pl.common.messages import plain

Definition = Literal["icml", "v1"]
TITLES: dict[Definition, str] = {"icml": "ICML 2024, Def. 3.4", "v1": "arXiv v1"}
Status = Literal["passed", "failed", "expected"]


@dataclass(frozen=True)
class ClauseResult:
    """The result of one clause for one target.

    Attributes:
        clause: its name, after the term's name if an objective sums several HALOs.
        status: ``passed``, ``failed``, or ``expected``: failed, for a stated reason.
        witness: the smallest counterexample found, in numbers; else None.
        reason: a remark, such as why the failure was expected.
        required: whether a failure counts against the target; false for a clause that is only reported.
        proof: for a clause on the shape of v, what ``halos prove`` says: ``proved``, ``disproved`` or ``undecided``,
            for which parameters, and why.
    """

    clause: str
    status: Status
    witness: str | None = None
    reason: str | None = None
    required: bool = field(default=True, repr=False)
    proof: str | None = None

    @property
    def shown(self) -> str:
        """The status, and whether it matters."""
        return self.status if self.required or self.status != "failed" else "failed (not required)"

    @property
    def details(self) -> str:
        """Witness, reason and, where it says more, the proof."""
        proof = self.proof if self.proof not in (None, "proved") and self.status == "passed" else None
        return "; ".join(text for text in (self.witness, self.reason, proof) if text)

    @property
    def proved(self) -> str:
        """The first word of the proof."""
        return (self.proof or "").split(" ")[0].rstrip(":")


@dataclass(frozen=True)
class Report:
    """The results of all clauses of one target under one definition.

    Attributes:
        target: its name.
        definition: ``icml`` (ICML 2024, Def. 3.4) or ``v1`` (arXiv v1: any parameterised reward).
        verdict: ``halo``, ``halo (two-sided)``, ``degenerate reference``, ``halo-shaped: fails A, B``,
            ``composite``, ``composite: policy-dependent weights`` or ``not a halo``. For a plug-in alone, it covers the
            clauses of its kind: ``halo`` means that it can be part of one.
        clauses: results in the order of the definition.
        seconds: duration of the check, in seconds.
        unusable: why the target cannot be checked (it always raises, or returns a wrong shape); else None.
    """

    target: str
    definition: Definition
    verdict: str
    clauses: list[ClauseResult]
    seconds: float = 0.0
    unusable: str | None = None

    @property
    def failed(self) -> list[str]:
        """Names of the clauses with status ``failed``, including those that are only reported."""
        return [clause.clause for clause in self.clauses if clause.status == "failed"]

    @property
    def sound(self) -> bool:
        """Whether the verdict is ``halo``, one-sided or two-sided; then ``halos check`` exits with status 0."""
        return self.verdict in ("halo", "halo (two-sided)")

    @property
    def shown_verdict(self) -> str:
        """The verdict, and whether the shape of v is not only searched but proved."""
        proofs = [clause.proved for clause in self.clauses if clause.proof is not None and clause.required]
        if not (self.sound and proofs and set(proofs) == {"proved"}):
            return self.verdict
        return "halo (v proved)" if self.verdict == "halo" else "halo (two-sided, v proved)"

    def to_json(self) -> dict[str, Any]:
        """Plain data: target, definition, verdict, whether the shape of v is proved, and clauses."""
        rows = [asdict(clause) for clause in self.clauses]
        keys = ("clause", "status", "witness", "reason", "proof")
        return {
            "target": self.target,
            "definition": self.definition,
            "verdict": self.verdict,
            "proved": self.shown_verdict != self.verdict,
            "clauses": [{key: row[key] for key in keys} for row in rows],
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Report:
        """The report whose fields are ``data``, from :func:`dataclasses.asdict`."""
        return cls(**{**data, "clauses": [ClauseResult(**row) for row in data["clauses"]]})

    @property
    def heading(self) -> str:
        """Target, definition and duration."""
        return f"{self.target}, definition: {TITLES[self.definition]}, {self.seconds:.1f} s"

    def __str__(self) -> str:
        width = max([len(clause.clause) for clause in self.clauses], default=0)
        lines = [
            f"{clause.clause:<{width}}  {clause.shown:<8}  {clause.proved:<9}  {clause.details}".rstrip()
            for clause in self.clauses
        ]
        return "\n".join([self.heading, "", *lines, "", f"verdict: {self.shown_verdict}"])

    def __rich__(self) -> Group:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for title in ("clause", "status", "proof", "smallest counterexample, and reason"):
            table.add_column(title, no_wrap=title in ("clause", "status", "proof"))
        colours = {"passed": "green", "failed": "red", "expected": "yellow"}
        for clause in self.clauses:
            colour = colours[clause.status] if clause.required else "yellow"
            table.add_row(
                Text(clause.clause), Text(clause.shown, colour), Text(clause.proved), Text(plain(clause.details))
            )
        verdict = Text.assemble("verdict: ", (self.shown_verdict, "bold green" if self.sound else "bold red"))
        return Group(Text(plain(self.heading)), "", table, "", verdict)


class CheckFailed(AssertionError):
    """A clause failed unexpectedly.

    Attributes:
        report: the whole report.
    """

    def __init__(self, report: Report) -> None:
        self.report = report
        failed = [c for c in report.clauses if c.status == "failed" and c.required]
        details = "\n".join(f"  {c.clause}: {c.witness or c.reason}" for c in failed)
        super().__init__(f"{report.target} under {TITLES[report.definition]}: {report.verdict}\n{details}")
