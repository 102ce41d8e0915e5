"""Chats: the tokens of transformers' apply_chat_template, what is learnt, what is broken."""

import json
import logging
import random
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from llama_lightning.data.alpaca import AlpacaDataModule
from llama_lightning.data.examples import Fate, encode_prompt, encode_row
from llama_lightning.data.rows import Row, Turn, chat_row, read_rows
from llama_lightning.data.templates import TEMPLATES
from llama_lightning.data.tokenizer import LLAMA3_PATTERN, Tokenizer, byte_letters
from llama_lightning.errors import DataError, UsageError
from llama_lightning.records import IGNORE_INDEX
from tests.data.test_tokenizer import LLAMA3_RANKS, SPECIAL_NAMES, needs_llama3, random_texts
from tests.small import write_byte_tokenizer

LLAMA3 = TEMPLATES["llama3"]
# "chat_template" of tokenizer_config.json in meta-llama/Meta-Llama-3-8B-Instruct.
PUBLIC = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def llama3() -> Tokenizer:
    return Tokenizer.from_path(LLAMA3_RANKS)


@pytest.fixture(scope="module")
def oracle() -> PreTrainedTokenizerFast:
    converter = TikTokenConverter(str(LLAMA3_RANKS), extra_special_tokens=SPECIAL_NAMES)
    return PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        chat_template=PUBLIC,
    )


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("bytes")
    write_byte_tokenizer(folder)
    return Tokenizer.from_path(folder)


def random_chats(count: int, *, specials: bool) -> list[list[Turn]]:
    """Draw chats with and without a system turn, of 1 to 5 exchanges, of any text."""
    rng = random.Random(0)
    names = ("<|eot_id|>", "<|start_header_id|>", "<|begin_of_text|>")
    texts = [t for t in random_texts(6 * count) if t.strip()]
    texts = [t for t in texts if not any(name in t for name in SPECIAL_NAMES)]
    chats = []
    for _ in range(count):
        roles = ["system"] * rng.randint(0, 1) + ["user", "assistant"] * rng.randint(1, 5)
        turns = [Turn(role, rng.choice(texts)) for role in roles]
        if specials:
            i = rng.randrange(len(turns))
            turns[i] = Turn(turns[i].role, f"say {rng.choice(names)}{turns[i].content}")
        chats.append(turns)
    return chats


def whole(row: Row, tokenizer: Tokenizer, **settings) -> list[int]:
    return encode_row(row, tokenizer, LLAMA3, **({"max_seq_len": 10**6} | settings)).tokens


def messages(turns: list[Turn]) -> list[dict[str, str]]:
    return [turn._asdict() for turn in turns]


def ids_of(oracle: PreTrainedTokenizerFast, turns: list[Turn], **kwargs) -> list[int]:
    return oracle.apply_chat_template(messages(turns), return_dict=False, **kwargs)


@needs_llama3
@pytest.mark.parametrize(("template", "count"), [(PUBLIC, 1000), (LLAMA3.jinja, 200)])
def test_random_chats_are_the_tokens_of_transformers(llama3, oracle, template, count):
    """By the public template, and by our own spelling of it, which exports carry."""
    equal = prompts = tokens = 0
    for turns in random_chats(count, specials=False):
        row = chat_row(0, turns)
        expected = ids_of(oracle, turns, chat_template=template)
        equal += whole(row, llama3) == expected
        tokens += len(expected)
        question = ids_of(oracle, turns[:-1], chat_template=template, add_generation_prompt=True)
        prompts += encode_prompt(row, llama3, LLAMA3) == question
    print(f"chats equal {equal} of {count}, prompts {prompts}; {tokens:,} tokens")
    assert equal == prompts == count


@needs_llama3
def test_another_template_is_told_apart(llama3, oracle):
    chats = random_chats(20, specials=False)
    for change in (("\n\n", "\n"), ("| trim", ""), ("bos_token +", "")):
        assert change[0] in PUBLIC
        broken = PUBLIC.replace(*change)
        differing = sum(
            whole(chat_row(0, turns), llama3) != ids_of(oracle, turns, chat_template=broken)
            for turns in chats
        )
        print(f"{change}: {differing} of {len(chats)} differ")
        assert differing > 0


