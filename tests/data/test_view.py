"""What `inspect` shows of rows: every token's text, what carries loss, and nothing that acts on terminal or browser."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sft_lab.data import view
from sft_lab.data.view import DocumentView, RowView
from tests.data.test_template import tokenizer_with

HOSTILE = "[bold]b[/bold] [/] \x1b[31mred\x1b[0m \x07\r\u202e <script>alert(1)</script> &lt; ' \" </span> ⟦x⟧ \n\t end"


def sentencepiece_like(first_space: str) -> PreTrainedTokenizerFast:
    """A BPE with "▁" for spaces and single bytes for unknown characters; `first_space`: "stripped" as Llama's, "none" as
    Gemma's, or "metaspace" for the decoder of that name."""
    words = ["▁", "h", "i", "a", "▁h", "▁hi", "▁a", "▁▁"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [("▁", "h"), ("▁h", "i"), ("▁", "a"), ("▁", "▁")]
    bpe = Tokenizer(
        models.BPE({name: i for i, name in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    bpe.pre_tokenizer = pre_tokenizers.Metaspace("▁", "never" if first_space == "none" else "always")
    spaces, whole = decoders.Replace("▁", " "), [decoders.ByteFallback(), decoders.Fuse()]
    bpe.decoder = {
        "stripped": decoders.Sequence([spaces, *whole, decoders.Strip(" ", 1, 0)]),
        "none": decoders.Sequence([spaces, *whole]),
        "metaspace": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", "always")]),
    }[first_space]
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


BYTE_LEVEL = tokenizer_with("<|im_start|>", "<|im_end|>")
KINDS = {
    "byte-level": BYTE_LEVEL,
    **{f"sentencepiece, {kind}": sentencepiece_like(kind) for kind in ("stripped", "none", "metaspace")},
}


def ids_of(text: str, tokenizer: Any = BYTE_LEVEL) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def id_of(token: str) -> int:
    return BYTE_LEVEL.convert_tokens_to_ids(token)


def document(*parts: str, name: str = "chats.jsonl:1", **more: Any) -> DocumentView:
    """Every second part carries loss."""
    ids, labels = [], []
    for i, part in enumerate(parts):
        new = ids_of(part)
        ids += new
        labels += new if i % 2 else [-100] * len(new)
    return DocumentView(name, name.split(":")[0], view.tokens(BYTE_LEVEL, ids, labels), **more)


def row(*parts: str, **more: Any) -> RowView:
    return RowView("chats.jsonl:1", [document(*parts, **more)])


def learned_text(shown: DocumentView) -> str:
    return BYTE_LEVEL.decode([token.label for token in shown.tokens if token.label != -100])


def printed(rows: list[RowView], **options: Any) -> str:
    console = Console(file=io.StringIO(), width=40, soft_wrap=True, **options)
    console.print(view.as_text(rows, console))
    return console.file.getvalue()


COLOURLESS = [{}, {"force_terminal": True, "no_color": True, "color_system": "256"}]
COLOURED = {"force_terminal": True, "no_color": False, "color_system": "256"}
CHAT = (
    "<|im_start|>user\nwhat is [it]?<|im_end|>\n<|im_start|>assistant\n",
    "a 🙂 day\n\n  - good<|im_end|>",
    "\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n",
    "\treturn [[1], [2]]<|im_end|>",
    "\n",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "hi",
        "hi  a",
        "  hi",
        "hi\n\n\thi",
        "a 🙂🙂 hi",
        "👩‍👧 é",
        "你好 hi",
        "\ufffd hi",
        "<s>hi</s>",
        "<s> hi </s>hi",
    ],
)
def test_texts_of_tokens_join_to_the_decoded_row(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]
    ids = ids_of(text, tokenizer)
    shown = view.tokens(tokenizer, ids, ids)
    assert [token.id for token in shown] == ids
    assert "".join(token.text for token in shown) == tokenizer.decode(ids)


def test_a_character_of_several_tokens_is_on_the_last_of_them() -> None:
    ids = ids_of("x🙂y你")
    texts = [token.text for token in view.tokens(BYTE_LEVEL, ids, ids)]
    assert texts == ["x", "", "", "", "🙂", "y", "", "", "你"]


def test_spaces_of_sentencepiece_tokens_are_kept() -> None:
    tokenizer = KINDS["sentencepiece, stripped"]
    ids = ids_of("<s>hi  a hi</s>", tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁hi", "▁", "▁a", "▁hi", "</s>"]
    assert [token.text for token in view.tokens(tokenizer, ids, ids)] == ["<s>", " hi", " ", " a", " hi", "</s>"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", ["🙂", "\ufffd"], ids=["half an emoji", "a replacement character"])
def test_what_is_no_character_is_not_put_on_the_next_token(kind: str, before: str) -> None:
    """It would seem to carry loss, where that begins."""
    tokenizer = KINDS[kind]
    broken = ids_of("a" + before, tokenizer)
    broken = broken if before == "\ufffd" else broken[:-2]
    for next_id, text in ((tokenizer.eos_token_id, "</s>"), (ids_of("hi a", tokenizer)[-1], None)):
        ids = [*broken, next_id]
        shown = view.tokens(tokenizer, ids, [-100] * len(broken) + [next_id])
        assert shown[-1].text == (text or (" a" if kind != "byte-level" else "a"))
        assert "".join(token.text for token in shown) == tokenizer.decode(ids)
        assert "\ufffd" in shown[-2].text


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_cut_within_a_character_shows_that_it_is(kind: str) -> None:
    ids = ids_of("hi 🙂", KINDS[kind])[:-1]
    shown = view.tokens(KINDS[kind], ids, ids)
    assert "".join(token.text for token in shown) == KINDS[kind].decode(ids)
    assert shown[-1].text.endswith("\ufffd")


def test_special_tokens_are_told_from_text_that_looks_like_one() -> None:
    tokenizer = tokenizer_with("<|im_end|>")
    tokenizer.add_tokens([AddedToken("<note>", special=False)])
    ids = ids_of("<s>day<note><|im_end|>", tokenizer)
    spelt = tokenizer("<|im_end|>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert len(spelt) > 1
    shown = view.tokens(tokenizer, ids + spelt, ids + spelt)
    assert [token.text for token in shown if token.special] == ["<s>", "<|im_end|>"]
    assert "".join(token.text for token in shown) == "<s>day<note><|im_end|><|im_end|>"


def test_json_has_the_shape_that_scripts_read() -> None:
    turns = [{"role": "user", "trained": False}, {"role": "assistant", "trained": True}]
    shown = row("hello", "day</s>", turns=turns, notes=["truncated"])
    (made,) = json.loads(json.dumps(view.as_json([shown])))["rows"]
    assert (made["id"], made["source"]) == ("chats.jsonl:1", "chats.jsonl")
    assert made["turns"] == [{**turn, "document": 0} for turn in turns]
    assert {"id": id_of("</s>"), "text": "</s>", "label": id_of("</s>"), "special": True} == made["tokens"][-1]
    assert {token["label"] for token in made["tokens"] if token["text"] in ("he", "llo")} == {-100}
    assert made["documents"] == [
        {
            "id": "chats.jsonl:1",
            "source": "chats.jsonl",
            "tokens": len(made["tokens"]),
            "learned": made["learned"],
            "notes": ["truncated"],
        }
    ]
    assert made["learned"] == sum(token["label"] != -100 for token in made["tokens"])


def test_json_of_a_packed_row_says_how_its_tokens_divide() -> None:
    parts = [document("hello", " day", turns=[{"role": "user", "trained": False}]), document("x", "🙂", name="b.csv:7")]
    (made,) = view.as_json([RowView("packed row 1", parts)])["rows"]
    assert made["source"] == "chats.jsonl, b.csv"
    assert [token["id"] for token in made["tokens"]] == [token.id for part in parts for token in part.tokens]
    assert [(d["id"], d["tokens"]) for d in made["documents"]] == [(d.id, len(d.tokens)) for d in parts]
    assert made["turns"] == [{"role": "user", "trained": False, "document": 0}]


@pytest.mark.parametrize("options", COLOURLESS, ids=["pipe", "NO_COLOR"])
def test_without_colour_marks_enclose_exactly_what_carries_loss(options: dict[str, Any]) -> None:
    text = re.sub(r"\x1b\[[\d;]*m", "", printed([row(*CHAT)], **options))
    legend, *spans = re.findall("⟦(.*?)⟧", text, flags=re.DOTALL)
    assert legend == "carries loss"
    assert [re.sub("⇥ +", "\t", span.replace("⏎\n", "\n")) for span in spans] == [CHAT[1], CHAT[3]]
    rest = re.sub("⟦.*?⟧", "", text, flags=re.DOTALL).replace("⏎\n", "\n")
    assert CHAT[0] + CHAT[2] + CHAT[4] in rest


def test_marks_in_the_data_cannot_be_mistaken() -> None:
    text = printed([row("⟦a⟧ ", "⟧b")])
    assert text.count("⟦") == text.count("⟧") == 2  # the legend's and one span
    assert "\\u27e6a\\u27e7 ⟦\\u27e7b⟧" in text


def test_with_colour_styles_tell_what_carries_loss() -> None:
    console = Console(file=io.StringIO(), **COLOURED)
    text = view.as_text([row(*CHAT[:3])], console)
    begin = text.plain.index("<|im_start|>")
    by_style: dict[str, str] = {}
    for span in text.spans:
        if span.start >= begin:
            by_style[str(span.style)] = by_style.get(str(span.style), "") + text.plain[span.start : span.end]
    assert by_style["bold green"] == "a 🙂 day⏎\n⏎\n  - good"
    assert by_style["bold green reverse"] == "<|im_end|>"
    assert by_style["magenta reverse"] == "<|im_start|><|im_end|><|im_start|><|im_start|><|im_end|><|im_start|>"
    assert by_style["dim"].startswith("user⏎\nwhat is [it]?")
    assert "⟦" not in text.plain
    assert "\x1b[1;32ma 🙂 day⏎" in printed([row(*CHAT[:3])], **COLOURED)


def test_lines_longer_than_the_terminal_come_out_whole() -> None:
    words = "day " * 50 + "end"
    assert words in printed([row(words)])


@pytest.mark.parametrize("options", [*COLOURLESS, COLOURED], ids=["pipe", "NO_COLOR", "colour"])
def test_nothing_in_the_data_acts_on_the_terminal(options: dict[str, Any]) -> None:
    shown = row(
        HOSTILE, HOSTILE, turns=[{"role": "\x1b[2J", "trained": True}], notes=["\x1b[2J"], name="\x1b[2J\u202e:1"
    )
    text = re.sub(r"\x1b\[[\d;]*m", "", printed([shown, RowView("\x1b[2J", [shown.documents[0]] * 2)], **options))
    assert {c for c in text if not c.isprintable()} == {"\n"}
    assert text.count("[bold]b[/bold] [/] \\x1b[31mred\\x1b[0m \\x07\\r\\u202e <script>") == 6
    assert text.count("\\x1b[2J") == 3 * 3 + 1  # name, role and note of each document, and the packed row's id


def test_headers_count_tokens_and_name_turns_and_notes() -> None:
    turns = [{"role": "system", "trained": False}, {"role": "assistant", "trained": True}]
    text = printed([row("xyz", "x</s>", turns=turns, notes=["truncated"])])
    assert "chats.jsonl:1  tokens 5  learned 2 (40%)  truncated\n" in text
    assert "turns: system, assistant (learned)\n" in text


def test_neighbours_in_a_packed_row_are_kept_apart() -> None:
    packed = RowView("packed row 3", [document("x", "y"), document("z", "xx", name="b.csv:7")])
    assert printed([packed]).splitlines()[2:] == [
        "packed row 3  tokens 5  learned 3 (60%)  documents 2",
        "── chats.jsonl:1  tokens 2  learned 1 (50%)",
        "x⟦y⟧",
        "── b.csv:7  tokens 3  learned 2 (67%)",
        "z⟦xx⟧",
    ]


def test_a_document_of_no_tokens_has_counts() -> None:
    assert "tokens 0  learned 0 (0%)" in printed([row()])


class Page(HTMLParser):
    """What a browser would read: tags with attributes, headings, and per document (classes, title, text) of its spans."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.headings: list[str] = []
        self.documents: list[list[tuple[str, str, str]]] = []
        self.open: list[tuple[str, dict[str, str]]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.tags.append((tag, attributes))
        if tag != "meta":  # which has no end
            self.open.append((tag, attributes))
        if attributes.get("class") == "document":
            self.documents.append([])
        if "title" in attributes:
            self.documents[-1].append((attributes.get("class", ""), attributes["title"], ""))
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tag, attributes = self.open[-1] if self.open else ("", {})
        if "title" in attributes:
            classes, title, text = self.documents[-1].pop()
            self.documents[-1].append((classes, title, text + data))
        if tag in ("h1", "h2", "h3"):
            self.headings[-1] += data
        assert attributes.get("class") != "tokens", "text between two tokens"

    def text(self, number: int, of: str = "") -> str:
        return "".join(text for classes, _, text in self.documents[number] if of in classes)


def test_page_read_back_has_what_carries_loss_and_every_label() -> None:
    shown = row(*CHAT)
    page = Page(view.as_html([shown], "rows"))
    assert page.text(0) == "".join(CHAT)
    assert page.text(0, "learned") == learned_text(shown.documents[0]) == CHAT[1] + CHAT[3]
    assert page.text(0, "special").count("<|im_start|>") == 4
    assert [title for _, title, _ in page.documents[0]] == [f"id {t.id}, label {t.label}" for t in shown.tokens]


def test_nothing_in_the_data_acts_on_the_page() -> None:
    names = {"name": "<b>:1", "turns": [{"role": "<b>", "trained": True}], "notes": ["<b>&lt;"]}
    page = Page(made := view.as_html([row(HOSTILE, HOSTILE, **names)], "<b> & rows"))
    escaped = HOSTILE.replace("\x1b", "\\x1b").replace("\x07\r\u202e", "\\x07\\r\\u202e")
    assert (page.text(0), page.text(0, "learned")) == (escaped * 2, escaped)
    assert page.headings == ["<b> & rows", "chats.jsonl:1", "<b>:1"]
    assert {tag for tag, _ in page.tags}.isdisjoint({"b", "script"})
    assert {c for c in made if not c.isprintable()} <= {"\n", "\t"}


def test_page_needs_no_script_and_no_network() -> None:
    page = Page(made := view.as_html([row(*CHAT)], "rows"))
    assert made.startswith("<!DOCTYPE html>")
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "img", "iframe"})
    assert {name for _, attributes in page.tags for name in attributes}.isdisjoint({"src", "href", "onclick", "onload"})
    assert not re.search(r"url\(|@import|https?:", made)
    assert "prefers-color-scheme: dark" in made


def test_page_of_a_packed_row_names_each_document() -> None:
    parts = [document("hello", " day"), document("x", "🙂", name="b.csv:7")]
    page = Page(view.as_html([RowView("packed row 1", parts), row("alone", "!")], "rows"))
    assert page.headings == ["rows", "packed row 1", "chats.jsonl:1", "b.csv:7", "chats.jsonl:1"]
    assert [page.text(i) for i in range(3)] == ["hello day", "x🙂", "alone!"]
    assert [attributes.get("class") for tag, attributes in page.tags if tag == "section"] == ["packed", None]


def test_a_row_of_ten_thousand_tokens_is_shown_whole() -> None:
    words = "good day, what is the answer? 🙂\n" * 800
    shown = row(words, words)
    assert len(shown.tokens) > 10_000
    assert Page(view.as_html([shown], "rows")).text(0, "learned") == words
    assert words.replace("\n", "⏎\n") in printed([shown])
