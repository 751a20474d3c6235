"""Rows as they train, to look at: which tokens carry loss, special tokens, turns, packed neighbours.

Three forms of the same rows: JSON for scripts, text for a terminal or a pipe, one HTML page for a browser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from rich.console import Console
from rich.text import Text
from tokenizers.decoders import DecodeStream

from sft_lab.data.tokenize import IGNORE

# Around what carries loss where there is no colour. No brackets, which code and JSON are full of: where a span ends
# must be beyond doubt.
MARKS = "⟦⟧"
# By (learned, special).
_STYLES = {
    (True, True): "bold green reverse",
    (True, False): "bold green",
    (False, True): "magenta reverse",
    (False, False): "dim",
}
# What str.isprintable refuses and is shown nevertheless: the joiners that emoji and several scripts are written with,
# and the space of Chinese and Japanese.
_SHOWN = "\n\t\u200c\u200d\u3000"
_INCOMPLETE = "\ufffd"  # what a decoder writes for bytes that are no whole character


@dataclass(frozen=True, slots=True)
class Token:
    """A token of a row: `text` is what it adds to the decoded row, `label` is -100 where it carries no loss."""

    id: int
    text: str
    label: int
    special: bool

    @property
    def learned(self) -> bool:
        return self.label != IGNORE


@dataclass
class DocumentView:
    """One row of a data set. `turns` are {"role", "trained"}; `notes` are short words, as "truncated"."""

    id: str
    source: str
    tokens: list[Token]
    turns: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def learned(self) -> int:
        return sum(token.learned for token in self.tokens)


@dataclass
class RowView:
    """What a model gets as one sequence: one document, or when packed several, in order."""

    id: str
    documents: list[DocumentView]

    @property
    def source(self) -> str:
        return ", ".join(dict.fromkeys(document.source for document in self.documents))

    @property
    def tokens(self) -> list[Token]:
        return [token for document in self.documents for token in document.tokens]

    @property
    def learned(self) -> int:
        return sum(document.learned for document in self.documents)


def tokens(tokenizer: Any, input_ids: Sequence[int], labels: Sequence[int]) -> list[Token]:
    """The tokens of one document; their texts, joined, are the decoded document.

    The text of a character that several tokens spell is on the last of them, "" on the others.
    """
    added = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = added.union(tokenizer.all_special_ids)
    texts = _texts(tokenizer.backend_tokenizer, input_ids)
    return [Token(id_, text, label, id_ in special) for id_, text, label in zip(input_ids, texts, labels, strict=True)]


def _texts(backend: Any, input_ids: Sequence[int]) -> list[str]:
    stream = DecodeStream(skip_special_tokens=False)
    texts = [""] * len(input_ids)
    first = 0  # of the tokens whose text the stream still holds back
    for i, id_ in enumerate(input_ids):
        chunk = stream.step(backend, id_)
        if chunk is None:
            continue
        own = _inner_text(backend, id_) if first < i else chunk
        if first < i and own and _INCOMPLETE not in own and chunk.endswith(own):
            # Bytes that never became a character, or a real U+FFFD, of which the stream knows only now.
            texts[i - 1], chunk = chunk.removesuffix(own), own
        texts[i], first = chunk, i + 1
    if first < len(input_ids):  # the row ends within a character
        texts[-1] = backend.decode(list(input_ids[first:]), skip_special_tokens=False)
    return texts


def _inner_text(backend: Any, id_: int) -> str:
    """The text of a token that others precede: decoders of the SentencePiece kind take the first one's space away."""
    once, twice = (backend.decode([id_] * n, skip_special_tokens=False) for n in (1, 2))
    return str(twice[len(once) :])


def as_json(rows: Iterable[RowView]) -> dict[str, Any]:
    """`inspect --json`. A packed row is one entry; `documents` says how its tokens divide."""
    return {"rows": [_row_as_json(row) for row in rows]}


