"""Prompts in, batch by batch, responses out as they finish: one stream across the batches.

It does not know where prompts come from, nor who listens.
"""

from collections.abc import Callable
from contextlib import ExitStack

from llama_lightning.model.continuous_batch import ContinuousBatch
from llama_lightning.model.llama import Llama
from llama_lightning.model.prepack import prepacked
from llama_lightning.model.sampling import GenerationConfig
from llama_lightning.model.screened_head import screened
from llama_lightning.records import Generation, PromptBatch


class Answering:
    """What is unfinished of one batch of prompts goes on beside the next.

    While something is, the network's weights are laid out for it.

    Attributes:
        listeners: who is told of each response the moment it is finished.
    """

    def __init__(self) -> None:
        self.listeners: list[Callable[[Generation], None]] = []
        self._running: ContinuousBatch | None = None
        self._laid_out = ExitStack()

    def answer(
        self, model: Llama, config: GenerationConfig, batch: PromptBatch, *, drain: bool
    ) -> list[Generation]:
        """Answer as many prompts at a time as the first batch has.

        Args:
            model: the same until all are answered.
            config: length and sampling; likewise.
            batch: may be empty.
            drain: until all are answered; otherwise only until none of the batch is waiting, and
                the next batch's take the places of those that finish.

        Returns:
            What was finished meanwhile.
        """
        generations = []
        try:
            if self._running is None and len(batch.row_ids):
                size = len(batch.row_ids) * config.num_samples
                if config.takes_likeliest:
                    self._laid_out.enter_context(screened(model, size))
                self._laid_out.enter_context(prepacked(model, size))
                self._running = ContinuousBatch(model, config, size)
            if self._running is not None:
                self._running.add(batch)
                for generation in self._running.run(drain=drain):
                    generations.append(generation)
                    for tell in self.listeners:
                        tell(generation)
        except BaseException:
            drain = True  # whatever comes next begins anew
            raise
        finally:
            if drain:
                self.stop()
        return generations

    def stop(self) -> None:
        """Give the weights back as they were, and drop what is not answered."""
        self._running = None
        self._laid_out.close()