@needs_llama3
def test_special_token_text_in_a_chat_stays_text(llama3, oracle):
    """transformers takes it for control tokens; the text is what can be compared."""
    special = set(llama3.special_ids.values())
    chats = random_chats(200, specials=True)
    for turns in chats:
        tokens = whole(chat_row(0, turns), llama3)
        rendered = oracle.apply_chat_template(messages(turns), tokenize=False)
        assert llama3._encoding.decode_bytes(tokens).decode() == rendered
        assert sum(token in special for token in tokens) == 1 + 3 * len(turns)
        assert tokens != ids_of(oracle, turns)


# What is learnt


def letters(tokenizer: Tokenizer, ids: list[int]) -> str:
    names = {
        tokenizer.special_ids["<|begin_of_text|>"]: "B",
        tokenizer.special_ids["<|start_header_id|>"]: "[",
        tokenizer.special_ids["<|end_header_id|>"]: "]",
        tokenizer.special_ids["<|eot_id|>"]: "E",
        IGNORE_INDEX: "-",
        ord("\n"): "_",
    }
    return "".join(names.get(i) or chr(i) for i in ids)


CHAT = [Turn("user", "p"), Turn("assistant", "ab"), Turn("user", "q"), Turn("assistant", " cd ")]


@pytest.mark.parametrize(
    ("settings", "labels"),
    [
        ({}, "-----------------------abE-----------------------cdE"),
        ({"train_on_turns": "last"}, "-------------------------------------------------cdE"),
        ({"train_on_prompt": True}, "[user]__pE[assistant]__abE[user]__qE[assistant]__cdE"),
    ],
    ids=["all turns", "the last turn", "everything"],
)
def test_the_labels_written_out(bytes_tokenizer, settings, labels):
    encoded = encode_row(chat_row(7, CHAT), bytes_tokenizer, LLAMA3, max_seq_len=99, **settings)
    example = encoded.example(7)
    assert letters(bytes_tokenizer, example.tokens) == (
        "B[user]__pE[assistant]__abE[user]__qE[assistant]__cd"
    )
    assert letters(bytes_tokenizer, example.labels) == labels


@pytest.mark.parametrize("turns", ["all", "last"])
@pytest.mark.parametrize("max_seq_len", range(2, 60))
def test_a_long_chat_is_cut_without_a_false_end(bytes_tokenizer, max_seq_len, turns):
    whole_row = whole(chat_row(0, CHAT), bytes_tokenizer)
    row = encode_row(
        chat_row(0, CHAT),
        bytes_tokenizer,
        LLAMA3,
        max_seq_len=max_seq_len,
        train_on_turns=turns,
    )
    if row.fate is Fate.TOO_LONG:
        shown = letters(bytes_tokenizer, whole_row)
        first = shown.index("ab" if turns == "all" else "cd")
        assert max_seq_len <= first
        return
    assert row.tokens == whole_row[:max_seq_len]
    assert (row.fate is Fate.CUT) == (len(whole_row) > max_seq_len)
    assert any(row.learnt)


# What a row is, and in which template


def test_a_question_and_its_answer_is_a_row_like_any_other(bytes_tokenizer):
    row = chat_row(3, [Turn("user", "p"), Turn("assistant", "a")])
    assert row == Row(3, "p", "", "a")
    assert whole(row, bytes_tokenizer) == whole(Row(3, "p", "", "a"), bytes_tokenizer)


def test_an_alpaca_record_is_one_user_turn(bytes_tokenizer):
    prompt = encode_prompt(Row(0, "p", "i", "a"), bytes_tokenizer, LLAMA3)
    assert letters(bytes_tokenizer, prompt) == "B[user]__p_iE[assistant]__"
    prompt = encode_prompt(Row(0, " p ", "<no input>", "a"), bytes_tokenizer, LLAMA3)
    assert letters(bytes_tokenizer, prompt) == "B[user]__pE[assistant]__"


