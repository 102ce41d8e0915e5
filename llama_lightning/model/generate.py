"""Answer prompts: all of them at once, or a bounded number at a time."""

from collections.abc import Iterator

from llama_lightning.model.continuous_batch import ContinuousBatch
from llama_lightning.model.llama import Llama
from llama_lightning.model.sampling import GenerationConfig
from llama_lightning.records import Generation, PromptBatch


def generate(
    model: Llama,
    prompts: PromptBatch,
    config: GenerationConfig,
    *,
    batch_size: int | None = None,
) -> Iterator[Generation]:
    """Generate the responses to each prompt and yield each as soon as it is finished.

    Args:
        model: in eval mode.
        prompts: at least one, none empty.
        config: length and sampling.
        batch_size: responses in the network at a time; a finished one makes room for the next. By
            default all.

    Yields:
        `num_samples` Generations a prompt, shortest responses first where all run at once.
    """
    batch = ContinuousBatch(model, config, batch_size or len(prompts.row_ids) * config.num_samples)
    batch.add(prompts)
    yield from batch.run()
