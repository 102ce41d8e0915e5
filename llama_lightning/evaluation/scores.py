"""How near responses are to their references, without a judge: exact match and ROUGE-L.

ROUGE-L is torchmetrics': the F-measure of the longest common subsequence of words, in lower case,
where a word is made of a-z and 0-9. Of texts in other letters only exact match says something.
"""

from dataclasses import dataclass

from torchmetrics.functional.text.rouge import rouge_score

from llama_lightning.records import Response


def exact_match(response: str, reference: str) -> bool:
    """Compare two texts, white space around them aside."""
    return response.strip() == reference.strip()


def rouge_l(response: str, reference: str) -> float:
    """Compute ROUGE-L, from 0 to 1."""
    return float(rouge_score(response, reference, rouge_keys="rougeL")["rougeL_fmeasure"])


@dataclass
class TextScores:
    """Sums over the responses that have a reference."""

    count: int = 0
    matches: int = 0
    rouge_l: float = 0.0

    def add(self, response: Response) -> None:
        """Score a response; one without a reference counts for nothing."""
        if response.reference:
            self.count += 1
            self.matches += exact_match(response.response, response.reference)
            self.rouge_l += rouge_l(response.response, response.reference)

    def metrics(self, prefix: str) -> dict[str, float]:
        """Name the means for a logger; empty without any reference."""
        if not self.count:
            return {}
        return {
            f"{prefix}/exact_match": self.matches / self.count,
            f"{prefix}/rouge_l": self.rouge_l / self.count,
        }

    def __str__(self) -> str:
        if not self.count:
            return "no references to compare with"
        return (
            f"exact match {self.matches / self.count:.1%} ({self.matches} of {self.count}), "
            f"ROUGE-L {self.rouge_l / self.count:.3f}"
        )
