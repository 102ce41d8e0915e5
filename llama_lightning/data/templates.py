r"""The one formatter: how a record becomes a prompt, in training, prediction and everywhere else.

A text template leaves fields verbatim. A prompt ends where the answer begins, and the two are
tokenised apart: in Llama 3 ":\n" is one token, so that joined text would be cut elsewhere in
training than in prediction.
Source of the Alpaca text: github.com/tatsu-lab/stanford_alpaca, train.py. Of the chat template:
llama3/chat_format.py of github.com/meta-llama/llama-models.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from llama_lightning.data.rows import Row, Turn, has_input
from llama_lightning.data.tokenizer import BEGIN_OF_TEXT, END_OF_TEXT

TemplateName = Literal["alpaca", "plain", "llama3"]

START_HEADER, END_HEADER = "<|start_header_id|>", "<|end_header_id|>"
END_OF_TURN = "<|eot_id|>"


class Piece(NamedTuple):
    """A stretch of a record that is tokenised by itself."""

    text: str
    special: bool = False  # the name of one special token, rather than text
    learnt: bool = False


@dataclass(frozen=True)
class PromptTemplate:
    """The text around a record's fields, in two variants, and the same for other programs.

    Attributes:
        with_input: the prompt of a record, with {instruction} and {input}.
        without_input: the same without {input}.
        jinja: from `messages` to the prompt, for transformers, vLLM and llama.cpp. An input stands
            in the user's message, behind the instruction, as `with_input` writes it.
        ollama: from .System and .Prompt to the prompt, as Ollama's TEMPLATE.
    """

    with_input: str
    without_input: str
    jinja: str
    ollama: str
    takes_chats = False  # of more than a question and its answer

    @property
    def text(self) -> str:
        """What tells one template from another."""
        return self.with_input

    def format(self, instruction: str, input_text: str) -> str:
        """Write the prompt of one record."""
        if has_input(input_text):
            return self.with_input.format(instruction=instruction, input=input_text)
        return self.without_input.format(instruction=instruction)

    def prompt(self, row: Row) -> list[Piece]:
        """Write what the model reads before it answers."""
        prompt = self.format(row.instruction, row.input)
        return [Piece(BEGIN_OF_TEXT, special=True), Piece(prompt)]

    def answer(self, row: Row) -> list[Piece]:
        """Write what the model should answer, with the token that ends it."""
        return [Piece(row.output, learnt=True), Piece(END_OF_TEXT, special=True, learnt=True)]


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of Llama 3 Instruct, for base models that have been trained on it.

    It is that of Meta-Llama-3-Instruct: a turn's role stands in a header and its text, without the
    spaces around it, ends with `<|eot_id|>`. The templates of 3.1 and 3.2 also put a system turn
    with the date of today in front, which would make another prompt every day; here a chat has the
    system turn that its record has. An Alpaca record is one user turn, instruction and input with a
    line break between them.

    Attributes:
        jinja: from `messages` to the prompt, for transformers, vLLM and llama.cpp.
        ollama: from .Messages to the prompt, as Ollama's TEMPLATE.
    """

    jinja: str
    ollama: str
    takes_chats = True

    @property
    def text(self) -> str:
        """What tells one template from another."""
        return self.jinja

    def _header(self, role: str) -> list[Piece]:
        names = [Piece(START_HEADER, special=True), Piece(role), Piece(END_HEADER, special=True)]
        return [*names, Piece("\n\n")]

    def _content(self, text: str, *, learnt: bool) -> list[Piece]:
        end = Piece(END_OF_TURN, special=True, learnt=learnt)
        return [Piece(text.strip(), learnt=learnt), end]

    def prompt(self, row: Row) -> list[Piece]:
        """Write what the model reads before it answers; earlier answers in it may be learnt too."""
        question = row.instruction + (f"\n{row.input}" if has_input(row.input) else "")
        pieces = [Piece(BEGIN_OF_TEXT, special=True)]
        for role, content in row.turns or (Turn("user", question),):
            pieces += self._header(role) + self._content(content, learnt=role == "assistant")
        return pieces + self._header("assistant")

    def answer(self, row: Row) -> list[Piece]:
        """Write what the model should answer, with the token that ends it."""
        return self._content(row.output, learnt=True)


TASK = "Below is an instruction that describes a task"
REQUEST = "Write a response that appropriately completes the request."
SENTENCES = f"{TASK}. {REQUEST}"
SENTENCES_WITH_INPUT = f"{TASK}, paired with an input that provides further context. {REQUEST}"

# A system message stands in for the first sentences, as in vLLM's template_alpaca.jinja.
ALPACA_JINJA = (
    "{%- set without_input = '" + SENTENCES + r"\n\n' %}"
    "\n{%- set with_input = '" + SENTENCES_WITH_INPUT + r"\n\n' %}"
    r"""
{{- bos_token }}
{%- for message in messages %}
    {%- set content = message['content'] %}
    {%- if message['role'] == 'system' %}
        {{- content + '\n\n' }}
    {%- elif message['role'] == 'user' %}
        {%- if loop.first %}
            {{- with_input if '\n\n### Input:\n' in content else without_input }}
        {%- endif %}
        {{- '### Instruction:\n' + content + '\n\n' }}
    {%- else %}
        {{- '### Response:\n' + content + eos_token }}
        {{- '' if loop.last else '\n\n' }}
    {%- endif %}
{%- endfor %}
{{- '### Response:\n' if add_generation_prompt else '' }}"""
)

PLAIN_JINJA = """{{- bos_token }}
{%- for message in messages %}
    {{- message['content'] }}
    {%- if message['role'] == 'assistant' %}
        {{- eos_token }}
    {%- endif %}
{%- endfor %}"""

Template = PromptTemplate | ChatTemplate

ALPACA = PromptTemplate(
    with_input=(
        f"{SENTENCES_WITH_INPUT}\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    ),
    without_input=f"{SENTENCES}\n\n### Instruction:\n{{instruction}}\n\n### Response:\n",
    jinja=ALPACA_JINJA,
    ollama=(
        "{{ if .System }}{{ .System }}{{ else }}" + SENTENCES + "{{ end }}\n\n"
        "### Instruction:\n{{ .Prompt }}\n\n### Response:\n{{ .Response }}"
    ),
)

TEMPLATES: dict[TemplateName, Template] = {
    "alpaca": ALPACA,
    # No words of its own: the record is a text and its continuation, as in pretraining.
    "plain": PromptTemplate(
        with_input="{instruction}\n{input}",
        without_input="{instruction}",
        jinja=PLAIN_JINJA,
        ollama="{{ .Prompt }}{{ .Response }}",
    ),
    "llama3": ChatTemplate(
        jinja=(
            "{{ bos_token }}{% for turn in messages %}"
            "{{ '<|start_header_id|>' + turn['role'] + '<|end_header_id|>\n\n' }}"
            "{{ turn['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
            "{% if add_generation_prompt %}"
            "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
        ),
        ollama=(
            "{{ range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n"
            "{{ .Content }}<|eot_id|>{{ end }}"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
    ),
}
