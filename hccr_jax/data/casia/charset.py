"""Characters: the 3,755 of GB2312-80's level 1, the tags of CASIA files, the names of folders."""

import functools
import re
import unicodedata

# What U+2E81 to U+2EF3 stand for, in order (U+2E9A is unassigned). The other radicals, U+2F00 to
# U+2FD5, have compatibility decompositions.
# Source: Unicode Character Database, EquivalentUnifiedIdeograph.txt.
_RADICALS = (
    "厂乛乚乙亻冂𠘨刀刂卜㔾小小兀尣尢𡯂巳幺彑彐忄心扌攵\u2e9a旡日月歺母民氵氺灬爫爫丬牛犭"
    "王𤴔目示礻𥫗糹纟罓罒㓁冗𦉫羊𦍌𦍋耂肀聿肉𦥑艹艹艹虎衤覀西见角𧢲讠贝𧾷车辶辶辶邑钅"
    "長镸长门𨸏阝雨青韦页风飞食𩙿飠饣𩠐马骨鬼鱼鸟卤麦黄黾斉齐歯齿竜龙龜亀龟"
)
# U+4E00 and u4e00; unzip writes #U4e00 for a name that it cannot encode.
_CODE = re.compile("#?[Uu][+]?([0-9A-Fa-f]{4,6})")


@functools.cache
def level1() -> tuple[str, ...]:
    """Returns the 3,755 level-1 characters in GB2312 order: rows 16 to 55, the last five short.

    Source: GB 2312-80; CASIA-HWDB1.1 uses exactly this set.

    >>> len(level1()), level1()[0], level1()[-1]
    (3755, '啊', '座')
    """
    cells = ((row, column) for row in range(16, 56) for column in range(1, 95))
    codes = (bytes((0xA0 + row, 0xA0 + column)) for row, column in cells)
    return tuple(code.decode("gb2312") for code in codes if code < b"\xd7\xfa")


@functools.cache
def chinese() -> tuple[str, ...]:
    """Returns the 20,902 characters from U+4E00 to U+9FA5: all of GBK's, those of GB2312 first.

    CASIA-HWDB1.0 and 1.2 hold some hundred characters beyond GB2312.

    >>> len(chinese()), chinese()[:3755] == level1()
    (20902, True)
    """

    def place(character: str) -> bytes:
        try:
            return character.encode("gb2312")
        except UnicodeEncodeError:
            return b"\xff" + character.encode("utf-16-be")

    return tuple(sorted(map(chr, range(0x4E00, 0x9FA6)), key=place))


@functools.cache
def class_index() -> dict[str, int]:
    """Returns the map from a level-1 character to its place in `level1()`."""
    return {character: index for index, character in enumerate(level1())}


def tag_to_character(tag: bytes) -> str | None:
    """Returns the character that a GNT tag names, or None for an unknown code.

    The tag is decoded as GB18030, the superset of GBK with all symbols of the archives.

    Args:
      tag: the two bytes as in the file, high byte first. One-byte characters (digits,
        letters, marks) are stored as the byte and a zero.

    >>> [tag_to_character(bytes.fromhex(tag)) for tag in ("b0a1", "4100", "ffff")]
    ['啊', 'A', None]
    """
    try:
        character = tag.rstrip(b"\0").decode("gb18030")
    except UnicodeDecodeError:
        return None
    return character if len(character) == 1 else None


def character_to_tag(character: str) -> bytes:
    """Returns the two tag bytes of a GBK character: the inverse of `tag_to_character`.

    Raises:
      UnicodeEncodeError: GBK has no such character.
    """
    return character.encode("gbk").ljust(2, b"\0")


def canonical(text: str) -> str:
    """Returns text in which each character has one code point: NFC, radicals as ideographs.

    >>> [f"{ord(c):X}" for c in canonical("\u2f00\u2ed3\uf967か\u3099")]  # ⼀, ⻓, 不, が
    ['4E00', '957F', '4E0D', '304C']
    """
    return "".join(map(_without_radical, unicodedata.normalize("NFC", text)))


def parse_character(name: str) -> str | None:
    """Returns the character that a name denotes, or None.

    >>> [parse_character(name) for name in ("永", "U+6C38", "#U6c38", "A", "ab", "U+D800", "")]
    ['永', '永', '永', 'A', None, None, None]
    """
    if code := _CODE.fullmatch(name.strip()):
        name = chr(int(code[1], 16)) if int(code[1], 16) < 0x110000 else ""
    name = canonical(name.strip())
    return name if len(name) == 1 and is_character(name) else None


def is_character(character: str) -> bool:
    """Returns whether it is a letter, number, mark or symbol: no control, blank or unassigned."""
    return unicodedata.category(character)[0] in "LNPSM"


def _without_radical(character: str) -> str:
    if "\u2f00" <= character <= "\u2fd5":
        return unicodedata.normalize("NFKC", character)
    if "\u2e81" <= character <= "\u2ef3":
        return _RADICALS[ord(character) - 0x2E81]
    return character
