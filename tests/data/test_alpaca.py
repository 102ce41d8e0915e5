"""The data module: parts that share no prompt, loaders of the exact step, plain refusals."""

import itertools
import json
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama_lightning.data.alpaca import AlpacaDataModule
from llama_lightning.data.rows import Row
from llama_lightning.data.splits import split
from llama_lightning.data.templates import TEMPLATES
from llama_lightning.errors import CheckpointError, DataError, UsageError
from llama_lightning.training.trainer import Trainer
from tests.small import write_byte_tokenizer


def write_records(path: Path, records: list[tuple[str, str, str]]) -> Path:
    names = ("instruction", "input", "output")
    path.write_text(json.dumps([dict(zip(names, record, strict=True)) for record in records]))
    return path


def numbered(count: int, start: int = 0) -> list[tuple[str, str, str]]:
    return [(f"question {i}", "", "a" * (1 + i % 7)) for i in range(start, start + count)]


@pytest.fixture
def base(tmp_path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture
def module(base, tmp_path):
    """Make a data module over records, without the words of a template."""

    def make(records: list[tuple[str, str, str]], **kwargs) -> AlpacaDataModule:
        path = write_records(tmp_path / "data.json", records)
        settings = {"path": str(path), "base_folder": str(base), "template": "plain"}
        return AlpacaDataModule(**(settings | kwargs))

    return make


def make_trainer(tmp_path: Path, **kwargs) -> Trainer:
    settings = {"accelerator": "cpu", "devices": 1, "logger": False, "max_steps": 1}
    settings |= {"enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(default_root_dir=tmp_path, **(settings | kwargs))


def ids(examples) -> list[int]:
    return [example.row_id for example in examples]


# Parts


def rows_of(records: list[tuple[str, str, str]]) -> list[Row]:
    return [Row(i, *record) for i, record in enumerate(records)]


def split_rows(rows: list[Row], seed: int = 0, val: float = 0.1, test: float = 0.2):
    prompts = [row.prompt_key for row in rows]
    parts = split(prompts, val_fraction=val, test_fraction=test, seed=seed)
    return [[rows[i] for i in part] for part in parts]


def split_ids(rows: list[Row], **kwargs):
    return [[row.id for row in part] for part in split_rows(rows, **kwargs)]


def test_a_split_is_disjoint_complete_and_of_the_size_asked_for():
    rows = rows_of(numbered(200))
    train, val, test = split_ids(rows)
    assert (len(train), len(val), len(test)) == (140, 20, 40)
    assert sorted(train + val + test) == list(range(200))
    assert all(part == sorted(part) for part in (train, val, test))
    # Shuffled: a part is no stretch of the file, which may be sorted by topic.
    assert val != list(range(val[0], val[0] + 20))
    assert split_ids(rows, val=0.0, test=0.0) == [list(range(200)), [], []]


def test_a_split_is_a_function_of_the_seed():
    rows = rows_of(numbered(200))
    torch.manual_seed(5)
    first = split_ids(rows)
    torch.manual_seed(6)
    assert split_ids(rows) == first
    others = {str(split_ids(rows, seed=seed)) for seed in range(10)}
    print(f"different splits of 10 seeds: {len(others)}")
    assert len(others) == 10


def test_a_prompt_is_never_in_two_parts():
    # 120 prompts, most of them several times, at different places of the file.
    records = [(f"q{i % 120}", f"x{i % 3}", f"answer {i}") for i in range(700)]
    rows = rows_of(records)
    worst = 0
    for seed in range(20):
        parts = split_rows(rows, seed=seed)
        assert sorted(row.id for part in parts for row in part) == list(range(700))
        keys = [{row.prompt_key for row in part} for part in parts]
        worst = max(worst, sum(len(a & b) for a, b in itertools.combinations(keys, 2)))
        sizes = [len(part) for part in parts]
        # A group goes whole or not at all, so that a part may miss its size by less than a group.
        assert 70 - 6 < sizes[1] <= 70
        assert 140 - 6 < sizes[2] <= 140
    print(f"prompts in two parts, the worst of 20 seeds: {worst}")
    assert worst == 0


def test_prompts_that_read_the_same_are_the_same():
    # "<no input>" is written out as no input: the model would be tested on what it was trained on.
    rows = rows_of([(f"q{i // 4}", ("", "<no input>", " ", "x")[i % 4], "a") for i in range(400)])
    parts = split_rows(rows)
    prompts = [{TEMPLATES["alpaca"].format(r.instruction, r.input) for r in part} for part in parts]
    assert sum(map(len, prompts)) == 200
    assert len(set.union(*prompts)) == 200


def test_the_same_instruction_with_another_input_is_another_prompt():
    rows = rows_of([("translate", f"word {i}", "x") for i in range(100)])
    assert [len(part) for part in split_ids(rows)] == [70, 10, 20]


def test_a_module_keeps_the_row_numbers_of_the_file(module):
    records = numbered(100)
    data = module(records, val_fraction=0.1, test_fraction=0.2)
    for stage in ("fit", "test", "predict"):
        data.setup(stage)
    parts = [ids(data.train_examples), ids(data.val_examples), ids(data.test_examples)]
    assert [len(part) for part in parts] == [70, 10, 20]
    assert sorted(sum(parts, [])) == list(range(100))
    assert [row.id for row in data.predict_rows] == parts[2]
    tokenizer = data.tokenizer
    for example in (*data.train_examples, *data.val_examples, *data.test_examples):
        question, _, answer = records[example.row_id]
        assert tokenizer.decode(example.tokens) == question + answer
    batch = next(iter(data.val_dataloader()))
    assert batch.row_ids.tolist() == parts[1]  # 10 records, eval_batch_size 32


def test_fit_lets_the_tokenizer_go(module):
    data = module(numbered(100))
    whole = data.tokenizer
    fingerprint, gone = whole.fingerprint, weakref.ref(whole)
    del whole
    data.setup("fit")
    assert gone() is None  # neither parts nor their files hold it
    assert data.state_dict()["tokenizer"] == fingerprint
    assert len(data.val_rows) == 5
    assert "tokenizer" not in vars(data)  # none of these has read it again
    prompts = data.prompts(data.val_rows[:1])  # which samples of answers do
    assert data.tokenizer.decode(prompts.tokens.tolist()) == data.val_rows[0].instruction


def test_training_leaves_out_the_prompts_of_the_other_files(module, tmp_path):
    records = numbered(40)
    val = [("question 3", "", "another answer"), ("elsewhere", "", "x")]
    test = [("question 5", "", "y"), ("question 7", "but with an input", "z")]
    data = module(
        [*records, ("question 3", "", "twice")],
        val_path=str(write_records(tmp_path / "val.json", val)),
        test_path=str(write_records(tmp_path / "test.json", test)),
    )
    data.setup("fit")
    assert ids(data.train_examples) == [i for i in range(40) if i not in (3, 5)]
    assert ids(data.val_examples) == [0, 1]
    data.setup("test")
    assert ids(data.test_examples) == [0, 1]


def test_the_validation_file_stays_whole_beside_a_test_fraction(module, tmp_path):
    val = write_records(tmp_path / "val.json", numbered(10))
    data = module(numbered(100), val_path=str(val), test_fraction=0.2)
    data.setup("fit")
    data.setup("predict")
    # No fraction of `path` is lost to a validation that has its own file.
    in_val = {i for i in range(10) if i in {row.id for row in data.predict_rows}}
    assert len(data.val_examples) == 10
    assert len(data.predict_rows) == 20
    assert len(data.train_examples) == 100 - 20 - (10 - len(in_val))


def test_predict_path_needs_no_outputs(module, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"instruction": "one"}\n{"instruction": "two", "input": "more"}\n')
    data = module(numbered(4), predict_path=str(path), eval_batch_size=1)
    data.setup("predict")
    assert [(row.id, row.output) for row in data.predict_rows] == [(0, ""), (1, "")]
    first, second = data.predict_dataloader()
    assert bytes(first.tokens[1:].tolist()) == b"one"
    assert bytes(second.tokens[1:].tolist()) == b"two\nmore"
    assert first.tokens[0] == second.tokens[0] == 256
    assert second.row_ids.tolist() == [1]
    assert second.stop_ids.tolist() == [[257, 264, 265]]  # end of text, of message, of turn


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_prompt_is_answered_on_one_rank(module, tmp_path, world_size):
    data = module(numbered(17), test_path=str(tmp_path / "data.json"), eval_batch_size=3)
    seen: Counter[int] = Counter()
    for rank in range(world_size):
        data.trainer = SimpleNamespace(
            accumulate_grad_batches=1, world_size=world_size, global_rank=rank
        )
        data.setup("predict")
        seen.update(i for batch in data.predict_dataloader() for i in batch.row_ids.tolist())
    assert seen == Counter(range(17))


# Several files by weight


def test_files_are_mixed_by_weight(module, tmp_path):
    parts = [numbered(40), numbered(30, start=100), numbered(20, start=200)]
    names = [str(write_records(tmp_path / f"{i}.json", part)) for i, part in enumerate(parts)]
    weights = dict(zip(names, (1, 0.5, 2.25), strict=True))
    data = module([], path=weights, val_fraction=0, test_fraction=0)
    data.setup("fit")
    met = Counter(ids(data.train_examples))
    counts = [
        sum(n for i, n in met.items() if lo <= i < hi) for lo, hi in ((0, 40), (40, 70), (70, 90))
    ]
    print(f"records of 40, 30 and 20 at weights 1, 0.5 and 2.25: {counts}")
    assert counts == [40, 15, 45]
    assert set(met.values()) == {1, 2, 3}
    assert Counter(met[i] for i in range(70, 90)) == {2: 15, 3: 5}
    records = sum(parts, [])
    for example in data.train_examples:  # a row is numbered on from the files before its own
        question, _, answer = records[example.row_id]
        assert data.tokenizer.decode(example.tokens) == question + answer
    again = module([], path=weights, val_fraction=0, test_fraction=0)
    again.setup("fit")
    assert ids(again.train_examples) == ids(data.train_examples)
    other = module([], path=weights, val_fraction=0, test_fraction=0, seed=1)
    other.setup("fit")
    assert ids(other.train_examples) != ids(data.train_examples)


def test_a_mix_is_split_as_one(module, tmp_path):
    names = [str(write_records(tmp_path / f"{i}.json", numbered(50))) for i in range(2)]
    data = module([], path={names[0]: 1, names[1]: 3}, val_fraction=0.1, test_fraction=0.2)
    for stage in ("fit", "predict"):
        data.setup(stage)
    assert len(data.predict_rows) == 20
    assert len(data.val_rows) == 10
    # Every question is in both files: whole pairs stay in one part, unweighted but in training.
    parts = [
        ids(data.train_examples),
        [r.id for r in data.val_rows],
        [r.id for r in data.predict_rows],
    ]
    assert len(parts[0]) == 35 * 4
    questions = [{i % 50 for i in part} for part in parts]
    assert [len(part) for part in questions] == [35, 5, 10]
    assert not any(a & b for a, b in itertools.combinations(questions, 2))
    answers = {row.id: row.instruction for row in data.predict_rows}
    assert all(answers[i] == f"question {i % 50}" for i in answers)


def test_another_mix_is_another_run(module, tmp_path):
    names = [str(write_records(tmp_path / f"{i}.json", numbered(20, start=50 * i))) for i in (0, 1)]
    mixes = [dict.fromkeys(names, 1.0), {names[0]: 1.0, names[1]: 2.0}]
    state = fitting(module([], path=mixes[0]), tmp_path).state_dict()
    fitting(module([], path=mixes[0]), tmp_path).load_state_dict(state)
    with pytest.raises(
        CheckpointError, match=r"data.path is 1.0 x \w{16} \+ 2.0 x \w{16}, was 1.0 x"
    ):
        fitting(module([], path=mixes[1]), tmp_path).load_state_dict(state)


def test_a_broken_file_of_a_mix_is_named(module, tmp_path):
    good = str(write_records(tmp_path / "good.json", numbered(20)))
    (tmp_path / "bad.jsonl").write_text('{"instruction": "q", "output": "a"}\n{"output": "a"}\n')
    data = module([], path={good: 1, str(tmp_path / "bad.jsonl"): 1})
    with pytest.raises(DataError, match=r"bad.jsonl, row 1: no column 'instruction'"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("data/a.json", "./data/../data/a.json"),
        ("hf://datasets/one/set/a.json", "hf://datasets/another/set/a.json"),
        ("hf://datasets/one/set/a.json", "data/a.json"),
    ],
)
def test_a_file_twice_in_a_mix(module, tmp_path, monkeypatch, first, second):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    write_records(Path("data", "a.json"), numbered(20))
    with pytest.raises(DataError) as caught:
        module([], path={first: 1.0, second: 1.0}).setup("fit")
    assert f"data.path: {first} and {second} are both " in str(caught.value)


def test_a_weight_that_leaves_nothing_of_a_file(module, tmp_path):
    names = [str(write_records(tmp_path / f"{i}.json", numbered(20, start=50 * i))) for i in (0, 1)]
    few, some = ({names[0]: 1.0, names[1]: weight} for weight in (0.02, 0.05))
    with pytest.raises(DataError, match=r"1.json: the weight 0.02 leaves none of its \d+ training"):
        module([], path=few).setup("fit")
    data = module([], path=some)
    data.setup("fit")
    assert sum(i >= 20 for i in ids(data.train_examples)) == 1


def test_the_settings_of_a_model_card_name_what_is_set(module, base, tmp_path):
    plain = module(numbered(20)).settings
    assert plain["train_on_turns"] == "all"
    assert not {"val_path", "test_path", "columns", "tokenizer"} & plain.keys()
    given = {"val_path": "v.json", "test_path": "t.json", "columns": {"output": "answer"}}
    given |= {"tokenizer": str(base), "train_on_turns": "last"}
    settings = module(numbered(20), **given).settings
    assert {name: settings[name] for name in given} == given


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none(module, weight):
    with pytest.raises(UsageError, match="data.path: the weight of a.json is"):
        module([], path={"a.json": weight})
    with pytest.raises(UsageError, match="data.path: no file"):
        module([], path={})


# Loaders


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_of_the_loader_is_the_exact_step(module, tmp_path, num_workers):
    data = module(
        numbered(11), val_fraction=0, test_fraction=0, batch_size=4, num_workers=num_workers
    )
    data.trainer = make_trainer(tmp_path, accumulate_grad_batches=4)
    data.setup("fit")
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(loader) == len(batches) == 12
    sizes = [len(batch.row_ids) for batch in batches]
    assert sizes == [1] * 8 + [1, 1, 1, 0]
    assert sorted(i for batch in batches for i in batch.row_ids.tolist()) == list(range(11))
    for step in range(3):
        window = batches[4 * step : 4 * step + 4]
        learnt = sum(int((batch.labels != -100).sum()) for batch in window)
        assert {int(batch.num_step_targets) for batch in window} == {learnt}
    assert data.val_dataloader() == []


def test_workers_do_not_change_the_batches(module):
    data = module(numbered(60), batch_size=8)
    data.setup("fit")
    alone = list(data.train_dataloader())
    data.num_workers = 2
    helped = list(data.train_dataloader())
    assert len(alone) == len(helped)
    for one, other in zip(alone, helped, strict=True):
        tensors = [[*batch[:-1], *batch.prefixes] for batch in (one, other)]
        assert all(torch.equal(x, y) for x, y in zip(*tensors, strict=True))


def test_an_iteration_draws_nothing_from_the_global_generator(module):
    # A DataLoader's iter() does, unless it has its own; a resumed run would draw other dropout.
    data = module(numbered(20), batch_size=4)
    data.setup("fit")
    before = torch.get_rng_state()
    list(data.train_dataloader())
    list(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_batches_are_a_micro_batch_by_default(module, tmp_path):
    data = module(numbered(4), batch_size=10)
    assert data.eval_batch_size == 10
    data.trainer = make_trainer(tmp_path, accumulate_grad_batches=4)
    assert data.eval_batch_size == 3
    assert module(numbered(4), batch_size=10, eval_batch_size=7).eval_batch_size == 7


# Refusals


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("val_fraction", -0.1, "data.val_fraction is -0.1"),
        ("val_fraction", 1.0, "data.val_fraction is 1.0"),
        ("test_fraction", 5, "data.test_fraction is 5"),
        ("test_fraction", float("nan"), "data.test_fraction is nan"),
        ("batch_size", 0, "data.batch_size"),
        ("eval_batch_size", 0, "data.eval_batch_size"),
        ("eval_batch_size", -2, "data.eval_batch_size"),
        ("max_seq_len", 1, "data.max_seq_len"),
    ],
)
def test_a_value_out_of_range(module, setting, value, says):
    with pytest.raises(UsageError) as caught:
        module(numbered(10), **{setting: value})
    assert says in str(caught.value)


