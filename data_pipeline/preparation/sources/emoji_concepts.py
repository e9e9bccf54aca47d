"""Which drawings show the same thing, whoever drew them. A concept stands on one side of a split with all of them.

A code is a hyphenated sequence of code points, as the files are named: `1F469-1F3FD-200D-1F680` is a woman
astronaut of medium skin tone. What only varies a drawing is dropped: skin tone, gender, hair, direction, who is in a
family or a couple. `FAMILIES` adds the groups that code points do not show: clocks, moon phases, keycaps, and so on.
"""

SKIN_TONES = {
    "1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark",
}  # fmt: skip
_JOINER = "200D"
_PERSON = "1F9D1"
# man, woman, boy, girl, child, older man, older woman, older adult, blond, bearded
_PEOPLE = {"1F468", "1F469", "1F466", "1F467", "1F9D2", "1F474", "1F475", "1F9D3", "1F471", "1F9D4"}
_DROPPED = {"FE0F", "2640", "2642", "27A1", "1F9B0", "1F9B1", "1F9B2", "1F9B3"} | SKIN_TONES.keys()

# Drawings of one another's likeness; `-` joins the ends of a range of code points, `+` those of a sequence.
FAMILIES = {
    "imp": "1F608 1F47F",
    "royalty": "1F934 1F478 1FAC5",
    "claus": "1F385 1F936 1F9D1+200D+1F384",
    "dancing": "1F57A 1F483",
    "pregnant": "1F930 1FAC3 1FAC4",
    "feeding a baby": "1F931 1F9D1+200D+1F37C",
    "holding hands": "1F46B-1F46D",
    "pointing hand": "1F446-1F449 261D",
    "fist": "1F91B 1F91C 1F44A 270A",
    "thumb": "1F44D 1F44E",
    "raised hand": "270B 1F91A 1F590",
    "sideways hand": "1FAF1 1FAF2",
    "flat palm": "1FAF3 1FAF4",
    "pushing hand": "1FAF7 1FAF8",
    "bust": "1F464 1F465",
    "clock face": "1F550-1F567",
    "moon phase": "1F311-1F318",
    "moon with a face": "1F31A-1F31D 1F319",
    "earth": "1F30D-1F30F",
    "heart": "2764 1F9E1 1F49B 1F49A 1F499 1FA75 1F49C 1F90E 1F5A4 1FA76 1F90D 1FA77",
    "circle": "1F534 1F535 1F7E0-1F7E4 26AA 26AB 2B55 1F518",
    "square": "1F7E5-1F7EB 2B1B 2B1C 25AA 25AB 25FB-25FE 1F532 1F533",
    "diamond": "1F536-1F539",
    "triangle": "1F53A-1F53D 25B6 25C0 23E9-23EC",
    "player button": "23ED-23EF 23F8-23FA 23CF",
    "arrow": "2194-2199 27A1 2B05-2B07 21A9 21AA 2934 2935",
    "circling arrows": "1F500-1F504",
    "captioned arrow": "1F519-1F51D",
    "squared letter": "1F170 1F171 1F17E 1F17F 1F18E 24C2",
    "squared word": "1F191-1F19A",
    "squared ideograph": "1F201 1F202 1F21A 1F22F 1F232-1F23A 1F250 1F251 3297 3299",
    "input symbol": "1F520-1F524",
    "keycap": "1F51F 20E3",
    "zodiac sign": "2648-2653 26CE",
    "question or exclamation mark": "2753-2755 2757 203C 2049",
    "check or cross": "2705 2714 2611 274C 274E 2716",
    "brightness": "1F505 1F506",
    "book": "1F4D5 1F4D7-1F4D9",
    "notebook": "1F4D2-1F4D4",
    "mailbox": "1F4EA-1F4ED",
    "banknote": "1F4B4-1F4B7",
    "speaker": "1F507-1F50A",
    "lock": "1F512 1F513 1F50F 1F510",
    "magnifying glass": "1F50D 1F50E",
    "bell": "1F514 1F515",
    "chart": "1F4C8 1F4C9 1F4B9",
    "calendar": "1F4C5 1F4C6",
    "envelope": "1F4E7-1F4E9 2709",
    "tray": "1F4E4 1F4E5",
    "mobile phone": "1F4F1 1F4F2 1F4F3-1F4F5",
    "camera": "1F4F7 1F4F8",
    "file folder": "1F4C1 1F4C2",
    "battery": "1F50B 1FAAB",
    "medal": "1F947-1F949",
    "three wise monkeys": "1F648-1F64A",
    "hourglass": "231B 23F3",
    "snowman": "2603 26C4",
    "umbrella": "2602 2614",
    "flying airplane": "1F6EB 1F6EC",
    "train front": "1F684 1F685",
    "cat": "1F408 1F408+200D+2B1B",
    "bird": "1F426 1F426+200D+2B1B",
    "dog": "1F415 1F415+200D+1F9BA",
    "lemon": "1F34B 1F34B+200D+1F7E9",
    "mushroom": "1F344 1F344+200D+1F7EB",
    "chain": "26D3 26D3+200D+1F4A5",
    "beer": "1F37A 1F37B",
}


def concept(code: str) -> str:
    """The concept of a drawing: a family's name, or the code of its plainest form.

    >>> concept("1F469-1F3FD-200D-1F680") == concept("1F468-200D-1F680") == "1F9D1-200D-1F680"
    True
    """
    first, *rest = code.split("-")  # a lone tone or sign is a drawing of its own
    points = [
        _PERSON if point in _PEOPLE else point for point in (first, *rest) if point == first or point not in _DROPPED
    ]
    parts = [part for part in "-".join(points).split("-" + _JOINER) if part]
    points = [part.strip("-") for part in parts]
    if points.count(_PERSON) >= 2:
        return _together(points)
    if points == ["1FAF1", "1FAF2"]:  # two hands of different tones
        return "1F91D"
    if points[0].endswith("-20E3"):
        return "keycap"
    plain = f"-{_JOINER}-".join(points) or code
    return _FAMILY_OF.get(plain, plain)


def skin_tones(code: str) -> list[str]:
    """The skin tones of a drawing in the order of its people, in words, each once."""
    return list(dict.fromkeys(SKIN_TONES[point] for point in code.split("-") if point in SKIN_TONES))


def _together(points: list[str]) -> str:
    """Several people in one drawing: which kind of group, whoever they are."""
    for sign, group in (("1F48B", "1F48F"), ("2764", "1F491"), ("1F430", "1F46F"), ("1FAEF", "1F93C")):
        if sign in points:
            return group
    return "holding hands" if "1F91D" in points else "1F46A"


def _members(codes: str) -> list[str]:
    found = []
    for item in codes.split():
        first, _, last = item.partition("-")
        if last:
            found += [f"{point:04X}" for point in range(int(first, 16), int(last, 16) + 1)]
        else:
            found.append(item.replace("+", "-"))
    return found


_FAMILY_OF = {code: family for family, codes in FAMILIES.items() for code in _members(codes)}
