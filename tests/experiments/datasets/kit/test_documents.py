"""Rows as people have them: long, empty, null, marked, damaged late."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments.datasets.local import Local
from experiments.text.tokens import prepare_tokens
from tests.experiments.datasets.test_datasets import VOCAB_SIZE


def read(path: Path, content: str | bytes, text_field: str = "text") -> list[str]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    data = Local(path=str(path), text_field=text_field)
    data.validate()
    return list(data.documents())


class TestCSV:
    def test_fields_may_be_long(self, tmp_path: Path) -> None:
        text = "word " * 40_000
        assert read(tmp_path / "big.csv", f"text,id\n{text},1\n") == [text.strip()]

    def test_quotes_lines_and_ends_of_lines(self, tmp_path: Path) -> None:
        content = 'id,text\r\n1,"two\r\nlines, and ""quotes"""\r\n\r\n2,plain\r3,last'
        assert read(tmp_path / "a.csv", content) == ['two\r\nlines, and "quotes"', "plain", "last"]

    def test_empty_fields_and_lines_are_passed_over(self, tmp_path: Path) -> None:
        assert read(tmp_path / "a.csv", '\ntext,id\n,1\n"  ",2\n\nthree,3\n') == ["three"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("text,id\none,1\nhello, world,2\n", "row 2 of FILE has 3 fields, must have 2 as its header does"),
            ("text,id\none,1\ntwo\n", "row 2 of FILE has 1 fields, must have 2 as its header does"),
            ('text,id\none,1\n"two,2\n', "row 2 of FILE is no CSV (unexpected end of data)"),
            ('"text,id\none,1\n', "the header of FILE is no CSV (unexpected end of data)"),
            ("text,id,text\none,1,two\n", "the header of FILE names 'text' more than once"),
        ],
    )
    def test_rows_that_nobody_can_tell_apart_are_named(self, content: str, message: str, tmp_path: Path) -> None:
        path = tmp_path / "a.csv"
        with pytest.raises(ValueError, match="^" + re.escape(f"dataset.path: {message.replace('FILE', str(path))}")):
            read(path, content)

    def test_what_cannot_be_seen_in_a_name_is_shown(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"row 1 of .* has id, ' text', '\\u200btext', ''$"):
            read(tmp_path / "a.csv", "id, text,\u200btext,\n1,2,3,4\n")

    def test_a_field_whose_name_has_a_dot(self, tmp_path: Path) -> None:
        assert read(tmp_path / "a.csv", "meta.text,id\none,1\n", "meta.text") == ["one"]


class TestJSON:
    @pytest.mark.parametrize("suffix", ["json", "jsonl"])
    @pytest.mark.parametrize("indent", [None, 2])
    def test_arrays(self, suffix: str, indent: int | None, tmp_path: Path) -> None:
        rows = [{"text": "one"}, {"text": "two\n\nparagraphs"}]
        content = "\n" + json.dumps(rows, indent=indent)
        assert read(tmp_path / f"a.{suffix}", content) == ["one", "two\n\nparagraphs"]

    def test_lines_and_objects_over_several_lines(self, tmp_path: Path) -> None:
        assert read(tmp_path / "lines.json", '{"text": "one"}\n\n{"text": "two"}\n') == ["one", "two"]
        assert read(tmp_path / "one.json", json.dumps({"text": "one"}, indent=1)) == ["one"]

    def test_strings_are_rows(self, tmp_path: Path) -> None:
        assert read(tmp_path / "a.json", '["one", "", "two"]') == ["one", "two"]
        with pytest.raises(ValueError, match=r"^dataset\.text_field: 'body', must be .*; row 1 of .* has none$"):
            read(tmp_path / "a.json", '["one"]', "body")

    def test_null_and_empty_rows_are_passed_over(self, tmp_path: Path) -> None:
        rows = [None, {}, "", {"text": None}, {"text": ""}, {"text": " \n"}, {"text": "one"}]
        assert read(tmp_path / "a.json", json.dumps(rows)) == ["one"]
        assert read(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))) == ["one"]
        nested = [{"a": None}, {"a": {"b": None}}, {"a": {"b": "one"}}]
        assert read(tmp_path / "b.json", json.dumps(nested), "a.b") == ["one"]
        with pytest.raises(ValueError, match=r"is empty, must hold text$"):
            read(tmp_path / "a.json", json.dumps(rows[:-1]))

    def test_half_a_surrogate_pair_is_replaced(self, tmp_path: Path) -> None:
        content = '{"text": "broken \\ud83d emoji"}\n{"text": "whole \\ud83d\\ude00 and \\ude00\\ud83d"}\n'
        path = tmp_path / "a.jsonl"
        assert read(path, content) == ["broken \ufffd emoji", "whole \U0001f600 and \ufffd\ufffd"]
        assert prepare_tokens(Local(path=str(path)), VOCAB_SIZE).num_tokens > 0

    def test_marks_of_files_that_were_joined(self, tmp_path: Path) -> None:
        line = '\ufeff{"text": "one"}\n'
        assert read(tmp_path / "a.jsonl", line * 2) == ["one", "one"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ('{"text": "a"}\n{"text": "b\n', "line 2 of FILE is no JSON"),
            ('\n[{"text": "a"},\n{"text": "b"\n', "line 4 of FILE is no JSON"),
            ("[" * 100_000, "line 1 of FILE is no JSON (maximum recursion depth"),
            ("\n" + "9" * 5000, "line 2 of FILE is no JSON (Exceeds the limit"),
        ],
    )
    @pytest.mark.parametrize("suffix", ["json", "jsonl"])
    def test_damaged_lines_are_named(self, suffix: str, content: str, message: str, tmp_path: Path) -> None:
        path = tmp_path / f"a.{suffix}"
        with pytest.raises(ValueError, match="^" + re.escape(f"dataset.path: {message.replace('FILE', str(path))}")):
            read(path, content)

    def test_rows_that_lack_the_field_are_named(self, tmp_path: Path) -> None:
        for content in ('[{"text": "a"}, {"body": "b"}]', '[{"text": "a"}, {"body": 1, "text": ["b"]}]'):
            with pytest.raises(ValueError, match=r"^dataset\.text_field: 'text', must be .*; row 2 of .* has body"):
                read(tmp_path / "a.json", content)
        with pytest.raises(ValueError, match=r"^dataset\.text_field: .*; row 1 of .* has data$"):
            read(tmp_path / "a.json", '{"data": [{"text": "a"}]}')


