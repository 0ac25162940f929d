"""The folder of a prepared data set: its path, its manifest, and a lock for its writer."""

import contextlib
import fcntl
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hccr_jax.errors import InputError
from hccr_jax.paths import shown

VERSION = "1.0.0"
MANIFEST = "manifest.json"


def dataset_folder(name: str, data_dir: str | Path) -> Path:
    """Returns the folder of the data set `name` in `data_dir`, the folder of all data sets.

    Raises:
      InputError: TFDS, or the reader of its records, takes no such `data_dir`.
    """
    if re.search(r"\*\*|[\udc80-\udcff]", str(Path(data_dir).absolute())):
        raise InputError(
            f"data_dir={shown(data_dir)}: its path must not have ** or bytes that are not UTF-8: "
            f"choose another"
        )
    return Path(data_dir, name, VERSION)


def read_manifest(name: str, data_dir: str | Path) -> dict[str, Any]:
    """Returns the manifest of a prepared data set.

    Raises:
      InputError: it has not been prepared; the message says how.
    """
    path = dataset_folder(name, data_dir) / MANIFEST
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        if name != "casia_hwdb":
            raise InputError(
                f"no data set {name} in {data_dir}: make it with `hccr prepare "
                f"--pictures=FOLDER --data_dir={data_dir} --name={name}`, or from --archives=…"
            ) from error
        raise InputError(
            f"no data set {name} in {data_dir}: download Gnt1.1TrainPart1.zip, "
            f"Gnt1.1TrainPart2.zip and Gnt1.1Test.zip from https://nlpr.ia.ac.cn/databases/Download"
            f"/Offline/CharData/ (or HWDB1.1trn_gnt_P1.zip, HWDB1.1trn_gnt_P2.zip and "
            f"HWDB1.1tst_gnt.zip, their older names) into a folder ARCHIVES, then run `"
            f"hccr prepare --archives=ARCHIVES --data_dir={data_dir} --name={name}`; "
            f"`launch/quickstart.sh` runs without any download"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: damaged: {error}: prepare again with --overwrite") from error


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds the lock file `path`, waiting for another holder; its folder is created.

    The lock is released when its holder ends, even if killed.

    Raises:
      InputError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise InputError(f"{path.parent}: cannot be written: {error.strerror}") from error
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
