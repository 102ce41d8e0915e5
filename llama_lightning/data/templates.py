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

    def format(self, instruction: str, input_text: str) -> str:
        """Write the prompt of one record."""
        if has_input(input_text):
            return self.with_input.format(instruction=instruction, input=input_text)
        return self.without_input.format(instruction=instruction)


def has_input(input_text: str) -> bool:
    """Tell whether a record has an input; Alpaca data writes "<no input>" for none."""
    return input_text.strip().lower() not in ("", "<no input>", "<noinput>")


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

TEMPLATES: dict[TemplateName, PromptTemplate] = {
    "alpaca": PromptTemplate(
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
    ),
    # No words of its own: the record is a text and its continuation, as in pretraining.
    "plain": PromptTemplate(
        with_input="{instruction}\n{input}",
        without_input="{instruction}",
        jinja=PLAIN_JINJA,
        ollama="{{ .Prompt }}{{ .Response }}",
    ),
}