def test_fractions_that_leave_nothing_to_train_on(module):
    data = module(numbered(10), val_fraction=0.5, test_fraction=0.5)
    with pytest.raises(DataError, match="the train part is empty; change data.val_fraction") as e:
        data.setup("fit")
    assert "data.train_path" not in str(e.value)  # no such key


@pytest.mark.parametrize(("stage", "part"), [("validate", "val"), ("test", "test")])
def test_a_part_that_is_empty(module, stage, part):
    # One record in twenty of three is none.
    data = module(numbered(3))
    data.setup("fit")
    with pytest.raises(DataError, match=f"the {part} part is empty") as caught:
        data.setup(stage)
    assert f"data.{part}_path" in str(caught.value)


def test_nothing_to_predict(module):
    with pytest.raises(DataError, match="the test part is empty"):
        module(numbered(3)).setup("predict")


def test_training_data_that_is_all_in_the_validation_file(module, tmp_path):
    data = module(numbered(4), val_path=str(tmp_path / "data.json"))
    with pytest.raises(DataError, match="the train part is empty"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("records", "says"),
    [
        ([("x" * 50, "", "a")] * 3, "3 left out, prompt longer than data.max_seq_len"),
        ([("x", "", " ")] * 2, "2 left out, empty output"),
    ],
)
def test_records_without_anything_to_learn(module, records, says):
    data = module(records, val_fraction=0, test_fraction=0, max_seq_len=20)
    with pytest.raises(DataError, match=f"nothing to learn in all {len(records)} train") as caught:
        data.setup("fit")
    assert says in str(caught.value)


