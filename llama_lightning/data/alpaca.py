"""The data module: files to parts, parts to micro-batches, and where a resumed run goes on.

It owns the tokenizer and the template; the model receives tokens only.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from llama_lightning.assets import TINY, TINY_HELDOUT, TINY_TRAIN
from llama_lightning.data.batching import collate_prompts
from llama_lightning.data.corpus import Corpus, Encoding, default_cache
from llama_lightning.data.examples import Turns, encode_prompt
from llama_lightning.data.identity import (
    ORDER,
    TRAINING_PART,
    check_held_out,
    check_text,
    digest,
    find_position,
)
from llama_lightning.data.loaders import Loaders
from llama_lightning.data.parts import Part, Parts, divide
from llama_lightning.data.rows import Row, check_columns
from llama_lightning.data.sources import Source, check_weights, local_file
from llama_lightning.data.templates import END_OF_TURN, TEMPLATES, TemplateName
from llama_lightning.data.token_file import Examples
from llama_lightning.data.tokenizer import Tokenizer
from llama_lightning.data.tokenizer_files import ends_turns, text_side
from llama_lightning.errors import UsageError
from llama_lightning.heap import give_back_memory
from llama_lightning.records import Batch, PromptBatch, TextSide


class AlpacaDataModule(LightningDataModule):
    """Instructions with answers, or chats, for fit, validate, test and predict.

    Args:
        path: training data, .json, .jsonl, .csv or .parquet with instruction, input and output, or
            with chats: a file, an address hf://datasets/OWNER/NAME/FILE, or `tiny` (embedded). Of
            several files, a mapping from each to its weight: how often an epoch has each of its
            training records (0.5: a seeded half of them).
        val_path: validation data; by default a part of `path`.
        test_path: test data; by default a part of `path` (with `tiny`: the embedded held-out set).
        predict_path: prompts for predict; by default the test part.
        val_fraction: part of `path` that chooses checkpoints, without `val_path`.
        test_fraction: part of `path` that predict and test answer, without `test_path`.
        columns: names of the files' columns where they differ from ours, e.g. `{output: answer}`;
            ours are instruction, input, output, and messages or conversations for chats.
        base_folder: folder whose tokenizer is used; the command line links it to model.base_model.
        tokenizer: tokenizer file or folder, instead of the base model's.
        template: text around a record: `alpaca`, `plain` for none, or `llama3`, the chat template
            of the Instruct models.
        train_on_prompt: put loss on the prompt too.
        train_on_turns: of a chat, put loss on `all` turns of the assistant, or on the `last`.
        max_seq_len: longest sequence in training and validation, in tokens.
        batch_size: records an optimizer step, over all devices and accumulated micro-batches.
        eval_batch_size: records a batch in evaluation, prompts in the network at a time in predict;
            by default a micro-batch's.
        num_workers: processes that prepare batches.
        seed: of the split and of the order of training records.
        cache_dir: folder of the tokenised data; by default llama_lightning in XDG_CACHE_HOME or
            ~/.cache.
    """

    def __init__(
        self,
        path: dict[str, float] | str = "tiny",
        val_path: str | None = None,
        test_path: str | None = None,
        predict_path: str | None = None,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        columns: dict[str, str] | None = None,
        base_folder: str | None = None,
        tokenizer: str | None = None,
        template: TemplateName = "alpaca",
        train_on_prompt: bool = False,
        train_on_turns: Turns = "all",
        max_seq_len: int = 512,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        for part, fraction in (("val", val_fraction), ("test", test_fraction)):
            if not 0.0 <= fraction < 1.0:
                raise UsageError(f"data.{part}_fraction is {fraction}; use a value in [0, 1)")
        for name, size, least in (
            ("max_seq_len", max_seq_len, 2),
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if size is not None and size < least:
                raise UsageError(f"data.{name} is {size}; use {least} or more")
        check_columns(columns or {})
        if path == "tiny":
            path, test_path = str(TINY_TRAIN), test_path or str(TINY_HELDOUT)
        self.weights = path if isinstance(path, dict) else {path: 1.0}
        check_weights(self.weights)
        self.path, self.val_path, self.test_path = path, val_path, test_path
        self.predict_path = predict_path
        self.val_fraction = 0.0 if val_path else val_fraction
        self.test_fraction = 0.0 if test_path else test_fraction
        self.columns = columns
        self.given_tokenizer = str(TINY) if tokenizer == "tiny" else tokenizer
        self.tokenizer_path = Path(self.given_tokenizer or base_folder or TINY)
        self.base_folder = Path(base_folder or self.tokenizer_path)
        self.template_name: TemplateName = template
        self.template = TEMPLATES[template]
        self.train_on_prompt = train_on_prompt
        self.train_on_turns: Turns = train_on_turns
        self.max_seq_len = max_seq_len
        self.batch_size, self.given_eval_batch_size = batch_size, eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.cache_dir = Path(cache_dir) if cache_dir else default_cache()
        self.train_examples = self.val_examples = self.test_examples = Examples([], [])
        self.test_rows: list[Row] = []
        self.predict_rows: list[Row] = []
        self._val: Part | None = None
        # Digests of the training files and of the training part, once they have been read.
        self._files = self._training_records = ""
        self._resume_at = 0  # micro-batches of the current epoch that a resumed run has done

    # Text

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded at first use, and again if text is read or written during fit."""
        return Tokenizer.from_path(self.tokenizer_path)

    @cached_property
    def _tokenizer_fingerprint(self) -> str:
        return self.tokenizer.fingerprint

    @property
    def encoding(self) -> Encoding:
        """How a data file becomes tokens."""
        return Encoding(
            tokenizer=self.tokenizer,
            template=self.template,
            max_seq_len=self.max_seq_len,
            train_on_prompt=self.train_on_prompt,
            train_on_turns=self.train_on_turns,
            columns=self.columns,
            cache_dir=self.cache_dir,
        )

    def prompts(self, rows: Sequence[Row]) -> PromptBatch:
        """Tokenise the prompts of some rows, to be answered until an end token."""
        prompts = [encode_prompt(row, self.tokenizer, self.template) for row in rows]
        return collate_prompts(prompts, [row.id for row in rows], self.tokenizer.stop_ids)

    def text_side(self) -> TextSide:
        """What an export needs to read and write text as this data does."""
        return text_side(self.tokenizer, self.tokenizer_path, self.template)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides which text a model is trained on, for a model card."""
        names = ["path", "val_fraction", "test_fraction", "batch_size", "max_seq_len", "seed"]
        names += ["train_on_prompt", "train_on_turns"]
        names += [name for name in ("val_path", "test_path", "columns") if getattr(self, name)]
        settings = {name: getattr(self, name) for name in names}
        if self.given_tokenizer:
            settings["tokenizer"] = self.given_tokenizer
        return settings | {"template": self.template_name}

    # Files to parts

    def _corpus(self, weights: Mapping[str, float]) -> Corpus:
        """Find files, fetched from the hub if need be, and tokenise them."""
        sources = [
            Source(given, local_file(given, rank_zero_info), weight)
            for given, weight in weights.items()
        ]
        return Corpus(sources, self.encoding)

    def _parts(self) -> Parts:
        corpus = self._corpus(self.weights)
        self._files = corpus.digest
        val, test = (
            self._corpus({path: 1.0}) if path else None for path in (self.val_path, self.test_path)
        )
        parts = divide(
            corpus,
            val=val,
            test=test,
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            seed=self.seed,
        )
        if parts.num_left_out:
            rank_zero_info(
                f"data: {parts.num_left_out} training records left out, "
                "their prompts are in the validation or test data"
            )
        return parts

    def _examples(self, part: Part) -> Examples:
        examples = part.examples()
        rank_zero_info(f"data: {part.summary(examples)}")
        return examples

    def setup(self, stage: str) -> None:
        """Read, split and tokenise what the stage ("fit", "validate", "test", "predict") needs."""
        if stage == "fit":
            self.loaders.check_step()
            if self.template.takes_chats and not ends_turns(self.base_folder, self.tokenizer):
                rank_zero_info(
                    f"warning: data.template {self.template_name}: by generation_config.json the "
                    f"base does not stop at {END_OF_TURN}, so it has not learnt the chat tokens; "
                    "use an Instruct model or another data.template"
                )
        if stage == "predict" and (path := self.predict_path or self.test_path):
            file = local_file(path, rank_zero_info)
            need_output = not self.predict_path
            self.predict_rows = list(self.encoding.read(file, need_output=need_output))
            return
        if stage == "test" and self.test_path:
            corpus = self._corpus({self.test_path: 1.0})
            test = Part("test", corpus, corpus.row_ids)
        else:
            train, val, test, _ = self._parts()
        if stage == "predict":
            self.predict_rows = test.rows()
        elif stage == "test":
            self.test_rows, self.test_examples = test.rows(), self._examples(test)
        else:
            if val or stage == "validate":
                self.val_examples = self._examples(val)
            else:
                rank_zero_info("data: no validation part, so there will be no best.ckpt")
            self._val = val
            if stage == "fit":
                self.train_examples = self._examples(train)
                self._training_records = digest(self.train_examples.tokens())
                # Training sees tokens only. Llama 3's tokenizer is 0.05 GiB of a process; of it,
                # checkpoints hold the fingerprint.
                self._tokenizer_fingerprint = self.tokenizer.fingerprint
                del self.tokenizer
                give_back_memory()

    @property
    def val_rows(self) -> list[Row]:
        """The validation records as text, read when they are asked for."""
        return self._val.rows() if self._val else []

    # Parts to micro-batches

    @property
    def loaders(self) -> Loaders:
        """How batches are shared out where the trainer runs; one process without a trainer."""
        trainer = self.trainer
        return Loaders(
            batch_size=self.batch_size,
            given_eval_batch_size=self.given_eval_batch_size,
            accumulate=trainer.accumulate_grad_batches if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
            num_workers=self.num_workers,
            seed=self.seed,
        )

    @property
    def eval_batch_size(self) -> int:
        """Records a batch in validation, test and predict."""
        return self.loaders.eval_batch_size

    def train_dataloader(self) -> DataLoader[Batch]:
        """Micro-batches of the exact step, the first time behind those that were done before."""
        done, self._resume_at = self._resume_at, 0
        return self.loaders.train(self.train_examples, done=done)

    def val_dataloader(self) -> DataLoader[Batch] | list[Batch]:
        """Validation records in file order."""
        return self.loaders.evaluation(self.val_examples) if self.val_examples else []

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Test records in file order: with their labels to measure, then as prompts to answer."""
        loaders, examples, rows = self.loaders, self.test_examples, self.test_rows
        return [loaders.evaluation(examples), loaders.prompts(rows, self.prompts)]

    def predict_dataloader(self) -> DataLoader[PromptBatch]:
        """Prompts to answer, in file order."""
        return self.loaders.prompts(self.predict_rows, self.prompts)

    # Where a resumed run goes on

    def _identity(self) -> dict[str, Any]:
        """Everything that decides which record stands where in a run."""
        loaders = self.loaders
        return {
            "data.path": self._files,
            **{f"data.{name}": getattr(self, name) for name in ORDER},
            "trainer.accumulate_grad_batches": loaders.accumulate,
            "trainer.devices x num_nodes": loaders.world_size,
            TRAINING_PART: self._training_records,
        }

    def _text(self) -> dict[str, Any]:
        """Everything that decides in which form a model knows text."""
        return {
            "template": self.template_name,
            "template_text": self.template.text,
            "tokenizer": self._tokenizer_fingerprint,
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the position in the epoch, and what it is a position of."""
        progress = self.trainer.fit_loop.epoch_loop.batch_progress if self.trainer else None
        done = 0
        if progress is not None and not progress.is_last_batch:
            done = progress.current.processed  # type: ignore[attr-defined]
        return {"micro_batches": done, "identity": self._identity(), **self._text()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint stopped, or say why that cannot be.

        Raises:
            CheckpointError: template, tokenizer, data or batching differ from the checkpoint's.
        """
        check_text(self._text(), state_dict, tokenizer_path=self.tokenizer_path)
        verb = self.trainer.state.fn if self.trainer else None
        paths = {
            "predict": self.predict_path or self.test_path,
            "test": self.test_path,
            "validate": self.val_path,
        }
        if paths.get(verb or ""):
            return  # no part of the training file is read, which need not even be there
        if verb == "fit":
            self._resume_at = find_position(state_dict, self._identity())
        else:
            check_held_out(self._identity(), state_dict["identity"])
