"""The 3,755 level-1 characters of GB2312-80 and the two-byte tags that name them in CASIA files."""

import functools


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