def test_a_useless_validation_file_is_named(module, tmp_path):
    val = write_records(tmp_path / "val.json", [("q", "", "")])
    data = module(numbered(20), val_path=str(val))
    with pytest.raises(DataError, match="nothing to learn in all 1 val records") as caught:
        data.setup("fit")
    assert str(val) in str(caught.value)


def test_a_batch_smaller_than_its_micro_batches(module, tmp_path):
    data = module(numbered(40), batch_size=4)
    data.trainer = make_trainer(tmp_path, accumulate_grad_batches=5)
    with pytest.raises(UsageError) as caught:
        data.setup("fit")
    says = "data.batch_size 4 is smaller than trainer.accumulate_grad_batches 5 x 1 devices"
    assert says in str(caught.value)
    data.setup("validate")  # accumulation means nothing there
    data.trainer = make_trainer(tmp_path, accumulate_grad_batches=4)
    data.setup("fit")
    data.trainer = SimpleNamespace(accumulate_grad_batches=4, world_size=2, global_rank=0)
    with pytest.raises(UsageError, match="x 2 devices"):
        data.setup("fit")


def test_a_tokenizer_that_is_not_there(module, tmp_path):
    data = module(numbered(20), tokenizer=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"nowhere does not exist"):
        data.setup("fit")


