"""Policies over a fixed set of completions of each prompt: pi(y|x) ~ pi_ref(y|x) * exp(theta . phi(x, y)).

Log pi_ref and the features phi are computed once, so that a fit takes milliseconds and thousands of seeds can be
compared. Both models are normalised over the prompt's candidates, which makes KL(pi || pi_ref) exact.
"""

from halos_pl.candidates.fitting import Fitted as Fitted
from halos_pl.candidates.fitting import fit as fit
from halos_pl.candidates.fitting import losses as losses
from halos_pl.candidates.policy import Candidates as Candidates
from halos_pl.candidates.reference_point import CandidateKL as CandidateKL
from halos_pl.candidates.reference_point import CandidateRows as CandidateRows
from halos_pl.candidates.votes import Votes as Votes
from halos_pl.candidates.votes import draw as draw
