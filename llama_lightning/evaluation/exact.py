"""A judge without a model: how near a response is to its reference.

For tests, for first runs, and for tasks that have one right answer.
"""

from llama_lightning.evaluation.judge import Reply, Request
from llama_lightning.evaluation.scores import exact_match, rouge_l
from llama_lightning.records import Response


def _nearness(response: Response, reference: str) -> float:
    text = response.response
    return 2.0 if exact_match(text, reference) else rouge_l(text, reference)


class ExactJudge:
    """5 for the reference itself; else 1 to 4 by ROUGE-L. Of two the nearer one is better."""

    name = "exact"

    def preflight(self) -> None:
        """Nothing can be missing."""

    def reply(self, request: Request) -> Reply:
        """Compare the response, or both, with the reference."""
        response, reference = request.response.response, request.response.reference
        if request.other is not None:
            one, other = (
                _nearness(shown, reference) for shown in (request.response, request.other)
            )
            better = "Tie" if one == other else "A" if one > other else "B"
            return Reply(f"Nearness {one:.3f} and {other:.3f}. [RESULT] {better}")
        if exact_match(response, reference):
            return Reply("The response is the reference. [RESULT] 5")
        similarity = rouge_l(response, reference)
        return Reply(f"ROUGE-L {similarity:.3f}. [RESULT] {1 + round(3 * similarity)}")

    def close(self) -> None:
        """Nothing is held."""