# Resuming


def fitting(data: AlpacaDataModule, tmp_path: Path, **kwargs) -> AlpacaDataModule:
    data.trainer = make_trainer(tmp_path, **kwargs)
    data.trainer.state.fn = "fit"
    data.setup("fit")
    return data


def test_a_resumed_loader_goes_on_where_the_other_stopped(module, tmp_path):
    def micro_batches(data: AlpacaDataModule) -> list[list[int]]:
        return [batch.row_ids.tolist() for batch in data.train_dataloader()]

    data = fitting(module(numbered(40), batch_size=4), tmp_path, accumulate_grad_batches=2)
    data.setup("fit")
    whole = micro_batches(data)
    assert len(whole) == 18  # 36 records
    progress = data.trainer.fit_loop.epoch_loop.batch_progress
    for done, is_last, left in [(0, False, 18), (6, False, 12), (16, False, 2), (18, True, 18)]:
        progress.current.processed, progress.is_last_batch = done, is_last
        state = json.loads(json.dumps(data.state_dict()))  # plain values: no pickle of ours
        resumed = fitting(module(numbered(40), batch_size=4), tmp_path, accumulate_grad_batches=2)
        resumed.load_state_dict(state)
        assert micro_batches(resumed) == whole[len(whole) - left :]
        assert micro_batches(resumed) == whole  # the epoch after it
    progress.current.processed, progress.is_last_batch = 17, False
    with pytest.raises(CheckpointError, match=r"inside an optimizer step \(micro-batch 1 of 2\)"):
        resumed.load_state_dict(data.state_dict())


