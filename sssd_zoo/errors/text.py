"""Makes untrusted text (names of classes, files and data sets, answers of a server) safe to show.

A name may contain anything: escape sequences that a terminal obeys, characters that change the reading direction, tags,
table rows, formulas. There is one function per output format, and all names go through it:

- a terminal: `safe_terminal` around the whole `sssd` command, and `plain` in every `UserError`; `fitted` breaks no word
- Markdown, in reports and cards: `markdown` in running text, `code` between backticks
- HTML, on the page: `html`
- figures: `plain`; formulas are switched off by the figures' style
- YAML and JSON are written by their libraries, which quote what needs it.
"""

import html as library
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO

LONGEST = 200  # characters of a name that are shown
# C0 and C1 controls, marks and overrides of the reading direction, line and paragraph separators, invisible operators
# and tags, halves of surrogate pairs. Not the joiners U+200C and U+200D, which scripts and emoji are written with.
UNSAFE = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f"
)
_HIDDEN = re.compile(f"[{UNSAFE}]")
_HIDDEN_IN_A_NAME = re.compile(f"[{UNSAFE}\t\n]")
# Emphasis (an underscore within a word is none), code, links, strikethrough and mathematics.
_MARKDOWN = re.compile(r"[\\`*\[\]~$]|(?<!\w)_|_(?!\w)")
_CURSOR = re.compile(r"(?:[\r\n]|\x1b\[A)*")  # what progress bars write between lines


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def plain(value: Any, longest: int = LONGEST) -> str:
    r"""A name as one line of visible characters: others become escapes ('\x1b'), long names are cut ('...')."""
    words = str(value)
    words = words if len(words) <= longest else words[: longest - 3] + "..."
    return _HIDDEN_IN_A_NAME.sub(_escaped, words)


def listed(names: Sequence[str], limit: int = 5, separator: str = ", ") -> str:
    """The first names of a list for a message, and how many more there are."""
    return separator.join([*names[:limit], *([f"and {len(names) - limit} more"] if len(names) > limit else [])])


def plural(count: int, word: str) -> str:
    """'1 image', '2,000 images'."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def html(value: Any) -> str:
    """A name in HTML, between tags or in a quoted attribute."""
    return library.escape(plain(value))


def markdown(value: Any, longest: int = LONGEST) -> str:
    """A name in a line of Markdown without tags, emphasis, links or formulas. `markdown.table` escapes its bars."""
    return library.escape(_MARKDOWN.sub(lambda sign: "\\" + sign[0], plain(value, longest)), quote=False)


def code(value: Any) -> str:
    """A name between backticks in Markdown; without them if it contains backticks or backslashes."""
    words = plain(value)
    return markdown(words) if "`" in words or "\\" in words else f"`{words}`"


def wrapped(text: str, width: int) -> str:
    """Text whose lines are broken between words where they are longer than `width`; a longer word stays whole.

    A command, that is a line of `sssd ...`, is broken before its flags alone, by a backslash: it can still be pasted.
    """
    lines = []
    for line in text.split("\n"):
        words = line.lstrip(" ")
        indent = line[: len(line) - len(words)]
        is_command = words.startswith("sssd ")
        if len(line) > width:
            parts = textwrap.wrap(
                re.sub(" (?!--)", "\0", words) if is_command else words,
                width - (2 if is_command else 0),
                initial_indent=indent,
                subsequent_indent=indent + "  ",
                break_long_words=False,
                break_on_hyphens=False,
            )
            line = (" \\\n" if is_command else "\n").join(parts).replace("\0", " ")
        lines.append(line)
    return "\n".join(lines)


def fitted(text: str, stream: Any) -> str:
    """Text for a stream: `wrapped` to the terminal's width where it is one, else as it is."""
    return wrapped(text, shutil.get_terminal_size().columns) if stream.isatty() else text


class Terminal:
    """A stream that shows control characters as escapes, so that no name can move the cursor or rewrite output.

    Args:
        stream: the stream to write to; other methods are its own.
        messages: whether it carries messages alone, which are `fitted` to the terminal.
    """

    def __init__(self, stream: TextIO, *, messages: bool = False) -> None:
        self._stream, self._messages = stream, messages

    def write(self, words: str) -> int:
        """Writes `words` with control characters escaped, except the cursor movements of progress bars."""
        if not _CURSOR.fullmatch(words):
            start = words[:1] if words[:1] == "\r" else ""
            words = start + _HIDDEN.sub(_escaped, words[len(start) :].replace("\r\n", "\n"))
            if self._messages and not start:  # progress bars fit their own lines
                words = fitted(words, self._stream)
        return self._stream.write(words)

    def writelines(self, lines: list[str]) -> None:
        """Writes each line."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def safe_terminal() -> Iterator[None]:
    """Passes everything written to stdout and stderr in the block, by any library, through `Terminal`."""
    out: Any = Terminal(sys.stdout)
    err: Any = Terminal(sys.stderr, messages=True)
    with redirect_stdout(out), redirect_stderr(err):
        yield