def test_the_judge_sees_the_whole_conversation():
    row = chat_row(0, [Turn("system", "Be kind."), *CHAT])
    assert row.instruction == "system: Be kind.\n\nuser: p\n\nassistant: ab\n\nuser: q"
    assert (row.input, row.output) == ("", " cd ")


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def both_ways(turns: list[Turn]) -> list[dict]:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    sharegpt = [{"from": names[role], "value": content} for role, content in turns]
    return [{"messages": messages(turns)}, {"conversations": sharegpt, "id": "x"}]


def test_messages_and_conversations_are_the_same_chat(tmp_path):
    records = [record for turns in (CHAT, CHAT[:2]) for record in both_ways(turns)]
    rows = list(read_rows(write(tmp_path / "a.jsonl", *records)))
    assert rows == [chat_row(i, CHAT if i < 2 else CHAT[:2]) for i in range(4)]


def test_records_and_chats_may_stand_in_one_file(tmp_path):
    record = {"instruction": "i", "output": "o", "messages": None}
    path = write(tmp_path / "a.jsonl", record, {"messages": messages(CHAT)})
    assert list(read_rows(path)) == [Row(0, "i", "", "o"), chat_row(1, CHAT)]


def test_an_alpaca_record_may_have_a_column_of_that_name(tmp_path):
    record = {"instruction": "i", "output": "o", "conversations": "none"}
    path = write(tmp_path / "a.jsonl", record, {**record, "messages": messages(CHAT)})
    assert list(read_rows(path)) == [Row(0, "i", "", "o"), Row(1, "i", "", "o")]
    path = write(tmp_path / "a.jsonl", {**record, "messages": messages(CHAT)})
    assert list(read_rows(path, columns={"messages": "messages"})) == [chat_row(0, CHAT)]


def test_prompts_to_answer_may_end_with_the_user(tmp_path):
    path = write(tmp_path / "a.jsonl", {"messages": messages(CHAT[:3])})
    (row,) = read_rows(path, need_output=False)
    assert row.turns == tuple(CHAT[:3])
    assert row.output == ""
    with pytest.raises(DataError, match="row 0: the chat has no assistant turn at its end"):
        list(read_rows(path))


@pytest.fixture
def base(tmp_path) -> str:
    folder = tmp_path / "base"
    folder.mkdir()
    write_byte_tokenizer(folder)
    return str(folder)


def test_chats_through_fit_and_predict(tmp_path, base):
    chats = [
        [Turn("user", f"p{i}"), Turn("assistant", "a"), Turn("user", "q"), Turn("assistant", "b")]
        for i in range(20)
    ]
    path = write(tmp_path / "chats.jsonl", *({"messages": messages(turns)} for turns in chats))
    prompts = write(tmp_path / "prompts.jsonl", {"messages": messages(CHAT[:3])})
    settings = {"path": str(path), "base_folder": base, "template": "llama3", "test_fraction": 0.2}
    data = AlpacaDataModule(**settings, predict_path=str(prompts))
    data.setup("fit")
    assert {example.num_targets for example in data.train_examples} == {4}
    assert data.val_rows[0].turns[-1] == Turn("user", "q")
    data.setup("test")
    assert [row.output for row in data.test_rows] == ["b"] * 4
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    shown = letters(data.tokenizer, batch.tokens.tolist())
    assert shown == "B[user]__pE[assistant]__abE[user]__qE[assistant]__"
    assert data.tokenizer.special_ids["<|eot_id|>"] in batch.stop_ids[0]
    last = AlpacaDataModule(**settings, train_on_turns="last")
    last.setup("fit")
    assert {example.num_targets for example in last.train_examples} == {2}


def test_a_chat_of_several_turns_needs_the_chat_template(tmp_path, base):
    path = write(tmp_path / "chats.jsonl", *both_ways(CHAT[:2]), *both_ways(CHAT))
    data = AlpacaDataModule(path=str(path), base_folder=base)
    with pytest.raises(DataError, match="chats.jsonl, row 2: a chat with .* to llama3"):
        data.setup("fit")
    path = write(tmp_path / "chats.jsonl", *both_ways(CHAT[:2]))
    data = AlpacaDataModule(path=str(path), base_folder=base)
    data.setup("fit")
    assert len(data.train_examples) == 2