DIFFERENT = {
    "data.seed": ({"seed": 9}, {}, "data.seed is 9, was 0"),
    "data.batch_size": ({"batch_size": 8}, {}, "data.batch_size is 8, was 4"),
    "data.val_fraction": ({"val_fraction": 0.2}, {}, "data.val_fraction is 0.2, was 0.05"),
    "data.test_fraction": ({"test_fraction": 0.0}, {}, "data.test_fraction is 0.0, was 0.05"),
    "data.max_seq_len": ({"max_seq_len": 64}, {}, "data.max_seq_len is 64, was 512"),
    "data.train_on_prompt": (
        {"train_on_prompt": True},
        {},
        "data.train_on_prompt is True, was False",
    ),
    "accumulation": (
        {},
        {"accumulate_grad_batches": 4},
        "trainer.accumulate_grad_batches is 4, was 2",
    ),
    "data.train_on_turns": (
        {"train_on_turns": "last"},
        {},
        "data.train_on_turns is last, was all",
    ),
    "data.template": (
        {"template": "alpaca"},
        {},
        "data.template is 'alpaca', but the checkpoint was trained with 'plain'",
    ),
}


@pytest.mark.parametrize(("settings", "trainer", "says"), DIFFERENT.values(), ids=DIFFERENT.keys())
def test_a_run_that_differs_from_its_checkpoint(module, tmp_path, settings, trainer, says):
    data = fitting(module(numbered(40), batch_size=4), tmp_path, accumulate_grad_batches=2)
    state = data.state_dict()
    other = module(numbered(40), **({"batch_size": 4} | settings))
    other = fitting(other, tmp_path, **({"accumulate_grad_batches": 2} | trainer))
    with pytest.raises(CheckpointError) as caught:
        other.load_state_dict(state)
    assert says in str(caught.value)
    assert str(caught.value).count(" was ") == 1  # nothing else is said to differ


