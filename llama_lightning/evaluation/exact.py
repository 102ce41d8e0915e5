"""A judge without a model: how near a response is to its reference.

For tests, for first runs, and for tasks that have one right answer.
"""

from llama_lightning.evaluation.judge import Reply, Request
from llama_lightning.evaluation.scores import exact_match, rouge_l


class ExactJudge:
    """5 for the reference itself; else 1 to 4 by ROUGE-L."""

    name = "exact"

    def preflight(self) -> None:
        """Nothing can be missing."""

    def reply(self, request: Request) -> Reply:
        """Compare the response with its reference."""
        response, reference = request.response.response, request.response.reference
        if exact_match(response, reference):
            return Reply("The response is the reference. [RESULT] 5")
        similarity = rouge_l(response, reference)
        return Reply(f"ROUGE-L {similarity:.3f}. [RESULT] {1 + round(3 * similarity)}")

    def close(self) -> None:
        """Nothing is held."""