def test_a_tokenizer_without_the_chat_tokens(tmp_path):
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(
            {
                "model": {"type": "BPE", "vocab": byte_letters(), "merges": []},
                "pre_tokenizer": {"pretokenizers": [{"pattern": {"Regex": LLAMA3_PATTERN}}]},
                "added_tokens": [
                    {"content": "<|begin_of_text|>", "id": 256},
                    {"content": "<|end_of_text|>", "id": 257},
                ],
            }
        )
    )
    data = AlpacaDataModule(base_folder=str(tmp_path), template="llama3")
    with pytest.raises(UsageError, match=r"the tokenizer has no <\|start_header_id\|>"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("config", "warned"),
    [
        ({"eos_token_id": 257}, True),
        ({"eos_token_id": [257, 264]}, True),
        ({"eos_token_id": [257, 264, 265]}, False),  # an Instruct model's
        ({"eos_token_id": 265}, False),
        ({}, False),
        (None, False),  # nothing tells
    ],
)
def test_a_base_that_has_not_learnt_the_chat_tokens(tmp_path, base, caplog, config, warned):
    if config is not None:
        Path(base, "generation_config.json").write_text(json.dumps(config))
    path = write(tmp_path / "chats.jsonl", *both_ways(CHAT[:2]))
    for template in ("llama3", "alpaca"):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            AlpacaDataModule(path=str(path), base_folder=base, template=template).setup("fit")
        found = [text for text in caplog.messages if text.startswith("warning: ")]
        assert len(found) == (warned and template == "llama3")
        if found:
            print(found[0])
            assert "does not stop at <|eot_id|>" in found[0]


# Broken chats


U, A = {"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}
S = {"role": "system", "content": "s"}
BROKEN = {
    "answer first": ([A, U, A], "turn 0: assistant comes first; system or user must"),
    "two questions": ([U, U, A], "turn 1: user comes after user; assistant must"),
    "two answers": ([U, A, A], "turn 2: assistant comes after assistant; user must"),
    "late system": ([U, A, S, U, A], "turn 2: system comes after assistant; user must"),
    "two systems": ([S, S, U, A], "turn 1: system comes after system; user must"),
    "system, answer": ([S, A], "turn 1: assistant comes after system; user must"),
    "empty turn": ([U, {**A, "content": " \n"}], "turn 1: the assistant's turn is empty"),
    "unknown role": (
        [U, {**A, "role": "tool"}],
        "turn 1: unknown role 'tool'; roles are system, user, assistant",
    ),
    "no answer": ([U], "the chat has no assistant turn at its end to learn from"),
    "no answer at the end": ([U, A, U], "the chat has no assistant turn at its end"),
    "only a system turn": ([S], "'messages' has no user turn"),
    "no turns": ([], "'messages' has no user turn"),
    "a text": ("hello", "'messages' is a string instead of a list of turns"),
    "texts": (["hello"], "turn 0: a string instead of an object"),
    "other keys": ([{"from": "human", "value": "p"}], "turn 0: no 'role'; it has 'from', 'value'"),
    "null": ([{**U, "content": None}], "turn 0: 'content' is null instead of a string"),
    "parts": ([{**U, "content": [{"type": "text"}]}], "turn 0: 'content' is a list instead of"),
}


@pytest.mark.parametrize(("turns", "says"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_chat_is_refused_in_one_line(tmp_path, base, turns, says):
    path = write(tmp_path / "a.jsonl", {"messages": [U, A]}, {"messages": turns})
    cache = tmp_path / "cache"
    data = AlpacaDataModule(
        path=str(path), base_folder=base, template="llama3", cache_dir=str(cache)
    )
    with pytest.raises(DataError) as caught:
        data.setup("fit")
    assert f"{path}, row 1" in str(caught.value)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(cache.iterdir()) == []  # nothing half-cached


def test_sharegpt_roles_are_named(tmp_path):
    turns = [{"from": "human", "value": "p"}, {"from": "bard", "value": "a"}]
    with pytest.raises(DataError, match="unknown role 'bard'; roles are system, human, user, gpt"):
        list(read_rows(write(tmp_path / "a.jsonl", {"conversations": turns})))