def test_another_data_file_is_another_run(module, tmp_path):
    state = fitting(module(numbered(40)), tmp_path).state_dict()
    other = fitting(module(numbered(41)), tmp_path)
    with pytest.raises(CheckpointError, match=r"data.path is [0-9a-f]{16}, was [0-9a-f]{16}"):
        other.load_state_dict(state)


def test_another_held_out_file_is_another_run(module, tmp_path):
    # No key differs but the file that is taken out of training, which moves every position.
    paths = [write_records(tmp_path / f"val{i}.json", numbered(2, start=i)) for i in (0, 20)]
    state = fitting(module(numbered(40), val_path=str(paths[0])), tmp_path).state_dict()
    same = fitting(module(numbered(40), val_path=str(paths[0])), tmp_path)
    same.load_state_dict(state)
    other = fitting(module(numbered(40), val_path=str(paths[1])), tmp_path)
    with pytest.raises(CheckpointError, match=r"the training part \(data.path without"):
        other.load_state_dict(state)


def test_a_run_of_other_devices_is_refused(module, tmp_path):
    data = fitting(module(numbered(40)), tmp_path)
    state = data.state_dict()
    data.trainer = SimpleNamespace(
        accumulate_grad_batches=1, world_size=2, global_rank=0, state=SimpleNamespace(fn="fit")
    )
    with pytest.raises(CheckpointError, match="trainer.devices x num_nodes is 2, was 1"):
        data.load_state_dict(state)


