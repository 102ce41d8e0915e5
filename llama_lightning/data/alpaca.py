"""The data module: files to parts, parts to micro-batches, and where a resumed run goes on.

It owns the tokenizer and the template; the model receives tokens only.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from llama_lightning.assets import TINY, TINY_HELDOUT, TINY_TRAIN
from llama_lightning.data.batching import (
    Batches,
    EvalSampler,
    MicroBatch,
    StepSampler,
    collate_prompts,
)
from llama_lightning.data.corpus import Corpus, Encoding, Part, default_cache
from llama_lightning.data.examples import Dropped, Turns, encode_prompt
from llama_lightning.data.identity import (
    TRAINING_PART,
    check_held_out,
    check_text,
    digest,
    find_position,
    name_mix,
)
from llama_lightning.data.rows import FIELDS, Row
from llama_lightning.data.splits import split
from llama_lightning.data.templates import TEMPLATES, TemplateName
from llama_lightning.data.token_file import Examples
from llama_lightning.data.tokenizer import Tokenizer
from llama_lightning.data.tokenizer_files import huggingface_files
from llama_lightning.errors import DataError, UsageError
from llama_lightning.hub import fetch_data, parse_address
from llama_lightning.records import Batch, PromptBatch, TextSide


def local_file(path: str) -> Path:
    """Find the file of a path or of an hf:// address, which is fetched unless it is in data/.

    Raises:
        DataError: a malformed address, or a file that cannot be fetched.
    """
    if path == "tiny":
        return TINY_TRAIN
    if not path.startswith("hf://"):
        return Path(path)
    _, file = parse_address(path)
    own = Path("data", Path(file).name)
    if own.is_file():
        rank_zero_info(f"data: {own} is here and taken instead of {path}")
        return own
    return fetch_data(path)


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
        for name, value in {"val_fraction": val_fraction, "test_fraction": test_fraction}.items():
            if not 0.0 <= value < 1.0:
                raise UsageError(f"data.{name} is {value}; use a value in [0, 1)")
        for name, size in {
            "max_seq_len": max_seq_len - 1,
            "batch_size": batch_size,
            "eval_batch_size": eval_batch_size if eval_batch_size is not None else 1,
            "num_workers": num_workers + 1,
        }.items():
            if size < 1:
                least = {"max_seq_len": 2, "num_workers": 0}.get(name, 1)
                raise UsageError(f"data.{name} is too small; use {least} or more")
        for field in columns or {}:
            if field not in FIELDS:
                raise UsageError(
                    f"data.columns: '{field}' is none of our columns, {', '.join(FIELDS)}; write "
                    "OURS: YOURS"
                )
        if path == "tiny":
            path, test_path = str(TINY_TRAIN), test_path or str(TINY_HELDOUT)
        self.weights = path if isinstance(path, dict) else {path: 1.0}
        for name, weight in self.weights.items():
            if not 0.0 < weight < float("inf"):
                raise UsageError(f"data.path: the weight of {name} is {weight}; use one above 0")
        if not self.weights:
            raise UsageError("data.path: no file; give one, or several with their weights")
        self._name = ", ".join(self.weights)
        self.columns = columns
        self.path, self.val_path, self.test_path = path, val_path, test_path
        self.predict_path = predict_path
        self.val_fraction = 0.0 if val_path else val_fraction
        self.test_fraction = 0.0 if test_path else test_fraction
        tokenizer = str(TINY) if tokenizer == "tiny" else tokenizer
        self.given_tokenizer = tokenizer
        self.tokenizer_path = Path(tokenizer or base_folder or TINY)
        self.template_name: TemplateName = template
        self.template = TEMPLATES[template]
        self.train_on_prompt = train_on_prompt
        self.train_on_turns: Turns = train_on_turns
        self.max_seq_len = max_seq_len
        self.batch_size = batch_size
        self.given_eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.cache_dir = Path(cache_dir) if cache_dir else default_cache()
        self.train_examples = self.val_examples = self.test_examples = Examples([], [])
        self.test_rows: list[Row] = []
        self.predict_rows: list[Row] = []
        self._val: Part | None = None
        # Digests of the training file and of the training part, once they have been read.
        self._file_digest = self._training_records = ""
        self._resume_at = 0  # micro-batches of the current epoch that a resumed run has done

    # Values that depend on where and how the trainer runs; one process without a trainer.

    @property
    def accumulate(self) -> int:
        """Micro-batches an optimizer step, on each rank."""
        return self.trainer.accumulate_grad_batches if self.trainer else 1

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.trainer.world_size if self.trainer else 1

    @property
    def rank(self) -> int:
        """This process's number."""
        return self.trainer.global_rank if self.trainer else 0

    @property
    def eval_batch_size(self) -> int:
        """Records a batch in validation, test and predict."""
        return self.given_eval_batch_size or -(
            -self.batch_size // (self.accumulate * self.world_size)
        )

    @cached_property
    def train_files(self) -> list[Path]:
        """The files of `path` on this machine; fetched from the hub at first use."""
        given: dict[Path, str] = {}
        files = [local_file(path) for path in self.weights]
        for name, file in zip(self.weights, files, strict=True):
            same = given.setdefault(file.resolve(), name)
            if same != name:
                raise DataError(
                    f"data.path: {same} and {name} are both {file}; give one of them (a file in "
                    "data/ stands for every hf:// address of its name)"
                )
        return files

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded at first use."""
        return Tokenizer.from_path(self.tokenizer_path)

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

    @property
    def val_rows(self) -> list[Row]:
        """The validation records as text, read when they are asked for."""
        return self._val.rows() if self._val else []

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

    def text_side(self) -> TextSide:
        """What an export needs to read and write text as this data does."""
        tokenizer, template = self.tokenizer, self.template
        texts = {token: text for text, token in tokenizer.special_ids.items()}
        return TextSide(
            files=huggingface_files(tokenizer, self.tokenizer_path, template.jinja),
            bos_id=tokenizer.bos_id,
            stop_ids=tokenizer.stop_ids,
            stops=[texts[token] for token in tokenizer.stop_ids],
            ollama_template=template.ollama,
        )

    def setup(self, stage: str) -> None:
        """Read, split and tokenise what the stage ("fit", "validate", "test", "predict") needs."""
        if stage == "fit" and self.batch_size < self.accumulate * self.world_size:
            raise UsageError(
                f"data.batch_size {self.batch_size} is smaller than "
                f"trainer.accumulate_grad_batches {self.accumulate} x {self.world_size} devices; "
                "lower the accumulation or raise the batch size"
            )
        if stage == "predict" and (path := self.predict_path or self.test_path):
            need_output = not self.predict_path
            self.predict_rows = list(self.encoding.read(local_file(path), need_output=need_output))
            return
        if stage == "test" and self.test_path:
            test = Part.of_file(local_file(self.test_path), self.encoding)
        else:
            train, val, test = self._parts()
        if stage == "predict":
            self.predict_rows = self._not_empty(test, "test").rows()
        elif stage == "test":
            self.test_rows = self._not_empty(test, "test").rows()
            self.test_examples = self._encode(test, "test")
        else:
            self._val = val
            self.val_examples = self._encode(val, "val") if val else Examples([], [])
            if stage == "fit":
                if not val:
                    rank_zero_info("data: no validation part, so there will be no best.ckpt")
                examples = self._encode(self._not_empty(train, "train"), "train")
                self.train_examples = examples
                self._training_records = digest(examples.tokens())
            else:
                self._not_empty(val, "val")

    def _parts(self) -> tuple[Part, Part, Part]:
        """Split, and weigh; a prompt of another part's file never stays in training."""
        corpus = Corpus(self.train_files, self.encoding)
        weights = list(self.weights.values())
        self._file_digest = name_mix(weights, corpus.hashes)
        train, *others = split(
            corpus.prompts,
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            seed=self.seed,
        )
        val, test = (
            Part.of_file(local_file(path), self.encoding) if path else Part(corpus, rows)
            for path, rows in zip((self.val_path, self.test_path), others, strict=True)
        )
        held_out = val.prompts() | test.prompts()
        kept = [i for i in train if corpus.prompts[i] not in held_out]
        if len(kept) < len(train):
            rank_zero_info(
                f"data: {len(train) - len(kept)} training records left out, "
                "their prompts are in the validation or test data"
            )
        return Part(corpus, corpus.weighed(kept, weights, seed=self.seed)), val, test

    def _not_empty(self, part: Part, name: str) -> Part:
        if not part:
            raise DataError(
                f"{self._name}: the {name} part is empty; change data.val_fraction and "
                f"data.test_fraction, or name a file with data.{name}_path"
            )
        return part

    def _encode(self, part: Part, name: str) -> Examples:
        examples = part.examples()
        dropped = Dropped.of(examples.fates.tolist())
        if not examples:
            path = {"val": self.val_path, "test": self.test_path}.get(name) or self._name
            raise DataError(
                f"{path}: nothing to learn in all {len(part)} {name} records: {dropped}"
            )
        tokens, targets = int(examples.lengths.sum()), int(examples.num_targets.sum())
        remark = f"; {dropped}" if str(dropped) else ""
        rank_zero_info(
            f"data: {len(examples):,} {name} records, {tokens:,} tokens, "
            f"{targets / tokens:.0%} of them learnt{remark}"
        )
        return examples

    def train_dataloader(self) -> DataLoader[Batch]:
        """Micro-batches of the exact step."""
        sampler = StepSampler(
            self.train_examples.lengths.tolist(),
            self.train_examples.num_targets.tolist(),
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            rank=self.rank,
            world_size=self.world_size,
            seed=self.seed,
        )
        sampler.skip_once(self._resume_at)
        self._resume_at = 0
        return self._loader(self.train_examples, sampler)

    def val_dataloader(self) -> DataLoader[Batch] | list[Batch]:
        """Validation records in file order."""
        return self._eval_loader(self.val_examples) if self.val_examples else []

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Test records in file order: with their labels to measure, then as prompts to answer."""
        return [self._eval_loader(self.test_examples), self._prompt_loader(self.test_rows)]

    def predict_dataloader(self) -> DataLoader[PromptBatch]:
        """Prompts to answer, in file order."""
        return self._prompt_loader(self.predict_rows)

    def prompts(self, rows: Sequence[Row]) -> PromptBatch:
        """Tokenise the prompts of some rows, to be answered until an end token."""
        prompts = [encode_prompt(row, self.tokenizer, self.template) for row in rows]
        return collate_prompts(prompts, [row.id for row in rows], self.tokenizer.stop_ids)

    def _prompt_loader(self, rows: list[Row]) -> DataLoader[PromptBatch]:
        """Share rows out over the ranks by whole batches."""
        size = self.eval_batch_size
        # As many on every rank, the last of them perhaps empty, so that the ranks stay together.
        turns = -(-len(rows) // (self.world_size * size))
        starts = (size * (turn * self.world_size + self.rank) for turn in range(turns))
        batches = [self.prompts(rows[start : start + size]) for start in starts]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type] # a list is a dataset

    def _eval_loader(self, examples: Examples) -> DataLoader[Batch]:
        sampler = EvalSampler(
            examples.num_targets.tolist(),
            batch_size=self.eval_batch_size,
            rank=self.rank,
            world_size=self.world_size,
        )
        return self._loader(examples, sampler)

    def _loader(
        self, examples: Examples, sampler: torch.utils.data.Sampler[MicroBatch]
    ) -> DataLoader[Batch]:
        return DataLoader(
            Batches(examples),
            sampler=sampler,
            batch_size=None,  # the sampler's item is a whole micro-batch
            num_workers=self.num_workers,
            persistent_workers=False,
            pin_memory=torch.cuda.is_available(),
            # iter() draws a seed; from the global generator, a resumed run would draw it at another
            # moment and every dropout mask after it would differ.
            generator=torch.Generator(),
        )

    def _identity(self) -> dict[str, Any]:
        """Everything that decides which record stands where in a run."""
        return {
            "data.path": self._file_digest,
            "data.seed": self.seed,
            "data.val_fraction": self.val_fraction,
            "data.test_fraction": self.test_fraction,
            "data.batch_size": self.batch_size,
            "data.max_seq_len": self.max_seq_len,
            "data.train_on_prompt": self.train_on_prompt,
            "data.train_on_turns": self.train_on_turns,
            "data.columns": self.columns,
            "trainer.accumulate_grad_batches": self.accumulate,
            "trainer.devices x num_nodes": self.world_size,
            TRAINING_PART: self._training_records,
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the position in the epoch, and what it is a position of."""
        progress = self.trainer.fit_loop.epoch_loop.batch_progress if self.trainer else None
        done = 0
        if progress is not None and not progress.is_last_batch:
            done = progress.current.processed  # type: ignore[attr-defined]
        return {
            "micro_batches": done,
            "identity": self._identity(),
            "template": self.template_name,
            "template_text": self.template.text,
            "tokenizer": self.tokenizer.fingerprint,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint stopped, or say why that cannot be.

        Raises:
            CheckpointError: template, tokenizer, data or batching differ from the checkpoint's.
        """
        check_text(
            state_dict,
            template=self.template,
            template_name=self.template_name,
            tokenizer=self.tokenizer,
            tokenizer_path=self.tokenizer_path,
        )
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
