"""Speculative decoding: cheap proposals for several tokens, verified by the model in one pass (Leviathan et al., ICML 2023).

A draft is accepted when the model, drawing at its position with the request's own random number for that position, draws the
same token. So a sequence has the same tokens with and without drafts, greedy or sampled, whoever proposes and however many
(docs/decisions/0014).
"""

from armillary.serve.speculation.drafter import Drafter, Proposer

__all__ = ["Drafter", "Proposer"]