class TestParquet:
    @staticmethod
    def written(path: Path) -> bytes:
        table = pa.table({"id": range(3000), "text": [f"text {i}" for i in range(3000)]})
        pq.write_table(table, path, row_group_size=1000, use_dictionary=False, compression="snappy")
        return path.read_bytes()

    def test_one_that_breaks_late_is_refused_by_row(self, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        content = bytearray(self.written(path))
        place = pq.ParquetFile(path).metadata.row_group(2).column(1)
        start = place.data_page_offset
        content[start : start + place.total_compressed_size] = bytes(place.total_compressed_size)
        path.write_bytes(content)
        data = Local(path=str(path))
        data.validate()
        documents = data.documents()
        assert [next(documents) for _ in range(1000)] == [f"text {i}" for i in range(1000)]
        with pytest.raises(ValueError, match=rf"^dataset\.path: {path} is no readable Parquet file from row \d+ on \("):
            list(documents)

    def test_columns_that_nobody_reads_may_be_damaged(self, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        content = bytearray(self.written(path))
        place = pq.ParquetFile(path).metadata.row_group(1).column(0)
        start = place.data_page_offset
        content[start : start + place.total_compressed_size] = bytes(place.total_compressed_size)
        assert len(read(path, bytes(content))) == 3000

    def test_null_rows_are_passed_over(self, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"text": ["one", None, "", "two"]}), path)
        assert read(path, path.read_bytes()) == ["one", "two"]

    def test_the_suffix_is_not_needed(self, tmp_path: Path) -> None:
        content = self.written(tmp_path / "a.parquet")
        assert len(read(tmp_path / "part-00000", content)) == 3000

    def test_bytes_that_are_no_text_are_refused_by_row(self, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        text = pa.array([b"good", b"bad \xff"], pa.binary())
        pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 2, text.buffers())}), path)
        with pytest.raises(ValueError, match=r"^dataset\.path: .* is no readable Parquet file from row 1 on \(.*utf-8"):
            read(path, path.read_bytes())


class TestFolders:
    def test_links_to_folders_are_followed(self, tmp_path: Path) -> None:
        data, disk = tmp_path / "data", tmp_path / "disk"
        for folder in (data, disk):
            folder.mkdir()
        (data / "one.txt").write_text("one")
        (disk / "two.txt").write_text("two")
        (data / "more").symlink_to(disk)
        (data / "round").symlink_to(data)
        (disk / "back").symlink_to(data)
        assert list(Local(path=str(data)).documents()) == ["two", "one"]

    def test_what_is_no_file_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("text")
        (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
        with pytest.raises(ValueError, match=r"^dataset\.path: '.*/gone\.txt' does not exist, must be a file"):
            Local(path=str(tmp_path)).validate()