def predicting(data: AlpacaDataModule, tmp_path: Path) -> AlpacaDataModule:
    data.trainer = make_trainer(tmp_path)
    data.trainer.state.fn = "predict"
    if data.predict_path is None:
        data.setup("predict")
    return data


def test_evaluation_refuses_only_what_would_leak(module, tmp_path):
    state = fitting(module(numbered(40), batch_size=4), tmp_path).state_dict()

    def evaluating(records, **kwargs) -> AlpacaDataModule:
        return predicting(module(records, **kwargs), tmp_path)

    # Another batch size, or another file, says nothing about which records were trained on.
    evaluating(numbered(40), batch_size=16).load_state_dict(state)
    evaluating(numbered(30, start=100), seed=3).load_state_dict(state)
    # The same file split otherwise: its test part was trained on.
    with pytest.raises(CheckpointError, match="data.seed is 3, was 0"):
        evaluating(numbered(40), seed=3).load_state_dict(state)
    # Prompts of their own: the training file need not be on this machine.
    elsewhere = evaluating(numbered(40), seed=3, predict_path=str(tmp_path / "prompts.json"))
    elsewhere.path = str(tmp_path / "nowhere.json")
    elsewhere.load_state_dict(state)
    # A template that differs changes every prompt, in evaluation too.
    with pytest.raises(CheckpointError, match="data.template is 'alpaca'"):
        evaluating(numbered(40), template="alpaca").load_state_dict(state)


def test_evaluation_of_a_mix_refuses_what_would_leak(module, tmp_path):
    names = [
        str(write_records(tmp_path / f"{i}.json", numbered(40, start=100 * i))) for i in range(3)
    ]
    mix = dict(zip(names[:2], (1.0, 2.0), strict=True))
    state = fitting(module([], path=mix), tmp_path).state_dict()

    def evaluating(path, **kwargs) -> None:
        predicting(module([], path=path, **kwargs), tmp_path).load_state_dict(state)

    evaluating(mix)
    evaluating(dict.fromkeys(names[:2], 3.0))  # weights repeat training records, and split nothing
    evaluating(names[2], seed=3)
    with pytest.raises(CheckpointError, match="data.seed is 3, was 0"):
        evaluating(dict.fromkeys(names[:2], 3.0), seed=3)
    with pytest.raises(CheckpointError, match="data.columns is {'input': 'output'}, was None"):
        evaluating(mix, columns={"input": "output"})
    # One of the files, another beside one of them, or another order: every split is another.
    for path in (names[0], {names[0]: 1.0, names[2]: 2.0}, dict(reversed(mix.items()))):
        with pytest.raises(CheckpointError, match=r"data.path is .*, was 1.0 x \w{16} \+ 2.0 x"):
            evaluating(path)


def test_a_file_of_weight_1_is_the_file(module, tmp_path):
    name = str(write_records(tmp_path / "a.json", numbered(40)))
    alone, mapped = (fitting(module([], path=path), tmp_path) for path in (name, {name: 1}))
    states = [alone.state_dict(), mapped.state_dict()]
    assert states[0] == states[1]
    old = json.loads(json.dumps(states[1]))  # as such a mapping was once written
    old["identity"]["data.path"] = f"1.0 x {old['identity']['data.path']}"
    for data in (alone, mapped):
        data.load_state_dict(old)
    predicting(module([], path=name), tmp_path).load_state_dict(old)
    with pytest.raises(CheckpointError, match="data.seed is 3, was 0"):
        predicting(module([], path=name, seed=3), tmp_path).load_state_dict(old)
    twice = fitting(module([], path={name: 2.0}), tmp_path)
    with pytest.raises(CheckpointError, match=r"data.path is 2.0 x \w{16}, was \w{16}"):
        twice.load_state_dict(old)
