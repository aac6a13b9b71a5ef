"""Do what pages of the documentation tell the reader, and compare the output.

Three kinds of blocks of a page are used:

* A block whose first line is ``# NAME``, with a name that has an ending, is a file: it
  is saved under that name. Further blocks of that name replace it.
* A ``diff`` block changes a file: the lines with ``-`` become those with ``+``.
* In a ``console`` block the lines with ``$`` are typed, into one shell for the whole
  page, and the others are compared with what comes out: ``…`` stands for any text, and
  on a line of its own for any lines. A command whose shown output has a line of pytest's
  that begins with ``E`` or ``FAILED`` or says ``failed`` must fail; every other one must
  succeed.

    python tools/walk.py PAGE ...                       # as its test does
    python tools/walk.py --as-printed --heading "..." PAGE   # with nothing left out

It needs nothing but Python.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ROOT: Final = Path(__file__).parents[1]
#: Commands that a walk leaves out, and why; with ``--as-printed`` it runs them all.
LEFT_OUT: Final[dict[str, str]] = {
    r"python3 -m venv \.venv && \. \.venv/bin/activate": "the walk's environment is made",
    r"pip install .*": "and has what pages install",
    r"pip wheel .*": "it is installed already",
    r".*/tox run -e (example|py)": "full CI runs these from a clean clone, as printed",
}
_BLOCK: Final = re.compile(
    r"^(?P<indent> *)```(?P<kind>\w+)\n(?P<text>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)
_NAME: Final = re.compile(r"# ([\w./-]+\.\w+)\n")
_FAILS: Final = re.compile(r"(E |FAILED) |.*\b[0-9]+ (failed|errors?)\b")


class WalkError(Exception):
    """The result of a page's commands is not the printed one."""


class File(NamedTuple):
    """A file to save."""

    name: str
    text: str

    def walk(self, shell: Shell) -> None:
        """Save it."""
        path = shell.folder() / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.text, encoding="utf-8")


class Change(NamedTuple):
    """Lines of a file to replace."""

    name: str
    before: str
    after: str

    def walk(self, shell: Shell) -> None:
        """Replace them.

        Raises:
            WalkError: They are not there, or more than once.
        """
        path = shell.folder() / self.name
        text = path.read_text(encoding="utf-8")
        if text.count(self.before) != 1:
            raise WalkError(f"{self.name} has not once:\n{self.before}")
        path.write_text(text.replace(self.before, self.after), encoding="utf-8")


class Command(NamedTuple):
    """A command to type, and the lines that the page shows below it."""

    line: str
    shown: tuple[str, ...]

    @property
    def must_fail(self) -> bool:
        """Whether the page shows a failure."""
        return any(_FAILS.match(each) for each in self.shown)

    def walk(self, shell: Shell) -> None:
        """Type it.

        Raises:
            WalkError: Its exit code or its output is not that of the page.
        """
        done = shell.type(self.line)
        if done is None:
            return
        code, output = done
        if bool(code) != self.must_fail:
            expected = "a failure" if self.must_fail else "success"
            raise WalkError(
                f"$ {self.line}\nended with {code}, the page shows {expected}:\n{output}"
            )
        missing = first_missing(self.shown, output)
        if missing is not None:
            raise WalkError(
                f"$ {self.line}\nthe page shows:\n{missing}\nwhich is not there, or not "
                f"where it is shown:\n{output}"
            )


def steps(page: str, heading: str | None = None) -> list[File | Change | Command]:
    """Return the reader's steps in order; only of the section below a heading, if one is given.

    Raises:
        WalkError: There is no such heading, or a block of Python has no name.
    """
    if heading is not None:
        found = re.search(rf"^(#+) {re.escape(heading)}\n", page, re.MULTILINE)
        if found is None:
            raise WalkError(f"there is no heading {heading!r}")
        higher = rf"^#{{1,{len(found[1])}}} "
        page = re.split(higher, page[found.end() :], maxsplit=1, flags=re.MULTILINE)[0]
    return [step for match in _BLOCK.finditer(page) for step in _steps(match)]


