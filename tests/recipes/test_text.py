"""Text as documents, tokens and rows: read whole whatever the chunk and the file, packed without a gap, gone on with from any step."""

from __future__ import annotations

import json
import lzma
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from recipes.common import documents, tokens
from recipes.common.documents import Source, read_documents, unique
from recipes.common.errors import RecipeError
from recipes.common.tokenizing import load_tokenizer, start_token
from recipes.common.tokens import by_size, chat_template, tokenized
from recipes.common.windows import Windows, on_device, own_batches, training_order

MARK = "<|endoftext|>"
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


@pytest.fixture
def tokenizer(tmp_path_factory, monkeypatch):
    """One token a byte, and the start token 0."""
    monkeypatch.setenv("HF_LINATTN_CACHE", str(tmp_path_factory.mktemp("cache")))
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([MARK, *sorted(pre_tokenizers.ByteLevel.alphabet())])}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single=f"{MARK} $A", special_tokens=[(MARK, 0)])  # unless told to leave it out
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=MARK, eos_token=MARK)


def stream(tokenizer, texts) -> list[int]:
    return [token for text in texts for token in [0, *tokenizer(text, add_special_tokens=False)["input_ids"]]]


# -- documents -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 13, 1000])
def test_a_file_is_split_the_same_whatever_the_chunk(tmp_path, chunk):
    path = tmp_path / "a.txt"
    path.write_text(f"one é{MARK}\n\n{MARK}two “quoted”{MARK}三\n")
    assert [x.strip() for x in documents._split_file(path, MARK, chunk)] == ["one é", "", "two “quoted”", "三"]


def test_a_folder_is_all_its_files_packed_or_not(tmp_path):
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "a.txt").write_text(f"one{MARK}two")
    (tmp_path / "b" / "c.txt.xz").write_bytes(lzma.compress(f"three{MARK}four".encode()))
    (tmp_path / "b" / "d.jsonl.xz").write_bytes(lzma.compress(b'{"text": "five"}\n\n{"text": "six"}\n'))
    (tmp_path / "b" / "deep" / "e.jsonl").write_text('{"text": "seven"}\n')
    (tmp_path / "b" / "note.pdf").write_text("not text")
    (tmp_path / ".hidden" / "f.txt").write_text("not to be read")
    assert list(read_documents(Source(str(tmp_path)))) == ["one", "two", "three", "four", "five", "six", "seven"]
    stamp = Source(str(tmp_path)).stamp()
    (tmp_path / "b" / "deep" / "e.jsonl").write_text('{"text": "eight"}\n')
    assert Source(str(tmp_path)).stamp() != stamp


def test_rows_of_every_kind_of_table_are_documents(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = datasets.Dataset.from_dict({"story": ["one", " ", "two"]})
    rows.to_parquet(tmp_path / "a.parquet")
    rows.to_csv(tmp_path / "a.csv")
    rows.to_json(tmp_path / "a.jsonl")
    for name in ("a.parquet", "a.csv", "a.jsonl"):
        assert list(read_documents(Source(str(tmp_path / name), column="story"))) == ["one", "two"], name


def test_a_conversation_goes_through_the_chat_template(tmp_path, tokenizer):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": talk}) + "\n")
    source = Source(str(path), column="messages")
    with pytest.raises(RecipeError, match="line 1 holds a conversation, and the tokenizer has no chat template"):
        list(read_documents(source, chat_template(tokenizer)))
    tokenizer.chat_template = TEMPLATE
    assert list(read_documents(source, chat_template(tokenizer))) == ["[user] Hi\n[assistant] Yes?"]
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(RecipeError, match="line 1: the chat template refuses the conversation .*no system here"):
        list(read_documents(source, chat_template(tokenizer)))
    path.write_text(json.dumps({"messages": ["Hi"]}) + "\n")
    with pytest.raises(RecipeError, match="a list that is no conversation"):
        list(read_documents(source, chat_template(tokenizer)))


def test_the_column_is_named_as_the_user_gives_it_and_a_model_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"story": "x"}\n')
    with pytest.raises(RecipeError, match="set --column to one of story"):
        list(read_documents(Source(str(tmp_path), column_option="--column")))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(RecipeError, match="holds a model and no text"):
        Source(str(tmp_path)).check()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", f" \n{MARK}\n ".encode(), "holds no text"),
        ("a.txt", b"good \xff bad", "not UTF-8 text (byte 5 is 0xff)"),
        ("a.txt", "cut é".encode()[:-1], "its last character is cut off"),
        ("a.txt.xz", b"not packed", "cannot be read"),
        ("a.txt.xz", lzma.compress(b"words " * 5000)[:-40], "cannot be read"),
        ("a.jsonl", b'{"story": "x"}\n', "no column 'text'; set text_column to one of story"),
        ("a.jsonl", b"not json\n", "line 1 is not readable as JSON"),
        ("a.jsonl", b"[1]\n", "line 1 is no JSON object"),
        ("a.parquet", b"not a table", "the data set cannot be loaded"),
        ("absent.txt", None, "no such file"),
        ("folder", "folder", "is a folder without text"),
    ],
)
def test_bad_text_is_refused_in_a_sentence(tmp_path, name, content, message):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError) as error:
        list(read_documents(Source(str(path))))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_offset_of_bad_utf8_counts_from_the_start_of_the_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("é".encode() * 10 + b"\xff")
    for chunk in (1, 3, 7, 100):
        with pytest.raises(RecipeError, match=r"byte 20 is 0xff"):
            list(documents._split_file(path, MARK, chunk))


