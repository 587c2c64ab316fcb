"""A hook of MkDocs that turns the formulas of a page into MathML, which browsers show by themselves.

It knows the small part of TeX that the documentation uses; anything else is a warning, and so
fails a strict build.
"""
# ruff: noqa: RUF001

import html
import logging
import re


log = logging.getLogger("mkdocs.plugins.mathml")

SYMBOLS = {
    "alpha": "α", "approx": "≈", "cdot": "·", "circ": "∘", "dots": "…", "ell": "ℓ", "ge": "≥", "in": "∈", "infty": "∞", "le": "≤",
    "lfloor": "⌊", "mapsto": "↦", "mu": "μ", "ne": "≠", "odot": "⊙", "pi": "π", "pm": "±", "rfloor": "⌋", "sigma": "σ",
    "sum": "∑", "times": "×", "to": "→", "top": "⊤", "{": "{", "}": "}", ",": "\u2009", " ": "\u2009",
}  # fmt: skip
FUNCTIONS = {"arg", "exp", "log", "max", "min", "sign"}
TOKEN = re.compile(r"\\([A-Za-z]+|.)|(\d+(?:\.\d+)?)|([A-Za-z])|(\S)")


class Parser:
    """Turns TeX into MathML, one token after another."""

    def __init__(self, tex: str):
        self.tokens = list(TOKEN.finditer(tex))

    def row(self, end: str | None = None) -> str:
        """Everything up to `end`, or to the last token."""
        parts = []
        while self.tokens:
            if self.tokens[0].group() == end:
                self.tokens.pop(0)
                return f"<mrow>{''.join(parts)}</mrow>"
            parts.append(self.scripted())
        if end:
            raise ValueError(f"a group without its {end}")
        return f"<mrow>{''.join(parts)}</mrow>"

    def scripted(self) -> str:
        """One atom with its subscript and superscript."""
        base, scripts = self.atom(), {}
        while self.tokens and self.tokens[0].group() in "_^":
            mark = self.tokens.pop(0).group()
            scripts[mark] = self.atom()
        if len(scripts) == 2:
            return f"<msubsup>{base}{scripts['_']}{scripts['^']}</msubsup>"
        for mark, script in scripts.items():
            tag = "msub" if mark == "_" else "msup"
            return f"<{tag}>{base}{script}</{tag}>"
        return base

    def atom(self) -> str:
        """A group, a command with its arguments, or a sign."""
        if not self.tokens:
            raise ValueError("a formula that ends too early")
        command, number, letter, sign = self.tokens.pop(0).groups()
        if command in ("hat", "bar", "tilde"):
            accent = {"hat": "^", "bar": "¯", "tilde": "~"}[command]
            return f'<mover accent="true">{self.atom()}<mo>{accent}</mo></mover>'
        if command == "frac":
            return f"<mfrac>{self.atom()}{self.atom()}</mfrac>"
        if command == "sqrt":
            return f"<msqrt>{self.atom()}</msqrt>"
        if command == "mathrm":
            return f"<mi>{self.word()}</mi>"
        if command in FUNCTIONS:
            return f"<mi>{command}</mi>"
        if command in SYMBOLS:
            return f"<mo>{SYMBOLS[command]}</mo>"
        if command:
            raise ValueError(f"the command \\{command}, which docs/mathml.py does not know")
        if sign == "{":
            return self.row("}")
        if number:
            return f"<mn>{number}</mn>"
        return f"<mi>{letter}</mi>" if letter else f"<mo>{html.escape(sign)}</mo>"

    def word(self) -> str:
        """The letters of a group, as one name."""
        if not self.tokens or self.tokens.pop(0).group() != "{":
            raise ValueError("a \\mathrm without a group in braces")
        letters = []
        while self.tokens:
            if (letter := self.tokens.pop(0).group()) == "}":
                return html.escape("".join(letters))
            letters.append(letter)
        raise ValueError("a group without its }")


def mathml(tex: str) -> str:
    """The MathML of a formula."""
    return f"<math>{Parser(tex).row()}</math>"


def on_page_content(content: str, page, **kwargs) -> str:
    """Replaces the formulas that pymdownx.arithmatex has marked."""

    def replace(match: re.Match) -> str:
        tex = html.unescape(match.group(1))
        try:
            return mathml(tex)
        except ValueError as error:
            log.warning("%s: the formula %s has %s", page.file.src_uri, tex, error)
            return html.escape(tex)

    return re.sub(
        r'<span class="arithmatex">\\\((.*?)\\\)</span>', replace, content, flags=re.DOTALL
    )
