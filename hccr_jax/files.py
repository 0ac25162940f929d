"""Writing a file so that a kill leaves the old one or the new one, never a part."""

from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file in whole, in place of what it held."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