def test_no_document_comes_twice():
    seen = set()
    assert list(unique(["a", "b", "a"], seen)) == ["a", "b"]
    assert list(unique(["c", "b"], seen)) == ["c"]


# -- tokens ----------------------------------------------------------------------------------------------------------


def test_tokens_are_the_stream_of_start_tokens_and_documents(tokenizer, monkeypatch):
    texts = [f"the {n}th document" for n in range(40)]
    monkeypatch.setattr(tokens.by_size, "__defaults__", (100,))
    made = tokenized(lambda: texts, ["test"], tokenizer)
    assert made.ids.tolist() == stream(tokenizer, texts)
    assert made.ids.dtype == np.uint16 and made.documents == 40 and made.start == 0


def test_a_slow_tokenizer_and_a_cut_of_its_own_change_nothing(tokenizer, monkeypatch):
    texts = ["one two", "three"]
    tokenizer(texts, truncation=True, max_length=2)
    assert tokenized(lambda: texts, ["fast"], tokenizer).ids.tolist() == stream(tokenizer, texts)
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token=MARK)
    monkeypatch.setattr(type(plain), "is_fast", False)
    assert tokenized(lambda: texts, ["slow"], plain).ids.tolist() == stream(tokenizer, texts)


def test_text_is_tokenized_once_and_anew_where_it_or_the_tokenizer_changes(tokenizer):
    read = []

    def texts():
        read.append(1)
        return ["one", "two"]

    first = tokenized(texts, ["key"], tokenizer)
    assert tokenized(texts, ["key"], tokenizer).digest == first.digest and len(read) == 1
    tokenized(texts, ["other key"], tokenizer)
    tokenizer.add_tokens(["tw"])
    assert tokenized(texts, ["key"], tokenizer).digest != first.digest and len(read) == 3


def test_a_reading_that_fails_leaves_nothing_behind(tokenizer):
    def texts():
        yield "one"
        raise RecipeError("no more")

    with pytest.raises(RecipeError, match="^no more$"):
        tokenized(texts, ["key"], tokenizer)
    assert not any(tokens.cache().iterdir())
    assert len(tokenized(lambda: ["one"], ["key"], tokenizer)) == 4


def test_a_tokenizer_must_mark_where_documents_start(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "whole")
    bare = load_tokenizer(str(tmp_path / "whole" / "tokenizer.json"))
    assert start_token(bare) == 0
    bare.bos_token = bare.eos_token = None
    with pytest.raises(RecipeError, match="neither a bos nor an eos"):
        start_token(bare)
    with pytest.raises(RecipeError, match="no tokenizer can be loaded"):
        load_tokenizer(str(tmp_path))


def test_groups_by_size():
    assert list(by_size(["aa", "b", "cccc", "d", "e"], most=3)) == [["aa", "b"], ["cccc"], ["d", "e"]]


# -- rows ------------------------------------------------------------------------------------------------------------


def some_tokens(count: int) -> SimpleNamespace:
    class Some(SimpleNamespace):
        def __len__(self):
            return count

    return Some(ids=np.arange(count, dtype=np.uint16), start=0, digest="x")


def test_rows_are_the_stream_cut_at_every_length():
    rows = Windows(some_tokens(35), 10)
    assert len(rows) == 3
    assert rows.rows(np.array([2, 0])).tolist() == [list(range(20, 30)), list(range(10))]
    some = Windows(some_tokens(35), 10, chosen=np.array([1, 2]))
    assert len(some) == 2 and some.rows(np.array([0]))[0, 0] == 10
    assert some.batch(np.array([0]))["input_ids"].dtype == torch.int64
    with pytest.raises(RecipeError, match="the text is 35 tokens, shorter than one sequence of 36"):
        Windows(some_tokens(35), 36)


def test_positions_restart_at_every_document():
    rows = np.array([[5, 6, 0, 7, 8, 0, 9], [0, 1, 2, 3, 4, 5, 6]])
    assert on_device(rows, "cpu", start=0)["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 5, 6]]
    assert set(on_device(rows, "cpu", start=None)) == {"input_ids"}


def test_an_epoch_visits_each_once_and_goes_on_from_any_point():
    order = training_order(50, 4, seed=3)
    first, second = ([next(order).tolist() for _ in range(12)] for _ in range(2))
    assert len(set(sum(first, []))) == len(set(sum(second, []))) == 48 and first != second
    for begin in (5, 12, 17):
        assert next(training_order(50, 4, seed=3, begin=begin)).tolist() == (first + second)[begin]
    assert next(training_order(50, 4, seed=4)).tolist() != first[0]
    with pytest.raises(ValueError, match="3 rows do not fill a batch of 4"):
        next(training_order(3, 4, seed=0))


@pytest.mark.parametrize(("count", "processes"), [(10, 1), (10, 2), (3, 4), (8, 2)])
def test_each_row_is_validated_once_and_every_process_computes_as_often(count, processes):
    shares = [list(own_batches(count, 3, process, processes)) for process in range(processes)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(row for share in shares for rows, counted in share for row in rows[:counted]) == list(range(count))
    assert all(len(rows) for share in shares for rows, _ in share)
