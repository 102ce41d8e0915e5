r"""The one formatter: how a record becomes a prompt, in training, prediction and everywhere else.

Fields enter verbatim. A prompt ends where the answer begins, and the two are tokenised apart: in
Llama 3 ":\n" is one token, so that joined text would be cut elsewhere in training than in
prediction.
Source of the Alpaca text: github.com/tatsu-lab/stanford_alpaca, train.py.
"""

from dataclasses import dataclass
from typing import Literal

TemplateName = Literal["alpaca", "plain"]


@dataclass(frozen=True)
class PromptTemplate:
    """The text around a record's fields, in two variants."""

    with_input: str
    without_input: str

    def format(self, instruction: str, input_text: str) -> str:
        """Write the prompt of one record."""
        if has_input(input_text):
            return self.with_input.format(instruction=instruction, input=input_text)
        return self.without_input.format(instruction=instruction)


def has_input(input_text: str) -> bool:
    """Tell whether a record has an input; Alpaca data writes "<no input>" for none."""
    return input_text.strip().lower() not in ("", "<no input>", "<noinput>")


TEMPLATES: dict[TemplateName, PromptTemplate] = {
    "alpaca": PromptTemplate(
        with_input=(
            "Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
        ),
        without_input=(
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\n{instruction}\n\n### Response:\n"
        ),
    ),
    # No words of its own: the record is a text and its continuation, as in pretraining.
    "plain": PromptTemplate(with_input="{instruction}\n{input}", without_input="{instruction}"),
}