def _steps(match: re.Match[str]) -> Iterator[File | Change | Command]:
    text = re.sub(rf"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
    name = _NAME.match(text)
    if match["kind"] == "console":
        yield from _commands(text)
    elif match["kind"] == "diff":
        yield _change(text)
    elif name is not None:
        yield File(name[1], text)
    elif match["kind"] == "python":
        raise WalkError(f"this block has no name, so nobody can save it:\n{text}")


def _commands(text: str) -> Iterator[Command]:
    for each in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        line, _newline, shown = each.partition("\n")
        yield Command(line.partition("  #")[0].strip(), tuple(shown.splitlines()))


def _change(text: str) -> Change:
    head, *lines = text.splitlines(keepends=True)
    before = "".join(each[1:] for each in lines if each[0] in " -")
    after = "".join(each[1:] for each in lines if each[0] in " +")
    return Change(head.removeprefix("# ").strip(), before, after)


def first_missing(shown: Sequence[str], output: str) -> str | None:
    """Return the first shown line that the output lacks; None if it has them all.

    Blank lines count for nothing, and several blanks are one: how wide a column is
    depends on what else is in it. Blanks beside … may be missing.
    """
    lines = [each for each in shown if each.strip()]
    if not lines or _matches(lines, output):
        return None
    for count in range(1, len(lines)):
        if not _matches([*lines[:count], "…"], output):
            return lines[count - 1]
    return lines[-1]


def _matches(shown: Sequence[str], output: str) -> bool:
    parts = [
        r"(?:.*\n)*"
        if each.strip() == "…"
        else ".*".join(map(re.escape, re.split(r"\s*…\s*", _narrow(each)))) + "\n"
        for each in shown
    ]
    return re.fullmatch("".join(parts), _lines(output)) is not None


def _lines(output: str) -> str:
    return "".join(f"{_narrow(each)}\n" for each in output.splitlines() if each.strip())


def _narrow(line: str) -> str:
    return re.sub(r"\s+", " ", line).strip()


class Shell:
    """A shell in an empty folder with an empty home, for as long as the block lasts.

    Args:
        environment: Its variables.
        folder: Where it starts.
        left_out: Patterns of commands that it does not run.
        shows: Whether what comes out is shown at once.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        folder: Path,
        *,
        left_out: Sequence[str] = tuple(LEFT_OUT),
        shows: bool = False,
    ) -> None:
        self._left_out = left_out
        self._shows = shows
        self._bash = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],  # noqa: S607  # the reader's own
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        )

    def __enter__(self) -> Shell:  # noqa: PYI034  # Self needs Python 3.11
        return self

    def __exit__(self, *_error: object) -> None:
        self._bash.communicate()

    def type(self, line: str) -> tuple[int, str] | None:
        """Run a command; return its exit code and what it printed; None if left out.

        Raises:
            WalkError: It ended the shell.
        """
        if any(re.fullmatch(each, line) for each in self._left_out):
            return None
        if self._shows:
            sys.stdout.write(f"$ {line}\n")
            sys.stdout.flush()
        return self._run(line, shows=self._shows)

    def folder(self) -> Path:
        """Return where the shell is."""
        return Path(self._run("pwd", shows=False)[1].strip())

    def _run(self, line: str, *, shows: bool) -> tuple[int, str]:
        end = "--- end of a command ---"
        assert self._bash.stdin is not None  # noqa: S101  # stdin and stdout are pipes
        assert self._bash.stdout is not None  # noqa: S101  # stdin and stdout are pipes
        self._bash.stdin.write(f"{{ {line}\n}} </dev/null; printf '\\n{end}%s\\n' $?\n")
        self._bash.stdin.flush()
        output: list[str] = []
        for each in self._bash.stdout:
            if each.startswith(end):
                return int(each.removeprefix(end)), "".join(output)
            output.append(each)
            if shows:
                sys.stdout.write(each)
                sys.stdout.flush()
        raise WalkError(f"$ {line}\nended the shell:\n{''.join(output)}")


def readers_environment(home: Path) -> dict[str, str]:
    """Return a reader's variables: an empty home, and nothing of pytest, tox or a CI.

    The environment that runs this comes first on the path. What pip needs to know of the
    machine's network stays, and so does a cache of checkpoints, if one is named.
    """
    dropped = re.compile(
        r"(PYTEST_(?!GPUMEM_CACHE)|PYTHON|GITHUB_|TOX|VIRTUAL_ENV|XDG_|CI$)"
    )
    kept = {name: text for name, text in os.environ.items() if not dropped.match(name)}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**kept, "HOME": str(home), "PATH": path, "COLUMNS": "80"}


def walk(
    pages: Sequence[Path],
    scratch: Path,
    *,
    heading: str | None = None,
    as_printed: bool = False,
    shows: bool = False,
) -> int:
    """Walk pages one after another; return how many commands and files there were.

    Args:
        pages: The pages; they share one folder, as those of one chapter do.
        scratch: An empty folder, for the reader's home and work.
        heading: Walk only the section below it.
        as_printed: Leave nothing out, and start here, which is a clone, with the
            environment as it is.
        shows: Whether what comes out is shown at once.

    Raises:
        WalkError: A page does not do what it says.
    """
    home, work = scratch / "home", scratch / "pytest-gpumem"
    home.mkdir()
    work.mkdir()
    environment = readers_environment(home)
    if as_printed:
        work, environment = Path.cwd(), dict(os.environ)
    with Shell(
        environment, work, left_out=() if as_printed else tuple(LEFT_OUT), shows=shows
    ) as shell:
        if not as_printed:
            shell.type("git init --quiet")
        count = 0
        for page in pages:
            for step in steps(page.read_text(encoding="utf-8"), heading):
                try:
                    step.walk(shell)
                except WalkError as error:
                    raise WalkError(f"{page.name}: {error}") from None
                count += 1
    return count


def main() -> int:
    """Walk the pages that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--as-printed", action="store_true", help="leave nothing out")
    parser.add_argument("--heading", help="walk the part below this heading alone")
    parser.add_argument("pages", nargs="+", type=Path)
    given = parser.parse_args()
    for page in given.pages:
        with tempfile.TemporaryDirectory() as folder:
            try:
                walk(
                    [page],
                    Path(folder),
                    heading=given.heading,
                    as_printed=given.as_printed,
                    shows=True,
                )
            except WalkError as error:
                sys.stdout.write(f"{error}\n")
                return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