def _row_as_json(row: RowView) -> dict[str, Any]:
    return {
        "id": row.id,
        "source": row.source,
        "tokens": [{"id": t.id, "text": t.text, "label": t.label, "special": t.special} for t in row.tokens],
        "turns": [{**turn, "document": i} for i, document in enumerate(row.documents) for turn in document.turns],
        "learned": row.learned,
        "documents": [
            {"id": d.id, "source": d.source, "tokens": len(d.tokens), "learned": d.learned, "notes": d.notes}
            for d in row.documents
        ],
    }


def as_text(rows: Iterable[RowView], console: Console) -> Text:
    """For `console.print(..., soft_wrap=True)`: Rich would else cut long lines, or wrap them and lose spaces.

    Where the console has no colour, what carries loss stands between MARKS.
    """
    marked = console.color_system is None or console.no_color
    text = Text()
    _append_legend(text, marked)
    for row in rows:
        text.append("\n")
        if [document.id for document in row.documents] != [row.id]:
            text.append(f"{printable(row.id)}  {_counts(row)}  documents {len(row.documents)}\n", style="bold")
        for document in row.documents:
            _append_document(text, document, marked)
    text.right_crop(1)  # print ends the last line
    return text


def _append_legend(text: Text, marked: bool) -> None:
    if marked:
        text.append(f"{MARKS[0]}carries loss{MARKS[1]}, all else is only read")
    else:
        samples = {(True, False): "carries loss", (False, False): "only read", (False, True): "special token"}
        for kind, words in samples.items():
            text.append(words, style=_STYLES[kind]).append("  ")
    text.append("  ⏎ line break  ⇥ tab  \\x1b control or unseen character\n")


def _append_document(text: Text, document: DocumentView, marked: bool) -> None:
    notes = "".join(f"  {note}" for note in document.notes)
    text.append(printable(f"── {document.id}  {_counts(document)}{notes}") + "\n", style="bold")
    if document.turns:
        text.append(f"   turns: {_turns(document)}\n")
    for learned, span in groupby(document.tokens, key=lambda token: token.learned):
        text.append(MARKS[0] if learned and marked else "")
        for special, run in groupby(span, key=lambda token: token.special):
            shown = printable("".join(token.text for token in run), MARKS if marked else "")
            text.append(shown.replace("\n", "⏎\n").replace("\t", "⇥\t"), style=_STYLES[learned, special])
        text.append(MARKS[1] if learned and marked else "")
    if not text.plain.endswith("\n"):
        text.append("\n")


def as_html(rows: Iterable[RowView], title: str) -> str:
    """One page that needs nothing else: no script, no network."""
    return _page().render(rows=rows, title=title)


@cache
def _page() -> Template:
    return page_template("rows.html.jinja", {"counts": _counts, "turns": _turns})


def page_template(name: str, filters: Mapping[str, Callable[..., Any]]) -> Template:
    """A page of templates/, in which data is text and nothing else, and a name that it does not know is an error."""
    environment = Environment(
        loader=PackageLoader("sft_lab"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"printable": printable, **filters}
    return environment.get_template(name)


def printable(text: str, refused: str = "") -> str:
    r"""`text` with what a reader would not see, or a terminal would obey, spelt out, as \x1b; and all of `refused`."""
    if text.isprintable() and not refused:
        return text
    return "".join(_spelt(text, refused))


def _spelt(text: str, refused: str) -> Iterator[str]:
    for c in text:
        plain = (c.isprintable() or c in _SHOWN) and c not in refused
        yield c if plain else c.encode("unicode_escape").decode("ascii")


def _counts(view: RowView | DocumentView) -> str:
    share = view.learned / max(len(view.tokens), 1)
    return f"tokens {len(view.tokens)}  learned {view.learned} ({share:.0%})"


def _turns(document: DocumentView) -> str:
    return ", ".join(
        printable(f"{turn['role']} (learned)" if turn["trained"] else turn["role"]) for turn in document.turns
    )
