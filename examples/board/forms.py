"""What someone has typed into the form, cleaned and judged.

Owns: the rules for a post that need no database, and the sentences that say what is wrong.

Must not: query, or know HTML.
"""

from __future__ import annotations

import dataclasses
import re
import typing as t
import unicodedata

from . import models

_EMAIL = re.compile(r"[^@\s]+@[^@\s.]+(\.[^@\s.]+)+")


@dataclasses.dataclass(frozen=True)
class PostForm:
    """The fields of a new post, as typed but for what nobody can see."""

    username: str = ""
    email: str = ""
    title: str = ""
    content: str = ""

    #: For the template, which sets the same limits in the browser.
    max_length: t.ClassVar[t.Mapping[str, int]] = {
        "username": models.USERNAME_LENGTH,
        "email": models.EMAIL_LENGTH,
        "title": models.TITLE_LENGTH,
        "content": models.CONTENT_LENGTH,
    }

    @classmethod
    def read(cls, data: t.Mapping[str, str]) -> PostForm:
        """Take the fields from a submitted form; one that is missing counts as empty."""
        return cls(
            username=_line(data.get("username", "")),
            # Upper and lower case reach the same mailbox, so they are the same author.
            email=_line(data.get("email", "")).lower(),
            title=_line(data.get("title", "")),
            content=_visible(data.get("content", "")).strip(),
        )

    def mistakes(self) -> dict[str, str]:
        """A sentence for each field that cannot be accepted, by its name, in their order."""
        found = {}
        for name, limit in self.max_length.items():
            value = getattr(self, name)
            if not value:
                found[name] = _MISSING[name]
            elif len(value) > limit:
                found[name] = f"At most {limit:,} characters, please; these are {len(value):,}."
        # A slash would lead to another page than the profile, as would the names . and ..;
        # characters that are not printable include those that make one name look like another.
        if "username" not in found and (
            "/" in self.username or not self.username.strip(".") or not self.username.isprintable()
        ):
            found["username"] = "Please choose a name without slashes or invisible characters."
        if "email" not in found and not (_EMAIL.fullmatch(self.email) and self.email.isprintable()):
            found["email"] = "This is not an e-mail address. One looks like name@example.org."
        return {name: found[name] for name in self.max_length if name in found}


_MISSING = {
    "username": "Please enter your name.",
    "email": "Please enter your e-mail address.",
    "title": "Please give your post a title.",
    "content": "Please write something.",
}


def _line(text: str) -> str:
    return " ".join(_visible(text).split())


def _visible(text: str) -> str:
    """The text in one spelling of its letters, with plain line ends and no control characters.

    The same Korean name can be sent as syllables or as single letters; it must be one author.
    """
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    return "".join(
        character
        for character in text
        if character in "\n\t" or unicodedata.category(character) != "Cc"
    )
